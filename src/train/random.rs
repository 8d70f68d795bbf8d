//! Randomness as a function of where it is used.
//!
//! No generator lives across steps: every draw comes from a fresh one whose seed is the run's seed,
//! what the draw is for, and its place (step, layer, module). A resumed run and a layer that runs
//! again for its backward draw the same, and no state has to be saved.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// What a draw is for; [`crate::model::dropout`] has one of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Initial weights, by parameter.
    Initial = 1,
    /// The order of the windows, by epoch.
    Order = 2,
    /// Gumbel noise, by forward pass and module.
    Gumbel = 3,
}

/// The generator for one place.
pub(super) fn generator(seed: u64, what: Use, first: u64, second: u64) -> ChaCha8Rng {
    let mut bytes = [0; 32];
    for (bytes, word) in bytes.chunks_exact_mut(8).zip([seed, what as u64, first, second]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(bytes)
}

/// Passes over `draws` draws of [`uniform`] or [`gumbel_difference`] of a fresh generator.
pub(super) fn skip(random: &mut ChaCha8Rng, draws: u64) {
    // Each takes one word.
    random.set_word_pos(u128::from(draws));
}

/// Uniform in the open interval (0, 1).
pub(super) fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (f64::from(random.next_u32()) + 0.5) / (f64::from(u32::MAX) + 1.0)
}

/// The difference of two Gumbel draws, which is one logistic draw.
pub(super) fn gumbel_difference(random: &mut ChaCha8Rng) -> f32 {
    let share = uniform(random);
    libm::log(share / (1.0 - share)) as f32
}

/// The numbers `0..count` in random order.
pub(super) fn permutation(random: &mut ChaCha8Rng, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        // A window count is far under 2^32, so that the bias of the remainder is nil.
        order.swap(last, (random.next_u64() % (last as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_apart_and_repeatable() {
        let draw = |what, first, second| generator(7, what, first, second).next_u64();
        assert_eq!(draw(Use::Gumbel, 1, 2), draw(Use::Gumbel, 1, 2));
        assert_ne!(draw(Use::Gumbel, 1, 2), draw(Use::Gumbel, 2, 1));
        assert_ne!(draw(Use::Gumbel, 1, 2), draw(Use::Order, 1, 2));
    }

    #[test]
    fn draws_can_be_passed_over() {
        let mut whole = generator(7, Use::Gumbel, 1, 2);
        let draws: Vec<f32> = (0..100).map(|_| gumbel_difference(&mut whole)).collect();
        for first in [0, 1, 15, 16, 63, 64, 90] {
            let mut random = generator(7, Use::Gumbel, 1, 2);
            skip(&mut random, first as u64);
            assert_eq!(gumbel_difference(&mut random).to_bits(), draws[first].to_bits());
        }
    }

    /// The variance of the logistic distribution is π²/3, its mean 0.
    #[test]
    fn the_noise_is_logistic() {
        let mut random = generator(0, Use::Gumbel, 0, 0);
        let draws: Vec<f64> =
            (0..20_000).map(|_| f64::from(gumbel_difference(&mut random))).collect();
        let mean = draws.iter().sum::<f64>() / 20_000.0;
        let variance = draws.iter().map(|draw| draw * draw).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.05, "{mean}");
        assert!((variance - std::f64::consts::PI.powi(2) / 3.0).abs() < 0.1, "{variance}");
    }

    #[test]
    fn a_permutation_has_every_number_once() {
        let mut order = permutation(&mut generator(1, Use::Order, 0, 0), 100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
