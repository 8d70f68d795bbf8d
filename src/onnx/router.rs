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
    /// The decisions of its router, `[tokens, decisions]`.
    kept: Name,
    /// Which of them is its own.
    slot: usize,
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

/// The decisions `[tokens, decisions]` of the layer's shared router, if it has one, on `x`
/// `[tokens, hidden]`.
pub(super) fn shared(b: &mut Builder, layer: &Layer, x: &str) -> Option<Name> {
    let SharedRouter { hidden, output, .. } = layer.router.as_ref()?;
    Some(decide_all(b, &format!("layers.{}", layer.index), hidden.as_ref(), output, x))
}

/// The decision of one module, from the layer's shared router or its own on `x`; `None` if it runs
/// for every token.
pub(super) fn decide(
    b: &mut Builder,
    module: ModuleId,
    routing: &Routing,
    shared: Option<&Name>,
    x: &str,
) -> Option<Decision> {
    let Routing::Routed { source, dispatch: Some(dispatch) } = routing else { return None };
    let (place, dispatch) = (module.to_string(), *dispatch);
    let (kept, slot) = match source {
        Source::Shared { slot } => (shared?.clone(), *slot),
        Source::Own(router) => {
            (decide_all(b, &place, router.hidden.as_ref(), &router.output, x), 0)
        }
    };
    Some(Decision { place, dispatch, kept, slot })
}

/// The decisions of a router. Always `f32`: rounded routers flip near-ties.
fn decide_all(
    b: &mut Builder,
    place: &str,
    hidden: Option<&Linear>,
    output: &Linear,
    x: &str,
) -> Name {
    let name = format!("{place}.router");
    let mut x = b.as_f32(&format!("{name}.input"), x);
    if let Some(hidden) = hidden {
        let wide = b.linear(&format!("{name}.hidden"), &x, hidden, DType::F32);
        x = b.op(&format!("{name}.relu"), "Relu", &[&wide]);
    }
    let all = b.linear(&scores_of(place), &x, output, DType::F32);
    let [keep, skip] = b.split(&format!("{name}.scores"), &all, 1, ["keep", "skip"]);
    b.op(&format!("{name}.kept"), "GreaterOrEqual", &[&keep, &skip])
}

impl Decision {
    /// The decision as a factor, `[tokens, 1]`, 0 or 1.
    pub(super) fn factor(&self, b: &mut Builder) -> Name {
        let slot = b.ints(&format!("routing.slot.{}", self.slot), &[self.slot as i64]);
        let keep = self.pick(b, &slot);
        b.cast(&format!("{}.keep_factor", self.place), &keep, b.dtype)
    }

    /// Whether each token is kept, `[tokens]`.
    pub(super) fn vector(&self, b: &mut Builder) -> Name {
        // A scalar index drops the axis.
        let slot = b.int(&format!("routing.slot.{}.scalar", self.slot), self.slot as i64);
        self.pick(b, &slot)
    }

    fn pick(&self, b: &mut Builder, slot: &str) -> Name {
        let axis = vec![("axis", Attribute::Int(1))];
        b.op_with(&format!("{}.keep", self.place), "Gather", &[&self.kept, slot], axis)
    }
}
