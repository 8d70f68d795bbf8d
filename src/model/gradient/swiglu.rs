//! `y = silu(gate) · up`, with `silu(g) = g · σ(g)` and `silu'(g) = σ(g) · (1 + g · (1 − σ(g)))`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::exp;
use super::values::{hold, live, matrix, slice, tensor};

struct SwiGlu;

/// `gate` and `up` of one shape, to that shape.
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu)
}

/// One row: `y = silu(gate) · up`.
pub(super) fn forward_row(y: &mut [f32], gate: &[f32], up: &[f32]) {
    exp::sigmoids(y, gate);
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        *y *= gate * up;
    }
}

/// One row: `d`, the gradient of `y`, becomes that of `up`; gives that of `gate`.
pub(super) fn backward_row(d_gate: &mut [f32], d: &mut [f32], gate: &[f32], up: &[f32]) {
    exp::sigmoids(d_gate, gate);
    for ((d_gate, d), (gate, up)) in d_gate.iter_mut().zip(d).zip(gate.iter().zip(up)) {
        let (share, gradient) = (*d_gate, *d);
        *d_gate = gradient * up * share * (1.0 + gate * (1.0 - share));
        *d = gradient * gate * share;
    }
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(gate, gate_layout)?, slice(up, up_layout)?);
        let width = matrix(gate_layout.shape()).1;
        let mut y = vec![0.0; gate.len()];
        y.par_chunks_exact_mut(width)
            .zip(gate.par_chunks_exact(width))
            .zip(up.par_chunks_exact(width))
            .for_each(|((y, gate), up)| {
                forward_row(y, gate, up);
            });
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let shape = gate.shape();
        let width = matrix(shape).1;
        let gradient = gradient.contiguous()?;
        let (gate, up, gradient) = (hold(gate)?, hold(up)?, hold(&gradient)?);
        let (mut d_gate, mut d_up) = (vec![0.0; gate.len()], vec![0.0; gate.len()]);
        d_gate
            .par_chunks_exact_mut(width)
            .zip(d_up.par_chunks_exact_mut(width))
            .zip(gate.par_chunks_exact(width).zip(up.par_chunks_exact(width)))
            .zip(gradient.par_chunks_exact(width))
            .filter(|(_, gradient)| live(gradient))
            .for_each(|(((d_gate, d_up), (gate, up)), gradient)| {
                d_up.copy_from_slice(gradient);
                backward_row(d_gate, d_up, gate, up);
            });
        Ok((Some(tensor(d_gate, shape)?), Some(tensor(d_up, shape)?)))
    }
}
