//! The header of a safetensors file.
//!
//! ```text
//! u64 little-endian: size of the header | header: JSON | the tensors' bytes, end to end
//! ```
//!
//! Only the header is read. Everything it says is checked before it is believed: its size against
//! a cap and the file, each tensor's range against its shape, and all ranges together against the
//! file's length, which they cover exactly.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, IntoDeserializer, MapAccess, Visitor, value};

use super::files;

/// Most bytes a header may have: the format's own limit.
const HEADER_LIMIT: u64 = 100_000_000;
/// Bytes of the header's size.
const PREFIX: u64 = 8;

/// What is wrong with a safetensors file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be opened.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The operating system's word.
    #[error("{}: cannot read the header: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// Not even the header's size is there.
    #[error("{}: {size} bytes; a safetensors file begins with the 8-byte size of its header. The file is truncated: fetch it again", path.display())]
    NoHeaderSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The header's size is past the format's limit.
    #[error("{}: the header claims {header} bytes; the format allows {HEADER_LIMIT}. The file is damaged or not safetensors", path.display())]
    HeaderTooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes the header claims.
        header: u64,
    },
    /// The file ends inside the header.
    #[error("{}: the header claims {header} bytes, the file has {size} after its size. The file is truncated: fetch it again", path.display())]
    HeaderTruncated {
        /// The file.
        path: PathBuf,
        /// Bytes the header claims.
        header: u64,
        /// Bytes there are.
        size: u64,
    },
    /// The header is not the JSON the format asks for.
    #[error("{}: the header is not valid: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Where, and why.
        source: serde_json::Error,
    },
    /// Two tensors of one name.
    #[error("{}: tensor {name} stands in the header twice", path.display())]
    Duplicate {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A dtype the format does not have.
    #[error("{}: tensor {name} has dtype {dtype:?}, which safetensors does not define", path.display())]
    UnknownDType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What stands there.
        dtype: String,
    },
    /// A range's length is not what shape and dtype ask for.
    #[error("{}: tensor {name} of shape {shape:?} and dtype {dtype} needs {expected} bytes; its data_offsets [{start}, {end}] give {}", path.display(), end.wrapping_sub(*start) as i64)]
    Length {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its dtype, as the format writes it.
        dtype: Dtype,
        /// Bytes it needs.
        expected: u64,
        /// First byte, counted from the header's end.
        start: u64,
        /// End, counted from the header's end.
        end: u64,
    },
    /// A shape whose size in bytes is no number.
    #[error("{}: tensor {name} of shape {shape:?} and dtype {dtype} has no size in whole bytes under 2^64", path.display())]
    Overflow {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its dtype, as the format writes it.
        dtype: Dtype,
    },
    /// A range ends after the file does.
    #[error("{}: tensor {name} ends at byte {end} of the data; the file holds {size}. The file is truncated: fetch it again", path.display())]
    PastEnd {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// End, counted from the header's end.
        end: u64,
        /// Bytes of data the file holds.
        size: u64,
    },
    /// Two ranges share bytes.
    #[error("{}: tensors {first} and {second} overlap: the first ends at byte {end} of the data, the second begins at {start}", path.display())]
    Overlap {
        /// The file.
        path: PathBuf,
        /// The tensor that begins first.
        first: String,
        /// The other.
        second: String,
        /// End of the first.
        end: u64,
        /// Start of the second.
        start: u64,
    },
    /// Bytes that belong to no tensor.
    #[error("{}: bytes {start}..{end} of the data belong to no tensor; the format allows no holes", path.display())]
    Hole {
        /// The file.
        path: PathBuf,
        /// First such byte, counted from the header's end.
        start: u64,
        /// End of them.
        end: u64,
    },
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tensor {
    /// As the file names it.
    pub(super) name: String,
    /// Any dtype of the format.
    pub(super) dtype: Dtype,
    /// Row-major.
    pub(super) shape: Vec<usize>,
    /// Its first byte in the file.
    pub(super) offset: u64,
}

