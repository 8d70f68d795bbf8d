//! How good a decoder is: perplexity here, multiple choice in [`choices`], what static pruning would
//! give in [`baseline`], and all of it side by side in [`report`].
//!
//! Perplexity is how well a decoder predicts a text.
//! The text's tokens are cut into windows; each window is run on its own, from an empty cache, and
//! predicts every token of it but the first. With a stride shorter than the window the windows
//! overlap, and each token is scored once, in the first window that predicts it, so that later ones
//! have more context. What is left over at the end and fills no window is not scored.

use std::convert::Infallible;

use ndarray::ArrayView1;
use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::ModuleKind;

use crate::decoder::{Decoder, Input, LastOnly, Logits, Routing, gives_all};
use crate::world::{Stopped, World};

pub mod baseline;
pub mod choices;
pub mod report;

/// How the text is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Tokens per window; at least 2.
    pub window: usize,
    /// From one window's first token to the next one's; the window where not given.
    pub stride: Option<usize>,
    /// Number of windows at most.
    pub limit: Option<usize>,
}

impl Options {
    /// Refuses windows that predict nothing, strides that leave out tokens and limits of nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Window`], [`Error::Stride`], [`Error::Limit`].
    pub fn check(&self) -> Result<(), Error<Infallible>> {
        self.stride().map(|_| ())
    }

    /// From one window to the next, if the options make sense.
    fn stride<D>(&self) -> Result<usize, Error<D>> {
        let Self { window, stride, limit } = *self;
        let stride = stride.unwrap_or(window);
        if window < 2 {
            return Err(Error::Window(window));
        }
        if !(1..=window).contains(&stride) {
            return Err(Error::Stride { stride, window });
        }
        if limit == Some(0) {
            return Err(Error::Limit);
        }
        Ok(stride)
    }
}

/// How far an evaluation is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Windows done.
    pub done: usize,
    /// Windows in all.
    pub windows: usize,
    /// Perplexity of what is done.
    pub perplexity: f64,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Perplexity {
    /// The exponential of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Mean negative log-likelihood of a token, in nats.
    pub nll: f64,
    /// Its standard error, windows taken as the independent unit; `None` for a single window.
    pub nll_standard_error: Option<f64>,
    /// Tokens predicted.
    pub tokens: usize,
    /// Windows run.
    pub windows: usize,
    /// Tokens per window.
    pub window: usize,
    /// From one window's first token to the next one's.
    pub stride: usize,
    /// What the routers skipped; `None` where the decoder does not report its decisions.
    pub skipped: Option<Skipped>,
}

/// Shares of decisions that skip, over the routed modules and every token run; `None` where no such
/// module is routed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skipped {
    /// Of attention modules.
    pub attention: Option<f64>,
    /// Of MLP modules.
    pub mlp: Option<f64>,
    /// Of both.
    pub all: Option<f64>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum Error<D> {
    /// A window predicts nothing.
    #[error("a window of {0} tokens predicts nothing; it must have 2 or more")]
    Window(usize),
    /// Windows that leave out tokens, or never advance.
    #[error("the stride is {stride}; it must be 1 to {window}, the window")]
    Stride {
        /// The stride asked for.
        stride: usize,
        /// The window.
        window: usize,
    },
    /// Not one window is to be run.
    #[error("a limit of 0 windows leaves nothing to measure; it must be 1 or more")]
    Limit,
    /// The text does not fill a window.
    #[error(
        "the text has {tokens} tokens and a window needs {window}; take a longer text or a shorter window"
    )]
    Short {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens per window.
        window: usize,
    },
    /// The decoder gives the last position's logits alone.
    #[error(transparent)]
    LastOnly(#[from] LastOnly),
    /// The decoder failed.
    #[error("window {window}: {source}")]
    Decoder {
        /// From 0.
        window: usize,
        /// The decoder's word.
        source: D,
    },
    /// The decoder gave logits of another shape than it was asked for.
    #[error("window {window}: the logits are {found:?}; {expected:?} was asked for")]
    Logits {
        /// From 0.
        window: usize,
        /// Their shape.
        found: (usize, usize, usize),
        /// `[batch, sequence, vocab]`.
        expected: (usize, usize, usize),
    },
    /// A prediction is NaN, or gives the token no probability at all.
    #[error(
        "window {window}, token {position}: the log-likelihood is {value}; are the weights damaged, or their range too small?"
    )]
    NotFinite {
        /// From 0.
        window: usize,
        /// The predicted token's place in the window.
        position: usize,
        /// What was computed.
        value: f64,
    },
    /// Another rank stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// The windows of a text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Windows {
    pub(crate) window: usize,
    pub(crate) stride: usize,
    pub(crate) count: usize,
}

