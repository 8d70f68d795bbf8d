//! Does the artifact compute what the reference computes?
//!
//! Both decoders are given the same tokens, case by case ([`cases`]), and everything they report is
//! compared: every decision, the logits, every cache tensor, the text each writes on its own.
//! `docs/verification.md` says what is compared, within which bounds, and why that suffices.
//!
//! A router whose two scores are equal up to rounding may decide either way, and everything after
//! such a *tie* then differs, rightly. So the artifact runs first, and the reference
//! [follows](Follow::follow): it takes the artifact's decisions, and still says what its own
//! routers would have done in that very state. Each decision is thus judged by itself, no value is
//! left out of the comparison, and if every decision agrees or is a tie, the artifact's run *is* a
//! run of the reference, by induction over the modules.

mod cases;
mod compare;
mod drive;
mod place;
mod report;
mod stats;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod toy;

use std::time::Instant;

use skipgpt_passes::ir::DType;

pub use self::cases::drawn;
pub use self::place::{Divergence, Tie};
pub use self::report::{CaseReport, Greedy, GreedyDifference, Report, Rounding, Ties};
pub use self::stats::{Decisions, Stats};
use crate::decoder::{Decoder, Follow};
use crate::tolerance::Tolerances;

/// What is verified, for the report, and how thoroughly.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// The execution provider that runs the artifact.
    pub provider: String,
    /// Version of the ONNX Runtime that runs it.
    pub onnxruntime: String,
    /// What the artifact computes in.
    pub dtype: DType,
    /// The bounds.
    pub tolerances: Tolerances,
    /// Which tokens are drawn where no prompts are given.
    pub seed: u64,
    /// Steps of one token after the first prompt.
    pub decode_steps: usize,
    /// Tokens each decoder writes on its own after every prompt.
    pub greedy_tokens: usize,
    /// Compare every layer's output too, where both decoders keep them.
    pub layer_outputs: bool,
}

impl Options {
    /// 32 decode steps, 64 greedy tokens, the bounds of `dtype`.
    pub fn new(provider: &str, onnxruntime: &str, dtype: DType) -> Self {
        Self {
            provider: provider.to_owned(),
            onnxruntime: onnxruntime.to_owned(),
            dtype,
            tolerances: Tolerances::of(dtype),
            seed: 0,
            decode_steps: 32,
            greedy_tokens: 64,
            layer_outputs: false,
        }
    }
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The case being run.
    pub case: &'a str,
    /// Steps done in it.
    pub step: usize,
    /// Steps it has.
    pub steps: usize,
}

/// Which of the two decoders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that is right.
    Reference,
    /// The one in question.
    Artifact,
}

/// Why the comparison could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error<R: std::error::Error + 'static, A: std::error::Error + 'static> {
    /// The reference failed.
    #[error("case `{case}`, step {step}: the reference failed")]
    Reference {
        /// The case.
        case: String,
        /// The step, from 0.
        step: usize,
        /// Why.
        #[source]
        source: R,
    },
    /// The artifact failed.
    #[error("case `{case}`, step {step}: the artifact failed")]
    Artifact {
        /// The case.
        case: String,
        /// The step, from 0.
        step: usize,
        /// Why.
        #[source]
        source: A,
    },
    /// The two are not of one checkpoint.
    #[error(
        "the artifact has a vocabulary of {artifact} tokens, the reference one of {reference}: was it exported from another checkpoint?"
    )]
    Vocabulary {
        /// The reference's.
        reference: usize,
        /// The artifact's.
        artifact: usize,
    },
    /// A prompt without tokens.
    #[error("prompt {prompt} has no token; give at least one")]
    EmptyPrompt {
        /// Which, from 0.
        prompt: usize,
    },
    /// A prompt with a token the model does not have.
    #[error(
        "prompt {prompt}: token {token} is outside the vocabulary of {vocab}; was it made with another tokenizer?"
    )]
    Token {
        /// Which prompt, from 0.
        prompt: usize,
        /// The token.
        token: i64,
        /// Number of tokens in the vocabulary.
        vocab: usize,
    },
    /// A decoder gave something of the wrong shape.
    #[error("case `{case}`, step {step}: {side} gave {what} of shape {found:?}, not {expected:?}")]
    Shape {
        /// The case.
        case: String,
        /// The step, from 0.
        step: usize,
        /// Who gave it.
        side: Side,
        /// What it is.
        what: String,
        /// The shape that follows from the input and the reference.
        expected: Vec<usize>,
        /// Its shape.
        found: Vec<usize>,
    },
    /// The two keep caches, or layer outputs, of different layers.
    #[error(
        "case `{case}`: the artifact gives {what} of layers {artifact:?}, the reference of {reference:?}; are both of one checkpoint, with the same modules removed?"
    )]
    Layers {
        /// The case.
        case: String,
        /// Caches or outputs.
        what: &'static str,
        /// The reference's layers.
        reference: Vec<usize>,
        /// The artifact's layers.
        artifact: Vec<usize>,
    },
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Reference => "the reference",
            Self::Artifact => "the artifact",
        })
    }
}

/// Compares `artifact` with `reference` on `prompts`, or, where there are none, on sequences drawn
/// from the vocabulary with [`Options::seed`].
///
/// Of an artifact that gives the last position's logits alone, those of every step are compared; its
/// decisions and caches are compared at every position.
///
/// A reference that reports no routing is taken to have no router. An artifact that reports none is
/// compared by its values alone, and the report says so.
///
/// # Errors
///
/// Only where nothing can be compared: a decoder fails, a prompt is not one, the two are of
/// different models. A difference in value, NaN included, is a [`Report`] that has not
/// [passed](Report::passed).
pub fn run<R: Follow, A: Decoder>(
    reference: &mut R,
    artifact: &mut A,
    prompts: &[Vec<i64>],
    options: &Options,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report, Error<R::Error, A::Error>> {
    let start = Instant::now();
    let vocab = reference.vocab_size();
    if vocab != artifact.vocab_size() {
        return Err(Error::Vocabulary { reference: vocab, artifact: artifact.vocab_size() });
    }
    for (prompt, tokens) in prompts.iter().enumerate() {
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt { prompt });
        }
        let inside = |token: i64| usize::try_from(token).is_ok_and(|token| token < vocab);
        if let Some(&token) = tokens.iter().find(|token| !inside(**token)) {
            return Err(Error::Token { prompt, token, vocab });
        }
    }
    let mut done = Vec::new();
    let logits = artifact.gives();
    let asked = cases::Asked {
        vocab,
        logits,
        sequences: artifact.takes(),
        apart: artifact.take_one_token_apart(false),
    };
    for case in cases::cases(prompts, asked, options) {
        done.push(drive::run(reference, artifact, &case, options, progress)?);
    }
    Ok(Report::new(done, options, logits, start.elapsed()))
}
