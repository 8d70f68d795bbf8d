//! Matrix products of `f32` on the tile unit of recent x86 servers (AMX), where there is one.
//!
//! The unit multiplies `bf16` and sums in `f32`, sixteen times as fast as vector instructions multiply
//! `f32`. Each operand is split in two halves, `x = high + low` with `high` the nearest `bf16` and
//! `low` the nearest to what is left, and three of the four products are summed:
//!
//! ```text
//! a · b ≈ high(a) · high(b) + high(a) · low(b) + low(a) · high(b)
//! ```
//!
//! What is left out is under `2⁻¹⁶ · |a| · |b|` for each product of two elements, which is what `f32`
//! sums of a few hundred terms lose anyway. Every element is summed in one order, whatever the
//! number of threads. Elements under `2⁻¹²⁶` count as 0; an infinite one gives NaN.
//!
//! ```text
//! for rows of A, ROWS at a time        for the depth, DEPTH at a time
//!     split and lay out A              once, every thread a part
//!     for columns of B, 32 at a time   every thread its own
//!         split and lay out B          stays in the second-level cache
//!         for rows of A, 32 at a time
//!             2 × 2 tiles of 16 × 16
//! ```

mod pack;
mod tile;

use std::cell::Cell;

use rayon::prelude::*;

use super::Matrix;
use pack::Operand;
use tile::{BYTES, Tile};

/// Rows and columns that one call of the kernel computes.
const PANEL: usize = 32;
/// Depth of a tile: 32 `bf16`.
const STEP: usize = 32;
/// Tiles of a panel's step: two of high halves, two of low ones.
const TILES: usize = 4;
/// Depth that is laid out at once: 128 KB of a panel.
const DEPTH: usize = 1024;
/// Rows that are laid out at once: 4 MB with the depth above.
const ROWS: usize = 1024;
/// Below this many rows, columns or depth most of a tile would be padding.
const LEAST: usize = 16;

/// Whether this process may use the unit; asks for it the first time.
pub(super) fn available() -> bool {
    tile::available()
}

/// Whether a product of this size gains by it.
pub(super) const fn worthwhile(m: usize, n: usize, k: usize) -> bool {
    m >= LEAST && n >= LEAST && k >= LEAST
}

/// `out = a · b`, or `out += a · b`, `out` row-major.
///
/// # Safety
///
/// [`available`] has said yes; `out` is of the product's size and the inner dimensions agree.
pub(super) unsafe fn multiply(
    out: &mut [f32],
    accumulate: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
    parallel: bool,
) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    let (a, b) = (Operand::left(a), Operand::right(b));
    let blocks = k.div_ceil(DEPTH);
    let depth = k.div_ceil(blocks * STEP) * STEP;
    let out = Out { values: out.as_mut_ptr(), rows: m, columns: n };
    for first_row in (0..m).step_by(ROWS) {
        let panels = (m - first_row).min(ROWS).div_ceil(PANEL);
        for first in (0..k).step_by(depth) {
            let steps = (k - first).min(depth).div_ceil(STEP);
            let size = steps * TILES;
            let accumulate = accumulate || first > 0;
            scratch(panels * size, |packed| {
                let lay_out = |(at, tiles): (usize, &mut [Tile])| {
                    // SAFETY: the unit comes with the vector instructions that packing uses.
                    unsafe { a.pack(first_row + at * PANEL, first, tiles) };
                };
                let packed_a = &mut packed[..panels * size];
                if parallel {
                    packed_a.par_chunks_exact_mut(size).enumerate().for_each(lay_out);
                } else {
                    packed_a.chunks_exact_mut(size).enumerate().for_each(lay_out);
                }
                let packed_a = &*packed_a;
                let columns = |at: usize| {
                    scratch(size, |packed_b| {
                        let packed_b = &mut packed_b[..size];
                        // SAFETY: as above; panels of columns are apart.
                        unsafe {
                            b.pack(at * PANEL, first, packed_b);
                            out.panel(packed_a, packed_b, first_row, at * PANEL, accumulate);
                        }
                    });
                };
                if parallel {
                    (0..n.div_ceil(PANEL)).into_par_iter().for_each(columns);
                } else {
                    (0..n.div_ceil(PANEL)).for_each(columns);
                }
            });
        }
    }
}

/// Where a product goes; threads write columns of their own.
struct Out {
    values: *mut f32,
    rows: usize,
    columns: usize,
}

// SAFETY: only `panel` writes, and its callers give each thread other columns.
unsafe impl Sync for Out {}

impl Out {
    /// The product of every panel of rows in `a` with the panel of columns `b`.
    ///
    /// # Safety
    ///
    /// The process may use the unit, and no other thread writes these columns.
    unsafe fn panel(
        &self,
        a: &[Tile],
        b: &[Tile],
        first_row: usize,
        column: usize,
        accumulate: bool,
    ) {
        let columns = (self.columns - column).min(PANEL);
        // SAFETY: the process may use the unit.
        unsafe { tile::configure() };
        for (at, a) in a.chunks_exact(b.len()).enumerate() {
            let row = first_row + at * PANEL;
            let rows = (self.rows - row).min(PANEL);
            // SAFETY: the row and the column lie in the product.
            let corner = unsafe { self.values.add(row * self.columns + column) };
            if rows == PANEL && columns == PANEL {
                // SAFETY: all of the 32 × 32 elements lie in the product.
                unsafe { tile::multiply(a, b, corner, self.columns, accumulate) };
                continue;
            }
            let mut edge = [0.0_f32; PANEL * PANEL];
            let line = |row: usize| {
                // SAFETY: this many columns of these rows lie in the product, and are ours.
                unsafe { std::slice::from_raw_parts_mut(corner.add(row * self.columns), columns) }
            };
            if accumulate {
                for (row, edge) in edge.chunks_exact_mut(PANEL).take(rows).enumerate() {
                    edge[..columns].copy_from_slice(line(row));
                }
            }
            // SAFETY: the edge has 32 × 32 elements.
            unsafe { tile::multiply(a, b, edge.as_mut_ptr(), PANEL, accumulate) };
            for (row, edge) in edge.chunks_exact(PANEL).take(rows).enumerate() {
                line(row).copy_from_slice(&edge[..columns]);
            }
        }
        // SAFETY: the process may use the unit.
        unsafe { tile::release() };
    }
}

thread_local! {
    /// Tiles that no product of this thread is using.
    static SPARE: Cell<Vec<Vec<Tile>>> = const { Cell::new(Vec::new()) };
}

/// Gives `use_tiles` this many tiles or more, of any content.
fn scratch(count: usize, use_tiles: impl FnOnce(&mut [Tile])) {
    // A thread that waits for others may begin another product: what is in use is taken out.
    let mut spare = SPARE.take();
    let mut tiles = spare.pop().unwrap_or_default();
    SPARE.set(spare);
    if tiles.len() < count {
        tiles.resize(count, Tile([0; BYTES]));
    }
    use_tiles(&mut tiles);
    let mut spare = SPARE.take();
    spare.push(tiles);
    SPARE.set(spare);
}

#[cfg(test)]
mod tests;
