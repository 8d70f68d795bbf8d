//! `x + keep · down(silu(gate(norm(x))) · up(norm(x)))`.

use candle_core::{Result, Tensor};

use super::gradient::{self, Frozen};
use super::linear::Linear;
use super::norm::Norm;
use super::ops::Kernels;
use super::router::{Routing, Rows};

/// The feed-forward network.
#[derive(Debug, Clone)]
pub struct Mlp {
    /// Over the residual stream.
    pub norm: Norm,
    /// Its input projections.
    pub gate_up: GateUp,
    /// Back to the residual stream.
    pub down: Linear,
    /// Which tokens it runs for.
    pub routing: Routing,
}

/// The input projections, as the IR has them.
#[derive(Debug, Clone)]
pub enum GateUp {
    /// Two projections.
    Separate {
        /// Passes through `silu`.
        gate: Linear,
        /// Multiplies it.
        up: Linear,
    },
    /// One projection, gate above up.
    Fused(Linear),
}

impl Mlp {
    /// The residual stream `[rows, hidden]` after the module.
    pub fn forward(&self, x: &Tensor, rows: &Rows, kernels: Kernels) -> Result<Tensor> {
        if matches!(rows, Rows::None) {
            return Ok(x.clone());
        }
        if let (Rows::Sampled(keep), Some(frozen), Kernels::Differentiable) =
            (rows, self.frozen(), kernels)
        {
            return gradient::sampled_mlp([x, keep], (&self.norm.scale, self.norm.eps), frozen);
        }
        let normed = self.norm.forward(&rows.gather(x)?, kernels)?;
        let (gate, up) = match &self.gate_up {
            GateUp::Separate { gate, up } => (
                gate.forward_rows(&normed, rows, kernels)?,
                up.forward_rows(&normed, rows, kernels)?,
            ),
            GateUp::Fused(both) => halves(&both.forward_rows(&normed, rows, kernels)?)?,
        };
        let inner = kernels.swiglu(&gate, &up)?;
        rows.add(x, &self.down.forward_rows(&inner, rows, kernels)?)
    }

    /// Gate, up and down, where nothing of them is trained or adapted.
    fn frozen(&self) -> Option<[Frozen; 3]> {
        let GateUp::Separate { gate, up } = &self.gate_up else { return None };
        Some([gate.frozen()?, up.frozen()?, self.down.frozen()?])
    }
}

/// The left and the right half of the columns.
pub(super) fn halves(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let half = x.dim(1)? / 2;
    Ok((x.narrow(1, 0, half)?, x.narrow(1, half, half)?))
}
