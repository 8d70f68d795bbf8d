//! The attention module. Keys and values are computed for every token, whatever the decision, and
//! always enter the cache; only the query, the core and the output projection are skipped.
//!
//! The core is written out rather than fused: `GroupQueryAttention` assumes padding on the right and
//! refuses batches of chunks on top of a cache.

use std::collections::BTreeSet;

use skipgpt_passes::ir::{Attention, Config, DType, KeyValue, Linear, Model, ModuleId, Weight};

use super::builder::{Builder, Name};
use super::dispatch;
use super::graph::{Attribute, Element};
use super::lower::Shared;
use super::router::Decision;
use super::stream::Stream;

/// Where the module stands and what it may use.
struct Context<'a> {
    shared: &'a Shared,
    config: &'a Config,
    attention: &'a Attention,
    layer: usize,
    name: String,
}

/// Adds the module to the residual stream.
pub(super) fn lower(
    b: &mut Builder,
    shared: &Shared,
    config: &Config,
    (module, attention): (ModuleId, &Attention),
    decision: Option<&Decision>,
    stream: Stream,
) -> Stream {
    let name = module.to_string();
    let c = Context { shared, config, attention, layer: module.layer, name };
    let (name, heads) = (&c.name, config.num_attention_heads);
    let (normed, x) = stream.norm(b, &format!("{name}.norm"), &attention.norm, config.rms_norm_eps);
    match decision.filter(|decision| decision.gathers()) {
        None => {
            let [q, k, v] = c.every_head(b, &normed);
            let cache = c.append(b, &k, &v);
            let context = c.core(b, &q, &cache);
            let change = b.linear(&format!("{name}.o"), &context, &attention.o, b.dtype);
            dispatch::whole(b, decision, name, x, change)
        }
        Some(decision) => {
            let [k, v] = c.key_value_heads(b, &normed);
            let cache = c.append(b, &k, &v);
            dispatch::kept_rows(b, decision, config.hidden_size, &x, |b, rows| {
                let kept = rows.gather(b, &format!("{name}.rows"), &normed);
                let q = b.linear(&format!("{name}.q"), &kept, &attention.q, b.dtype);
                let q = rows.scatter(b, &format!("{name}.q.all"), c.zero_queries(), &q);
                let q = c.heads_first(b, "q", &q, heads, attention.q_norm.as_ref());
                let context = c.core(b, &q, &cache);
                let context = rows.gather(b, &format!("{name}.context.rows"), &context);
                b.linear(&format!("{name}.o"), &context, &attention.o, b.dtype)
            })
        }
    }
}

/// What is added to every layer's scores, `[batch, 1, group · sequence, total]`, a group being the
/// queries that share a key: 0 where the key is real and not later than the query, the dtype's lowest number elsewhere (infinity would make the rows of
/// padding NaN).
pub(super) fn bias(b: &mut Builder, config: &Config, zero: &str, one: &str) -> Name {
    let mask_shape = b.op("mask.shape", "Shape", &["attention_mask"]);
    let total = b.op("mask.total", "Gather", &[&mask_shape, one]);
    let sequence = b.op("mask.sequence", "Gather", &["shapes.ids", one]);
    let past = b.op("mask.past", "Sub", &[&total, &sequence]);
    let keys = b.op("mask.keys", "Range", &[zero, &total, one]);
    let queries = b.op("mask.queries", "Range", &[&past, &total, one]);
    let column = b.ints("shapes.column", &[-1, 1]);
    let queries = b.op("mask.query_column", "Reshape", &[&queries, &column]);
    let causal = b.op("mask.causal", "LessOrEqual", &[&keys, &queries]);
    let real = b.cast_to("mask.real", "attention_mask", Element::Bool);
    let middle = b.ints("constants.middle_axes", &[1, 2]);
    let real = b.op("mask.real_keys", "Unsqueeze", &[&real, &middle]);
    let allowed = b.op("mask.allowed", "And", &[&real, &causal]);
    let lowest = match b.dtype {
        DType::F32 | DType::BF16 => f32::from_bits(0xff7f_0000),
        DType::F16 => half::f16::MIN.to_f32(),
    };
    let open = b.floats("constants.zero.f32", &[], &[0.0]);
    let closed = b.floats("constants.lowest", &[], &[lowest]);
    let bias = b.op("mask.bias.f32", "Where", &[&allowed, &open, &closed]);
    let bias = b.rounded("mask.bias", &bias);
    let group = config.num_attention_heads / config.num_key_value_heads;
    if group == 1 {
        return bias;
    }
    let axis = vec![("axis", Attribute::Int(2))];
    b.op_with("mask.bias.groups", "Concat", &vec![bias.as_str(); group], axis)
}

