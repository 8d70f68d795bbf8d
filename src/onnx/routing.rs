//! Routers: scores, decisions, and the rows they keep.

use skipgpt_passes::ir::{
    DType, Dispatch, Layer, Linear, Model, ModuleId, Routing, SharedRouter, Source,
};

use super::builder::{Builder, Name};
use super::graph::Attribute;

/// The decision of one routed module, as values of the graph.
#[derive(Debug, Clone)]
pub(super) struct Decision {
    /// Where names of this module's values begin.
    pub(super) place: String,
    /// How skipped tokens are skipped.
    pub(super) dispatch: Dispatch,
    /// Whether a token is kept, `[tokens, 1]`.
    pub(super) keep: Name,
    /// The scores it comes from.
    scores: Scores,
    /// Which of them.
    slot: usize,
}

/// What a router says of every token, `[tokens, decisions]` each, `f32`.
#[derive(Debug, Clone)]
struct Scores {
    keep: Name,
    skip: Name,
}

/// The decisions of a layer's shared router, by slot.
#[derive(Debug, Default)]
pub(super) struct SharedDecisions(Option<(Scores, Vec<Name>)>);

/// The rows a decision keeps.
pub(super) struct Rows {
    /// Whether each token is kept, `[tokens]`.
    keep: Name,
    /// The kept rows' numbers, `[kept, 1]`.
    indices: Name,
}

/// Where a router's scores are found in the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterScores {
    /// The value's name: `f32` `[tokens, 2 · modules]`, keep scores before skip scores.
    pub value: String,
    /// Whose scores they are, column by column.
    pub modules: Vec<ModuleId>,
}

/// Every router of a lowered model, in the order of its modules.
pub fn router_scores(model: &Model) -> Vec<RouterScores> {
    let mut routers: Vec<RouterScores> = Vec::new();
    for module in model.routed_modules() {
        let Some(Routing::Routed { source, .. }) = model.routing(module) else { continue };
        let (value, slot) = match source {
            Source::Own(_) => (scores_of(&module.to_string()), 0),
            Source::Shared { slot } => (scores_of(&format!("layers.{}", module.layer)), *slot),
        };
        match routers.last_mut().filter(|last| last.value == value) {
            Some(last) => last.modules.insert(slot.min(last.modules.len()), module),
            None => routers.push(RouterScores { value, modules: vec![module] }),
        }
    }
    routers
}

/// The name of the scores of the router at `place`.
fn scores_of(place: &str) -> Name {
    format!("{place}.router.scores")
}

/// Whether a module with this routing gathers rows.
pub(super) fn gathers(routing: &Routing) -> bool {
    matches!(
        routing,
        Routing::Routed { dispatch: Some(Dispatch::Gathered | Dispatch::Conditional), .. }
    )
}

/// Evaluates the layer's shared router, if it has one, on `x` `[tokens, hidden]`.
pub(super) fn shared(b: &mut Builder, layer: &Layer, x: &str) -> SharedDecisions {
    let Some(SharedRouter { hidden, output, decisions }) = &layer.router else {
        return SharedDecisions(None);
    };
    let place = format!("layers.{}", layer.index);
    let (scores, kept) = decisions_of(b, &place, hidden.as_ref(), output, x);
    let slots = match decisions {
        1 => vec![kept],
        _ => b.split(&format!("{place}.router.keep"), &kept, 1, ["0", "1"]).to_vec(),
    };
    SharedDecisions(Some((scores, slots)))
}

/// The decision of one module, from the layer's shared router or its own on `x`; `None` if it runs
/// for every token.
pub(super) fn decide(
    b: &mut Builder,
    module: ModuleId,
    routing: &Routing,
    shared: &SharedDecisions,
    x: &str,
) -> Option<Decision> {
    let Routing::Routed { source, dispatch: Some(dispatch) } = routing else { return None };
    let (place, dispatch) = (module.to_string(), *dispatch);
    match source {
        Source::Shared { slot } => {
            let (scores, slots) = shared.0.as_ref()?;
            let (keep, scores) = (slots.get(*slot)?.clone(), scores.clone());
            Some(Decision { place, dispatch, keep, scores, slot: *slot })
        }
        Source::Own(router) => {
            let (scores, keep) = decisions_of(b, &place, router.hidden.as_ref(), &router.output, x);
            Some(Decision { place, dispatch, keep, scores, slot: 0 })
        }
    }
}

