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
    window(weight, 0..weight.rows(), 0..weight.columns(), sources, &mut out)?;
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
    if let Some(segments) = raw::segments(weight, dtype) {
        return raw::write(weight, segments, dtype, sources, sink);
    }
    let (total, columns) = (weight.rows(), weight.columns());
    let step = (BLOCK / 4 / columns.max(1)).max(1);
    let (mut block, mut bytes) = (Vec::new(), Vec::new());
    for start in (0..total).step_by(step) {
        block.clear();
        bytes.clear();
        window(weight, start..(start + step).min(total), 0..columns, sources, &mut block)?;
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

/// Appends the elements in `rows` and `columns` of the weight to `out`, row by row.
///
/// No expression evaluates more of its operands than the window shows, so a weight read in
/// windows is computed once, whichever way the windows cut it.
fn window(
    weight: &Weight,
    rows: Range<usize>,
    columns: Range<usize>,
    sources: &Sources,
    out: &mut Vec<f32>,
) -> Result<(), Error> {
    match weight {
        Weight::Stored(stored) => stored_window(stored, rows, columns, sources, out),
        Weight::Merged { base, lora } => {
            let start = out.len();
            window(base, rows.clone(), columns.clone(), sources, out)?;
            add_lora(&mut out[start..], rows, columns, lora, sources)
        }
        Weight::Concat(parts) => {
            let mut first = 0;
            for part in parts {
                if let Some(own) = overlap(&rows, first, part.rows()) {
                    window(part, own, columns.clone(), sources, out)?;
                }
                first += part.rows();
            }
            Ok(())
        }
        Weight::Slice { of, rows: slice } => {
            window(of, slice.start + rows.start..slice.start + rows.end, columns, sources, out)
        }
        Weight::BlockDiagonal(parts) => {
            let (mut first, mut left) = (0, 0);
            for part in parts {
                let (height, width) = (part.rows(), part.columns());
                for row in overlap(&rows, first, height).unwrap_or_default() {
                    let end = out.len() + columns.len();
                    if let Some(own) = overlap(&columns, left, width) {
                        let before = left + own.start - columns.start;
                        out.resize(out.len() + before, 0.0);
                        window(part, row..row + 1, own, sources, out)?;
                    }
                    out.resize(end, 0.0);
                }
                first += height;
                left += width;
            }
            Ok(())
        }
        Weight::Difference { of, minus } => {
            let start = out.len();
            window(of, rows.clone(), columns.clone(), sources, out)?;
            let mut subtracted = Vec::with_capacity(out.len() - start);
            window(minus, rows, columns, sources, &mut subtracted)?;
            out[start..].iter_mut().zip(subtracted).for_each(|(value, minus)| *value -= minus);
            Ok(())
        }
        Weight::Transpose(of) => {
            let (height, width) = (columns.len(), rows.len());
            let mut block = Vec::with_capacity(height * width);
            window(of, columns, rows, sources, &mut block)?;
            transpose(&block, height, width, out);
            Ok(())
        }
        Weight::Cast { of, dtype } => {
            let start = out.len();
            window(of, rows, columns, sources, out)?;
            round(&mut out[start..], *dtype);
            Ok(())
        }
        Weight::Quantized { of, scheme } => {
            let width = of.columns();
            if columns == (0..width) {
                return quantized::values(of, rows, scheme, sources, out);
            }
            // Blocks are cut from whole rows.
            let mut whole = Vec::with_capacity(rows.len() * width);
            quantized::values(of, rows, scheme, sources, &mut whole)?;
            for row in whole.chunks_exact(width) {
                out.extend_from_slice(&row[columns.clone()]);
            }
            Ok(())
        }
    }
}

/// The part of `range` that falls on `length` elements from `first` on, counted from `first`.
fn overlap(range: &Range<usize>, first: usize, length: usize) -> Option<Range<usize>> {
    let (start, end) = (range.start.max(first), range.end.min(first + length));
    (start < end).then(|| start - first..end - first)
}

fn stored_window(
    stored: &Stored,
    rows: Range<usize>,
    columns: Range<usize>,
    sources: &Sources,
    out: &mut Vec<f32>,
) -> Result<(), Error> {
    let mut bytes = vec![0; rows.len() * columns.len() * stored.dtype.size()];
    read_window(stored, rows, columns, sources, &mut bytes)?;
    sources::decode(&bytes, stored.dtype, out);
    Ok(())
}

/// Fills `bytes` with a window of a tensor: one read if it spans the rows, else one per row.
fn read_window(
    stored: &Stored,
    rows: Range<usize>,
    columns: Range<usize>,
    sources: &Sources,
    bytes: &mut [u8],
) -> Result<(), Error> {
    let width: usize = stored.shape.iter().skip(1).product();
    let size = stored.dtype.size();
    let place = |row: usize, column: usize| ((row * width + column) * size) as u64;
    if columns == (0..width) {
        return Ok(sources.read_at(&stored.name, place(rows.start, 0), bytes)?);
    }
    for (row, bytes) in rows.zip(bytes.chunks_exact_mut(columns.len() * size)) {
        sources.read_at(&stored.name, place(row, columns.start), bytes)?;
    }
    Ok(())
}

/// Appends the transpose of `block` `[height, width]` to `out`, in tiles that fit the cache.
fn transpose(block: &[f32], height: usize, width: usize, out: &mut Vec<f32>) {
    const TILE: usize = 32;
    let start = out.len();
    out.resize(start + block.len(), 0.0);
    let out = &mut out[start..];
    for top in (0..height).step_by(TILE) {
        for left in (0..width).step_by(TILE) {
            for column in left..(left + TILE).min(width) {
                for row in top..(top + TILE).min(height) {
                    out[column * height + row] = block[row * width + column];
                }
            }
        }
    }
}

/// Adds a window of `scale · B · A` to `out`, summed over the rank in order.
fn add_lora(
    out: &mut [f32],
    rows: Range<usize>,
    columns: Range<usize>,
    lora: &Lora,
    sources: &Sources,
) -> Result<(), Error> {
    let rank = lora.down.shape.first().copied().unwrap_or_default();
    let width = columns.len();
    let (mut down, mut up) = (Vec::new(), Vec::new());
    stored_window(&lora.down, 0..rank, columns, sources, &mut down)?;
    stored_window(&lora.up, rows, 0..rank, sources, &mut up)?;
    let mut sum = vec![0.0_f32; width];
    for (row, factors) in out.chunks_exact_mut(width).zip(up.chunks_exact(rank)) {
        sum.fill(0.0);
        for (factor, direction) in factors.iter().zip(down.chunks_exact(width)) {
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

pub mod quantized;
mod raw;
#[cfg(test)]
mod tests;
