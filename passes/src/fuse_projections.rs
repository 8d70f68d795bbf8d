//! Make one matrix of linears that read the same rows: k and v, gate and up, a layer's routers.
//!
//! `x·Kᵀ` beside `x·Vᵀ` is `x·[K; V]ᵀ`: one multiplication, one pass over `x`. Biases stack the same
//! way. Two routers make four scores, the keep scores first: `keep[i] = score[i] >= score[2 + i]`.
//!
//! ```text
//! - layers.0.attention: routed by own router on layer-input, argmax
//! -   router.output = linear %0.router_attention[2x8] bias %0.router_attention.bias[2]
//! + layers.0.router: 2 decisions on layer-input, argmax
//! +   output = linear concat(%0.router_attention[2x8][0..1], %0.router_mlp[2x8][0..1], %0.router_attention[2x8][1..2], %0.router_mlp[2x8][1..2]) bias concat(%0.router_attention.bias[2][0..1], %0.router_mlp.bias[2][0..1], %0.router_attention.bias[2][1..2], %0.router_mlp.bias[2][1..2])
//! + layers.0.attention: routed by decision 0
//! -   k = linear %0.k[4x8]
//! -   v = linear %0.v[4x8]
//! +   kv = linear concat(%0.k[4x8], %0.v[4x8])
//! - layers.0.mlp: routed by own router on layer-input, argmax
//! -   router.output = linear %0.router_mlp[2x8] bias %0.router_mlp.bias[2]
//! + layers.0.mlp: routed by decision 1
//! -   gate = linear %0.gate[12x8]
//! -   up = linear %0.up[12x8]
//! +   gate_up = linear concat(%0.gate[12x8], %0.up[12x8])
//! ```
//!
//! Two-layer routers stack their hidden layers, and their outputs stand on diagonals, so that each
//! reads its own hidden units: with `A` and `M` the output matrices,
//! `[[A0, 0], [0, M0], [A1, 0], [0, M1]]`.
//!
//! What is fused when: k and v if the plan fuses them, gate and up if the plan fuses them, and in
//! both cases only if both have a bias or neither has. Routers always, if they read the layer's
//! input: by their tap, or because their module is the first of its layer, whose input is the
//! layer's. A router that reads the state after attention stays its module's own. Two routers of
//! which only one is two-layer, or only one has a bias, are refused.

use crate::ir::{
    GateUp, KeyValue, Layer, Linear, Model, ModuleKind, Phase, Router, Routing, SharedRouter,
    Source, Tap, Weight,
};
use crate::pass::{Changed, Pass, Unsupported};
use crate::plan::Plan;

/// [`Phase::Frozen`] to [`Phase::Fused`]. Refuses layers whose two routers differ in form.
pub struct FuseProjections;

impl Pass for FuseProjections {
    fn name(&self) -> &'static str {
        "fuse-projections"
    }

    fn summary(&self) -> &'static str {
        "Make one matrix of k and v, of gate and up where planned, and of a layer's routers"
    }

    fn phases(&self) -> (Phase, Phase) {
        (Phase::Frozen, Phase::Fused)
    }

    fn apply(&self, model: &mut Model, plan: &Plan) -> Result<Changed, Unsupported> {
        let mut changed = false;
        for layer in &mut model.layers {
            changed |= plan.fuse_key_value && fuse_key_value(layer);
            changed |= plan.fuse_gate_up && fuse_gate_up(layer);
            changed |= share_router(layer)?;
        }
        Ok(Changed::from(changed))
    }
}

fn fuse_key_value(layer: &mut Layer) -> bool {
    if let Some(attention) = &mut layer.attention
        && let KeyValue::Separate { k, v } = &attention.kv
        && let Some(kv) = stacked(k, v)
    {
        attention.kv = KeyValue::Fused(kv);
        return true;
    }
    false
}

fn fuse_gate_up(layer: &mut Layer) -> bool {
    if let Some(mlp) = &mut layer.mlp
        && let GateUp::Separate { gate, up } = &mlp.gate_up
        && let Some(gate_up) = stacked(gate, up)
    {
        mlp.gate_up = GateUp::Fused(gate_up);
        return true;
    }
    false
}

/// `a` above `b`; `None` if only one of them has a bias.
fn stacked(a: &Linear, b: &Linear) -> Option<Linear> {
    let bias = match (&a.bias, &b.bias) {
        (None, None) => None,
        (Some(a), Some(b)) => Some(Weight::Concat(vec![a.clone(), b.clone()])),
        _ => return None,
    };
    let weight = Weight::Concat(vec![a.weight.clone(), b.weight.clone()]);
    Some(Linear { weight, bias, lora: None })
}

/// Moves the routers that read the layer's input into [`Layer::router`].
fn share_router(layer: &mut Layer) -> Result<bool, Unsupported> {
    let first = layer.modules().next().map(|id| id.kind);
    let mut routers = Vec::new();
    for kind in [ModuleKind::Attention, ModuleKind::Mlp] {
        let reads_layer_input =
            |router: &&Router| router.tap == Tap::LayerInput || first == Some(kind);
        if let Some(Routing::Routed { source, .. }) = layer.routing_mut(kind)
            && let Source::Own(router) = source
            && reads_layer_input(&&*router)
        {
            let slot = routers.len();
            if let Source::Own(router) = std::mem::replace(source, Source::Shared { slot }) {
                routers.push(router);
            }
        }
    }
    let shared = match <[Router; 2]>::try_from(routers) {
        Ok([attention, mlp]) => Some(both(layer.index, &attention, &mlp)?),
        Err(one_or_none) => one_or_none.into_iter().next().map(alone),
    };
    let found = shared.is_some();
    layer.router = shared;
    Ok(found)
}

/// One decision: the keep score, then the skip score, as the router has them.
fn alone(Router { hidden, output, .. }: Router) -> SharedRouter {
    SharedRouter { hidden, output, decisions: 1 }
}

/// Two decisions: both keep scores, then both skip scores.
fn both(layer: usize, a: &Router, m: &Router) -> Result<SharedRouter, Unsupported> {
    let one_bias = |linear| Unsupported::OneRouterBias { layer, linear };
    let (hidden, weight) = match (&a.hidden, &m.hidden) {
        (None, None) => {
            let (a, m) = (&a.output.weight, &m.output.weight);
            (None, interleaved(a, m))
        }
        (Some(a_hidden), Some(m_hidden)) => {
            let hidden = stacked(a_hidden, m_hidden).ok_or_else(|| one_bias("hidden"))?;
            let (a, m) = (&a.output.weight, &m.output.weight);
            let diagonal = |i| Weight::BlockDiagonal(vec![row(a, i), row(m, i)]);
            (Some(hidden), Weight::Concat(vec![diagonal(0), diagonal(1)]))
        }
        _ => return Err(Unsupported::MixedRouters { layer }),
    };
    let bias = match (&a.output.bias, &m.output.bias) {
        (None, None) => None,
        (Some(a), Some(m)) => Some(interleaved(a, m)),
        _ => return Err(one_bias("output")),
    };
    Ok(SharedRouter { hidden, output: Linear { weight, bias, lora: None }, decisions: 2 })
}

/// Rows `a0, m0, a1, m1`.
fn interleaved(a: &Weight, m: &Weight) -> Weight {
    Weight::Concat(vec![row(a, 0), row(m, 0), row(a, 1), row(m, 1)])
}

fn row(of: &Weight, i: usize) -> Weight {
    Weight::Slice { of: Box::new(of.clone()), rows: i..i + 1 }
}

#[cfg(test)]
mod tests;
