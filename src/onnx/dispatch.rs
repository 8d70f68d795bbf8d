//! How a module's change reaches the residual stream: for every row, or for the rows a decision
//! keeps.

use skipgpt_passes::ir::{DType, Dispatch, Routing};

use super::builder::{Builder, Name};
use super::graph::{Attribute, Dim, Element};
use super::router::Decision;
use super::stream::Stream;

/// The place of every token, its row and its column, `[1, tokens, 2]`.
const PLACES: &str = "dispatch.places";

/// How many numbers these are.
const PLACES_COUNT: &str = "dispatch.places.count";

/// Whether there is one new token altogether, one element; present if a conditional MLP asks, or a conditional attention
/// module in grouped form.
pub(super) const ONE_TOKEN: &str = "step.one_token";

/// The tokens a decision keeps.
pub(super) struct Rows {
    /// Whether each token is kept, `[tokens]`.
    keep: Name,
    /// The kept tokens' places, `[1, kept, 2]`.
    places: Name,
}

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
        let kept = rows.gather(b, &kept, x);
        let change = change(b, &kept);
        return Stream::Value(rows.add(b, &output, x, &change));
    }
    let run = |b: &mut Builder| one_or_several(b, decision, width, x, &kept, change);
    Stream::Value(if_any(b, decision, &output, width, x, run))
}

/// `x` with the change of its kept rows, of which there is one at least. One token is all there is to
/// keep, and no row has to be found.
fn one_or_several(
    b: &mut Builder,
    decision: &Decision,
    width: usize,
    x: &str,
    kept: &str,
    change: impl FnOnce(&mut Builder, &str) -> Name,
) -> Name {
    let one = |b: &mut Builder| [b.op(&format!("{kept}.one"), "Identity", &[x])];
    let several = |b: &mut Builder| {
        let rows = Rows::of(b, decision, kept);
        [rows.gather(b, &format!("{kept}.several"), x)]
    };
    let some = vec![Dim::Fixed(1), Dim::Open, Dim::Fixed(width)];
    let [rows] = b.branch(&[(kept, some)], ONE_TOKEN, one, several);
    let change = change(b, &rows);
    let sum = format!("{}.sum", decision.place);
    let one = |b: &mut Builder| [b.op(&format!("{sum}.one"), "Add", &[x, &change])];
    let several = |b: &mut Builder| {
        let rows = Rows::of(b, decision, &sum);
        [rows.add(b, &format!("{sum}.several"), x, &change)]
    };
    let shape = b.every_token(width);
    let [sum] = b.branch(&[(&*sum, shape)], ONE_TOKEN, one, several);
    sum
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
    let [output] = b.branch(&[(output, shape)], decision.any(), run, skip);
    output
}

impl Rows {
    /// The tokens that `decision` keeps, their values named after `name`.
    pub(super) fn of(b: &mut Builder, decision: &Decision, name: &str) -> Self {
        let keep = decision.vector(b, name);
        let axis = vec![("axis", Attribute::Int(1))];
        let places = b.op_with(&format!("{name}.kept"), "Compress", &[PLACES, &keep], axis);
        Self { keep, places }
    }

    /// Whether there is one at all.
    pub(super) fn any(&self, b: &mut Builder, place: &str) -> Name {
        let count = b.op(&format!("{place}.count"), "Size", &[&self.places]);
        b.cast_to(&format!("{place}.any"), &count, Element::Bool)
    }

    /// Whether these are all tokens.
    pub(super) fn all(&self, b: &mut Builder, place: &str) -> Name {
        let count = b.op(&format!("{place}.kept.count"), "Size", &[&self.places]);
        b.op(&format!("{place}.all"), "Equal", &[&count, PLACES_COUNT])
    }

    /// Whether each token is kept, `[tokens]`.
    pub(super) fn keep(&self) -> &str {
        &self.keep
    }

    /// What `x` `[batch, sequence, …]` has for the kept tokens: `[1, kept, …]`.
    pub(super) fn gather(&self, b: &mut Builder, name: &str, x: &str) -> Name {
        b.op(name, "GatherND", &[x, &self.places])
    }

    /// `x` `[batch, sequence, width]` with the kept rows replaced by `rows` `[1, kept, width]`.
    pub(super) fn scatter(&self, b: &mut Builder, name: &str, x: &str, rows: &str) -> Name {
        b.op(name, "ScatterND", &[x, &self.places, rows])
    }

    /// `x` `[batch, sequence, width]` with `change` `[1, kept, width]` added to the kept rows.
    pub(super) fn add(&self, b: &mut Builder, name: &str, x: &str, change: &str) -> Name {
        if b.dtype == DType::F32 {
            let add = vec![("reduction", Attribute::Text("add"))];
            return b.op_with(name, "ScatterND", &[x, &self.places, change], add);
        }
        // ONNX Runtime's CPU kernel adds no half-precision numbers.
        let kept = self.gather(b, &format!("{name}.residual"), x);
        let sum = b.op(&format!("{name}.sum"), "Add", &[&kept, change]);
        self.scatter(b, name, x, &sum)
    }
}
