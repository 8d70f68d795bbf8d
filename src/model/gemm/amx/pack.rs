//! Operands split in halves of `bf16` and laid out in tiles.
//!
//! An operand has lanes (rows of the left one, columns of the right one) and a depth. A tile of the
//! left one is 16 lanes of 16 pairs along the depth, one of the right one 16 pairs of 16 lanes.

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _mm512_castsi512_ps, _mm512_castsi512_si256,
    _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_extracti64x4_epi64, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_permutexvar_epi16, _mm512_shuffle_i32x4, _mm512_slli_epi32,
    _mm512_store_si512, _mm512_sub_ps, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::super::Matrix;
use super::tile::Tile;
use super::{STEP, TILES};

/// Lanes of a tile, and pairs of its depth.
const SIDE: usize = 16;

/// One side of a product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand<'a> {
    values: &'a [f32],
    lanes: usize,
    depth: usize,
    /// From lane to lane, and along the depth; one of them is 1.
    strides: (usize, usize),
    /// Whether a tile's rows are lanes.
    lane_major: bool,
}

/// Both halves of 16 × 16 pairs.
type Halves = [[__m512i; SIDE]; 2];

impl<'a> Operand<'a> {
    /// Of the left side the lanes are rows.
    pub(super) const fn left(a: Matrix<'a>) -> Self {
        let Matrix { values, rows, columns, strides } = a;
        Self { values, lanes: rows, depth: columns, strides, lane_major: true }
    }

    /// Of the right side the lanes are columns.
    pub(super) const fn right(b: Matrix<'a>) -> Self {
        let (row, column) = b.strides;
        let strides = (column, row);
        Self { values: b.values, lanes: b.columns, depth: b.rows, strides, lane_major: false }
    }

    /// Lays out 32 lanes from `lane` on and as many steps of depth from `first` on as `tiles` takes;
    /// what lies outside is 0.
    ///
    /// # Safety
    ///
    /// The processor has AVX-512 with its `bf16` extension.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn pack(&self, lane: usize, first: usize, tiles: &mut [Tile]) {
        for (step, tiles) in tiles.chunks_exact_mut(TILES).enumerate() {
            for half in 0..2 {
                let (lane, first) = (lane + half * SIDE, first + step * STEP);
                // SAFETY: the processor has the instructions.
                let [high, low] = unsafe { self.tile(lane, first) };
                store(&mut tiles[half], &high);
                store(&mut tiles[2 + half], &low);
            }
        }
    }

    /// The tile whose first lane and depth these are.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn tile(&self, lane: usize, first: usize) -> Halves {
        let along_depth = self.strides.1 == 1;
        let inside = lane + SIDE <= self.lanes && first + STEP <= self.depth;
        let mut padded = [0.0; SIDE * STEP];
        let (start, stride) = if inside {
            let start = lane * self.strides.0 + first * self.strides.1;
            (&raw const self.values[start], self.strides.0.max(self.strides.1))
        } else {
            let stride = if along_depth { STEP } else { SIDE };
            let lanes = self.lanes.saturating_sub(lane).min(SIDE);
            let depth = self.depth.saturating_sub(first).min(STEP);
            let (rows, columns) = if along_depth { (lanes, depth) } else { (depth, lanes) };
            let apart = self.strides.0.max(self.strides.1);
            let start = lane * self.strides.0 + first * self.strides.1;
            if columns > 0 {
                for (row, padded) in padded.chunks_exact_mut(stride).take(rows).enumerate() {
                    let values = &self.values[start + row * apart..][..columns];
                    padded[..columns].copy_from_slice(values);
                }
            }
            (padded.as_ptr(), stride)
        };
        // SAFETY: the lanes and the depth of a tile lie in the operand, or in its padded copy.
        let mut halves = unsafe {
            if along_depth { lanes_of_pairs(start, stride) } else { pairs_of_lanes(start, stride) }
        };
        if along_depth != self.lane_major {
            let [high, low] = &mut halves;
            transpose(high);
            transpose(low);
        }
        halves
    }
}

/// 16 lanes, `stride` apart, of 32 values along the depth.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn lanes_of_pairs(start: *const f32, stride: usize) -> Halves {
    let mut halves = [[zero(); SIDE]; 2];
    let [high, low] = &mut halves;
    for (lane, (high, low)) in high.iter_mut().zip(low).enumerate() {
        // SAFETY: the caller has 32 values in each lane.
        let (first, second) = unsafe {
            let lane = start.add(lane * stride);
            (_mm512_loadu_ps(lane), _mm512_loadu_ps(lane.add(SIDE)))
        };
        (*high, *low) = split(first, second);
    }
    halves
}

