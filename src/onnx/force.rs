//! Decisions from outside: a router's bias becomes an input of the graph.
//!
//! ```text
//! - margins = Gemm(x, routers, bias)
//! + margins = Gemm(x, routers, forced.layers.3)
//! ```
//!
//! Infinity keeps a token, negative infinity skips it. No node is added or taken away: the routers
//! are computed as before, and the time of a step is that of an artifact whose routers decide so.

use onnx_protobuf::{GraphProto, Message, ModelProto, NodeProto};
use skipgpt_passes::ir::{DType, ModuleId};

use super::RouterMargins;
use super::graph::{Dim, Element, Value};
use super::proto::{self, serialise, value_proto};

/// How the names of these inputs begin.
pub const PREFIX: &str = "forced.";

/// An input that stands in for a router's bias: `f32` `[tokens, modules]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// Its name.
    pub name: String,
    /// Whose decisions it holds, column by column.
    pub modules: Vec<ModuleId>,
}

/// Why a model's decisions cannot be taken from outside.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A router's margins are no product.
    #[error("the graph has no product {0}: this build did not export it")]
    NoRouter(String),
    /// The model file cannot be read or written.
    #[error(transparent)]
    Proto(#[from] proto::Error),
}

/// The same model with an input for the decisions of each of `routers`, and those inputs.
///
/// `bytes` must be a file that [`proto::encode`] wrote: compare its hash with the manifest's first.
///
/// # Errors
///
/// [`Error::NoRouter`] if a router's margins are not computed as this build lowers them.
pub fn with_forced(
    bytes: &[u8],
    routers: &[RouterMargins],
) -> Result<(Vec<u8>, Vec<Input>), Error> {
    let mut model = ModelProto::parse_from_bytes(bytes).map_err(proto::Error::from)?;
    let graph = model.graph.mut_or_insert_default();
    let mut inputs = Vec::with_capacity(routers.len());
    for RouterMargins { value, modules } in routers {
        let place = value.strip_suffix(".router.margins").unwrap_or(value);
        let input = Input { name: format!("{PREFIX}{place}"), modules: modules.clone() };
        let product = product(graph, value).ok_or_else(|| Error::NoRouter(value.clone()))?;
        let bias = product.input.get(2).cloned();
        product.input.truncate(2);
        product.input.push(input.name.clone());
        graph.initializer.retain(|tensor| Some(&tensor.name) != bias.as_ref());
        graph.input.push(value_proto(&Value {
            name: input.name.clone(),
            element: Element::Float(DType::F32),
            shape: vec![Dim::Symbolic("tokens"), Dim::Fixed(modules.len())],
        }));
        inputs.push(input);
    }
    Ok((serialise(&model)?, inputs))
}

/// The node that computes `margins`.
fn product<'a>(graph: &'a mut GraphProto, margins: &str) -> Option<&'a mut NodeProto> {
    let computes = |node: &&mut NodeProto| {
        node.op_type == "Gemm" && node.input.len() >= 2 && node.output.iter().any(|o| o == margins)
    };
    graph.node.iter_mut().find(computes)
}
