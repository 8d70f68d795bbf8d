//! The same dense model with modules that never run, by hand: what skipping can reach at best.
//!
//! A module's change never enters the residual stream, and what computed it is gone. Keys and values
//! of such an attention module are still computed and cached, as in a routed model, so that the
//! inputs and outputs are the same; they are appended by the cheapest operator there is for it.
//!
//! ```text
//! - norm, , , output = SkipSimplifiedLayerNormalization(x, change, scale)
//! + norm = SimplifiedLayerNormalization(x, scale)             and x wherever `output` was read
//! ```

use std::collections::{BTreeMap, BTreeSet, HashSet};

use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::{AttributeProto, GraphProto, Message, ModelProto, NodeProto};
use protobuf::EnumOrUnknown;
use skipgpt_passes::ir::{ModuleId, ModuleKind};

use super::graph::Placement;
use super::proto::{self, serialise};

mod narrow;

const SKIP_NORM: &str = "SkipSimplifiedLayerNormalization";
const NORM: &str = "SimplifiedLayerNormalization";

/// Why a module cannot be taken from a graph.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing adds the module's change to the residual stream.
    #[error("the graph has no {0} that runs for every token: a dense artifact is needed")]
    NoModule(ModuleId),
    /// A node has another form than this build gives it.
    #[error("node {node}: {expected} was expected; this build did not export the graph")]
    Form {
        /// The node.
        node: String,
        /// What this build emits there.
        expected: &'static str,
    },
    /// The model file cannot be read or written.
    #[error(transparent)]
    Proto(#[from] proto::Error),
}

/// The same model without the changes of `modules`. The weights stay where they are.
///
/// `bytes` must be a file that [`proto::encode`] wrote: compare its hash with the manifest's first.
///
/// # Errors
///
/// [`Error::NoModule`] if a module is routed or absent, [`Error::Form`] if the graph is not as this
/// build lowers it.
pub fn without(bytes: &[u8], modules: &BTreeSet<ModuleId>) -> Result<Vec<u8>, Error> {
    let mut model = ModelProto::parse_from_bytes(bytes).map_err(proto::Error::from)?;
    let graph = model.graph.mut_or_insert_default();
    for module in modules {
        bypass(graph, *module)?;
        if module.kind == ModuleKind::Attention {
            narrow::drop_queries(graph, &module.to_string())?;
        }
    }
    prune(graph);
    fuse(graph);
    // The scales of norms that were fused away.
    prune(graph);
    Ok(serialise(&model)?)
}

/// Lets the residual stream pass `module` by.
fn bypass(graph: &mut GraphProto, module: ModuleId) -> Result<(), Error> {
    let output = format!("{module}.output");
    let found = graph.node.iter().position(|node| node.output.contains(&output));
    let at = found.ok_or(Error::NoModule(module))?;
    let node = &mut graph.node[at];
    let x = node.input.first().cloned().unwrap_or_default();
    match (node.op_type.as_str(), node.input.len()) {
        (SKIP_NORM, 3) => {
            NORM.clone_into(&mut node.op_type);
            // ONNX Runtime has this one among the standard operators.
            node.domain = String::new();
            node.input.remove(1);
            node.output.truncate(1);
            node.attribute.extend([int("axis", -1), int("stash_type", 1)]);
        }
        ("Add", 2) => {
            graph.node.remove(at);
        }
        _ => return Err(Error::NoModule(module)),
    }
    for input in graph.node.iter_mut().flat_map(|node| &mut node.input) {
        if *input == output {
            input.clone_from(&x);
        }
    }
    Ok(())
}

/// Adds a pending change in the norm that reads the sum, where the norm it was added in is no longer
/// read; by itself if no norm reads the whole of the sum, as where the last rows of it are gathered.
fn fuse(graph: &mut GraphProto) {
    let read: HashSet<String> = graph.node.iter().flat_map(|node| node.input.clone()).collect();
    let unread = |node: &NodeProto| {
        node.op_type == SKIP_NORM && node.output.len() == 4 && !read.contains(&node.output[0])
    };
    let mut at = 0;
    while let Some(first) = (at..graph.node.len()).find(|i| unread(&graph.node[*i])) {
        at = first + 1;
        let sum = graph.node[first].output[3].clone();
        let reads = |node: &NodeProto| node.op_type == NORM && node.input[0] == sum;
        let Some(second) = (at..graph.node.len()).find(|i| reads(&graph.node[*i])) else {
            let node = &mut graph.node[first];
            "Add".clone_into(&mut node.op_type);
            node.domain = String::new();
            node.input.truncate(2);
            node.output = vec![sum];
            node.attribute.clear();
            continue;
        };
        let adds = graph.node[first].clone();
        let norm = &mut graph.node[second];
        let (scale, normed) = (norm.input[1].clone(), norm.output[0].clone());
        let name = norm.name.clone();
        *norm = NodeProto { name, ..adds };
        norm.input[2] = scale;
        norm.output[0] = normed;
        graph.node.remove(first);
        at = first;
    }
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        i: value,
        type_: EnumOrUnknown::new(AttributeType::INT),
        ..Default::default()
    }
}

/// Removes nodes and initializers that no output needs.
fn prune(graph: &mut GraphProto) {
    let mut needed: HashSet<String> = graph.output.iter().map(|o| o.name.clone()).collect();
    prune_nodes(graph, &mut needed);
    graph.initializer.retain(|tensor| needed.contains(&tensor.name));
}

/// Removes nodes whose outputs nobody needs, in branches too; what is left adds its inputs to `needed`.
fn prune_nodes(graph: &mut GraphProto, needed: &mut HashSet<String>) {
    let mut kept: Vec<NodeProto> = Vec::with_capacity(graph.node.len());
    for mut node in std::mem::take(&mut graph.node).into_iter().rev() {
        if node.output.iter().any(|output| needed.contains(output)) {
            needed.extend(node.input.iter().cloned());
            for branch in node.attribute.iter_mut().filter_map(|attribute| attribute.g.as_mut()) {
                needed.extend(branch.output.iter().map(|output| output.name.clone()));
                prune_nodes(branch, needed);
            }
            kept.push(node);
        }
    }
    kept.reverse();
    graph.node = kept;
}

/// A weight that lies outside the model file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Its size.
    pub bytes: u64,
    /// Whether these are bytes of another weight, counted there.
    pub inside: bool,
}

/// Every weight that lies outside the model file, by initializer.
///
/// # Errors
///
/// [`Error::Proto`] if `bytes` are not a model file.
pub fn weights(bytes: &[u8]) -> Result<BTreeMap<String, Stored>, Error> {
    let placements = proto::placements(bytes)?;
    let end = |place: &Placement| place.offset + place.length;
    let inside = |name: &String, place: &Placement| {
        placements.iter().any(|(other_name, other)| {
            let larger = (other.length, other_name) > (place.length, name);
            let around = other.offset <= place.offset && end(place) <= end(other);
            other.location == place.location && larger && around
        })
    };
    let stored =
        |name, place: &Placement| Stored { bytes: place.length, inside: inside(name, place) };
    Ok(placements.iter().map(|(name, place)| (name.clone(), stored(name, place))).collect())
}

#[cfg(test)]
mod tests;
