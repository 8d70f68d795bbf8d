//! Dropout of an adapter's input, in training.
//!
//! Which elements fall is a function of a seed, the place and a clock, not of a generator's state: a
//! layer that runs again for its backward drops the same ones, and so does a resumed training run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Result, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// What all adapters of a model share: the forward pass they are in, or that it is no training.
#[derive(Debug, Clone)]
pub struct Clock(Arc<AtomicU64>);

/// Outside training: nothing is dropped.
const OFF: u64 = u64::MAX;

impl Default for Clock {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(OFF)))
    }
}

impl Clock {
    /// From now on forward pass `number` of the training run, or none.
    pub fn set(&self, number: Option<u64>) {
        self.0.store(number.unwrap_or(OFF), Ordering::Relaxed);
    }

    fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|number| *number != OFF)
    }
}

/// Sets elements to zero with probability `rate` and scales the others by `1 / (1 − rate)`.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// In `0..1`.
    pub rate: f64,
    /// Of the training run.
    pub seed: u64,
    /// Tells the adapters of a model apart.
    pub place: u64,
    /// Shared by them.
    pub clock: Clock,
}

impl Dropout {
    /// `x` with elements dropped; `x` itself outside training.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Some(number) = self.clock.get() else { return Ok(x.clone()) };
        let mut seed = [0; 32];
        for (bytes, word) in seed.chunks_exact_mut(8).zip([self.seed, DOMAIN, number, self.place]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let mut random = ChaCha8Rng::from_seed(seed);
        let kept = (1.0 / (1.0 - self.rate)) as f32;
        let limit = (self.rate * f64::from(u32::MAX)) as u32;
        let factors = (0..x.elem_count())
            .map(|_| if random.next_u32() < limit { 0.0 } else { kept })
            .collect::<Vec<f32>>();
        x * Tensor::from_vec(factors, x.shape(), x.device())?
    }
}

/// Keeps this use of the seed apart from the others'.
const DOMAIN: u64 = 4;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    #![allow(clippy::float_cmp, reason = "these values are exact")]

    use candle_core::{DType, Device};

    use super::*;

    fn drop(dropout: &Dropout) -> Vec<f32> {
        let x = Tensor::ones((100, 20), DType::F32, &Device::Cpu).unwrap();
        dropout.forward(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_clock_decides_what_falls() {
        let clock = Clock::default();
        let first = Dropout { rate: 0.25, seed: 1, place: 0, clock: clock.clone() };
        let second = Dropout { place: 1, ..first.clone() };
        assert!(drop(&first).iter().all(|value| *value == 1.0));
        clock.set(Some(3));
        let found = drop(&first);
        assert_eq!(found, drop(&first));
        assert_ne!(found, drop(&second));
        let fallen = found.iter().filter(|value| **value == 0.0).count();
        assert!((400..600).contains(&fallen), "{fallen}");
        assert!(found.iter().all(|value| *value == 0.0 || (*value - 4.0 / 3.0).abs() < 1e-6));
        clock.set(Some(4));
        assert_ne!(found, drop(&first));
    }
}
