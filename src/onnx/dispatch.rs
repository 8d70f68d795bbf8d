//! How a module's change reaches the residual stream: for every row, or for the rows a decision
//! keeps.

use skipgpt_passes::ir::{DType, Dispatch, Routing};

use super::builder::{Builder, Name};
use super::graph::{Attribute, Dim, Element};
use super::router::Decision;
use super::stream::Stream;

/// The number of every row, `[tokens, 1]`.
const ROW_NUMBERS: &str = "dispatch.rows";

/// Whether there is one new token altogether, one element; present if a conditional MLP asks, or a conditional attention
/// module in grouped form.
pub(super) const ONE_TOKEN: &str = "step.one_token";

/// The rows a decision keeps.
pub(super) struct Rows {
    /// Whether each token is kept, `[tokens]`.
    keep: Name,
    /// The kept rows' numbers, `[kept, 1]`.
    indices: Name,
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

/// What modules that gather share: the rows' numbers, from `range`, `[tokens]`.
pub(super) fn row_numbers(b: &mut Builder, range: &str) {
    let column = b.ints("shapes.column", &[-1, 1]);
    b.op(ROW_NUMBERS, "Reshape", &[range, &column]);
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

/// The stream after a module that computes its change, `[kept, width]`, of the kept rows of `x` `[tokens, width]`.
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
    let shape = |rows| vec![rows, Dim::Fixed(width)];
    let one = |b: &mut Builder| [b.op(&format!("{kept}.one"), "Identity", &[x])];
    let several = |b: &mut Builder| {
        let rows = Rows::of(b, decision, kept);
        [rows.gather(b, &format!("{kept}.several"), x)]
    };
    let [rows] = b.branch(&[(kept, shape(Dim::Open))], ONE_TOKEN, one, several);
    let change = change(b, &rows);
    let sum = format!("{}.sum", decision.place);
    let one = |b: &mut Builder| [b.op(&format!("{sum}.one"), "Add", &[x, &change])];
    let several = |b: &mut Builder| {
        let rows = Rows::of(b, decision, &sum);
        [rows.add(b, &format!("{sum}.several"), x, &change)]
    };
    let [sum] = b.branch(&[(&*sum, shape(Dim::Symbolic("tokens")))], ONE_TOKEN, one, several);
    sum
}

/// `run` if any token is kept, else `x` `[tokens, width]`, under the name `output`.
pub(super) fn if_any(
    b: &mut Builder,
    decision: &Decision,
    output: &str,
    width: usize,
    x: &str,
    run: impl FnOnce(&mut Builder) -> Name,
) -> Name {
    let shape = vec![Dim::Symbolic("tokens"), Dim::Fixed(width)];
    let skipped = format!("{}.skipped", decision.place);
    let run = |b: &mut Builder| [run(b)];
    let skip = |b: &mut Builder| [b.op(&skipped, "Identity", &[x])];
    let [output] = b.branch(&[(output, shape)], decision.any(), run, skip);
    output
}

impl Rows {
    /// The rows that `decision` keeps, their values named after `place`.
    pub(super) fn of(b: &mut Builder, decision: &Decision, place: &str) -> Self {
        let keep = decision.vector(b, place);
        let axis = vec![("axis", Attribute::Int(0))];
        let indices = b.op_with(&format!("{place}.kept"), "Compress", &[ROW_NUMBERS, &keep], axis);
        Self { keep, indices }
    }

    /// Whether there is one at all.
    pub(super) fn any(&self, b: &mut Builder, place: &str) -> Name {
        let count = b.op(&format!("{place}.count"), "Size", &[&self.indices]);
        b.cast_to(&format!("{place}.any"), &count, Element::Bool)
    }

    /// Whether each token is kept, `[tokens]`.
    pub(super) fn keep(&self) -> &str {
        &self.keep
    }

    /// The kept rows' numbers, `[kept, 1]`.
    pub(super) fn numbers(&self) -> &str {
        &self.indices
    }

    /// The kept rows of `x` `[tokens, width]`: `[kept, width]`.
    pub(super) fn gather(&self, b: &mut Builder, name: &str, x: &str) -> Name {
        b.op_with(name, "Compress", &[x, &self.keep], vec![("axis", Attribute::Int(0))])
    }

    /// `x` `[tokens, width]` with the kept rows replaced by `rows` `[kept, width]`.
    pub(super) fn scatter(&self, b: &mut Builder, name: &str, x: &str, rows: &str) -> Name {
        b.op(name, "ScatterND", &[x, &self.indices, rows])
    }

    /// `x` `[tokens, width]` with `change` `[kept, width]` added to the kept rows.
    pub(super) fn add(&self, b: &mut Builder, name: &str, x: &str, change: &str) -> Name {
        if b.dtype == DType::F32 {
            let add = vec![("reduction", Attribute::Text("add"))];
            return b.op_with(name, "ScatterND", &[x, &self.indices, change], add);
        }
        // ONNX Runtime's CPU kernel adds no half-precision numbers.
        let kept = self.gather(b, &format!("{name}.residual"), x);
        let sum = b.op(&format!("{name}.sum"), "Add", &[&kept, change]);
        self.scatter(b, name, x, &sum)
    }
}
