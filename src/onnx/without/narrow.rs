//! The projection onto queries, keys and values without its queries.
//!
//! The rows of the queries are the first of the weight `[out, in]`; what is left is a part of the
//! same bytes in the same file.

use onnx_protobuf::{GraphProto, NodeProto, TensorProto};

use super::Error;
use crate::onnx::proto::entry;

/// Makes the attention module at `place` compute and append keys and values alone.
pub(super) fn drop_queries(graph: &mut GraphProto, place: &str) -> Result<(), Error> {
    let all = format!("{place}.qkv");
    let mut sizes = None;
    if let Some(at) = producer(&graph.node, &all) {
        let found = split_sizes(graph, place)?;
        project(graph, at, found[0], found[1] + found[2])?;
        constant(graph, &format!("shapes.split.{}.{}", found[1], found[2]), &found[1..]);
        sizes = Some(found);
    }
    if let Some(sizes) = &sizes {
        narrow_split(&mut graph.node, &all, sizes);
    }
    if let Some(core) = producer(&graph.node, &format!("{place}.context")) {
        narrow_forms(&mut graph.node, core, &all, sizes.as_deref());
    }
    Ok(())
}

/// Makes every form of a step that the node `at` stands for give the caches alone. What no branch gives is pruned
/// from all of them.
fn narrow_forms(nodes: &mut Vec<NodeProto>, at: usize, all: &str, sizes: Option<&[i64]>) {
    let core = &mut nodes[at];
    match core.op_type.as_str() {
        "GroupQueryAttention" => append_alone(nodes, at, all, sizes),
        "If" => {
            core.output.remove(0);
            for branch in core.attribute.iter_mut().filter_map(|attribute| attribute.g.as_mut()) {
                let context = branch.output.remove(0).name;
                if let Some(sizes) = sizes {
                    narrow_split(&mut branch.node, all, sizes);
                }
                if let Some(core) = producer(&branch.node, &context) {
                    narrow_forms(&mut branch.node, core, all, sizes);
                }
            }
        }
        _ => {}
    }
}

/// Widths of queries, keys and values in the module's joint projection.
fn split_sizes(graph: &GraphProto, place: &str) -> Result<Vec<i64>, Error> {
    if let Some(split) = find_split(&graph.node, &format!("{place}.qkv")) {
        return integers(graph, split, 1, 3);
    }
    // The operator splits by itself.
    let core = producer(&graph.node, &format!("{place}.context")).map(|at| &graph.node[at]);
    core.and_then(|core| {
        let count = |name: &str| Some(core.attribute.iter().find(|a| a.name == name)?.i);
        let cache = graph.input.iter().find(|input| Some(&input.name) == core.input.get(3))?;
        let width = cache.type_.tensor_type().shape.dim.last()?.dim_value();
        let (heads, groups) = (count("num_heads")?, count("kv_num_heads")?);
        Some(vec![heads * width, groups * width, groups * width])
    })
    .ok_or_else(|| Error::Form {
        node: place.to_owned(),
        expected: "a split into queries, keys and values",
    })
}

/// The first node, in branches too, that splits `all`.
fn find_split<'a>(nodes: &'a [NodeProto], all: &str) -> Option<&'a NodeProto> {
    nodes.iter().find_map(|node| {
        if node.op_type == "Split" && node.input.first().is_some_and(|x| x == all) {
            return Some(node);
        }
        let mut branches = node.attribute.iter().filter_map(|attribute| attribute.g.as_ref());
        branches.find_map(|branch| find_split(&branch.node, all))
    })
}

/// Makes the splits of `all` into queries, keys and values splits into the last two.
fn narrow_split(nodes: &mut [NodeProto], all: &str, sizes: &[i64]) {
    let splits = nodes.iter_mut().filter(|node| node.op_type == "Split" && node.input[0] == all);
    for split in splits.filter(|split| split.output.len() == 3) {
        split.input[1] = format!("shapes.split.{}.{}", sizes[1], sizes[2]);
        split.output.remove(0);
    }
}

/// Makes the `GroupQueryAttention` at `at` append: keys stand for the queries.
fn append_alone(nodes: &mut Vec<NodeProto>, at: usize, all: &str, sizes: Option<&[i64]>) {
    let groups = nodes[at].attribute.iter().find(|a| a.name == "kv_num_heads").map_or(0, |a| a.i);
    for attribute in nodes[at].attribute.iter_mut().filter(|a| a.name == "num_heads") {
        attribute.i = groups;
    }
    let Some(sizes) = sizes else {
        nodes[at].input[0] = nodes[at].input[1].clone();
        return;
    };
    let place = nodes[at].output[0].clone();
    let parts = ["k", "v"].map(|part| format!("{place}.{part}"));
    let split = NodeProto {
        name: format!("/{place}.split"),
        op_type: "Split".to_owned(),
        input: vec![all.to_owned(), format!("shapes.split.{}.{}", sizes[1], sizes[2])],
        output: parts.to_vec(),
        attribute: vec![super::int("axis", -1)],
        ..Default::default()
    };
    let [k, v] = parts;
    nodes[at].input.splice(..3, [k.clone(), k, v]);
    nodes.insert(at, split);
}

/// The projection at `at`, a product or a sum of one and a bias, without its first `queries` of `queries +
/// rest` heads.
fn project(graph: &mut GraphProto, at: usize, queries: i64, rest: i64) -> Result<(), Error> {
    let node = &graph.node[at];
    let rows_first = match node.op_type.as_str() {
        "FusedMatMul" => node.attribute.iter().any(|a| a.name == "transB" && a.i == 1),
        "MatMulNBits" | "Add" => true,
        _ => false,
    };
    if !rows_first {
        return Err(form(node, "a weight with one row per output"));
    }
    let (name, operands) = (node.name.clone(), node.input[1..].to_vec());
    if node.op_type == "Add" {
        let product =
            producer(&graph.node, &node.input[0]).ok_or_else(|| form(node, "a product"))?;
        project(graph, product, queries, rest)?;
    }
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

/// A constant vector of integers under `name`, added where there is none yet.
fn constant(graph: &mut GraphProto, name: &str, values: &[i64]) {
    if !graph.initializer.iter().any(|tensor| tensor.name == name) {
        graph.initializer.push(TensorProto {
            name: name.to_owned(),
            dims: vec![values.len() as i64],
            data_type: onnx_protobuf::tensor_proto::DataType::INT64 as i32,
            raw_data: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            ..Default::default()
        });
    }
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

fn producer(nodes: &[NodeProto], value: &str) -> Option<usize> {
    nodes.iter().position(|node| node.output.iter().any(|output| output == value))
}

fn form(node: &NodeProto, expected: &'static str) -> Error {
    Error::Form { node: node.name.clone(), expected }
}
