//! The attention module. Keys and values are computed for every token, whatever the decision, and
//! always enter the cache; only the query, the core and the output projection are skipped.
//!
//! A conditional module stands in the graph in several forms, over the same weights. Where each sequence has one new
//! token and none is skipped, there is nothing to gather: q, k and v are one product. One token that
//! is skipped needs k and v alone, which are rows of the same matrix. Otherwise k and v are computed for all, q and
//! o for those that are kept. Each of these products has an initializer of its own, over the same
//! bytes: ONNX Runtime packs no weight that two nodes share, and without that a product in few bits is
//! ten times slower.

use skipgpt_passes::ir::{Attention, Config, Dispatch, ModuleId};

use super::builder::{Builder, Name};
use super::dispatch::{self, Rows};
use super::graph::Dim;
use super::router::Decision;
use super::stream::Stream;

mod attend;
mod blocks;
mod core;
mod heads;
mod shared;

pub(super) use shared::{Shared, preamble};

use core::{Cache, Seen, When};
use heads::{Projected, heads_first};

/// Where the module stands and what it may use.
struct Context<'a> {
    shared: &'a Shared,
    config: &'a Config,
    attention: &'a Attention,
    layer: usize,
    name: String,
}

/// What a module gives inside of a branch: its rows, and the caches of keys and values.
type WithCache = [Name; 3];

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
    let (name, norm) = (c.name.clone(), format!("{}.norm", c.name));
    let (normed, x) = stream.norm(b, &norm, &attention.norm, config.rms_norm_eps);
    match decision.filter(|decision| decision.gathers()) {
        None => {
            let projected = c.project_all(b, &name, &normed);
            let [context, ..] = c.core(b, &projected);
            let change = b.linear(&format!("{name}.o"), &context, &attention.o, b.dtype);
            dispatch::whole(b, decision, &name, x, change)
        }
        Some(decision) if shared.grouped.is_none() => {
            Stream::Value(c.appended(b, decision, &x, &normed))
        }
        Some(decision) if decision.dispatch == Dispatch::Conditional => {
            Stream::Value(c.conditional(b, decision, &x, &normed))
        }
        Some(decision) => {
            let outputs = c.outputs(&format!("{name}.output"));
            let [output, ..] = c.several(b, decision, &x, &normed, outputs);
            Stream::Value(output)
        }
    }
}

