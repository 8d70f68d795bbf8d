//! The header of a GGUF file, parsed into values that cannot be wrong.
//!
//! ```text
//! "GGUF" | version u32 | tensors u64 | entries u64
//! entries × (key, type u32, value) | tensors × (name, dims, type u32, offset u64)
//! padding to general.alignment | tensor data
//! ```
//!
//! All little-endian. A length is believed only after it was compared with the bytes left in the
//! file, so a hostile header costs at most a few times its own size in memory. Tensor data is not
//! touched here; after [`Gguf::open`] every tensor is known to lie inside the file, aligned, whole
//! in blocks and apart from all others.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use super::quantized::Encoding;

/// Longest string accepted, in bytes: far beyond any chat template.
const LONGEST_STRING: u64 = 1 << 26;
/// Most dimensions a tensor of ggml can have.
const MOST_DIMENSIONS: u32 = 4;
/// Where tensors are aligned unless `general.alignment` says otherwise, in bytes.
const DEFAULT_ALIGNMENT: u64 = 32;

/// Why a GGUF header cannot be believed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading failed.
    #[error("cannot read the file: {0}")]
    Read(#[from] std::io::Error),
    /// Not a GGUF file at all.
    #[error("the file begins with {found:02x?}, not with \"GGUF\": it is no GGUF file")]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// Written for a big-endian machine.
    #[error(
        "the file is big-endian; convert it with gguf-py's `gguf-convert-endian FILE little` first"
    )]
    BigEndian,
    /// A version whose layout this reader does not know.
    #[error("GGUF version {found} is not read; versions 2 and 3 are")]
    Version {
        /// The version the file states.
        found: u32,
    },
    /// The file ends inside the header, or a length in it is a lie.
    #[error(
        "{what} at byte {offset} needs {needed} more bytes, the file has {left}: \
         it is cut short or damaged; fetch it again"
    )]
    Truncated {
        /// What was being read.
        what: String,
        /// Where, in bytes from the beginning.
        offset: u64,
        /// Bytes it takes at least.
        needed: u64,
        /// Bytes left in the file.
        left: u64,
    },
    /// A string beyond any real one.
    #[error("{what} at byte {offset} is {length} bytes long; at most {LONGEST_STRING} are read")]
    LongString {
        /// What was being read.
        what: String,
        /// Where, in bytes from the beginning.
        offset: u64,
        /// Its stated length in bytes.
        length: u64,
    },
    /// A string that is not UTF-8.
    #[error("{what} at byte {offset} is not UTF-8")]
    NotUtf8 {
        /// What was being read.
        what: String,
        /// Where, in bytes from the beginning.
        offset: u64,
    },
    /// A value type GGUF does not define, or an array of arrays.
    #[error("{what} at byte {offset} has value type {found}, which is not read")]
    ValueType {
        /// What was being read.
        what: String,
        /// Where, in bytes from the beginning.
        offset: u64,
        /// The type's number.
        found: u32,
    },
    /// The same metadata key twice.
    #[error("the metadata key {key:?} stands in the file twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// The same tensor name twice.
    #[error("the tensor {name:?} stands in the file twice")]
    DuplicateTensor {
        /// The tensor.
        name: String,
    },
    /// An alignment no writer uses.
    #[error("general.alignment must be a positive multiple of 8, found {found}")]
    Alignment {
        /// The metadata value, printed.
        found: String,
    },
    /// No dimension, or more than ggml has.
    #[error("tensor {name:?} has {found} dimensions; expected 1 to {MOST_DIMENSIONS}")]
    DimensionCount {
        /// The tensor.
        name: String,
        /// How many the file states.
        found: u32,
    },
    /// Dimensions that no tensor has.
    #[error("tensor {name:?} has the impossible dimensions {dims:?}")]
    Dimensions {
        /// The tensor.
        name: String,
        /// Its dimensions as stored, fastest first.
        dims: Vec<u64>,
    },
    /// An encoding that cannot be dequantised.
    #[error(
        "tensor {name:?} is stored as {encoding}, which cannot be dequantised here; \
         take a file with {} instead",
        Encoding::READABLE
    )]
    Encoding {
        /// The tensor.
        name: String,
        /// The encoding's name, or its number.
        encoding: String,
    },
    /// Rows that do not fill whole blocks.
    #[error(
        "tensor {name:?} has rows of {columns} values, not a multiple of the {block} in a block of {encoding}"
    )]
    PartialBlock {
        /// The tensor.
        name: String,
        /// Values in a row.
        columns: usize,
        /// Values in a block.
        block: usize,
        /// The encoding's name.
        encoding: &'static str,
    },
    /// An offset off the alignment.
    #[error(
        "tensor {name:?} begins at offset {offset}, not a multiple of the alignment {alignment}"
    )]
    Misaligned {
        /// The tensor.
        name: String,
        /// Its offset in the data, in bytes.
        offset: u64,
        /// The alignment, in bytes.
        alignment: u64,
    },
    /// Tensor data that lies outside the file.
    #[error(
        "tensor {name:?} takes {bytes} bytes from byte {offset}, the file has {length}: \
         it is cut short or damaged; fetch it again"
    )]
    Outside {
        /// The tensor.
        name: String,
        /// Where its data begins, in bytes from the beginning of the file.
        offset: u64,
        /// Bytes it takes.
        bytes: u64,
        /// Length of the file in bytes.
        length: u64,
    },
    /// Two tensors that share bytes.
    #[error("the tensors {first:?} and {second:?} overlap")]
    Overlap {
        /// The one that begins first.
        first: String,
        /// The one that begins inside it.
        second: String,
    },
}

