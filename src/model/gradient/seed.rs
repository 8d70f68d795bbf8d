//! Where a backward starts from a gradient that is known already.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

struct Seed {
    gradient: Tensor,
}

/// A scalar whose backward sends `gradient`, of the shape of `y`, into `y`. Its value is 0.
///
/// It stands for `Σ y · gradient`: a layer's own backward, with what the layers after it computed.
pub(super) fn seed(y: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    y.apply_op1(Seed { gradient: gradient.detach() })
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), ().into()))
    }

    /// The incoming gradient is that of the backward's own root, 1.
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gradient.clone()))
    }
}
