//! `y = x · Wᵀ + bias`, plus `scale · (x · Aᵀ) · Bᵀ` where an adapter is attached.

use candle_core::{Result, Tensor};

/// A projection.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// Run as written: two further products, not folded into the weight.
    pub lora: Option<Lora>,
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
}

impl Linear {
    /// `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = x.matmul(&self.weight.t()?)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(lora) = &self.lora {
            let adapted = x.matmul(&lora.down.t()?)?.matmul(&lora.up.t()?)?;
            y = (y + (adapted * lora.scale)?)?;
        }
        Ok(y)
    }
}
