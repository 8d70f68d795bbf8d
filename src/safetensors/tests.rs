//! What is written is read back by the checkpoint reader, value by value.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use serde_json::{Value, json};
use skipgpt_passes::ir::{Dispatch, Model, ModuleKind, Routing, Source};
use skipgpt_passes::validate::validate;
use skipgpt_passes::{registry, run};

use super::*;
use crate::artifact::testing::{go_on, list, options};
use crate::checkpoint;

fn module(layer: usize, kind: ModuleKind) -> ModuleId {
    ModuleId { layer, kind }
}

fn plan(removed: &[ModuleId], always: &[ModuleId]) -> Plan {
    Plan {
        removed: removed.to_vec(),
        always: always.to_vec(),
        fuse_key_value: false,
        fuse_gate_up: false,
        quantization: None,
        attention_dispatch: Dispatch::Masked,
        mlp_dispatch: Dispatch::Masked,
    }
}

/// A case of the oracle, and a folder for what is made of it.
struct Case {
    folder: tempfile::TempDir,
    checkpoint: Checkpoint,
    model: Model,
    plan: Plan,
}

impl Case {
    fn new(name: &str, adapter: bool, plan: Plan) -> Self {
        let directory =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle").join(name);
        let (router, adapter_path) =
            (directory.join("router.safetensors"), directory.join("adapter"));
        let checkpoint = checkpoint::read(&checkpoint::Request {
            model: Some(&directory),
            router: Some(&router),
            adapter: adapter.then_some(&*adapter_path),
            ..Default::default()
        })
        .unwrap();
        let mut model = checkpoint.model.clone();
        run(registry::through("prune-modules").unwrap(), &mut model, &plan, |_, _| {}).unwrap();
        Self { folder: tempfile::tempdir().unwrap(), checkpoint, model, plan }
    }

    fn write(&self, name: &str, dtype: Option<DType>) -> Result<Manifest, Error> {
        self.write_with(name, dtype, &mut go_on)
    }

    fn write_with(
        &self,
        name: &str,
        dtype: Option<DType>,
        progress: OnProgress<'_>,
    ) -> Result<Manifest, Error> {
        let request = Request {
            output: &self.folder.path().join(name),
            force: false,
            model: validate(&self.model).unwrap(),
            checkpoint: &self.checkpoint,
            plan: &self.plan,
            passes: &["merge-lora", "freeze-routers", "prune-modules"],
            options: options(manifest::Weights::Copy),
            dtype,
        };
        write(&request, progress)
    }

    fn read(&self, name: &str) -> Checkpoint {
        let directory = self.folder.path().join(name);
        let router = directory.join(ROUTERS);
        checkpoint::read(&checkpoint::Request {
            model: Some(&directory),
            router: router.is_file().then_some(&*router),
            ..Default::default()
        })
        .unwrap()
    }

    fn config(&self, name: &str) -> Value {
        let bytes = fs::read(self.folder.path().join(name).join("config.json")).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }
}

/// Every weight's values, by its path.
fn values(model: &Model, sources: &Sources) -> BTreeMap<String, Vec<f32>> {
    let weights = model.weights().into_iter();
    weights.map(|(path, weight)| (path, weights::values(weight, sources).unwrap())).collect()
}

#[test]
fn a_merged_checkpoint_reads_back_as_the_same_model() {
    for name in ["llama-gqa", "llama-mha-llama3rope", "qwen2-bias"] {
        let case = Case::new(name, true, plan(&[], &[]));
        case.write("out", None).unwrap();
        let back = case.read("out");
        assert!(back.model.linears().iter().all(|(_, linear)| linear.lora.is_none()));
        assert_eq!(back.model.config, case.model.config);
        let expected = values(&case.model, &case.checkpoint.sources);
        assert!(values(&back.model, &back.sources) == expected, "{name}");
        crate::artifact::open(&case.folder.path().join("out"))
            .unwrap()
            .verify_hashes(&mut go_on)
            .unwrap();
    }
}

#[test]
fn dtypes_stay_or_become_what_was_asked() {
    let case = Case::new("llama-bf16-sharded", false, plan(&[], &[]));
    let manifest = case.write("own", None).unwrap();
    assert_eq!(manifest.options.dtype, DType::BF16);
    assert_eq!(case.config("own")["dtype"], json!("bfloat16"));
    let names = list(&case.folder.path().join("own"));
    let weights: Vec<_> = names.iter().filter(|name| name.ends_with("safetensors")).collect();
    assert_eq!(weights, [MODEL, ROUTERS]);
    let back = case.read("own");
    let expected = values(&case.model, &case.checkpoint.sources);
    assert!(values(&back.model, &back.sources) == expected);
    case.write("half", Some(DType::F16)).unwrap();
    let back = case.read("half");
    for (path, weight) in back.model.weights() {
        let dtype = if path.contains("router") { DType::F32 } else { DType::F16 };
        assert_eq!(weight.dtype(), dtype, "{path}");
    }
}

