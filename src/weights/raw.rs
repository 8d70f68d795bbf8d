//! The fast path: weights whose bytes are their tensors' own, only elsewhere.
//!
//! They are read into the buffer that is written; nothing is decoded, only looked at for NaN.

use std::io;
use std::ops::Range;

use skipgpt_passes::ir::{DType, Stored, Weight};

use super::{BLOCK, Error, describe, overlap, read_window};
use crate::sources::{self, Sources};

/// Rows of tensors, one after the other.
pub(super) type Segments<'a> = Vec<(&'a Stored, Range<usize>)>;

/// The weight as rows of tensors of this dtype, if it is nothing else.
pub(super) fn segments(weight: &Weight, dtype: DType) -> Option<Segments<'_>> {
    let mut segments = Vec::new();
    collect(weight, dtype, 0..weight.rows(), &mut segments).then_some(segments)
}

fn collect<'a>(
    weight: &'a Weight,
    dtype: DType,
    range: Range<usize>,
    segments: &mut Segments<'a>,
) -> bool {
    match weight {
        Weight::Stored(stored) => {
            segments.push((stored, range));
            stored.dtype == dtype
        }
        Weight::Concat(parts) => {
            let mut first = 0;
            parts.iter().all(|part| {
                let own = overlap(&range, first, part.rows());
                first += part.rows();
                own.is_none_or(|own| collect(part, dtype, own, segments))
            })
        }
        Weight::Slice { of, rows } => {
            collect(of, dtype, rows.start + range.start..rows.start + range.end, segments)
        }
        Weight::Cast { of, dtype: to } => *to == dtype && collect(of, dtype, range, segments),
        Weight::Merged { .. }
        | Weight::BlockDiagonal(_)
        | Weight::Difference { .. }
        | Weight::Transpose(_)
        | Weight::Quantized { .. } => false,
    }
}

/// Writes the segments of `weight`.
pub(super) fn write(
    weight: &Weight,
    segments: Segments<'_>,
    dtype: DType,
    sources: &Sources,
    sink: &mut impl io::Write,
) -> Result<(), Error> {
    let columns = weight.columns();
    let row = columns * dtype.size();
    let step = (BLOCK / row.max(1)).max(1);
    let mut buffer = vec![0; step.min(weight.rows()) * row];
    let mut before = 0;
    for (stored, range) in segments {
        for start in range.clone().step_by(step) {
            let rows = start..(start + step).min(range.end);
            let block = &mut buffer[..rows.len() * row];
            read_window(stored, rows.clone(), 0..columns, sources, block)?;
            if let Some(at) = not_finite(block, dtype) {
                let mut value = Vec::with_capacity(1);
                sources::decode(&block[at * dtype.size()..][..dtype.size()], dtype, &mut value);
                return Err(Error::NotFinite {
                    weight: describe(weight),
                    index: before * columns + at,
                    value: value.first().copied().unwrap_or(f32::NAN),
                    dtype,
                });
            }
            sink.write_all(block).map_err(Error::Write)?;
            before += rows.len();
        }
    }
    Ok(())
}

/// Position of the first element that is NaN or infinite: its exponent is all ones.
fn not_finite(bytes: &[u8], dtype: DType) -> Option<usize> {
    match dtype {
        DType::F32 => first(bytes.as_chunks::<4>().0, 0x7f80_0000, |b| u32::from_le_bytes(*b)),
        DType::F16 => first(bytes.as_chunks::<2>().0, 0x7c00, |b| u16::from_le_bytes(*b)),
        DType::BF16 => first(bytes.as_chunks::<2>().0, 0x7f80, |b| u16::from_le_bytes(*b)),
    }
}

/// One pass that vectorises; the position is looked for only when there is one.
fn first<B, T>(elements: &[B], exponent: T, bits: impl Fn(&B) -> T) -> Option<usize>
where
    T: Copy + Default + Ord + std::ops::BitAnd<Output = T>,
{
    let worst = elements.iter().fold(T::default(), |worst, b| worst.max(bits(b) & exponent));
    (worst == exponent)
        .then(|| elements.iter().position(|b| bits(b) & exponent == exponent))
        .flatten()
}