impl Windows {
    pub(crate) fn new<D>(tokens: usize, options: Options) -> Result<Self, Error<D>> {
        let stride = options.stride()?;
        let Options { window, limit, .. } = options;
        if tokens < window {
            return Err(Error::Short { tokens, window });
        }
        let all = (tokens - window) / stride + 1;
        Ok(Self { window, stride, count: limit.map_or(all, |limit| limit.min(all)) })
    }

    /// Window `index` of `tokens`, as a step from an empty cache.
    pub(crate) fn input(&self, tokens: &[u32], index: usize, logits: Logits) -> Input {
        let first = index * self.stride;
        let tokens = &tokens[first..first + self.window];
        let tokens: Vec<_> = tokens.iter().map(|token| i64::from(*token)).collect();
        Input::row(0, &tokens, logits)
    }

    /// The windows this rank runs to learn the model's modules and to count: its share, or the first
    /// where nothing is left for it, which it must then leave out of its counts.
    pub(crate) fn of(&self, world: &dyn World) -> Vec<usize> {
        let own: Vec<_> = (0..self.count).filter(|index| world.takes(*index)).collect();
        if own.is_empty() { vec![0] } else { own }
    }

    /// The first place in window `index` that no window before it predicts.
    fn first_scored(&self, index: usize) -> usize {
        if index == 0 { 1 } else { (self.window - self.stride).max(1) }
    }
}

/// Runs `decoder` over `tokens` (a text without special tokens) and scores its predictions, each rank
/// of `world` its share of the windows; `progress` hears of every window of this rank.
///
/// # Errors
///
/// Every variant of [`Error`].
pub fn perplexity<D: Decoder>(
    decoder: &mut D,
    tokens: &[u32],
    options: Options,
    world: &dyn World,
    mut progress: impl FnMut(Progress),
) -> Result<Perplexity, Error<D::Error>> {
    gives_all(decoder, "perplexity")?;
    let windows = Windows::new(tokens.len(), options)?;
    let scored = |index| windows.window - windows.first_scored(index);
    // Another rank's windows are zero here, so that no sum depends on the number of ranks.
    let mut losses = vec![0.0; windows.count];
    let (mut done, mut own): (usize, Vec<(f64, usize)>) = (0, Vec::new());
    let mut decisions: Option<Decisions> = None;
    for index in (0..windows.count).filter(|index| world.takes(*index)) {
        let input = windows.input(tokens, index, Logits::All);
        decoder.reset();
        let output =
            decoder.step(&input).map_err(|source| Error::Decoder { window: index, source })?;
        let expected = (1, windows.window, decoder.vocab_size());
        if output.logits.dim() != expected {
            let found = output.logits.dim();
            return Err(Error::Logits { window: index, found, expected });
        }
        let mut sum = 0.0;
        for position in windows.first_scored(index)..windows.window {
            let token = input.ids[[0, position]] as usize;
            let row = output.logits.slice(ndarray::s![0, position - 1, ..]);
            let value = log_likelihood(&row, token);
            if !value.is_finite() {
                return Err(Error::NotFinite { window: index, position, value });
            }
            sum -= value;
        }
        losses[index] = sum;
        own.push((sum, scored(index)));
        if let Some(routing) = &output.routing {
            decisions.get_or_insert_default().count(routing, &input);
        }
        done = (done + world.size()).min(windows.count);
        progress(Progress { done, windows: windows.count, perplexity: mean(&own).exp() });
    }
    decoder.reset();
    world.sum(&mut losses)?;
    let decisions = Decisions::of_all(decisions, world)?;
    let sums: Vec<_> = losses.into_iter().enumerate().map(|(at, sum)| (sum, scored(at))).collect();
    let nll = mean(&sums);
    Ok(Perplexity {
        perplexity: nll.exp(),
        nll,
        nll_standard_error: standard_error(&sums, nll),
        tokens: sums.iter().map(|(_, tokens)| tokens).sum(),
        windows: windows.count,
        window: windows.window,
        stride: windows.stride,
        skipped: decisions.map(|decisions| decisions.skipped()),
    })
}

