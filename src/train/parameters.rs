//! What is trained: its names, its values, and how it begins.

use candle_core::{Device, Result, Tensor, Var};

use super::random::{self, Use};
use crate::model::gradient::hold;

/// A tensor that is trained.
#[derive(Debug, Clone)]
pub(super) struct Parameter {
    /// As a checkpoint names it.
    pub(super) name: String,
    /// The tensor the model computes with.
    pub(super) var: Var,
    /// The layer it belongs to, from 0.
    pub(super) layer: usize,
}

impl Parameter {
    /// One that begins as `values`, row-major.
    pub(super) fn new(
        name: String,
        layer: usize,
        shape: &[usize],
        values: Vec<f32>,
        device: &Device,
    ) -> Result<Self> {
        let var = Var::from_tensor(&Tensor::from_vec(values, shape, device)?)?;
        Ok(Self { name, var, layer })
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.var.elem_count()
    }

    /// A copy of the values, row-major.
    pub(super) fn values(&self) -> Result<Vec<f32>> {
        Ok(hold(&self.var.to_device(&Device::Cpu)?)?.to_vec())
    }

    /// Replaces the values.
    pub(super) fn set(&self, values: Vec<f32>) -> Result<()> {
        self.var.set(&Tensor::from_vec(values, self.var.shape(), self.var.device())?)
    }
}

/// The values of every parameter; those on a device come in one copy.
pub(super) fn values(parameters: &[Parameter]) -> Result<Vec<Vec<f32>>> {
    if device(parameters).is_none() {
        return parameters.iter().map(Parameter::values).collect();
    }
    let flat = parameters.iter().map(|one| one.var.flatten_all()).collect::<Result<Vec<_>>>()?;
    let flat = Tensor::cat(&flat, 0)?.detach();
    let flat = flat.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
    let mut rest = flat.as_slice();
    let each = parameters.iter().map(|one| {
        let (own, others) = rest.split_at(one.len());
        rest = others;
        own.to_vec()
    });
    Ok(each.collect())
}

/// Replaces the values of every parameter, on a device through one copy.
pub(super) fn set(parameters: &[Parameter], values: Vec<Vec<f32>>) -> Result<()> {
    let Some(device) = device(parameters) else {
        return parameters.iter().zip(values).try_for_each(|(one, values)| one.set(values));
    };
    let flat = Tensor::new(values.concat(), &device)?;
    let mut first = 0;
    for one in parameters {
        one.var.set(&flat.narrow(0, first, one.len())?.reshape(one.var.shape())?)?;
        first += one.len();
    }
    Ok(())
}

/// Where the parameters are; `None` for the host's memory.
fn device(parameters: &[Parameter]) -> Option<Device> {
    let device = parameters.first()?.var.device();
    (!device.is_cpu()).then(|| device.clone())
}

/// What the `index`th parameter of a run of seed `seed` begins as: `count` values, uniform in
/// `-bound..bound`.
pub(super) fn uniform((seed, index): (u64, usize), bound: f64, count: usize) -> Vec<f32> {
    let mut random = random::generator(seed, Use::Initial, index as u64, 0);
    (0..count).map(|_| ((2.0 * random::uniform(&mut random) - 1.0) * bound) as f32).collect()
}
