//! A dense graph of a fixture without some of its modules, node by node.

use onnx_protobuf::{Message, TensorProto};
use skipgpt_passes::ir::DType;

use super::*;
use crate::decoder::{Logits, Sequences};
use crate::onnx::graph::{Data, Placement};
use crate::onnx::testing::lowered;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The model file of `case`, dense, or routed by its routers.
fn model(case: &str, routed: bool, dtype: DType) -> Result<Vec<u8>> {
    with_logits(case, routed, dtype, Logits::All)
}

fn with_logits(case: &str, routed: bool, dtype: DType, logits: Logits) -> Result<Vec<u8>> {
    let graph = lowered(case, routed, dtype, (logits, Sequences::Any))?;
    let mut placements = BTreeMap::new();
    let mut offset = 0;
    for tensor in graph.all_initializers().into_iter().filter(|t| matches!(t.data, Data::Weight(_)))
    {
        let length = tensor.size();
        let place = Placement { location: "weights".into(), offset, length };
        placements.insert(tensor.name.clone(), place);
        offset += length;
    }
    Ok(proto::encode(&graph, &placements, &[])?)
}

fn parsed(bytes: &[u8]) -> Result<GraphProto> {
    Ok(ModelProto::parse_from_bytes(bytes)?.graph.unwrap_or_default())
}

fn modules(named: &[(usize, ModuleKind)]) -> BTreeSet<ModuleId> {
    named.iter().map(|(layer, kind)| ModuleId { layer: *layer, kind: *kind }).collect()
}

fn count(graph: &GraphProto, op: &str) -> usize {
    graph.node.iter().filter(|node| node.op_type == op).count()
}

/// The node that gives `value`, as `op(inputs)`.
fn node(graph: &GraphProto, value: &str) -> String {
    let found = graph.node.iter().find(|node| node.output.iter().any(|output| output == value));
    found.map_or_else(String::new, |node| format!("{}({})", node.op_type, node.input.join(", ")))
}

#[test]
fn nothing_removed_is_the_same_graph() -> Result {
    let whole = model("llama-gqa", false, DType::F32)?;
    assert_eq!(parsed(&without(&whole, &BTreeSet::new())?)?, parsed(&whole)?);
    Ok(())
}

#[test]
fn an_mlp_leaves_one_norm_where_there_were_two() -> Result {
    let whole = model("llama-gqa", false, DType::F32)?;
    let graph = parsed(&without(&whole, &modules(&[(1, ModuleKind::Mlp)]))?)?;
    let before = parsed(&whole)?;
    // Three products, Sigmoid, two Mul, one of two norms.
    assert_eq!(before.node.len() - graph.node.len(), 7);
    assert_eq!(count(&before, SKIP_NORM) - count(&graph, SKIP_NORM), 1);
    assert_eq!(
        node(&graph, "layers.2.attention.norm"),
        "SkipSimplifiedLayerNormalization(layers.0.mlp.output, layers.1.attention.o, \
         layers.2.attention.norm.weight)"
    );
    assert_eq!(node(&graph, "layers.1.attention.output"), node(&graph, "layers.2.attention.norm"));
    let gone = |tensor: &TensorProto| tensor.name.starts_with("layers.1.mlp.");
    assert!(before.initializer.iter().any(gone) && !graph.initializer.iter().any(gone));
    Ok(())
}

#[test]
fn an_attention_module_leaves_keys_and_values() -> Result {
    let whole = model("llama-gqa", false, DType::F32)?;
    let graph = parsed(&without(&whole, &modules(&[(1, ModuleKind::Attention)]))?)?;
    let (before, after) = (weights(&whole)?, weights(&serialised(&graph)?)?);
    // 4 query heads of 4 + 2 + 2: half of the rows.
    let narrow = after["layers.1.attention.qkv.weight.without_queries"].bytes;
    assert_eq!(2 * narrow, before["layers.1.attention.qkv.weight"].bytes);
    assert!(!after.contains_key("layers.1.attention.o.weight"));
    let place = |graph: &GraphProto, name: &str| -> Option<u64> {
        let tensor = graph.initializer.iter().find(|tensor| tensor.name == name)?;
        tensor.external_data.iter().find(|entry| entry.key == "offset")?.value.parse().ok()
    };
    let old = place(&parsed(&whole)?, "layers.1.attention.qkv.weight").ok_or("no weight")?;
    let new = place(&graph, "layers.1.attention.qkv.weight.without_queries");
    assert_eq!(new, Some(old + narrow));
    let core = graph.node.iter().find(|node| node.output == ["present.1.key", "present.1.value"]);
    let branches = core.ok_or("no cache")?.attribute.iter().flat_map(|attribute| &attribute.g);
    let nodes: Vec<&NodeProto> = branches.flat_map(|branch| &branch.node).collect();
    let append = nodes.iter().find(|node| node.op_type == "GroupQueryAttention").ok_or("none")?;
    assert_eq!(append.input[0], append.input[1]);
    let heads = append.attribute.iter().filter(|a| a.name.ends_with("num_heads")).map(|a| a.i);
    assert_eq!(heads.collect::<Vec<_>>(), [2, 2]);
    assert!(!nodes.iter().any(|node| node.op_type == "Softmax" || node.name.contains(".q.")));
    assert_eq!(
        node(&graph, "layers.1.mlp.norm"),
        "SimplifiedLayerNormalization(layers.0.mlp.output, layers.1.mlp.norm.weight)"
    );
    assert_eq!(graph.output, parsed(&whole)?.output);
    assert_eq!(graph.input, parsed(&whole)?.input);
    Ok(())
}

