//! The table of divisors in `rope_freqs.weight`, as the Llama 3 parameters that made it.
//!
//! A GGUF file does not state Llama 3's rope parameters; it stores what they come to, one divisor
//! per frequency. With wavelength `λ = 2π·theta^(2i/head_dim)`, context `C` of the original
//! training and factors `low < high`:
//!
//! ```text
//! divisor = 1                       where λ < C/high
//!           factor                  where λ > C/low
//!           1 / ((1-s)/factor + s)  between, s = (C/λ - low) / (high - low)
//! ```
//!
//! The parameters are searched for and the table is computed again from them: it is accepted only
//! where every divisor comes out the same.

use std::f64::consts::TAU;

use skipgpt_passes::ir::RopeScaling;

use super::metadata::decimal;

/// Llama 3.1's, 3.2's and 3.3's; no other pair is known to be in use.
const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
/// Relative: the stored divisors are `f32` sums of a few operations.
const TOLERANCE: f64 = 1e-4;

/// The scaling whose divisors `table` holds, `[head_dim / 2]`, or `None` where no Llama 3
/// parameters reproduce it.
pub fn recognise(table: &[f32], theta: f64) -> Option<RopeScaling> {
    let largest = table.iter().copied().fold(f32::MIN, f32::max);
    let factor = decimal(largest);
    if table.iter().all(|divisor| (divisor - 1.0).abs() < f32::EPSILON) {
        return Some(RopeScaling::None);
    }
    // 8192 first: it is what every released model states, and several can fit a short table.
    let contexts = std::iter::once(8192).chain((6..=20).map(|bits| 1_usize << bits));
    contexts
        .map(|original_max_position_embeddings| RopeScaling::Llama3 {
            factor,
            low_freq_factor: LOW,
            high_freq_factor: HIGH,
            original_max_position_embeddings,
        })
        .find(|scaling| {
            divisors(*scaling, theta, table.len())
                .zip(table)
                .all(|(ours, theirs)| (ours / f64::from(*theirs) - 1.0).abs() < TOLERANCE)
        })
}

/// The divisors of `scaling`, one per pair of a head of width `2 * pairs`.
fn divisors(scaling: RopeScaling, theta: f64, pairs: usize) -> impl Iterator<Item = f64> {
    (0..pairs).map(move |i| match scaling {
        RopeScaling::None => 1.0,
        RopeScaling::Linear { factor } => factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: context,
        } => {
            // How often a frequency turned within the original context.
            let turns = context as f64 / (TAU * theta.powf(i as f64 / pairs as f64));
            let share = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            1.0 / ((1.0 - share) / factor + share)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(factor: f64, context: usize, theta: f64, pairs: usize) -> Vec<f32> {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: LOW,
            high_freq_factor: HIGH,
            original_max_position_embeddings: context,
        };
        divisors(scaling, theta, pairs).map(|x| x as f32).collect()
    }

    /// Llama 3.2 1B's table as its parameters give it, computed apart from this file (Python,
    /// `f64`): pairs 0, 14 to 18 and 31 of 32.
    #[test]
    fn the_divisors_are_llama_3s() {
        let ours = table(32.0, 8192, 500_000.0, 32);
        let known = [
            (0, 1.0),
            (14, 1.0),
            (15, 1.651_329_2),
            (16, 3.292_262),
            (17, 9.666_729),
            (18, 32.0),
            (31, 32.0),
        ];
        for (pair, expected) in known {
            assert!((ours[pair] - expected).abs() < 1e-4 * expected, "{pair}: {}", ours[pair]);
        }
    }

    #[test]
    fn a_llama_3_table_names_its_parameters() {
        for (factor, context) in [(8.0, 8192), (32.0, 8192), (16.0, 4096)] {
            let found = recognise(&table(factor, context, 500_000.0, 64), 500_000.0);
            let Some(RopeScaling::Llama3 {
                factor: f, original_max_position_embeddings: c, ..
            }) = found
            else {
                panic!("{found:?}")
            };
            assert_eq!((f, c), (factor, context));
        }
    }

    #[test]
    fn a_table_of_ones_scales_nothing() {
        assert_eq!(recognise(&[1.0; 32], 10_000.0), Some(RopeScaling::None));
    }

    #[test]
    fn another_table_is_not_recognised() {
        let mut other = table(8.0, 8192, 500_000.0, 64);
        other[40] *= 1.01;
        assert_eq!(recognise(&other, 500_000.0), None);
    }
}
