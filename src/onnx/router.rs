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
    /// What it comes to for all tokens, where a branch asks.
    together: Option<Together>,
}

/// What a step's decisions on one module come to, one element each.
#[derive(Debug, Clone)]
struct Together {
    /// Whether any token is kept.
    any_kept: Name,
    /// Whether any token is skipped; of a gated module also whether a sequence has more new tokens than one.
    any_skipped: Name,
}

/// Where a router's margins are found in the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterMargins {
    /// The value's name: `f32` `[batch, sequence, columns]`; 0 or more keeps. Where branches ask, as many columns
    /// more hold the negatives.
    pub value: String,
    /// Whose margins they are, column by column.
    pub modules: Vec<ModuleId>,
    /// Whether there are the negatives.
    pub negatives: bool,
}

impl RouterMargins {
    /// How many columns there are.
    pub fn columns(&self) -> usize {
        columns(self.modules.len(), self.negatives)
    }
}

/// How many columns the margins of so many modules are.
pub(super) const fn columns(modules: usize, negatives: bool) -> usize {
    if negatives { 2 * modules } else { modules }
}

/// Every router of a lowered model, in the order of its modules.
pub fn router_margins(model: &Model) -> Vec<RouterMargins> {
    let mut routers: Vec<RouterMargins> = Vec::new();
    for module in model.routed_modules() {
        let Some(routing @ Routing::Routed { source, .. }) = model.routing(module) else {
            continue;
        };
        let negatives = dispatch::branches(routing);
        let (value, slot) = match source {
            Source::Own(_) => (margins_of(&module.to_string()), 0),
            Source::Shared { slot } => (margins_of(&format!("layers.{}", module.layer)), *slot),
        };
        match routers.last_mut().filter(|last| last.value == value) {
            Some(last) => {
                last.modules.insert(slot.min(last.modules.len()), module);
                last.negatives |= negatives;
            }
            None => routers.push(RouterMargins { value, modules: vec![module], negatives }),
        }
    }
    routers
}

/// The name of the margins of the router at `place`.
fn margins_of(place: &str) -> Name {
    format!("{place}.router.margins")
}

/// What a router decides: its margins, and, where a branch asks, what they come to, by slot.
#[derive(Debug, Clone)]
pub(super) struct Decided {
    margins: Name,
    together: Vec<Together>,
}

/// The least that a negative margin reaches which skips: the least positive number that no setting takes for 0.
const SKIPS: f32 = f32::MIN_POSITIVE;

/// What the largest of all tokens has to reach, by decision and then by its negative. An attention module's
/// branch for all tokens is for steps of one token a sequence, which `single` tells: the first negative
/// reaches its floor in every other.
pub(super) fn gated_floors(b: &mut Builder, model: &Model, single: &str) {
    let routers = router_margins(model);
    for decisions in [1, 2] {
        if !routers.iter().any(|router| router.modules.len() == decisions) {
            continue;
        }
        let mut always = floors(decisions);
        always[decisions] = f32::NEG_INFINITY;
        let never = ungated(b, decisions);
        let always = b.floats(&format!("{never}.always"), &[always.len()], &always);
        b.op(&gated(decisions), "Where", &[single, &never, &always]);
    }
}

/// The floors of so many decisions, and of their negatives.
fn floors(decisions: usize) -> Vec<f32> {
    [vec![0.0; decisions], vec![SKIPS; decisions]].concat()
}

/// The floors of so many decisions where none has a gate.
fn ungated(b: &mut Builder, decisions: usize) -> Name {
    let name = format!("routing.floors.{decisions}");
    b.floats(&name, &[2 * decisions], &floors(decisions))
}

/// The name of the floors of so many decisions, attention's first, which has a gate.
fn gated(decisions: usize) -> Name {
    format!("step.floors.{decisions}")
}

