//! `metrics.jsonl`: a line per step, and one per evaluation.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use super::events::Events;
use super::output::replace;
use crate::artifact;

/// The file's name in the output directory.
pub const FILE: &str = "metrics.jsonl";

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Metrics {
    /// The model without routers and adapter, on what is held out.
    Dense(Evaluation),
    /// An optimiser step.
    Step(Step),
    /// An evaluation on what is held out.
    Evaluation(Evaluation),
}

impl Metrics {
    /// Steps done.
    pub const fn step(&self) -> u64 {
        match self {
            Self::Step(step) => step.step,
            Self::Dense(evaluation) | Self::Evaluation(evaluation) => evaluation.step,
        }
    }
}

/// What an optimiser step gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// From 1.
    pub step: u64,
    /// Prediction loss and the pull towards the target, mean over the forward passes.
    pub loss: f64,
    /// The prediction loss, in nats a token.
    pub prediction: f64,
    /// The share of decisions that kept; in a run to skip a share of weights, of these.
    pub keep: Option<f64>,
    /// The target for it; in router tuning.
    pub target: Option<f64>,
    /// The temperature; in router tuning.
    pub tau: Option<f64>,
    /// The learning rate.
    pub rate: f64,
    /// Norm of the gradients before clipping.
    pub gradient_norm: f64,
    /// Tokens so far, earlier sittings included.
    pub tokens: u64,
    /// Tokens of this step a second.
    pub tokens_per_second: f64,
}

/// What an evaluation gave, under argmax decisions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps done.
    pub step: u64,
    /// Perplexity of the held-out windows.
    pub perplexity: f64,
    /// The share of decisions that skipped; `None` if nothing is routed.
    pub skipped: Option<f64>,
    /// The share of weights that these decisions left out, of those of all modules that decide:
    /// of q, o, gate, up and down.
    #[serde(default)]
    pub skipped_weights: Option<f64>,
    /// Windows.
    pub windows: usize,
}

/// The file, being appended to.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    file: File,
    events: Option<Events>,
}

impl Log {
    /// Opens the file of a run that continues after `step`: lines of later steps are removed.
    pub(super) fn open(output: &Path, step: u64, tensorboard: bool) -> Result<Self, Error> {
        let path = output.join(FILE);
        let mut events = tensorboard.then(|| Events::begin(output)).transpose()?;
        if let Ok(text) = fs::read_to_string(&path) {
            let mut kept = String::new();
            for line in text.lines() {
                let Ok(metrics) = serde_json::from_str::<Metrics>(line) else { continue };
                if metrics.step() <= step {
                    kept.extend([line, "\n"]);
                    if let Some(events) = &mut events {
                        events.add(&metrics)?;
                    }
                }
            }
            replace(&path, kept.as_bytes())?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(|source| artifact::Error::io("open", &path, source))?;
        Ok(Self { path, file, events })
    }

    pub(super) fn write(&mut self, metrics: &Metrics) -> Result<(), Error> {
        let failed = |source| artifact::Error::io("write", &self.path, source);
        let mut line = serde_json::to_vec(metrics).map_err(|error| failed(error.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(failed)?;
        self.events.as_mut().map_or(Ok(()), |events| events.add(metrics))
    }
}
