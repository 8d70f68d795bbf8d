//! Low-rank adapters: a PEFT directory, or a `.pth` of the training code.
//!
//! `W` becomes `W + scale · B · A`. A PEFT directory states the scale in its config; for a `.pth`
//! the caller states alpha. Which projections are adapted is told by the tensors present.

mod config;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use skipgpt_passes::ir::Lora;

use super::catalog::{self, Catalog, Entry};
use super::names::{self, Kind};
use crate::sources::Sources;

pub use config::Error as ConfigError;

/// PEFT's settings.
const CONFIG: &str = "adapter_config.json";
/// PEFT's tensors; the second as older versions write them.
const TENSORS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];

/// What is wrong with an adapter.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or a tensor is not what it should be.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    /// PEFT's settings are not what they should be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A directory without tensors.
    #[error("{}: adapter_model.safetensors is missing; a PEFT directory holds it beside adapter_config.json", directory.display())]
    NoTensors {
        /// The directory.
        directory: PathBuf,
    },
    /// PEFT's tensors without their settings.
    #[error("{}: name the adapter's directory, not this file: the scale stands in {CONFIG} beside it", path.display())]
    NotADirectory {
        /// The file.
        path: PathBuf,
    },
    /// A `.pth` without alpha.
    #[error("{}: a .pth does not state its scale; give the alpha it was trained with (scale = alpha / rank), such as --lora-alpha 32", path.display())]
    NoAlpha {
        /// The file.
        path: PathBuf,
    },
    /// Alpha is given although the settings state it.
    #[error("{}: states its own lora_alpha; leave --lora-alpha out", path.display())]
    AlphaTwice {
        /// The settings.
        path: PathBuf,
    },
    /// Alpha is not a number to scale with.
    #[error("--lora-alpha is {0}; expected a finite number")]
    Alpha(f64),
    /// No tensor of the file belongs to an adapter.
    #[error("{}: holds no adapter; expected tensors called <projection>.lora_A.weight and <projection>.lora_B.weight", path.display())]
    None {
        /// The file.
        path: PathBuf,
    },
    /// A form of adapter that is not read.
    #[error("{}: tensor {name} shows {form}, which is not supported; merge the adapter with PEFT's merge_and_unload and export the merged model", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// What it shows.
        form: &'static str,
    },
    /// PEFT's file holds something beside the adapter.
    #[error("{}: tensor {name} is not part of a LoRA adapter (modules_to_save?); merge the adapter with PEFT's merge_and_unload and export the merged model", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
    },
    /// A without B, or B without A.
    #[error("{}: tensor {name} has no counterpart {missing}", path.display())]
    Half {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// The canonical name of what is missing.
        missing: String,
    },
    /// A or B does not fit the projection.
    #[error("{}: tensor {name} has shape {found:?}; expected {expected}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// What the file holds.
        found: Vec<usize>,
        /// What the projection needs, the rank by name.
        expected: String,
    },
    /// A and B disagree.
    #[error("{}: the adapter of {target} has rank {down} in lora_A and rank {up} in lora_B", path.display())]
    Rank {
        /// The file.
        path: PathBuf,
        /// The projection.
        target: String,
        /// Rows of A.
        down: usize,
        /// Columns of B.
        up: usize,
    },
    /// Tensors and settings disagree.
    #[error("{}: the adapter of {target} has rank {found}; {CONFIG} states {expected}", path.display())]
    StatedRank {
        /// The file.
        path: PathBuf,
        /// The projection.
        target: String,
        /// What the tensors have.
        found: usize,
        /// What the settings state.
        expected: usize,
    },
    /// The model has no such projection.
    #[error("{}: tensor {name} adapts {target}, which is no projection of this model; q, k, v, o, gate, up and down of layers 0 to {last} and lm_head can be adapted", path.display())]
    NoSuchProjection {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// What it adapts.
        target: String,
        /// The model's last layer.
        last: usize,
    },
}

/// An adapter, not yet attached.
#[derive(Debug)]
pub(super) struct Adapter {
    catalog: Catalog,
    scaling: Scaling,
}

#[derive(Debug)]
enum Scaling {
    Stated(config::Config),
    Alpha(f64),
}

