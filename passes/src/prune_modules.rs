//! Remove the modules the plan removes, and the routers of those it always runs.
//!
//! With `removed = [layers.0.mlp]` and `always = [layers.0.attention]`:
//!
//! ```text
//! - layers.0.attention: routed by own router on layer-input, argmax
//! -   router.output = linear %0.router_attention[2x8] bias %0.router_attention.bias[2]
//! + layers.0.attention: always
//! - layers.0.mlp: routed by own router on layer-input, argmax
//! -   router.output = linear %0.router_mlp[2x8] bias %0.router_mlp.bias[2]
//! -   norm = %0.mlp_norm[8]
//! -   gate = linear %0.gate[12x8]
//! -   up = linear %0.up[12x8]
//! -   down = linear %0.down[8x12]
//! + layers.0.mlp: removed
//! ```
//!
//! A removed module is `y = x`: it takes its router, and an attention module its cache, along. A
//! layer with no module left is dropped; the other layers keep their indices, which name their
//! caches. Unlike the other passes this one changes what the model computes, so it does nothing
//! that the plan does not name.

use crate::ir::{Model, ModuleId, ModuleKind, Phase, Routing};
use crate::pass::{Changed, Pass, Unsupported};
use crate::plan::Plan;

/// [`Phase::Frozen`] to [`Phase::Frozen`]. Refuses a plan that does not fit the model.
pub struct PruneModules;

impl Pass for PruneModules {
    fn name(&self) -> &'static str {
        "prune-modules"
    }

    fn summary(&self) -> &'static str {
        "Remove the plan's removed modules, and the routers of those that always run"
    }

    fn phases(&self) -> (Phase, Phase) {
        (Phase::Frozen, Phase::Frozen)
    }

    fn apply(&self, model: &mut Model, plan: &Plan) -> Result<Changed, Unsupported> {
        prune(model, plan)
    }
}

/// The rewrite, for models of any phase: a reference has the plan's removals and nothing else.
///
/// # Errors
///
/// [`Unsupported`] if the plan does not fit the model.
pub fn prune(model: &mut Model, plan: &Plan) -> Result<Changed, Unsupported> {
    fits(model, plan)?;
    let mut changed = false;
    for layer in &mut model.layers {
        for kind in [ModuleKind::Attention, ModuleKind::Mlp] {
            let id = ModuleId { layer: layer.index, kind };
            if plan.removed.contains(&id) {
                changed |= match kind {
                    ModuleKind::Attention => layer.attention.take().is_some(),
                    ModuleKind::Mlp => layer.mlp.take().is_some(),
                };
            } else if plan.always.contains(&id)
                && let Some(routing) = layer.routing_mut(kind)
            {
                changed |= routing.is_routed();
                *routing = Routing::Always;
            }
        }
    }
    let layers = model.layers.len();
    model.layers.retain(|layer| layer.attention.is_some() || layer.mlp.is_some());
    Ok(Changed::from(changed || layers != model.layers.len()))
}

/// Refuses a plan that names what is not there, contradicts itself, or leaves no cache.
fn fits(model: &Model, plan: &Plan) -> Result<(), Unsupported> {
    let layers = model.config.num_hidden_layers;
    for &module in plan.removed.iter().chain(&plan.always) {
        if module.layer >= layers {
            return Err(Unsupported::NoSuchModule { module, layers });
        }
    }
    for &module in &plan.always {
        if plan.removed.contains(&module) {
            return Err(Unsupported::RemovedAndAlways { module });
        }
        if model.routing(module).is_none() {
            return Err(Unsupported::AlwaysButAbsent { module });
        }
    }
    let stays = |id: ModuleId| id.kind == ModuleKind::Attention && !plan.removed.contains(&id);
    if !model.modules().any(stays) {
        return Err(Unsupported::NoAttentionLeft);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{at, attention_id, check, check_header, mlp_id, model, plan, refused};
    use expect_test::expect;

    fn frozen(layers: usize) -> Model {
        at(Phase::Frozen, model(layers))
    }

    fn pruning(removed: &[ModuleId], always: &[ModuleId]) -> Plan {
        Plan { removed: removed.to_vec(), always: always.to_vec(), ..plan() }
    }

    #[test]
    fn removes_modules_and_routers() {
        let plan = pruning(&[mlp_id(0)], &[attention_id(0)]);
        check_header(&PruneModules, frozen(1), &plan, include_str!("prune_modules.rs"));
    }

    #[test]
    fn drops_a_layer_wholly_gone_and_keeps_the_indices_after_it() {
        let plan = pruning(&[attention_id(1), mlp_id(1)], &[]);
        let mut model = frozen(3);
        crate::pass::run(&[&PruneModules], &mut model, &plan, |_, _| {}).unwrap();
        assert_eq!(model.layers.iter().map(|layer| layer.index).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(model.config.num_hidden_layers, 3);
        check(
            &PruneModules,
            frozen(2),
            &plan,
            expect![[r#"
            - layers.1.attention: routed by own router on layer-input, argmax
            -   router.output = linear %1.router_attention[2x8] bias %1.router_attention.bias[2]
            -   norm = %1.attention_norm[8]
            -   q = linear %1.q[8x8]
            -   k = linear %1.k[4x8]
            -   v = linear %1.v[4x8]
            -   o = linear %1.o[8x8]
            - layers.1.mlp: routed by own router on layer-input, argmax
            -   router.output = linear %1.router_mlp[2x8] bias %1.router_mlp.bias[2]
            -   norm = %1.mlp_norm[8]
            -   gate = linear %1.gate[12x8]
            -   up = linear %1.up[12x8]
            -   down = linear %1.down[8x12]
        "#]],
        );
    }

    #[test]
    fn drops_a_layer_that_came_empty() {
        let mut model = frozen(2);
        model.layers[1].attention = None;
        model.layers[1].mlp = None;
        check(
            &PruneModules,
            model,
            &plan(),
            expect![[r"
                - layers.1.attention: removed
                - layers.1.mlp: removed
            "]],
        );
    }

    #[test]
    fn keeps_everything_under_an_empty_plan_or_one_already_carried_out() {
        check(&PruneModules, frozen(2), &plan(), expect![[r#""#]]);
        let plan = pruning(&[mlp_id(1)], &[attention_id(0)]);
        let mut model = frozen(2);
        crate::pass::run(&[&PruneModules], &mut model, &plan, |_, _| {}).unwrap();
        check(&PruneModules, model, &plan, expect![[r#""#]]);
    }

    #[test]
    fn refuses_plans_that_do_not_fit() {
        let refusal = |removed: &[ModuleId], always: &[ModuleId]| {
            refused(&PruneModules, frozen(2), &pruning(removed, always))
        };
        for (removed, always) in [(vec![mlp_id(2)], vec![]), (vec![], vec![mlp_id(2)])] {
            assert_eq!(
                refusal(&removed, &always),
                Unsupported::NoSuchModule { module: mlp_id(2), layers: 2 }
            );
        }
        assert_eq!(
            refusal(&[mlp_id(1)], &[mlp_id(1)]),
            Unsupported::RemovedAndAlways { module: mlp_id(1) }
        );
        assert_eq!(refusal(&[attention_id(0), attention_id(1)], &[]), Unsupported::NoAttentionLeft);
        let mut model = frozen(2);
        model.layers[1].mlp = None;
        assert_eq!(
            refused(&PruneModules, model, &pruning(&[], &[mlp_id(1)])),
            Unsupported::AlwaysButAbsent { module: mlp_id(1) }
        );
    }
}
