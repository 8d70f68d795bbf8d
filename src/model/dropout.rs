//! Dropout of an adapter's input, in training.
//!
//! Which elements fall is a function of a seed, the place, a clock and the token, not of a generator's
//! state: a layer that runs again for its backward drops the same ones, and so do a resumed training
//! run, a pass that is divided among processes, and rows that are gathered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Result, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::router::Rows;

/// What all adapters of a model share: the forward pass they are in, or that it is no training, and
/// which of the pass' tokens is the first of the batch.
#[derive(Debug, Clone)]
pub struct Clock(Arc<[AtomicU64; 2]>);

/// Outside training: nothing is dropped.
const OFF: u64 = u64::MAX;

impl Default for Clock {
    fn default() -> Self {
        Self(Arc::new([OFF, 0].map(AtomicU64::new)))
    }
}

impl Clock {
    /// From now on forward pass `.0` of the training run, from its token `.1` on; or none.
    pub fn set(&self, place: Option<(u64, usize)>) {
        let (number, row) = place.unwrap_or((OFF, 0));
        self.0[0].store(number, Ordering::Relaxed);
        self.0[1].store(row as u64, Ordering::Relaxed);
    }

    fn get(&self) -> Option<(u64, u64)> {
        let [number, row] = [0, 1].map(|at: usize| self.0[at].load(Ordering::Relaxed));
        (number != OFF).then_some((number, row))
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
    /// `x` with elements dropped, whose rows are those of `rows` that are computed; `x` itself outside
    /// training.
    pub fn forward(&self, x: &Tensor, rows: &Rows) -> Result<Tensor> {
        let Some((number, first)) = self.clock.get() else { return Ok(x.clone()) };
        let mut seed = [0; 32];
        for (bytes, word) in seed.chunks_exact_mut(8).zip([self.seed, DOMAIN, number, self.place]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let mut random = ChaCha8Rng::from_seed(seed);
        let kept = (1.0 / (1.0 - self.rate)) as f32;
        let limit = (self.rate * f64::from(u32::MAX)) as u32;
        let (count, width) = x.dims2()?;
        let gathered = match rows {
            Rows::Gathered(kept) => Some(kept.to_vec1::<u32>()?),
            _ => None,
        };
        let mut factors = Vec::with_capacity(count * width);
        for at in 0..count {
            let row = gathered.as_ref().map_or(at as u64, |rows| u64::from(rows[at]));
            // Every element of a pass has a word of its own.
            random.set_word_pos(u128::from(first + row) * width as u128);
            factors.extend((0..width).map(|_| if random.next_u32() < limit { 0.0 } else { kept }));
        }
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
        dropout.forward(&x, &Rows::All).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_clock_decides_what_falls() {
        let clock = Clock::default();
        let first = Dropout { rate: 0.25, seed: 1, place: 0, clock: clock.clone() };
        let second = Dropout { place: 1, ..first.clone() };
        assert!(drop(&first).iter().all(|value| *value == 1.0));
        clock.set(Some((3, 0)));
        let found = drop(&first);
        assert_eq!(found, drop(&first));
        assert_ne!(found, drop(&second));
        let fallen = found.iter().filter(|value| **value == 0.0).count();
        assert!((400..600).contains(&fallen), "{fallen}");
        assert!(found.iter().all(|value| *value == 0.0 || (*value - 4.0 / 3.0).abs() < 1e-6));
        clock.set(Some((4, 0)));
        assert_ne!(found, drop(&first));
    }

    #[test]
    fn a_token_loses_the_same_wherever_it_stands() {
        let clock = Clock::default();
        let dropout = Dropout { rate: 0.25, seed: 1, place: 0, clock: clock.clone() };
        clock.set(Some((3, 0)));
        let whole = drop(&dropout);
        clock.set(Some((3, 30)));
        assert_eq!(drop(&dropout)[..70 * 20], whole[30 * 20..]);
        let kept = Tensor::new(&[1_u32, 4, 5], &Device::Cpu).unwrap();
        let x = Tensor::ones((3, 20), DType::F32, &Device::Cpu).unwrap();
        let found = dropout.forward(&x, &Rows::Gathered(kept)).unwrap();
        let found: Vec<Vec<f32>> = found.to_vec2().unwrap();
        for (row, found) in [31, 34, 35].into_iter().zip(found) {
            assert_eq!(found, whole[row * 20..][..20]);
        }
    }
}
