//! How a module's change reaches the residual stream: for every row, or for the rows a decision
//! keeps.

use skipgpt_passes::ir::{DType, Dispatch, Routing};

use super::builder::{Builder, Name};
use super::graph::{Attribute, Dim, Element};
use super::router::Decision;
use super::stream::Stream;

/// The number of every row, `[tokens, 1]`.
const ROW_NUMBERS: &str = "dispatch.rows";

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

/// The stream after a module that computes its change for kept rows only. Inside a branch there is
/// at least one.
pub(super) fn kept_rows(
    b: &mut Builder,
    decision: &Decision,
    width: usize,
    x: &str,
    change: impl FnOnce(&mut Builder, &Rows) -> Name,
) -> Stream {
    let name = &decision.place;
    let output = format!("{name}.output");
    let summed = |b: &mut Builder, output: &str| {
        let rows = Rows::of(b, decision);
        let change = change(b, &rows);
        rows.add(b, output, x, &change)
    };
    if decision.dispatch != Dispatch::Conditional {
        return Stream::Value(summed(b, &output));
    }
    let run = |b: &mut Builder| summed(b, &format!("{name}.kept.output"));
    Stream::Value(if_any(b, decision, &output, width, x, run))
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
    /// The rows that `decision` keeps.
    pub(super) fn of(b: &mut Builder, decision: &Decision) -> Self {
        let keep = decision.vector(b);
        let (name, axis) = (&decision.place, vec![("axis", Attribute::Int(0))]);
        let indices = b.op_with(&format!("{name}.kept"), "Compress", &[ROW_NUMBERS, &keep], axis);
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