/// A metadata value. Integers of every width become `i64` or `u64`.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `u8`, `u16`, `u32` or `u64`.
    Unsigned(u64),
    /// `i8`, `i16`, `i32` or `i64`.
    Signed(i64),
    /// `f32`.
    Float(f32),
    /// `f64`.
    Double(f64),
    /// `bool`.
    Bool(bool),
    /// A string.
    String(String),
    /// An array of strings.
    Strings(Vec<String>),
    /// An array of `f32`.
    Floats(Vec<f32>),
    /// An array of `i32` or `u32`.
    Integers(Vec<i64>),
    /// An array of another type; no key that is read has one.
    Skipped {
        /// Number of elements.
        length: u64,
    },
}

/// Where a tensor lies and how it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name in the file.
    pub name: String,
    /// `[rows, columns]` or `[columns]`: the file's dimensions, slowest first.
    pub shape: Vec<usize>,
    /// How its values are stored.
    pub encoding: Encoding,
    /// Where its data begins, in bytes from the beginning of the file.
    pub offset: u64,
}

impl Tensor {
    /// Values in a row: the last dimension.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of rows: the product of the other dimensions.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Bytes of its data in the file.
    pub fn bytes(&self) -> u64 {
        (self.rows() * self.encoding.row_bytes(self.columns())) as u64
    }
}

/// A GGUF file whose header holds together.
#[derive(Debug)]
pub struct Gguf {
    /// The file, open for reading tensor data.
    pub file: File,
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Gguf {
    /// Opens `path` and parses its header.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let (metadata, tensors) = parse(&file, length)?;
        Ok(Self { file, metadata, tensors })
    }
}

/// Metadata and tensors, by key and by name.
type Parsed = (BTreeMap<String, Value>, BTreeMap<String, Tensor>);

/// Parses the header of a file of `length` bytes.
fn parse(input: impl Read + Seek, length: u64) -> Result<Parsed, Error> {
    let mut header = Header { input: BufReader::new(input), offset: 0, length };
    header.magic()?;
    let tensor_count = header.u64("the tensor count")?;
    let entry_count = header.u64("the metadata count")?;
    let metadata = header.metadata(entry_count)?;
    let tensors = header.tensors(tensor_count)?;
    let alignment = alignment(&metadata)?;
    let data = header.offset.next_multiple_of(alignment);
    let tensors = place(tensors, data, alignment, length)?;
    Ok((metadata, tensors))
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, Error> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::Unsigned(n)) if *n > 0 && n % 8 == 0 && u32::try_from(*n).is_ok() => Ok(*n),
        Some(other) => Err(Error::Alignment { found: format!("{other:?}") }),
    }
}

/// Moves each offset from the data section to the file and proves that the tensors fit.
fn place(
    tensors: Vec<Tensor>,
    data: u64,
    alignment: u64,
    length: u64,
) -> Result<BTreeMap<String, Tensor>, Error> {
    let mut placed = BTreeMap::new();
    let mut ranges = Vec::with_capacity(tensors.len());
    for mut tensor in tensors {
        if tensor.offset % alignment != 0 {
            return Err(Error::Misaligned { name: tensor.name, offset: tensor.offset, alignment });
        }
        let bytes = tensor.bytes();
        tensor.offset = tensor.offset.saturating_add(data);
        if tensor.offset.checked_add(bytes).is_none_or(|end| end > length) {
            let Tensor { name, offset, .. } = tensor;
            return Err(Error::Outside { name, offset, bytes, length });
        }
        ranges.push((tensor.offset, bytes, tensor.name.clone()));
        if let Some(twice) = placed.insert(tensor.name.clone(), tensor) {
            return Err(Error::DuplicateTensor { name: twice.name });
        }
    }
    ranges.sort();
    for pair in ranges.windows(2) {
        if let [(start, bytes, first), (next, _, second)] = pair
            && start + bytes > *next
        {
            return Err(Error::Overlap { first: first.clone(), second: second.clone() });
        }
    }
    Ok(placed)
}

/// A reader that knows how much of the file is left.
struct Header<R> {
    input: BufReader<R>,
    offset: u64,
    length: u64,
}

