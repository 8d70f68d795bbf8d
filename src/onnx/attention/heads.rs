//! Queries, keys and values: projected, normed by head, laid out by head, rotated.
//!
//! A projection is `[batch, sequence, heads · head_dim]`, of kept tokens `[1, kept, heads · head_dim]`, until an
//! operator wants its heads.

use skipgpt_passes::ir::{Attention, Config, KeyValue, Linear, Weight};

use super::Context;
use crate::onnx::builder::{Builder, Name};
use crate::onnx::dispatch::Rows;
use crate::onnx::graph::Attribute;

/// Queries, keys and values of every token.
pub(super) enum Projected {
    /// Side by side, `[batch, sequence, (heads + 2 · kv_heads) · head_dim]`.
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
                b.split_sizes(&format!("{place}.qkv"), all, parts)
            }
        }
    }

    /// Queries of the kept rows, `[1, kept, heads · head_dim]`.
    pub(super) fn kept_queries(&self, b: &mut Builder, rows: &Rows, normed: &str) -> Name {
        let kept = rows.places.gather(b, &format!("{}.rows", self.name), normed);
        self.queries(b, &self.name, &kept)
    }

    fn queries(&self, b: &mut Builder, place: &str, normed: &str) -> Name {
        let Attention { q, q_norm, .. } = self.attention;
        let name = format!("{place}.q");
        let projected = b.linear(&name, normed, q, b.dtype);
        let heads = self.config.num_attention_heads;
        self.norm_heads(b, &name, projected, heads, q_norm.as_ref())
    }

    /// Keys and values, `[batch, sequence, kv_heads · head_dim]` each.
    pub(super) fn keys_and_values(&self, b: &mut Builder, place: &str, normed: &str) -> [Name; 2] {
        let at = |part: &str| format!("{place}.{part}");
        let [k, v] = match &self.attention.kv {
            KeyValue::Fused(linear) => {
                let both = b.linear(&at("kv"), normed, linear, b.dtype);
                b.split(&at("kv"), &both, ["k", "v"])
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
        let x = apart(b, &format!("{name}.apart"), &x, heads, head_dim);
        let x = b.rms_norm(&format!("{name}.norm"), &x, norm, rms_norm_eps);
        together(b, &format!("{name}.normed"), &x, heads * head_dim)
    }

    /// Turns each head by its token's angles; `x` is `[batch, heads, sequence, head_dim]` or `[batch, sequence,
    /// heads · head_dim]`, `rows` its tokens' rows in the tables, `[batch, sequence]`.
    pub(super) fn rotate(&self, b: &mut Builder, name: &str, x: &str, rows: &str) -> Name {
        let tables = [&*self.shared.cos, &self.shared.sin];
        b.microsoft(name, "RotaryEmbedding", &[x, rows, tables[0], tables[1]], vec![])
    }

    /// Key and value heads.
    pub(super) const fn groups(&self) -> usize {
        self.config.num_key_value_heads
    }

    /// The same, and their width.
    pub(super) const fn key_heads(&self) -> (usize, usize) {
        (self.groups(), self.config.head_dim)
    }

    /// Width of all queries of a token.
    pub(super) const fn query_width(&self) -> usize {
        query_width(self.config)
    }

    /// Zeros, `[batch, sequence, heads · head_dim]`.
    pub(super) fn zero_queries(&self) -> &str {
        self.shared.zero_queries.as_deref().unwrap_or_default()
    }
}

/// `[batch, sequence, heads · head_dim]` as `[batch, heads, sequence, head_dim]`.
pub(super) fn heads_first(
    b: &mut Builder,
    name: &str,
    x: &str,
    (heads, head_dim): (usize, usize),
) -> Name {
    let split = apart(b, &format!("{name}.heads"), x, heads, head_dim);
    b.op_with(&format!("{name}.heads_first"), "Transpose", &[&split], swap_middle())
}

/// `[batch, sequence, heads · head_dim]` as `[batch, sequence, heads, head_dim]`.
fn apart(b: &mut Builder, name: &str, x: &str, heads: usize, head_dim: usize) -> Name {
    let shape = b.ints(&format!("shapes.heads.{heads}"), &[0, 0, heads as i64, head_dim as i64]);
    b.op(name, "Reshape", &[x, &shape])
}

/// `[batch, sequence, heads, head_dim]` as `[batch, sequence, width]`.
pub(super) fn together(b: &mut Builder, name: &str, x: &str, width: usize) -> Name {
    let shape = b.ints(&format!("shapes.width.{width}"), &[0, 0, width as i64]);
    b.op(name, "Reshape", &[x, &shape])
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
