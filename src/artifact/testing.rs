//! A checkpoint of a few hundred bytes on disk, and a graph over its tensors.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use skipgpt_passes::ir::{
    Architecture, Attention, Config, DType, Dispatch, GateUp, KeyValue, Layer, Linear, Mlp, Model,
    Phase, Rope, RopeScaling, Routing, SharedRouter, Source, Stored, Weight,
};
use skipgpt_passes::plan::Plan;

use super::manifest::{Format, Manifest, Options, Weights};
use super::{Error, Progress, Request, write};
use crate::checkpoint::Checkpoint;
use crate::onnx::graph::{Data, Dim, Element, Graph, Initializer, Node, Value};
use crate::sources::Sources;

/// Query heads are twice the key/value heads; `head_dim` is not `hidden / heads`.
pub(crate) fn config() -> Config {
    Config {
        architecture: Architecture::Llama,
        hidden_size: 4,
        vocab_size: 6,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        max_position_embeddings: 32,
        num_hidden_layers: 2,
    }
}

/// Names and shapes of the tensors in the checkpoint's file, in file order.
const TENSORS: &[(&str, &[usize])] = &[
    ("embedding", &[6, 4]),
    ("q", &[8, 4]),
    ("k", &[4, 4]),
    ("v", &[4, 4]),
    ("o", &[4, 8]),
    ("gate", &[3, 4]),
    ("up", &[3, 4]),
    ("down", &[4, 3]),
    ("norm", &[4]),
    ("router", &[4, 4]),
];

pub(crate) fn stored(name: &str) -> Weight {
    let (name, shape) = TENSORS.iter().find(|(found, _)| *found == name).unwrap();
    Weight::Stored(Stored { name: (*name).into(), shape: shape.to_vec(), dtype: DType::F32 })
}

fn linear(name: &str) -> Linear {
    Linear { weight: stored(name), bias: None, lora: None }
}

/// Two layers over the same tensors; the second lacks its attention, both MLPs are routed.
pub(crate) fn model() -> Model {
    let routed = |slot| Routing::Routed {
        source: Source::Shared { slot },
        dispatch: Some(Dispatch::Conditional),
    };
    let mlp = || Mlp {
        norm: stored("norm"),
        gate_up: GateUp::Separate { gate: linear("gate"), up: linear("up") },
        down: linear("down"),
        routing: routed(0),
    };
    let router = || SharedRouter { hidden: None, output: linear("router"), decisions: 2 };
    let attention = Attention {
        norm: stored("norm"),
        q: linear("q"),
        kv: KeyValue::Separate { k: linear("k"), v: linear("v") },
        o: linear("o"),
        q_norm: None,
        k_norm: None,
        routing: Routing::Always,
    };
    Model {
        phase: Phase::Lowered,
        config: config(),
        embedding: stored("embedding"),
        layers: vec![
            Layer {
                index: 0,
                router: Some(router()),
                attention: Some(attention),
                mlp: Some(mlp()),
            },
            Layer { index: 1, router: Some(router()), attention: None, mlp: Some(mlp()) },
        ],
        norm: stored("norm"),
        head: linear("embedding"),
    }
}

/// What led to [`model`].
pub(crate) fn plan() -> Plan {
    use skipgpt_passes::ir::{ModuleId, ModuleKind};
    Plan {
        removed: vec![ModuleId { layer: 1, kind: ModuleKind::Attention }],
        always: vec![ModuleId { layer: 0, kind: ModuleKind::Attention }],
        fuse_key_value: false,
        fuse_gate_up: false,
        quantization: None,
        attention_dispatch: Dispatch::Gathered,
        mlp_dispatch: Dispatch::Conditional,
    }
}

pub(crate) fn initializer(name: &str, weight: Weight) -> Initializer {
    Initializer {
        name: name.into(),
        element: Element::Float(DType::F32),
        shape: weight.shape(),
        data: Data::Weight(weight),
    }
}

