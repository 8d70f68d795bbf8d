//! Checkpoints of a run: parameters and moments after a step, in a directory that is whole or not
//! there.
//!
//! ```text
//! checkpoints/step-000020/state.safetensors    parameter.<name>, first.<name>, second.<name>
//! checkpoints/step-000020/state.json           step, hash of the above
//! ```
//!
//! Everything else a run needs is a function of its settings and of the step.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Result as Candle;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::optimizer::AdamW;
use super::parameters::Parameter;
use crate::artifact;
use crate::artifact::hash;
use crate::artifact::staging::{Open, Staging};
use crate::sources;

const TENSORS: &str = "state.safetensors";
const RECORD: &str = "state.json";
const VERSION: u32 = 1;

/// What is wrong with a checkpoint of a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be written.
    #[error(transparent)]
    Write(#[from] artifact::Error),
    /// Its tensors could not be serialised: a bug.
    #[error("the training state cannot be written: {0}")]
    Serialise(#[from] safetensors::SafeTensorError),
    /// It could not be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// It is not as it was written.
    #[error("{}: is damaged ({found}); remove {} to continue from the checkpoint before it", path.display(), directory.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What shows it.
        found: String,
        /// The checkpoint.
        directory: PathBuf,
    },
    /// There is none.
    #[error("{}: holds no checkpoint to continue from", path.display())]
    None {
        /// Where checkpoints would be.
        path: PathBuf,
    },
    /// Its tensors are not those of this run.
    #[error("{}: tensor {name} {found}; the checkpoint is of another run", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// How it differs.
        found: String,
    },
    /// The values could not be copied: a bug.
    #[error("the training state cannot be copied: {0}")]
    Copy(#[from] candle_core::Error),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    step: u64,
    sha256: String,
}

/// Where a run's checkpoints lie, and how many are kept.
#[derive(Debug, Clone)]
pub(super) struct Store {
    directory: PathBuf,
    keep: usize,
    open: Open,
}

impl Store {
    pub(super) fn new(output: &Path, keep: usize) -> Self {
        let open: Open = |path| fs::File::create_new(path);
        Self { directory: output.join("checkpoints"), keep: keep.max(1), open }
    }

    /// Writes the state after `step` steps, then removes all but the last checkpoints.
    pub(super) fn save(
        &self,
        step: u64,
        parameters: &[Parameter],
        optimizer: &AdamW,
    ) -> Result<PathBuf, Error> {
        let bytes = serialise(parameters, optimizer)?;
        let record = Record { version: VERSION, step, sha256: hash::of_bytes(&bytes).sha256 };
        let failed = |source| artifact::Error::io("create", &self.directory, source);
        fs::create_dir_all(&self.directory).map_err(failed)?;
        let target = self.place(step);
        let mut staging = Staging::begin_with(&target, None, self.open)?;
        staging.require(bytes.len() as u64)?;
        let record = serde_json::to_vec_pretty(&record)
            .map_err(|error| staging.explain(RECORD, error.into()))?;
        for (name, bytes) in [(TENSORS, &bytes), (RECORD, &record)] {
            staging.write(name, bytes)?;
        }
        staging.commit()?;
        self.prune();
        Ok(target)
    }

    /// Where the checkpoint after `step` steps lies, if there is one.
    pub(super) fn place(&self, step: u64) -> PathBuf {
        self.directory.join(format!("step-{step:06}"))
    }

