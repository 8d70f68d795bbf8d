//! Decisions from outside: what a router compares with becomes an input of the graph.
//!
//! ```text
//! - kept = GreaterOrEqual(keep scores, skip scores)
//! + kept = GreaterOrEqual(keep scores, forced.layers.3)
//! ```
//!
//! Negative infinity keeps a token, positive infinity skips it. No node is added or taken away: the
//! routers are computed as before, and the time of a step is that of an artifact whose routers
//! decide so.

use onnx_protobuf::{GraphProto, Message, ModelProto};
use skipgpt_passes::ir::{DType, ModuleId};

use super::RouterScores;
use super::graph::{Dim, Element, Value};
use super::proto::{self, serialise, value_proto};

/// How the names of these inputs begin.
pub const PREFIX: &str = "forced.";

/// An input that stands in for a router's thresholds: `f32` `[tokens, modules]`.
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
    /// No comparison follows a router's scores.
    #[error("the graph does not compare the scores {0}: this build did not export it")]
    NoDecision(String),
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
/// [`Error::NoDecision`] if a router's scores are compared with nothing.
pub fn with_forced(bytes: &[u8], routers: &[RouterScores]) -> Result<(Vec<u8>, Vec<Input>), Error> {
    let mut model = ModelProto::parse_from_bytes(bytes).map_err(proto::Error::from)?;
    let graph = model.graph.mut_or_insert_default();
    let mut inputs = Vec::with_capacity(routers.len());
    for RouterScores { value, modules } in routers {
        let place = value.strip_suffix(".router.scores").unwrap_or(value);
        let input = Input { name: format!("{PREFIX}{place}"), modules: modules.clone() };
        let decision = decision(graph, value).ok_or_else(|| Error::NoDecision(value.clone()))?;
        graph.node[decision].input[1].clone_from(&input.name);
        graph.input.push(value_proto(&Value {
            name: input.name.clone(),
            element: Element::Float(DType::F32),
            shape: vec![Dim::Symbolic("tokens"), Dim::Fixed(modules.len())],
        }));
        inputs.push(input);
    }
    Ok((serialise(&model)?, inputs))
}

/// The node that compares the keep scores among `scores` with the skip scores.
fn decision(graph: &GraphProto, scores: &str) -> Option<usize> {
    let splits = graph.node.iter().filter(|n| n.op_type == "Split" && n.input[0] == scores);
    let keeps: Vec<&String> = splits.filter_map(|split| split.output.first()).collect();
    let compares = |op: &str, inputs: &[String]| {
        op == "GreaterOrEqual" && inputs.len() == 2 && keeps.contains(&&inputs[0])
    };
    graph.node.iter().position(|node| compares(&node.op_type, &node.input))
}
