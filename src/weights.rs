//! Evaluates [`Weight`] expressions, a block of rows at a time.
//!
//! A block holds at most [`BLOCK`] bytes of `f32`, so memory does not depend on the model nor on its
//! largest tensor. Sums run in a fixed order, element by element: the same bytes on any machine,
//! with any number of threads.

use std::io;
use std::ops::Range;

use skipgpt_passes::ir::{DType, Lora, Stored, Weight};

use crate::sources::{self, Sources};

/// Bytes of `f32` in one block of rows.
pub const BLOCK: usize = 8 << 20;

/// Why a weight could not be evaluated or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor could not be read.
    #[error(transparent)]
    Source(#[from] sources::Error),
    /// A value is NaN or infinite, in the checkpoint or after rounding to the artifact's dtype.
    #[error(
        "{weight}: element {index} is {value}; every weight must be finite (is the file damaged, or the range of {dtype} too small?)"
    )]
    NotFinite {
        /// The tensors the value comes from.
        weight: String,
        /// Row-major position.
        index: usize,
        /// What stands there.
        value: f32,
        /// What it was rounded to.
        dtype: DType,
    },
    /// The destination refused the bytes.
    #[error("cannot write the weights: {0}")]
    Write(#[source] io::Error),
}

/// The whole weight as row-major `f32`.
pub fn values(weight: &Weight, sources: &Sources) -> Result<Vec<f32>, Error> {
    let mut out = Vec::with_capacity(weight.len());
    rows(weight, 0..weight.rows(), sources, &mut out)?;
    Ok(out)
}

/// Writes the weight to `sink`, row-major and little-endian, rounded to `dtype`.
///
/// # Errors
///
/// [`Error::NotFinite`] names the tensor and the element of a NaN or infinity.
pub fn write(
    weight: &Weight,
    dtype: DType,
    sources: &Sources,
    sink: &mut impl io::Write,
) -> Result<(), Error> {
    let (total, columns) = (weight.rows(), weight.columns());
    let step = (BLOCK / 4 / columns.max(1)).max(1);
    let (mut block, mut bytes) = (Vec::new(), Vec::new());
    for start in (0..total).step_by(step) {
        block.clear();
        bytes.clear();
        rows(weight, start..(start + step).min(total), sources, &mut block)?;
        if dtype != DType::F32 {
            round(&mut block, dtype);
        }
        if let Some(at) = not_finite(&block) {
            return Err(Error::NotFinite {
                weight: describe(weight),
                index: start * columns + at,
                value: block[at],
                dtype,
            });
        }
        sources::encode(&block, dtype, &mut bytes);
        sink.write_all(&bytes).map_err(Error::Write)?;
    }
    Ok(())
}

/// Position of the first value that is NaN or infinite.
fn not_finite(values: &[f32]) -> Option<usize> {
    const EXPONENT: u32 = 0x7f80_0000;
    // One pass that vectorises; the position is looked for only when there is one.
    let worst = values.iter().fold(0, |worst, v| worst.max(v.to_bits() & EXPONENT));
    (worst == EXPONENT).then(|| values.iter().position(|v| !v.is_finite())).flatten()
}

fn round(values: &mut [f32], dtype: DType) {
    match dtype {
        DType::F32 => {}
        DType::F16 => values.iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32()),
        DType::BF16 => values.iter_mut().for_each(|v| *v = half::bf16::from_f32(*v).to_f32()),
    }
}

/// The names of the tensors in an expression.
fn describe(weight: &Weight) -> String {
    let names: Vec<_> = weight.stored().iter().map(|stored| stored.name.as_str()).collect();
    names.join(" + ")
}

