//! How a module's change reaches the residual stream: for every row, or for the rows a decision
//! keeps.

use skipgpt_passes::ir::{DType, Dispatch, Routing};

use super::builder::{Builder, Name};
use super::graph::{Attribute, Dim, Element};
use super::router::Decision;
use super::stream::Stream;
use crate::decoder::Sequences;

/// The place of every token, its row and its column, `[1, tokens, 2]`.
const PLACES: &str = "dispatch.places";

/// How many numbers these are.
const PLACES_COUNT: &str = "dispatch.places.count";

/// Whether there is one new token altogether, one element; present if a conditional MLP asks, or a conditional attention
/// module in grouped form.
pub(super) const ONE_TOKEN: &str = "step.one_token";

/// Whether there is one new token in each sequence, one element; present if a conditional MLP asks, or attention in
/// grouped form, and there may be several sequences.
pub(super) const ONE_EACH: &str = "step.single";

/// The tokens a decision keeps.
pub(super) struct Rows {
    /// Whether each token is kept, `[tokens]`.
    keep: Name,
    /// Where these lie.
    pub(super) places: Places,
}

/// Places of tokens, `[1, tokens, 2]`.
pub(super) struct Places(Name);

/// Whether a module with this routing gathers rows.
pub(super) fn gathers(routing: &Routing) -> bool {
    matches!(
        routing,
        Routing::Routed { dispatch: Some(Dispatch::Gathered | Dispatch::Conditional), .. }
    )
}

/// Whether a module with this routing is entered by a branch.
pub(super) fn branches(routing: &Routing) -> bool {
    matches!(routing, Routing::Routed { dispatch: Some(Dispatch::Conditional), .. })
}

impl Decision {
    /// Whether rows are gathered; otherwise every row is computed.
    pub(super) fn gathers(&self) -> bool {
        self.dispatch != Dispatch::Masked
    }
}

/// What modules that gather share: the places of tokens that lie in `shape`, `[batch, sequence]`.
pub(super) fn places(b: &mut Builder, shape: &str) {
    let one = b.int("constants.one", 1);
    let every = b.op("dispatch.tokens", "Expand", &[&one, shape]);
    let both = b.op("dispatch.coordinates", "NonZero", &[&every]);
    let pairs = b.op("dispatch.pairs", "Transpose", &[&both]);
    let first = b.ints("constants.first_axis", &[0]);
    b.op(PLACES, "Unsqueeze", &[&pairs, &first]);
    b.op(PLACES_COUNT, "Size", &[PLACES]);
}

/// The stream after a module that computed `change` for every row.
pub(super) fn whole(
    b: &mut Builder,
    decision: Option<&Decision>,
    name: &str,
    x: Name,
    change: Name,
) -> Stream {
    let change = match decision {
        None => change,
        Some(decision) => {
            let factor = decision.factor(b);
            b.op(&format!("{name}.masked"), "Mul", &[&change, &factor])
        }
    };
    Stream::Pending { x, change, sum: format!("{name}.output") }
}

/// The stream after a module that computes its change, `[1, kept, width]`, of the kept rows of `x` `[batch,
/// sequence, width]`.
pub(super) fn kept_rows(
    b: &mut Builder,
    decision: &Decision,
    width: usize,
    x: &str,
    change: impl FnOnce(&mut Builder, &str) -> Name,
) -> Stream {
    let name = &decision.place;
    let (output, kept) = (format!("{name}.output"), format!("{name}.rows"));
    if decision.dispatch != Dispatch::Conditional {
        let rows = Rows::of(b, decision, name);
        let kept = rows.places.gather(b, &kept, x);
        let change = change(b, &kept);
        return Stream::Value(rows.places.add(b, &output, x, &change));
    }
    let run = |b: &mut Builder| every_or_some(b, decision, width, x, &kept, change);
    Stream::Value(if_any(b, decision, &output, width, x, run))
}

/// `x` with the change of its kept rows, of which there is one at least.
fn every_or_some(
    b: &mut Builder,
    decision: &Decision,
    width: usize,
    x: &str,
    kept: &str,
    change: impl FnOnce(&mut Builder, &str) -> Name,
) -> Name {
    let (row, every_token) = (Dim::Fixed(width), b.every_token(width));
    let (number, place) = (Element::Float(b.dtype), Element::Int64);
    let found = &[
        ("", number, vec![Dim::Open, Dim::Open, row]),
        (".places", place, vec![Dim::Fixed(1), Dim::Open, Dim::Fixed(2)]),
    ];
    let [rows, places] = by_form(
        b,
        decision,
        kept,
        found,
        |b, name| {
            let all = |(part, x)| b.op(&format!("{name}{part}"), "Identity", &[x]);
            [("", x), (".places", PLACES)].map(all)
        },
        |b, name| {
            let Rows { places, .. } = Rows::of(b, decision, name);
            [places.gather(b, name, x), places.0]
        },
    );
    let (change, places) = (change(b, &rows), Places(places));
    let [sum] = by_form(
        b,
        decision,
        &format!("{}.sum", decision.place),
        &[("", number, every_token)],
        |b, name| [b.op(name, "Add", &[x, &change])],
        |b, name| [places.add(b, name, x, &change)],
    );
    sum
}

