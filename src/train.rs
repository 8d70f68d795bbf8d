//! Training of what is exported: routers, then an adapter around them.
//!
//! Both stages run over the same modules that verify artifacts ([`crate::model`]), with the base
//! frozen, on the CPU in `f32` or on a GPU ([`Request::device`]). A run is a directory:
//!
//! ```text
//! run.json            settings and what identifies the inputs
//! metrics.jsonl       a line per step and per evaluation
//! tensorboard/        the same, where asked for
//! checkpoints/        the last few, each whole or not there
//! tokens/             the texts, tokenised
//! router.safetensors  the result of router tuning; or
//! adapter/            of LoRA tuning, a PEFT directory
//! ```
//!
//! Everything random is a function of the seed and of where it is used, so that a run is resumed
//! from parameters, moments and a step number, and ends in the bytes it would have ended in.

mod attach;
mod batch;
pub mod data;
pub mod events;
mod loss;
pub mod metrics;
mod network;
mod on_device;
pub mod optimizer;
pub mod output;
mod parameters;
mod pth;
mod random;
mod record;
mod run;
pub mod schedule;
pub mod settings;
mod share;
pub mod state;
#[cfg(test)]
mod tests;
mod trainer;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::Error as CandleError;

use crate::checkpoint::Checkpoint;
use crate::device::{self, Compute};
use crate::text::Tokenizer;
use crate::world::{Stopped, World};
use crate::{artifact, model};

pub use run::run;

use metrics::{Evaluation, Step};
use settings::Settings;

/// What is to be trained, on what, and where it goes.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The base model; with its routers, for LoRA tuning.
    pub checkpoint: &'a Checkpoint,
    /// Of the base model.
    pub tokenizer: &'a Tokenizer,
    /// Files and directories of text to train on.
    pub text: &'a [PathBuf],
    /// Files and directories of text to evaluate on, in place of a held-out share.
    pub evaluation: &'a [PathBuf],
    /// The field of JSONL, or column of Parquet files, that holds the text.
    pub text_field: &'a str,
    /// The run's directory.
    pub output: &'a Path,
    /// Where tokenised texts are kept; in the run's directory where not given.
    pub cache: Option<&'a Path>,
    /// Whether the run in `output` is continued.
    pub resume: bool,
    /// What decides the result.
    pub settings: &'a Settings,
    /// Where it is computed.
    pub device: Compute,
    /// What does not.
    pub options: Options,
    /// Those who train together; each is given the same request.
    pub world: &'a dyn World,
}

/// What does not change what a run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Run layers again for their backward, so that memory does not grow with depth.
    pub recompute: bool,
    /// Steps from one evaluation to the next; 0 leaves all but the last out.
    pub evaluate_every: u64,
    /// Windows of an evaluation, at most.
    pub evaluation_windows: usize,
    /// Steps from one checkpoint to the next; 0 leaves all but the last out.
    pub save_every: u64,
    /// Checkpoints kept.
    pub keep_checkpoints: usize,
    /// Whether routers are written as `.pth` too.
    pub pth: bool,
    /// Whether metrics are written as TensorBoard's event files too.
    pub tensorboard: bool,
}

