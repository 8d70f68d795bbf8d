//! Which tensor of a GGUF file becomes which tensor of the checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use super::config::{Architecture, Config};
use super::gguf::Tensor;

/// The table of rotary divisors, which becomes configuration instead of a tensor.
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// Why the tensors are not those of the model the metadata describes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor the model needs is not there.
    #[error("the tensor {name:?} is missing; a {architecture} model with {layers} layers needs it")]
    Missing {
        /// Its name in the file.
        name: String,
        /// The architecture.
        architecture: &'static str,
        /// Number of layers stated.
        layers: usize,
    },
    /// A tensor of another shape than the metadata says.
    #[error("the tensor {name:?} has shape {found:?}; the metadata says {expected:?}")]
    Shape {
        /// Its name in the file.
        name: String,
        /// The shape it has, slowest dimension first.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A tensor that no part of the model uses.
    #[error(
        "the tensor {name:?} is no part of a {architecture} model as it is understood here; \
         leaving it out could change the results"
    )]
    Unknown {
        /// Its name in the file.
        name: String,
        /// The architecture.
        architecture: &'static str,
    },
}

/// One tensor to write.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Its name in the checkpoint.
    pub name: String,
    /// Where its values are.
    pub source: Tensor,
    /// Where its rows are stored for interleaved `RoPE`: the width of a head.
    pub interleaved: Option<usize>,
}

/// Every tensor of the model, and what they tell about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Jobs {
    /// Sorted by name.
    pub jobs: Vec<Job>,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Whether attention projections have biases.
    pub attention_bias: bool,
    /// Whether MLP projections have biases.
    pub mlp_bias: bool,
}

/// Pairs every tensor of the file with its place in the checkpoint.
pub fn jobs(config: &Config, tensors: &BTreeMap<String, Tensor>) -> Result<Jobs, Error> {
    let has = |name: &str| tensors.contains_key(name);
    let attention_bias = match config.architecture {
        Architecture::Qwen2 => true,
        _ => has("blk.0.attn_q.bias"),
    };
    let mlp_bias = config.architecture == Architecture::Llama && has("blk.0.ffn_gate.bias");
    let tied = !has("output.weight");
    let vocab = tensors.get("token_embd.weight").map_or(0, Tensor::rows);

    let mut taken = Taken { config, tensors, names: BTreeSet::new(), jobs: Vec::new() };
    taken.take("token_embd.weight", "model.embed_tokens.weight", &[vocab, config.hidden])?;
    taken.take("output_norm.weight", "model.norm.weight", &[config.hidden])?;
    if !tied {
        taken.take("output.weight", "lm_head.weight", &[vocab, config.hidden])?;
    }
    for layer in 0..config.layers {
        taken.layer(layer, attention_bias, mlp_bias)?;
    }
    for name in tensors.keys() {
        if name != ROPE_FREQS && !taken.names.contains(name) {
            return Err(Error::Unknown {
                name: name.clone(),
                architecture: config.architecture.name(),
            });
        }
    }
    let mut jobs = taken.jobs;
    jobs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Jobs { jobs, vocab, tied, attention_bias, mlp_bias })
}

/// The tensors of the file and those already given a place.
struct Taken<'a> {
    config: &'a Config,
    tensors: &'a BTreeMap<String, Tensor>,
    names: BTreeSet<String>,
    jobs: Vec<Job>,
}

impl Taken<'_> {
    fn take(&mut self, from: &str, to: &str, shape: &[usize]) -> Result<(), Error> {
        let Some(source) = self.tensors.get(from) else {
            return Err(Error::Missing {
                name: from.into(),
                architecture: self.config.architecture.name(),
                layers: self.config.layers,
            });
        };
        if source.shape != shape {
            return Err(Error::Shape {
                name: from.into(),
                found: source.shape.clone(),
                expected: shape.into(),
            });
        }
        let rotated = from.contains(".attn_q.") || from.contains(".attn_k.");
        let interleaved = (rotated && self.config.architecture == Architecture::Llama)
            .then_some(self.config.head_dim);
        self.names.insert(from.into());
        self.jobs.push(Job { name: to.into(), source: source.clone(), interleaved });
        Ok(())
    }

    fn layer(&mut self, layer: usize, attention_bias: bool, mlp_bias: bool) -> Result<(), Error> {
        let Config { hidden, intermediate, heads, kv_heads, head_dim, architecture, .. } =
            *self.config;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let output_bias = attention_bias && architecture != Architecture::Qwen2;
        let linears = [
            ("attn_q", "self_attn.q_proj", q, hidden, attention_bias),
            ("attn_k", "self_attn.k_proj", kv, hidden, attention_bias),
            ("attn_v", "self_attn.v_proj", kv, hidden, attention_bias),
            ("attn_output", "self_attn.o_proj", hidden, q, output_bias),
            ("ffn_gate", "mlp.gate_proj", intermediate, hidden, mlp_bias),
            ("ffn_up", "mlp.up_proj", intermediate, hidden, mlp_bias),
            ("ffn_down", "mlp.down_proj", hidden, intermediate, mlp_bias),
        ];
        let mut norms = vec![
            ("attn_norm", "input_layernorm", hidden),
            ("ffn_norm", "post_attention_layernorm", hidden),
        ];
        if architecture == Architecture::Qwen3 {
            norms.push(("attn_q_norm", "self_attn.q_norm", head_dim));
            norms.push(("attn_k_norm", "self_attn.k_norm", head_dim));
        }
        let names = |from: &str, to: &str, kind: &str| {
            (format!("blk.{layer}.{from}.{kind}"), format!("model.layers.{layer}.{to}.{kind}"))
        };
        for (from, to, width) in norms {
            let (from, to) = names(from, to, "weight");
            self.take(&from, &to, &[width])?;
        }
        for (from, to, rows, columns, bias) in linears {
            let (weight, to_weight) = names(from, to, "weight");
            self.take(&weight, &to_weight, &[rows, columns])?;
            if bias {
                let (bias, to_bias) = names(from, to, "bias");
                self.take(&bias, &to_bias, &[rows])?;
            }
        }
        Ok(())
    }
}
