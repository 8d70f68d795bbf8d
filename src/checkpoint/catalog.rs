//! The tensors that files hold, by canonical name, before anyone has asked for them.
//!
//! A reader *takes* the tensors it needs, each with the shape it must have; what is left over at
//! the end is what nobody asked for.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core as candle;
use safetensors::Dtype;
use skipgpt_passes::ir::{DType, Stored};

use super::names::{self, Kind};
use super::{pth, safetensors as header};
use crate::sources::{self, Sources};

/// Why a tensor could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The safetensors file is not what it should be.
    #[error(transparent)]
    Safetensors(#[from] header::Error),
    /// The `.pth` file is not what it should be.
    #[error(transparent)]
    Pth(#[from] pth::Error),
    /// A tensor is added twice.
    #[error(transparent)]
    Source(#[from] sources::Error),
    /// A file whose form its name does not tell.
    #[error("{}: expected a file called *.safetensors, *.pth, *.pt or *.bin", path.display())]
    UnknownForm {
        /// The file.
        path: PathBuf,
    },
    /// Two names in a file mean the same tensor.
    #[error("{}: {first} and {second} are the same tensor; remove one", path.display())]
    Duplicate {
        /// The file.
        path: PathBuf,
        /// One name.
        first: String,
        /// The other.
        second: String,
    },
    /// No file holds it.
    #[error("{}: tensor {name} is missing; expected shape {shape:?}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// Its canonical name.
        name: String,
        /// The shape it would have.
        shape: Vec<usize>,
    },
    /// It has another shape than the model needs.
    #[error("{}: tensor {name} has shape {found:?}; expected {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// What the model needs.
        expected: Vec<usize>,
        /// What the file holds.
        found: Vec<usize>,
    },
    /// Its elements are not of a floating-point type that is read.
    #[error("{}: tensor {name} has dtype {found}; expected F32, F16 or BF16", path.display())]
    DType {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// What the file holds.
        found: String,
    },
}

/// Tensors by canonical name.
#[derive(Debug, Default)]
pub(super) struct Catalog {
    /// Where they were looked for, for messages.
    origin: PathBuf,
    entries: BTreeMap<String, Entry>,
}

/// One tensor of a file.
#[derive(Debug)]
pub(super) struct Entry {
    /// As the file names it.
    pub(super) name: String,
    /// What its name says it is.
    pub(super) kind: Kind,
    /// The file.
    pub(super) path: Arc<PathBuf>,
    /// Row-major.
    pub(super) shape: Vec<usize>,
    /// What is read, or the name of what is not.
    dtype: Result<DType, String>,
    place: Place,
}

#[derive(Debug)]
enum Place {
    File { file: Arc<File>, offset: u64 },
    Archive(Arc<pth::Archive>),
}

impl Catalog {
    /// No tensor yet; `origin` is where a missing one is said to be missing.
    pub(super) fn new(origin: &Path) -> Self {
        Self { origin: origin.to_owned(), entries: BTreeMap::new() }
    }

    /// The tensors of one file, safetensors or `.pth` by its name.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let mut catalog = Self::new(path);
        match path.extension().and_then(OsStr::to_str) {
            Some("safetensors") => {
                catalog.add_safetensors(path)?;
            }
            Some("pth" | "pt" | "bin") => catalog.add_pth(path)?,
            _ => return Err(Error::UnknownForm { path: path.to_owned() }),
        }
        Ok(catalog)
    }

    /// Adds the tensors of a safetensors file; gives their names as the file has them.
    pub(super) fn add_safetensors(&mut self, path: &Path) -> Result<Vec<String>, Error> {
        let (file, tensors) = header::read(path)?;
        let (file, path) = (Arc::new(file), Arc::new(path.to_owned()));
        let mut found = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            found.push(tensor.name.clone());
            let dtype = match tensor.dtype {
                Dtype::F32 => Ok(DType::F32),
                Dtype::F16 => Ok(DType::F16),
                Dtype::BF16 => Ok(DType::BF16),
                other => Err(other.to_string()),
            };
            let place = Place::File { file: Arc::clone(&file), offset: tensor.offset };
            self.add(tensor.name, &path, tensor.shape, dtype, place)?;
        }
        Ok(found)
    }

    /// Adds the tensors of a `.pth` file.
    pub(super) fn add_pth(&mut self, path: &Path) -> Result<(), Error> {
        let archive = Arc::new(pth::Archive::open(path)?);
        let path = Arc::new(path.to_owned());
        for entry in archive.entries() {
            let dtype = match entry.dtype {
                candle::DType::F32 => Ok(DType::F32),
                candle::DType::F16 => Ok(DType::F16),
                candle::DType::BF16 => Ok(DType::BF16),
                other => Err(other.as_str().to_uppercase()),
            };
            let place = Place::Archive(Arc::clone(&archive));
            self.add(entry.name.clone(), &path, entry.shape.clone(), dtype, place)?;
        }
        Ok(())
    }

    fn add(
        &mut self,
        name: String,
        path: &Arc<PathBuf>,
        shape: Vec<usize>,
        dtype: Result<DType, String>,
        place: Place,
    ) -> Result<(), Error> {
        let names::Name { canonical, kind } = names::parse(&name);
        let path = Arc::clone(path);
        let entry = Entry { name, kind, path, shape, dtype, place };
        if let Some(first) = self.entries.get(&canonical) {
            let (first, second) = (first.name.clone(), entry.name);
            return Err(Error::Duplicate { path: entry.path.as_ref().clone(), first, second });
        }
        self.entries.insert(canonical, entry);
        Ok(())
    }

    /// The tensors whose kind is wanted; the others stay.
    pub(super) fn split(&mut self, wanted: impl Fn(&Kind) -> bool) -> Self {
        let (chosen, rest) =
            std::mem::take(&mut self.entries).into_iter().partition(|(_, e)| wanted(&e.kind));
        self.entries = rest;
        Self { origin: self.origin.clone(), entries: chosen }
    }

    /// Every tensor not yet taken, by canonical name.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// The tensor called `name`, if not yet taken.
    pub(super) fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// Whether nothing is there, or left.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Where its tensors come from.
    pub(super) fn origin(&self) -> &Path {
        &self.origin
    }

    /// Moves the tensor called `name`, of shape `shape`, into `sources`.
    pub(super) fn take(
        &mut self,
        name: &str,
        shape: &[usize],
        sources: &mut Sources,
    ) -> Result<Stored, Error> {
        let Some(entry) = self.entries.remove(name) else {
            return Err(Error::Missing {
                path: self.origin.clone(),
                name: name.to_owned(),
                shape: shape.to_vec(),
            });
        };
        let path = || entry.path.as_ref().clone();
        if entry.shape != shape {
            let (expected, found) = (shape.to_vec(), entry.shape);
            return Err(Error::Shape { path: path(), name: entry.name, expected, found });
        }
        let dtype = match entry.dtype {
            Ok(dtype) => dtype,
            Err(found) => return Err(Error::DType { path: path(), name: entry.name, found }),
        };
        let stored = Stored { name: name.to_owned(), shape: entry.shape, dtype };
        match entry.place {
            Place::File { file, offset } => {
                sources.insert_file(stored.clone(), file, entry.path, offset)?;
            }
            Place::Archive(archive) => {
                sources.insert_memory(stored.clone(), archive.bytes(&entry.name)?.into())?;
            }
        }
        Ok(stored)
    }
}
