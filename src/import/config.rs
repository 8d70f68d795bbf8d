//! A GGUF file's model metadata as Hugging Face's `config.json` and `generation_config.json`.
//!
//! A key of the architecture that is not read here may change the numbers, so it is refused.

use serde_json::{Map, Value, json};
use skipgpt_passes::ir::{DType, RopeScaling};

use super::metadata::{self, Metadata};

/// Keys under the architecture's name that are read, or that change nothing in these models.
const KEYS: &[&str] = &[
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
];

/// Why the model is not one that can be imported.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key is missing or ill-typed.
    #[error(transparent)]
    Metadata(#[from] metadata::Error),
    /// Another architecture.
    #[error(
        "general.architecture is {found:?}; llama (Mistral models too), qwen2 and qwen3 are imported"
    )]
    Architecture {
        /// What the file states.
        found: String,
    },
    /// Not a language model.
    #[error("general.type is {found:?}; only a file of type \"model\" can be imported")]
    NotAModel {
        /// What the file states.
        found: String,
    },
    /// One part of a model cut into several files.
    #[error(
        "the file is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge` first"
    )]
    Split {
        /// Number of parts.
        parts: usize,
    },
    /// A key that may change the numbers and is not understood.
    #[error("the metadata key {key:?} may change the results and is not understood")]
    UnknownKey {
        /// The key.
        key: String,
    },
    /// A key whose value asks for something that is not done.
    #[error("{key} = {found} is not supported; expected {expected}")]
    Unsupported {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What would be.
        expected: String,
    },
}

/// The architectures that are imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama and Mistral. Rows of q and k are stored for interleaved `RoPE`.
    Llama,
    /// Qwen2: biases on q, k and v.
    Qwen2,
    /// Qwen3: a norm on every head of q and k.
    Qwen3,
}

impl Architecture {
    /// The name in GGUF metadata, which is also Hugging Face's `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The class in `config.json`.
    fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// The model's numbers, as the metadata states them.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Which architecture.
    pub architecture: Architecture,
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Added to the mean square in every `RMSNorm`.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How they are stretched; a Llama 3 table is found among the tensors later.
    pub rope_scaling: RopeScaling,
}

impl Config {
    /// Reads the metadata.
    pub fn read(metadata: Metadata<'_>) -> Result<Self, Error> {
        let architecture = architecture(metadata)?;
        let key = |name: &str| format!("{}.{name}", architecture.name());
        refuse_unknown(metadata, architecture)?;

        let hidden = metadata.size(&key("embedding_length"))?;
        let heads = metadata.size(&key("attention.head_count"))?;
        let kv_heads = metadata.count(&key("attention.head_count_kv"))?.unwrap_or(heads);
        if kv_heads == 0 || heads % kv_heads != 0 {
            return Err(unsupported(
                key("attention.head_count_kv"),
                kv_heads,
                format!("a divisor of the {heads} query heads"),
            ));
        }
        let head_dim = match metadata.count(&key("attention.key_length"))? {
            Some(width) => width,
            None => hidden / heads,
        };
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(unsupported(key("attention.key_length"), head_dim, "an even width".into()));
        }
        for name in ["attention.value_length", "rope.dimension_count"] {
            match metadata.count(&key(name))? {
                Some(width) if width != head_dim => {
                    return Err(unsupported(
                        key(name),
                        width,
                        format!("the head width {head_dim}"),
                    ));
                }
                _ => {}
            }
        }
        let rms_norm_eps = key("attention.layer_norm_rms_epsilon");
        let rms_norm_eps = metadata
            .number(&rms_norm_eps)?
            .ok_or(metadata::Error::Missing { key: rms_norm_eps, expected: "a number" })?;

        Ok(Self {
            architecture,
            layers: metadata.size(&key("block_count"))?,
            hidden,
            intermediate: metadata.size(&key("feed_forward_length"))?,
            heads,
            kv_heads,
            head_dim,
            context: metadata.size(&key("context_length"))?,
            rms_norm_eps,
            rope_theta: metadata.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: rope_scaling(metadata, key)?,
        })
    }

    /// `config.json`.
    pub fn to_json(&self, weights: &WeightFacts, tokens: &TokenIds) -> Value {
        let mut json = json!({
            "architectures": [self.architecture.class()],
            "model_type": self.architecture.name(),
            "vocab_size": weights.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope_json(self.rope_scaling),
            "tie_word_embeddings": weights.tied,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": true,
            "bos_token_id": tokens.bos,
            "eos_token_id": eos_json(&tokens.eos),
            "pad_token_id": tokens.pad,
            "torch_dtype": dtype_name(weights.dtype),
        });
        if let Value::Object(fields) = &mut json {
            self.architecture_fields(weights, fields);
        }
        json
    }

    fn architecture_fields(&self, weights: &WeightFacts, fields: &mut Map<String, Value>) {
        match self.architecture {
            Architecture::Llama => {
                fields.insert("attention_bias".into(), weights.attention_bias.into());
                fields.insert("mlp_bias".into(), weights.mlp_bias.into());
            }
            Architecture::Qwen2 => {
                fields.insert("use_sliding_window".into(), false.into());
            }
            Architecture::Qwen3 => {
                fields.insert("attention_bias".into(), weights.attention_bias.into());
                fields.insert("use_sliding_window".into(), false.into());
            }
        }
    }
}