/// What the layer's shared router, if it has one, decides on `x` `[batch, sequence, hidden]`. The branch of a
/// conditional attention module for all tokens is for steps of one token a sequence if `gated`.
pub(super) fn shared(b: &mut Builder, layer: &Layer, gated: bool, x: &str) -> Option<Decided> {
    let SharedRouter { hidden, output, decisions } = layer.router.as_ref()?;
    let asks = |kind| {
        layer.routing(kind).is_some_and(|routing| {
            let shared = matches!(routing, Routing::Routed { source: Source::Shared { .. }, .. });
            shared && dispatch::branches(routing)
        })
    };
    let asked = match (asks(ModuleKind::Attention), asks(ModuleKind::Mlp)) {
        (true, _) if gated => Asked::Gated,
        (false, false) => Asked::Nothing,
        _ => Asked::Together,
    };
    let place = format!("layers.{}", layer.index);
    Some(decide_all(b, &place, (hidden.as_ref(), output), *decisions, asked, x))
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
    let (Decided { margins, together }, slot) = match source {
        Source::Shared { slot } => (shared?.clone(), *slot),
        Source::Own(router) => {
            let asked = match (dispatch, module.kind) {
                (Dispatch::Conditional, ModuleKind::Attention) if gated => Asked::Gated,
                (Dispatch::Conditional, _) => Asked::Together,
                _ => Asked::Nothing,
            };
            (decide_all(b, &place, (router.hidden.as_ref(), &router.output), 1, asked, x), 0)
        }
    };
    let together = together.get(slot).cloned();
    Some(Decision { place, dispatch, margins, slot, together })
}

/// What is asked of all tokens' decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Nothing,
    /// What they come to.
    Together,
    /// The same, the first decision having a gate.
    Gated,
}

/// What a router decides. Always `f32`: rounded routers flip near-ties.
fn decide_all(
    b: &mut Builder,
    place: &str,
    (hidden, output): (Option<&Linear>, &Linear),
    decisions: usize,
    asked: Asked,
    x: &str,
) -> Decided {
    let name = format!("{place}.router");
    let mut x = b.as_f32(&format!("{name}.input"), x);
    if let Some(hidden) = hidden {
        let wide = b.linear(&format!("{name}.hidden"), &x, hidden, DType::F32);
        x = b.op(&format!("{name}.relu"), "Relu", &[&wide]);
    }
    let output = difference(output, decisions, asked != Asked::Nothing);
    let margins = b.linear(&margins_of(place), &x, &output, DType::F32);
    let together = match asked {
        Asked::Nothing => vec![],
        asked => together(b, &name, &margins, decisions, asked == Asked::Gated),
    };
    Decided { margins, together }
}

/// What the decisions of all tokens come to, by decision: the least margin is the largest negative, so that one
/// operator finds both ends.
fn together(
    b: &mut Builder,
    name: &str,
    margins: &str,
    decisions: usize,
    has_gate: bool,
) -> Vec<Together> {
    let tokens = b.ints("constants.token_axes", &[0, 1]);
    let drop = vec![("keepdims", Attribute::Int(0))];
    let largest = b.op_with(&format!("{name}.largest"), "ReduceMax", &[margins, &tokens], drop);
    let floors = if has_gate { gated(decisions) } else { ungated(b, decisions) };
    let name = format!("{name}.any");
    let any = b.op(&name, "GreaterOrEqual", &[&largest, &floors]);
    let together = |[any_kept, any_skipped]: [Name; 2]| Together { any_kept, any_skipped };
    if decisions == 1 {
        return vec![together(b.split(&name, &any, ["kept", "skipped"]))];
    }
    let parts = ["kept.0", "kept.1", "skipped.0", "skipped.1"];
    let [kept, other_kept, skipped, other_skipped] = b.split(&name, &any, parts);
    vec![together([kept, skipped]), together([other_kept, other_skipped])]
}

/// The rows of the keep scores less those of the skip scores; if `both`, then also the negatives.
fn difference(Linear { weight, bias, .. }: &Linear, decisions: usize, both: bool) -> Linear {
    let half = |weight: &Weight| {
        let rows =
            |first| Weight::Slice { of: Box::new(weight.clone()), rows: first..first + decisions };
        let [keep, skip] = [rows(0), rows(decisions)];
        let (of, minus) =
            if both { (weight.clone(), Weight::Concat(vec![skip, keep])) } else { (keep, skip) };
        Weight::Difference { of: Box::new(of), minus: Box::new(minus) }
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

    /// Whether any token is kept, one element.
    pub(super) fn any_kept(&self) -> &str {
        self.together.as_ref().map_or("", |together| &together.any_kept)
    }

    /// Whether any token is skipped, one element; of a gated module also whether a sequence has more new tokens
    /// than one.
    pub(super) fn any_skipped(&self) -> &str {
        self.together.as_ref().map_or("", |together| &together.any_skipped)
    }

    fn pick(&self, b: &mut Builder, place: &str, slot: &str) -> Name {
        let axis = vec![("axis", Attribute::Int(2))];
        let margin = format!("{place}.margin");
        let margin = b.op_with(&margin, "Gather", &[&self.margins, slot], axis);
        let zero = b.floats("constants.zero.f32", &[], &[0.0]);
        b.op(&format!("{place}.keep"), "GreaterOrEqual", &[&margin, &zero])
    }
}
