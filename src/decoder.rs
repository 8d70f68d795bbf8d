//! What every executable form of a model does: take tokens, keep a cache, give logits.
//!
//! The candle reference and an artifact under ONNX Runtime both implement [`Decoder`], so that
//! verification, evaluation and generation are written once.

use std::fmt;

use ndarray::{Array2, Array3, Array4};
use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::ModuleId;

/// Tokens that enter a decoder. Rows are padded on the left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// Token ids, `[batch, sequence]`.
    pub ids: Array2<i64>,
    /// 1 for real tokens, `[batch, past + sequence]`.
    pub mask: Array2<i64>,
    /// Positions, `[batch, sequence]`; those of padding mean nothing.
    pub positions: Array2<i64>,
    /// Which positions' logits are asked for.
    pub logits: Logits,
}

/// Of which positions logits are asked for, or given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Logits {
    /// Every position.
    #[default]
    All,
    /// The last one.
    Last,
}

/// As options and manifests spell it.
impl fmt::Display for Logits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "all",
            Self::Last => "last",
        })
    }
}

/// Which sequences a decoder takes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sequences {
    /// Any number, padded on the left.
    #[default]
    Any,
    /// One, without padding.
    One,
}

/// As options and manifests spell it.
impl fmt::Display for Sequences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "any",
            Self::One => "one",
        })
    }
}

/// Every position's logits are needed, and a decoder gives those of the last one alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} needs the logits of every position, and the artifact gives those of the last one alone: \
     export it with --logits all"
)]
pub struct LastOnly {
    /// What needs them.
    pub what: &'static str,
}

/// What a step gives.
#[derive(Debug, Clone)]
pub struct Output {
    /// `[batch, sequence or 1, vocab]`.
    pub logits: Array3<f32>,
    /// `None` where the decoder does not report its decisions.
    pub routing: Option<Routing>,
}

/// The decisions of one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// The routed modules, in layer order, attention before MLP.
    pub modules: Vec<ModuleId>,
    /// Keep score minus skip score, `[modules, batch, sequence]`; a token is kept at 0 and above.
    pub margins: Array3<f32>,
}

/// A layer's cache.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheEntry {
    /// The layer's place in the checkpoint.
    pub layer: usize,
    /// `[batch, kv_heads, total, head_dim]`, after `RoPE`.
    pub key: Array4<f32>,
    /// `[batch, kv_heads, total, head_dim]`.
    pub value: Array4<f32>,
}

/// What a layer adds up to in one step.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerOutput {
    /// The layer's place in the checkpoint.
    pub layer: usize,
    /// The residual stream after the layer, `[batch, sequence, hidden]`.
    pub hidden: Array3<f32>,
}

/// A model that runs.
pub trait Decoder {
    /// Why a step failed.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Forgets the cache.
    fn reset(&mut self);

    /// Announces how many tokens a row of the cache will hold at most; some decoders then make room
    /// once. Holding more is no error.
    fn reserve(&mut self, _tokens: usize) {}

    /// Whether steps of one token in one sequence go another way, where there is one: gives whether there is.
    fn take_one_token_apart(&mut self, _apart: bool) -> bool {
        false
    }

    /// Runs `input` on top of the cache and appends to it.
    fn step(&mut self, input: &Input) -> Result<Output, Self::Error>;

    /// A copy of the cache of every layer that has one.
    fn cache(&self) -> Result<Vec<CacheEntry>, Self::Error>;

    /// Number of tokens in the vocabulary.
    fn vocab_size(&self) -> usize;

    /// Of which positions its steps can give logits; asked for [`Logits::All`] of several new tokens,
    /// a decoder of [`Logits::Last`] fails.
    fn gives(&self) -> Logits {
        Logits::All
    }

    /// Which sequences it takes at once; of others a step fails.
    fn takes(&self) -> Sequences {
        Sequences::Any
    }

    /// What every layer gave in the last step; `None` where the decoder does not keep it.
    fn layer_outputs(&self) -> Result<Option<Vec<LayerOutput>>, Self::Error> {
        Ok(None)
    }
}

/// A decoder that can take another's decisions: what artifacts are verified against.
pub trait Follow: Decoder {
    /// Like [`Decoder::step`], except that every module named in `routing` keeps the tokens that
    /// `routing` keeps. The margins it reports are still its own routers'.
    ///
    /// `routing` has the batch and the sequence of `input`, and names modules in any order; one
    /// that the decoder does not route is ignored.
    fn follow(&mut self, input: &Input, routing: &Routing) -> Result<Output, Self::Error>;
}

