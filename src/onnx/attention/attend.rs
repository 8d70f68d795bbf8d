//! Attention of some queries over a cache that has every key.
//!
//! In `f32`, which with `GroupQueryAttention` means on a CPU, by `MultiHeadAttention`, some queries at a time
//! ([`super::blocks`]). Else by elementary operators.

use skipgpt_passes::ir::DType;

use super::Context;
use super::core::Cache;
use super::heads::{heads_first, swap_middle, together};
use crate::decoder::Sequences;
use crate::onnx::builder::{Builder, Name};
use crate::onnx::dispatch::Rows;
use crate::onnx::graph::Attribute;

/// Queries that are not rotated yet, and whose they are.
pub(super) enum Queries<'a> {
    /// Every token's, `[batch, sequence, heads · head_dim]`.
    All(&'a str),
    /// Of the kept tokens of one sequence, `[1, kept, heads · head_dim]`.
    Kept(&'a str, &'a Rows),
}

impl Queries<'_> {
    pub(super) const fn projected(&self) -> &str {
        match self {
            Self::All(q) | Self::Kept(q, _) => q,
        }
    }
}

/// Whether chunks go through `MultiHeadAttention`, and those of one sequence that nothing skips through
/// `GroupQueryAttention`. Elsewhere neither was measured, nor how the latter's other kernels turn several
/// tokens that start behind a cache.
pub(super) const fn multi_head(grouped: bool, dtype: DType) -> bool {
    grouped && matches!(dtype, DType::F32)
}

impl Context<'_> {
    /// Attention of every token, zeros standing for the queries of those that are not kept: `[batch,
    /// sequence, heads · head_dim]`.
    pub(super) fn core_in_place(
        &self,
        b: &mut Builder,
        place: &str,
        rows: &Rows,
        q: &str,
        cache: &Cache,
    ) -> Name {
        let q = rows.places.scatter(b, &format!("{place}.q.all"), self.zero_queries(), q);
        self.attend(b, place, &Queries::All(&q), cache, &format!("{place}.context"))
    }

    /// Attention of the kept rows, at least one, from their queries: `[1, kept, heads · head_dim]`. With one sequence no other query is computed.
    pub(super) fn kept_core(&self, b: &mut Builder, rows: &Rows, q: &str, cache: &Cache) -> Name {
        let place = |part: &str| format!("{}.{part}", self.name);
        let (one, all, name) = (place("compact"), place("in_place"), place("context.of_kept"));
        let compact = |b: &mut Builder| {
            [self.attend(b, &one, &Queries::Kept(q, rows), cache, &format!("{one}.context"))]
        };
        if b.sequences == Sequences::One {
            let [context] = compact(b);
            return context;
        }
        let in_place = |b: &mut Builder| {
            let context = self.core_in_place(b, &all, rows, q, cache);
            [rows.places.gather(b, &format!("{all}.context.rows"), &context)]
        };
        let [context] =
            b.branch(&[(&name, self.kept_shape())], &self.shared.one_sequence, compact, in_place);
        context
    }

    /// The context of `queries`, of their shape, called `output`.
    pub(super) fn attend(
        &self,
        b: &mut Builder,
        place: &str,
        queries: &Queries<'_>,
        cache: &Cache,
        output: &str,
    ) -> Name {
        let numbers = match queries {
            Queries::All(_) => self.shared.rows.clone(),
            Queries::Kept(_, rows) => {
                rows.places.gather(b, &format!("{place}.numbers"), &self.shared.rows)
            }
        };
        if multi_head(self.shared.grouped.is_some(), b.dtype) {
            return self.in_blocks(b, place, queries, &numbers, cache, output);
        }
        let context = self.elementary(b, place, queries, &numbers, cache);
        together(b, output, &context, self.query_width())
    }

    /// What is added to the scores of the kept rows, `[batch, 1, kept, total]`.
    fn seen(&self, b: &mut Builder, place: &str, rows: &Rows) -> Name {
        let along = vec![("axis", Attribute::Int(2))];
        b.op_with(&format!("{place}.bias"), "Compress", &[&self.shared.bias, rows.keep()], along)
    }

    /// `softmax(q · Kᵀ / √head_dim + bias) · V`: `[batch, queries, heads, head_dim]`.
    ///
    /// The queries that share a key are rows of one matrix, so keys and values need no copies.
    fn elementary(
        &self,
        b: &mut Builder,
        place: &str,
        queries: &Queries<'_>,
        numbers: &str,
        cache: &Cache,
    ) -> Name {
        let config = self.config;
        let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
        let width = config.head_dim as i64;
        let q =
            heads_first(b, &format!("{place}.q"), queries.projected(), (heads, config.head_dim));
        let q = self.rotate(b, &format!("{place}.q.rotated"), &q, numbers);
        let bias = match queries {
            Queries::All(_) => self.shared.group_bias.clone(),
            Queries::Kept(_, rows) => {
                let bias = self.seen(b, place, rows);
                let copies = vec![bias.as_str(); heads / groups];
                let along = vec![("axis", Attribute::Int(2))];
                match copies.len() {
                    1 => bias,
                    _ => b.op_with(&format!("{bias}.groups"), "Concat", &copies, along),
                }
            }
        };
        let regroup = |b: &mut Builder, name: &str, x: &str, count: usize| {
            if heads == groups {
                return x.to_owned();
            }
            let shape = b.ints(&format!("shapes.group.{count}"), &[0, count as i64, -1, width]);
            b.op(name, "Reshape", &[x, &shape])
        };
        let q = regroup(b, &format!("{place}.q.groups"), &q, groups);
        let scale = 1.0 / (config.head_dim as f64).sqrt();
        let scores = b.microsoft(
            &format!("{place}.scores"),
            "FusedMatMul",
            &[&q, &cache.keys],
            vec![("alpha", Attribute::Float(scale as f32)), ("transB", Attribute::Int(1))],
        );
        let biased = b.op(&format!("{place}.scores.biased"), "Add", &[&scores, &bias]);
        let axis = vec![("axis", Attribute::Int(-1))];
        let shares = b.op_with(&format!("{place}.shares"), "Softmax", &[&biased], axis);
        let mixed = b.op(&format!("{place}.mixed.groups"), "MatMul", &[&shares, &cache.values]);
        let mixed = regroup(b, &format!("{place}.mixed"), &mixed, heads);
        b.op_with(&format!("{place}.mixed.tokens"), "Transpose", &[&mixed], swap_middle())
    }
}
