//! What every attention module uses, once per graph: angles, lengths, what a query may see, and
//! which form a step has.

use skipgpt_passes::ir::{Config, DType, Model, ModuleKind};

use super::attend;
use super::core::{Forms, When};
use super::heads::query_width;
use crate::decoder::Sequences;
use crate::onnx::builder::{Builder, Name};
use crate::onnx::dispatch;
use crate::onnx::graph::{Attribute, Element};
use crate::onnx::router;
use crate::rope;

/// Values every layer uses.
pub(in crate::onnx) struct Shared {
    /// The number of a token's row in the tables, `[batch, sequence]`.
    pub(super) rows: Name,
    /// Cosines of every token's angles, `[tokens, head_dim / 2]`.
    pub(super) cos: Name,
    /// Sines of every token's angles, `[tokens, head_dim / 2]`.
    pub(super) sin: Name,
    /// Added to attention scores: 0 where a query may look, `[batch, 1, sequence, total]`; present unless all is
    /// one whole sequence.
    pub(super) bias: Name,
    /// The same for the queries that share a key, `[batch, 1, group · sequence, total]`; present where
    /// attention goes by elementary operators.
    pub(super) group_bias: Name,
    /// Zeros, `[batch, sequence, heads · head_dim]`; present if an attention module gathers its rows.
    pub(super) zero_queries: Option<Name>,
    /// Whether there is one sequence; present if that may differ and an attention module asks.
    pub(super) one_sequence: Name,
    /// What `GroupQueryAttention` takes, if it may be used.
    pub(super) grouped: Option<Grouped>,
}

impl Shared {
    /// Whether the branch of a conditional attention module for all tokens is for steps of one token in each
    /// sequence only.
    pub(in crate::onnx) fn gates(&self) -> bool {
        let single = self.grouped.as_ref().map(|grouped| &grouped.forms.single);
        matches!(single, Some(When::If(_)))
    }

    /// Which form a step has.
    pub(super) fn forms(&self) -> Forms {
        let none = Forms { single: When::Never, whole: When::Never };
        self.grouped.as_ref().map_or(none, |grouped| grouped.forms.clone())
    }

    /// The column of each sequence's last real token among the new ones, `[batch, 1, 1]`: told by the mask,
    /// because onnxruntime-genai pads prompts of a batch on the right. 0 where all of them are padding.
    pub(in crate::onnx) fn last_columns(&self, b: &mut Builder) -> Name {
        if b.sequences == Sequences::One {
            let (one, apart) = (b.int("constants.one", 1), b.ints("shapes.one_column", &[1, 1, 1]));
            let last = b.op("last.column", "Sub", &["mask.sequence", &one]);
            return b.op("last.columns_apart", "Reshape", &[&last, &apart]);
        }
        let past = match &self.grouped {
            Some(grouped) => grouped.past_vector.clone(),
            None => vector(b, "mask.past"),
        };
        let end = b.ints("constants.end", &[i64::MAX]);
        let axis = b.ints("constants.sequence_axis", &[1]);
        let real = b.op("last.real", "Slice", &["attention_mask", &past, &end, &axis]);
        let (zero, one) = (b.int("constants.zero", 0), b.int("constants.one", 1));
        let columns = b.op("last.columns", "Range", &[&zero, "mask.sequence", &one]);
        let columns = b.op("last.real_columns", "Mul", &[&real, &columns]);
        let last = b.op("last.column", "ReduceMax", &[&columns, &axis]);
        b.op("last.columns_apart", "Unsqueeze", &[&last, &axis])
    }
}

/// What `GroupQueryAttention` takes beside queries, keys and values.
pub(super) struct Grouped {
    /// Which form a step has. A whole sequence is one only where chunks have an operator too.
    pub(super) forms: Forms,
    /// Cached tokens after the step, less one, `[batch]`, `i32`.
    pub(super) last: Name,
    /// Cached tokens after the step, `i32`.
    pub(super) total: Name,
    /// As [`Shared::cos`], with rows up to the cached tokens: the operator wants as many.
    pub(super) cos: Name,
    /// As [`Shared::sin`], likewise.
    pub(super) sin: Name,
    /// Cached tokens before the step, `[1]`.
    pub(super) past_vector: Name,
    /// Cached tokens after the step, `[1]`.
    pub(super) total_vector: Name,
}

/// Lengths of the step, scalars.
struct Lengths {
    batch: Name,
    sequence: Name,
    past: Name,
    total: Name,
}

