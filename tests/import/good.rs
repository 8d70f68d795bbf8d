//! What is imported is what the file holds.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use expect_test::{Expect, expect};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use skipgpt_export::import::Options;
use skipgpt_passes::ir::DType;
use tempfile::TempDir;
use tokenizers::Tokenizer;

use super::{MODELS, gguf, imported, json, run};

/// The values `fixtures/gguf/make.py` gave the tensor `name` of the original checkpoint.
fn original(name: &str, count: usize) -> Vec<f32> {
    (0..count).map(|p| (((p + 7 * name.len()) % 251) as f32 - 125.0) / 64.0).collect()
}

fn weights(directory: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = fs::read(directory.join("model.safetensors")).unwrap();
    SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, tensor)| {
            let data = tensor.data();
            let values = match tensor.dtype() {
                Dtype::F32 => data.as_chunks().0.iter().map(|c| f32::from_le_bytes(*c)).collect(),
                Dtype::F16 => {
                    data.as_chunks().0.iter().map(|c| f16::from_le_bytes(*c).to_f32()).collect()
                }
                Dtype::BF16 => {
                    data.as_chunks().0.iter().map(|c| bf16::from_le_bytes(*c).to_f32()).collect()
                }
                other => panic!("{name} is {other:?}"),
            };
            (name.to_owned(), (tensor.shape().to_vec(), values))
        })
        .collect()
}

#[test]
fn every_weight_is_that_of_the_checkpoint_it_came_from() {
    for model in MODELS {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let place = TempDir::new().unwrap();
            let change = |o: &mut Options| (o.input, o.dtype) = (gguf(model), dtype);
            let report = run(&place, change).unwrap();
            let weights = weights(&place.path().join("out"));
            assert_eq!(weights.len(), report.tensors);
            for (name, (shape, values)) in weights {
                assert_eq!(values.len(), shape.iter().product::<usize>());
                assert_eq!(values, original(&name, values.len()), "{model} {dtype} {name}");
            }
        }
    }
}