#[test]
fn whole_layers_are_gone_and_the_rest_renumbered() {
    let layer = [module(1, ModuleKind::Attention), module(1, ModuleKind::Mlp)];
    let case = Case::new("llama-gqa", false, plan(&layer, &[]));
    case.write("out", None).unwrap();
    let config = case.config("out");
    assert_eq!((&config["num_hidden_layers"], config.get("block_configs")), (&json!(3), None));
    let back = case.read("out");
    let all = values(&case.model, &case.checkpoint.sources);
    for (path, found) in values(&back.model, &back.sources) {
        let before = path.replace("layers.2", "layers.3").replace("layers.1", "layers.2");
        assert!(found == all[&before], "{path}");
    }
}

#[test]
fn modules_removed_alone_are_no_ops_in_block_configs() {
    let case = Case::new("llama-gqa", false, plan(&[module(1, ModuleKind::Attention)], &[]));
    case.write("out", None).unwrap();
    let config = case.config("out");
    assert_eq!(config["architectures"], json!(["DeciLMForCausalLM"]));
    assert_eq!(config["model_type"], json!("nemotron-nas"));
    let no_op = |part: &str| -> Vec<_> {
        let blocks = config["block_configs"].as_array().unwrap();
        blocks.iter().map(|block| block[part]["no_op"].as_bool().unwrap()).collect()
    };
    assert_eq!(no_op("attention"), [false, true, false, false]);
    assert_eq!(no_op("ffn"), [false; 4]);
    assert_eq!(config["block_configs"][0]["attention"]["n_heads_in_group"], json!(2));
    assert_eq!(config["block_configs"][0]["ffn"]["intermediate_size"], json!(160));
    let bytes = fs::read(case.folder.path().join("out").join(MODEL)).unwrap();
    let tensors = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let names = tensors.names();
    assert!(!names.iter().any(|name| name.starts_with("model.layers.1.self_attn")));
    assert!(names.contains(&"model.layers.1.mlp.up_proj.weight"));
}

#[test]
fn what_the_form_cannot_say_is_refused_by_name() {
    let alone = |layer, kind| plan(&[module(layer, kind)], &[]);
    let first = Case::new("llama-gqa", false, alone(0, ModuleKind::Attention));
    let error = first.write("out", None).unwrap_err().to_string();
    assert!(error.starts_with("layers.0.attention: removed, but the first layer"), "{error}");
    let qwen = Case::new("qwen2-bias", false, alone(1, ModuleKind::Mlp));
    let error = qwen.write("out", None).unwrap_err().to_string();
    assert!(error.starts_with("layers.1.mlp: removed alone"), "{error}");
    assert!(list(qwen.folder.path()).is_empty());
}

#[test]
fn a_module_without_a_router_gets_one_that_keeps() {
    let always = module(2, ModuleKind::Mlp);
    let case = Case::new("llama-gqa", false, plan(&[], &[always]));
    case.write("out", None).unwrap();
    let back = case.read("out");
    let Some(Routing::Routed { source: Source::Own(router), .. }) = back.model.routing(always)
    else {
        panic!("{:?}", back.model.routing(always))
    };
    let weight = weights::values(&router.output.weight, &back.sources).unwrap();
    let bias = weights::values(router.output.bias.as_ref().unwrap(), &back.sources).unwrap();
    assert!(weight.iter().all(|value| *value == 0.0) && bias == [1.0, 0.0]);
}

#[test]
fn two_writes_have_the_same_bytes() {
    let case = Case::new("llama-gqa", true, plan(&[], &[]));
    let (one, two) = (case.folder.path().join("one"), case.folder.path().join("two"));
    case.write("one", None).unwrap();
    case.write("two", None).unwrap();
    assert_eq!(list(&one), list(&two));
    for name in list(&one) {
        assert!(fs::read(one.join(&name)).unwrap() == fs::read(two.join(&name)).unwrap(), "{name}");
    }
}

#[test]
fn an_interrupted_write_leaves_nothing() {
    let case = Case::new("llama-gqa", false, plan(&[], &[]));
    let error = case.write_with("out", None, &mut |_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, Error::Artifact(artifact::Error::Interrupted)), "{error}");
    assert!(list(case.folder.path()).is_empty());
}

#[test]
fn only_frozen_models_are_written() {
    let mut case = Case::new("llama-gqa", false, plan(&[], &[]));
    case.model = case.checkpoint.model.clone();
    let error = case.write("out", None).unwrap_err().to_string();
    assert_eq!(error, "the safetensors back end takes Frozen models; this one is Imported");
}
