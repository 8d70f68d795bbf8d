//! The hard Gumbel-softmax of two scores, straight through.
//!
//! With `m` the margin (keep score minus skip score) and `n` the difference of two Gumbel draws:
//! forward `keep = [m + n ≥ 0]`, a tie keeps; backward that of the soft form `σ((m + n) / tau)`,
//! `dm = s · (1 − s) / tau · dkeep`.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::values::{hold, slice, tensor};

struct StraightThrough {
    /// `[rows]`.
    noise: Tensor,
    tau: f32,
}

/// Margins `[rows]` to keep `[rows, 1]`, 0 or 1.
pub(super) fn straight_through(margins: &Tensor, noise: &Tensor, tau: f64) -> Result<Tensor> {
    let op = StraightThrough { noise: noise.detach(), tau: tau as f32 };
    margins.contiguous()?.apply_op1(op)
}

impl CustomOp1 for StraightThrough {
    fn name(&self) -> &'static str {
        "straight-through"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let noise = hold(&self.noise)?;
        let pairs = slice(storage, layout)?.iter().zip(&*noise);
        let keep: Vec<f32> =
            pairs.map(|(margin, noise)| f32::from(u8::from(margin + noise >= 0.0))).collect();
        let rows = keep.len();
        Ok((CpuStorage::F32(keep), (rows, 1).into()))
    }

    fn bwd(&self, margins: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let (values, noise, gradient) = (hold(margins)?, hold(&self.noise)?, hold(&gradient)?);
        let slope = |margin: f32, noise: f32| {
            let soft = 1.0 / (1.0 + (-(margin + noise) / self.tau).exp());
            soft * (1.0 - soft) / self.tau
        };
        let pairs = values.iter().zip(&*noise).zip(&*gradient);
        let d = pairs.map(|((margin, noise), gradient)| slope(*margin, *noise) * gradient);
        Ok(Some(tensor(d.collect(), margins.shape())?))
    }
}
