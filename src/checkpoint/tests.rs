//! The oracle cases, read whole.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::path::{Path, PathBuf};

use skipgpt_passes::ir::{
    Architecture, DType, KeyValue, Phase, RopeScaling, Router, Routing, Source, Weight,
};

use super::*;

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle").join(name)
}

/// Reads a case; `router` and `adapter` are names in its directory.
fn read_case(name: &str, router: &str, adapter: Option<&str>) -> Checkpoint {
    let directory = case(name);
    let (router, adapter) = (directory.join(router), adapter.map(|name| directory.join(name)));
    read(&Request {
        model: Some(&directory),
        router: Some(&router),
        adapter: adapter.as_deref(),
        lora_alpha: adapter.as_deref().filter(|path| path.is_file()).map(|_| 8.0),
    })
    .unwrap()
}

fn router(routing: &Routing) -> &Router {
    match routing {
        Routing::Routed { source: Source::Own(router), dispatch: None } => router,
        other => panic!("{other:?}"),
    }
}

/// Values of every tensor the model names, by name.
fn values(checkpoint: &Checkpoint) -> Vec<(String, Vec<f32>)> {
    checkpoint
        .sources
        .iter()
        .map(|stored| {
            let weight = Weight::Stored(stored.clone());
            let values = crate::weights::values(&weight, &checkpoint.sources).unwrap();
            (stored.name.clone(), values)
        })
        .collect()
}

#[test]
fn llama_with_shared_heads_and_a_tied_head() {
    let checkpoint = read_case("llama-gqa", "router.safetensors", Some("adapter"));
    let model = &checkpoint.model;
    assert_eq!(model.phase, Phase::Imported);
    assert_eq!(model.layers.len(), 4);
    assert_eq!(model.config.num_key_value_heads, 2);
    assert_eq!(model.head.weight, model.embedding);
    let attention = model.layers[3].attention.as_ref().unwrap();
    let lora = attention.q.lora.as_ref().unwrap();
    assert_eq!(lora.scale.to_bits(), 2.0f64.to_bits());
    assert_eq!(lora.down.name, "model.layers.3.self_attn.q_proj.lora_A.weight");
    assert_eq!(lora.down.shape, [4, 64]);
    let KeyValue::Separate { k, v } = &attention.kv else { panic!("{:?}", attention.kv) };
    assert!(k.lora.is_none() && v.lora.is_some());
    assert!(router(&attention.routing).hidden.is_none());
    let names: Vec<_> = checkpoint
        .files
        .iter()
        .map(|path| path.strip_prefix(&checkpoint.directory).unwrap().to_str().unwrap())
        .collect();
    let adapter = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"];
    assert_eq!(
        names,
        ["config.json", "model.safetensors", "router.safetensors", adapter[0], adapter[1]]
    );
}

#[test]
fn the_same_tensors_come_from_pth_and_safetensors() {
    let plain = read_case("llama-gqa", "router.safetensors", Some("adapter"));
    let pickled = read_case("llama-gqa", "router.pth", Some("lora.pth"));
    assert_eq!(plain.model, pickled.model);
    assert_eq!(values(&plain), values(&pickled));
}

#[test]
fn routers_of_two_layers_come_from_the_training_codes_whole_model_too() {
    let plain = read_case("llama-mha-llama3rope", "router.safetensors", None);
    let whole = read_case("llama-mha-llama3rope", "model.pth", None);
    assert_eq!(plain.model, whole.model);
    assert_eq!(values(&plain), values(&whole));
    let mlp = plain.model.layers[0].mlp.as_ref().unwrap();
    let hidden = router(&mlp.routing).hidden.as_ref().unwrap();
    assert_eq!(hidden.weight.shape(), [16, 64]);
    assert_ne!(plain.model.head.weight, plain.model.embedding);
    assert_eq!(
        plain.model.config.rope.scaling,
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64
        }
    );
}

#[test]
fn shards_are_read_through_their_index() {
    let checkpoint = read_case("llama-bf16-sharded", "router.safetensors", None);
    assert_eq!(checkpoint.files.len(), 8);
    assert_eq!(checkpoint.model.embedding.dtype(), DType::BF16);
    let attention = checkpoint.model.layers[0].attention.as_ref().unwrap();
    assert_eq!(router(&attention.routing).output.weight.dtype(), DType::F32);
}

#[test]
fn qwen2_has_biases_on_q_k_and_v() {
    let checkpoint = read_case("qwen2-bias", "router.safetensors", Some("adapter"));
    assert_eq!(checkpoint.model.config.architecture, Architecture::Qwen2);
    let attention = checkpoint.model.layers[0].attention.as_ref().unwrap();
    let KeyValue::Separate { k, v } = &attention.kv else { panic!("{:?}", attention.kv) };
    assert!(attention.q.bias.is_some() && k.bias.is_some() && v.bias.is_some());
    assert!(attention.o.bias.is_none());
}

#[test]
fn without_routers_every_module_always_runs() {
    let directory = case("llama-gqa");
    let checkpoint = read(&Request { model: Some(&directory), ..Request::default() }).unwrap();
    let layer = &checkpoint.model.layers[0];
    assert_eq!(layer.attention.as_ref().unwrap().routing, Routing::Always);
    assert_eq!(layer.mlp.as_ref().unwrap().routing, Routing::Always);
}