impl<R: Read + Seek> Header<R> {
    fn require(&self, what: &str, needed: u64) -> Result<(), Error> {
        let left = self.length.saturating_sub(self.offset);
        if needed <= left {
            return Ok(());
        }
        Err(Error::Truncated { what: what.into(), offset: self.offset, needed, left })
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        self.require(what, N as u64)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        self.offset += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.bytes(what)?))
    }

    fn string(&mut self, what: &str) -> Result<String, Error> {
        let length = self.u64(what)?;
        let offset = self.offset;
        self.require(what, length)?;
        if length > LONGEST_STRING {
            return Err(Error::LongString { what: what.into(), offset, length });
        }
        let mut bytes = vec![0; length as usize];
        self.input.read_exact(&mut bytes)?;
        self.offset += length;
        String::from_utf8(bytes).map_err(|_| Error::NotUtf8 { what: what.into(), offset })
    }

    fn magic(&mut self) -> Result<(), Error> {
        let found: [u8; 4] = self.bytes("the magic number")?;
        if &found != b"GGUF" {
            return Err(Error::Magic { found });
        }
        match self.u32("the version")? {
            2 | 3 => Ok(()),
            version if matches!(version.swap_bytes(), 1..=3) => Err(Error::BigEndian),
            found => Err(Error::Version { found }),
        }
    }

    fn metadata(&mut self, count: u64) -> Result<BTreeMap<String, Value>, Error> {
        // A key's length, a type and one byte of value.
        self.require("the metadata", count.saturating_mul(8 + 4 + 1))?;
        let mut metadata = BTreeMap::new();
        for _ in 0..count {
            let key = self.string("a metadata key")?;
            let value = self.value(&key)?;
            if metadata.contains_key(&key) {
                return Err(Error::DuplicateKey { key });
            }
            metadata.insert(key, value);
        }
        Ok(metadata)
    }

    fn value(&mut self, key: &str) -> Result<Value, Error> {
        let offset = self.offset;
        Ok(match self.u32(key)? {
            0 => Value::Unsigned(u8::from_le_bytes(self.bytes(key)?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.bytes(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.bytes(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.bytes(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.bytes(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes(key)?)),
            7 => Value::Bool(self.bytes::<1>(key)? != [0]),
            8 => Value::String(self.string(key)?),
            9 => self.array(key)?,
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.bytes(key)?)),
            12 => Value::Double(f64::from_le_bytes(self.bytes(key)?)),
            found => return Err(Error::ValueType { what: key.into(), offset, found }),
        })
    }

    fn array(&mut self, key: &str) -> Result<Value, Error> {
        let offset = self.offset;
        let kind = self.u32(key)?;
        let length = self.u64(key)?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10 | 11 | 12 => 8,
            found => return Err(Error::ValueType { what: key.into(), offset, found }),
        };
        self.require(key, length.saturating_mul(size))?;
        Ok(match kind {
            4 => Value::Integers(self.elements(length, |h| Ok(h.u32(key)?.into()))?),
            5 => Value::Integers(
                self.elements(length, |h| Ok(i32::from_le_bytes(h.bytes(key)?).into()))?,
            ),
            6 => Value::Floats(self.elements(length, |h| Ok(f32::from_le_bytes(h.bytes(key)?)))?),
            8 => Value::Strings(self.elements(length, |h| h.string(key))?),
            _ => {
                self.input.seek_relative((length * size) as i64)?;
                self.offset += length * size;
                Value::Skipped { length }
            }
        })
    }

    fn elements<T>(
        &mut self,
        length: u64,
        mut read: impl FnMut(&mut Self) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        (0..length).map(|_| read(self)).collect()
    }

    fn tensors(&mut self, count: u64) -> Result<Vec<Tensor>, Error> {
        // A name's length, a number of dimensions, a type and an offset.
        self.require("the list of tensors", count.saturating_mul(8 + 4 + 4 + 8))?;
        (0..count).map(|_| self.tensor()).collect()
    }

    /// One entry of the list; `offset` is still counted from the data section.
    fn tensor(&mut self) -> Result<Tensor, Error> {
        let name = self.string("a tensor name")?;
        let dimensions = self.u32(&name)?;
        if !(1..=MOST_DIMENSIONS).contains(&dimensions) {
            return Err(Error::DimensionCount { name, found: dimensions });
        }
        let dims = self.elements(dimensions.into(), |h| h.u64(&name))?;
        let number = self.u32(&name)?;
        let offset = self.u64(&name)?;

        // No value takes less than a bit, so more than this cannot lie in the file.
        let most = self.length.saturating_mul(8);
        let product = dims.iter().try_fold(1_u64, |product, &d| product.checked_mul(d));
        if dims.contains(&0) || product.is_none_or(|n| n > most) {
            return Err(Error::Dimensions { name, dims });
        }
        let shape: Vec<usize> = dims.iter().rev().map(|&d| d as usize).collect();
        let encoding = match Encoding::from_number(number) {
            Ok(encoding) => encoding,
            Err(encoding) => return Err(Error::Encoding { name, encoding }),
        };
        let tensor = Tensor { name, shape, encoding, offset };
        let columns = tensor.columns();
        if !columns.is_multiple_of(encoding.block()) {
            let (name, block, encoding) = (tensor.name, encoding.block(), encoding.name());
            return Err(Error::PartialBlock { name, columns, block, encoding });
        }
        Ok(tensor)
    }
}

#[cfg(test)]
mod tests;
