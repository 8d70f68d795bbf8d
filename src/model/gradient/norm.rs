//! `y = x / √(mean(x²) + eps) · scale` with `scale` frozen.
//!
//! With `r = 1 / √(mean(x²) + eps)` and `h = scale · dy`: `dx = r · h − r³ · x · mean(x · h)`.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::values::{hold, live, matrix, slice, tensor};

struct RmsNorm {
    /// `[width]`.
    scale: Tensor,
    eps: f32,
}

/// Normalises the last dimension of `x`; `scale` gets no gradient.
pub(crate) fn rms_norm(x: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    x.contiguous()?.apply_op1(RmsNorm { scale: scale.detach(), eps: eps as f32 })
}

/// One row: `y = x / √(mean(x²) + eps) · scale`.
pub(super) fn forward_row(y: &mut [f32], x: &[f32], scale: &[f32], eps: f32) {
    let inverse = inverse(x, eps);
    for ((y, x), scale) in y.iter_mut().zip(x).zip(scale) {
        *y = x * inverse * scale;
    }
}

/// One row: `d`, the gradient of `y`, becomes that of `x`.
pub(super) fn backward_row(d: &mut [f32], x: &[f32], scale: &[f32], eps: f32) {
    let inverse = inverse(x, eps);
    let mut along = 0.0;
    for ((d, x), scale) in d.iter_mut().zip(x).zip(scale) {
        *d *= scale;
        along += *d * x;
    }
    let along = along / x.len() as f32 * inverse * inverse;
    for (d, x) in d.iter_mut().zip(x) {
        *d = inverse * (*d - x * along);
    }
}

/// `1 / √(mean(x²) + eps)`.
fn inverse(x: &[f32], eps: f32) -> f32 {
    let squares: f32 = x.iter().map(|value| value * value).sum();
    1.0 / (squares / x.len() as f32 + eps).sqrt()
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(storage, layout)?;
        let width = matrix(layout.shape()).1;
        let scale = hold(&self.scale)?;
        let mut y = vec![0.0; x.len()];
        y.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).for_each(|(y, x)| {
            forward_row(y, x, &scale, self.eps);
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let width = matrix(x.shape()).1;
        let (held, gradient, scale) = (hold(x)?, hold(&gradient)?, hold(&self.scale)?);
        let mut dx = vec![0.0; held.len()];
        dx.par_chunks_exact_mut(width)
            .zip(held.par_chunks_exact(width))
            .zip(gradient.par_chunks_exact(width))
            .filter(|(_, gradient)| live(gradient))
            .for_each(|((dx, x), gradient)| {
                dx.copy_from_slice(gradient);
                backward_row(dx, x, &scale, self.eps);
            });
        Ok(Some(tensor(dx, x.shape())?))
    }
}
