//! What is trained: its names, its values, and how it begins.

use candle_core::{Device, Result, Tensor, Var};
use rand_chacha::ChaCha8Rng;

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

/// How a parameter begins.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Initial {
    /// These values.
    Values(Vec<f32>),
    /// Uniform in `-bound..bound`.
    Uniform {
        /// The bound.
        bound: f64,
    },
}

impl Parameter {
    /// The `index`th parameter of a run of seed `seed`.
    pub(super) fn new(
        name: String,
        layer: usize,
        shape: &[usize],
        initial: Initial,
        (seed, index): (u64, usize),
    ) -> Result<Self> {
        let values = match initial {
            Initial::Values(values) => values,
            Initial::Uniform { bound } => {
                let mut random = random::generator(seed, Use::Initial, index as u64, 0);
                uniform(&mut random, bound, shape.iter().product())
            }
        };
        let var = Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?)?;
        Ok(Self { name, var, layer })
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.var.elem_count()
    }

    /// A copy of the values, row-major.
    pub(super) fn values(&self) -> Result<Vec<f32>> {
        Ok(hold(&self.var)?.to_vec())
    }

    /// Replaces the values.
    pub(super) fn set(&self, values: Vec<f32>) -> Result<()> {
        self.var.set(&Tensor::from_vec(values, self.var.shape(), &Device::Cpu)?)
    }
}

fn uniform(random: &mut ChaCha8Rng, bound: f64, count: usize) -> Vec<f32> {
    (0..count).map(|_| ((2.0 * random::uniform(random) - 1.0) * bound) as f32).collect()
}
