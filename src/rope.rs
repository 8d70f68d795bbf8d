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

#[cfg(test)]
mod tests {
    use skipgpt_passes::ir::Architecture;

    use super::*;

    fn config(head_dim: usize, theta: f64, scaling: RopeScaling) -> Config {
        Config {
            architecture: Architecture::Llama,
            hidden_size: 64,
            vocab_size: 320,
            num_attention_heads: 64 / head_dim,
            num_key_value_heads: 1,
            head_dim,
            rms_norm_eps: 1e-5,
            rope: Rope { theta, scaling },
            max_position_embeddings: 512,
            num_hidden_layers: 1,
        }
    }

    /// `expected`: bits of `LlamaRotaryEmbedding.inv_freq`, transformers 4.57.6, on a CPU.
    #[track_caller]
    fn check(config: &Config, expected: &[u32]) {
        let found: Vec<_> = inverse_frequencies(config).iter().map(|f| f.to_bits()).collect();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.abs_diff(*expected) <= 1, "{found:#x} {expected:#x}");
        }
    }

    #[test]
    fn plain() {
        let expected = [
            0x3f80_0000,
            0x3ea1_e89b,
            0x3dcc_cccd,
            0x3d01_86e3,
            0x3c23_d70a,
            0x3b4f_3e38,
            0x3a83_126f,
            0x39a5_cb60,
        ];
        check(&config(16, 10_000.0, RopeScaling::None), &expected);
        let expected = [
            0x3f80_0000,
            0x3f26_3de0,
            0x3ed7_e89b,
            0x3e8c_3504,
            0x3e36_1887,
            0x3dec_7fd6,
            0x3d99_940d,
            0x3d47_763f,
            0x3d01_86e3,
            0x3ca8_398b,
            0x3c5a_7bf2,
            0x3c0d_e12d,
            0x3bb8_449c,
            0x3b6f_520e,
            0x3b1b_690d,
            0x3ac9_d75c,
            0x3a83_126f,
            0x3a2a_3b44,
            0x39dd_1725,
            0x398f_9272,
            0x393a_7753,
            0x38f2_2ce2,
            0x389d_43a4,
            0x384c_3fbe,
            0x3804_a2b2,
            0x37ac_431d,
            0x375f_ba4f,
            0x3711_48e3,
            0x36bc_b0c1,
            0x3675_1070,
            0x361f_23e4,
            0x35ce_af79,
        ];
        check(&config(64, 1_000_000.0, RopeScaling::None), &expected);
    }

    #[test]
    fn linear() {
        let expected = [
            0x3ecc_cccd,
            0x3e8e_ea6b,
            0x3e47_763f,
            0x3e0b_30cc,
            0x3dc2_434f,
            0x3d87_9007,
            0x3d3d_3312,
            0x3d04_0778,
            0x3cb8_449b,
            0x3c80_967e,
            0x3c33_770e,
            0x3bfa_78f2,
            0x3bae_c98e,
            0x3b73_f1a2,
            0x3b2a_3b44,
            0x3aed_95e3,
            0x3aa5_cb60,
            0x3a67_6492,
            0x3a21_7916,
            0x39e1_5c92,
            0x399d_43a3,
            0x395b_7cd0,
            0x3919_2a46,
            0x38d5_c442,
            0x3895_2c42,
            0x3850_31de,
            0x3811_48e2,
            0x37ca_c4aa,
            0x378d_7f75,
            0x3745_7bab,
            0x3709_cf4a,
            0x36c0_55f1,
        ];
        check(&config(64, 100_000.0, RopeScaling::Linear { factor: 2.5 }), &expected);
    }

    #[test]
    fn llama3() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        };
        check(
            &config(16, 500_000.0, scaling),
            &[
                0x3f80_0000,
                0x3da2_9e0c,
                0x3b9a_08c8,
                0x3a6e_f74f,
                0x3939_5d21,
                0x380f_c8f8,
                0x36df_10c4,
                0x35ad_07a7,
            ],
        );
    }

    #[test]
    fn tables_hold_one_row_per_position() {
        let (cos, sin) = tables(&[1.0, 0.5], [0, 3].into_iter());
        assert_eq!((cos.len(), sin.len()), (4, 4));
        assert_eq!((cos[0], sin[1]), (1.0, 0.0));
        assert!((cos[2] - 3.0_f32.cos()).abs() < 1e-6 && (sin[3] - 1.5_f32.sin()).abs() < 1e-6);
    }
}
