//! Rotary position embedding: the frequencies every back end shares.
//!
//! Hugging Face computes them in `f32`, one operation after the other, and a checkpoint is trained
//! with the rounded values. Each step here rounds where theirs does; the one transcendental
//! function, the power, is taken in `f64` by the `libm` crate and rounded once, so that the table is
//! the same on any machine and within one unit in the last place of theirs (their power is only that
//! exact).

use skipgpt_passes::ir::{Config, Rope, RopeScaling};

/// The angle per position of each pair `(i, i + head_dim / 2)`, in radians: `[head_dim / 2]`.
pub fn inverse_frequencies(config: &Config) -> Vec<f32> {
    let Rope { theta, scaling } = config.rope;
    let width = config.head_dim as f32;
    (0..config.head_dim / 2)
        .map(|pair| {
            let exponent = (2 * pair) as f32 / width;
            let power = libm::pow(f64::from(theta as f32), f64::from(exponent)) as f32;
            stretch(1.0 / power, scaling)
        })
        .collect()
}

fn stretch(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let original = original_max_position_embeddings as f64;
            let wavelength = std::f64::consts::TAU as f32 / frequency;
            if wavelength > (original / low_freq_factor) as f32 {
                frequency / factor as f32
            } else if wavelength < (original / high_freq_factor) as f32 {
                frequency
            } else {
                let ramp = (original as f32 / wavelength - low_freq_factor as f32)
                    / (high_freq_factor - low_freq_factor) as f32;
                (1.0 - ramp) * frequency / factor as f32 + ramp * frequency
            }
        }
    }
}

/// Cosines and sines of `position · frequency`, one row per position: `[positions, frequencies]`
/// each. The product is taken in `f32`, as checkpoints are trained.
pub fn tables(
    frequencies: &[f32],
    positions: impl ExactSizeIterator<Item = i64>,
) -> (Vec<f32>, Vec<f32>) {
    let length = positions.len() * frequencies.len();
    let (mut cos, mut sin) = (Vec::with_capacity(length), Vec::with_capacity(length));
    for position in positions {
        for frequency in frequencies {
            let angle = position as f32 * frequency;
            cos.push(libm::cosf(angle));
            sin.push(libm::sinf(angle));
        }
    }
    (cos, sin)
}
