//! The cache, and every token's attention over it.
//!
//! `GroupQueryAttention` appends to the cache in place where past and present are one buffer, and reads
//! it once. It assumes padding on the right, so it is told what a query may see. Several tokens of several
//! sequences it refuses on top of a cache, and turns wrongly where they are padded on the left: those go
//! another way. So do chunks of which some tokens are skipped, because it computes as many queries as it
//! appends keys.

use super::attend::Queries;
use super::heads::{Projected, heads_first};
use super::{Context, WithCache};
use crate::onnx::builder::{Builder, Name};
use crate::onnx::graph::{Attribute, Dim};

/// Keys and values after a step.
pub(super) struct Cache {
    /// Keys of every cached token, `[batch, kv_heads, total, head_dim]`.
    pub(super) keys: Name,
    /// Values likewise.
    pub(super) values: Name,
    /// The caches as the step gives them: longer, where the buffer is.
    pub(super) present: [Name; 2],
}

impl Context<'_> {
    /// Attention of every token: its context `[tokens, heads · head_dim]`, and the caches.
    pub(super) fn core(&self, b: &mut Builder, projected: &Projected) -> WithCache {
        let names = self.outputs(&format!("{}.context", self.name));
        let Some(grouped) = &self.shared.grouped else {
            return self.appended_core(b, &self.name, projected, &names);
        };
        let inside =
            |place: &str| ["context", "key", "value"].map(|part| format!("{place}.{part}"));
        let [joint, chunk] = ["joint", "chunk"].map(|part| format!("{}.{part}", self.name));
        self.branch(
            b,
            &names,
            (Dim::Symbolic("tokens"), self.query_width()),
            &grouped.takes,
            |b| self.grouped(b, &joint, projected, &inside(&joint)),
            |b| self.appended_core(b, &chunk, projected, &inside(&chunk)),
        )
    }

    /// Every token, by `GroupQueryAttention`, which must take the step.
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

    /// Every token of any step: the cache first, then attention over it.
    fn appended_core(
        &self,
        b: &mut Builder,
        place: &str,
        projected: &Projected,
        names: &WithCache,
    ) -> WithCache {
        let [q, k, v] = self.apart(b, place, projected);
        let [k, v] = [("k", k), ("v", v)]
            .map(|(part, x)| heads_first(b, &format!("{place}.{part}"), &x, self.groups()));
        let cache = self.append(b, place, &k, &v, names.clone());
        let context = self.attend(b, place, &Queries::All(&q), &cache, &names[0]);
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

    /// The shape `[tokens, heads · head_dim]`.
    pub(super) fn flat(&self, b: &mut Builder) -> Name {
        b.ints("shapes.queries.flat", &[-1, self.query_width() as i64])
    }
}
