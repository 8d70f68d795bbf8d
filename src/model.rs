//! The reference: candle runs an [`ir::Model`] in any phase, as written.
//!
//! Merged and unmerged adapters, separate and fused projections, own and shared routers, every
//! [`ir::Dispatch`]: each is run by its own path, so that "this pass preserves meaning" is a
//! comparison of two runs. What is not yet dispatched computes everything and multiplies by keep.
//!
//! Activations are `[rows, hidden]` with `rows = batch · sequence`, row-major: every projection is one
//! matrix product.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use ndarray::Array4;
use skipgpt_passes::cost::ModuleCost;
use skipgpt_passes::ir::{self, ModuleId};
use skipgpt_passes::validate::Validated;

use crate::importance::Ears;
use crate::sources::Sources;
use crate::{rope, weights};

pub mod attention;
pub mod cache;
pub mod dropout;
pub(crate) mod gemm;
pub(crate) mod gradient;
pub mod layer;
pub mod linear;
mod load;
pub mod mlp;
pub mod norm;
pub mod ops;
pub mod router;
mod run;
pub mod step;

use cache::Cache;
use layer::Layer;
use linear::Linear;
use norm::Norm;
use ops::Kernels;

/// Where and how the reference computes.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where its tensors live.
    pub device: Device,
    /// Of weights and activations; routers and softmax are `f32` in any case. Candle multiplies
    /// `bf16` matrices on CUDA only.
    pub dtype: DType,
    /// Of frozen matrices, if another than [`Options::dtype`]: they are widened where training
    /// multiplies with them, and nothing else can.
    pub matrices: Option<DType>,
    /// Which form of the operations is used.
    pub kernels: Kernels,
    /// Hears the inputs of every projection.
    pub ears: Option<Arc<Ears>>,
}

impl Default for Options {
    /// `f32` on the CPU, for inference.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            matrices: None,
            kernels: Kernels::Fused,
            ears: None,
        }
    }
}

/// Why the reference could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A weight could not be evaluated.
    #[error(transparent)]
    Weight(#[from] weights::Error),
    /// A weight could not become a tensor.
    #[error("{}: cannot load the weight: {source}", weight.join(" + "))]
    Load {
        /// The tensors of the checkpoint it is made of.
        weight: Vec<String>,
        /// Candle's word.
        source: candle_core::Error,
    },
    /// A module asks for a decision no router of its layer makes: a bug in a pass.
    #[error("{id}: decision {slot} of the layer's shared router is asked for, and there is none")]
    NoDecision {
        /// The module.
        id: ModuleId,
        /// The decision.
        slot: usize,
    },
    /// The step's arrays do not belong together.
    #[error(
        "{array} is {found:?}; with ids of {ids:?} and a cache of {cached} tokens per row it must be {expected:?}"
    )]
    Shape {
        /// `mask` or `positions`.
        array: &'static str,
        /// Its shape.
        found: (usize, usize),
        /// The shape of the token ids, `[batch, sequence]`.
        ids: (usize, usize),
        /// Tokens per row the cache holds.
        cached: usize,
        /// The shape it needs.
        expected: (usize, usize),
    },
    /// The batch changed while the cache holds tokens.
    #[error("the step has {found} rows and the cache {cached}; reset the decoder between batches")]
    Batch {
        /// Rows of the cache.
        cached: usize,
        /// Rows of the step.
        found: usize,
    },
    /// The decisions to follow are not those of the step's tokens.
    #[error(
        "the decisions to follow are {found:?}, [modules, batch, sequence]; they must be {expected:?}"
    )]
    Followed {
        /// Shape of the margins.
        found: (usize, usize, usize),
        /// The shape that follows from the step.
        expected: (usize, usize, usize),
    },
    /// A step without a token.
    #[error("the step has no token: its ids are {0:?}")]
    Empty((usize, usize)),
    /// An element of an array is outside its range.
    #[error("{array}[{row}, {column}] is {found}; it must be in 0..{end}")]
    Range {
        /// `ids`, `mask` or `positions`.
        array: &'static str,
        /// Row of the batch.
        row: usize,
        /// Column.
        column: usize,
        /// The element.
        found: i64,
        /// End of the range.
        end: i64,
    },
    /// A result does not have the shape its computation gives: our bug.
    #[error("a result has an unexpected shape: {0}")]
    Array(#[from] ndarray::ShapeError),
    /// A computation failed; the cache is forgotten.
    #[error("{}: {source}", place(*layer))]
    Compute {
        /// The layer, by its place in the checkpoint; `None` outside the layers.
        layer: Option<usize>,
        /// Candle's word.
        source: candle_core::Error,
    },
}

fn place(layer: Option<usize>) -> String {
    layer.map_or_else(|| "outside the layers".to_owned(), |layer| format!("layers.{layer}"))
}

/// A model in memory, with its cache.
#[derive(Debug)]
pub struct Reference {
    config: ir::Config,
    modules: Vec<ModuleCost>,
    options: Options,
    frequencies: Vec<f32>,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
    caches: Vec<Cache>,
    /// Rows and tokens per row the caches hold.
    cached: (usize, usize),
}

/// A reference taken apart: what training runs layer by layer.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) config: ir::Config,
    /// What each module costs a token, as it was loaded.
    pub(crate) modules: Vec<ModuleCost>,
    pub(crate) frequencies: Vec<f32>,
    /// `[vocab, hidden]`.
    pub(crate) embedding: Tensor,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Norm,
    pub(crate) head: Linear,
    /// Which form of the operations they were loaded for.
    pub(crate) kernels: Kernels,
}

/// What the layers read in one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// The layers present, by their places in the checkpoint.
    pub layers: Vec<usize>,
    /// The residual stream at each one's input, `[layers, batch, sequence, hidden]`.
    pub inputs: Array4<f32>,
}

impl Reference {
    /// Evaluates every weight into memory, `f32` on the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::Weight`] if a tensor cannot be read.
    pub fn load(model: Validated<'_>, sources: &Sources) -> Result<Self, Error> {
        Self::load_with(model, sources, Options::default())
    }

    /// The tensors, without the cache.
    pub(crate) fn into_parts(self) -> Parts {
        let Self { config, modules, options, frequencies, embedding, layers, norm, head, .. } =
            self;
        let kernels = options.kernels;
        Parts { config, modules, frequencies, embedding, layers, norm, head, kernels }
    }

    /// Evaluates every weight into memory, as `options` say.
    ///
    /// # Errors
    ///
    /// [`Error::Weight`] if a tensor cannot be read, [`Error::Load`] if the device refuses it.
    pub fn load_with(
        model: Validated<'_>,
        sources: &Sources,
        options: Options,
    ) -> Result<Self, Error> {
        let model = model.model();
        let loader = load::Loader { config: &model.config, sources, options: &options };
        let embedding = loader.matrix(&model.embedding)?;
        let head = if model.head.weight == model.embedding {
            loader.tied(embedding.clone(), &model.head)?
        } else {
            loader.linear(&model.head)?
        };
        let layers =
            model.layers.iter().map(|layer| loader.layer(layer)).collect::<Result<Vec<_>, _>>()?;
        let norm = loader.norm(&model.norm)?;
        Ok(Self {
            config: model.config.clone(),
            modules: model.multiply_adds().modules,
            frequencies: rope::inverse_frequencies(&model.config),
            embedding,
            caches: layers.iter().map(|_| Cache::default()).collect(),
            layers,
            norm,
            head,
            options,
            cached: (0, 0),
        })
    }
}

#[cfg(test)]
mod tests;