#[test]
fn progress_ends_at_the_total() {
    let place = TempDir::new().unwrap();
    let options = Options::new(gguf("llama"), place.path().join("out"));
    let mut seen = Vec::new();
    let report = skipgpt_export::import::import(&options, &mut |done, total| {
        seen.push((done, total));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(seen.is_sorted());
    assert_eq!(seen.last(), Some(&(report.bytes, report.bytes)));
}

/// Who stops an import finds nothing of it.
#[test]
fn an_import_can_be_stopped() {
    let place = TempDir::new().unwrap();
    let options = Options::new(gguf("llama"), place.path().join("out"));
    let stopped = skipgpt_export::import::import(&options, &mut |_, _| ControlFlow::Break(()));
    let message = stopped.unwrap_err().to_string();
    assert!(message.ends_with("llama.gguf: interrupted"), "{message}");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
}

#[test]
fn two_imports_are_the_same_bytes() {
    let (first, second) = (imported("llama"), imported("llama"));
    for entry in fs::read_dir(first.path().join("out")).unwrap() {
        let name = entry.unwrap().file_name();
        let [a, b] = [&first, &second].map(|place| place.path().join("out").join(&name));
        if a.is_file() {
            assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap(), "{}", name.display());
        }
    }
}

fn check_config(model: &str, expected: &Expect) {
    let place = imported(model);
    let config = json(&place.path().join("out"), "config.json");
    let generation = json(&place.path().join("out"), "generation_config.json");
    expected.assert_eq(&format!("{config}\n{generation}"));
}

#[test]
fn the_configuration_is_the_metadata_s() {
    check_config(
        "llama",
        &expect![[r#"
        {"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":270,"hidden_size":32,"intermediate_size":64,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":8,"hidden_act":"silu","max_position_embeddings":512,"rms_norm_eps":0.00001,"rope_theta":100000.0,"rope_scaling":null,"tie_word_embeddings":true,"attention_dropout":0.0,"initializer_range":0.02,"use_cache":true,"bos_token_id":264,"eos_token_id":265,"pad_token_id":265,"torch_dtype":"float32","attention_bias":false,"mlp_bias":false}
        {"_from_model_config":true,"bos_token_id":264,"eos_token_id":265,"pad_token_id":265}"#]],
    );
    check_config(
        "llama3",
        &expect![[r#"
        {"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":268,"hidden_size":32,"intermediate_size":64,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":2,"head_dim":16,"hidden_act":"silu","max_position_embeddings":512,"rms_norm_eps":0.00001,"rope_theta":500000.0,"rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192},"tie_word_embeddings":false,"attention_dropout":0.0,"initializer_range":0.02,"use_cache":true,"bos_token_id":264,"eos_token_id":[265,266],"pad_token_id":null,"torch_dtype":"float32","attention_bias":true,"mlp_bias":true}
        {"_from_model_config":true,"bos_token_id":264,"eos_token_id":[265,266],"pad_token_id":null}"#]],
    );
    check_config(
        "mistral",
        &expect![[r#"
        {"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":273,"hidden_size":32,"intermediate_size":64,"num_hidden_layers":1,"num_attention_heads":4,"num_key_value_heads":4,"head_dim":8,"hidden_act":"silu","max_position_embeddings":512,"rms_norm_eps":0.00001,"rope_theta":10000.0,"rope_scaling":{"rope_type":"linear","factor":2.0},"tie_word_embeddings":false,"attention_dropout":0.0,"initializer_range":0.02,"use_cache":true,"bos_token_id":1,"eos_token_id":2,"pad_token_id":null,"torch_dtype":"float32","attention_bias":false,"mlp_bias":false}
        {"_from_model_config":true,"bos_token_id":1,"eos_token_id":2,"pad_token_id":null}"#]],
    );
    check_config(
        "qwen2",
        &expect![[r#"
        {"architectures":["Qwen2ForCausalLM"],"model_type":"qwen2","vocab_size":267,"hidden_size":32,"intermediate_size":64,"num_hidden_layers":1,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":8,"hidden_act":"silu","max_position_embeddings":512,"rms_norm_eps":0.00001,"rope_theta":1000000.0,"rope_scaling":null,"tie_word_embeddings":true,"attention_dropout":0.0,"initializer_range":0.02,"use_cache":true,"bos_token_id":null,"eos_token_id":265,"pad_token_id":264,"torch_dtype":"float32","use_sliding_window":false}
        {"_from_model_config":true,"bos_token_id":null,"eos_token_id":265,"pad_token_id":264}"#]],
    );
    check_config(
        "qwen3",
        &expect![[r#"
        {"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3","vocab_size":267,"hidden_size":32,"intermediate_size":64,"num_hidden_layers":1,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,"hidden_act":"silu","max_position_embeddings":512,"rms_norm_eps":0.00001,"rope_theta":1000000.0,"rope_scaling":null,"tie_word_embeddings":true,"attention_dropout":0.0,"initializer_range":0.02,"use_cache":true,"bos_token_id":null,"eos_token_id":265,"pad_token_id":null,"torch_dtype":"float32","attention_bias":false,"use_sliding_window":false}
        {"_from_model_config":true,"bos_token_id":null,"eos_token_id":265,"pad_token_id":null}"#]],
    );
}

/// `text` and the special token `end` in tokens, what belongs around a text included.
fn check_tokens(model: &str, text: &str, end: &str, expected: &Expect) {
    let place = imported(model);
    let tokenizer = Tokenizer::from_file(place.path().join("out/tokenizer.json")).unwrap();
    let encoding = tokenizer.encode(format!("{text}{end}"), true).unwrap();
    expected.assert_eq(&encoding.get_tokens().join(" "));
    assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), text);
}

#[test]
fn text_is_split_as_the_named_pre_tokenizer_splits_it() {
    let text = "hello hello  hello 123\n  1";
    check_tokens(
        "llama",
        text,
        "<|im_end|>",
        &expect!["hello Ġhello Ġ Ġhello Ġ 1 2 3 Ċ ĠĠ 1 <|im_end|>"],
    );
    check_tokens(
        "llama3",
        text,
        "<|eot_id|>",
        &expect!["<|begin_of_text|> hello Ġhello Ġ Ġhello Ġ 123 Ċ Ġ Ġ 1 <|eot_id|>"],
    );
    check_tokens(
        "qwen2",
        text,
        "<|im_end|>",
        &expect!["hello Ġhello Ġ Ġhello Ġ 1 2 3 Ċ Ġ Ġ 1 <|im_end|>"],
    );
    check_tokens(
        "mistral",
        "hello hello  h\u{e9} 12",
        "</s>",
        &expect!["<s> ▁hello ▁hello ▁ ▁ h <0xC3> <0xA9> ▁ 1 2 </s>"],
    );
}

#[test]
fn qwen_composes_text() {
    let place = imported("qwen2");
    let tokenizer = Tokenizer::from_file(place.path().join("out/tokenizer.json")).unwrap();
    let ids = |text: &str| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
    assert_eq!(ids("e\u{301}"), ids("\u{e9}"));
}

#[test]
fn roles_and_templates_are_kept() {
    let place = imported("llama");
    let directory = place.path().join("out");
    let config = json(&directory, "tokenizer_config.json");
    assert_eq!(config["bos_token"], "<|im_start|>");
    assert_eq!(config["eos_token"], "<|im_end|>");
    assert_eq!(config["pad_token"], "<|im_end|>");
    assert_eq!(config["chat_template"], "{{ messages[0]['content'] }}");
    let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
    assert_eq!(read("chat_template.jinja"), "{{ messages[0]['content'] }}");
    assert_eq!(read("additional_chat_templates/tool_use.jinja"), "{{ tools }}");

    // A token that only fills up the embedding has no text; one added by name is not special.
    let tokenizer = json(&directory, "tokenizer.json");
    assert!(tokenizer["model"]["vocab"].get("[PAD267]").is_none());
    let special: Vec<_> = tokenizer["added_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| (token["content"].as_str().unwrap(), token["special"].as_bool().unwrap()))
        .collect();
    assert_eq!(special, [("<|im_start|>", true), ("<|im_end|>", true), ("<tool>", false)]);
}
