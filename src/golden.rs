//! What an artifact gave once, written down, so that a later run can be held against it: after an
//! upgrade of ONNX Runtime, on another provider, after another export.
//!
//! [`record()`] writes greedy tokens, the log-probabilities of the likeliest and every routing decision
//! for each prompt; [`check()`] runs the prompts again, fed the recorded tokens, and compares. No
//! checkpoint and no reference is needed. `docs/verification.md` describes the file.

mod check;
mod file;
mod format;
mod junit;
mod record;
mod report;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::DType;

pub use self::check::{CheckOptions, Mode, check};
pub use self::file::{FileError, MAX_BYTES};
pub use self::junit::junit;
pub use self::record::{RecordOptions, record};
pub use self::report::{PromptReport, Report};

/// Version of the file that this tool writes, and the only one it reads.
pub const VERSION: u32 = 1;

/// A golden file. As JSON, the fields come in this order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    /// [`VERSION`].
    pub version: u32,
    /// Version of the tool that recorded it.
    pub tool: String,
    /// What was run.
    pub artifact: Artifact,
    /// What ran it.
    pub environment: Environment,
    /// What the artifact computes in: `f32`, `f16` or `bf16`.
    pub dtype: String,
    /// By prompt.
    pub prompts: Vec<Prompt>,
}

/// Which artifact it was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Artifact {
    /// Name of its directory.
    pub name: String,
    /// Lower-case hexadecimal SHA-256 of its files, by name.
    pub sha256: BTreeMap<String, String>,
}

/// What ran the artifact.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Environment {
    /// Version of ONNX Runtime.
    pub onnxruntime: String,
    /// Execution provider.
    pub provider: String,
    /// Threads within an operator.
    pub threads: usize,
}

/// What was recorded for one prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// The text; empty where only tokens were given.
    pub text: String,
    /// Its tokens.
    pub ids: Vec<i64>,
    /// The most likely tokens that followed, each fed to find the next.
    pub greedy: Vec<i64>,
    /// For each greedy token, the likeliest tokens in its place with their log-probabilities
    /// (nats, six decimals), the greedy one first.
    pub top: Vec<Vec<(i64, f64)>>,
    /// Every routed module's decisions, in layer order; `None` where the artifact reports none.
    pub routing: Option<Vec<ModuleDecisions>>,
}

/// A module's decisions over a prompt and all greedy tokens but the last, which was never fed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleDecisions {
    /// Such as `layers.3.mlp`.
    pub module: String,
    /// One character a token: `1` keeps, `0` skips.
    pub keep: String,
    /// The smallest `|margin|` (six decimals).
    pub min_margin: f32,
    /// Tokens whose decision was near: their place, and the margin (six decimals). Everything
    /// within ten tie margins of the recording dtype is listed.
    pub near: Vec<(usize, f32)>,
}

/// Why recording or checking could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error<D: std::error::Error + 'static> {
    /// The artifact failed.
    #[error("prompt {prompt}, step {step}: the artifact failed")]
    Artifact {
        /// Which prompt, from 1.
        prompt: usize,
        /// The step, from 0.
        step: usize,
        /// Why.
        #[source]
        source: D,
    },
    /// Nothing to record.
    #[error("there is no prompt to record; give at least one")]
    NoPrompts,
    /// A prompt without tokens.
    #[error("prompt {prompt} has no token; give it some text")]
    EmptyPrompt {
        /// Which, from 1.
        prompt: usize,
    },
    /// A prompt with a token that the model does not have.
    #[error(
        "prompt {prompt}: token {token} is outside the artifact's vocabulary of {vocab}; is the file of another model?"
    )]
    Token {
        /// Which prompt, from 1.
        prompt: usize,
        /// The token.
        token: i64,
        /// Number of tokens in the vocabulary.
        vocab: usize,
    },
    /// A count in the options is 0, or too large to be read back.
    #[error("{option} is {found}; it must be 1 to {most}")]
    Count {
        /// Which.
        option: &'static str,
        /// What it is.
        found: usize,
        /// The most that a file may hold.
        most: usize,
    },
    /// The artifact gave NaN or infinity: nothing to hold a later run against.
    #[error("prompt {prompt}, step {step}: {what} is not finite; `verify` finds where it begins")]
    NotFinite {
        /// Which prompt, from 1.
        prompt: usize,
        /// The step, from 0.
        step: usize,
        /// A logit or a margin.
        what: &'static str,
    },
    /// The artifact gave something of the wrong shape.
    #[error("prompt {prompt}, step {step}: {what} have shape {found:?}, not {expected:?}")]
    Shape {
        /// Which prompt, from 1.
        prompt: usize,
        /// The step, from 0.
        step: usize,
        /// Logits or margins.
        what: &'static str,
        /// The shape that follows from the input.
        expected: Vec<usize>,
        /// Its shape.
        found: Vec<usize>,
    },
    /// The file holds decisions and the artifact reports none; or it reports those of other modules
    /// than in the prompt's first step.
    #[error(
        "prompt {prompt}, step {step}: the artifact does not report the decisions of every routed module; export it with --emit-routing"
    )]
    NoRouting {
        /// Which prompt, from 1.
        prompt: usize,
        /// The step, from 0.
        step: usize,
    },
}

impl Golden {
    /// The recorded dtype; that of a file that was read is always known.
    pub fn dtype(&self) -> Option<DType> {
        [DType::F32, DType::F16, DType::BF16]
            .into_iter()
            .find(|dtype| dtype.to_string() == self.dtype)
    }
}

/// Six decimals: enough to judge by, and the same text on machines that differ in the last bits.
fn rounded(value: f64) -> f64 {
    // Adding 0 turns a negative zero, which JSON would show, into a positive one.
    (value * 1e6).round() / 1e6 + 0.0
}
