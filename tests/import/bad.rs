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
    let error = run(place, |options| input.clone_into(&mut options.input)).unwrap_err().to_string();
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
    check(
        "llama",
        |m| m.text("general.architecture", "gemma3"),
        &expect![[
            r#"general.architecture is "gemma3"; llama (Mistral models too), qwen2 and qwen3 are imported"#
        ]],
    );
    check(
        "llama",
        |m| m.text("general.type", "adapter"),
        &expect![[r#"general.type is "adapter"; only a file of type "model" can be imported"#]],
    );
    check(
        "llama",
        |m| m.set("split.count", Value::U16(3)),
        &expect![
            "the file is one of 3 parts; join them with llama.cpp's `llama-gguf-split --merge` first"
        ],
    );
    check(
        "llama",
        |m| m.set("llama.expert_count", Value::U32(8)),
        &expect!["llama.expert_count = 8 is not supported; expected 0 or no such key"],
    );
    check(
        "llama",
        |m| m.set("llama.attention.scale", Value::F32(0.1)),
        &expect![[
            r#"the metadata key "llama.attention.scale" may change the results and is not understood"#
        ]],
    );
    check(
        "qwen2",
        |m| m.set("qwen2.attention.sliding_window", Value::U32(64)),
        &expect!["qwen2.attention.sliding_window = 64 is not supported; expected 0 or no such key"],
    );
    check(
        "llama",
        |m| m.set("llama.attention.causal", Value::Bool(false)),
        &expect!["llama.attention.causal = false is not supported; expected true"],
    );
    check(
        "llama",
        |m| m.set("llama.attention.head_count_kv", Value::U32(3)),
        &expect![
            "llama.attention.head_count_kv = 3 is not supported; expected a divisor of the 4 query heads"
        ],
    );
    check(
        "llama",
        |m| m.set("llama.rope.dimension_count", Value::U32(4)),
        &expect!["llama.rope.dimension_count = 4 is not supported; expected the head width 8"],
    );
    check(
        "llama",
        |m| m.remove("llama.block_count"),
        &expect![[
            r#"the metadata key "llama.block_count" is missing; expected a whole number from 1 up"#
        ]],
    );
    check(
        "llama",
        |m| m.set("llama.block_count", Value::String("two".into())),
        &expect![[
            r#"the metadata key "llama.block_count" should hold a whole number from 0 up, found "two""#
        ]],
    );
}

#[test]
fn other_rotary_embeddings() {
    check(
        "mistral",
        |m| m.text("llama.rope.scaling.type", "yarn"),
        &expect![[
            r#"llama.rope.scaling.type = "yarn" is not supported; expected "none" or "linear""#
        ]],
    );
    check(
        "mistral",
        |m| m.remove("llama.rope.scaling.factor"),
        &expect![[
            r#"the metadata key "llama.rope.scaling.factor" is missing; expected a number over 0"#
        ]],
    );
    check(
        "mistral",
        |m| m.set("llama.rope.scaling.factor", Value::F32(-1.0)),
        &expect!["llama.rope.scaling.factor = -1 is not supported; expected a number over 0"],
    );
    check(
        "llama3",
        |m| m.put("rope_freqs.weight", &[1.0, 1.0, 1.0, 1.5, 8.0, 8.0, 8.0, 8.0]),
        &expect![[
            r#"the tensor "rope_freqs.weight" holds divisors that no llama3 rope scaling gives; config.json could not state them"#
        ]],
    );
    check(
        "llama3",
        |m| m.put("rope_freqs.weight", &[1.0; 4]),
        &expect![[r#"the tensor "rope_freqs.weight" has shape [4]; heads of width 16 need [8]"#]],
    );
    check(
        "mistral",
        |m| m.put("rope_freqs.weight", &[8.0; 4]),
        &expect![[
            r#"both the tensor "rope_freqs.weight" and rope.scaling.* stretch the rotary frequencies"#
        ]],
    );
}

#[test]
fn other_tensors() {
    check(
        "llama",
        |m| drop(m.tensors.remove("blk.1.attn_v.weight")),
        &expect![[
            r#"the tensor "blk.1.attn_v.weight" is missing; a llama model with 2 layers needs it"#
        ]],
    );
    check(
        "qwen2",
        |m| drop(m.tensors.remove("blk.0.attn_k.bias")),
        &expect![[
            r#"the tensor "blk.0.attn_k.bias" is missing; a qwen2 model with 1 layers needs it"#
        ]],
    );
    check(
        "llama",
        |m| m.put("blk.0.attn_sinks.weight", &[0.0]),
        &expect![[
            r#"the tensor "blk.0.attn_sinks.weight" is no part of a llama model as it is understood here; leaving it out could change the results"#
        ]],
    );
    check(
        "llama",
        |m| m.put("blk.0.attn_norm.weight", &[1.0; 31]),
        &expect![[r#"the tensor "blk.0.attn_norm.weight" has shape [31]; the metadata says [32]"#]],
    );
    check(
        "llama",
        |m| {
            let mut norm = [1.0; 32];
            norm[7] = f32::NAN;
            m.put("blk.1.ffn_norm.weight", &norm);
        },
        &expect![[
            r#"tensor "blk.1.ffn_norm.weight" holds NaN in row 0, column 7: the file is damaged or was badly quantised"#
        ]],
    );
}

#[test]
fn other_tokenizers() {
    let tokens = "tokenizer.ggml.tokens";
    let merges = "tokenizer.ggml.merges";
    check(
        "llama",
        |m| m.text("tokenizer.ggml.model", "bert"),
        &expect![[
            r#"tokenizer.ggml.model is "bert"; "gpt2" (byte-level BPE) and "llama" (SentencePiece) are rebuilt"#
        ]],
    );
    check(
        "llama",
        |m| m.text("tokenizer.ggml.pre", "default"),
        &expect![[
            r#"tokenizer.ggml.pre is "default", whose way of splitting text is not known here; known: gpt-2, smollm, starcoder, refact, command-r, llama-bpe, llama-v3, llama3, qwen2, deepseek-llm, deepseek-coder"#
        ]],
    );
    check(
        "llama",
        |m| m.remove("tokenizer.ggml.pre"),
        &expect![[
            r#"tokenizer.ggml.pre is "", whose way of splitting text is not known here; known: gpt-2, smollm, starcoder, refact, command-r, llama-bpe, llama-v3, llama3, qwen2, deepseek-llm, deepseek-coder"#
        ]],
    );
    check(
        "llama",
        |m| m.remove(tokens),
        &expect![[
            r#"the metadata key "tokenizer.ggml.tokens" is missing; expected an array of strings"#
        ]],
    );
    check(
        "llama",
        |m| m.strings(tokens)[40] = Value::String("hell".into()),
        &expect![[r#"the tokens 40 and 258 are both "hell""#]],
    );
    check(
        "llama",
        |m| m.strings(merges)[2] = Value::String("he x".into()),
        &expect![[r#"merge 2, "he x", does not join two tokens into a third"#]],
    );
    check(
        "llama",
        |m| drop(m.strings("tokenizer.ggml.token_type").pop()),
        &expect!["tokenizer.ggml.token_type has 269 entries for 270 tokens"],
    );
    check(
        "llama",
        |m| m.strings("tokenizer.ggml.token_type")[3] = Value::I32(9),
        &expect!["tokenizer.ggml.token_type of token 3 is 9; expected 1 to 6"],
    );
    check(
        "llama",
        |m| m.set("tokenizer.ggml.eos_token_id", Value::U32(999)),
        &expect!["tokenizer.ggml.eos_token_id is 999; the vocabulary has 270 tokens"],
    );
    check(
        "qwen2",
        |m| m.set("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        &expect![
            "tokenizer.ggml.add_bos_token is true, but there is no tokenizer.ggml.bos_token_id"
        ],
    );
    check(
        "llama",
        |m| m.set("tokenizer.ggml.add_space_prefix", Value::Bool(true)),
        &expect![
            "tokenizer.ggml.add_space_prefix is set, which is not reproduced in tokenizer.json"
        ],
    );
    check(
        "mistral",
        |m| m.set("tokenizer.ggml.remove_extra_whitespaces", Value::Bool(true)),
        &expect![
            "tokenizer.ggml.remove_extra_whitespaces is set, which is not reproduced in tokenizer.json"
        ],
    );
    check(
        "mistral",
        |m| m.remove("tokenizer.ggml.scores"),
        &expect![[
            r#"the metadata key "tokenizer.ggml.scores" is missing; expected an array of f32"#
        ]],
    );
    check(
        "mistral",
        |m| m.strings(tokens)[13] = Value::String("ten".into()),
        &expect![[
            r#"the SentencePiece vocabulary has no token "<0x0A>", which byte fallback needs"#
        ]],
    );
    check(
        "llama",
        |m| m.text("tokenizer.chat_template.a/b", "x"),
        &expect![[
            r#"the chat template "a/b" has a name that is not plain letters, digits, - and _"#
        ]],
    );
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
    expect![[
        r#"tensor "output_norm.weight" holds 70000, which f16 cannot hold; import it as f32"#
    ]]
    .assert_eq(message.strip_prefix(&format!("{}: ", input.display())).unwrap());
}

#[test]
fn files_cut_short() {
    let place = TempDir::new().unwrap();
    let input = place.path().join("model.gguf");
    let bytes = fs::read(gguf("llama")).unwrap();
    fs::write(&input, &bytes[..1000]).unwrap();
    check_file(
        &place,
        &input,
        &expect![
            "tokenizer.ggml.tokens at byte 533 needs 2160 more bytes, the file has 467: it is cut short or damaged; fetch it again"
        ],
    );
    fs::write(&input, &bytes[..bytes.len() - 1]).unwrap();
    check_file(
        &place,
        &input,
        &expect![[
            r#"tensor "blk.1.ffn_down.weight" takes 8192 bytes from byte 94560, the file has 102751: it is cut short or damaged; fetch it again"#
        ]],
    );
    fs::write(&input, b"").unwrap();
    check_file(
        &place,
        &input,
        &expect![
            "the magic number at byte 0 needs 4 more bytes, the file has 0: it is cut short or damaged; fetch it again"
        ],
    );
    let other = place.path().join("model.bin");
    check_file(&place, &other, &expect!["expected a file called *.gguf, *.pth or *.pt"]);
    let missing = place.path().join("missing.gguf");
    check_file(
        &place,
        &missing,
        &expect!["cannot read the file: No such file or directory (os error 2)"],
    );
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
            error.strip_prefix(&format!("{}: ", output.display())).unwrap_or(&error).to_owned()
        })
    };
    assert_eq!(attempt(false), Ok(()));
    expect!["already exists; --force replaces it"].assert_eq(&attempt(false).unwrap_err());

    fs::write(output.join("config.json"), "old").unwrap();
    assert_eq!(attempt(true), Ok(()));
    assert_ne!(fs::read(output.join("config.json")).unwrap(), b"old");

    fs::write(output.join("thesis.txt"), "dear").unwrap();
    expect!["will not be replaced: it holds thesis.txt, which no import writes; move it away or choose another path"].assert_eq(&attempt(true).unwrap_err());
    assert_eq!(fs::read(output.join("thesis.txt")).unwrap(), b"dear");

    fs::remove_file(output.join("thesis.txt")).unwrap();
    let read = output.join("llama.gguf");
    fs::copy(gguf("llama"), &read).unwrap();
    let result = run(&place, |options| {
        (options.input, options.force) = (read.clone(), true);
    });
    let message = result.unwrap_err().to_string();
    let expected = format!("will not be replaced: it holds {}, which is read", read.display());
    assert!(message.contains(&expected), "{message}");

    let entries: Vec<PathBuf> =
        fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(entries, [output]);
}
