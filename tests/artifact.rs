//! An artifact as its readers see it: the placements in `model.onnx` lead to the right bytes.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use onnx_protobuf::{GraphProto, Message, ModelProto, TensorProto};
use skipgpt_export::artifact::{self, manifest};
use skipgpt_export::checkpoint::{self, Checkpoint};
use skipgpt_export::decoder::{Logits, Sequences};
use skipgpt_export::onnx::{self, graph::Graph};
use skipgpt_export::weights;
use skipgpt_passes::ir::{DType, Dispatch, Model};
use skipgpt_passes::plan::Plan;
use skipgpt_passes::validate::validate;
use skipgpt_passes::{PASSES, run};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn read() -> Result<Checkpoint> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle/llama-gqa");
    Ok(checkpoint::read(&checkpoint::Request {
        model: Some(&directory),
        router: Some(&directory.join("router.safetensors")),
        ..Default::default()
    })?)
}

fn lower(checkpoint: &Checkpoint, fuse: bool) -> Result<(Model, Graph, Plan)> {
    let plan = Plan {
        removed: vec![],
        always: vec![],
        fuse_key_value: fuse,
        fuse_gate_up: fuse,
        quantization: None,
        attention_dispatch: Dispatch::Conditional,
        mlp_dispatch: Dispatch::Conditional,
    };
    let mut model = checkpoint.model.clone();
    run(PASSES, &mut model, &plan, |_, _| {})?;
    let attention = onnx::Attention::for_config(&model.config);
    let options = onnx::Options {
        dtype: DType::F32,
        emit_routing: true,
        attention,
        logits: Logits::All,
        sequences: Sequences::Any,
    };
    let graph = onnx::lower(validate(&model)?, options)?;
    Ok((model, graph, plan))
}

fn export(output: &Path, weights: manifest::Weights) -> Result<(Checkpoint, Graph)> {
    let checkpoint = read()?;
    let (model, graph, plan) = lower(&checkpoint, weights == manifest::Weights::Copy)?;
    let request = artifact::Request {
        output,
        force: false,
        model: &model,
        graph: &graph,
        checkpoint: &checkpoint,
        plan: &plan,
        passes: &[],
        options: manifest::Options {
            format: manifest::Format::Onnx,
            dtype: DType::F32,
            weights,
            dispatch: None,
            emit_routing: true,
            attention: onnx::Attention::for_config(&model.config),
            logits: Logits::All,
            sequences: Sequences::Any,
            prune_below: None,
            always_above: None,
        },
        min_onnxruntime: onnx::MINIMUM_ONNXRUNTIME,
    };
    artifact::write(&request, &mut |_| ControlFlow::Continue(()))?;
    Ok((checkpoint, graph))
}

/// Every external initializer of the file, by name, through its own location and offset.
fn external(directory: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    fn tensors<'a>(graph: &'a GraphProto, all: &mut Vec<&'a TensorProto>) {
        all.extend(&graph.initializer);
        let attributes = graph.node.iter().flat_map(|node| &node.attribute);
        attributes.flat_map(|attribute| &attribute.g).for_each(|branch| tensors(branch, all));
    }
    let model = ModelProto::parse_from_bytes(&fs::read(directory.join("model.onnx"))?)?;
    let (mut all, mut found) = (Vec::new(), BTreeMap::new());
    tensors(model.graph.get_or_default(), &mut all);
    for tensor in all.into_iter().filter(|t| !t.external_data.is_empty()) {
        let field = |key: &str| {
            let entry = tensor.external_data.iter().find(|entry| entry.key == key);
            entry.map(|entry| entry.value.clone()).ok_or(format!("{key} is missing"))
        };
        let file = fs::read(directory.join(field("location")?))?;
        let (offset, length): (usize, usize) =
            (field("offset")?.parse()?, field("length")?.parse()?);
        found.insert(tensor.name.clone(), file[offset..offset + length].to_vec());
    }
    Ok(found)
}

fn check(mode: manifest::Weights) -> Result {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("artifact");
    let (checkpoint, graph) = export(&output, mode)?;
    let found = external(&output)?;
    assert_eq!(found.len(), graph.weights().count());
    for (initializer, weight) in graph.weights() {
        let values = weights::values(weight, &checkpoint.sources)?;
        let expected: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert!(found[&initializer.name] == expected, "{}", initializer.name);
    }
    let artifact = artifact::open(&output)?;
    artifact.verify_hashes(&mut |_| ControlFlow::Continue(()))?;
    Ok(())
}

#[test]
fn copied_weights_are_where_the_graph_says() -> Result {
    check(manifest::Weights::Copy)
}

#[test]
fn linked_weights_are_where_the_graph_says() -> Result {
    check(manifest::Weights::Link)
}