/// 32 rows along the depth, `stride` apart, of 16 lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pairs_of_lanes(start: *const f32, stride: usize) -> Halves {
    /// The first and the seventeenth, the second and the eighteenth, and so on.
    static PAIRS: [u16; 32] = {
        let mut order = [0; 32];
        let mut at = 0;
        while at < 32 {
            order[at] = (at / 2 + (at % 2) * 16) as u16;
            at += 1;
        }
        order
    };
    // SAFETY: the order has 64 bytes.
    let order = unsafe { _mm512_loadu_si512(PAIRS.as_ptr().cast()) };
    let mut halves = [[zero(); SIDE]; 2];
    let [high, low] = &mut halves;
    for (pair, (high, low)) in high.iter_mut().zip(low).enumerate() {
        // SAFETY: the caller has 16 values in each row.
        let (first, second) = unsafe {
            let row = start.add(2 * pair * stride);
            (_mm512_loadu_ps(row), _mm512_loadu_ps(row.add(stride)))
        };
        let (both_high, both_low) = split(first, second);
        *high = _mm512_permutexvar_epi16(order, both_high);
        *low = _mm512_permutexvar_epi16(order, both_low);
    }
    halves
}

/// The high and the low halves of 32 values.
#[target_feature(enable = "avx512f,avx512bf16")]
fn split(first: __m512, second: __m512) -> (__m512i, __m512i) {
    let high = bits(_mm512_cvtne2ps_pbh(second, first));
    let left = _mm512_sub_ps(first, widen(_mm512_castsi512_si256(high)));
    let right = _mm512_sub_ps(second, widen(_mm512_extracti64x4_epi64::<1>(high)));
    (high, bits(_mm512_cvtne2ps_pbh(right, left)))
}

/// 16 `bf16` as `f32`.
#[target_feature(enable = "avx512f")]
fn widen(values: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(values)))
}

/// The same register under another name.
#[target_feature(enable = "avx512f")]
fn bits(values: __m512bh) -> __m512i {
    // SAFETY: both are 64 bytes of which every value is valid.
    unsafe { std::mem::transmute(values) }
}

#[target_feature(enable = "avx512f")]
fn zero() -> __m512i {
    std::arch::x86_64::_mm512_setzero_si512()
}

#[target_feature(enable = "avx512f")]
fn store(tile: &mut Tile, rows: &[__m512i; SIDE]) {
    for (to, row) in tile.0.chunks_exact_mut(64).zip(rows) {
        // SAFETY: a tile's rows are 64 bytes, aligned to as many.
        unsafe { _mm512_store_si512(to.as_mut_ptr().cast(), *row) };
    }
}

/// Rows of 16 pairs become columns: within blocks of 4 × 4 first, then the blocks.
#[target_feature(enable = "avx512f")]
fn transpose(rows: &mut [__m512i; SIDE]) {
    for four in rows.chunks_exact_mut(4) {
        let low =
            [_mm512_unpacklo_epi32(four[0], four[1]), _mm512_unpacklo_epi32(four[2], four[3])];
        let high =
            [_mm512_unpackhi_epi32(four[0], four[1]), _mm512_unpackhi_epi32(four[2], four[3])];
        four[0] = _mm512_unpacklo_epi64(low[0], low[1]);
        four[1] = _mm512_unpackhi_epi64(low[0], low[1]);
        four[2] = _mm512_unpacklo_epi64(high[0], high[1]);
        four[3] = _mm512_unpackhi_epi64(high[0], high[1]);
    }
    for at in 0..4 {
        let [a, b, c, d] = [rows[at], rows[4 + at], rows[8 + at], rows[12 + at]];
        // Blocks 0 and 2 of each, then 1 and 3.
        let (even_ab, odd_ab) =
            (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (even_cd, odd_cd) =
            (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        rows[at] = _mm512_shuffle_i32x4::<0x88>(even_ab, even_cd);
        rows[4 + at] = _mm512_shuffle_i32x4::<0x88>(odd_ab, odd_cd);
        rows[8 + at] = _mm512_shuffle_i32x4::<0xdd>(even_ab, even_cd);
        rows[12 + at] = _mm512_shuffle_i32x4::<0xdd>(odd_ab, odd_cd);
    }
}