/// What goes on in a run.
#[derive(Debug, Clone)]
pub enum Event<'a> {
    /// Texts are tokenised.
    Tokenising(data::Progress),
    /// The run begins, or goes on after so many steps.
    Begins {
        /// Steps done.
        step: u64,
        /// Steps in all.
        steps: u64,
        /// Windows to train on.
        windows: usize,
        /// Values that are trained.
        parameters: usize,
    },
    /// The model without routers and adapter, on what is held out.
    Dense(&'a Evaluation),
    /// A step is done.
    Step(&'a Step),
    /// What is held out was evaluated.
    Evaluation(&'a Evaluation),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// Hears what goes on; answering [`ControlFlow::Break`] ends the run with a checkpoint.
pub type OnEvent<'a> = &'a mut dyn FnMut(Event<'_>) -> ControlFlow<()>;

/// What a finished run gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Files and directories of the result.
    pub written: Vec<PathBuf>,
    /// The last evaluation, where something was held out.
    pub evaluation: Option<Evaluation>,
}

/// Why training could not be done, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting is outside its range.
    #[error(transparent)]
    Settings(#[from] settings::Error),
    /// The texts give no windows.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// The text to evaluate on gives no windows.
    #[error("the text to evaluate on: {0}")]
    Evaluation(#[source] data::Error),
    /// The model could not be built or run.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// The model breaks a rule of the IR.
    #[error("the checkpoint is not a valid model:\n{0}")]
    Invalid(String),
    /// The checkpoint has an adapter.
    #[error("{}: training begins from a base without an adapter; merge it first (export --format safetensors)", .0.display())]
    Adapted(PathBuf),
    /// Stage 2 without stage 1.
    #[error("{}: has no routers; LoRA tuning needs those that router tuning gave: name them with --router", .0.display())]
    NoRouters(PathBuf),
    /// Nothing computes there.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// Dropout is drawn on the host.
    #[error(
        "dropout of {0} on cuda: its factors are drawn on the processor, one by one, which a GPU would wait for; give --dropout 0, or train on the processor"
    )]
    Dropout(f64),
    /// The masks of padding are the processor's.
    #[error(
        "--pad on cuda: what is computed there counts every token, padding too; leave --pad out, or train on the processor"
    )]
    Padding,
    /// Sums over processes are the processor's.
    #[error(
        "{0} processes on cuda: a pass is computed there in one piece, and gradients are not exchanged; start one process, or train on the processor"
    )]
    Processes(usize),
    /// Gradients of activations would have 16 bits with the range of 16.
    #[error(
        "a base of f16 on cuda: gradients of activations would be f16 too, which holds no small ones; give --base-dtype bf16 or f32"
    )]
    SmallGradients,
    /// A projection that is to be adapted does not stand alone.
    #[error("the targets leave nothing to train")]
    NothingToTrain,
    /// The output directory holds a run.
    #[error("{}: holds a run already; continue it with --resume, or choose another directory", .0.display())]
    Exists(PathBuf),
    /// The output directory holds something else.
    #[error("{}: is not empty and holds no run; choose another directory", .0.display())]
    NotEmpty(PathBuf),
    /// There is no run to resume.
    #[error("{}: holds no run to continue (there is no run.json); leave --resume out to begin one", .0.display())]
    NoRun(PathBuf),
    /// `run.json` is damaged.
    #[error("{}: is not the record of a run: {source}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The run was begun with something else.
    #[error("{}: {key} is {recorded} in the run and {given} now; a run continues with what it began with", path.display())]
    Differs {
        /// The record.
        path: PathBuf,
        /// What differs, as a path of keys.
        key: String,
        /// What the run began with.
        recorded: String,
        /// What was given.
        given: String,
    },
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    State(#[from] state::Error),
    /// A file could not be written or read.
    #[error(transparent)]
    File(#[from] artifact::Error),
    /// A loss or a gradient is not a number.
    #[error("step {step}: the {what} is {value}; its batch begins in {place}; {}", good(last.as_deref()))]
    NotFinite {
        /// From 1.
        step: u64,
        /// Loss or gradient norm.
        what: &'static str,
        /// What was computed.
        value: f64,
        /// Where the batch's first window begins.
        place: data::Place,
        /// The last checkpoint.
        last: Option<PathBuf>,
    },
    /// The caller said to stop.
    #[error("interrupted after step {step}; --resume continues from {}", checkpoint.display())]
    Interrupted {
        /// Steps done.
        step: u64,
        /// The checkpoint.
        checkpoint: PathBuf,
    },
    /// The passes of a step cannot be divided among the ranks.
    #[error(
        "{processes} processes cannot share {accumulate} forward passes of {batch} windows: make --accumulate a multiple of {processes}, or --batch {processes} or more"
    )]
    Share {
        /// How many ranks there are.
        processes: usize,
        /// Windows of a forward pass.
        batch: usize,
        /// Forward passes of a step.
        accumulate: usize,
    },
    /// The program was not built to write event files.
    #[error(
        "this build does not write TensorBoard's files; build it with --features tensorboard, or leave --tensorboard out"
    )]
    NoTensorBoard,
    /// The ranks do not see the same files.
    #[error("the processes do not agree on {what}; all must see the same files")]
    Unlike {
        /// What differs.
        what: &'static str,
    },
    /// Another rank stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// A computation outside the layers failed.
    #[error("{what}: {source}")]
    Compute {
        /// What was computed.
        what: &'static str,
        /// Candle's word.
        source: CandleError,
    },
}

impl Error {
    fn values(source: CandleError) -> Self {
        Self::Compute { what: "reading the parameters", source }
    }
}

fn good(last: Option<&Path>) -> String {
    last.map_or_else(
        || "no checkpoint was written yet".to_owned(),
        |path| format!("the last good checkpoint is {}", path.display()),
    )
}
