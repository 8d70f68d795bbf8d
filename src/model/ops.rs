//! The operations with two forms: fused, which are fast and have no backward, and composed of
//! elementary ones, through which gradients flow.
//!
//! Everything else in the reference is written with operations that have both.

use candle_core::{D, DType, Result, Tensor};

use super::gradient;

/// Which form is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernels {
    /// For inference.
    #[default]
    Fused,
    /// For training.
    Differentiable,
    /// For training on a device, or in another precision than `f32`.
    Device,
}

impl Kernels {
    /// `x / √(mean(x²) + eps) · scale` over the last dimension; `x` `[…, width]`, `scale` `[width]`.
    pub fn rms_norm(self, x: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
        match self {
            Self::Fused => candle_nn::ops::rms_norm(&x.contiguous()?, scale, eps as f32),
            Self::Differentiable if gradient::takes(x) => gradient::rms_norm(x, scale, eps),
            Self::Differentiable => candle_nn::ops::rms_norm_slow(x, scale, eps as f32),
            Self::Device => gradient::device::rms_norm(x, scale, eps),
        }
    }

    /// `x · Wᵀ + bias`; `x` `[rows, in]`, `weight` `[out, in]`, `bias` `[out]`. Gradients reach the
    /// weight and the bias where the weight is a variable.
    pub fn linear(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if self == Self::Differentiable && !weight.is_variable() && gradient::takes(x) {
            return gradient::frozen_linear(x, weight, bias);
        }
        if self == Self::Device && !weight.is_variable() {
            return gradient::device::frozen_linear(x, weight, bias);
        }
        let y = x.matmul(&weight.t()?)?;
        match bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// `silu(gate) · up`.
    pub fn swiglu(self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        match self {
            Self::Differentiable if gradient::takes(gate) => gradient::swiglu(gate, up),
            _ => gate.silu()? * up,
        }
    }

    /// Softmax over the last dimension, in `f32` whatever the dtype.
    pub fn softmax(self, scores: &Tensor) -> Result<Tensor> {
        let dtype = scores.dtype();
        let scores = scores.to_dtype(DType::F32)?;
        let shares = match self {
            Self::Fused => candle_nn::ops::softmax_last_dim(&scores.contiguous()?)?,
            Self::Differentiable | Self::Device => candle_nn::ops::softmax(&scores, D::Minus1)?,
        };
        shares.to_dtype(dtype)
    }

    /// Turns the pairs `(i, i + head_dim / 2)` of `x` `[batch, heads, sequence, head_dim]`; `cos` and
    /// `sin` are `[batch, sequence, head_dim / 2]`.
    pub fn rope(self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        match self {
            Self::Fused => candle_nn::rotary_emb::rope(&x.contiguous()?, cos, sin),
            Self::Differentiable | Self::Device => {
                let half = x.dim(D::Minus1)? / 2;
                let (first, second) =
                    (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
                let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
                let turned = [
                    (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?,
                    (first.broadcast_mul(&sin)? + second.broadcast_mul(&cos)?)?,
                ];
                Tensor::cat(&turned, D::Minus1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use candle_core::Device;

    use super::*;

    fn close(a: &Tensor, b: &Tensor) {
        let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() < 1e-5, "{a} {b}");
    }

    #[test]
    fn both_forms_agree() {
        let device = &Device::Cpu;
        let x = Tensor::randn(0.0_f32, 1.0, (2, 3, 5, 8), device).unwrap();
        let scale = Tensor::randn(1.0_f32, 0.1, 8, device).unwrap();
        let angle = Tensor::randn(0.0_f32, 3.0, (2, 5, 4), device).unwrap();
        let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
        let (fast, slow) = (Kernels::Fused, Kernels::Differentiable);
        close(&fast.rms_norm(&x, &scale, 1e-5).unwrap(), &slow.rms_norm(&x, &scale, 1e-5).unwrap());
        close(&fast.softmax(&x).unwrap(), &slow.softmax(&x).unwrap());
        close(&fast.rope(&x, &cos, &sin).unwrap(), &slow.rope(&x, &cos, &sin).unwrap());
    }

    #[test]
    fn gradients_flow_through_the_differentiable_form() {
        let device = &Device::Cpu;
        let x = candle_core::Var::randn(0.0_f32, 1.0, (1, 2, 3, 4), device).unwrap();
        let scale = Tensor::ones(4, DType::F32, device).unwrap();
        let angle = Tensor::randn(0.0_f32, 3.0, (1, 3, 2), device).unwrap();
        let slow = Kernels::Differentiable;
        let y = slow.rms_norm(&x, &scale, 1e-5).unwrap();
        let y = slow.rope(&y, &angle.cos().unwrap(), &angle.sin().unwrap()).unwrap();
        let y = slow.softmax(&y).unwrap().sqr().unwrap().sum_all().unwrap();
        let gradient = y.backward().unwrap().get(&x).unwrap().abs().unwrap().max_all().unwrap();
        assert!(gradient.to_scalar::<f32>().unwrap() > 0.0);
    }
}
