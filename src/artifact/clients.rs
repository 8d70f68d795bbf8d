//! The files other programs read beside the graph: `genai_config.json` for onnxruntime-genai, and
//! `config.json` and `generation_config.json` for Hugging Face's libraries.

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value, json};
use skipgpt_passes::ir;

use super::Error;
use super::manifest::ModelFacts;
use super::names;

/// What generation needs to know about the checkpoint, as its own files say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Generation {
    config: Map<String, Value>,
    defaults: Option<Map<String, Value>>,
}

impl Generation {
    /// Reads `config.json` and, where there is one, `generation_config.json`.
    pub fn read(directory: &Path) -> Result<Self, Error> {
        let config = object(&directory.join(names::CONFIG))?.unwrap_or_default();
        let defaults = object(&directory.join(names::GENERATION_CONFIG))?;
        Ok(Self { config, defaults })
    }

    /// A generation default: `generation_config.json` first, `config.json` second.
    fn get(&self, key: &str) -> Option<&Value> {
        let defaults = self.defaults.as_ref().and_then(|defaults| defaults.get(key));
        defaults
            .filter(|value| !value.is_null())
            .or_else(|| self.config.get(key).filter(|value| !value.is_null()))
    }

    /// `generation_config.json` for a checkpoint without one: the token ids of `config.json`.
    ///
    /// `None` if the checkpoint has its own, which is then copied.
    pub fn defaults(&self) -> Option<Value> {
        if self.defaults.is_some() {
            return None;
        }
        let ids = ["bos_token_id", "eos_token_id", "pad_token_id"]
            .into_iter()
            .filter_map(|key| Some((key.to_owned(), self.get(key)?.clone())));
        Some(Value::Object(ids.collect()))
    }

    /// `genai_config.json`: the graph's interface as onnxruntime-genai describes one.
    ///
    /// Caches are named by pattern, so that a layer whose attention was removed may lack its own;
    /// past and present are one buffer if the graph allows it.
    pub fn genai(&self, config: &ir::Config, shared_buffer: bool) -> Value {
        let facts = ModelFacts::of(config);
        let mut model = Map::new();
        if let Some(bos) = self.get("bos_token_id") {
            model.insert("bos_token_id".to_owned(), bos.clone());
        }
        let eos = self.get("eos_token_id").cloned().unwrap_or_else(|| json!([]));
        let first = eos.as_array().map_or(Some(&eos), |list| list.first());
        let pad = self.get("pad_token_id").or(first).cloned().unwrap_or_else(|| json!(0));
        let decoder = json!({
            "session_options": { "log_id": "onnxruntime-genai", "provider_options": [] },
            "filename": names::MODEL,
            "head_size": facts.head_dim,
            "hidden_size": facts.hidden_size,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "position_ids": "position_ids",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": facts.num_attention_heads,
            "num_hidden_layers": facts.num_hidden_layers,
            "num_key_value_heads": facts.num_key_value_heads,
        });
        model.insert("context_length".to_owned(), json!(facts.max_position_embeddings));
        model.insert("decoder".to_owned(), decoder);
        model.insert("eos_token_id".to_owned(), eos);
        model.insert("pad_token_id".to_owned(), pad);
        model.insert("type".to_owned(), json!(facts.architecture));
        model.insert("vocab_size".to_owned(), json!(facts.vocab_size));
        let search = |key: &str, otherwise: Value| self.get(key).cloned().unwrap_or(otherwise);
        json!({
            "model": model,
            "search": {
                "diversity_penalty": 0.0,
                "do_sample": search("do_sample", json!(false)),
                "early_stopping": true,
                "length_penalty": search("length_penalty", json!(1.0)),
                "max_length": facts.max_position_embeddings,
                "min_length": 0,
                "no_repeat_ngram_size": search("no_repeat_ngram_size", json!(0)),
                "num_beams": 1,
                "num_return_sequences": 1,
                "past_present_share_buffer": shared_buffer,
                "repetition_penalty": search("repetition_penalty", json!(1.0)),
                "temperature": search("temperature", json!(1.0)),
                "top_k": search("top_k", json!(50)),
                "top_p": search("top_p", json!(1.0)),
            },
        })
    }
}

/// A JSON object, or `None` if there is no such file.
fn object(path: &Path) -> Result<Option<Map<String, Value>>, Error> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", path, error)),
    };
    let json = |source| Error::Json { path: path.to_path_buf(), source };
    serde_json::from_slice(&bytes).map(Some).map_err(json)
}

/// The text of a JSON file, indented and ended by a newline.
pub(super) fn json(name: &str, value: &impl Serialize) -> Result<Vec<u8>, Error> {
    let json = |source| Error::Json { path: name.into(), source };
    let mut text = serde_json::to_vec_pretty(value).map_err(json)?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    fn read(config: &str, generation: Option<&str>) -> Generation {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("config.json"), config).unwrap();
        if let Some(text) = generation {
            fs::write(directory.path().join("generation_config.json"), text).unwrap();
        }
        Generation::read(directory.path()).unwrap()
    }

    #[test]
    fn generation_config_comes_first() {
        let both = read(
            r#"{"eos_token_id": 2, "bos_token_id": 1}"#,
            Some(r#"{"eos_token_id": [7, 8], "temperature": 0.6, "do_sample": true}"#),
        );
        let genai = both.genai(&crate::artifact::testing::config(), false);
        assert_eq!(genai["model"]["eos_token_id"], json!([7, 8]));
        assert_eq!(genai["model"]["pad_token_id"], json!(7));
        assert_eq!(genai["model"]["bos_token_id"], json!(1));
        assert_eq!(genai["search"]["temperature"], json!(0.6));
        assert_eq!(genai["search"]["do_sample"], json!(true));
        assert_eq!(both.defaults(), None);
    }

    #[test]
    fn a_missing_generation_config_is_made_from_the_token_ids() {
        let made = read(r#"{"eos_token_id": 2, "pad_token_id": null}"#, None).defaults();
        assert_eq!(made, Some(json!({"eos_token_id": 2})));
    }

    #[test]
    fn a_broken_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("config.json"), "[1]").unwrap();
        let error = Generation::read(directory.path()).unwrap_err().to_string();
        assert!(error.contains("config.json: not valid JSON"), "{error}");
    }
}