/// `logits = hidden · embeddingᵀ`, with every tensor of the checkpoint as a weight.
pub(crate) fn graph() -> Graph {
    let value = |name: &str, last| Value {
        name: name.into(),
        element: Element::Float(DType::F32),
        shape: vec![Dim::Symbolic("batch"), Dim::Fixed(last)],
    };
    let mut initializers: Vec<_> = TENSORS.iter().map(|(n, _)| initializer(n, stored(n))).collect();
    // The same weight under a second name takes no second place.
    initializers.push(initializer("head", stored("embedding")));
    Graph {
        name: "model".into(),
        inputs: vec![value("hidden", 4)],
        outputs: vec![value("logits", 6)],
        nodes: vec![Node {
            name: "head/Gemm".into(),
            op: "Gemm",
            domain: "",
            inputs: vec!["hidden".into(), "head".into()],
            outputs: vec!["logits".into()],
            attributes: vec![("transB", crate::onnx::graph::Attribute::Int(1))],
        }],
        initializers,
    }
}

/// Writes the checkpoint into `directory`; element `i` of the file is `values(i)`.
pub(crate) fn checkpoint(directory: &Path, values: impl Fn(usize) -> f32) -> Checkpoint {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    let mut offsets = Vec::new();
    for (name, shape) in TENSORS {
        let start = data.len();
        let count = shape.iter().product::<usize>();
        let numbers = (0..count).map(|i| values(start / 4 + i));
        data.extend(numbers.flat_map(f32::to_le_bytes));
        let entry = serde_json::json!({
            "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()],
        });
        header.insert((*name).to_owned(), entry);
        offsets.push(start);
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(&header);
    let base = bytes.len();
    bytes.extend(data);
    let path = directory.join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    fs::write(directory.join("config.json"), r#"{"eos_token_id": 2, "bos_token_id": 1}"#).unwrap();
    fs::write(directory.join("tokenizer.json"), "{}").unwrap();
    let (file, shared) = (Arc::new(File::open(&path).unwrap()), Arc::new(path.clone()));
    let mut sources = Sources::new();
    for ((name, _), offset) in TENSORS.iter().zip(offsets) {
        let Weight::Stored(stored) = stored(name) else { continue };
        let offset = (base + offset) as u64;
        sources.insert_file(stored, Arc::clone(&file), Arc::clone(&shared), offset).unwrap();
    }
    Checkpoint {
        model: model(),
        sources,
        directory: directory.to_path_buf(),
        files: vec![directory.join("config.json"), path],
    }
}

pub(crate) fn options(weights: Weights) -> Options {
    Options {
        format: Format::Onnx,
        dtype: DType::F32,
        weights,
        dispatch: None,
        emit_routing: false,
        attention: crate::onnx::Attention::Decomposed,
        logits: crate::decoder::Logits::All,
        sequences: crate::decoder::Sequences::Any,
        prune_below: Some(0.1),
        always_above: None,
    }
}

/// A folder with a checkpoint in it, and everything an export needs.
pub(crate) struct Bench {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) model: Model,
    pub(crate) graph: Graph,
    pub(crate) plan: Plan,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(|i| i as f32)
    }

    pub(crate) fn with(values: impl Fn(usize) -> f32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("checkpoint");
        fs::create_dir(&directory).unwrap();
        let checkpoint = checkpoint(&directory, values);
        Self { folder, checkpoint, model: model(), graph: graph(), plan: plan() }
    }

    pub(crate) fn output(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn request<'a>(&'a self, output: &'a Path, weights: Weights) -> Request<'a> {
        Request {
            output,
            force: false,
            model: &self.model,
            graph: &self.graph,
            checkpoint: &self.checkpoint,
            plan: &self.plan,
            passes: &["merge-lora", "freeze-routers"],
            options: options(weights),
            min_onnxruntime: "1.22",
        }
    }

    pub(crate) fn export(&self, name: &str, weights: Weights) -> Result<Manifest, Error> {
        write(&self.request(&self.output(name), weights), &mut go_on)
    }

    /// What lies in the folder, hidden files included.
    pub(crate) fn listing(&self) -> Vec<String> {
        list(self.folder.path())
    }
}

pub(crate) fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

pub(crate) fn list(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