/// Lowers what the layers of `model` share.
pub(in crate::onnx) fn preamble(b: &mut Builder, model: &Model, grouped: bool) -> Shared {
    let config = &model.config;
    let shape = b.op("shapes.ids", "Shape", &["input_ids"]);
    let zero = b.int("constants.zero", 0);
    let one = b.int("constants.one", 1);
    let one_alone = b.sequences == Sequences::One;
    let lengths = lengths(b, &zero, &one);
    // Not `Size`: where a session knows batch and sequence beforehand, ONNX Runtime computes this when it
    // loads the graph, and takes the branches that depend on it out.
    let tokens = if one_alone {
        lengths.sequence.clone()
    } else {
        b.op("shapes.tokens", "Mul", &[&lengths.batch, &lengths.sequence])
    };
    let range = b.op("rope.range", "Range", &[&zero, &tokens, &one]);
    let rows = b.op("rope.rows", "Reshape", &[&range, &shape]);
    let [cos, sin] = angles(b, config);

    let multi_head = attend::multi_head(grouped, b.dtype);
    let attention = || model.layers.iter().filter_map(|l| l.routing(ModuleKind::Attention));
    let conditional = attention().any(dispatch::branches);
    let mlps = || model.layers.iter().filter_map(|l| l.routing(ModuleKind::Mlp));
    let mut is_one = |asked: bool, name: &str, count: &str| {
        if asked { b.op(name, "Equal", &[count, &one]) } else { Name::new() }
    };
    let asked = (grouped && conditional) || mlps().any(dispatch::branches);
    is_one(asked, dispatch::ONE_TOKEN, &tokens);
    let asked = (grouped || mlps().any(dispatch::branches)) && !one_alone;
    is_one(asked, dispatch::ONE_EACH, &lengths.sequence);
    let asked = (conditional || multi_head) && !one_alone;
    let one_sequence = is_one(asked, "step.one_sequence", &lengths.batch);
    let told = conditional || !one_alone;
    let bias = if told { bias(b, &lengths, &zero, &one) } else { Name::new() };
    let group_bias = if multi_head { Name::new() } else { group_bias(b, config, &bias) };
    let zero_queries = attention().any(dispatch::gathers).then(|| zero_queries(b, config));
    if zero_queries.is_some() || mlps().any(dispatch::gathers) {
        dispatch::places(b, &shape);
    }
    let grouped = grouped.then(|| {
        let forms = if one_alone {
            Forms { single: When::Never, whole: When::Always }
        } else {
            forms(b, &one, multi_head.then_some(&one_sequence))
        };
        if let (true, When::If(single)) = (conditional, &forms.single) {
            router::gated_floors(b, model, single);
        }
        group_inputs(b, config, &lengths, &one, [&cos, &sin], forms)
    });
    Shared { rows, cos, sin, bias, group_bias, zero_queries, one_sequence, grouped }
}

/// Cosines and sines of every token's angles, `[tokens, head_dim / 2]`.
fn angles(b: &mut Builder, config: &Config) -> [Name; 2] {
    let column = b.ints("shapes.column", &[-1, 1]);
    let positions = b.op("rope.positions", "Reshape", &["position_ids", &column]);
    let positions = b.cast("rope.positions.f32", &positions, DType::F32);
    let frequencies = rope::inverse_frequencies(config);
    let frequencies = b.floats("rope.frequencies", &[1, frequencies.len()], &frequencies);
    let angles = b.op("rope.angles", "Mul", &[&positions, &frequencies]);
    let cos = b.op("rope.cos.f32", "Cos", &[&angles]);
    let sin = b.op("rope.sin.f32", "Sin", &[&angles]);
    [b.rounded("rope.cos", &cos), b.rounded("rope.sin", &sin)]
}

/// Which form a step has, where it may have any: with chunks by an operator also that of a whole sequence.
fn forms(b: &mut Builder, one: &str, one_sequence: Option<&Name>) -> Forms {
    let single = When::If(dispatch::ONE_EACH.to_owned());
    let Some(one_sequence) = one_sequence else { return Forms { single, whole: When::Never } };
    let least = vec![("keepdims", Attribute::Int(0))];
    let least = b.op_with("mask.least", "ReduceMin", &["attention_mask"], least);
    let unpadded = b.op("step.unpadded", "Equal", &[&least, one]);
    let whole = When::If(b.op("step.whole", "And", &[one_sequence, &unpadded]));
    Forms { single, whole }
}

