//! Routers: scores, margins, decisions.

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
    /// Whether any token is kept, one truth value; present where a branch asks.
    pub(super) any: Option<Name>,
    /// Keep score minus skip score of every decision of its router, `[tokens, decisions]`, `f32`:
    /// 0 and above keeps. A difference of floats is never rounded to the other side of 0.
    margins: Name,
    /// Which of them is its own.
    slot: usize,
}

/// What a router decided, by slot.
#[derive(Debug, Default)]
pub(super) struct Decided {
    margins: Name,
    any: Vec<Name>,
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

/// Whether a module with this routing is inside a branch.
fn branches(routing: &Routing) -> bool {
    matches!(routing, Routing::Routed { dispatch: Some(Dispatch::Conditional), .. })
}

/// Evaluates the layer's shared router, if it has one, on `x` `[tokens, hidden]`.
pub(super) fn shared(b: &mut Builder, layer: &Layer, x: &str) -> Decided {
    let Some(SharedRouter { hidden, output, decisions }) = &layer.router else {
        return Decided::default();
    };
    let place = format!("layers.{}", layer.index);
    let attention = layer.attention.as_ref().map(|module| &module.routing);
    let mlp = layer.mlp.as_ref().map(|module| &module.routing);
    let branches = attention.into_iter().chain(mlp).any(branches);
    decide_all(b, &place, (hidden.as_ref(), output), *decisions, branches, x)
}

/// The decision of one module, from the layer's shared router or its own on `x`; `None` if it runs
/// for every token.
pub(super) fn decide(
    b: &mut Builder,
    module: ModuleId,
    routing: &Routing,
    shared: &Decided,
    x: &str,
) -> Option<Decision> {
    let Routing::Routed { source, dispatch: Some(dispatch) } = routing else { return None };
    let (place, dispatch) = (module.to_string(), *dispatch);
    let of = |decided: &Decided, slot: usize| Decision {
        place: place.clone(),
        dispatch,
        any: decided.any.get(slot).cloned(),
        margins: decided.margins.clone(),
        slot,
    };
    match source {
        Source::Shared { slot } => Some(of(shared, *slot)),
        Source::Own(router) => {
            let weights = (router.hidden.as_ref(), &router.output);
            Some(of(&decide_all(b, &place, weights, 1, branches(routing), x), 0))
        }
    }
}

/// The decisions of a router. Always `f32`: rounded routers flip near-ties.
fn decide_all(
    b: &mut Builder,
    place: &str,
    (hidden, output): (Option<&Linear>, &Linear),
    decisions: usize,
    branches: bool,
    x: &str,
) -> Decided {
    let name = format!("{place}.router");
    let mut x = b.as_f32(&format!("{name}.input"), x);
    if let Some(hidden) = hidden {
        let wide = b.linear(&format!("{name}.hidden"), &x, hidden, DType::F32);
        x = b.op(&format!("{name}.relu"), "Relu", &[&wide]);
    }
    let all = b.linear(&scores_of(place), &x, output, DType::F32);
    let [keep, skip] = b.split(&format!("{name}.scores"), &all, 1, ["keep", "skip"]);
    let margins = b.op(&format!("{name}.margins"), "Sub", &[&keep, &skip]);
    if !branches {
        return Decided { margins, any: Vec::new() };
    }
    let first = b.ints("constants.first_axis", &[0]);
    let most = b.op(&format!("{name}.most"), "ReduceMax", &[&margins, &first]);
    let zero = b.floats("constants.zero.f32", &[], &[0.0]);
    let any = b.op(&format!("{name}.any"), "GreaterOrEqual", &[&most, &zero]);
    let any = match decisions {
        1 => vec![any],
        _ => b.split(&format!("{name}.any"), &any, 1, ["0", "1"]).to_vec(),
    };
    Decided { margins, any }
}

impl Decision {
    /// Keep score minus skip score, `[tokens, 1]`.
    pub(super) fn margin(&self, b: &mut Builder) -> Name {
        self.margin_as(b, "margin", true)
    }

    /// The decision as a factor, `[tokens, 1]`, 0 or 1.
    pub(super) fn factor(&self, b: &mut Builder) -> Name {
        let margin = self.margin_as(b, "own_margin", true);
        let keep = self.keep(b, &margin);
        b.cast(&format!("{}.keep_factor", self.place), &keep, b.dtype)
    }

    /// Whether each token is kept, `[tokens]`.
    pub(super) fn vector(&self, b: &mut Builder) -> Name {
        let margin = self.margin_as(b, "own_margin", false);
        self.keep(b, &margin)
    }

    /// The margin as a column, `[tokens, 1]`, or as a vector.
    fn margin_as(&self, b: &mut Builder, part: &str, column: bool) -> Name {
        let slot = self.slot as i64;
        // A scalar index drops the axis.
        let slot = if column {
            b.ints(&format!("routing.slot.{slot}"), &[slot])
        } else {
            b.int(&format!("routing.slot.{slot}.scalar"), slot)
        };
        let axis = vec![("axis", Attribute::Int(1))];
        b.op_with(&format!("{}.{part}", self.place), "Gather", &[&self.margins, &slot], axis)
    }

    fn keep(&self, b: &mut Builder, margin: &str) -> Name {
        let zero = b.floats("constants.zero.f32", &[], &[0.0]);
        b.op(&format!("{}.keep", self.place), "GreaterOrEqual", &[margin, &zero])
    }
}