/// What a step takes under `name`, given the names of their own: `every` where no token of a module is skipped, else
/// `some`. One token is never skipped here; a few, one in each sequence, are gathered sooner than asked about. The
/// outputs are the ends of their names, their elements and shapes.
fn by_form<const N: usize>(
    b: &mut Builder,
    decision: &Decision,
    name: &str,
    outputs: &[(&str, Element, Vec<Dim>); N],
    every: impl Fn(&mut Builder, &str) -> [Name; N],
    some: impl Fn(&mut Builder, &str) -> [Name; N],
) -> [Name; N] {
    let form = |form: &str| format!("{name}.{form}");
    let chunk = |b: &mut Builder, name: &str| {
        let every = |b: &mut Builder| every(b, &form("every"));
        let some = |b: &mut Builder| some(b, &form("some"));
        named(b, name, outputs, decision.any_skipped(), some, every)
    };
    let several = |b: &mut Builder| match b.sequences {
        Sequences::One => chunk(b, &form("several")),
        Sequences::Any => {
            let each = |b: &mut Builder| some(b, &form("each"));
            let chunk = |b: &mut Builder| chunk(b, &form("chunk"));
            named(b, &form("several"), outputs, ONE_EACH, each, chunk)
        }
    };
    named(b, name, outputs, ONE_TOKEN, |b| every(b, &form("one")), several)
}

/// A branch whose outputs are `name` with these ends.
fn named<const N: usize>(
    b: &mut Builder,
    name: &str,
    outputs: &[(&str, Element, Vec<Dim>); N],
    condition: &str,
    then: impl FnOnce(&mut Builder) -> [Name; N],
    otherwise: impl FnOnce(&mut Builder) -> [Name; N],
) -> [Name; N] {
    let names = outputs.each_ref().map(|(end, ..)| format!("{name}{end}"));
    let mut types = outputs.each_ref().map(|(_, element, shape)| ("", *element, shape.clone()));
    types.iter_mut().zip(&names).for_each(|(output, name)| output.0 = name);
    b.branch_of(&types, condition, then, otherwise)
}

/// `run` if any token is kept, else `x` `[batch, sequence, width]`, under the name `output`.
pub(super) fn if_any(
    b: &mut Builder,
    decision: &Decision,
    output: &str,
    width: usize,
    x: &str,
    run: impl FnOnce(&mut Builder) -> Name,
) -> Name {
    let skipped = format!("{}.skipped", decision.place);
    let run = |b: &mut Builder| [run(b)];
    let skip = |b: &mut Builder| [b.op(&skipped, "Identity", &[x])];
    let shape = b.every_token(width);
    let [output] = b.branch(&[(output, shape)], decision.any_kept(), run, skip);
    output
}

impl Rows {
    /// The tokens that `decision` keeps, their values named after `name`.
    pub(super) fn of(b: &mut Builder, decision: &Decision, name: &str) -> Self {
        let keep = decision.vector(b, name);
        let axis = vec![("axis", Attribute::Int(1))];
        let places = b.op_with(&format!("{name}.kept"), "Compress", &[PLACES, &keep], axis);
        Self { keep, places: Places(places) }
    }

    /// Whether there is one at all.
    pub(super) fn any(&self, b: &mut Builder, place: &str) -> Name {
        let count = b.op(&format!("{place}.count"), "Size", &[&self.places.0]);
        b.cast_to(&format!("{place}.any"), &count, Element::Bool)
    }

    /// Whether these are all tokens.
    pub(super) fn all(&self, b: &mut Builder, place: &str) -> Name {
        let count = b.op(&format!("{place}.kept.count"), "Size", &[&self.places.0]);
        b.op(&format!("{place}.all"), "Equal", &[&count, PLACES_COUNT])
    }

    /// Whether each token is kept, `[tokens]`.
    pub(super) fn keep(&self) -> &str {
        &self.keep
    }
}

impl Places {
    /// What `x` `[batch, sequence, …]` has for these tokens: `[1, tokens, …]`.
    pub(super) fn gather(&self, b: &mut Builder, name: &str, x: &str) -> Name {
        b.op(name, "GatherND", &[x, &self.0])
    }

    /// `x` `[batch, sequence, width]` with these rows replaced by `rows` `[1, tokens, width]`.
    pub(super) fn scatter(&self, b: &mut Builder, name: &str, x: &str, rows: &str) -> Name {
        b.op(name, "ScatterND", &[x, &self.0, rows])
    }

    /// `x` `[batch, sequence, width]` with `change` `[1, tokens, width]` added to these rows.
    pub(super) fn add(&self, b: &mut Builder, name: &str, x: &str, change: &str) -> Name {
        if b.dtype == DType::F32 {
            let add = vec![("reduction", Attribute::Text("add"))];
            return b.op_with(name, "ScatterND", &[x, &self.0, change], add);
        }
        // ONNX Runtime's CPU kernel adds no half-precision numbers.
        let kept = self.gather(b, &format!("{name}.residual"), x);
        let sum = b.op(&format!("{name}.sum"), "Add", &[&kept, change]);
        self.scatter(b, name, x, &sum)
    }
}
