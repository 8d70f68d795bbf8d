//! The back end: a lowered model becomes an ONNX graph.
//!
//! Opset 18 and ONNX Runtime's own `RotaryEmbedding`, `FusedMatMul` and
//! `SkipSimplifiedLayerNormalization`: what every ONNX Runtime since 1.20 runs on CPU and CUDA without copies between them. One graph serves prefill, decode,
//! chunks on top of a cache, and batches padded on the left.

mod attention;
mod builder;
mod dispatch;
pub mod force;
pub mod graph;
mod lower;
mod mlp;
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

use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::{Config, DType, Phase};
use skipgpt_passes::validate::Validated;

use graph::{Attribute, Graph};

use crate::decoder::Logits;
use crate::runtime::Provider;

/// The oldest ONNX Runtime that runs what is emitted here, quantised weights and grouped attention
/// apart.
pub const MINIMUM_ONNXRUNTIME: &str = "1.20";

/// The oldest ONNX Runtime that runs `graph` on a CPU: [`MINIMUM_ONNXRUNTIME`], or later where
/// weights are quantised. Tried with 1.20.1, 1.22.1 and 1.23.2.
pub fn minimum_onnxruntime(graph: &Graph) -> &'static str {
    let nodes = graph.all_nodes();
    let eight = |node: &graph::Node| node.attributes.contains(&("bits", Attribute::Int(8)));
    if nodes.iter().any(|node| node.op == "GatherBlockQuantized") {
        // Codes in bytes.
        "1.23"
    } else if nodes
        .iter()
        .any(|node| node.op == "GroupQueryAttention" || (node.op == "MatMulNBits" && eight(node)))
    {
        // An attention bias; codes of eight bits.
        "1.22"
    } else {
        MINIMUM_ONNXRUNTIME
    }
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
}

/// How attention is lowered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attention {
    /// `GroupQueryAttention` for steps of one token a sequence, elementary operators for chunks. Past
    /// and present may be one buffer.
    #[default]
    Grouped,
    /// Elementary operators alone: any head size, and `f32` on every provider.
    Decomposed,
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

/// The model is not in the phase the back end takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the ONNX back end takes Lowered models; this one is {0}: run lower-routers first")]
pub struct WrongPhase(Phase);

/// The graph of a lowered model. Inputs and outputs depend on the checkpoint and the plan alone.
pub fn lower(model: Validated<'_>, options: Options) -> Result<Graph, WrongPhase> {
    match model.phase() {
        Phase::Lowered => Ok(lower::lower(model.model(), options)),
        phase => Err(WrongPhase(phase)),
    }
}
