//! Routers: margins and decisions.
//!
//! A router scores keep and skip; what decides is the difference, its margin. The difference is taken
//! of the weights, once, while the artifact is written: one product, compared with 0, gives the
//! decisions of all modules it decides for. A tie keeps.

use skipgpt_passes::ir::{
    DType, Dispatch, Layer, Linear, Model, ModuleId, ModuleKind, Routing, SharedRouter, Source,
    Weight,
};

use super::builder::{Builder, Name};
use super::dispatch;
use super::graph::Attribute;

/// The decision of one routed module, as values of the graph.
#[derive(Debug, Clone)]
pub(super) struct Decision {
    /// Where names of this module's values begin.
    pub(super) place: String,
    /// How skipped tokens are skipped.
    pub(super) dispatch: Dispatch,
    /// The margins of its router, `[batch, sequence, decisions]`.
    margins: Name,
    /// Which of them is its own.
    slot: usize,
    /// Whether any token is kept, one element, where somebody asks; of a gated module, whether it is the
    /// only one.
    any: Option<Name>,
}

/// Where a router's margins are found in the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterMargins {
    /// The value's name: `f32` `[batch, sequence, modules]`; 0 or more keeps.
    pub value: String,
    /// Whose margins they are, column by column.
    pub modules: Vec<ModuleId>,
}

/// Every router of a lowered model, in the order of its modules.
pub fn router_margins(model: &Model) -> Vec<RouterMargins> {
    let mut routers: Vec<RouterMargins> = Vec::new();
    for module in model.routed_modules() {
        let Some(Routing::Routed { source, .. }) = model.routing(module) else { continue };
        let (value, slot) = match source {
            Source::Own(_) => (margins_of(&module.to_string()), 0),
            Source::Shared { slot } => (margins_of(&format!("layers.{}", module.layer)), *slot),
        };
        match routers.last_mut().filter(|last| last.value == value) {
            Some(last) => last.modules.insert(slot.min(last.modules.len()), module),
            None => routers.push(RouterMargins { value, modules: vec![module] }),
        }
    }
    routers
}

/// The name of the margins of the router at `place`.
fn margins_of(place: &str) -> Name {
    format!("{place}.router.margins")
}

/// What a router decides: its margins, and, where a branch asks, whether any token is kept, by slot.
#[derive(Debug, Clone)]
pub(super) struct Decided {
    margins: Name,
    any: Vec<Name>,
}

/// What a margin has to reach in a step, by decision: an attention module's branch for one token is not
/// for several, so that there no margin reaches it. Nothing reaches NaN, infinity not even itself.
pub(super) fn floors(b: &mut Builder, model: &Model, one_token: &str) {
    let zero = b.floats("constants.zero.vector", &[1], &[0.0]);
    let never = b.floats("constants.never", &[1], &[f32::NAN]);
    let gate = b.op(floor(1), "Where", &[one_token, &zero, &never]);
    if model.layers.iter().filter_map(|layer| layer.router.as_ref()).any(|r| r.decisions == 2) {
        let axis = vec![("axis", Attribute::Int(0))];
        b.op_with(floor(2), "Concat", &[&gate, &zero], axis);
    }
}

/// The name of the floors of so many decisions, attention's first.
const fn floor(decisions: usize) -> &'static str {
    if decisions == 1 { "step.floor" } else { "step.floors" }
}

/// What the layer's shared router, if it has one, decides on `x` `[batch, sequence, hidden]`. The branch of a
/// conditional attention module is for steps of one token if `gated`.
pub(super) fn shared(b: &mut Builder, layer: &Layer, gated: bool, x: &str) -> Option<Decided> {
    let SharedRouter { hidden, output, decisions } = layer.router.as_ref()?;
    let asks = |kind| {
        layer.routing(kind).is_some_and(|routing| {
            let shared = matches!(routing, Routing::Routed { source: Source::Shared { .. }, .. });
            shared && dispatch::branches(routing)
        })
    };
    let any = match (asks(ModuleKind::Attention), asks(ModuleKind::Mlp)) {
        (true, _) if gated => Any::Gated,
        (false, false) => Any::Unasked,
        _ => Any::Kept,
    };
    let place = format!("layers.{}", layer.index);
    Some(decide_all(b, &place, (hidden.as_ref(), output), *decisions, any, x))
}

