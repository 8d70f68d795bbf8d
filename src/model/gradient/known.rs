//! A value that is computed already, with a backward of its own, as an operation of candle's graph.
//!
//! An operation written with tensors runs on every device, but every tensor of it would be kept for
//! candle's own backward, weights would get gradients nobody reads, and candle's fused kernels have
//! none. So the forward is computed apart from the graph and enters it here, and the backward is a
//! function of the gradient that comes in.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail,
};

/// From the gradient of the value to those of its inputs.
type Backward<const N: usize> = Box<dyn Fn(&Tensor) -> Result<[Tensor; N]> + Send + Sync>;

struct Known<const N: usize> {
    name: &'static str,
    value: Tensor,
    backward: Backward<N>,
}

/// `value`, a function of `input` whose gradient `backward` knows.
pub(super) fn of_one(
    name: &'static str,
    input: &Tensor,
    value: &Tensor,
    backward: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let backward: Backward<1> = Box::new(move |gradient| Ok([backward(gradient)?]));
    let value = value.detach().contiguous()?;
    input.apply_op1(Known { name, value, backward })
}

/// `value`, a function of three inputs.
pub(super) fn of_three(
    name: &'static str,
    inputs: [&Tensor; 3],
    value: &Tensor,
    backward: impl Fn(&Tensor) -> Result<[Tensor; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    let value = value.detach().contiguous()?;
    let op = Known { name, value, backward: Box::new(backward) };
    inputs[0].apply_op3(inputs[1], inputs[2], op)
}

impl<const N: usize> Known<N> {
    fn on_cpu(&self) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, self.shape(layout)?)),
            _ => bail!("{}: its value is on a device and its input is not", self.name),
        }
    }

    fn on_cuda(&self) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, self.shape(layout)?)),
            _ => bail!("{}: its input is on a device and its value is not", self.name),
        }
    }

    /// The storage is copied whole, so the value must be the whole of it.
    fn shape(&self, layout: &Layout) -> Result<Shape> {
        if layout.start_offset() != 0 {
            bail!("{}: its value begins inside another tensor", self.name);
        }
        Ok(layout.shape().clone())
    }
}

impl CustomOp1 for Known<1> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let [gradient] = (self.backward)(&gradient.detach())?;
        Ok(Some(gradient))
    }
}

impl CustomOp3 for Known<3> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [first, second, third] = (self.backward)(&gradient.detach())?;
        Ok((Some(first), Some(second), Some(third)))
    }
}
