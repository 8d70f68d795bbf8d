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

mod add;
mod attention;
pub(crate) mod exp;
mod keep;
mod linear;
mod module;
mod norm;
mod seed;
mod swiglu;
#[cfg(test)]
mod tests;
mod values;

pub(crate) use add::routed_add;
pub(crate) use attention::{Causal, attention};
pub(crate) use keep::straight_through;
pub(crate) use linear::frozen_linear;
pub(crate) use module::{Frozen, sampled_attention, sampled_mlp};
pub(crate) use norm::rms_norm;
pub(crate) use seed::seed;
pub(crate) use swiglu::swiglu;
pub(crate) use values::{hold, widened};

use candle_core::{DType, Tensor};

/// Whether the operations here take `x`: `f32` in the host's memory.
pub(crate) fn takes(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && x.device().is_cpu()
}
