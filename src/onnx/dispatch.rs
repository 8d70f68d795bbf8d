//! How a module's change reaches the residual stream: for every row, or for the rows a decision
//! keeps.

use skipgpt_passes::ir::{Dispatch, Routing};

use super::builder::{Builder, Name};
use super::graph::Attribute;
use super::router::Decision;
use super::stream::Stream;

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

impl Decision {
    /// Whether rows are gathered; otherwise every row is computed.
    pub(super) fn gathers(&self) -> bool {
        self.dispatch != Dispatch::Masked
    }
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
pub(super) fn kept(
    b: &mut Builder,
    decision: &Decision,
    width: usize,
    x: &str,
    change: impl FnOnce(&mut Builder, &Rows) -> Name,
) -> Stream {
    let name = &decision.place;
    let output = format!("{name}.output");
    let scattered = |b: &mut Builder, output: &str| {
        let rows = decision.rows(b);
        let change = change(b, &rows);
        let kept = rows.gather(b, &format!("{name}.residual"), x);
        let sum = b.op(&format!("{name}.sum"), "Add", &[&kept, &change]);
        rows.scatter(b, output, x, &sum)
    };
    Stream::Value(match &decision.any {
        None => scattered(b, &output),
        Some(any) => b.branch(
            &output,
            any,
            width,
            |b| scattered(b, &format!("{name}.kept.output")),
            |b| b.op(&format!("{name}.skipped"), "Identity", &[x]),
        ),
    })
}

impl Decision {
    fn rows(&self, b: &mut Builder) -> Rows {
        let keep = self.vector(b);
        let found = b.op(&format!("{}.kept", self.place), "NonZero", &[&keep]);
        let indices = b.op(&format!("{}.indices", self.place), "Transpose", &[&found]);
        Rows { keep, indices }
    }
}

impl Rows {
    /// The kept rows of `x` `[tokens, width]`: `[kept, width]`.
    pub(super) fn gather(&self, b: &mut Builder, name: &str, x: &str) -> Name {
        b.op_with(name, "Compress", &[x, &self.keep], vec![("axis", Attribute::Int(0))])
    }

    /// `x` `[tokens, width]` with the kept rows replaced by `rows` `[kept, width]`.
    pub(super) fn scatter(&self, b: &mut Builder, name: &str, x: &str, rows: &str) -> Name {
        b.op(name, "ScatterND", &[x, &self.indices, rows])
    }
}
