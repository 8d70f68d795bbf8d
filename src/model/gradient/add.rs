//! `y = x + keep · module`, where keep is a number per row.
//!
//! `dx = dy`, `dmodule = keep · dy`, `dkeep = Σ dy · module`.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::values::{hold, matrix, slice, tensor};

struct RoutedAdd;

/// `x` and `module` `[rows, width]`, `keep` `[rows, 1]`.
pub(super) fn routed_add(x: &Tensor, module: &Tensor, keep: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&module.contiguous()?, &keep.contiguous()?, RoutedAdd)
}

impl CustomOp3 for RoutedAdd {
    fn name(&self) -> &'static str {
        "routed-add"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        module: &CpuStorage,
        module_layout: &Layout,
        keep: &CpuStorage,
        keep_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let module = slice(module, module_layout)?;
        let (mut y, keep) = (slice(x, x_layout)?.to_vec(), slice(keep, keep_layout)?);
        let width = matrix(x_layout.shape()).1;
        y.par_chunks_exact_mut(width).zip(module.par_chunks_exact(width)).zip(keep).for_each(
            |((y, module), keep)| {
                y.iter_mut().zip(module).for_each(|(y, module)| *y += keep * module);
            },
        );
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        module: &Tensor,
        keep: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let width = matrix(x.shape()).1;
        let (values, kept, dy) = (hold(module)?, hold(keep)?, hold(&gradient)?);
        let (mut d_module, mut d_keep) = (vec![0.0; values.len()], vec![0.0; kept.len()]);
        d_module
            .par_chunks_exact_mut(width)
            .zip(&mut d_keep)
            .zip(values.par_chunks_exact(width).zip(&*kept))
            .zip(dy.par_chunks_exact(width))
            .for_each(|(((d_module, d_keep), (module, keep)), dy)| {
                *d_keep = dy.iter().zip(module).map(|(dy, module)| dy * module).sum();
                // Not a product: a row that is skipped must become zeros, whatever `dy` is.
                if *keep != 0.0 {
                    d_module.iter_mut().zip(dy).for_each(|(d, dy)| *d = keep * dy);
                }
            });
        let d_module = tensor(d_module, module.shape())?;
        let d_keep = tensor(d_keep, keep.shape())?;
        Ok((Some(gradient.clone()), Some(d_module), Some(d_keep)))
    }
}
