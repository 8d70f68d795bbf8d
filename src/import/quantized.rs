//! Tensor data of a GGUF file as `f32`, a few rows at a time.
//!
//! Blocks are dequantised by candle, from a buffer of one block of rows; plain `f32`, `f16` and
//! `bf16` are read here. A row is a whole number of blocks, so any range of rows stands alone.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use half::{bf16, f16};

use super::gguf::Tensor;

/// Every encoding ggml numbers, whether or not it can be read.
const ENCODINGS: &[(u32, &str, Option<GgmlDType>)] = &[
    (0, "F32", Some(GgmlDType::F32)),
    (1, "F16", Some(GgmlDType::F16)),
    (2, "Q4_0", Some(GgmlDType::Q4_0)),
    (3, "Q4_1", Some(GgmlDType::Q4_1)),
    (6, "Q5_0", Some(GgmlDType::Q5_0)),
    (7, "Q5_1", Some(GgmlDType::Q5_1)),
    (8, "Q8_0", Some(GgmlDType::Q8_0)),
    (9, "Q8_1", None),
    (10, "Q2_K", Some(GgmlDType::Q2K)),
    (11, "Q3_K", Some(GgmlDType::Q3K)),
    (12, "Q4_K", Some(GgmlDType::Q4K)),
    (13, "Q5_K", Some(GgmlDType::Q5K)),
    (14, "Q6_K", Some(GgmlDType::Q6K)),
    (15, "Q8_K", None),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", None),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", None),
    (24, "I8", None),
    (25, "I16", None),
    (26, "I32", None),
    (27, "I64", None),
    (28, "F64", None),
    (29, "IQ1_M", None),
    (30, "BF16", Some(GgmlDType::BF16)),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (39, "MXFP4", None),
];

/// How a tensor's values are stored; one that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoding {
    name: &'static str,
    dtype: GgmlDType,
}

impl Encoding {
    /// The names of all encodings that can be read, for messages.
    pub const READABLE: &str =
        "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K or Q6_K";

    /// The encoding with ggml's number `number`.
    ///
    /// # Errors
    ///
    /// The name of one that cannot be read, or the number of one that is not known.
    pub fn from_number(number: u32) -> Result<Self, String> {
        match ENCODINGS.iter().find(|(n, ..)| *n == number) {
            Some((_, name, Some(dtype))) => Ok(Self { name, dtype: *dtype }),
            Some((_, name, None)) => Err((*name).into()),
            None => Err(format!("encoding number {number}")),
        }
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Values in a block.
    pub fn block(self) -> usize {
        self.dtype.block_size()
    }

    /// Bytes of a row of `columns` values, a multiple of [`Encoding::block`].
    pub fn row_bytes(self, columns: usize) -> usize {
        columns / self.block() * self.dtype.type_size()
    }
}

/// Why tensor data could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading failed.
    #[error("cannot read the data of tensor {name:?}: {source}")]
    Read {
        /// The tensor.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// candle refused the block.
    #[error("cannot dequantise tensor {name:?}: {source}")]
    Dequantise {
        /// The tensor.
        name: String,
        /// What candle said.
        source: Box<candle_core::Error>,
    },
    /// A weight that is NaN or infinite.
    #[error(
        "tensor {name:?} holds {value} in row {row}, column {column}: \
         the file is damaged or was badly quantised"
    )]
    NotFinite {
        /// The tensor.
        name: String,
        /// Which row, as stored.
        row: usize,
        /// Which column.
        column: usize,
        /// The value.
        value: f32,
    },
}

/// Rows `rows` of `tensor` in `file`, as `f32`, `[rows, columns]`.
///
/// `rows` must lie inside the tensor; every value is finite.
pub fn read_rows(file: &mut File, tensor: &Tensor, rows: Range<usize>) -> Result<Vec<f32>, Error> {
    let columns = tensor.columns();
    let row_bytes = tensor.encoding.row_bytes(columns);
    let length = rows.len() * row_bytes;

    // candle casts the bytes to its block types, so they must be aligned like them.
    let mut buffer = vec![0_u8; length + 8];
    let start = buffer.as_ptr().align_offset(8).min(8);
    let bytes = &mut buffer[start..start + length];
    let offset = tensor.offset + (rows.start * row_bytes) as u64;
    file.seek(SeekFrom::Start(offset))
        .and_then(|_| file.read_exact(bytes))
        .map_err(|source| Error::Read { name: tensor.name.clone(), source })?;

    let values = match tensor.encoding.dtype {
        GgmlDType::F32 => {
            bytes.as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()
        }
        GgmlDType::F16 => {
            bytes.as_chunks().0.iter().map(|chunk| f16::from_le_bytes(*chunk).to_f32()).collect()
        }
        GgmlDType::BF16 => {
            bytes.as_chunks().0.iter().map(|chunk| bf16::from_le_bytes(*chunk).to_f32()).collect()
        }
        dtype => qtensor_from_ggml(dtype, bytes, vec![rows.len(), columns], &Device::Cpu)
            .and_then(|blocks| blocks.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1())
            .map_err(|source| Error::Dequantise {
                name: tensor.name.clone(),
                source: Box::new(source),
            })?,
    };
    if let Some(at) = values.iter().position(|value: &f32| !value.is_finite()) {
        return Err(Error::NotFinite {
            name: tensor.name.clone(),
            row: rows.start + at / columns,
            column: at % columns,
            value: values[at],
        });
    }
    Ok(values)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::import::gguf::Gguf;

    /// `fixtures/gguf/encodings.gguf` holds each encoding beside what gguf's own Python makes of it.
    #[test]
    fn every_encoding_reads_as_its_authors_read_it() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/gguf/encodings.gguf");
        let mut gguf = Gguf::open(path.as_ref()).unwrap();
        let mut read = Vec::new();
        for (_, name, _) in ENCODINGS.iter().filter(|(_, _, dtype)| dtype.is_some()) {
            let Some(tensor) = gguf.tensors.get(*name) else { continue };
            assert_eq!(tensor.encoding.name(), *name);
            let expected = &gguf.tensors[&format!("{name}.expected")];
            let ours = read_rows(&mut gguf.file, tensor, 0..2).unwrap();
            let theirs = read_rows(&mut gguf.file, expected, 0..2).unwrap();
            assert_eq!(ours.len(), 512);
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() <= 1e-6 * b.abs().max(1.0), "{name}: {a} {b}");
            }
            let second = read_rows(&mut gguf.file, tensor, 1..2).unwrap();
            assert_eq!(second, ours[256..], "{name}");
            read.push(*name);
        }
        // F32 is what the others are compared in.
        assert_eq!(
            read,
            [
                "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
                "Q6_K", "BF16"
            ]
        );
    }

    #[test]
    fn unreadable_encodings_have_a_name() {
        assert_eq!(Encoding::from_number(20).unwrap_err(), "IQ4_NL");
        assert_eq!(Encoding::from_number(15).unwrap_err(), "Q8_K");
        assert_eq!(Encoding::from_number(999).unwrap_err(), "encoding number 999");
    }

    #[test]
    fn the_list_for_messages_is_the_table() {
        for (_, name, dtype) in ENCODINGS {
            let listed =
                Encoding::READABLE.split(", ").any(|part| part.split(" or ").any(|n| n == *name));
            assert_eq!(listed, dtype.is_some(), "{name}");
        }
    }
}