impl Adapter {
    /// Opens the adapter at `path`; gives the files read, too.
    pub(super) fn open(path: &Path, alpha: Option<f64>) -> Result<(Self, Vec<PathBuf>), Error> {
        if path.is_dir() {
            return Self::open_directory(path, alpha);
        }
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            return Err(Error::NotADirectory { path: path.to_owned() });
        }
        let mut whole = Catalog::open(path)?;
        let catalog = pick(&mut whole)?;
        let alpha = alpha.ok_or_else(|| Error::NoAlpha { path: path.to_owned() })?;
        if !alpha.is_finite() {
            return Err(Error::Alpha(alpha));
        }
        Ok((Self { catalog, scaling: Scaling::Alpha(alpha) }, vec![path.to_owned()]))
    }

    fn open_directory(directory: &Path, alpha: Option<f64>) -> Result<(Self, Vec<PathBuf>), Error> {
        let path = directory.join(CONFIG);
        let config = config::read(&path)?;
        if alpha.is_some() {
            return Err(Error::AlphaTwice { path });
        }
        let tensors = TENSORS
            .map(|name| directory.join(name))
            .into_iter()
            .find(|path| path.exists())
            .ok_or_else(|| Error::NoTensors { directory: directory.to_owned() })?;
        let mut whole = Catalog::open(&tensors)?;
        let catalog = pick(&mut whole)?;
        if let Some((_, entry)) = whole.iter().next() {
            return Err(Error::Foreign { path: tensors, name: entry.name.clone() });
        }
        Ok((Self { catalog, scaling: Scaling::Stated(config) }, vec![path, tensors]))
    }

    /// The adapter of the projection `target`, whose weight is `[out, in]`, if it has one.
    pub(super) fn take(
        &mut self,
        target: &str,
        [rows, columns]: [usize; 2],
        sources: &mut Sources,
    ) -> Result<Option<Lora>, Error> {
        let names = [names::lora(target, "lora_A"), names::lora(target, "lora_B")];
        let (down, up) = match names.each_ref().map(|name| self.catalog.get(name)) {
            [None, None] => return Ok(None),
            [Some(down), Some(up)] => (down, up),
            [Some(entry), None] => return Err(half(entry, &names[1])),
            [None, Some(entry)] => return Err(half(entry, &names[0])),
        };
        let rank = match down.shape[..] {
            [rank, inner] if inner == columns && rank > 0 => rank,
            _ => return Err(shape(down, format!("[rank, {columns}]"))),
        };
        match up.shape[..] {
            [outer, found] if outer == rows && found == rank => {}
            [outer, found] if outer == rows => {
                let (path, target) = (up.path.as_ref().clone(), target.to_owned());
                return Err(Error::Rank { path, target, down: rank, up: found });
            }
            _ => return Err(shape(up, format!("[{rows}, rank]"))),
        }
        let scale = match &self.scaling {
            Scaling::Alpha(alpha) => alpha / rank as f64,
            Scaling::Stated(config) => {
                let stated = config.of(target, &down.name);
                if stated.rank != rank {
                    return Err(Error::StatedRank {
                        path: down.path.as_ref().clone(),
                        target: target.to_owned(),
                        found: rank,
                        expected: stated.rank,
                    });
                }
                stated.scale
            }
        };
        Ok(Some(Lora {
            down: self.catalog.take(&names[0], &[rank, columns], sources)?,
            up: self.catalog.take(&names[1], &[rows, rank], sources)?,
            scale,
        }))
    }

    /// Refuses what was not taken by any projection of a model of `layers` layers.
    pub(super) fn finish(self, layers: usize) -> Result<(), Error> {
        match self.catalog.iter().next() {
            None => Ok(()),
            Some((_, entry)) => Err(Error::NoSuchProjection {
                path: entry.path.as_ref().clone(),
                name: entry.name.clone(),
                target: match &entry.kind {
                    Kind::Lora { target } => target.clone(),
                    _ => entry.name.clone(),
                },
                last: layers.saturating_sub(1),
            }),
        }
    }
}

/// The adapter's tensors among those of `whole`, if they are of a form that is read.
fn pick(whole: &mut Catalog) -> Result<Catalog, Error> {
    for (_, entry) in whole.iter() {
        if let Kind::Unsupported(form) = entry.kind {
            let (path, name) = (entry.path.as_ref().clone(), entry.name.clone());
            return Err(Error::Unsupported { path, name, form });
        }
    }
    let catalog = whole.split(|kind| matches!(kind, Kind::Lora { .. }));
    if catalog.is_empty() {
        return Err(Error::None { path: whole.origin().to_owned() });
    }
    Ok(catalog)
}

fn half(entry: &Entry, missing: &str) -> Error {
    let (path, name) = (entry.path.as_ref().clone(), entry.name.clone());
    Error::Half { path, name, missing: missing.to_owned() }
}

fn shape(entry: &Entry, expected: String) -> Error {
    let (path, name) = (entry.path.as_ref().clone(), entry.name.clone());
    Error::Shape { path, name, found: entry.shape.clone(), expected }
}
