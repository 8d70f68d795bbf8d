//! `.pth` files: zip archives of a pickle and the bytes of its tensors.
//!
//! A pickle can build any object of any library. This reader builds none: the pickle is first
//! walked symbolically ([`scan`]), everything in it that is not a tensor in a plain state dict is
//! refused by name, and only then does candle's reader see the file. The walk is as strict as that
//! reader is lenient, so nothing is ever dropped unseen.

mod container;
mod scan;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use candle_core as candle;
use candle_core::pickle::PthTensors;

use super::files;
use container::Container;

pub use scan::Error as PickleError;

/// Most bytes of a pickle: names and shapes of some hundred thousand tensors.
pub const PICKLE_LIMIT: u64 = 64 << 20;

/// What is wrong with a `.pth` file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be opened.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The operating system's word.
    #[error("{}: cannot read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// `torch.save` from before `PyTorch` 1.6, or its old format asked for.
    #[error("{}: PyTorch's old format (a bare pickle); load it and save it again with torch.save(…), which writes a zip archive since PyTorch 1.6", path.display())]
    Legacy {
        /// The file.
        path: PathBuf,
    },
    /// Neither a zip archive nor a pickle.
    #[error("{}: not a file that torch.save wrote (it is no zip archive)", path.display())]
    NotPth {
        /// The file.
        path: PathBuf,
    },
    /// The archive's directory is damaged.
    #[error("{}: the zip archive is damaged: {source}", path.display())]
    Zip {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: zip::result::ZipError,
    },
    /// Not exactly one pickle, at the place `torch.save` puts it.
    #[error("{}: {found} entries named data.pkl; torch.save writes one, as <name>/data.pkl", path.display())]
    Pickles {
        /// The file.
        path: PathBuf,
        /// How many there are.
        found: usize,
    },
    /// An entry is compressed or encrypted, which `torch.save` never does.
    #[error("{}: entry {entry} is compressed or encrypted; torch.save stores entries plainly. Save it again with torch.save", path.display())]
    Compressed {
        /// The file.
        path: PathBuf,
        /// The entry.
        entry: String,
    },
    /// The pickle is past the limit.
    #[error("{}: the pickle has {size} bytes; at most {PICKLE_LIMIT} are read", path.display())]
    PickleTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Written on a big-endian machine.
    #[error("{}: byte order {found:?}; only \"little\" is read", path.display())]
    ByteOrder {
        /// The file.
        path: PathBuf,
        /// What the archive says.
        found: String,
    },
    /// The pickle holds something other than tensors.
    #[error("{}: {source}", path.display())]
    Pickle {
        /// The file.
        path: PathBuf,
        /// What, and where.
        source: PickleError,
    },
    /// A tensor's bytes are not in the archive.
    #[error("{}: tensor {name} needs {expected} bytes of entry {entry}; the archive holds {found}. The file is truncated or damaged", path.display())]
    Storage {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Where its bytes should be.
        entry: String,
        /// How many it needs.
        expected: u64,
        /// How many there are.
        found: u64,
    },
    /// candle's reader refused the archive that the walk let through.
    #[error("{}: cannot be read: {source}", path.display())]
    Reader {
        /// The file.
        path: PathBuf,
        /// candle's word.
        source: Box<candle::Error>,
    },
    /// candle's reader refused a tensor that the walk let through.
    #[error("{}: tensor {name} cannot be read: {source}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// candle's word.
        source: Box<candle::Error>,
    },
}

/// A `.pth` file that holds tensors and nothing else.
pub struct Archive {
    path: PathBuf,
    entries: Vec<Entry>,
    tensors: PthTensors,
}

/// One tensor of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key in the state dict.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Any dtype candle's reader has.
    pub dtype: candle::DType,
}

impl std::fmt::Debug for Archive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Archive").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Archive {
    /// Opens `path` and checks everything in it but the tensors' values.
    ///
    /// # Errors
    ///
    /// [`Error::Pickle`] names any object that is not a tensor; the other variants say what is
    /// damaged.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let (file, _) = files::open(path)?;
        let mut zip = Container::open(path, file)?;
        let (prefix, pickle) = zip.pickle()?;
        zip.check_byte_order(&prefix)?;
        let found = scan::scan(&pickle)
            .map_err(|source| Error::Pickle { path: path.to_owned(), source })?;
        for tensor in &found {
            zip.check_storage(&prefix, tensor)?;
        }
        let tensors = PthTensors::new(path, None)
            .map_err(|source| Error::Reader { path: path.to_owned(), source: source.into() })?;
        let entries = found
            .into_iter()
            .map(|tensor| Entry { name: tensor.name, shape: tensor.shape, dtype: tensor.dtype })
            .collect();
        Ok(Self { path: path.to_owned(), entries, tensors })
    }

    /// The tensors, in the order the pickle lists them.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The tensor called `name`, read now.
    pub fn tensor(&self, name: &str) -> Result<candle::Tensor, Error> {
        self.tensors
            .get(name)
            .and_then(|tensor| {
                let missing = || candle::Error::CannotFindTensor { path: name.to_owned() };
                tensor.ok_or_else(missing)
            })
            .map_err(|source| self.error(name, source))
    }

    /// The values of an `f32`, `f16` or `bf16` tensor, row-major and little-endian.
    pub(super) fn bytes(&self, name: &str) -> Result<Vec<u8>, Error> {
        let tensor = self.tensor(name)?;
        little_endian(&tensor).map_err(|source| self.error(name, source))
    }

    fn error(&self, name: &str, source: candle::Error) -> Error {
        Error::Tensor { path: self.path.clone(), name: name.to_owned(), source: source.into() }
    }
}

/// Every tensor of a `.pth` file, by its key.
///
/// # Errors
///
/// As [`Archive::open`]; the values are read too.
pub fn read(path: &Path) -> Result<BTreeMap<String, candle::Tensor>, Error> {
    let archive = Archive::open(path)?;
    archive
        .entries
        .iter()
        .map(|entry| Ok((entry.name.clone(), archive.tensor(&entry.name)?)))
        .collect()
}

/// A float tensor's values, row-major.
fn little_endian(tensor: &candle::Tensor) -> candle::Result<Vec<u8>> {
    fn bytes<T: Copy, const N: usize>(values: &[T], encode: impl Fn(T) -> [u8; N]) -> Vec<u8> {
        values.iter().flat_map(|value| encode(*value)).collect()
    }
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        candle::DType::F16 => bytes(&flat.to_vec1()?, half::f16::to_le_bytes),
        candle::DType::BF16 => bytes(&flat.to_vec1()?, half::bf16::to_le_bytes),
        _ => bytes(&flat.to_vec1()?, f32::to_le_bytes),
    })
}