/// Zeros for the queries of every token, `[tokens, heads · head_dim]`: where kept rows are written.
pub(super) fn zero_queries(b: &mut Builder, config: &Config) -> Name {
    let width = b.ints("shapes.query_width", &[query_width(config) as i64]);
    let flat = b.ints("shapes.flat", &[-1]);
    let tokens = b.op("shapes.tokens.vector", "Reshape", &["shapes.tokens", &flat]);
    let axis = vec![("axis", Attribute::Int(0))];
    let shape = b.op_with("shapes.queries", "Concat", &[&tokens, &width], axis);
    let zero = b.zero("constants.zero.hidden");
    b.op("attention.zero_queries", "Expand", &[&zero, &shape])
}

fn query_width(config: &Config) -> usize {
    config.num_attention_heads * config.head_dim
}

impl Context<'_> {
    fn zero_queries(&self) -> &str {
        self.shared.zero_queries.as_deref().unwrap_or_default()
    }

    /// Queries, keys and values of every token, `[batch, heads, sequence, head_dim]` each: one
    /// product where projections may be rearranged.
    fn every_head(&self, b: &mut Builder, normed: &str) -> [Name; 3] {
        let Attention { q, q_norm, .. } = self.attention;
        let (heads, groups) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        if let Some(linear) = every_projection(self.attention) {
            let parts = [("q", heads), ("k", groups), ("v", groups)];
            return self.split_heads(b, "qkv", normed, &linear, parts);
        }
        let q = b.linear(&format!("{}.q", self.name), normed, q, b.dtype);
        let q = self.heads_first(b, "q", &q, heads, q_norm.as_ref());
        let [k, v] = self.key_value_heads(b, normed);
        [q, k, v]
    }

    /// Keys and values of every token, `[batch, kv_heads, sequence, head_dim]` each.
    fn key_value_heads(&self, b: &mut Builder, normed: &str) -> [Name; 2] {
        let (name, groups) = (&self.name, self.config.num_key_value_heads);
        let norm = self.attention.k_norm.as_ref();
        let [k, v] = match &self.attention.kv {
            KeyValue::Fused(linear) if norm.is_none() => {
                return self.split_heads(b, "kv", normed, linear, [("k", groups), ("v", groups)]);
            }
            KeyValue::Fused(linear) => {
                let both = b.linear(&format!("{name}.kv"), normed, linear, b.dtype);
                b.split(&format!("{name}.kv"), &both, 1, ["k", "v"])
            }
            KeyValue::Separate { k, v } => {
                [("k", k), ("v", v)].map(|(part, linear): (_, &Linear)| {
                    b.linear(&format!("{name}.{part}"), normed, linear, b.dtype)
                })
            }
        };
        [self.heads_first(b, "k", &k, groups, norm), self.heads_first(b, "v", &v, groups, None)]
    }

    /// One projection onto the heads of several parts, heads first.
    fn split_heads<const N: usize>(
        &self,
        b: &mut Builder,
        part: &str,
        normed: &str,
        linear: &Linear,
        parts: [(&str, usize); N],
    ) -> [Name; N] {
        let all = b.linear(&format!("{}.{part}", self.name), normed, linear, b.dtype);
        let heads = parts.iter().map(|(_, heads)| heads).sum();
        let all = self.heads_first(b, part, &all, heads, None);
        b.split_sizes(&format!("{}.{part}", self.name), &all, 1, parts)
    }

    /// The caches with the new tokens' keys, rotated, and values, `[batch, kv_heads, total,
    /// head_dim]` each.
    fn append(&self, b: &mut Builder, k: &str, v: &str) -> [Name; 2] {
        let k = self.rotate(b, "k", k);
        [("key", k.as_str()), ("value", v)].map(|(part, new)| {
            let past = format!("past_key_values.{}.{part}", self.layer);
            let axis = vec![("axis", Attribute::Int(2))];
            b.op_with(&format!("present.{}.{part}", self.layer), "Concat", &[&past, new], axis)
        })
    }

    /// `[tokens, heads · head_dim]` as `[batch, heads, sequence, head_dim]`, each head normed where
    /// the model does so.
    fn heads_first(
        &self,
        b: &mut Builder,
        part: &str,
        x: &str,
        heads: usize,
        norm: Option<&Weight>,
    ) -> Name {
        let name = format!("{}.{part}", self.name);
        let shape = heads_shape(heads);
        let mut split = b.op(&format!("{name}.heads"), "Reshape", &[x, &shape]);
        if let Some(norm) = norm {
            split = b.rms_norm(&format!("{name}.norm"), &split, norm, self.config.rms_norm_eps);
        }
        b.op_with(&format!("{name}.heads_first"), "Transpose", &[&split], swap_middle())
    }

    /// Turns each head by its token's angles; `x` is `[batch, heads, sequence, head_dim]`.
    fn rotate(&self, b: &mut Builder, part: &str, x: &str) -> Name {
        let Shared { rows, cos, sin, .. } = self.shared;
        let name = format!("{}.{part}.rotated", self.name);
        b.microsoft(&name, "RotaryEmbedding", &[x, rows, cos, sin], vec![])
    }

    /// `softmax(q · Kᵀ / √head_dim + bias) · V` of queries `[batch, heads, sequence, head_dim]`,
    /// before rotation: `[tokens, heads · head_dim]`.
    ///
    /// The queries that share a key are rows of one matrix, so keys and values need no copies.
    fn core(&self, b: &mut Builder, q: &str, [key, value]: &[Name; 2]) -> Name {
        let (name, config) = (&self.name, self.config);
        let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
        let width = config.head_dim as i64;
        let regroup = |b: &mut Builder, name: &str, x: Name, count: usize| {
            if heads == groups {
                return x;
            }
            let shape = b.ints(&format!("shapes.group.{count}"), &[0, count as i64, -1, width]);
            b.op(name, "Reshape", &[&x, &shape])
        };
        let q = self.rotate(b, "q", q);
        let q = regroup(b, &format!("{name}.q.groups"), q, groups);
        let scale = 1.0 / (config.head_dim as f64).sqrt();
        let scores = b.microsoft(
            &format!("{name}.scores"),
            "FusedMatMul",
            &[&q, key],
            vec![("alpha", Attribute::Float(scale as f32)), ("transB", Attribute::Int(1))],
        );
        let biased = b.op(&format!("{name}.scores.biased"), "Add", &[&scores, &self.shared.bias]);
        let axis = vec![("axis", Attribute::Int(-1))];
        let shares = b.op_with(&format!("{name}.shares"), "Softmax", &[&biased], axis);
        let mixed = b.op(&format!("{name}.mixed.groups"), "MatMul", &[&shares, value]);
        let mixed = regroup(b, &format!("{name}.mixed"), mixed, heads);
        let mixed =
            b.op_with(&format!("{name}.mixed.tokens"), "Transpose", &[&mixed], swap_middle());
        let flat = b.ints("shapes.queries.flat", &[-1, query_width(config) as i64]);
        b.op(&format!("{name}.context"), "Reshape", &[&mixed, &flat])
    }
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