/// The logarithm of the share softmax gives `token`; NaN for a token outside the vocabulary.
fn log_likelihood(logits: &ArrayView1<'_, f32>, token: usize) -> f64 {
    let Some(&own) = logits.get(token) else { return f64::NAN };
    let highest = logits.iter().fold(f32::NEG_INFINITY, |highest, &v| highest.max(v));
    let sum: f64 = logits.iter().map(|&v| f64::from((v - highest).exp())).sum();
    f64::from(own) - f64::from(highest) - sum.ln()
}

/// Mean per token of windows given as (sum, tokens).
fn mean(sums: &[(f64, usize)]) -> f64 {
    let tokens: usize = sums.iter().map(|(_, tokens)| tokens).sum();
    sums.iter().map(|(sum, _)| sum).sum::<f64>() / tokens as f64
}

/// Tokens of a window share their context, so windows are the unit: the standard error of a ratio of
/// sums over them.
fn standard_error(sums: &[(f64, usize)], mean: f64) -> Option<f64> {
    let windows = sums.len() as f64;
    if sums.len() < 2 {
        return None;
    }
    let tokens: usize = sums.iter().map(|(_, tokens)| tokens).sum();
    let squares: f64 = sums.iter().map(|(sum, tokens)| (sum - mean * *tokens as f64).powi(2)).sum();
    Some((squares * windows / (windows - 1.0)).sqrt() / tokens as f64)
}

/// Counts of decisions by kind of module: (skipped, all).
#[derive(Debug, Default)]
pub(crate) struct Decisions {
    attention: (usize, usize),
    mlp: (usize, usize),
}

impl Decisions {
    /// Adds the decisions of a step's real tokens.
    pub(crate) fn count(&mut self, routing: &Routing, input: &Input) {
        for (m, id) in routing.modules.iter().enumerate() {
            let (skipped, all) = match id.kind {
                ModuleKind::Attention => &mut self.attention,
                ModuleKind::Mlp => &mut self.mlp,
            };
            for (b, s) in ndarray::indices(input.ids.dim()) {
                if input.is_real(b, s) {
                    *skipped += usize::from(!routing.keeps(m, b, s));
                    *all += 1;
                }
            }
        }
    }

    /// Those of all ranks, where any has some.
    pub(crate) fn of_all(own: Option<Self>, world: &dyn World) -> Result<Option<Self>, Stopped> {
        let known = own.is_some();
        let Self { attention, mlp } = own.unwrap_or_default();
        let counts = [attention.0, attention.1, mlp.0, mlp.1, usize::from(known)];
        let mut sums = counts.map(|count| count as f64);
        world.sum(&mut sums)?;
        let [a, b, c, d, known] = sums.map(|sum| sum as usize);
        Ok((known > 0).then_some(Self { attention: (a, b), mlp: (c, d) }))
    }

    pub(crate) fn skipped(&self) -> Skipped {
        let share = |(skipped, all): (usize, usize)| (all > 0).then(|| skipped as f64 / all as f64);
        let both = (self.attention.0 + self.mlp.0, self.attention.1 + self.mlp.1);
        Skipped { attention: share(self.attention), mlp: share(self.mlp), all: share(both) }
    }
}

#[cfg(test)]
pub(crate) mod tests;