/// Scores `[tokens, decisions]` and decisions of a router. Always `f32`: rounded routers flip
/// near-ties.
fn decisions_of(
    b: &mut Builder,
    place: &str,
    hidden: Option<&Linear>,
    output: &Linear,
    x: &str,
) -> (Scores, Name) {
    let name = format!("{place}.router");
    let mut x = b.to_f32(&format!("{name}.input"), x);
    if let Some(hidden) = hidden {
        let wide = b.linear(&format!("{name}.hidden"), &x, hidden, DType::F32);
        x = b.op(&format!("{name}.relu"), "Relu", &[&wide]);
    }
    let all = b.linear(&scores_of(place), &x, output, DType::F32);
    let [keep, skip] = b.split(&format!("{name}.scores"), &all, 1, ["keep", "skip"]);
    let kept = b.op(&format!("{name}.kept"), "GreaterOrEqual", &[&keep, &skip]);
    (Scores { keep, skip }, kept)
}

impl Decision {
    /// Keep score minus skip score, `[tokens, 1]`.
    pub(super) fn margin(&self, b: &mut Builder) -> Name {
        let slot = b.ints(&format!("routing.slot.{}", self.slot), &[self.slot as i64]);
        let [keep, skip] =
            [("keep", &self.scores.keep), ("skip", &self.scores.skip)].map(|(side, scores)| {
                let name = format!("{}.{side}_score", self.place);
                b.op_with(&name, "Gather", &[scores, &slot], vec![("axis", Attribute::Int(1))])
            });
        b.op(&format!("{}.margin", self.place), "Sub", &[&keep, &skip])
    }

    /// The decision as a factor, `[tokens, 1]`, 0 or 1.
    pub(super) fn factor(&self, b: &mut Builder) -> Name {
        b.cast(&format!("{}.keep_factor", self.place), &self.keep, b.dtype)
    }

    /// The rows it keeps.
    pub(super) fn rows(&self, b: &mut Builder) -> Rows {
        let flat = b.ints("shapes.flat", &[-1]);
        let keep = b.op(&format!("{}.keep", self.place), "Reshape", &[&self.keep, &flat]);
        let found = b.op(&format!("{}.kept", self.place), "NonZero", &[&keep]);
        let indices = b.op(&format!("{}.indices", self.place), "Transpose", &[&found]);
        Rows { keep, indices }
    }

    /// Whether any token is kept, one truth value.
    pub(super) fn any(&self, b: &mut Builder) -> Name {
        let place = &self.place;
        let number = b.cast(&format!("{place}.any.number"), &self.keep, DType::F32);
        let most = b.op_with(
            &format!("{place}.any.most"),
            "ReduceMax",
            &[&number],
            vec![("keepdims", Attribute::Int(0))],
        );
        let zero = b.floats("constants.zero.f32", &[], &[0.0]);
        b.op(&format!("{place}.any"), "Greater", &[&most, &zero])
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

/// `x + f(x)` for the tokens the decision keeps, `x` for the others, by the decision's dispatch.
///
/// `whole` computes `f` of every row; `gathered` computes it for the rows it is given, which are
/// never none inside a branch.
pub(super) fn dispatch(
    b: &mut Builder,
    decision: Option<&Decision>,
    name: &str,
    width: usize,
    x: &str,
    whole: impl FnOnce(&mut Builder) -> Name,
    gathered: impl FnOnce(&mut Builder, &Rows) -> Name,
) -> Name {
    let output = format!("{name}.output");
    let Some(decision) = decision else {
        let change = whole(b);
        return b.op(&output, "Add", &[x, &change]);
    };
    let scattered = |b: &mut Builder, output: &str| {
        let rows = decision.rows(b);
        let change = gathered(b, &rows);
        let kept = rows.gather(b, &format!("{name}.residual"), x);
        let sum = b.op(&format!("{name}.sum"), "Add", &[&kept, &change]);
        rows.scatter(b, output, x, &sum)
    };
    match decision.dispatch {
        Dispatch::Masked => {
            let change = whole(b);
            let factor = decision.factor(b);
            let change = b.op(&format!("{name}.masked"), "Mul", &[&change, &factor]);
            b.op(&output, "Add", &[x, &change])
        }
        Dispatch::Gathered => scattered(b, &output),
        Dispatch::Conditional => {
            let any = decision.any(b);
            let otherwise = format!("{name}.skipped");
            b.branch(
                &output,
                &any,
                width,
                |b| scattered(b, &format!("{name}.kept.output")),
                |b| b.op(&otherwise, "Identity", &[x]),
            )
        }
    }
}
