//! `RMSNorm`.

use candle_core::{Result, Tensor};

use super::ops::Kernels;

/// `x / √(mean(x²) + eps) · scale`.
#[derive(Debug, Clone)]
pub struct Norm {
    /// `[width]`.
    pub scale: Tensor,
    /// Added to the mean square.
    pub eps: f64,
}

impl Norm {
    /// Normalises the last dimension of `x`.
    pub fn forward(&self, x: &Tensor, kernels: Kernels) -> Result<Tensor> {
        kernels.rms_norm(x, &self.scale, self.eps)
    }
}
