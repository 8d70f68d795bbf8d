//! The cache, and every token's attention over it.
//!
//! `GroupQueryAttention` appends to the cache in place where past and present are one buffer, and reads
//! it once. It assumes padding on the right, so it is told what a query may see, but of a sequence without
//! padding. Several tokens of several sequences it refuses on top of a cache, and turns wrongly where they
//! are padded on the left: those go another way. So do chunks of which some tokens are skipped, because it
//! computes as many queries as it appends keys.

use super::attend::Queries;
use super::heads::{Projected, heads_first};
use super::{Context, WithCache};
use crate::decoder::Sequences;
use crate::onnx::builder::{Builder, Name};
use crate::onnx::dispatch::Rows;
use crate::onnx::graph::{Attribute, Dim};

/// How `GroupQueryAttention` knows which keys a query may see.
#[derive(Debug, Clone, Copy)]
pub(super) enum Seen {
    /// All that are not later: of sequences without padding.
    Before,
    /// By a bias, which it adds to every score.
    Told,
}

impl Seen {
    /// How a query of one new token knows.
    pub(super) const fn by_one_token(b: &Builder) -> Self {
        match b.sequences {
            Sequences::Any => Self::Told,
            Sequences::One => Self::Before,
        }
    }
}

/// When a step has a form.
#[derive(Debug, Clone)]
pub(super) enum When {
    Never,
    Always,
    /// By a value of the graph.
    If(Name),
}

/// Which form a step has, if not that of a chunk.
#[derive(Debug, Clone)]
pub(super) struct Forms {
    /// One token in each sequence.
    pub(super) single: When,
    /// One sequence without padding whose every query is computed.
    pub(super) whole: When,
}

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
    /// Attention of every token: its context `[batch, sequence, heads · head_dim]`, and the caches.
    pub(super) fn core(&self, b: &mut Builder, projected: &Projected) -> WithCache {
        let names = self.outputs(&format!("{}.context", self.name));
        let Some(grouped) = &self.shared.grouped else {
            return self.appended_core(b, &self.name, projected, &names);
        };
        let shape = b.every_token(self.query_width());
        let joint = |b: &mut Builder, _: &str, seen, names: &WithCache| {
            self.grouped(b, projected, seen, names)
        };
        let chunk = |b: &mut Builder| {
            let place = format!("{}.chunk", self.name);
            self.appended_core(b, &place, projected, &self.of_core("chunk"))
        };
        let inside = |form: &str| self.of_core(form);
        let forms = grouped.forms.clone();
        self.by_form(b, forms, None, (&names, &inside), &shape, joint, chunk)
    }

    /// What a step takes by its form, of this shape and under the first names: `grouped`, given the form's name,
    /// how it knows what a query may see, and what its results are called; or else `chunk`. A whole sequence has
    /// its form only if all of it is among `kept`.
    #[expect(clippy::too_many_arguments, reason = "what differs between the two callers")]
    pub(super) fn by_form(
        &self,
        b: &mut Builder,
        Forms { single, whole }: Forms,
        kept: Option<&Rows>,
        (names, inside): (&WithCache, &dyn Fn(&str) -> WithCache),
        shape: &[Dim],
        grouped: impl Fn(&mut Builder, &str, Seen, &WithCache) -> WithCache,
        chunk: impl FnOnce(&mut Builder) -> WithCache,
    ) -> WithCache {
        let several = |b: &mut Builder, names: &WithCache| match whole {
            When::Never => chunk(b),
            When::Always => grouped(b, "whole", Seen::Before, names),
            When::If(whole) => {
                let whole = match kept {
                    None => whole,
                    Some(rows) => {
                        let all = rows.all(b, &self.name);
                        b.op(&format!("{}.all.besides", self.name), "And", &[&all, &whole])
                    }
                };
                let all = |b: &mut Builder| grouped(b, "whole", Seen::Before, &inside("whole"));
                self.branch(b, names, shape.to_vec(), &whole, all, chunk)
            }
        };
        let When::If(single) = single else { return several(b, names) };
        let one_each = |b: &mut Builder| grouped(b, "joint", Seen::Told, &inside("joint"));
        let several = |b: &mut Builder| several(b, &inside("several"));
        self.branch(b, names, shape.to_vec(), &single, one_each, several)
    }

    /// Every token, by `GroupQueryAttention`, which must take the step.
    pub(super) fn grouped(
        &self,
        b: &mut Builder,
        projected: &Projected,
        seen: Seen,
        [context, key, value]: &WithCache,
    ) -> WithCache {
        let inputs = match projected {
            Projected::Packed(all) => [all.as_str(), "", ""],
            Projected::Apart(parts) => parts.each_ref().map(String::as_str),
        };
        let heads = self.config.num_attention_heads;
        self.group_query(b, heads, inputs, seen, [context, key, value]);
        [context.clone(), key.clone(), value.clone()]
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
        let seen = Seen::by_one_token(b);
        self.group_query(b, self.groups(), [k, k, v], seen, [&unused, &key, &value]);
        [key, value]
    }

    fn group_query(
        &self,
        b: &mut Builder,
        heads: usize,
        [q, k, v]: [&str; 3],
        seen: Seen,
        outputs: [&str; 3],
    ) {
        let Some(grouped) = &self.shared.grouped else { return };
        let past = ["key", "value"].map(|part| self.past(part));
        let all = [
            q,
            k,
            v,
            &past[0],
            &past[1],
            &grouped.last,
            &grouped.total,
            &grouped.cos,
            &grouped.sin,
            &self.shared.rows,
            &self.shared.bias,
        ];
        let told = if matches!(seen, Seen::Told) { all.len() } else { all.len() - 1 };
        let attributes = vec![
            ("do_rotary", Attribute::Int(1)),
            ("kv_num_heads", Attribute::Int(self.groups() as i64)),
            ("num_heads", Attribute::Int(heads as i64)),
        ];
        b.microsoft_outputs("GroupQueryAttention", &all[..told], &outputs, attributes);
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
            .map(|(part, x)| heads_first(b, &format!("{place}.{part}"), &x, self.key_heads()));
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
}
