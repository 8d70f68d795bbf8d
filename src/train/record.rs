//! `run.json`: what a run began with. A run that is resumed must be given the same.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Error;
use super::output::replace;
use super::settings::Settings;
use crate::artifact;
use crate::device::Compute;

/// The file's name in the output directory.
const FILE: &str = "run.json";

/// Settings, and hashes of the inputs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) version: u32,
    pub(super) settings: Settings,
    /// Of the checkpoint's files, in order.
    pub(super) checkpoint: Vec<String>,
    /// Of each text and the tokenizer together, in order.
    pub(super) text: Vec<String>,
    /// The same of the texts to evaluate on.
    pub(super) evaluation: Vec<String>,
    /// Where it computes.
    #[serde(default, skip_serializing_if = "is_default")]
    pub(super) device: Compute,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The record's version.
pub(super) const VERSION: u32 = 1;

/// Refuses a directory a run cannot begin in; `tokens` may be there.
pub(super) fn vacant(output: &Path) -> Result<(), Error> {
    if output.join(FILE).exists() {
        return Err(Error::Exists(output.to_owned()));
    }
    match fs::read_dir(output) {
        Ok(entries) => {
            let mut names = entries.flatten().map(|entry| entry.file_name());
            if names.any(|name| name != super::run::TOKENS) {
                return Err(Error::NotEmpty(output.to_owned()));
            }
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(artifact::Error::io("list", output, source).into()),
    }
}

/// Refuses a directory without a run.
pub(super) fn occupied(output: &Path) -> Result<(), Error> {
    if output.join(FILE).is_file() { Ok(()) } else { Err(Error::NoRun(output.to_owned())) }
}

impl Record {
    /// Writes the record of a run that begins.
    pub(super) fn begin(&self, output: &Path) -> Result<(), Error> {
        let path = output.join(FILE);
        fs::create_dir_all(output).map_err(|e| artifact::Error::io("create", output, e))?;
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| artifact::Error::io("write", &path, error.into()))?;
        replace(&path, &bytes)
    }

    /// Compares the record of the run in `output` with this one.
    pub(super) fn compare(&self, output: &Path) -> Result<(), Error> {
        let path = output.join(FILE);
        let bytes = fs::read(&path).map_err(|e| artifact::Error::io("read", &path, e))?;
        let broken = |source| Error::Record { path: path.clone(), source };
        let recorded: Self = serde_json::from_slice(&bytes).map_err(broken)?;
        let recorded = serde_json::to_value(&recorded).map_err(broken)?;
        let given = serde_json::to_value(self).map_err(broken)?;
        match difference("", &recorded, &given) {
            None => Ok(()),
            Some((key, recorded, given)) => Err(Error::Differs { path, key, recorded, given }),
        }
    }
}

/// The first place where two values differ, and what stands there.
fn difference(key: &str, recorded: &Value, given: &Value) -> Option<(String, String, String)> {
    let inner = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match (recorded, given) {
        (Value::Object(left), Value::Object(right)) => {
            let names = left.keys().chain(right.keys().filter(|name| !left.contains_key(*name)));
            names.into_iter().find_map(|name| {
                let value =
                    |map: &serde_json::Map<_, _>| map.get(name).cloned().unwrap_or_default();
                difference(&inner(name), &value(left), &value(right))
            })
        }
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            let pairs = left.iter().zip(right).enumerate();
            pairs
                .into_iter()
                .find_map(|(at, (left, right))| difference(&inner(&at.to_string()), left, right))
        }
        _ if recorded == given => None,
        _ => Some((key.to_owned(), recorded.to_string(), given.to_string())),
    }
}
