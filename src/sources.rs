//! Where the tensors of a checkpoint lie: their names, shapes and byte ranges.
//!
//! Tensors are read with positioned reads into the caller's buffer, not through a memory map: a
//! file that shrinks while it is read is then an error instead of a fatal signal, and no page of
//! the model is ever resident that nobody asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::{Dtype, TensorView};
use skipgpt_passes::ir::{DType, Stored};

use crate::packed;

/// Every tensor a model's weights may name.
#[derive(Debug, Default, Clone)]
pub struct Sources {
    tensors: BTreeMap<String, Tensor>,
    /// How much each input of a projection weighs, by the name of its weight, where that is known.
    importance: BTreeMap<String, Arc<[f32]>>,
}

#[derive(Debug, Clone)]
struct Tensor {
    stored: Stored,
    bytes: Bytes,
}

#[derive(Debug, Clone)]
enum Bytes {
    File { file: Arc<File>, path: Arc<PathBuf>, offset: u64 },
    Memory(Arc<[u8]>),
    Packed { file: Arc<File>, path: Arc<PathBuf>, place: packed::Place },
}

/// Why a tensor could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A weight names a tensor no file holds: a bug in whoever built the model.
    #[error("no tensor is named {0}")]
    Unknown(String),
    /// The operating system's word.
    #[error("{}: cannot read tensor {name}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What went wrong.
        source: io::Error,
    },
    /// Two files hold a tensor of the same name.
    #[error("tensor {0} is present twice; remove one of the files that hold it")]
    Duplicate(String),
    /// The range asked for lies outside the tensor: a bug in the caller.
    #[error("bytes {start}..{end} of tensor {name} were asked for; it has {size}")]
    OutOfRange {
        /// The tensor.
        name: String,
        /// First byte asked for.
        start: u64,
        /// End of the range asked for.
        end: u64,
        /// The tensor's size in bytes.
        size: u64,
    },
}

/// The byte range of a tensor in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location<'a> {
    /// The file.
    pub path: &'a Path,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl Sources {
    /// No tensor yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor that lies in `file` from byte `offset` on, little-endian and row-major.
    pub fn insert_file(
        &mut self,
        stored: Stored,
        file: Arc<File>,
        path: Arc<PathBuf>,
        offset: u64,
    ) -> Result<(), Error> {
        self.insert(stored, Bytes::File { file, path, offset })
    }

    /// Adds a matrix that lies in `file` in few bits; it reads as `f32`.
    pub fn insert_packed(
        &mut self,
        stored: Stored,
        file: Arc<File>,
        path: Arc<PathBuf>,
        place: packed::Place,
    ) -> Result<(), Error> {
        self.insert(stored, Bytes::Packed { file, path, place })
    }

    /// Adds a tensor held in memory, little-endian and row-major.
    pub fn insert_memory(&mut self, stored: Stored, bytes: Arc<[u8]>) -> Result<(), Error> {
        self.insert(stored, Bytes::Memory(bytes))
    }

    fn insert(&mut self, stored: Stored, bytes: Bytes) -> Result<(), Error> {
        let name = stored.name.clone();
        match self.tensors.insert(name.clone(), Tensor { stored, bytes }) {
            None => Ok(()),
            Some(_) => Err(Error::Duplicate(name)),
        }
    }

    /// Makes known how much each input of the projection weighs whose weight is called `name`.
    pub fn weigh(&mut self, name: String, importance: Arc<[f32]>) {
        self.importance.insert(name, importance);
    }

    /// How much each input of the projection weighs whose weight is called `name`: positive numbers around 1.
    pub fn importance(&self, name: &str) -> Option<&[f32]> {
        self.importance.get(name).map(AsRef::as_ref)
    }

    /// Name, shape and dtype of the tensor called `name`.
    pub fn stored(&self, name: &str) -> Option<&Stored> {
        self.tensors.get(name).map(|tensor| &tensor.stored)
    }

    /// Every tensor, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Stored> {
        self.tensors.values().map(|tensor| &tensor.stored)
    }

    /// Where the tensor lies, if in a file.
    pub fn location(&self, name: &str) -> Option<Location<'_>> {
        let tensor = self.tensors.get(name)?;
        match &tensor.bytes {
            Bytes::File { path, offset, .. } => {
                Some(Location { path, offset: *offset, length: size(&tensor.stored) })
            }
            Bytes::Memory(_) | Bytes::Packed { .. } => None,
        }
    }

    /// Fills `buffer` with the tensor's bytes from byte `start` on.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] if the file does not give them, [`Error::Unknown`] and
    /// [`Error::OutOfRange`] if the caller asks for what is not there.
    pub fn read_at(&self, name: &str, start: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let tensor = self.tensors.get(name).ok_or_else(|| Error::Unknown(name.to_owned()))?;
        let (end, size) = (start.saturating_add(buffer.len() as u64), size(&tensor.stored));
        if end > size {
            return Err(Error::OutOfRange { name: name.to_owned(), start, end, size });
        }
        match &tensor.bytes {
            Bytes::File { file, path, offset } => {
                file.read_exact_at(buffer, offset + start).map_err(|source| Error::Read {
                    path: path.as_ref().clone(),
                    name: name.to_owned(),
                    source,
                })
            }
            Bytes::Memory(bytes) => {
                buffer.copy_from_slice(&bytes[start as usize..end as usize]);
                Ok(())
            }
            Bytes::Packed { file, path, place } => {
                let columns = tensor.stored.shape.iter().skip(1).product();
                place.read(file, columns, start, buffer).map_err(|source| Error::Read {
                    path: path.as_ref().clone(),
                    name: name.to_owned(),
                    source,
                })
            }
        }
    }
}

/// Bytes of a stored tensor.
pub fn size(stored: &Stored) -> u64 {
    stored.shape.iter().product::<usize>() as u64 * stored.dtype.size() as u64
}

/// A safetensors file of `f32` tensors (name, shape and little-endian values) whose metadata says that it is of this
/// format. Nothing else: the crate writes several entries in another order each time.
pub(crate) fn file(
    tensors: &[(String, Vec<usize>, Vec<u8>)],
    format: &str,
) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize(views, Some([("format".to_owned(), format.to_owned())].into()))
}

/// Little-endian elements as `f32`.
pub fn decode(bytes: &[u8], dtype: DType, out: &mut Vec<f32>) {
    match dtype {
        DType::F32 => out.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))),
        DType::F16 => out
            .extend(bytes.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32())),
        DType::BF16 => out.extend(
            bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()),
        ),
    }
}

/// `f32` values as little-endian elements, rounded to nearest, ties to even.
pub fn encode(values: &[f32], dtype: DType, out: &mut Vec<u8>) {
    match dtype {
        DType::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        DType::F16 => {
            out.extend(values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()));
        }
        DType::BF16 => {
            out.extend(values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()));
        }
    }
}
