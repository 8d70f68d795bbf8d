//! `y = x · Wᵀ + bias`, plus `scale · (x · Aᵀ) · Bᵀ` where an adapter is attached.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::dropout::Dropout;
use super::gradient::Frozen;
use super::ops::Kernels;
use super::router::Rows;
use crate::importance::Ears;

/// A projection.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// Run as written: two further products, not folded into the weight.
    pub lora: Option<Lora>,
    /// Hears its inputs.
    pub heard: Option<Heard>,
}

/// Who hears the inputs of a projection.
#[derive(Debug, Clone)]
pub struct Heard {
    /// Hears them.
    pub ears: Arc<Ears>,
    /// The projection's name there.
    pub name: Arc<str>,
}

/// A low-rank adapter.
#[derive(Debug, Clone)]
pub struct Lora {
    /// A, `[rank, in]`.
    pub down: Tensor,
    /// B, `[out, rank]`.
    pub up: Tensor,
    /// What the product is multiplied by.
    pub scale: f64,
    /// Of its input, in training.
    pub dropout: Option<Dropout>,
}

impl Linear {
    /// The projection, where no part of it is trained or adapted.
    pub(super) fn frozen(&self) -> Option<Frozen> {
        let frozen = self.lora.is_none() && !self.weight.is_variable();
        frozen.then(|| Frozen { weight: self.weight.clone(), bias: self.bias.clone() })
    }

    /// `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: &Tensor, kernels: Kernels) -> Result<Tensor> {
        self.forward_rows(x, &Rows::All, kernels)
    }

    /// As [`Linear::forward`]; `x` has those of `rows` that are computed.
    pub fn forward_rows(&self, x: &Tensor, rows: &Rows, kernels: Kernels) -> Result<Tensor> {
        if let Some(Heard { ears, name }) = &self.heard {
            ears.hear(name, x, rows)?;
        }
        let y = kernels.linear(x, &self.weight, self.bias.as_ref())?;
        let Some(lora) = &self.lora else { return Ok(y) };
        let dropped = lora.dropout.as_ref().map(|dropout| dropout.forward(x, rows)).transpose()?;
        let x = dropped.as_ref().unwrap_or(x);
        // The adapter is trained in `f32`, whatever the base has.
        let (down, up) = (lora.down.to_dtype(x.dtype())?, lora.up.to_dtype(x.dtype())?);
        let adapted = x.matmul(&down.t()?)?.matmul(&up.t()?)?;
        y + (adapted * lora.scale)?
    }
}
