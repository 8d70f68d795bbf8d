//! One block: from its values to a scale and a zero point, and to codes.
//!
//! A block of values `v` has a scale `s` and a zero point `z`; its codes are `round(v / s) + z`, cut
//! to the codes there are, and stand for `(code − z) · s`.
//!
//! Sums run over [`LANES`] partial sums, always in the same order, whatever the processor's vectors.

use skipgpt_passes::ir::DType;
use skipgpt_passes::quantization::{Bits, Method, Scheme};

/// Partial sums of every sum; divides every block length.
const LANES: usize = 16;

/// A block's scale and zero point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Fit {
    /// Negative where that makes the block's extreme exact; 0 for a block of zeros.
    pub(super) scale: f32,
    /// A code.
    pub(super) zero: f32,
}

/// The fit of a block by the scheme's method, its scale rounded to `dtype`. A search weighs errors by the
/// importance of their inputs, where that is given: of the block's first ones, the rest being padding.
pub(super) fn fit(
    values: &[f32],
    importance: Option<&[f32]>,
    scheme: &Scheme,
    dtype: DType,
) -> Fit {
    let fit = match (scheme.method, scheme.symmetric) {
        (Method::Nearest, true) => symmetric(extreme(values), scheme.bits, 0.0),
        (Method::Nearest, false) => asymmetric(range(values), scheme.bits, 0.0),
        (Method::Search, _) => search(values, importance, scheme),
    };
    Fit { scale: rounded(fit.scale, dtype), ..fit }
}

fn rounded(scale: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => scale,
        DType::F16 => half::f16::from_f32(scale).to_f32(),
        DType::BF16 => half::bf16::from_f32(scale).to_f32(),
    }
}

/// 1 / scale; 0 where that is no number, which gives every element the zero point's code.
fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The codes of a block.
pub(super) fn encode(values: &[f32], fit: Fit, bits: Bits, codes: &mut [f32]) {
    let (inverse, highest) = (inverse(fit.scale), f32::from(bits.highest()));
    for (code, value) in codes.iter_mut().zip(values) {
        *code = code_of(value * inverse + fit.zero, highest);
    }
}

/// The code nearest to `x`, ties to even: adding 1.5 · 2²³ leaves no bit for a fraction. Unlike
/// [`f32::round_ties_even`] and [`f32::clamp`], vectors can do all of it.
#[inline]
fn code_of(x: f32, highest: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    let x = if x > 0.0 { x } else { 0.0 };
    let x = if x < highest { x } else { highest };
    (x + SHIFT) - SHIFT
}

/// The element farthest from 0, with its sign.
fn extreme(values: &[f32]) -> f32 {
    let (low, high) = range(values);
    if -low > high { low } else { high }
}

/// The lowest and the highest element, 0 included.
fn range(values: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for lane in values.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            low[i] = if lane[i] < low[i] { lane[i] } else { low[i] };
            high[i] = if lane[i] > high[i] { lane[i] } else { high[i] };
        }
    }
    (low.into_iter().fold(0.0, f32::min), high.into_iter().fold(0.0, f32::max))
}

/// The scale that gives the extreme the lowest code, of which there is one more on that side,
/// `stretch` codes wider.
fn symmetric(extreme: f32, bits: Bits, stretch: f32) -> Fit {
    let middle = f32::from(bits.middle());
    Fit { scale: -extreme / (middle + stretch), zero: middle }
}

/// The scale that spreads the codes over the range, `stretch` codes wider, and the zero point next
/// to where 0 falls.
fn asymmetric((low, high): (f32, f32), bits: Bits, stretch: f32) -> Fit {
    let highest = f32::from(bits.highest());
    let scale = (high - low) / (highest + stretch);
    // Where the range is narrowed, it is narrowed on both sides.
    let zero = code_of(-low * inverse(scale) - stretch / 2.0, highest);
    Fit { scale, zero }
}

