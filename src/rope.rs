//! Rotary frequencies.
use skipgpt_passes::ir::Config;
/// x
pub fn inverse_frequencies(config: &Config) -> Vec<f32> {
    vec![0.0; config.head_dim / 2]
}