/// Reads the header of `path`: the tensors in the order of their bytes, and the open file.
pub(super) fn read(path: &Path) -> Result<(File, Vec<Tensor>), Error> {
    let (file, size) = files::open(path)?;
    let io = |source| Error::Read { path: path.to_owned(), source };
    if size < PREFIX {
        return Err(Error::NoHeaderSize { path: path.to_owned(), size });
    }
    let mut prefix = [0; PREFIX as usize];
    file.read_exact_at(&mut prefix, 0).map_err(io)?;
    let header = u64::from_le_bytes(prefix);
    if header > HEADER_LIMIT {
        return Err(Error::HeaderTooLarge { path: path.to_owned(), header });
    }
    if header > size - PREFIX {
        return Err(Error::HeaderTruncated { path: path.to_owned(), header, size: size - PREFIX });
    }
    let mut text = vec![0; header as usize];
    file.read_exact_at(&mut text, PREFIX).map_err(io)?;
    let tensors = parse(path, &text, PREFIX + header, size - PREFIX - header)?;
    Ok((file, tensors))
}

/// Understands the header `text`; `base` is the first byte of the data, of which there are `size`.
fn parse(path: &Path, text: &[u8], base: u64, size: u64) -> Result<Vec<Tensor>, Error> {
    let Entries(mut entries) = serde_json::from_slice(text)
        .map_err(|source| Error::Header { path: path.to_owned(), source })?;
    entries.sort_by_key(|(_, info)| info.data_offsets);
    let mut seen = std::collections::BTreeSet::new();
    for (name, _) in &entries {
        if !seen.insert(name) {
            return Err(Error::Duplicate { path: path.to_owned(), name: name.clone() });
        }
    }
    let mut tensors: Vec<Tensor> = Vec::with_capacity(entries.len());
    let mut covered = 0;
    for (name, info) in &entries {
        let dtype = check(path, name, info, size)?;
        let (start, end) = info.data_offsets;
        if start < covered {
            let first = tensors.last().map(|tensor| tensor.name.clone()).unwrap_or_default();
            return Err(Error::Overlap {
                path: path.to_owned(),
                first,
                second: name.clone(),
                end: covered,
                start,
            });
        }
        if start > covered {
            return Err(Error::Hole { path: path.to_owned(), start: covered, end: start });
        }
        covered = end;
        let (name, shape) = (name.clone(), info.shape.clone());
        tensors.push(Tensor { name, dtype, shape, offset: base + start });
    }
    if covered < size {
        return Err(Error::Hole { path: path.to_owned(), start: covered, end: size });
    }
    Ok(tensors)
}

/// Checks one tensor by itself; gives its dtype.
fn check(path: &Path, name: &str, info: &Info, size: u64) -> Result<Dtype, Error> {
    let (path, name, shape) = (path.to_owned(), name.to_owned(), info.shape.clone());
    let text: value::StrDeserializer<'_, value::Error> = info.dtype.as_str().into_deserializer();
    let Ok(dtype) = Dtype::deserialize(text) else {
        return Err(Error::UnknownDType { path, name, dtype: info.dtype.clone() });
    };
    let (start, end) = info.data_offsets;
    let bits = shape.iter().try_fold(dtype.bitsize(), |bits, d| bits.checked_mul(*d));
    let Some(bits) = bits.filter(|bits| bits % 8 == 0) else {
        return Err(Error::Overflow { path, name, shape, dtype });
    };
    let expected = bits as u64 / 8;
    if end.checked_sub(start) != Some(expected) {
        return Err(Error::Length { path, name, shape, dtype, expected, start, end });
    }
    if end > size {
        return Err(Error::PastEnd { path, name, end, size });
    }
    Ok(dtype)
}

/// What a header says of one tensor.
#[derive(Debug, serde::Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// A header's entries in the order they stand in, repeated names included.
#[derive(Debug)]
struct Entries(Vec<(String, Info)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;

        impl<'de> Visitor<'de> for Map {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<Option<BTreeMap<String, String>>>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(Map)
    }
}

#[cfg(test)]
mod tests;
