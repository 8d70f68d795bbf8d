//! What each architecture's config means, and which values are refused.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use serde_json::{Map, json};
use skipgpt_passes::ir::{Rope, RopeScaling};

use super::*;

/// A config of `model_type` with `changes`; a `null` removes nothing, it stands there.
fn config(model_type: &str, changes: &Value) -> Result<Config, String> {
    let mut map = Map::new();
    let base = json!({
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    });
    for values in [&base, changes] {
        map.extend(values.as_object().unwrap().clone());
    }
    let path = Path::new("config.json");
    parse(&Keys { path, map: &map }).map_err(|error| error.to_string())
}

fn read_as(model_type: &str, changes: &Value) -> Config {
    config(model_type, changes).unwrap()
}

fn rope(changes: &Value) -> Rope {
    read_as("llama", changes).model.rope
}

#[track_caller]
fn refused(model_type: &str, changes: &Value, expected: &str) {
    assert_eq!(config(model_type, changes).unwrap_err(), expected);
}

#[test]
fn biases_are_those_of_each_architecture() {
    let bias = |model_type, changes: Value| read_as(model_type, &changes).bias;
    let all = |qkv, output, mlp| Bias { qkv, output, mlp };
    assert_eq!(bias("llama", json!({})), all(false, false, false));
    assert_eq!(
        bias("llama", json!({"attention_bias": true, "mlp_bias": true})),
        all(true, true, true)
    );
    assert_eq!(bias("mistral", json!({"sliding_window": null})), all(false, false, false));
    assert_eq!(bias("qwen2", json!({})), all(true, false, false));
    let qwen3 = |flag| json!({"head_dim": 16, "attention_bias": flag});
    assert_eq!(bias("qwen3", qwen3(false)), all(false, false, false));
    assert_eq!(bias("qwen3", qwen3(true)), all(true, true, false));
    refused(
        "qwen2",
        &json!({"attention_bias": false}),
        "config.json: attention_bias is false, which is not supported; a qwen2 model always has q, k and v biases",
    );
    refused(
        "mistral",
        &json!({"sliding_window": null, "mlp_bias": true}),
        "config.json: mlp_bias is true, which is not supported; only a llama model can have MLP biases",
    );
}

#[test]
fn head_width_is_stated_or_shared_evenly() {
    assert_eq!(read_as("llama", &json!({})).model.head_dim, 16);
    assert_eq!(read_as("llama", &json!({"head_dim": null})).model.head_dim, 16);
    assert_eq!(read_as("llama", &json!({"head_dim": 22})).model.head_dim, 22);
    refused(
        "llama",
        &json!({"head_dim": 21}),
        "config.json: head_dim 21 is odd; rotary embedding needs an even one",
    );
    refused(
        "llama",
        &json!({"hidden_size": 66}),
        "config.json: num_attention_heads 4 does not divide hidden_size 66; state head_dim",
    );
    refused("qwen3", &json!({}), "config.json: head_dim is missing; expected a whole number");
}

#[test]
fn key_value_heads_default_to_query_heads_where_transformers_has_it_so() {
    let null = json!({"num_key_value_heads": null});
    for model_type in ["llama", "qwen2"] {
        assert_eq!(read_as(model_type, &null).model.num_key_value_heads, 4);
    }
}

#[test]
fn rope_has_two_forms() {
    let plain = |theta| Rope { theta, scaling: RopeScaling::None };
    let linear = Rope { theta: 5e5, scaling: RopeScaling::Linear { factor: 4.0 } };
    assert_eq!(rope(&json!({})), plain(1e4));
    assert_eq!(rope(&json!({"rope_theta": 500_000})), plain(5e5));
    assert_eq!(rope(&json!({"rope_scaling": {"type": "default"}})), plain(1e4));
    assert_eq!(rope(&json!({"rope_parameters": {"rope_theta": 5e5}})), plain(5e5));
    assert_eq!(
        rope(&json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}})),
        linear
    );
    assert_eq!(
        rope(
            &json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}})
        ),
        linear
    );
    assert_eq!(
        rope(&json!({"rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        }}))
        .scaling,
        RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192
        }
    );
}

#[test]
fn rope_of_other_kinds_is_refused() {
    let llama = |changes: Value, expected: &str| refused("llama", &changes, expected);
    llama(
        json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        r#"config.json: rope_scaling.type is "dynamic", which is not supported; default, linear and llama3 are read"#,
    );
    llama(
        json!({"rope_scaling": {"factor": 2.0}}),
        "config.json: rope_scaling.rope_type is missing; expected default, linear or llama3",
    );
    llama(
        json!({"rope_scaling": {"type": "linear"}}),
        "config.json: rope_scaling.factor is missing; expected a number above 0",
    );
    llama(
        json!({"rope_scaling": {"type": "linear", "factor": -1}}),
        "config.json: rope_scaling.factor is -1; expected a number above 0",
    );
    llama(
        json!({"rope_scaling": [2.0]}),
        "config.json: rope_scaling is [2.0]; expected null or an object",
    );
    llama(
        json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        "config.json: rope_parameters.full_attention is an object, which is not supported; only one setting for all layers is read",
    );
    llama(
        json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        "config.json: rope_parameters.partial_rotary_factor is 0.5, which is not supported; rotary embedding must turn the whole head",
    );
    llama(
        json!({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}),
        "config.json: rope_theta is stated twice, as 10000 and as 20000; remove one",
    );
    llama(
        json!({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "default"}}),
        "config.json: rope_scaling and rope_parameters are both there; remove one",
    );
    llama(
        json!({"rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64
        }}),
        "config.json: rope_scaling: high_freq_factor 4 is not above low_freq_factor 4",
    );
}

