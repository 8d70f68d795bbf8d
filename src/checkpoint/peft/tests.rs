//! Scales against PEFT's own, and what is refused before a tensor is read.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Every adapter a model of llama-gqa's shapes finds in `path`: scale by projection.
fn scales(path: &Path, alpha: Option<f64>) -> BTreeMap<String, f64> {
    let (mut adapter, _) = Adapter::open(path, alpha).unwrap();
    let (mut sources, mut scales) = (Sources::new(), BTreeMap::new());
    for layer in 0..4 {
        for (part, shape) in [
            ("self_attn.q_proj", [64, 64]),
            ("self_attn.v_proj", [32, 64]),
            ("mlp.gate_proj", [160, 64]),
            ("mlp.down_proj", [64, 160]),
        ] {
            let target = names::layer(layer, part);
            if let Some(lora) = adapter.take(&target, shape, &mut sources).unwrap() {
                assert_eq!(lora.down.shape[0], lora.up.shape[1]);
                scales.insert(target, lora.scale);
            }
        }
    }
    adapter.finish(4).unwrap();
    scales
}

#[test]
fn scales_are_those_peft_computes() {
    let text = std::fs::read_to_string(fixture("peft/scales.json")).unwrap();
    let expected: BTreeMap<String, f64> = serde_json::from_str(&text).unwrap();
    let found = scales(&fixture("peft/adapter"), None);
    assert_eq!(found.len(), 12);
    assert_eq!(found, expected);
}

#[test]
fn alpha_is_divided_by_the_rank_a_pth_shows() {
    let found = scales(&fixture("oracle/llama-gqa/lora.pth"), Some(6.0));
    assert_eq!(found.len(), 12);
    assert!(found.values().all(|scale| scale.to_bits() == 1.5f64.to_bits()), "{found:?}");
}

/// As PEFT wrote adapters before it used safetensors.
#[test]
fn a_directory_may_hold_its_tensors_as_bin() {
    let folder = tempfile::tempdir().unwrap();
    let from = fixture("oracle/llama-gqa");
    std::fs::copy(from.join("adapter/adapter_config.json"), folder.path().join(CONFIG)).unwrap();
    std::fs::copy(from.join("lora.pth"), folder.path().join(TENSORS[1])).unwrap();
    assert_eq!(scales(folder.path(), None), scales(&from.join("adapter"), None));
}

#[track_caller]
fn refused(path: &Path, alpha: Option<f64>, expected: &str) {
    let error = Adapter::open(path, alpha).unwrap_err().to_string();
    let root = fixture("").display().to_string();
    assert_eq!(error.replace(&root, ""), expected);
}

#[test]
fn alpha_is_stated_once() {
    refused(
        &fixture("peft/adapter"),
        Some(8.0),
        "peft/adapter/adapter_config.json: states its own lora_alpha; leave --lora-alpha out",
    );
    let nan = "--lora-alpha is NaN; expected a finite number";
    refused(&fixture("oracle/llama-gqa/lora.pth"), Some(f64::NAN), nan);
}

#[test]
fn what_is_no_adapter_is_named() {
    refused(
        &fixture("peft/adapter/adapter_model.safetensors"),
        None,
        "peft/adapter/adapter_model.safetensors: name the adapter's directory, not this file: the scale stands in adapter_config.json beside it",
    );
    refused(
        &fixture("oracle/llama-gqa/router.pth"),
        Some(8.0),
        "oracle/llama-gqa/router.pth: holds no adapter; expected tensors called <projection>.lora_A.weight and <projection>.lora_B.weight",
    );
    refused(
        &fixture("oracle/llama-gqa/lora.txt"),
        Some(8.0),
        "oracle/llama-gqa/lora.txt: expected a file called *.safetensors, *.pth, *.pt or *.bin",
    );
}

/// Opens an adapter directory of PEFT's tensors and settings that `change` changed.
fn changed(change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let from = fixture("peft/adapter");
    let tensors = "adapter_model.safetensors";
    std::fs::copy(from.join(tensors), folder.path().join(tensors)).unwrap();
    let text = std::fs::read_to_string(from.join(CONFIG)).unwrap();
    let mut settings: serde_json::Map<_, _> = serde_json::from_str(&text).unwrap();
    change(&mut settings);
    std::fs::write(folder.path().join(CONFIG), Value::Object(settings).to_string()).unwrap();
    Adapter::open(folder.path(), None)
        .map(|_| ())
        .map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
}

#[test]
fn settings_that_change_nothing_are_ignored() {
    for (key, value) in [
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!(false)),
        ("layers_to_transform", json!([0, 2])),
        ("lora_dropout", json!(0.5)),
        ("task_type", json!("FEATURE_EXTRACTION")),
        ("use_future_variant", json!(null)),
    ] {
        assert_eq!(changed(|settings| drop(settings.insert(key.into(), value))), Ok(()), "{key}");
    }
}

#[test]
fn settings_that_change_the_numbers_are_refused_by_name() {
    for (key, value) in [
        ("alora_invocation_tokens", json!([1, 2])),
        ("layer_replication", json!([[0, 4], [2, 4]])),
        ("target_parameters", json!(["mlp.experts"])),
        ("trainable_token_indices", json!([7])),
        ("use_qalora", json!(true)),
        ("lora_bias", json!(true)),
        ("init_lora_weights", json!("olora")),
        ("corda_config", json!({"corda_method": "ipm"})),
        ("fan_in_fan_out", json!(true)),
        ("bias", json!("all")),
        ("r", json!(0)),
        ("r", json!("4")),
        ("lora_alpha", json!(null)),
        ("rank_pattern", json!([2])),
        ("use_rslora", json!("yes")),
    ] {
        let error = changed(|settings| drop(settings.insert(key.into(), value))).unwrap_err();
        assert!(error.starts_with(&format!("adapter_config.json: {key} is ")), "{error}");
    }
}