    /// Every checkpoint there is, first to last.
    pub(super) fn list(&self) -> Vec<(u64, PathBuf)> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let mut found: Vec<_> = entries
            .filter_map(|entry| {
                let name = entry.file_name();
                let step = name.to_str()?.strip_prefix("step-")?.parse().ok()?;
                Some((step, entry.path()))
            })
            .collect();
        found.sort();
        found
    }

    /// The last checkpoint, if there is one.
    pub(super) fn last(&self) -> Option<PathBuf> {
        self.list().pop().map(|(_, path)| path)
    }

    fn prune(&self) {
        let mut found = self.list();
        found.truncate(found.len().saturating_sub(self.keep));
        for (_, path) in found {
            // An old checkpoint that stays costs disk space and nothing else.
            let _ = fs::remove_dir_all(path);
        }
    }

    /// Reads the last checkpoint into `parameters` and `optimizer`; gives its step.
    pub(super) fn load(
        &self,
        parameters: &[Parameter],
        optimizer: &mut AdamW,
    ) -> Result<u64, Error> {
        let directory = self.last().ok_or_else(|| Error::None { path: self.directory.clone() })?;
        let read = |name: &str| {
            let path = directory.join(name);
            fs::read(&path).map_err(|source| Error::Read { path, source })
        };
        let damaged = |name: &str, found: String| Error::Damaged {
            path: directory.join(name),
            found,
            directory: directory.clone(),
        };
        let record: Record = serde_json::from_slice(&read(RECORD)?)
            .map_err(|error| damaged(RECORD, error.to_string()))?;
        if record.version != VERSION {
            return Err(damaged(RECORD, format!("version {}", record.version)));
        }
        let bytes = read(TENSORS)?;
        let found = hash::of_bytes(&bytes).sha256;
        if found != record.sha256 {
            return Err(damaged(TENSORS, "its hash differs from the recorded one".to_owned()));
        }
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|error| damaged(TENSORS, error.to_string()))?;
        let foreign = |name: &str, found: String| Error::Foreign {
            path: directory.join(TENSORS),
            name: name.to_owned(),
            found,
        };
        let values = |name: String, shape: &[usize]| -> Result<Vec<f32>, Error> {
            let tensor =
                tensors.tensor(&name).map_err(|_| foreign(&name, "is missing".to_owned()))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
                let found = format!("is {:?} of {:?}", tensor.shape(), tensor.dtype());
                return Err(foreign(&name, found));
            }
            let mut values = Vec::new();
            sources::decode(tensor.data(), skipgpt_passes::ir::DType::F32, &mut values);
            Ok(values)
        };
        if tensors.len() != 3 * parameters.len() {
            let found = format!("is one of {}, not {}", tensors.len(), 3 * parameters.len());
            return Err(foreign(tensors.names().first().copied().unwrap_or_default(), found));
        }
        for (at, parameter) in parameters.iter().enumerate() {
            let shape = parameter.var.dims();
            let name = &parameter.name;
            optimizer.first[at] = values(format!("first.{name}"), shape)?;
            optimizer.second[at] = values(format!("second.{name}"), shape)?;
            parameter.set(values(format!("parameter.{name}"), shape)?)?;
        }
        Ok(record.step)
    }
}

fn serialise(parameters: &[Parameter], optimizer: &AdamW) -> Result<Vec<u8>, Error> {
    let mut tensors = Vec::new();
    for (at, parameter) in parameters.iter().enumerate() {
        let values = parameter.values()?;
        for (kind, values) in [
            ("parameter", &values),
            ("first", &optimizer.first[at]),
            ("second", &optimizer.second[at]),
        ] {
            tensors.push(tensor(format!("{kind}.{}", parameter.name), parameter, values));
        }
    }
    Ok(file(&tensors)?)
}

/// A safetensors file of `f32` tensors: name, shape and little-endian values.
pub(super) fn file(
    tensors: &[(String, Vec<usize>, Vec<u8>)],
) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    // transformers refuses a file that does not say which framework's names it has.
    sources::file(tensors, "pt")
}

/// A parameter as [`file()`] takes it, under the name `name`.
pub(super) fn entry(parameter: &Parameter, name: String) -> Candle<(String, Vec<usize>, Vec<u8>)> {
    Ok(tensor(name, parameter, &parameter.values()?))
}

/// `values` of the parameter's shape.
fn tensor(name: String, parameter: &Parameter, values: &[f32]) -> (String, Vec<usize>, Vec<u8>) {
    let mut bytes = Vec::new();
    sources::encode(values, skipgpt_passes::ir::DType::F32, &mut bytes);
    (name, parameter.var.dims().to_vec(), bytes)
}

#[cfg(test)]
mod tests;
