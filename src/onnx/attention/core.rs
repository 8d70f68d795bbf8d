//! The cache, and attention over it.
//!
//! A step of one token a sequence goes through `GroupQueryAttention`, which appends to the cache in
//! place where past and present are one buffer, and reads it once. It assumes padding on the right, so
//! it is told what a query may see; and it refuses several tokens for several sequences on top of a
//! cache, so chunks go through elementary operators, which can also leave out the queries of skipped
//! tokens.

use skipgpt_passes::ir::Config;

use super::heads::{Projected, heads_first, swap_middle};
use super::{Context, WithCache};
use crate::onnx::builder::{Builder, Name};
use crate::onnx::dispatch::Rows;
use crate::onnx::graph::{Attribute, Dim};

/// Keys and values after a step.
pub(super) struct Cache {
    /// Keys of every cached token, `[batch, kv_heads, total, head_dim]`.
    keys: Name,
    /// Values likewise.
    values: Name,
    /// The caches as the step gives them: longer, where the buffer is.
    pub(super) present: [Name; 2],
}

impl Context<'_> {
    /// Attention of every token: its context `[tokens, heads · head_dim]`, and the caches.
    pub(super) fn core(&self, b: &mut Builder, projected: &Projected) -> WithCache {
        let names = self.outputs(&format!("{}.context", self.name));
        if self.shared.grouped.is_none() {
            return self.decomposed(b, &self.name, projected, &names);
        }
        let inside =
            |place: &str| ["context", "key", "value"].map(|part| format!("{place}.{part}"));
        let [step, chunk] = ["step", "chunk"].map(|part| format!("{}.{part}", self.name));
        let single = &self.shared.single;
        self.branch(
            b,
            &names,
            (Dim::Symbolic("tokens"), self.query_width()),
            single,
            |b| self.grouped(b, &step, projected, &inside(&step)),
            |b| self.decomposed(b, &chunk, projected, &inside(&chunk)),
        )
    }

    /// One token a sequence, by `GroupQueryAttention`.
    pub(super) fn grouped(
        &self,
        b: &mut Builder,
        place: &str,
        projected: &Projected,
        [context, key, value]: &WithCache,
    ) -> WithCache {
        let inputs = match projected {
            Projected::Packed(all) => [Some(("qkv", all)), None, None],
            Projected::Apart([q, k, v]) => [Some(("q", q)), Some(("k", k)), Some(("v", v))],
        };
        let mixed = format!("{place}.mixed");
        let heads = self.config.num_attention_heads;
        self.group_query(b, place, heads, inputs, [&mixed, key, value]);
        let flat = self.flat(b);
        let context = b.op(context, "Reshape", &[&mixed, &flat]);
        [context, key.clone(), value.clone()]
    }

    /// The caches with one token a sequence more: the cheapest operator that appends in place. What it
    /// computes of the keys as queries is not used.
    pub(super) fn append_grouped(
        &self,
        b: &mut Builder,
        place: &str,
        k: &str,
        v: &str,
    ) -> [Name; 2] {
        let [key, value, unused] = ["key", "value", "unused"].map(|part| format!("{place}.{part}"));
        let (k, v) = (k.to_owned(), v.to_owned());
        let inputs = [Some(("k", &k)), Some(("k", &k)), Some(("v", &v))];
        self.group_query(b, place, self.groups(), inputs, [&unused, &key, &value]);
        [key, value]
    }

    fn group_query(
        &self,
        b: &mut Builder,
        place: &str,
        heads: usize,
        inputs: [Option<(&str, &Name)>; 3],
        outputs: [&str; 3],
    ) {
        let Some(grouped) = &self.shared.grouped else { return };
        let mut made: Vec<(&str, Name)> = Vec::new();
        let inputs = inputs.map(|input| {
            let Some((part, value)) = input else { return Name::new() };
            if let Some((_, name)) = made.iter().find(|(other, _)| *other == part) {
                return name.clone();
            }
            let name = format!("{place}.{part}.sequence");
            let name = b.op(&name, "Reshape", &[value, &self.shared.batch_sequence]);
            made.push((part, name.clone()));
            name
        });
        let past = ["key", "value"].map(|part| self.past(part));
        let all = [
            &inputs[0],
            &inputs[1],
            &inputs[2],
            &past[0],
            &past[1],
            &grouped.last,
            &grouped.total,
            &grouped.cos,
            &grouped.sin,
            &self.shared.rows,
            &self.shared.bias,
        ];
        let attributes = vec![
            ("do_rotary", Attribute::Int(1)),
            ("kv_num_heads", Attribute::Int(self.groups() as i64)),
            ("num_heads", Attribute::Int(heads as i64)),
        ];
        b.microsoft_outputs("GroupQueryAttention", &all.map(String::as_str), &outputs, attributes);
    }

    fn past(&self, part: &str) -> Name {
        format!("past_key_values.{}.{part}", self.layer)
    }

    /// Any number of tokens, by elementary operators.
    fn decomposed(
        &self,
        b: &mut Builder,
        place: &str,
        projected: &Projected,
        names: &WithCache,
    ) -> WithCache {
        let [q, k, v] = self.apart(b, place, projected);
        let heads = [
            ("q", q, self.config.num_attention_heads),
            ("k", k, self.groups()),
            ("v", v, self.groups()),
        ];
        let [q, k, v] =
            heads.map(|(part, x, heads)| heads_first(b, &format!("{place}.{part}"), &x, heads));
        let cache = self.append(b, place, &k, &v, names.clone());
        let q = self.rotate(b, &format!("{place}.q.rotated"), &q, &self.shared.rows);
        let context = self.attend(b, place, &q, &cache, &self.shared.group_bias, &names[0]);
        let [key, value] = cache.present;
        [context, key, value]
    }

    /// The caches with the new tokens' keys, which are rotated, and values, `[batch, kv_heads,
    /// sequence, head_dim]` each; what the step gives of them is called by the last two names.
    pub(super) fn append(
        &self,
        b: &mut Builder,
        place: &str,
        k: &str,
        v: &str,
        [_, key, value]: WithCache,
    ) -> Cache {
        let k = self.rotate(b, &format!("{place}.k.rotated"), k, &self.shared.rows);
        let mut all = [("key", &*k, key), ("value", v, value)].map(|(part, new, present)| {
            let past = self.past(part);
            let axis = vec![("axis", Attribute::Int(2))];
            let Some(grouped) = &self.shared.grouped else {
                let all = b.op_with(&present, "Concat", &[&past, new], axis);
                return (all.clone(), all);
            };
            // The past may be a buffer with room for more; the present then has to be as long.
            let (zero, along) = (b.ints("constants.0", &[0]), b.ints("constants.cache_axis", &[2]));
            let end = b.ints("constants.end", &[i64::MAX]);
            let name = |what: &str| format!("{place}.{part}.{what}");
            let (from, to) = (&grouped.past_vector, &grouped.total_vector);
            let before = b.op(&name("past"), "Slice", &[&past, &zero, from, &along]);
            let room = b.op(&name("room"), "Slice", &[&past, to, &end, &along]);
            let all = b.op_with(&name("all"), "Concat", &[&before, new], axis.clone());
            let present = b.op_with(&present, "Concat", &[&all, &room], axis);
            (all, present)
        });
        let [keys, values] = all.each_mut().map(|(all, _)| std::mem::take(all));
        Cache { keys, values, present: all.map(|(_, present)| present) }
    }

    /// Attention of every token, zeros standing for the queries of those that are not kept: `[tokens,
    /// heads · head_dim]`.
    pub(super) fn core_in_place(
        &self,
        b: &mut Builder,
        place: &str,
        rows: &Rows,
        q: &str,
        cache: &Cache,
    ) -> Name {
        let q = rows.scatter(b, &format!("{place}.q.all"), self.zero_queries(), q);
        let q = heads_first(b, &format!("{place}.q"), &q, self.config.num_attention_heads);
        let q = self.rotate(b, &format!("{place}.q.rotated"), &q, &self.shared.rows);
        self.attend(b, place, &q, cache, &self.shared.group_bias, &format!("{place}.context"))
    }

    /// Attention of the kept rows, at least one, from their queries `[kept, heads · head_dim]`: `[kept,
    /// heads · head_dim]`. With one sequence no other query is computed.
    pub(super) fn kept_core(&self, b: &mut Builder, rows: &Rows, q: &str, cache: &Cache) -> Name {
        let place = |part: &str| format!("{}.{part}", self.name);
        let (one, all, name) = (place("compact"), place("in_place"), place("context.of_kept"));
        let shape = vec![Dim::Open, Dim::Fixed(self.query_width())];
        let compact = |b: &mut Builder| [self.compact(b, &one, rows, q, cache)];
        let in_place = |b: &mut Builder| {
            let context = self.core_in_place(b, &all, rows, q, cache);
            [rows.gather(b, &format!("{all}.context.rows"), &context)]
        };
        let [context] = b.branch(&[(&name, shape)], &self.shared.one_sequence, compact, in_place);
        context
    }

    fn compact(&self, b: &mut Builder, place: &str, rows: &Rows, q: &str, cache: &Cache) -> Name {
        let Config { num_attention_heads: heads, num_key_value_heads: groups, head_dim, .. } =
            *self.config;
        let shape = b.ints("shapes.kept_heads", &[1, -1, heads as i64, head_dim as i64]);
        let q = b.op(&format!("{place}.q.heads"), "Reshape", &[q, &shape]);
        let q = b.op_with(&format!("{place}.q.heads_first"), "Transpose", &[&q], swap_middle());
        let row = b.ints("shapes.row", &[1, -1]);
        let numbers = b.op(&format!("{place}.numbers"), "Reshape", &[rows.numbers(), &row]);
        let q = self.rotate(b, &format!("{place}.q.rotated"), &q, &numbers);
        let along = vec![("axis", Attribute::Int(2))];
        let name = format!("{place}.bias");
        let mut bias =
            b.op_with(&name, "Compress", &[&self.shared.bias, rows.keep()], along.clone());
        if heads > groups {
            let copies = vec![bias.as_str(); heads / groups];
            bias = b.op_with(&format!("{name}.groups"), "Concat", &copies, along);
        }
        self.attend(b, place, &q, cache, &bias, &format!("{place}.context"))
    }

    /// `softmax(q · Kᵀ / √head_dim + bias) · V` of rotated queries `[batch, heads, queries,
    /// head_dim]`: `[batch · queries, heads · head_dim]`, called `output`.
    ///
    /// The queries that share a key are rows of one matrix, so keys and values need no copies.
    fn attend(
        &self,
        b: &mut Builder,
        place: &str,
        q: &str,
        cache: &Cache,
        bias: &str,
        output: &str,
    ) -> Name {
        let config = self.config;
        let (heads, groups) = (config.num_attention_heads, config.num_key_value_heads);
        let width = config.head_dim as i64;
        let regroup = |b: &mut Builder, name: &str, x: &str, count: usize| {
            if heads == groups {
                return x.to_owned();
            }
            let shape = b.ints(&format!("shapes.group.{count}"), &[0, count as i64, -1, width]);
            b.op(name, "Reshape", &[x, &shape])
        };
        let q = regroup(b, &format!("{place}.q.groups"), q, groups);
        let scale = 1.0 / (config.head_dim as f64).sqrt();
        let scores = b.microsoft(
            &format!("{place}.scores"),
            "FusedMatMul",
            &[&q, &cache.keys],
            vec![("alpha", Attribute::Float(scale as f32)), ("transB", Attribute::Int(1))],
        );
        let biased = b.op(&format!("{place}.scores.biased"), "Add", &[&scores, bias]);
        let axis = vec![("axis", Attribute::Int(-1))];
        let shares = b.op_with(&format!("{place}.shares"), "Softmax", &[&biased], axis);
        let mixed = b.op(&format!("{place}.mixed.groups"), "MatMul", &[&shares, &cache.values]);
        let mixed = regroup(b, &format!("{place}.mixed"), &mixed, heads);
        let mixed =
            b.op_with(&format!("{place}.mixed.tokens"), "Transpose", &[&mixed], swap_middle());
        let flat = self.flat(b);
        b.op(output, "Reshape", &[&mixed, &flat])
    }

    /// The shape `[tokens, heads · head_dim]`.
    fn flat(&self, b: &mut Builder) -> Name {
        b.ints("shapes.queries.flat", &[-1, self.query_width() as i64])
    }
}
