//! Exponentials of many values at once.
//!
//! The C library takes one value at a time. Here the arithmetic is laid out so that the compiler
//! turns it into vector instructions, the widest that the processor has; it is the same arithmetic,
//! without fused products, on every one: results do not depend on the machine.
//!
//! `exp(x) = 2ⁿ · exp(r)` with `n = round(x / ln 2)` and `r = x − n · ln 2`, `|r| ≤ ln 2 / 2`, where
//! seven terms of the series leave less than 10⁻⁸.

#![allow(
    clippy::inline_always,
    reason = "only inlined code is compiled for the vector instructions"
)]

use pulp::{Arch, WithSimd};

/// `ln 2` in two parts; products of the first with small whole numbers are exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Adding it rounds to a whole number.
const ROUND: f32 = 12_582_912.0;
/// Beyond these the result is 0, or would not be finite.
const LOWEST: f32 = -87.3;
const HIGHEST: f32 = 88.3;

/// NaN stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let clamped = if x < LOWEST { LOWEST } else { x };
    let clamped = if clamped > HIGHEST { HIGHEST } else { clamped };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let series = 1.0 / 720.0 + r * (1.0 / 5040.0);
    let series = 1.0 / 24.0 + r * (1.0 / 120.0 + r * series);
    let series = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * series)));
    // The low bits of `rounded` are n; as an exponent they make 2ⁿ.
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < LOWEST { 0.0 } else { series * power }
}

struct Exponentials<'a> {
    values: &'a mut [f32],
    highest: f32,
}

impl WithSimd for Exponentials<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        for value in self.values {
            *value = exp(*value - self.highest);
        }
    }
}

/// Every value becomes `exp(value − highest)`.
pub(crate) fn exponentials(values: &mut [f32], highest: f32) {
    Arch::new().dispatch(Exponentials { values, highest });
}

struct Sigmoids<'a> {
    out: &'a mut [f32],
    values: &'a [f32],
}

impl WithSimd for Sigmoids<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        for (out, value) in self.out.iter_mut().zip(self.values) {
            *out = 1.0 / (1.0 + exp(-*value));
        }
    }
}

/// `out = 1 / (1 + exp(−value))`.
pub(super) fn sigmoids(out: &mut [f32], values: &[f32]) {
    Arch::new().dispatch(Sigmoids { out, values });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_exact_as_f32_allows() {
        let arguments: Vec<f32> = (-8700..=8800_i16).map(|i| f32::from(i) / 100.0).collect();
        let mut found = arguments.clone();
        exponentials(&mut found, 0.0);
        for (x, found) in arguments.iter().zip(found) {
            let expected = f64::from(*x).exp();
            let error = (f64::from(found) - expected).abs() / expected;
            assert!(error < 3e-7, "{x}: {found} {expected}");
        }
    }

    #[test]
    fn ends_of_the_range() {
        let mut values = [f32::NEG_INFINITY, -1000.0, 0.0, f32::NAN];
        exponentials(&mut values, 0.0);
        assert_eq!(values[..3], [0.0, 0.0, 1.0]);
        assert!(values[3].is_nan());
        let mut shares = [0.0; 4];
        sigmoids(&mut shares, &[0.0, 100.0, -100.0, f32::NAN]);
        assert_eq!(shares[..2], [0.5, 1.0]);
        assert!(shares[2].abs() < 1e-30 && shares[3].is_nan());
    }
}
