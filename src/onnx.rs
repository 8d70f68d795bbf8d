//! The back end: a lowered model becomes an ONNX graph.
//!
//! Opset 18 and ONNX Runtime's own `RotaryEmbedding`, `FusedMatMul` and
//! `SkipSimplifiedLayerNormalization`: what ONNX Runtime runs on CPU and CUDA without copies between them. One graph serves prefill, decode,
//! chunks on top of a cache, and batches padded on the left.

mod attention;
mod builder;
mod dispatch;
pub mod force;
pub mod graph;
mod lower;
mod mlp;
mod operators;
mod probe;
pub mod proto;
mod quantized;
mod router;
mod stream;
#[cfg(test)]
mod testing;
mod text;
pub mod without;

pub use lower::ROUTING;
pub use probe::probe;
pub use router::{RouterMargins, router_margins};
pub(crate) use stream::every_token;

use std::fmt;

use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::{Config, DType, Phase};
use skipgpt_passes::validate::Validated;

use graph::{Attribute, Graph};

use crate::decoder::{Logits, Sequences};
use crate::runtime::Provider;

/// The oldest ONNX Runtime that runs what is emitted here, codes in bytes apart: its `GroupQueryAttention` adds an
/// attention bias.
pub const MINIMUM_ONNXRUNTIME: &str = "1.22";

/// The oldest ONNX Runtime that runs `graph` on a CPU. Tests run both that may come of it.
pub fn minimum_onnxruntime(graph: &Graph) -> &'static str {
    let eight = ("bits", Attribute::Int(8));
    let in_bytes = |node: &graph::Node| {
        node.op == "GatherBlockQuantized"
            || (node.op == "MatMulNBits" && node.attributes.contains(&eight))
    };
    if graph.all_nodes().into_iter().any(in_bytes) { "1.23" } else { MINIMUM_ONNXRUNTIME }
}

/// What the caller may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Of weights, hidden states and caches; routers and logits are `f32`.
    pub dtype: DType,
    /// Whether the decisions are an output, [`ROUTING`].
    pub emit_routing: bool,
    /// How attention is lowered.
    pub attention: Attention,
    /// Of which positions the graph gives logits: the final norm and the head are computed for no
    /// others.
    pub logits: Logits,
    /// Which sequences the graph takes. One alone needs no form for others, but operators that take it
    /// whole: [`Attention::Grouped`] in `f32`.
    pub sequences: Sequences,
}

/// How attention is lowered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attention {
    /// `GroupQueryAttention` for steps of one token a sequence and for whole sequences, `MultiHeadAttention`
    /// for other chunks in `f32`, elementary operators in half precision. Past and present may be one buffer.
    #[default]
    Grouped,
    /// Elementary operators alone: any head size, and `f32` on every provider.
    Decomposed,
}

/// As options spell it.
impl fmt::Display for Attention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Grouped => "grouped",
            Self::Decomposed => "decomposed",
        })
    }
}

impl Attention {
    /// What `config` allows: `GroupQueryAttention` rotates heads of whole sixteens.
    pub const fn for_config(config: &Config) -> Self {
        if config.head_dim.is_multiple_of(16) { Self::Grouped } else { Self::Decomposed }
    }

    /// What is chosen where nobody says. On a CPU, where half precision is computed through casts,
    /// `f16` graphs stay nearer to their reference in elementary operators; on CUDA the operator has
    /// no `f32` kernel, and a node without one would be left to the processor.
    pub fn auto(config: &Config, dtype: DType, provider: Provider) -> Self {
        match (provider, dtype) {
            (Provider::Cpu, DType::F16) | (Provider::Cuda, DType::F32) => Self::Decomposed,
            _ => Self::for_config(config),
        }
    }
}

/// Why a model has no graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The model is not in the phase the back end takes.
    #[error("the ONNX back end takes Lowered models; this one is {0}: run lower-routers first")]
    Phase(Phase),
    /// There is no form of attention for one sequence alone.
    #[error(
        "one sequence alone saves forms of grouped attention in f32 (weights in any precision), and this \
         graph is {attention} in {dtype}: leave --sequences one out"
    )]
    OneSequence {
        /// How attention is lowered.
        attention: Attention,
        /// Of hidden states and caches.
        dtype: DType,
    },
}

/// The graph of a lowered model. Inputs and outputs depend on the checkpoint and the plan alone.
pub fn lower(model: Validated<'_>, options: Options) -> Result<Graph, Error> {
    let Options { attention, dtype, sequences, .. } = options;
    if sequences == Sequences::One && (attention, dtype) != (Attention::Grouped, DType::F32) {
        return Err(Error::OneSequence { attention, dtype });
    }
    match model.phase() {
        Phase::Lowered => Ok(lower::lower(model.model(), options)),
        phase => Err(Error::Phase(phase)),
    }
}
