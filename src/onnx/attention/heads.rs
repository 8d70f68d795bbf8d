//! Queries, keys and values: projected, normed by head, laid out by head, rotated.
//!
//! A projection is `[tokens, heads · head_dim]` until an operator wants its heads.

use skipgpt_passes::ir::{Attention, Config, KeyValue, Linear, Weight};

use super::Context;
use super::shared::heads_shape;
use crate::onnx::builder::{Builder, Name};
use crate::onnx::dispatch::Rows;
use crate::onnx::graph::Attribute;

/// Queries, keys and values of every token.
pub(super) enum Projected {
    /// Side by side, `[tokens, (heads + 2 · kv_heads) · head_dim]`.
    Packed(Name),
    /// Each its own.
    Apart([Name; 3]),
}

impl Context<'_> {
    /// Queries, keys and values: one product where projections may be rearranged.
    pub(super) fn project_all(&self, b: &mut Builder, place: &str, normed: &str) -> Projected {
        if let Some(linear) = every_projection(self.attention) {
            let name = format!("{place}.qkv");
            return Projected::Packed(b.linear(&name, normed, &linear, b.dtype));
        }
        let q = self.queries(b, place, normed);
        let [k, v] = self.keys_and_values(b, place, normed);
        Projected::Apart([q, k, v])
    }

    /// The three parts of what was projected.
    pub(super) fn apart(&self, b: &mut Builder, place: &str, projected: &Projected) -> [Name; 3] {
        match projected {
            Projected::Apart(parts) => parts.clone(),
            Projected::Packed(all) => {
                let (heads, groups) = (self.query_width(), self.groups() * self.config.head_dim);
                let parts = [("q", heads), ("k", groups), ("v", groups)];
                b.split_sizes(&format!("{place}.qkv"), all, 1, parts)
            }
        }
    }

    /// Queries of the kept rows, `[kept, heads · head_dim]`.
    pub(super) fn kept_queries(&self, b: &mut Builder, rows: &Rows, normed: &str) -> Name {
        let kept = rows.gather(b, &format!("{}.rows", self.name), normed);
        self.queries(b, &self.name, &kept)
    }

    fn queries(&self, b: &mut Builder, place: &str, normed: &str) -> Name {
        let Attention { q, q_norm, .. } = self.attention;
        let name = format!("{place}.q");
        let projected = b.linear(&name, normed, q, b.dtype);
        let heads = self.config.num_attention_heads;
        self.norm_heads(b, &name, projected, heads, q_norm.as_ref())
    }

    /// Keys and values, `[tokens, kv_heads · head_dim]` each.
    pub(super) fn keys_and_values(&self, b: &mut Builder, place: &str, normed: &str) -> [Name; 2] {
        let at = |part: &str| format!("{place}.{part}");
        let [k, v] = match &self.attention.kv {
            KeyValue::Fused(linear) => {
                let both = b.linear(&at("kv"), normed, linear, b.dtype);
                b.split(&at("kv"), &both, 1, ["k", "v"])
            }
            KeyValue::Separate { k, v } => [("k", k), ("v", v)]
                .map(|(part, linear): (_, &Linear)| b.linear(&at(part), normed, linear, b.dtype)),
        };
        let norm = self.attention.k_norm.as_ref();
        [self.norm_heads(b, &at("k"), k, self.groups(), norm), v]
    }

    /// Each head normed, where the model does so.
    fn norm_heads(
        &self,
        b: &mut Builder,
        name: &str,
        x: Name,
        heads: usize,
        norm: Option<&Weight>,
    ) -> Name {
        let Some(norm) = norm else { return x };
        let Config { head_dim, rms_norm_eps, .. } = *self.config;
        let (heads, width) = (heads as i64, head_dim as i64);
        let apart = b.ints(&format!("shapes.normed.{heads}"), &[-1, heads, width]);
        let x = b.op(&format!("{name}.apart"), "Reshape", &[&x, &apart]);
        let x = b.rms_norm(&format!("{name}.norm"), &x, norm, rms_norm_eps);
        let flat = b.ints(&format!("shapes.flat.{}", heads * width), &[-1, heads * width]);
        b.op(&format!("{name}.normed"), "Reshape", &[&x, &flat])
    }

    /// Turns each head by its token's angles; `x` is `[batch, heads, sequence, head_dim]`, `rows` its
    /// tokens' rows in the tables, `[batch, sequence]`.
    pub(super) fn rotate(&self, b: &mut Builder, name: &str, x: &str, rows: &str) -> Name {
        let tables = [&*self.shared.cos, &self.shared.sin];
        b.microsoft(name, "RotaryEmbedding", &[x, rows, tables[0], tables[1]], vec![])
    }

    /// Key and value heads.
    pub(super) const fn groups(&self) -> usize {
        self.config.num_key_value_heads
    }

    /// Width of all queries of a token.
    pub(super) const fn query_width(&self) -> usize {
        query_width(self.config)
    }

    /// Zeros, `[tokens, heads · head_dim]`.
    pub(super) fn zero_queries(&self) -> &str {
        self.shared.zero_queries.as_deref().unwrap_or_default()
    }
}

/// `[tokens, heads · head_dim]` as `[batch, heads, sequence, head_dim]`.
pub(super) fn heads_first(b: &mut Builder, name: &str, x: &str, heads: usize) -> Name {
    let split = b.op(&format!("{name}.heads"), "Reshape", &[x, &heads_shape(heads)]);
    b.op_with(&format!("{name}.heads_first"), "Transpose", &[&split], swap_middle())
}

pub(super) const fn query_width(config: &Config) -> usize {
    config.num_attention_heads * config.head_dim
}

/// q, k and v as one projection, where k and v already are one and no head is normed.
fn every_projection(attention: &Attention) -> Option<Linear> {
    let Attention { q, kv: KeyValue::Fused(kv), q_norm: None, k_norm: None, .. } = attention else {
        return None;
    };
    let join = |q: &Weight, kv: &Weight| Weight::Concat(vec![q.clone(), kv.clone()]);
    let bias = match (&q.bias, &kv.bias) {
        (None, None) => None,
        (Some(q), Some(kv)) => Some(join(q, kv)),
        _ => return None,
    };
    Some(Linear { weight: join(&q.weight, &kv.weight), bias, lora: None })
}

pub(super) fn swap_middle() -> Vec<(&'static str, Attribute)> {
    vec![("perm", Attribute::Ints(vec![0, 2, 1, 3]))]
}
