#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::model::gemm::{Threads, multiply_plain};

/// Values of either sign and of a wide range of sizes, other ones for another `seed`.
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / 4_294_967_296.0 - 0.5
    };
    (0..count).map(|_| next() * (next() * 8.0).exp()).collect()
}

/// Rows by columns, or the transpose of a matrix that lies the other way round.
fn matrix(values: &[f32], rows: usize, columns: usize, turned: bool) -> Matrix<'_> {
    if turned {
        Matrix::new(values, columns, rows).unwrap().t()
    } else {
        Matrix::new(values, rows, columns).unwrap()
    }
}

#[test]
fn odd_shapes_either_way_round_as_the_plain_product() {
    // Where the unit is missing the plain product is what runs, and its own tests are what counts.
    let unit = available();
    for (m, n, k) in
        [(16, 16, 16), (32, 32, 32), (33, 47, 65), (100, 31, 700), (1, 40, 33), (1100, 17, 40)]
    {
        let (left, right) = (values(m * k, 1), values(k * n, 2));
        for turned in 0..4 {
            let a = matrix(&left, m, k, turned & 1 == 1);
            let b = matrix(&right, k, n, turned & 2 == 2);
            for (accumulate, parallel) in [(false, true), (true, false)] {
                let before = values(m * n, 3);
                let (mut found, mut expected) = (before.clone(), before);
                multiply_plain(&mut expected, accumulate, a, b, Threads::One);
                if unit {
                    // SAFETY: the unit is there and the sizes agree.
                    unsafe { multiply(&mut found, accumulate, a, b, parallel) };
                } else {
                    multiply_plain(&mut found, accumulate, a, b, Threads::All);
                }
                let at = |matrix: &Matrix<'_>, row: usize, column: usize| {
                    matrix.values[row * matrix.strides.0 + column * matrix.strides.1]
                };
                for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let (row, column) = (place / n, place % n);
                    let size: f32 =
                        (0..k).map(|d| (at(&a, row, d) * at(&b, d, column)).abs()).sum();
                    let error = (found - expected).abs();
                    assert!(
                        error <= (size + expected.abs()) / 65_536.0,
                        "[{m}, {k}] · [{k}, {n}], {turned}: {found} for {expected} at {place}",
                    );
                }
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    if !available() {
        return;
    }
    let (m, n, k) = (130, 200, 650);
    let (left, right) = (values(m * k, 4), values(k * n, 5));
    let (a, b) = (matrix(&left, m, k, false), matrix(&right, k, n, true));
    let (mut one, mut all) = (vec![0.0; m * n], vec![0.0; m * n]);
    // SAFETY: the unit is there and the sizes agree.
    unsafe {
        multiply(&mut one, false, a, b, false);
        multiply(&mut all, false, a, b, true);
    }
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&one), bits(&all));
}

#[test]
fn what_is_not_finite_stays_so() {
    if !available() {
        return;
    }
    let ones = vec![1.0; 32 * 32];
    for bad in [f32::NAN, f32::INFINITY, f32::from_bits(0x7fff_ffff)] {
        let mut left = ones.clone();
        left[40] = bad;
        let (a, b) = (matrix(&left, 32, 32, false), matrix(&ones, 32, 32, false));
        let mut out = vec![0.0; 32 * 32];
        // SAFETY: the unit is there and the sizes agree.
        unsafe { multiply(&mut out, false, a, b, false) };
        assert!(out[32..64].iter().all(|value| !value.is_finite()));
        assert!(out[..32].iter().chain(&out[64..]).all(|value| (*value - 32.0).abs() < 1e-6));
    }
}
