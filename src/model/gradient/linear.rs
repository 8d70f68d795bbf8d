//! `y = x · Wᵀ + bias` with `W` and bias frozen: `dx = dy · W`, of the rows of `dy` that are not zero.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::values::{among_workers, hold, live, matrix, slice, tensor, widened};
use crate::model::gemm::{Matrix, Threads, multiply};

struct FrozenLinear {
    /// `[out, in]`.
    weight: Tensor,
    /// `[out]`.
    bias: Option<Tensor>,
}

/// `x` `[rows, in]` to `[rows, out]`; neither `weight` nor `bias` gets a gradient.
pub(crate) fn frozen_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let op = FrozenLinear { weight: weight.detach(), bias: bias.map(Tensor::detach) };
    x.contiguous()?.apply_op1(op)
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(storage, layout)?;
        let rows = matrix(layout.shape()).0;
        let y = among_workers(|| self.forward(x, rows))?;
        let shape = (rows, self.weight.dim(0)?).into();
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        among_workers(|| self.backward(x, gradient))
    }
}

impl FrozenLinear {
    /// `[rows, in]` to `[rows, out]`.
    fn forward(&self, x: &[f32], rows: usize) -> Result<Vec<f32>> {
        let (outer, inner) = self.weight.dims2()?;
        let mut y = vec![0.0; rows * outer];
        let weight = widened(&self.weight)?;
        let weight = hold(&weight)?;
        let (a, b) = (Matrix::new(x, rows, inner)?, Matrix::new(&weight, outer, inner)?);
        multiply(&mut y, false, a, b.t(), Threads::All)?;
        if let Some(bias) = &self.bias {
            let bias = hold(bias)?;
            y.par_chunks_exact_mut(outer).for_each(|row| {
                row.iter_mut().zip(&*bias).for_each(|(value, bias)| *value += bias);
            });
        }
        Ok(y)
    }

    /// The gradient of `x`.
    fn backward(&self, x: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let gradient = hold(&gradient)?;
        let (outer, inner) = self.weight.dims2()?;
        let rows = matrix(x.shape()).0;
        let weight = widened(&self.weight)?;
        let weight = hold(&weight)?;
        let weight = Matrix::new(&weight, outer, inner)?;
        let kept: Vec<usize> = (0..rows)
            .into_par_iter()
            .filter(|row| live(&gradient[row * outer..][..outer]))
            .collect();
        let mut dx = vec![0.0; rows * inner];
        if kept.len() == rows {
            multiply(&mut dx, false, Matrix::new(&gradient, rows, outer)?, weight, Threads::All)?;
        } else {
            let mut gathered = Vec::with_capacity(kept.len() * outer);
            for row in &kept {
                gathered.extend_from_slice(&gradient[row * outer..][..outer]);
            }
            let mut computed = vec![0.0; kept.len() * inner];
            let gathered = Matrix::new(&gathered, kept.len(), outer)?;
            multiply(&mut computed, false, gathered, weight, Threads::All)?;
            for (row, values) in kept.iter().zip(computed.chunks_exact(inner)) {
                dx[row * inner..][..inner].copy_from_slice(values);
            }
        }
        Ok(Some(tensor(dx, x.shape())?))
    }
}