#[test]
fn sliding_windows_are_refused_where_they_act() {
    read_as("llama", &json!({}));
    read_as("qwen2", &json!({"sliding_window": 4096, "use_sliding_window": false}));
    refused(
        "mistral",
        &json!({}),
        "config.json: sliding_window is missing; expected null (without the key, transformers takes a window of 4096)",
    );
    refused(
        "qwen2",
        &json!({"sliding_window": 4096, "use_sliding_window": true}),
        "config.json: use_sliding_window is true, which is not supported; only full attention is read; set it to false if no sequence will be longer than the window",
    );
}

/// Every key of the table is refused in use, and ignored where it says "not in use".
#[test]
fn unsupported_keys_are_refused_by_name_and_only_in_use() {
    for (key, unused, advice) in keys::UNSUPPORTED {
        assert!(!advice.is_empty());
        for value in [json!(null), json!(false), json!([]), json!({}), json!("")] {
            read_as("llama", &json!({ key: value }));
        }
        if let Some(unused) = unused {
            read_as("llama", &json!({ key: unused }));
        }
        for value in [json!(true), json!(7), json!("x"), json!([1]), json!({"a": 1})] {
            let error = config("llama", &json!({ key: value })).unwrap_err();
            assert!(error.starts_with(&format!("config.json: {key} is ")), "{error}");
        }
    }
    let keys: Vec<_> = keys::UNSUPPORTED.iter().map(|(key, ..)| key).collect();
    assert!(keys.is_sorted(), "{keys:?}");
}

#[test]
fn norms_of_heads_belong_to_qwen3() {
    assert!(read_as("qwen3", &json!({"head_dim": 16, "use_qk_norm": true})).head_norm);
    refused(
        "llama",
        &json!({"use_qk_norm": true}),
        "config.json: use_qk_norm is true, which is not supported; only qwen3 has norms on q and k",
    );
}

#[test]
fn metadata_and_unknown_keys_are_ignored() {
    let plain = read_as("llama", &json!({}));
    let more = json!({
        "_name_or_path": "somewhere", "torch_dtype": "bfloat16", "dtype": "bfloat16",
        "transformers_version": "5.23.0", "use_cache": true, "attention_dropout": 0.5,
        "bos_token_id": 1, "eos_token_id": [1, 2], "initializer_range": 0.1, "hidden_act": "silu",
        "an_unheard_of_key": {"a": [1, 2, 3]},
    });
    assert_eq!(read_as("llama", &more), plain);
}

#[test]
fn numbers_are_checked() {
    for (changes, expected) in [
        (
            json!({"vocab_size": 0}),
            "config.json: vocab_size is 0; expected a whole number from 1 to 2147483647",
        ),
        (
            json!({"vocab_size": 1u64 << 40}),
            "config.json: vocab_size is 1099511627776; expected a whole number from 1 to 2147483647",
        ),
        (
            json!({"vocab_size": "320"}),
            r#"config.json: vocab_size is "320"; expected a whole number from 1 to 2147483647"#,
        ),
        (
            json!({"rms_norm_eps": 0.0}),
            "config.json: rms_norm_eps is 0.0; expected a number above 0",
        ),
        (
            json!({"tie_word_embeddings": 1}),
            "config.json: tie_word_embeddings is 1; expected true or false",
        ),
    ] {
        refused("llama", &changes, expected);
    }
}
