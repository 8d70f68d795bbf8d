//! The attention module. Keys and values are computed for every token, whatever the decision, and
//! always enter the cache; only the query, the core and the output projection are skipped.
//!
//! The core is written out rather than fused: `GroupQueryAttention` assumes padding on the right and
//! refuses batches of chunks on top of a cache. Grouped queries need no copy of keys and values:
//! the `heads / kv_heads` queries of a group are rows of one matrix.

use skipgpt_passes::ir::{Attention, Config, DType, KeyValue, Linear, ModuleId, Weight};

use super::builder::{Builder, Name};
use super::graph::{Attribute, Element};
use super::lower::Shared;
use super::routing::{self, Decision};

/// Where the module stands and what it may use.
struct Context<'a> {
    shared: &'a Shared,
    config: &'a Config,
    module: ModuleId,
    name: String,
}

/// Adds the module to the residual stream `x` `[tokens, hidden]`.
pub(super) fn lower(
    b: &mut Builder,
    shared: &Shared,
    config: &Config,
    module: ModuleId,
    attention: &Attention,
    decision: Option<&Decision>,
    x: &str,
) -> Name {
    let context = Context { shared, config, module, name: module.to_string() };
    let (c, name) = (&context, &context.name);
    let normed = b.rms_norm(&format!("{name}.norm"), x, &attention.norm, config.rms_norm_eps);
    let [key, value] = c.append(b, attention, &normed);
    routing::dispatch(
        b,
        decision,
        name,
        config.hidden_size,
        x,
        |b| {
            let q = b.linear(&format!("{name}.q"), &normed, &attention.q, b.dtype);
            let context = c.core(b, &q, attention.q_norm.as_ref(), [&key, &value]);
            b.linear(&format!("{name}.o"), &context, &attention.o, b.dtype)
        },
        |b, rows| {
            let kept = rows.gather(b, &format!("{name}.rows"), &normed);
            let q = b.linear(&format!("{name}.q"), &kept, &attention.q, b.dtype);
            let q = rows.scatter(b, &format!("{name}.q.all"), c.zero_queries(), &q);
            let context = c.core(b, &q, attention.q_norm.as_ref(), [&key, &value]);
            let context = rows.gather(b, &format!("{name}.context.rows"), &context);
            b.linear(&format!("{name}.o"), &context, &attention.o, b.dtype)
        },
    )
}

/// What is added to every layer's scores, `[batch, 1, sequence, total]`: 0 where the key is real and
/// not later than the query, the dtype's lowest number elsewhere (infinity would make the rows of
/// padding NaN).
pub(super) fn bias(b: &mut Builder, zero: &str, one: &str) -> Name {
    let mask_shape = b.op("mask.shape", "Shape", &["attention_mask"]);
    let ids_shape = "shapes.ids";
    let first = b.int("constants.one", 1);
    let total = b.op("mask.total", "Gather", &[&mask_shape, &first]);
    let sequence = b.op("mask.sequence", "Gather", &[ids_shape, &first]);
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
    b.from_f32("mask.bias", &bias)
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

    /// Keys and values of every token, appended to the cache: `[batch, kv_heads, total, head_dim]`.
    fn append(&self, b: &mut Builder, attention: &Attention, normed: &str) -> [Name; 2] {
        let (name, layer) = (&self.name, self.module.layer);
        let [k, v] = match &attention.kv {
            KeyValue::Separate { k, v } => {
                [("k", k), ("v", v)].map(|(part, linear): (_, &Linear)| {
                    b.linear(&format!("{name}.{part}"), normed, linear, b.dtype)
                })
            }
            KeyValue::Fused(linear) => {
                let both = b.linear(&format!("{name}.kv"), normed, linear, b.dtype);
                b.split(&format!("{name}.kv"), &both, 1, ["k", "v"])
            }
        };
        let heads = self.config.num_key_value_heads;
        let k = self.heads_first(b, "k", &k, heads, attention.k_norm.as_ref());
        let k = self.rotate(b, "k", &k);
        let v = self.heads_first(b, "v", &v, heads, None);
        [("key", k), ("value", v)].map(|(part, new)| {
            let past = format!("past_key_values.{layer}.{part}");
            let axis = vec![("axis", Attribute::Int(2))];
            b.op_with(&format!("present.{layer}.{part}"), "Concat", &[&past, &new], axis)
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

    /// `softmax(q · Kᵀ / √head_dim + bias) · V` of queries `[tokens, heads · head_dim]`, in that
    /// shape.
    fn core(
        &self,
        b: &mut Builder,
        q: &str,
        norm: Option<&Weight>,
        [key, value]: [&str; 2],
    ) -> Name {
        let (name, config) = (&self.name, self.config);
        let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
        let q = self.heads_first(b, "q", q, heads, norm);
        let q = self.rotate(b, "q", &q);
        // Between the heads' own shape and one matrix of all queries of a group.
        let width = config.head_dim as i64;
        let regroup = |b: &mut Builder, name: &str, x: Name, heads: usize, last: i64| {
            if config.num_attention_heads == config.num_key_value_heads {
                return x;
            }
            let shape =
                b.ints(&format!("shapes.group.{heads}.{last}"), &[0, heads as i64, -1, last]);
            b.op(name, "Reshape", &[&x, &shape])
        };
        let q = regroup(b, &format!("{name}.q.groups"), q, groups, width);
        let scale = 1.0 / (config.head_dim as f64).sqrt();
        let scores = b.microsoft(
            &format!("{name}.scores.groups"),
            "FusedMatMul",
            &[&q, key],
            vec![("alpha", Attribute::Float(scale as f32)), ("transB", Attribute::Int(1))],
        );
        let scores = regroup(b, &format!("{name}.scores"), scores, heads, 0);
        let biased = b.op(&format!("{name}.scores.biased"), "Add", &[&scores, &self.shared.bias]);
        let axis = vec![("axis", Attribute::Int(-1))];
        let shares = b.op_with(&format!("{name}.shares"), "Softmax", &[&biased], axis);
        let shares = regroup(b, &format!("{name}.shares.groups"), shares, groups, 0);
        let mixed = b.op(&format!("{name}.mixed.groups"), "MatMul", &[&shares, value]);
        let mixed = regroup(b, &format!("{name}.mixed"), mixed, heads, width);
        let mixed =
            b.op_with(&format!("{name}.mixed.tokens"), "Transpose", &[&mixed], swap_middle());
        let flat = b.ints("shapes.queries.flat", &[-1, query_width(config) as i64]);
        b.op(&format!("{name}.context"), "Reshape", &[&mixed, &flat])
    }
}

fn swap_middle() -> Vec<(&'static str, Attribute)> {
    vec![("perm", Attribute::Ints(vec![0, 2, 1, 3]))]
}

/// The name of the shape `[batch, sequence, heads, head_dim]`.
fn heads_shape(heads: usize) -> Name {
    format!("shapes.heads.{heads}")
}

/// The shapes `[batch, sequence, heads, head_dim]` of queries, and of keys and values.
pub(super) fn head_shapes(b: &mut Builder, config: &Config) {
    let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
    for count in if heads == groups { vec![heads] } else { vec![heads, groups] } {
        let name = heads_shape(count);
        let split = b.ints(&format!("{name}.split"), &[count as i64, config.head_dim as i64]);
        let axis = vec![("axis", Attribute::Int(0))];
        b.op_with(&name, "Concat", &["shapes.ids", &split], axis);
    }
}