/// What only the tensors tell about the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightFacts {
    /// Rows of the embedding.
    pub vocab: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Whether q, k, v and o have biases (for Qwen2: implied, and none on o).
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// How the weights are written.
    pub dtype: DType,
}

/// Token ids the configuration files name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenIds {
    /// Begins a text.
    pub bos: Option<usize>,
    /// Each ends a text; the first is the tokenizer's.
    pub eos: Vec<usize>,
    /// Fills a batch.
    pub pad: Option<usize>,
}

/// `generation_config.json`.
pub fn generation_json(tokens: &TokenIds) -> Value {
    json!({
        "_from_model_config": true,
        "bos_token_id": tokens.bos,
        "eos_token_id": eos_json(&tokens.eos),
        "pad_token_id": tokens.pad,
    })
}

fn eos_json(eos: &[usize]) -> Value {
    match eos {
        [] => Value::Null,
        [only] => json!(only),
        several => json!(several),
    }
}

/// The dtype's name in `config.json`.
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
    }
}

fn rope_json(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    }
}

fn unsupported(key: String, found: impl std::fmt::Display, expected: String) -> Error {
    Error::Unsupported { key, found: format!("{found}"), expected }
}

fn architecture(metadata: Metadata<'_>) -> Result<Architecture, Error> {
    if let Some(found) = metadata.string("general.type")?.filter(|kind| *kind != "model") {
        return Err(Error::NotAModel { found: found.into() });
    }
    if let Some(parts) = metadata.count("split.count")?.filter(|parts| *parts > 1) {
        return Err(Error::Split { parts });
    }
    match metadata.text("general.architecture")? {
        "llama" => Ok(Architecture::Llama),
        "qwen2" => Ok(Architecture::Qwen2),
        "qwen3" => Ok(Architecture::Qwen3),
        found => Err(Error::Architecture { found: found.into() }),
    }
}

/// Refuses what is not understood and what is understood but not done.
fn refuse_unknown(metadata: Metadata<'_>, architecture: Architecture) -> Result<(), Error> {
    let key = |name: &str| format!("{}.{name}", architecture.name());
    for full in metadata.keys() {
        let name = full.strip_prefix(architecture.name()).and_then(|rest| rest.strip_prefix('.'));
        if name.is_some_and(|name| !KEYS.contains(&name)) {
            return Err(Error::UnknownKey { key: full.into() });
        }
    }
    for name in ["expert_count", "expert_used_count", "attention.sliding_window"] {
        if let Some(found) = metadata.count(&key(name))?.filter(|found| *found != 0) {
            return Err(unsupported(key(name), found, "0 or no such key".into()));
        }
    }
    if metadata.flag(&key("attention.causal"))? == Some(false) {
        return Err(unsupported(key("attention.causal"), false, "true".into()));
    }
    Ok(())
}

fn rope_scaling(
    metadata: Metadata<'_>,
    key: impl Fn(&str) -> String,
) -> Result<RopeScaling, Error> {
    let factor_key = key("rope.scaling.factor");
    let factor = metadata.number(&factor_key)?;
    // Files from before `rope.scaling.*` state a linear factor under this name.
    let old = metadata.number(&key("rope.scale_linear"))?;
    let factor = match (metadata.string(&key("rope.scaling.type"))?, factor.or(old)) {
        (None, None) | (Some("none"), _) => return Ok(RopeScaling::None),
        (None | Some("linear"), Some(factor)) => factor,
        (Some("linear"), None) => {
            return Err(
                metadata::Error::Missing { key: factor_key, expected: "a number over 0" }.into()
            );
        }
        (Some(other), _) => {
            return Err(unsupported(
                key("rope.scaling.type"),
                format!("{other:?}"),
                "\"none\" or \"linear\"".into(),
            ));
        }
    };
    if factor <= 0.0 {
        return Err(unsupported(factor_key, factor, "a number over 0".into()));
    }
    Ok(RopeScaling::Linear { factor })
}
