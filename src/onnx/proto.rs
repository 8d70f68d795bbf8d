//! Serialises a [`Graph`] as an ONNX `ModelProto`.
//!
//! The bytes are a function of the arguments alone: fields are written in tag order, nothing is
//! kept in a hash map, and no time or machine enters. Weights stay outside: their initializers
//! carry `location`, `offset` and `length`.
//!
//! Nothing here reads a file of unknown origin. [`with_outputs`] parses bytes that this module
//! wrote; the caller has compared their hash with the manifest's.

use std::collections::BTreeMap;

use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::tensor_proto::{DataLocation, DataType};
use onnx_protobuf::tensor_shape_proto::{Dimension, dimension};
use onnx_protobuf::{
    AttributeProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use protobuf::{EnumOrUnknown, MessageField};
use skipgpt_passes::ir::DType;

use super::graph::{Attribute, Data, Dim, Element, Graph, Initializer, Node, Placement, Value};

/// The IR version of the file: the one that came with opset 18, read by every ONNX Runtime in use.
pub const IR_VERSION: i64 = 8;
/// The version of the standard operators.
pub const OPSET: i64 = 18;
/// The version of the `com.microsoft` operators.
const CONTRIB_OPSET: i64 = 1;
/// The entry of `metadata_props` that says, `true` or `false`, whether a client may hand over one buffer
/// as past and present, with room for more tokens than it holds.
pub const SHARED_BUFFER: &str = "past_present_share_buffer";
/// The entry that says which sequences the graph takes, as [`crate::decoder::Sequences`] is spelled: its inputs' shapes do not, since a
/// session may fix a batch too.
pub const SEQUENCES: &str = "sequences";
/// Protobuf cannot hold a larger message.
const LIMIT: u64 = i32::MAX as u64;

/// Why a graph could not be serialised.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model file, weights apart, exceeds what protobuf can hold.
    #[error("the ONNX graph takes {size} bytes without its weights; a model file can hold {LIMIT}")]
    TooLarge {
        /// Bytes of the message.
        size: u64,
    },
    /// A weight was placed nowhere: a bug in whoever laid out the file.
    #[error("initializer {0} has no place in an external file")]
    Unplaced(String),
    /// A constant's bytes do not fit its shape: a bug in the lowering.
    #[error("initializer {name} has {found} bytes; its shape takes {expected}")]
    WrongSize {
        /// The initializer.
        name: String,
        /// Bytes its shape takes.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// An output was asked for that no node of the main graph produces.
    #[error("the graph computes no value named {0}")]
    NoSuchValue(String),
    /// The bytes are not a model file.
    #[error("the model file is not a valid ONNX file: {0}")]
    Protobuf(#[from] protobuf::Error),
}

/// The model file of `graph`, whose weights lie where `placements` says, by initializer name.
///
/// `metadata` goes into `metadata_props`, in the order given.
///
/// # Errors
///
/// [`Error::TooLarge`] at 2 GB; [`Error::Unplaced`] and [`Error::WrongSize`] for graphs and layouts
/// that contradict themselves.
pub fn encode(
    graph: &Graph,
    placements: &BTreeMap<String, Placement>,
    metadata: &[(&str, &str)],
) -> Result<Vec<u8>, Error> {
    let opset = |domain: &str, version| OperatorSetIdProto {
        domain: domain.to_owned(),
        version,
        ..Default::default()
    };
    serialise(&ModelProto {
        ir_version: IR_VERSION,
        opset_import: vec![opset("", OPSET), opset("com.microsoft", CONTRIB_OPSET)],
        producer_name: env!("CARGO_PKG_NAME").to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        graph: MessageField::some(graph_proto(graph, placements)?),
        metadata_props: metadata.iter().map(|(key, value)| entry(key, value)).collect(),
        ..Default::default()
    })
}

/// The same model with values it computes anyway as further outputs.
///
/// `bytes` must be a file that [`encode`] wrote: compare its hash with the manifest's first.
///
/// # Errors
///
/// [`Error::NoSuchValue`] if a value is not computed by a node of the main graph.
pub fn with_outputs(bytes: &[u8], extra: &[Value]) -> Result<Vec<u8>, Error> {
    let mut model = ModelProto::parse_from_bytes(bytes)?;
    let graph = model.graph.mut_or_insert_default();
    for value in extra {
        if graph.output.iter().any(|output| output.name == value.name) {
            continue;
        }
        if !graph.node.iter().any(|node| node.output.contains(&value.name)) {
            return Err(Error::NoSuchValue(value.name.clone()));
        }
        graph.output.push(value_proto(value));
    }
    serialise(&model)
}

/// The same model, no product of which may round activations: accuracy level 0.
///
/// `bytes` must be a file that [`encode`] wrote: compare its hash with the manifest's first.
///
/// # Errors
///
/// [`Error::Protobuf`] if it is no model file.
pub fn exact(bytes: &[u8]) -> Result<Vec<u8>, Error> {
    fn rewrite(graph: &mut GraphProto) {
        for attribute in graph.node.iter_mut().flat_map(|node| &mut node.attribute) {
            if attribute.name == "accuracy_level" {
                attribute.i = 0;
            }
            if let Some(branch) = attribute.g.as_mut() {
                rewrite(branch);
            }
        }
    }
    let mut model = ModelProto::parse_from_bytes(bytes)?;
    rewrite(model.graph.mut_or_insert_default());
    serialise(&model)
}

/// Where the external initializers of a model file lie, by name.
///
/// `bytes` must be a file that [`encode`] wrote: compare its hash with the manifest's first.
///
/// # Errors
///
/// [`Error::Protobuf`] if it is no model file.
pub fn placements(bytes: &[u8]) -> Result<BTreeMap<String, Placement>, Error> {
    fn tensors<'a>(graph: &'a GraphProto, all: &mut Vec<&'a TensorProto>) {
        all.extend(&graph.initializer);
        let attributes = graph.node.iter().flat_map(|node| &node.attribute);
        attributes.flat_map(|attribute| &attribute.g).for_each(|branch| tensors(branch, all));
    }
    let model = ModelProto::parse_from_bytes(bytes)?;
    let mut found = Vec::new();
    tensors(model.graph.get_or_default(), &mut found);
    let mut all = BTreeMap::new();
    for tensor in found {
        let entries = &tensor.external_data;
        let get = |key| entries.iter().find(|entry| entry.key == key).map(|e| &*e.value);
        let number = |text: Option<&str>| text.and_then(|text| text.parse().ok());
        if let (Some(location), Some(offset), Some(length)) =
            (get("location"), number(get("offset")), number(get("length")))
        {
            let place = Placement { location: location.to_owned(), offset, length };
            all.insert(tensor.name.clone(), place);
        }
    }
    Ok(all)
}

pub(super) fn serialise(model: &ModelProto) -> Result<Vec<u8>, Error> {
    let size = model.compute_size();
    if size > LIMIT {
        return Err(Error::TooLarge { size });
    }
    Ok(model.write_to_bytes()?)
}

pub(super) fn entry(key: &str, value: &str) -> StringStringEntryProto {
    StringStringEntryProto { key: key.to_owned(), value: value.to_owned(), ..Default::default() }
}

fn graph_proto(
    graph: &Graph,
    placements: &BTreeMap<String, Placement>,
) -> Result<GraphProto, Error> {
    Ok(GraphProto {
        name: graph.name.clone(),
        node: each(&graph.nodes, |node| node_proto(node, placements))?,
        initializer: each(&graph.initializers, |tensor| tensor_proto(tensor, placements))?,
        input: graph.inputs.iter().map(value_proto).collect(),
        output: graph.outputs.iter().map(value_proto).collect(),
        ..Default::default()
    })
}

fn each<T, U>(items: &[T], f: impl Fn(&T) -> Result<U, Error>) -> Result<Vec<U>, Error> {
    items.iter().map(f).collect()
}

fn node_proto(node: &Node, placements: &BTreeMap<String, Placement>) -> Result<NodeProto, Error> {
    Ok(NodeProto {
        name: node.name.clone(),
        op_type: node.op.to_owned(),
        domain: node.domain.to_owned(),
        input: node.inputs.clone(),
        output: node.outputs.clone(),
        attribute: each(&node.attributes, |(name, value)| {
            attribute_proto(name, value, placements)
        })?,
        ..Default::default()
    })
}

fn attribute_proto(
    name: &str,
    value: &Attribute,
    placements: &BTreeMap<String, Placement>,
) -> Result<AttributeProto, Error> {
    let mut proto = AttributeProto { name: name.to_owned(), ..Default::default() };
    let kind = match value {
        Attribute::Int(i) => {
            proto.i = *i;
            AttributeType::INT
        }
        Attribute::Ints(ints) => {
            proto.ints.clone_from(ints);
            AttributeType::INTS
        }
        Attribute::Float(f) => {
            proto.f = *f;
            AttributeType::FLOAT
        }
        Attribute::Text(text) => {
            proto.s = text.as_bytes().to_vec();
            AttributeType::STRING
        }
        Attribute::Type(element) => {
            proto.i = data_type(*element).into();
            AttributeType::INT
        }
        Attribute::Graph(graph) => {
            proto.g = MessageField::some(graph_proto(graph, placements)?);
            AttributeType::GRAPH
        }
    };
    proto.type_ = EnumOrUnknown::new(kind);
    Ok(proto)
}

fn tensor_proto(
    tensor: &Initializer,
    placements: &BTreeMap<String, Placement>,
) -> Result<TensorProto, Error> {
    let mut proto = TensorProto {
        name: tensor.name.clone(),
        dims: tensor.shape.iter().map(|dim| *dim as i64).collect(),
        data_type: data_type(tensor.element),
        ..Default::default()
    };
    let found = match &tensor.data {
        Data::Inline(bytes) => {
            proto.raw_data.clone_from(bytes);
            bytes.len() as u64
        }
        Data::Weight(_) | Data::Quantized(_) => {
            let place =
                placements.get(&tensor.name).ok_or_else(|| Error::Unplaced(tensor.name.clone()))?;
            proto.data_location = EnumOrUnknown::new(DataLocation::EXTERNAL);
            proto.external_data = vec![
                entry("location", &place.location),
                entry("offset", &place.offset.to_string()),
                entry("length", &place.length.to_string()),
            ];
            place.length
        }
    };
    let expected = tensor.size();
    if found != expected {
        return Err(Error::WrongSize { name: tensor.name.clone(), expected, found });
    }
    Ok(proto)
}

pub(super) fn value_proto(value: &Value) -> ValueInfoProto {
    let dim = |dim: &Dim| Dimension {
        value: match dim {
            Dim::Fixed(size) => Some(dimension::Value::DimValue(*size as i64)),
            Dim::Symbolic(name) => Some(dimension::Value::DimParam((*name).to_owned())),
            Dim::Open => None,
        },
        ..Default::default()
    };
    let shape =
        TensorShapeProto { dim: value.shape.iter().map(dim).collect(), ..Default::default() };
    let tensor = type_proto::Tensor {
        elem_type: data_type(value.element),
        shape: MessageField::some(shape),
        ..Default::default()
    };
    let kind =
        TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
    ValueInfoProto {
        name: value.name.clone(),
        type_: MessageField::some(kind),
        ..Default::default()
    }
}

const fn data_type(element: Element) -> i32 {
    (match element {
        Element::Float(DType::F32) => DataType::FLOAT,
        Element::Float(DType::F16) => DataType::FLOAT16,
        Element::Float(DType::BF16) => DataType::BFLOAT16,
        Element::Int64 => DataType::INT64,
        Element::Int32 => DataType::INT32,
        Element::Uint8 => DataType::UINT8,
        Element::Bool => DataType::BOOL,
    }) as i32
}

#[cfg(test)]
mod tests;
