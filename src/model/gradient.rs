//! Operations that training needs in another form: forward and backward of each in one piece, on
//! the CPU, in `f32`.
//!
//! Candle's own fused operations cut the graph silently, and composed of elementary ones a norm or
//! a softmax keeps half a dozen copies of its input until the backward has run. Each operation here
//! keeps its input and nothing else, and sends gradients only where something can be trained: the
//! base model is frozen, so a projection has no weight gradient.
//!
//! **Skipped rows.** Where keep is 0, the gradient that enters a module's interior is exactly zero.
//! The backward of projections and attention look for rows of zeros and leave them out, so that a
//! skipped token costs no backward; nothing is approximated. Keep's own gradient needs the module's
//! output for every token, which is why the forward computes them all.
//!
//! On a device, and in another precision than `f32`, [`device`] has the same operations.

mod add;
mod attention;
pub(crate) mod device;
pub(crate) mod exp;
mod keep;
mod known;
mod linear;
mod module;
mod norm;
mod seed;
mod swiglu;
#[cfg(test)]
mod tests;
mod values;

pub(crate) use attention::{Causal, attention};
pub(crate) use linear::frozen_linear;
pub(crate) use module::{Frozen, sampled_attention, sampled_mlp};
pub(crate) use norm::rms_norm;
pub(crate) use swiglu::swiglu;
pub(crate) use values::{hold, widened};

use candle_core::{DType, Result, Tensor};

/// Whether the operations here take `x`: `f32` in the host's memory.
pub(crate) fn takes(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && x.device().is_cpu()
}

/// `x + keep · module`; `x` and `module` `[rows, width]`, `keep` `[rows, 1]` in `f32`.
pub(crate) fn routed_add(x: &Tensor, module: &Tensor, keep: &Tensor) -> Result<Tensor> {
    if takes(x) { add::routed_add(x, module, keep) } else { device::routed_add(x, module, keep) }
}

/// How a decision is sampled, and how its gradient is estimated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Estimator {
    /// Straight through the Gumbel-softmax at temperature `tau`, which is the gradient's alone.
    StraightThrough {
        /// The temperature.
        tau: f64,
    },
    /// `ReinMax`, right to the second order; decisions are drawn at temperature `tau`.
    ReinMax {
        /// The temperature.
        tau: f64,
    },
}

impl Estimator {
    /// The temperature.
    pub(crate) const fn tau(self) -> f64 {
        match self {
            Self::StraightThrough { tau } | Self::ReinMax { tau } => tau,
        }
    }

    /// What the noise is multiplied by before it is added to a margin.
    const fn noise(self) -> f64 {
        match self {
            Self::StraightThrough { .. } => 1.0,
            Self::ReinMax { tau } => tau,
        }
    }

    /// The decision, 0 or 1, of a margin and its noise.
    fn keep(self, margin: f32, noise: f32) -> f32 {
        f32::from(u8::from(margin + self.noise() as f32 * noise >= 0.0))
    }
}

/// Margins `[rows]` to keep `[rows, 1]`, 0 or 1, with the gradient of `estimator`.
pub(crate) fn sampled(margins: &Tensor, noise: &Tensor, estimator: Estimator) -> Result<Tensor> {
    if takes(margins) {
        keep::sampled(margins, noise, estimator)
    } else {
        device::sampled(margins, noise, estimator)
    }
}

/// A scalar whose backward sends `gradient`, of the shape of `y`, into `y`.
pub(crate) fn seed(y: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    if takes(y) { seed::seed(y, gradient) } else { device::seed(y, gradient) }
}
