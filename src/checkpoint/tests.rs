//! The oracle cases, read whole.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use skipgpt_passes::ir::{
    Architecture, DType, GateUp, KeyValue, ModuleKind, Phase, RopeScaling, Router, Routing, Source,
    Weight,
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

#[test]
fn heads_wider_than_their_share_and_adapters_on_every_projection() {
    let checkpoint = read_case("mistral-wide-heads", "router.safetensors", Some("adapter"));
    let model = &checkpoint.model;
    assert_eq!(model.config.architecture, Architecture::Mistral);
    assert_eq!(model.config.head_dim, 22);
    let layer = &model.layers[2];
    let (attention, mlp) = (layer.attention.as_ref().unwrap(), layer.mlp.as_ref().unwrap());
    assert_eq!(attention.q.weight.shape(), [88, 48]);
    let KeyValue::Separate { k, v } = &attention.kv else { panic!("{:?}", attention.kv) };
    let GateUp::Separate { gate, up } = &mlp.gate_up else { panic!("{:?}", mlp.gate_up) };
    for linear in [&attention.q, k, v, &attention.o, gate, up, &mlp.down, &model.head] {
        let lora = linear.lora.as_ref().unwrap();
        assert_eq!(lora.scale.to_bits(), (5.0f64 / 3.0).to_bits());
        assert_eq!(lora.up.shape, [linear.weight.rows(), 3]);
    }
}

#[test]
fn qwen3_has_norms_on_the_heads_of_q_and_k() {
    let checkpoint = read_case("qwen3-head-norm", "router.safetensors", Some("adapter"));
    let attention = checkpoint.model.layers[0].attention.as_ref().unwrap();
    assert_eq!(attention.q_norm.as_ref().unwrap().shape(), [16]);
    assert_eq!(attention.k_norm.as_ref().unwrap().shape(), [16]);
    // Its router file has PEFT's prefix; the names in the model do not.
    let hidden = router(&attention.routing).hidden.as_ref().unwrap();
    let expected = "model.layers.0.router_attention.hidden_layer.weight";
    assert_eq!(hidden.weight.stored()[0].name, expected);
}

#[test]
fn llama_can_have_biases_everywhere() {
    let checkpoint = read_case("llama-biases-linear-rope", "router.safetensors", Some("adapter"));
    let layer = &checkpoint.model.layers[0];
    let (attention, mlp) = (layer.attention.as_ref().unwrap(), layer.mlp.as_ref().unwrap());
    let KeyValue::Separate { k, v } = &attention.kv else { panic!("{:?}", attention.kv) };
    let GateUp::Separate { gate, up } = &mlp.gate_up else { panic!("{:?}", mlp.gate_up) };
    for linear in [&attention.q, k, v, &attention.o, gate, up, &mlp.down] {
        assert_eq!(linear.bias.as_ref().unwrap().shape(), [linear.weight.rows()]);
    }
    assert_eq!(checkpoint.model.config.rope.scaling, RopeScaling::Linear { factor: 4.0 });
}

#[test]
fn half_precision_is_kept_as_it_is_stored() {
    let checkpoint = read_case("llama-bf16-rslora", "router.safetensors", Some("adapter"));
    let attention = checkpoint.model.layers[0].attention.as_ref().unwrap();
    let lora = attention.q.lora.as_ref().unwrap();
    assert_eq!((attention.q.weight.dtype(), lora.down.dtype), (DType::BF16, DType::BF16));
    assert_eq!(lora.scale.to_bits(), 1.5f64.to_bits()); // 3 / √4
    let checkpoint = read_case("llama-f16", "router.safetensors", None);
    let attention = checkpoint.model.layers[0].attention.as_ref().unwrap();
    assert_eq!(attention.q.weight.dtype(), DType::F16);
    assert_eq!(router(&attention.routing).output.weight.dtype(), DType::F16);
}

#[test]
fn the_real_routers_fit_a_model_of_thirty_layers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/smollm2-135m/router.pth");
    let mut routers = router::Routers::open(&path).unwrap();
    routers.check_layers(30).unwrap();
    let mut sources = Sources::new();
    for layer in 0..30 {
        for kind in [ModuleKind::Attention, ModuleKind::Mlp] {
            routers.take(layer, kind, 576, &mut sources).unwrap();
        }
    }
    assert_eq!(sources.iter().count(), 120);
}