/// The decision of one module, from the layer's shared router or its own on `x`; `None` if it runs
/// for every token.
pub(super) fn decide(
    b: &mut Builder,
    module: ModuleId,
    routing: &Routing,
    shared: Option<&Decided>,
    gated: bool,
    x: &str,
) -> Option<Decision> {
    let Routing::Routed { source, dispatch: Some(dispatch) } = routing else { return None };
    let (place, dispatch) = (module.to_string(), *dispatch);
    let (Decided { margins, any }, slot) = match source {
        Source::Shared { slot } => (shared?.clone(), *slot),
        Source::Own(router) => {
            let any = match (dispatch, module.kind) {
                (Dispatch::Conditional, ModuleKind::Attention) if gated => Any::Gated,
                (Dispatch::Conditional, _) => Any::Kept,
                _ => Any::Unasked,
            };
            (decide_all(b, &place, (router.hidden.as_ref(), &router.output), 1, any, x), 0)
        }
    };
    Some(Decision { place, dispatch, margins, slot, any: any.get(slot).cloned() })
}

/// What is asked of all tokens' decisions together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Any {
    /// Nothing.
    Unasked,
    /// Whether any is kept.
    Kept,
    /// The same; of the first decision, whether its token is the only one and kept.
    Gated,
}

/// What a router decides. Always `f32`: rounded routers flip near-ties.
fn decide_all(
    b: &mut Builder,
    place: &str,
    (hidden, output): (Option<&Linear>, &Linear),
    decisions: usize,
    any: Any,
    x: &str,
) -> Decided {
    let name = format!("{place}.router");
    let mut x = b.as_f32(&format!("{name}.input"), x);
    if let Some(hidden) = hidden {
        let wide = b.linear(&format!("{name}.hidden"), &x, hidden, DType::F32);
        x = b.op(&format!("{name}.relu"), "Relu", &[&wide]);
    }
    let margins = b.linear(&margins_of(place), &x, &difference(output, decisions), DType::F32);
    let any = match any {
        Any::Unasked => vec![],
        asked => any_kept(b, &name, &margins, decisions, asked == Any::Gated),
    };
    Decided { margins, any }
}

/// Whether any token is kept, by decision, one element each.
fn any_kept(
    b: &mut Builder,
    name: &str,
    margins: &str,
    decisions: usize,
    gated: bool,
) -> Vec<Name> {
    let tokens = b.ints("constants.token_axes", &[0, 1]);
    let keep = vec![("keepdims", Attribute::Int(0))];
    let largest = b.op_with(&format!("{name}.largest"), "ReduceMax", &[margins, &tokens], keep);
    let floor = if gated {
        floor(decisions).to_owned()
    } else {
        b.floats("constants.zero.f32", &[], &[0.0])
    };
    let any = b.op(&format!("{name}.any"), "GreaterOrEqual", &[&largest, &floor]);
    if decisions == 1 {
        return vec![any];
    }
    b.split(&format!("{name}.any"), &any, ["0", "1"]).to_vec()
}

/// The rows of the keep scores less those of the skip scores.
fn difference(Linear { weight, bias, .. }: &Linear, decisions: usize) -> Linear {
    let half = |weight: &Weight| {
        let rows =
            |first| Weight::Slice { of: Box::new(weight.clone()), rows: first..first + decisions };
        Weight::Difference { of: Box::new(rows(0)), minus: Box::new(rows(decisions)) }
    };
    Linear { weight: half(weight), bias: bias.as_ref().map(half), lora: None }
}

impl Decision {
    /// The decision as a factor, `[batch, sequence, 1]`, 0 or 1.
    pub(super) fn factor(&self, b: &mut Builder) -> Name {
        let slot = b.ints(&format!("routing.slot.{}", self.slot), &[self.slot as i64]);
        let keep = self.pick(b, &self.place, &slot);
        b.cast(&format!("{}.keep_factor", self.place), &keep, b.dtype)
    }

    /// Whether each token is kept, `[tokens]`, under names after `place`.
    pub(super) fn vector(&self, b: &mut Builder, place: &str) -> Name {
        // A scalar index drops the axis.
        let slot = b.int(&format!("routing.slot.{}.scalar", self.slot), self.slot as i64);
        let keep = self.pick(b, place, &slot);
        let flat = b.ints("shapes.flat", &[-1]);
        b.op(&format!("{place}.keep.flat"), "Reshape", &[&keep, &flat])
    }

    /// Whether any token is kept, one element; of a gated module, whether it is the only one.
    pub(super) fn any(&self) -> &str {
        self.any.as_deref().unwrap_or_default()
    }

    fn pick(&self, b: &mut Builder, place: &str, slot: &str) -> Name {
        let axis = vec![("axis", Attribute::Int(2))];
        let margin = format!("{place}.margin");
        let margin = b.op_with(&margin, "Gather", &[&self.margins, slot], axis);
        let zero = b.floats("constants.zero.f32", &[], &[0.0]);
        b.op(&format!("{place}.keep"), "GreaterOrEqual", &[&margin, &zero])
    }
}