fn swap_middle() -> Vec<(&'static str, Attribute)> {
    vec![("perm", Attribute::Ints(vec![0, 2, 1, 3]))]
}

/// The name of the shape `[batch, sequence, heads, head_dim]`.
fn heads_shape(heads: usize) -> Name {
    format!("shapes.heads.{heads}")
}

/// The shapes `[batch, sequence, heads, head_dim]` of every number of heads in use.
pub(super) fn head_shapes(b: &mut Builder, model: &Model) {
    let config = &model.config;
    let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
    let mut counts = BTreeSet::new();
    for attention in model.layers.iter().filter_map(|layer| layer.attention.as_ref()) {
        let fused = matches!(attention.kv, KeyValue::Fused(_)) && attention.k_norm.is_none();
        if !dispatch::gathers(&attention.routing) && every_projection(attention).is_some() {
            counts.insert(heads + 2 * groups);
        } else {
            counts.extend([heads, if fused { 2 * groups } else { groups }]);
        }
    }
    for count in counts {
        let name = heads_shape(count);
        let split = b.ints(&format!("{name}.split"), &[count as i64, config.head_dim as i64]);
        let axis = vec![("axis", Attribute::Int(0))];
        b.op_with(&name, "Concat", &["shapes.ids", &split], axis);
    }
}