impl Context<'_> {
    /// The names of the module's rows and caches, the rows being called `rows`.
    fn outputs(&self, rows: &str) -> WithCache {
        let cache = |part| format!("present.{}.{part}", self.layer);
        [rows.to_owned(), cache("key"), cache("value")]
    }

    /// The same inside of a branch.
    fn inner(&self, place: &str) -> WithCache {
        ["rows", "key", "value"].map(|part| format!("{}.{place}.{part}", self.name))
    }

    /// The same of a form of the core, whose rows are its context.
    fn of_core(&self, form: &str) -> WithCache {
        ["context", "key", "value"].map(|part| format!("{}.{form}.{part}", self.name))
    }

    /// The shape of the caches.
    fn cache_shape(&self, b: &Builder) -> Vec<Dim> {
        let Config { num_key_value_heads, head_dim, .. } = *self.config;
        let (heads, width_of_head) = (Dim::Fixed(num_key_value_heads), Dim::Fixed(head_dim));
        // The cached tokens, or more where the buffer is longer.
        let length = Dim::Open;
        vec![b.batch(), heads, length, width_of_head]
    }

    /// The shape of the context of kept tokens.
    fn kept_shape(&self) -> Vec<Dim> {
        vec![Dim::Fixed(1), Dim::Open, Dim::Fixed(self.query_width())]
    }

    /// A branch that gives rows of this shape and the caches, under `names`.
    fn branch(
        &self,
        b: &mut Builder,
        names: &WithCache,
        of_rows: Vec<Dim>,
        condition: &str,
        then: impl FnOnce(&mut Builder) -> WithCache,
        otherwise: impl FnOnce(&mut Builder) -> WithCache,
    ) -> WithCache {
        let [rows, key, value] = names.each_ref().map(String::as_str);
        let cache = self.cache_shape(b);
        let outputs = [(rows, of_rows), (key, cache.clone()), (value, cache)];
        b.branch(&outputs, condition, then, otherwise)
    }

    /// Where nothing but elementary operators may be used: the cache first, then the kept rows.
    fn appended(&self, b: &mut Builder, decision: &Decision, x: &str, normed: &str) -> Name {
        let [k, v] = self.keys_and_values(b, &self.name, normed);
        let [k, v] = [("k", k), ("v", v)].map(|(part, x)| {
            heads_first(b, &format!("{}.{part}", self.name), &x, self.key_heads())
        });
        let cache = self.append(b, &self.name, &k, &v, self.outputs(""));
        let output = format!("{}.output", self.name);
        let run = |b: &mut Builder, output: &str| {
            let rows = Rows::of(b, decision, &self.name);
            let q = self.kept_queries(b, &rows, normed);
            let context = if decision.dispatch == Dispatch::Conditional {
                self.kept_core(b, &rows, &q, &cache)
            } else {
                let context = self.core_in_place(b, &self.name, &rows, &q, &cache);
                rows.places.gather(b, &format!("{}.context.rows", self.name), &context)
            };
            self.add_output(b, &rows, x, &context, output)
        };
        if decision.dispatch != Dispatch::Conditional {
            return run(b, &output);
        }
        let width = self.config.hidden_size;
        let kept = format!("{}.kept.output", self.name);
        let then = |b: &mut Builder| run(b, &kept);
        dispatch::if_any(b, decision, &output, width, x, then)
    }

    /// Every token, where none is skipped and a sequence has no more than one, or is alone: told at once. Else one
    /// token that is skipped, or some of several.
    fn conditional(&self, b: &mut Builder, decision: &Decision, x: &str, normed: &str) -> Name {
        let outputs = self.outputs(&format!("{}.output", self.name));
        let rows = b.every_token(self.config.hidden_size);
        let otherwise = |b: &mut Builder| {
            let skip = |b: &mut Builder| self.one_skipped(b, x, normed);
            let several =
                |b: &mut Builder| self.several(b, decision, x, normed, self.inner("several"));
            let one = dispatch::ONE_TOKEN;
            self.branch(b, &self.inner("otherwise"), rows.clone(), one, skip, several)
        };
        let run = |b: &mut Builder| self.every(b, x, normed);
        let skips = decision.any_skipped();
        let [output, ..] = self.branch(b, &outputs, rows.clone(), skips, otherwise, run);
        output
    }

    /// A step that skips nothing, of one token in each sequence or of one sequence alone.
    fn every(&self, b: &mut Builder, x: &str, normed: &str) -> WithCache {
        let place = format!("{}.every", self.name);
        let projected = self.project_all(b, &place, normed);
        let names = self.of_core("every");
        let [context, key, value] = self.grouped(b, &projected, Seen::by_one_token(b), &names);
        let change = b.linear(&format!("{place}.o"), &context, &self.attention.o, b.dtype);
        [b.op(&format!("{place}.output"), "Add", &[x, &change]), key, value]
    }

    /// A step of one token, which is skipped: its key and value enter the cache all the same.
    fn one_skipped(&self, b: &mut Builder, x: &str, normed: &str) -> WithCache {
        let place = format!("{}.one.skipped", self.name);
        let [k, v] = self.keys_and_values(b, &place, normed);
        let [key, value] = self.append_grouped(b, &place, &k, &v);
        [b.op(&format!("{place}.output"), "Identity", &[x]), key, value]
    }

    /// Any number of tokens, of which some are kept, perhaps none.
    fn several(
        &self,
        b: &mut Builder,
        decision: &Decision,
        x: &str,
        normed: &str,
        [output, key, value]: WithCache,
    ) -> WithCache {
        let place = format!("{}.several", self.name);
        let [k, v] = self.keys_and_values(b, &place, normed);
        let rows = Rows::of(b, decision, &self.name);
        let q = self.kept_queries(b, &rows, normed);
        let conditional = decision.dispatch == Dispatch::Conditional;
        let inside = |form: &str| self.of_core(&format!("several.{form}"));
        let joint = |b: &mut Builder, form: &str, seen, names: &WithCache| {
            let place = format!("{place}.{form}");
            if conditional && matches!(seen, Seen::Before) {
                let projected = Projected::Apart([q.clone(), k.clone(), v.clone()]);
                return self.grouped(b, &projected, seen, names);
            }
            let q = rows.places.scatter(b, &format!("{place}.q"), self.zero_queries(), &q);
            let projected = Projected::Apart([q, k.clone(), v.clone()]);
            let [context, key, value] = self.grouped(b, &projected, seen, names);
            [rows.places.gather(b, &format!("{place}.context.rows"), &context), key, value]
        };
        let chunk = |b: &mut Builder| {
            let place = format!("{place}.chunk");
            let names = inside("chunk");
            let k = heads_first(b, &format!("{place}.k"), &k, self.key_heads());
            let v = heads_first(b, &format!("{place}.v"), &v, self.key_heads());
            let cache = self.append(b, &place, &k, &v, names);
            let context = if conditional {
                let run = |b: &mut Builder| [self.kept_core(b, &rows, &q, &cache)];
                let skip = |b: &mut Builder| [b.op(&format!("{place}.none"), "Identity", &[&q])];
                let name = format!("{place}.context");
                let any = rows.any(b, &place);
                let [context] = b.branch(&[(&name, self.kept_shape())], &any, run, skip);
                context
            } else {
                let context = self.core_in_place(b, &place, &rows, &q, &cache);
                rows.places.gather(b, &format!("{place}.context.rows"), &context)
            };
            let Cache { present: [key, value], .. } = cache;
            [context, key, value]
        };
        let context = format!("{}.context.kept", self.name);
        let mut forms = self.shared.forms();
        if conditional && matches!(forms.whole, When::Always) {
            // What skips nothing is not here.
            forms.whole = When::Never;
        }
        let names = (&[context, key, value], &inside as &dyn Fn(&str) -> WithCache);
        // A sequence that skips some goes without their queries.
        let all = conditional.then_some(&rows);
        let [context, key, value] =
            self.by_form(b, forms, all, names, &self.kept_shape(), joint, chunk);
        [self.add_output(b, &rows, x, &context, &output), key, value]
    }

    /// `x` with the change of the kept rows, from their context, added.
    fn add_output(
        &self,
        b: &mut Builder,
        rows: &Rows,
        x: &str,
        context: &str,
        output: &str,
    ) -> Name {
        let change = b.linear(&format!("{}.o", self.name), context, &self.attention.o, b.dtype);
        rows.places.add(b, output, x, &change)
    }
}
