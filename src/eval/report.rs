//! What was measured of one model or of several, side by side.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, Serializer};
use skipgpt_passes::ir::ModuleId;

use super::choices::Choices;
use super::choices::pairs::{self, Comparison};
use super::{Perplexity, Skipped};

mod table;

/// The models that were measured. As JSON, the fields come in this order.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Report {
    /// In the order they were measured.
    pub measured: Vec<Measured>,
}

/// One model's figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// What it is called in the report.
    pub name: String,
    /// What ran it.
    pub engine: Engine,
    /// Attention and MLP modules of the checkpoint.
    pub modules: usize,
    /// Of those, how many have a router.
    pub routed: usize,
    /// Of those, which are removed.
    #[serde(serialize_with = "names")]
    pub removed: Vec<ModuleId>,
    /// Perplexity, text by text.
    pub texts: Vec<Text>,
    /// Multiple choice.
    pub choices: Option<Choices>,
    /// Its multiple choice less that of another model, on the same items.
    pub comparison: Option<Comparison>,
}

/// What ran a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// The reference.
    Candle,
    /// An artifact's graph.
    OnnxRuntime,
}

/// Perplexity on a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Text {
    /// The file.
    pub text: String,
    /// What was measured.
    #[serde(flatten)]
    pub perplexity: Perplexity,
}

/// Why an earlier report does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The operating system's word.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// Not the JSON of a report.
    #[error("{}: not a report that `eval --json` wrote: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Nothing to compare with.
    #[error("{}: holds no multiple-choice results; write it with `eval --choices … --json`", path.display())]
    NoChoices {
        /// The file.
        path: PathBuf,
    },
}

/// A model's multiple-choice results in an earlier report.
#[derive(Debug, Clone, PartialEq)]
pub struct Earlier {
    /// What the model is called.
    pub name: String,
    /// Its results.
    pub choices: Choices,
}

/// The first multiple-choice results in the report `path`.
///
/// # Errors
///
/// Every variant of [`ReadError`].
pub fn read(path: &Path) -> Result<Earlier, ReadError> {
    #[derive(Deserialize)]
    struct Written {
        measured: Vec<Model>,
    }
    #[derive(Deserialize)]
    struct Model {
        name: String,
        choices: Option<Choices>,
    }
    let bytes =
        std::fs::read(path).map_err(|source| ReadError::Read { path: path.to_owned(), source })?;
    let written: Written = serde_json::from_slice(&bytes)
        .map_err(|source| ReadError::Json { path: path.to_owned(), source })?;
    let mut models = written.measured.into_iter();
    models
        .find_map(|Model { name, choices }| Some(Earlier { name, choices: choices? }))
        .ok_or_else(|| ReadError::NoChoices { path: path.to_owned() })
}

impl Report {
    /// Compares each model's choices with those of `earlier`, or else with the first model's.
    ///
    /// # Errors
    ///
    /// [`pairs::Error`] if they are not of the same items.
    pub fn compare(&mut self, earlier: Option<&Earlier>) -> Result<(), pairs::Error> {
        let own = self.measured.first().and_then(|first| {
            let Measured { name, choices, .. } = first;
            choices.clone().map(|choices| Earlier { name: name.clone(), choices })
        });
        // No model is compared with itself.
        let first = usize::from(earlier.is_none());
        let Some(base) = earlier.cloned().or(own) else { return Ok(()) };
        for model in self.measured.iter_mut().skip(first) {
            if let Some(choices) = &model.choices {
                model.comparison = Some(pairs::compare(choices, &base.choices, &base.name)?);
            }
        }
        Ok(())
    }
}

impl Measured {
    /// Share of the checkpoint's modules that did not run, over tokens, where the routers skipped
    /// `routers`; `None` if there are some that do not report.
    pub fn skipped(&self, routers: Option<Skipped>) -> Option<f64> {
        let routed = match (self.routed, routers.and_then(|skipped| skipped.all)) {
            (0, _) => 0.0,
            (routed, Some(share)) => share * routed as f64,
            (_, None) => return None,
        };
        Some((self.removed.len() as f64 + routed) / self.modules as f64)
    }
}

fn names<S: Serializer>(modules: &[ModuleId], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(modules.iter().map(ToString::to_string))
}

#[cfg(test)]
mod tests;
