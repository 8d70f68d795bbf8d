//! Typed access to a config's keys, and the keys whose arithmetic is not implemented.

use std::path::Path;

use serde_json::{Map, Value};
use skipgpt_passes::ir::Architecture;

use super::{Conflict, Error};
use crate::checkpoint::files::{is_unused, show};

/// Largest size a config may state: that of a 31-bit index.
const LARGEST: u64 = i32::MAX as u64;

/// A config's object, and where it stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys<'a> {
    pub(super) path: &'a Path,
    pub(super) map: &'a Map<String, Value>,
}

/// Keys of these and related architectures that change what a model computes and are not
/// implemented, each with the number that leaves it unused, if one does. `null`, `false` and empty
/// values always do.
pub(super) const UNSUPPORTED: [(&str, Option<f64>, &str); 35] = [
    ("add_cross_attention", None, "only decoders without cross-attention are read"),
    ("attention_chunk_size", None, "only full attention is read"),
    ("attention_multiplier", None, "a model of another architecture is described here"),
    ("attn_logit_softcapping", None, "a model of another architecture is described here"),
    ("attn_temperature_tuning", Some(0.0), "a model of another architecture is described here"),
    (
        "auto_map",
        None,
        "the model is computed by code in its own repository; remove the key if the code is the same as transformers'",
    ),
    (
        "block_configs",
        None,
        "models with removed modules are written, not read; start from the original checkpoint",
    ),
    ("clip_qkv", None, "a model of another architecture is described here"),
    ("dim_model_base", None, "a model of another architecture is described here"),
    ("embedding_multiplier", Some(1.0), "a model of another architecture is described here"),
    ("final_logit_softcapping", None, "a model of another architecture is described here"),
    ("is_encoder_decoder", None, "only decoders are read"),
    ("logit_scale", Some(1.0), "a model of another architecture is described here"),
    ("logits_scaling", Some(1.0), "a model of another architecture is described here"),
    ("mrope_section", None, "multimodal models are not read"),
    ("n_routed_experts", Some(0.0), "mixtures of experts are not read"),
    ("no_rope_layer_interval", Some(0.0), "every layer must have rotary embedding"),
    ("no_rope_layers", None, "every layer must have rotary embedding"),
    ("num_experts", Some(0.0), "mixtures of experts are not read"),
    ("num_local_experts", Some(0.0), "mixtures of experts are not read"),
    ("parallel_attn", None, "a model of another architecture is described here"),
    ("partial_rotary_factor", Some(1.0), "rotary embedding must turn the whole head"),
    (
        "pretraining_tp",
        Some(1.0),
        "set it to 1: the weights are the same, only the order of sums differs",
    ),
    ("pruned_heads", None, "every layer must have all its heads"),
    ("quantization_config", None, "use the checkpoint as it was before quantisation"),
    ("query_pre_attn_scalar", None, "a model of another architecture is described here"),
    ("residual_multiplier", Some(1.0), "a model of another architecture is described here"),
    (
        "rope_interleaved",
        None,
        "q and k must be stored for the half-split rotary embedding of transformers",
    ),
    ("rope_local_base_freq", None, "a model of another architecture is described here"),
    ("scale_depth", None, "a model of another architecture is described here"),
    ("scale_emb", Some(1.0), "a model of another architecture is described here"),
    ("sliding_window_pattern", None, "only full attention is read"),
    ("text_config", None, "multimodal models are not read; save the language model alone"),
    ("use_mrope", None, "multimodal models are not read"),
    ("vision_config", None, "multimodal models are not read; save the language model alone"),
];