#[test]
fn a_model_without_modules_keeps_its_caches() -> Result {
    for case in ["llama-gqa", "qwen2-bias", "qwen3-head-norm"] {
        let whole = model(case, false, DType::F32)?;
        let layers = 0..parsed(&whole)?.output.len() / 2;
        let all = layers.flat_map(|layer| {
            [ModuleKind::Attention, ModuleKind::Mlp].map(|kind| ModuleId { layer, kind })
        });
        let graph = parsed(&without(&whole, &all.collect())?)?;
        assert_eq!(graph.output, parsed(&whole)?.output, "{case}");
        assert_eq!((count(&graph, "Softmax"), count(&graph, SKIP_NORM)), (0, 0), "{case}");
        let names: HashSet<_> = graph.node.iter().flat_map(|node| node.output.clone()).collect();
        assert!(graph.output.iter().all(|output| names.contains(&output.name)), "{case}");
    }
    Ok(())
}

#[test]
fn the_last_rows_are_gathered_from_what_is_left() -> Result {
    let whole = with_logits("llama-gqa", false, DType::F32, Logits::Last)?;
    let without = |named: &[_]| parsed(&without(&whole, &modules(named))?);
    let last = parsed(&whole)?.output.len() / 2 - 1;
    let graph = without(&[(last, ModuleKind::Mlp)])?;
    assert_eq!(node(&graph, "norm"), "SimplifiedLayerNormalization(last, norm.weight)");
    let gathered = format!("layers.{last}.attention.output");
    assert_eq!(node(&graph, "last"), format!("GatherND({gathered}, last.columns_apart)"));
    let (x, change) =
        (format!("layers.{}.mlp.output", last - 1), format!("layers.{last}.attention.o"));
    assert_eq!(node(&graph, &gathered), format!("Add({x}, {change})"));
    assert_eq!(
        (node(&graph, "last.change"), count(&graph, "GatherND")),
        (String::new(), count(&parsed(&whole)?, "GatherND") - 1)
    );
    let graph = without(&[(last, ModuleKind::Attention), (last, ModuleKind::Mlp)])?;
    assert_eq!(node(&graph, "last"), format!("GatherND({x}, last.columns_apart)"));
    Ok(())
}

#[test]
fn half_precision_adds_and_norms_apart() -> Result {
    let whole = model("llama-gqa", false, DType::F16)?;
    let graph = parsed(&without(&whole, &modules(&[(1, ModuleKind::Mlp)]))?)?;
    assert_eq!(node(&graph, "layers.1.mlp.output"), "");
    assert!(node(&graph, "layers.2.attention.norm.input").contains("(layers.1.attention.output)"));
    Ok(())
}

#[test]
fn what_is_routed_or_absent_is_refused_by_name() -> Result {
    let mlp = modules(&[(1, ModuleKind::Mlp)]);
    let routed = without(&model("llama-gqa", true, DType::F32)?, &mlp);
    let message =
        "the graph has no layers.1.mlp that runs for every token: a dense artifact is needed";
    assert_eq!(routed.err().map(|error| error.to_string()).as_deref(), Some(message));
    let absent =
        without(&model("llama-gqa", false, DType::F32)?, &modules(&[(9, ModuleKind::Mlp)]));
    assert!(matches!(absent, Err(Error::NoModule(_))));
    Ok(())
}

fn serialised(graph: &GraphProto) -> Result<Vec<u8>> {
    let graph = protobuf::MessageField::some(graph.clone());
    Ok(ModelProto { graph, ..Default::default() }.write_to_bytes()?)
}
