//! What cannot be imported is refused by name, and nothing is left behind.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use expect_test::{Expect, expect};
use tempfile::TempDir;

use super::{gguf, run};

/// A fixture that a test may change.
struct Model {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, QTensor>,
}

impl Model {
    fn read(name: &str) -> Self {
        let mut file = fs::File::open(gguf(name)).unwrap();
        let content = gguf_file::Content::read(&mut file).unwrap();
        let tensors = content
            .tensor_infos
            .keys()
            .map(|name| (name.clone(), content.tensor(&mut file, name, &Device::Cpu).unwrap()))
            .collect();
        Self { metadata: content.metadata.into_iter().collect(), tensors }
    }

    fn set(&mut self, key: &str, value: Value) {
        self.metadata.insert(key.into(), value);
    }

    fn remove(&mut self, key: &str) {
        self.metadata.remove(key).unwrap();
    }

    fn text(&mut self, key: &str, value: &str) {
        self.set(key, Value::String(value.into()));
    }

    fn strings(&mut self, key: &str) -> &mut Vec<Value> {
        match self.metadata.get_mut(key) {
            Some(Value::Array(values)) => values,
            other => panic!("{key}: {other:?}"),
        }
    }

    fn put(&mut self, name: &str, values: &[f32]) {
        let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap();
        self.tensors.insert(name.into(), QTensor::quantize(&tensor, GgmlDType::F32).unwrap());
    }

    fn write(&self, path: &Path) {
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let mut file = fs::File::create(path).unwrap();
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    }
}

/// Imports the fixture `name`, changed, and compares the message without the path it begins with.
fn check(name: &str, change: impl FnOnce(&mut Model), expected: &Expect) {
    let place = TempDir::new().unwrap();
    let input = place.path().join("model.gguf");
    let mut model = Model::read(name);
    change(&mut model);
    model.write(&input);
    check_file(&place, &input, expected);
}

fn check_file(place: &TempDir, input: &Path, expected: &Expect) {
    let error = run(place, |options| options.input = input.to_owned()).unwrap_err().to_string();
    let message = error.strip_prefix(&format!("{}: ", input.display()));
    expected.assert_eq(message.unwrap_or_else(|| panic!("{error}")));
}

#[test]
fn an_unchanged_fixture_survives_the_rewriting() {
    let place = TempDir::new().unwrap();
    let input = place.path().join("model.gguf");
    Model::read("llama3").write(&input);
    run(&place, |options| options.input = input).unwrap();
}

