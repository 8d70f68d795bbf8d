//! Matrices in few bits: codes, scales and zero points, computed in row blocks.
//!
//! The codes go to the destination as they are found; scales and zero points, which stand behind
//! them in the file, are kept until then. Rows are shared out among threads; each row's bytes are a
//! function of the row alone, so their number does not show.

use std::io;
use std::num::NonZero;
use std::ops::Range;
use std::thread;

use skipgpt_passes::ir::{DType, Weight};
use skipgpt_passes::quantization::{Bits, Scheme};

use super::{Error, describe, not_finite, window};
use crate::sources::{self, Sources};
use crate::{importance, packed};

mod fit;

/// Bytes of `f32` that one thread evaluates at a time: they stay in its cache.
const SHARE: usize = 1 << 20;
/// Most threads that compute.
const THREADS: usize = 8;

/// What stands behind the codes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sides {
    /// One scale per block, row by row, little-endian.
    pub scales: Vec<u8>,
    /// The zero points, row by row; empty if the scheme is symmetric.
    pub zeros: Vec<u8>,
}

/// Some rows of a matrix in few bits.
#[derive(Debug, Default)]
struct Rows {
    codes: Vec<u8>,
    sides: Sides,
}

/// Writes the codes of `weight`, a matrix, to `sink`, and gives its scales, of `dtype`, and its
/// zero points.
///
/// # Errors
///
/// As [`super::write`].
pub fn write(
    weight: &Weight,
    scheme: &Scheme,
    dtype: DType,
    sources: &Sources,
    sink: &mut impl io::Write,
) -> Result<Sides, Error> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS);
    write_on(threads, weight, scheme, dtype, sources, sink)
}

/// As [`write()`], on so many threads.
fn write_on(
    threads: usize,
    weight: &Weight,
    scheme: &Scheme,
    dtype: DType,
    sources: &Sources,
    sink: &mut impl io::Write,
) -> Result<Sides, Error> {
    let (total, columns) = (weight.rows(), weight.columns());
    let step = (SHARE / 4 / columns.max(1)).max(1);
    let mut all = Sides::default();
    let quantise = |rows| quantise(weight, rows, scheme, dtype, sources);
    for start in (0..total).step_by(step * threads) {
        let end = (start + step * threads).min(total);
        let shares = (start..end).step_by(step).map(|first| first..(first + step).min(end));
        for rows in each(&shares.collect::<Vec<_>>(), &quantise) {
            let Rows { codes, sides } = rows?;
            sink.write_all(&codes).map_err(Error::Write)?;
            all.scales.extend(sides.scales);
            all.zeros.extend(sides.zeros);
        }
    }
    Ok(all)
}

/// `work` done for each of `shares`, side by side; the last on this thread.
fn each<T: Send>(shares: &[Range<usize>], work: &(impl Fn(Range<usize>) -> T + Sync)) -> Vec<T> {
    let Some((last, others)) = shares.split_last() else { return Vec::new() };
    thread::scope(|scope| {
        let others: Vec<_> = others
            .iter()
            .map(|share| {
                let builder = thread::Builder::new().name("quantise".to_owned());
                (share, builder.spawn_scoped(scope, || work(share.clone())))
            })
            .collect();
        let last = work(last.clone());
        let others = others.into_iter().map(|(share, thread)| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            // A thread that could not be started is made up for here.
            Err(_) => work(share.clone()),
        });
        others.chain([last]).collect()
    })
}

/// The values of some rows of a matrix in few bits, with `f32` scales.
pub(super) fn values(
    weight: &Weight,
    rows: Range<usize>,
    scheme: &Scheme,
    sources: &Sources,
    out: &mut Vec<f32>,
) -> Result<(), Error> {
    let columns = weight.columns();
    let count = rows.len();
    let Rows { codes, sides } = quantise(weight, rows, scheme, DType::F32, sources)?;
    let zeros = scheme.zero_bytes(columns);
    for row in 0..count {
        let part = |bytes: &'_ [u8], size: usize| row * size..row * size + size.min(bytes.len());
        let row = packed::Row {
            codes: &codes[part(&codes, scheme.code_bytes(columns))],
            scales: &sides.scales[part(&sides.scales, 4 * scheme.blocks(columns))],
            zeros: &sides.zeros[part(&sides.zeros, zeros)],
        };
        packed::unpack(row, columns, scheme, DType::F32, out);
    }
    Ok(())
}

fn quantise(
    weight: &Weight,
    rows: Range<usize>,
    scheme: &Scheme,
    dtype: DType,
    sources: &Sources,
) -> Result<Rows, Error> {
    let columns = weight.columns();
    let first = rows.start;
    let mut values = Vec::with_capacity(rows.len() * columns);
    window(weight, rows, 0..columns, sources, &mut values)?;
    if let Some(at) = not_finite(&values) {
        return Err(Error::NotFinite {
            weight: describe(weight),
            index: first * columns + at,
            value: values[at],
            dtype: DType::F32,
        });
    }
    let mut out = Rows::default();
    let mut scales = Vec::with_capacity(values.len().div_ceil(scheme.block));
    for (index, row) in (first..).zip(values.chunks_exact(columns)) {
        let importance = importance::name_at(weight, index).and_then(|n| sources.importance(n));
        let importance = importance.filter(|importance| importance.len() == columns);
        pack_row(row, importance, scheme, dtype, &mut out, &mut scales);
    }
    if let Some(at) = not_finite(&scales) {
        let blocks = scheme.blocks(columns);
        let row = first + at / blocks;
        return Err(Error::NotFinite {
            weight: format!("the scales of {}", describe(weight)),
            index: row * blocks + at % blocks,
            value: scales[at],
            dtype,
        });
    }
    sources::encode(&scales, dtype, &mut out.sides.scales);
    Ok(out)
}

/// Appends a row's codes and zero points to `out`, its scales to `scales`.
fn pack_row(
    row: &[f32],
    importance: Option<&[f32]>,
    scheme: &Scheme,
    dtype: DType,
    out: &mut Rows,
    scales: &mut Vec<f32>,
) {
    let mut last = [0.0; 256];
    let mut codes = [0.0; 256];
    let codes = &mut codes[..scheme.block];
    for (index, block) in row.chunks(scheme.block).enumerate() {
        let block = if block.len() == scheme.block {
            block
        } else {
            // Zeros change no extreme, and weigh little in an error.
            last[..block.len()].copy_from_slice(block);
            &last[..scheme.block]
        };
        let weighs = importance.map(|all| &all[index * scheme.block..]);
        let fit = fit::fit(block, weighs, scheme, dtype);
        fit::encode(block, fit, scheme.bits, codes);
        scales.push(fit.scale);
        let zero = fit.zero as u8;
        match scheme.bits {
            Bits::Eight => out.codes.extend(codes.iter().map(|code| *code as u8)),
            Bits::Four => out.codes.extend(
                codes.as_chunks::<2>().0.iter().map(|[low, high]| *low as u8 | (*high as u8) << 4),
            ),
        }
        match (scheme.symmetric, scheme.bits, index % 2) {
            (true, ..) => {}
            (false, Bits::Four, 1) => {
                if let Some(pair) = out.sides.zeros.last_mut() {
                    *pair |= zero << 4;
                }
            }
            _ => out.sides.zeros.push(zero),
        }
    }
}

#[cfg(test)]
mod tests;