fn lengths(b: &mut Builder, zero: &str, one: &str) -> Lengths {
    let batch = match b.sequences {
        Sequences::Any => b.op("shapes.batch", "Gather", &["shapes.ids", zero]),
        Sequences::One => one.to_owned(),
    };
    let mask_shape = b.op("mask.shape", "Shape", &["attention_mask"]);
    let total = b.op("mask.total", "Gather", &[&mask_shape, one]);
    let sequence = b.op("mask.sequence", "Gather", &["shapes.ids", one]);
    let past = b.op("mask.past", "Sub", &[&total, &sequence]);
    Lengths { batch, sequence, past, total }
}

/// What is added to every layer's scores, `[batch, 1, sequence, total]`: 0 where the key is real and not
/// later than the query, elsewhere a number so low that the key counts for nothing. It is finite, also with a score
/// added: a row of padding sees no key, and if all its scores were infinite it would be NaN, and so would all that see it in
/// the next layer.
fn bias(b: &mut Builder, Lengths { past, total, .. }: &Lengths, zero: &str, one: &str) -> Name {
    let keys = b.op("mask.keys", "Range", &[zero, total, one]);
    let queries = b.op("mask.queries", "Range", &[past, total, one]);
    let column = b.ints("shapes.column", &[-1, 1]);
    let queries = b.op("mask.query_column", "Reshape", &[&queries, &column]);
    let causal = b.op("mask.causal", "LessOrEqual", &[&keys, &queries]);
    let real = b.cast_to("mask.real", "attention_mask", Element::Bool);
    let middle = b.ints("constants.middle_axes", &[1, 2]);
    let real = b.op("mask.real_keys", "Unsqueeze", &[&real, &middle]);
    let allowed = b.op("mask.allowed", "And", &[&real, &causal]);
    let lowest = match b.dtype {
        DType::F32 | DType::BF16 => f32::from_bits(0xff7f_0000),
        // The sum of f16's own lowest and a score of −16 is infinite.
        DType::F16 => half::f16::MIN.to_f32() / 2.0,
    };
    let open = b.floats("constants.zero.f32", &[], &[0.0]);
    let closed = b.floats("constants.lowest", &[], &[lowest]);
    let bias = b.op("mask.bias.f32", "Where", &[&allowed, &open, &closed]);
    b.rounded("mask.bias", &bias)
}

fn group_bias(b: &mut Builder, config: &Config, bias: &str) -> Name {
    let group = config.num_attention_heads / config.num_key_value_heads;
    if group == 1 {
        return bias.to_owned();
    }
    let axis = vec![("axis", Attribute::Int(2))];
    b.op_with("mask.bias.groups", "Concat", &vec![bias; group], axis)
}

/// Zeros for the queries of every token, `[batch, sequence, heads · head_dim]`: where kept rows are written.
fn zero_queries(b: &mut Builder, config: &Config) -> Name {
    let width = b.ints("shapes.query_width", &[query_width(config) as i64]);
    let axis = vec![("axis", Attribute::Int(0))];
    let shape = b.op_with("shapes.queries", "Concat", &["shapes.ids", &width], axis);
    let zero = b.zero("constants.zero.hidden");
    b.op("attention.zero_queries", "Expand", &[&zero, &shape])
}

fn group_inputs(
    b: &mut Builder,
    config: &Config,
    Lengths { batch, past, total, .. }: &Lengths,
    one: &str,
    tables: [&str; 2],
    forms: Forms,
) -> Grouped {
    let [past_vector, total_vector, batch] = [past, total, batch].map(|name| vector(b, name));
    let last = b.op("mask.last", "Sub", &[total, one]);
    let last = b.op("mask.last.rows", "Expand", &[&last, &batch]);
    let last = b.cast_to("mask.last.i32", &last, Element::Int32);
    let total = b.cast_to("mask.total.i32", total, Element::Int32);

    // Only the first `tokens` rows are read.
    let width = b.ints("rope.width", &[(config.head_dim / 2) as i64]);
    let axis = vec![("axis", Attribute::Int(0))];
    let more = b.op_with("rope.more", "Concat", &[&total_vector, &width], axis.clone());
    let zero = b.zero("constants.zero.hidden");
    let more = b.op("rope.unread", "Expand", &[&zero, &more]);
    let [cos, sin] = ["cos", "sin"].map(|part| format!("rope.{part}.long"));
    let [cos, sin] = [(cos, tables[0]), (sin, tables[1])]
        .map(|(name, table)| b.op_with(&name, "Concat", &[table, &more], axis.clone()));
    Grouped { forms, last, total, cos, sin, past_vector, total_vector }
}

/// The scalar `name` as a vector of one element.
fn vector(b: &mut Builder, name: &str) -> Name {
    let flat = b.ints("shapes.flat", &[-1]);
    b.op(&format!("{name}.vector"), "Reshape", &[name, &flat])
}