/// Appends rows `range` of the weight to `out`.
fn rows(
    weight: &Weight,
    range: Range<usize>,
    sources: &Sources,
    out: &mut Vec<f32>,
) -> Result<(), Error> {
    match weight {
        Weight::Stored(stored) => stored_rows(stored, range, sources, out),
        Weight::Merged { base, lora } => {
            let start = out.len();
            rows(base, range.clone(), sources, out)?;
            add_lora(&mut out[start..], base.columns(), range, lora, sources)
        }
        Weight::Concat(parts) => {
            let mut first = 0;
            for part in parts {
                let (start, end) = (range.start.max(first), range.end.min(first + part.rows()));
                if start < end {
                    rows(part, start - first..end - first, sources, out)?;
                }
                first += part.rows();
            }
            Ok(())
        }
        Weight::Slice { of, rows: slice } => {
            rows(of, slice.start + range.start..slice.start + range.end, sources, out)
        }
        Weight::BlockDiagonal(parts) => {
            let columns = weight.columns();
            let (mut first, mut left) = (0, 0);
            for part in parts {
                let (start, end) = (range.start.max(first), range.end.min(first + part.rows()));
                let width = part.columns();
                for row in start..end {
                    out.extend(std::iter::repeat_n(0.0, left));
                    rows(part, row - first..row - first + 1, sources, out)?;
                    out.extend(std::iter::repeat_n(0.0, columns - left - width));
                }
                first += part.rows();
                left += width;
            }
            Ok(())
        }
        Weight::Transpose(of) => transposed_rows(of, range, sources, out),
        Weight::Cast { of, dtype } => {
            let start = out.len();
            rows(of, range, sources, out)?;
            round(&mut out[start..], *dtype);
            Ok(())
        }
    }
}

fn stored_rows(
    stored: &Stored,
    range: Range<usize>,
    sources: &Sources,
    out: &mut Vec<f32>,
) -> Result<(), Error> {
    let columns: usize = stored.shape.iter().skip(1).product();
    let row = columns * stored.dtype.size();
    let mut bytes = vec![0; range.len() * row];
    sources.read_at(&stored.name, (range.start * row) as u64, &mut bytes)?;
    sources::decode(&bytes, stored.dtype, out);
    Ok(())
}

/// Columns `range` of `of`, one after the other, from row blocks of `of`.
fn transposed_rows(
    of: &Weight,
    range: Range<usize>,
    sources: &Sources,
    out: &mut Vec<f32>,
) -> Result<(), Error> {
    let (height, width) = (of.rows(), of.columns());
    let start = out.len();
    out.resize(start + range.len() * height, 0.0);
    let out = &mut out[start..];
    let step = (BLOCK / 4 / width.max(1)).max(1);
    let mut block = Vec::new();
    for first in (0..height).step_by(step) {
        block.clear();
        rows(of, first..(first + step).min(height), sources, &mut block)?;
        for (row, values) in block.chunks_exact(width).enumerate() {
            for (column, value) in values[range.clone()].iter().enumerate() {
                out[column * height + first + row] = *value;
            }
        }
    }
    Ok(())
}

/// Adds rows `range` of `scale · B · A` to `out`, summed over the rank in order.
fn add_lora(
    out: &mut [f32],
    columns: usize,
    range: Range<usize>,
    lora: &Lora,
    sources: &Sources,
) -> Result<(), Error> {
    let rank = lora.down.shape.first().copied().unwrap_or_default();
    let (mut down, mut up) = (Vec::new(), Vec::new());
    stored_rows(&lora.down, 0..rank, sources, &mut down)?;
    stored_rows(&lora.up, range, sources, &mut up)?;
    let mut sum = vec![0.0_f32; columns];
    for (row, factors) in out.chunks_exact_mut(columns).zip(up.chunks_exact(rank)) {
        sum.fill(0.0);
        for (factor, direction) in factors.iter().zip(down.chunks_exact(columns)) {
            for (sum, value) in sum.iter_mut().zip(direction) {
                *sum += factor * value;
            }
        }
        for (value, sum) in row.iter_mut().zip(&sum) {
            *value += lora.scale as f32 * sum;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
