//! A sampled decision, 0 or 1, with a gradient.
//!
//! With `m` the margin (keep score minus skip score) and `n` the difference of two Gumbel draws, by
//! the estimator:
//!
//! - straight through the Gumbel-softmax: forward `keep = [m + n ≥ 0]`, backward
//!   `dm = s · (1 − s) / tau · dkeep` with `s = σ((m + n) / tau)`;
//! - `ReinMax` (arXiv 2304.08612): forward `keep = [m + tau · n ≥ 0]`, which is 1 with probability
//!   `p = σ(m / tau)`, backward `dm = |keep − p| / (2 · tau) · dkeep`. In expectation that is
//!   `dp / dm` times the mean of the loss's slopes at both ends, which is the loss's difference
//!   between them to the second order.
//!
//! A tie keeps.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::Estimator;
use super::values::{hold, slice, tensor};

struct Sampled {
    /// `[rows]`.
    noise: Tensor,
    estimator: Estimator,
}

/// Margins `[rows]` to keep `[rows, 1]`, 0 or 1.
pub(super) fn sampled(margins: &Tensor, noise: &Tensor, estimator: Estimator) -> Result<Tensor> {
    margins.contiguous()?.apply_op1(Sampled { noise: noise.detach(), estimator })
}

impl CustomOp1 for Sampled {
    fn name(&self) -> &'static str {
        "sampled-keep"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let noise = hold(&self.noise)?;
        let pairs = slice(storage, layout)?.iter().zip(&*noise);
        let keep: Vec<f32> =
            pairs.map(|(margin, noise)| self.estimator.keep(*margin, *noise)).collect();
        let rows = keep.len();
        Ok((CpuStorage::F32(keep), (rows, 1).into()))
    }

    fn bwd(&self, margins: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let (values, noise, gradient) = (hold(margins)?, hold(&self.noise)?, hold(&gradient)?);
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let slope = |margin: f32, noise: f32| match self.estimator {
            Estimator::StraightThrough { tau } => {
                let soft = sigmoid((margin + noise) / tau as f32);
                soft * (1.0 - soft) / tau as f32
            }
            Estimator::ReinMax { tau } => {
                let share = sigmoid(margin / tau as f32);
                (self.estimator.keep(margin, noise) - share).abs() / (2.0 * tau as f32)
            }
        };
        let pairs = values.iter().zip(&*noise).zip(&*gradient);
        let d = pairs.map(|((margin, noise), gradient)| slope(*margin, *noise) * gradient);
        Ok(Some(tensor(d.collect(), margins.shape())?))
    }
}