impl Keys<'_> {
    /// Refuses every key of [`UNSUPPORTED`] that is in use, and those that need a closer look.
    pub(super) fn refuse_unsupported(&self, architecture: Architecture) -> Result<(), Error> {
        for (key, unused, advice) in UNSUPPORTED {
            if let Some(found) = self.map.get(key)
                && !is_unused(found, unused)
            {
                return Err(self.unsupported(key, found, advice));
            }
        }
        for key in ["qk_layernorm", "use_qk_norm"] {
            if let Some(found) = self.map.get(key)
                && architecture != Architecture::Qwen3
                && !is_unused(found, None)
            {
                return Err(self.unsupported(key, found, "only qwen3 has norms on q and k"));
            }
        }
        if let Some(found) = self.map.get("hidden_act")
            && !matches!(found.as_str(), Some("silu" | "swish"))
        {
            return Err(self.unsupported("hidden_act", found, "only silu is read"));
        }
        self.refuse_sliding_window(architecture)
    }

    fn refuse_sliding_window(&self, architecture: Architecture) -> Result<(), Error> {
        const ADVICE: &str = "only full attention is read; set it to null if no sequence will be longer than the window";
        if let Some(types) = self.map.get("layer_types")
            && !types.is_null()
        {
            let all = types.as_array().is_some_and(|types| {
                types.iter().all(|kind| kind.as_str() == Some("full_attention"))
            });
            if !all {
                return Err(self.unsupported("layer_types", types, "only full_attention is read"));
            }
        }
        if let Some(found) = self.map.get("use_sliding_window")
            && !is_unused(found, None)
        {
            let advice = "only full attention is read; set it to false if no sequence will be longer than the window";
            return Err(self.unsupported("use_sliding_window", found, advice));
        }
        if matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3) {
            return Ok(()); // `use_sliding_window` alone decides.
        }
        match self.map.get("sliding_window") {
            Some(Value::Null) => Ok(()),
            Some(found) => Err(self.unsupported("sliding_window", found, ADVICE)),
            None if architecture == Architecture::Mistral => Err(self.missing(
                "sliding_window",
                "null (without the key, transformers takes a window of 4096)",
            )),
            None => Ok(()),
        }
    }

    /// A size: a whole number from 1 to 2^31 - 1.
    pub(super) fn size(&self, key: &str) -> Result<usize, Error> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key, "a whole number"))
    }

    /// A size that may be absent or `null`.
    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, Error> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(found) => match found.as_u64().filter(|size| (1..=LARGEST).contains(size)) {
                Some(size) => Ok(Some(size as usize)),
                None => Err(self.value(key, found, "a whole number from 1 to 2147483647")),
            },
        }
    }

    /// A finite number above zero.
    pub(super) fn positive(&self, key: &str) -> Result<f64, Error> {
        self.optional_positive(key)?.ok_or_else(|| self.missing(key, "a number above 0"))
    }

    /// A finite number above zero that may be absent or `null`.
    pub(super) fn optional_positive(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(found) => {
                match found.as_f64().filter(|number| number.is_finite() && *number > 0.0) {
                    Some(number) => Ok(Some(number)),
                    None => Err(self.value(key, found, "a number above 0")),
                }
            }
        }
    }

    /// A truth value; `default` where it is absent or `null`.
    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(found) => Err(self.value(key, found, "true or false")),
        }
    }

    /// Whether the key is there and `null`.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    pub(super) fn missing(&self, key: &str, expected: &'static str) -> Error {
        Error::Missing { path: self.path.to_owned(), key: key.to_owned(), expected }
    }

    pub(super) fn value(&self, key: &str, found: &Value, expected: &'static str) -> Error {
        let (path, key) = (self.path.to_owned(), key.to_owned());
        Error::Value { path, key, found: show(found), expected }
    }

    pub(super) fn unsupported(&self, key: &str, found: &Value, advice: &'static str) -> Error {
        let (path, key) = (self.path.to_owned(), key.to_owned());
        Error::Unsupported { path, key, found: show(found), advice }
    }

    pub(super) fn conflict(&self, conflict: Conflict) -> Error {
        Error::Conflict { path: self.path.to_owned(), conflict }
    }
}
