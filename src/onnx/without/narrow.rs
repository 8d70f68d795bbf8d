//! The projection onto queries, keys and values without its queries.
//!
//! The rows of the queries are the first of the weight `[out, in]`; what is left is a part of the
//! same bytes in the same file.

use onnx_protobuf::{GraphProto, NodeProto, TensorProto};

use super::Error;
use crate::onnx::proto::entry;

/// Makes the joint projection of the attention module at `place`, where it has one, compute keys and
/// values alone.
pub(super) fn drop_queries(graph: &mut GraphProto, place: &str) -> Result<(), Error> {
    let all = format!("{place}.qkv");
    let Some(at) = producer(graph, &all) else { return Ok(()) };
    let split = find(graph, &format!("{all}.k"), "Split", "a split into queries, keys and values")?;
    let sizes = integers(graph, &graph.node[split], 1, 3)?;
    let (queries, rest) = (sizes[0], sizes[1] + sizes[2]);
    let heads = find(graph, &format!("{all}.heads"), "Reshape", "a reshape onto heads")?;

    project(graph, at, queries, rest)?;
    let shape = heads_shape(graph, heads, rest)?;
    let parts = constant(graph, &format!("shapes.split.{}.{}", sizes[1], sizes[2]), &sizes[1..]);
    let split = &mut graph.node[split];
    split.input[1] = parts;
    split.output.remove(0);
    graph.node[heads].input[1].clone_from(&shape.name);
    shape.insert(graph);
    Ok(())
}

/// The projection at `at` without its first `queries` of `queries + rest` heads.
fn project(graph: &mut GraphProto, at: usize, queries: i64, rest: i64) -> Result<(), Error> {
    let node = &graph.node[at];
    let rows_first = match node.op_type.as_str() {
        "Gemm" => node.attribute.iter().any(|a| a.name == "transB" && a.i == 1),
        "MatMulNBits" => true,
        _ => false,
    };
    if !rows_first {
        return Err(form(node, "a weight with one row per output"));
    }
    let (name, operands) = (node.name.clone(), node.input[1..].to_vec());
    for (index, operand) in operands.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
        let whole = graph.initializer.iter().find(|tensor| tensor.name == *operand);
        let expected = "a stored weight whose rows are heads";
        let part = whole
            .and_then(|tensor| last_rows(tensor, queries, rest))
            .ok_or_else(|| Error::Form { node: name.clone(), expected })?;
        graph.node[at].input[index + 1].clone_from(&part.name);
        graph.initializer.push(part);
    }
    for attribute in graph.node[at].attribute.iter_mut().filter(|a| a.name == "N") {
        attribute.i = attribute.i * rest / (queries + rest);
    }
    Ok(())
}

/// The last `rest` of `skip + rest` equal parts of a tensor along its first dimension.
fn last_rows(tensor: &TensorProto, skip: i64, rest: i64) -> Option<TensorProto> {
    let all = skip + rest;
    let mut part = tensor.clone();
    part.name = format!("{}.without_queries", tensor.name);
    let rows = part.dims.first_mut().filter(|rows| all > 0 && **rows % all == 0)?;
    *rows = *rows / all * rest;
    let share = |bytes: i64| (bytes % all == 0).then_some(bytes / all);
    if !part.raw_data.is_empty() {
        let first = share(part.raw_data.len() as i64)? * skip;
        part.raw_data.drain(..first as usize);
        return Some(part);
    }
    let value = |key: &str| -> Option<i64> {
        tensor.external_data.iter().find(|entry| entry.key == key)?.value.parse().ok()
    };
    let (offset, unit) = (value("offset")?, share(value("length")?)?);
    part.external_data.retain(|entry| entry.key != "offset" && entry.key != "length");
    part.external_data.push(entry("offset", &(offset + unit * skip).to_string()));
    part.external_data.push(entry("length", &(unit * rest).to_string()));
    Some(part)
}

/// The shape `[batch, sequence, heads, head_dim]`, and the node that makes it where none does yet.
struct HeadsShape {
    name: String,
    node: Option<(usize, NodeProto)>,
}

impl HeadsShape {
    fn insert(self, graph: &mut GraphProto) {
        if let Some((at, node)) = self.node {
            graph.node.insert(at, node);
        }
    }
}

/// The shape that the reshape at `reshape` takes, for `heads` heads in place of its own.
fn heads_shape(graph: &mut GraphProto, reshape: usize, heads: i64) -> Result<HeadsShape, Error> {
    let name = format!("shapes.heads.{heads}");
    if producer(graph, &name).is_some() {
        return Ok(HeadsShape { name, node: None });
    }
    let old = graph.node[reshape].input.get(1).cloned().unwrap_or_default();
    let at = find(graph, &old, "Concat", "a shape from the shape of the tokens")?;
    let mut node = graph.node[at].clone();
    let width = integers(graph, &node, 1, 2)?[1];
    node.input[1] = constant(graph, &format!("{name}.split"), &[heads, width]);
    node.name = format!("/{name}");
    node.output = vec![name.clone()];
    Ok(HeadsShape { name, node: Some((at, node)) })
}

/// A constant vector of integers under `name`, added where there is none yet.
fn constant(graph: &mut GraphProto, name: &str, values: &[i64]) -> String {
    if !graph.initializer.iter().any(|tensor| tensor.name == name) {
        graph.initializer.push(TensorProto {
            name: name.to_owned(),
            dims: vec![values.len() as i64],
            data_type: onnx_protobuf::tensor_proto::DataType::INT64 as i32,
            raw_data: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            ..Default::default()
        });
    }
    name.to_owned()
}

/// The `count` integers of the constant that is operand `operand` of `node`.
fn integers(
    graph: &GraphProto,
    node: &NodeProto,
    operand: usize,
    count: usize,
) -> Result<Vec<i64>, Error> {
    let name = node.input.get(operand);
    let tensor = graph.initializer.iter().find(|tensor| Some(&tensor.name) == name);
    let values: Vec<i64> = tensor
        .map(|tensor| {
            let (words, _) = tensor.raw_data.as_chunks::<8>();
            words.iter().map(|word| i64::from_le_bytes(*word)).collect()
        })
        .unwrap_or_default();
    if values.len() == count { Ok(values) } else { Err(form(node, "constant sizes")) }
}

fn producer(graph: &GraphProto, value: &str) -> Option<usize> {
    graph.node.iter().position(|node| node.output.iter().any(|output| output == value))
}

fn find(graph: &GraphProto, value: &str, op: &str, expected: &'static str) -> Result<usize, Error> {
    producer(graph, value)
        .filter(|at| graph.node[*at].op_type == op)
        .ok_or_else(|| Error::Form { node: value.to_owned(), expected })
}

fn form(node: &NodeProto, expected: &'static str) -> Error {
    Error::Form { node: node.name.clone(), expected }
}