#[test]
fn other_models() {
    check("llama", |m| m.text("general.architecture", "gemma3"), &expect![[r#""#]]);
    check("llama", |m| m.text("general.type", "adapter"), &expect![[r#""#]]);
    check("llama", |m| m.set("split.count", Value::U16(3)), &expect![[r#""#]]);
    check("llama", |m| m.set("llama.expert_count", Value::U32(8)), &expect![[r#""#]]);
    check("llama", |m| m.set("llama.attention.scale", Value::F32(0.1)), &expect![[r#""#]]);
    check("qwen2", |m| m.set("qwen2.attention.sliding_window", Value::U32(64)), &expect![[r#""#]]);
    check("llama", |m| m.set("llama.attention.causal", Value::Bool(false)), &expect![[r#""#]]);
    check("llama", |m| m.set("llama.attention.head_count_kv", Value::U32(3)), &expect![[r#""#]]);
    check("llama", |m| m.set("llama.rope.dimension_count", Value::U32(4)), &expect![[r#""#]]);
    check("llama", |m| m.remove("llama.block_count"), &expect![[r#""#]]);
    check("llama", |m| m.set("llama.block_count", Value::String("two".into())), &expect![[r#""#]]);
}

#[test]
fn other_rotary_embeddings() {
    check("mistral", |m| m.text("llama.rope.scaling.type", "yarn"), &expect![[r#""#]]);
    check("mistral", |m| m.remove("llama.rope.scaling.factor"), &expect![[r#""#]]);
    check("mistral", |m| m.set("llama.rope.scaling.factor", Value::F32(-1.0)), &expect![[r#""#]]);
    check(
        "llama3",
        |m| m.put("rope_freqs.weight", &[1.0, 1.0, 1.0, 1.5, 8.0, 8.0, 8.0, 8.0]),
        &expect![[r#""#]],
    );
    check("llama3", |m| m.put("rope_freqs.weight", &[1.0; 4]), &expect![[r#""#]]);
    check("mistral", |m| m.put("rope_freqs.weight", &[8.0; 4]), &expect![[r#""#]]);
}

#[test]
fn other_tensors() {
    check("llama", |m| drop(m.tensors.remove("blk.1.attn_v.weight")), &expect![[r#""#]]);
    check("qwen2", |m| drop(m.tensors.remove("blk.0.attn_k.bias")), &expect![[r#""#]]);
    check("llama", |m| m.put("blk.0.attn_sinks.weight", &[0.0]), &expect![[r#""#]]);
    check("llama", |m| m.put("blk.0.attn_norm.weight", &[1.0; 31]), &expect![[r#""#]]);
    check(
        "llama",
        |m| {
            let mut norm = [1.0; 32];
            norm[7] = f32::NAN;
            m.put("blk.1.ffn_norm.weight", &norm);
        },
        &expect![[r#""#]],
    );
}

#[test]
fn other_tokenizers() {
    let tokens = "tokenizer.ggml.tokens";
    let merges = "tokenizer.ggml.merges";
    check("llama", |m| m.text("tokenizer.ggml.model", "bert"), &expect![[r#""#]]);
    check("llama", |m| m.text("tokenizer.ggml.pre", "default"), &expect![[r#""#]]);
    check("llama", |m| m.remove("tokenizer.ggml.pre"), &expect![[r#""#]]);
    check("llama", |m| m.remove(tokens), &expect![[r#""#]]);
    check("llama", |m| m.strings(tokens)[40] = Value::String("hell".into()), &expect![[r#""#]]);
    check("llama", |m| m.strings(merges)[2] = Value::String("he x".into()), &expect![[r#""#]]);
    check("llama", |m| drop(m.strings("tokenizer.ggml.token_type").pop()), &expect![[r#""#]]);
    check(
        "llama",
        |m| m.strings("tokenizer.ggml.token_type")[3] = Value::I32(9),
        &expect![[r#""#]],
    );
    check("llama", |m| m.set("tokenizer.ggml.eos_token_id", Value::U32(999)), &expect![[r#""#]]);
    check("qwen2", |m| m.set("tokenizer.ggml.add_bos_token", Value::Bool(true)), &expect![[r#""#]]);
    check(
        "llama",
        |m| m.set("tokenizer.ggml.add_space_prefix", Value::Bool(true)),
        &expect![[r#""#]],
    );
    check(
        "mistral",
        |m| m.set("tokenizer.ggml.remove_extra_whitespaces", Value::Bool(true)),
        &expect![[r#""#]],
    );
    check("mistral", |m| m.remove("tokenizer.ggml.scores"), &expect![[r#""#]]);
    check("mistral", |m| m.strings(tokens)[13] = Value::String("ten".into()), &expect![[r#""#]]);
    check("llama", |m| m.text("tokenizer.chat_template.a/b", "x"), &expect![[r#""#]]);
}

#[test]
fn values_beyond_the_dtype() {
    let place = TempDir::new().unwrap();
    let input = place.path().join("model.gguf");
    let mut model = Model::read("llama");
    model.put("output_norm.weight", &[70000.0; 32]);
    model.write(&input);
    let error = run(&place, |options| {
        options.input.clone_from(&input);
        options.dtype = skipgpt_passes::ir::DType::F16;
    })
    .unwrap_err();
    let message = error.to_string();
    expect![[r#""#]].assert_eq(message.strip_prefix(&format!("{}: ", input.display())).unwrap());
}

#[test]
fn files_cut_short() {
    let place = TempDir::new().unwrap();
    let input = place.path().join("model.gguf");
    let bytes = fs::read(gguf("llama")).unwrap();
    fs::write(&input, &bytes[..1000]).unwrap();
    check_file(&place, &input, &expect![[r#""#]]);
    fs::write(&input, &bytes[..bytes.len() - 1]).unwrap();
    check_file(&place, &input, &expect![[r#""#]]);
    fs::write(&input, b"").unwrap();
    check_file(&place, &input, &expect![[r#""#]]);
    let other = place.path().join("model.bin");
    check_file(&place, &other, &expect![[r#""#]]);
    let missing = place.path().join("missing.gguf");
    check_file(&place, &missing, &expect![[r#""#]]);
}

/// What is at the output path stays, unless it is an earlier import and may be replaced.
#[test]
fn existing_outputs() {
    let place = TempDir::new().unwrap();
    let output = place.path().join("out");
    let attempt = |force: bool| {
        let result = run(&place, |options| {
            (options.input, options.force) = (gguf("llama"), force);
        });
        result.map(drop).map_err(|error| {
            let error = error.to_string();
            error.strip_prefix(&format!("{} ", output.display())).unwrap_or(&error).to_owned()
        })
    };
    assert_eq!(attempt(false), Ok(()));
    expect![[r#""#]].assert_eq(&attempt(false).unwrap_err());

    fs::write(output.join("config.json"), "old").unwrap();
    assert_eq!(attempt(true), Ok(()));
    assert_ne!(fs::read(output.join("config.json")).unwrap(), b"old");

    fs::write(output.join("thesis.txt"), "dear").unwrap();
    expect![[r#""#]].assert_eq(&attempt(true).unwrap_err());
    assert_eq!(fs::read(output.join("thesis.txt")).unwrap(), b"dear");

    let entries: Vec<PathBuf> =
        fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(entries, [output]);
}