/// A copy of a sharded case's files, as `place` puts them into `folder`.
fn shards(folder: &Path, place: impl Fn(&Path, &Path)) {
    for entry in std::fs::read_dir(case("llama-bf16-sharded")).unwrap() {
        let from = entry.unwrap().path();
        place(&from, &folder.join(from.file_name().unwrap()));
    }
}

/// The Hugging Face cache: a snapshot is a directory of links into `blobs`.
#[test]
fn shards_may_be_links_into_the_hub_cache() {
    let cache = tempfile::tempdir().unwrap();
    let (snapshot, blobs) = (cache.path().join("snapshots/1"), cache.path().join("blobs"));
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir(&blobs).unwrap();
    shards(&snapshot, |from, to| {
        let name = from.file_name().unwrap();
        std::fs::copy(from, blobs.join(name)).unwrap();
        symlink(Path::new("../../blobs").join(name), to).unwrap();
    });
    let request = Request { model: Some(&snapshot), ..Request::default() };
    assert_eq!(read(&request).unwrap().model.layers.len(), 4);
}

#[test]
fn shards_that_are_links_to_elsewhere_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    shards(folder.path(), |from, to| symlink(from, to).unwrap());
    let error = read(&Request { model: Some(folder.path()), ..Request::default() }).unwrap_err();
    let Error::Directory(directory::Error::ShardLink { path, .. }) = error else {
        panic!("{error}");
    };
    assert_eq!(path.file_name().unwrap(), "model-00001-of-00005.safetensors");
}

/// A case's config, and its tensors in one file with those of the files `more`.
fn single(folder: &Path, name: &str, more: &[&str]) {
    let directory = case(name);
    std::fs::copy(directory.join("config.json"), folder.join("config.json")).unwrap();
    let files: Vec<_> = ["model.safetensors"]
        .iter()
        .chain(more)
        .map(|file| std::fs::read(directory.join(file)).unwrap())
        .collect();
    let files: Vec<_> =
        files.iter().map(|bytes| ::safetensors::SafeTensors::deserialize(bytes).unwrap()).collect();
    let tensors = files.iter().flat_map(::safetensors::SafeTensors::tensors);
    let bytes = ::safetensors::serialize(tensors, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
}

#[test]
fn routers_among_the_checkpoints_own_tensors_are_used() {
    let folder = tempfile::tempdir().unwrap();
    single(folder.path(), "llama-gqa", &["router.safetensors"]);
    let own = read(&Request { model: Some(folder.path()), ..Request::default() }).unwrap();
    assert_eq!(own.model, read_case("llama-gqa", "router.safetensors", None).model);
    assert_eq!(own.files.len(), 2);
    // A router file that is named comes first.
    let other = case("llama-gqa").join("router.pth");
    let request =
        Request { model: Some(folder.path()), router: Some(&other), ..Request::default() };
    assert_eq!(read(&request).unwrap().files[2], other);
}

#[test]
fn a_tied_head_may_be_stored_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = std::fs::read(case("llama-gqa").join("model.safetensors")).unwrap();
    let file = ::safetensors::SafeTensors::deserialize(&file).unwrap();
    let mut tensors = file.tensors();
    tensors.push(("lm_head.weight".into(), file.tensor(names::EMBEDDING).unwrap()));
    let bytes = ::safetensors::serialize(tensors, None).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let config = case("llama-gqa").join("config.json");
    std::fs::copy(config, folder.path().join("config.json")).unwrap();
    let checkpoint = read(&Request { model: Some(folder.path()), ..Request::default() }).unwrap();
    assert_eq!(checkpoint.model.head.weight, checkpoint.model.embedding);
    assert!(checkpoint.sources.stored("lm_head.weight").is_none());
}

#[test]
fn what_is_no_directory_or_no_file_is_refused() {
    assert!(matches!(read(&Request::default()), Err(Error::NoModel)));
    let file = case("llama-gqa").join("config.json");
    let error = read(&Request { model: Some(&file), ..Request::default() }).unwrap_err();
    assert!(matches!(error, Error::NotADirectory { .. }), "{error}");
    let (model, router) = (case("llama-gqa"), Path::new("/dev/null").to_owned());
    let named = router.with_file_name("null.pth");
    for router in [&router, &named] {
        let request = Request { model: Some(&model), router: Some(router), ..Request::default() };
        assert!(matches!(read(&request), Err(Error::Router(_))));
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("config.json")).unwrap();
    let error = read(&Request { model: Some(folder.path()), ..Request::default() }).unwrap_err();
    assert!(error.to_string().ends_with("config.json: not a regular file"), "{error}");
}
