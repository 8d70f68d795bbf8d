//! `config.json`: the numbers that are not weights.
//!
//! Every key that changes what a model computes is either read here or, unless its value says
//! "not in use", refused by its name ([`keys`]). Keys that are in neither list are ignored, as
//! transformers' own classes for these architectures ignore them.

mod keys;
mod rope;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use serde_json::Value;
use skipgpt_passes::ir::{self, Architecture};

use super::files;
use keys::Keys;

/// Most bytes a `config.json` may have.
const LIMIT: u64 = 4 << 20;

/// What is wrong with a `config.json`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be opened or is not JSON.
    #[error(transparent)]
    File(#[from] files::Error),
    /// Not a JSON object.
    #[error("{}: expected a JSON object", path.display())]
    NotAnObject {
        /// The file.
        path: PathBuf,
    },
    /// A key that is needed is not there.
    #[error("{}: {key} is missing; expected {expected}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it would be.
        expected: &'static str,
    },
    /// A value is of the wrong type or out of range.
    #[error("{}: {key} is {found}; expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What stands there.
        found: String,
        /// What should.
        expected: &'static str,
    },
    /// A value asks for arithmetic that is not implemented.
    #[error("{}: {key} is {found}, which is not supported; {advice}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What stands there.
        found: String,
        /// What can be done.
        advice: &'static str,
    },
    /// Numbers that do not go together.
    #[error("{}: {}", path.display(), conflict)]
    Conflict {
        /// The file.
        path: PathBuf,
        /// Which, and why.
        conflict: Conflict,
    },
}

/// Numbers of a config that do not go together.
#[derive(Debug, thiserror::Error)]
pub enum Conflict {
    /// Heads cannot share keys and values evenly.
    #[error("num_key_value_heads {key_value} does not divide num_attention_heads {heads}")]
    HeadGroups {
        /// `num_attention_heads`.
        heads: usize,
        /// `num_key_value_heads`.
        key_value: usize,
    },
    /// Without `head_dim`, the heads share the hidden state evenly.
    #[error("num_attention_heads {heads} does not divide hidden_size {hidden}; state head_dim")]
    HeadWidth {
        /// `num_attention_heads`.
        heads: usize,
        /// `hidden_size`.
        hidden: usize,
    },
    /// Rotary embedding turns pairs.
    #[error("head_dim {0} is odd; rotary embedding needs an even one")]
    OddHead(usize),
    /// The base of the rotary frequencies is stated twice, differently.
    #[error("rope_theta is stated twice, as {0} and as {1}; remove one")]
    Theta(f64, f64),
    /// Both forms of `RoPE` settings.
    #[error("rope_scaling and rope_parameters are both there; remove one")]
    RopeTwice,
    /// The ramp between low and high frequencies has no width.
    #[error("{key}: high_freq_factor {high} is not above low_freq_factor {low}")]
    RopeRamp {
        /// `rope_scaling` or `rope_parameters`.
        key: &'static str,
        /// `low_freq_factor`.
        low: f64,
        /// `high_freq_factor`.
        high: f64,
    },
}

/// What a `config.json` says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Config {
    /// The model's numbers.
    pub(super) model: ir::Config,
    /// Width of the MLP.
    pub(super) intermediate_size: usize,
    /// Whether the head's weight is the embedding.
    pub(super) tied: bool,
    /// Which projections have a bias.
    pub(super) bias: Bias,
    /// Whether q and k are normalised per head.
    pub(super) head_norm: bool,
}

/// Which projections have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bias {
    /// q, k and v.
    pub(super) qkv: bool,
    /// The attention's output projection.
    pub(super) output: bool,
    /// gate, up and down.
    pub(super) mlp: bool,
}

/// Reads `config.json` at `path`.
pub(super) fn read(path: &Path) -> Result<Config, Error> {
    match files::json(path, LIMIT)? {
        Value::Object(map) => parse(&Keys { path, map: &map }),
        _ => Err(Error::NotAnObject { path: path.to_owned() }),
    }
}

fn parse(keys: &Keys<'_>) -> Result<Config, Error> {
    let architecture = architecture(keys)?;
    keys.refuse_unsupported(architecture)?;
    let hidden_size = keys.size("hidden_size")?;
    let num_attention_heads = keys.size("num_attention_heads")?;
    let num_key_value_heads = match keys.optional_size("num_key_value_heads")? {
        Some(heads) => heads,
        // The others' classes have a default that is not the number of query heads.
        None if architecture == Architecture::Llama || keys.is_null("num_key_value_heads") => {
            num_attention_heads
        }
        None => return Err(keys.missing("num_key_value_heads", "a whole number")),
    };
    if num_attention_heads % num_key_value_heads != 0 {
        let (heads, key_value) = (num_attention_heads, num_key_value_heads);
        return Err(keys.conflict(Conflict::HeadGroups { heads, key_value }));
    }
    let head_dim = match keys.optional_size("head_dim")? {
        Some(width) => width,
        None if architecture == Architecture::Qwen3 => {
            return Err(keys.missing("head_dim", "a whole number"));
        }
        None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
        None => {
            let (heads, hidden) = (num_attention_heads, hidden_size);
            return Err(keys.conflict(Conflict::HeadWidth { heads, hidden }));
        }
    };
    if head_dim % 2 != 0 {
        return Err(keys.conflict(Conflict::OddHead(head_dim)));
    }
    Ok(Config {
        model: ir::Config {
            architecture,
            hidden_size,
            vocab_size: keys.size("vocab_size")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: keys.positive("rms_norm_eps")?,
            rope: rope::read(keys)?,
            max_position_embeddings: keys.size("max_position_embeddings")?,
            num_hidden_layers: keys.size("num_hidden_layers")?,
        },
        intermediate_size: keys.size("intermediate_size")?,
        tied: keys.flag("tie_word_embeddings", false)?,
        bias: bias(keys, architecture)?,
        head_norm: architecture == Architecture::Qwen3,
    })
}

fn architecture(keys: &Keys<'_>) -> Result<Architecture, Error> {
    const KNOWN: &str = "llama, mistral, qwen2 and qwen3 are read";
    let found = keys.map.get("model_type").ok_or_else(|| keys.missing("model_type", KNOWN))?;
    Ok(match found.as_str() {
        Some("llama") => Architecture::Llama,
        Some("mistral") => Architecture::Mistral,
        Some("qwen2") => Architecture::Qwen2,
        Some("qwen3") => Architecture::Qwen3,
        _ => return Err(keys.unsupported("model_type", found, KNOWN)),
    })
}

fn bias(keys: &Keys<'_>, architecture: Architecture) -> Result<Bias, Error> {
    // What each class of transformers does; a key it does not know must agree with that.
    let fixed = |key: &'static str, value: bool, advice: &'static str| match keys.map.get(key) {
        Some(found) if keys.flag(key, value)? != value => Err(keys.unsupported(key, found, advice)),
        _ => Ok(value),
    };
    let attention = match architecture {
        Architecture::Llama | Architecture::Qwen3 => keys.flag("attention_bias", false)?,
        Architecture::Mistral => {
            fixed("attention_bias", false, "a mistral model has no attention biases")?
        }
        Architecture::Qwen2 => {
            fixed("attention_bias", true, "a qwen2 model always has q, k and v biases")?
        }
    };
    let mlp = if architecture == Architecture::Llama {
        keys.flag("mlp_bias", false)?
    } else {
        fixed("mlp_bias", false, "only a llama model can have MLP biases")?
    };
    let output = attention && architecture != Architecture::Qwen2;
    Ok(Bias { qkv: attention, output, mlp })
}