/// A decoder that can try several continuations of what its cache holds.
pub trait Peek: Decoder {
    /// Like [`Decoder::step`], except that the cache stays as it was. After an error it is what a
    /// failed step leaves.
    fn peek(&mut self, input: &Input) -> Result<Output, Self::Error>;
}

/// Whether `decoder` gives what `what` needs: the logits of every position.
pub(crate) fn gives_all(decoder: &impl Decoder, what: &'static str) -> Result<(), LastOnly> {
    match decoder.gives() {
        Logits::All => Ok(()),
        Logits::Last => Err(LastOnly { what }),
    }
}

impl Input {
    /// One row without padding, on top of a cache of `past` such tokens.
    pub fn row(past: usize, tokens: &[i64], logits: Logits) -> Self {
        let shape = (1, tokens.len());
        Self {
            ids: Array2::from_shape_fn(shape, |(_, s)| tokens[s]),
            mask: Array2::ones((1, past + tokens.len())),
            positions: Array2::from_shape_fn(shape, |(_, s)| (past + s) as i64),
            logits,
        }
    }

    /// Prompts of any lengths as one batch, padded on the left with token 0.
    pub fn prompts(prompts: &[Vec<i64>], logits: Logits) -> Self {
        let sequence = prompts.iter().map(Vec::len).max().unwrap_or_default();
        let shape = (prompts.len(), sequence);
        let pad = |row: usize| sequence - prompts[row].len();
        Self {
            ids: Array2::from_shape_fn(
                shape,
                |(b, s)| {
                    if s < pad(b) { 0 } else { prompts[b][s - pad(b)] }
                },
            ),
            mask: Array2::from_shape_fn(shape, |(b, s)| i64::from(s >= pad(b))),
            positions: Array2::from_shape_fn(shape, |(b, s)| s.saturating_sub(pad(b)) as i64),
            logits,
        }
    }

    /// The step after this one: one more token per row.
    #[must_use]
    pub fn then(&self, tokens: &[i64]) -> Self {
        let (batch, total) = self.mask.dim();
        let positions = Array2::from_shape_fn((batch, 1), |(b, _)| self.mask.row(b).sum());
        Self {
            ids: Array2::from_shape_fn((batch, 1), |(b, _)| tokens[b]),
            mask: Array2::from_shape_fn((batch, total + 1), |(b, t)| {
                if t < total { self.mask[[b, t]] } else { 1 }
            }),
            positions,
            logits: self.logits,
        }
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.ids.nrows()
    }

    /// Number of new tokens per row.
    pub fn sequence(&self) -> usize {
        self.ids.ncols()
    }

    /// Number of tokens per row that the cache already holds.
    pub fn past(&self) -> usize {
        self.mask.ncols() - self.ids.ncols()
    }

    /// Whether new token `s` of row `b` is real.
    pub fn is_real(&self, b: usize, s: usize) -> bool {
        self.mask[[b, self.past() + s]] == 1
    }
}

impl Routing {
    /// Whether module `m` (an index into `modules`) keeps new token `s` of row `b`.
    pub fn keeps(&self, m: usize, b: usize, s: usize) -> bool {
        self.margins[[m, b, s]] >= 0.0
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn prompts_are_padded_on_the_left() {
        let input = Input::prompts(&[vec![5, 6, 7], vec![8]], Logits::All);
        assert_eq!(input.ids, array![[5, 6, 7], [0, 0, 8]]);
        assert_eq!(input.mask, array![[1, 1, 1], [0, 0, 1]]);
        assert_eq!(input.positions, array![[0, 1, 2], [0, 0, 0]]);
    }

    #[test]
    fn a_row_continues_the_cache() {
        let input = Input::row(2, &[7, 8, 9], Logits::All);
        assert_eq!(input.ids, array![[7, 8, 9]]);
        assert_eq!(input.mask, array![[1, 1, 1, 1, 1]]);
        assert_eq!(input.positions, array![[2, 3, 4]]);
        assert_eq!((input.past(), input.sequence()), (2, 3));
    }

    #[test]
    fn the_next_step_counts_real_tokens() {
        let input = Input::prompts(&[vec![5, 6, 7], vec![8]], Logits::Last).then(&[9, 10]);
        assert_eq!(input.ids, array![[9], [10]]);
        assert_eq!(input.mask, array![[1, 1, 1, 1], [0, 0, 1, 1]]);
        assert_eq!(input.positions, array![[3], [1]]);
        assert_eq!((input.past(), input.sequence()), (3, 1));
    }
}