/// The best of several fits by weighted squared error.
///
/// For given codes, with `d = code − z`, the error `Σ w·(v − s·d)²` is least at
/// `s = Σ w·v·d / Σ w·d²`, where it is `Σ w·v² − (Σ w·v·d)² / Σ w·d²`: so the codes with the largest
/// `(Σ w·v·d)² / Σ w·d²` are looked for, and no candidate's error need be summed.
///
/// The block is first brought to numbers around 1, by a power of two, so that no square under- or
/// overflows.
fn search(values: &[f32], importance: Option<&[f32]>, scheme: &Scheme) -> Fit {
    let bits = scheme.bits;
    let power = power_of_two(extreme(values));
    let mut near_one = [0.0; 256];
    for (near_one, value) in near_one.iter_mut().zip(values) {
        *near_one = value / power;
    }
    let values = &near_one[..values.len()];
    let block = Weighted::new(values, importance);
    let mut best = Best { block: &block, bits, fit: Fit { scale: 0.0, zero: 0.0 }, gain: -1.0 };
    if scheme.symmetric {
        let extreme = extreme(values);
        for stretch in STRETCHES {
            // The extreme at the lowest code, and at the highest, which is one nearer to zero.
            best.offer(symmetric(extreme, bits, stretch));
            best.offer(symmetric(-extreme, bits, stretch - 1.0));
        }
    } else {
        let range = range(values);
        for stretch in STRETCHES {
            best.offer(asymmetric(range, bits, 2.0 * stretch));
        }
        let Fit { scale, zero } = best.fit;
        for zero in [zero - 1.0, zero + 1.0] {
            if (0.0..=f32::from(bits.highest())).contains(&zero) {
                best.offer(Fit { scale, zero });
            }
        }
    }
    // Codes that are nearest for the fitted scale may fit it better still.
    for _ in 0..REFITS {
        best.offer(best.fit);
    }
    Fit { scale: best.fit.scale * power, ..best.fit }
}

/// The power of two at or under the magnitude of a normal number; the nearest one there is, for others.
fn power_of_two(value: f32) -> f32 {
    const EXPONENT: u32 = 0x7f80_0000;
    f32::from_bits((value.to_bits() & EXPONENT).clamp(1 << 23, EXPONENT - (1 << 23)))
}

/// How much wider than the block's range the codes' is made, in codes on each side.
const STRETCHES: [f32; 9] = [-1.6, -1.3, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5];
/// How often codes and scale are fitted to each other at the end.
const REFITS: usize = 2;

/// A block's values, and each one's weight in the error.
struct Weighted<'a> {
    values: &'a [f32],
    weights: [f32; 256],
    /// Weight times value.
    products: [f32; 256],
}

impl<'a> Weighted<'a> {
    fn new(values: &'a [f32], importance: Option<&[f32]>) -> Self {
        let (mut weights, mut products) = ([0.0; 256], [0.0; 256]);
        let square = sum(values.as_chunks().0, |v| v.map(|v| v * v));
        let mean = (square / values.len() as f32).sqrt();
        let both = weights.iter_mut().zip(&mut products);
        for (value, (weight, product)) in values.iter().zip(both) {
            *weight = mean + value.abs();
            *product = *weight * value;
        }
        let both = weights.iter_mut().zip(&mut products).take(values.len());
        for ((weight, product), importance) in both.zip(importance.unwrap_or_default()) {
            *weight *= importance;
            *product *= importance;
        }
        Self { values, weights, products }
    }

    /// `Σ w·v·d` and `Σ w·d²` of the codes that `fit` gives.
    fn sums(&self, Fit { scale, zero }: Fit, bits: Bits) -> (f32, f32) {
        let (inverse, highest) = (inverse(scale), f32::from(bits.highest()));
        let (mut value, mut square) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        let lanes = self.values.as_chunks::<LANES>().0.iter();
        let weights = self.weights.as_chunks::<LANES>().0.iter();
        let products = self.products.as_chunks::<LANES>().0.iter();
        for ((v, w), p) in lanes.zip(weights).zip(products) {
            for i in 0..LANES {
                let d = code_of(v[i] * inverse + zero, highest) - zero;
                value[i] += p[i] * d;
                square[i] += w[i] * d * d;
            }
        }
        (value.iter().sum(), square.iter().sum())
    }
}

fn sum(lanes: &[[f32; LANES]], of: impl Fn([f32; LANES]) -> [f32; LANES]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    for lane in lanes {
        let lane = of(*lane);
        for i in 0..LANES {
            sums[i] += lane[i];
        }
    }
    sums.iter().sum()
}

/// The best fit so far.
struct Best<'a> {
    block: &'a Weighted<'a>,
    bits: Bits,
    fit: Fit,
    gain: f32,
}

impl Best<'_> {
    /// Takes `fit`, its scale fitted to its codes, if it is better.
    fn offer(&mut self, fit: Fit) {
        let (value, square) = self.block.sums(fit, self.bits);
        let gain = if square > 0.0 { value * value / square } else { 0.0 };
        if gain > self.gain {
            let scale = if square > 0.0 { value / square } else { 0.0 };
            (self.fit, self.gain) = (Fit { scale, zero: fit.zero }, gain);
        }
    }
}
