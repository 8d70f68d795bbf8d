//! Give every routed module the dispatch the plan chose for its kind.
//!
//! With `attention_dispatch = gathered` and `mlp_dispatch = conditional`:
//!
//! ```text
//! - layers.0.attention: routed by decision 0
//! + layers.0.attention: routed by decision 0, gathered
//! - layers.0.mlp: routed by decision 1
//! + layers.0.mlp: routed by decision 1, conditional
//! ```
//!
//! The three compute the same function: `masked` multiplies by keep, `gathered` computes the kept
//! rows alone, `conditional` does that inside a branch taken only if a row is kept.

use crate::ir::{Model, ModuleKind, Phase, Routing};
use crate::pass::{Changed, Pass, Unsupported};
use crate::plan::Plan;

/// [`Phase::Fused`] to [`Phase::Lowered`]. Total.
pub struct LowerRouters;

impl Pass for LowerRouters {
    fn name(&self) -> &'static str {
        "lower-routers"
    }

    fn summary(&self) -> &'static str {
        "Give every routed module its dispatch: masked, gathered or conditional"
    }

    fn phases(&self) -> (Phase, Phase) {
        (Phase::Fused, Phase::Lowered)
    }

    fn apply(&self, model: &mut Model, plan: &Plan) -> Result<Changed, Unsupported> {
        let mut changed = Changed::No;
        for layer in &mut model.layers {
            for (kind, chosen) in [
                (ModuleKind::Attention, plan.attention_dispatch),
                (ModuleKind::Mlp, plan.mlp_dispatch),
            ] {
                if let Some(Routing::Routed { dispatch, .. }) = layer.routing_mut(kind) {
                    *dispatch = Some(chosen);
                    changed = Changed::Yes;
                }
            }
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{Dispatch, Tap};
    use crate::testing::{at, check, check_header, dense, fused, mlp, model, plan};
    use expect_test::expect;

    fn dispatching(attention_dispatch: Dispatch, mlp_dispatch: Dispatch) -> Plan {
        Plan { attention_dispatch, mlp_dispatch, ..plan() }
    }

    #[test]
    fn chooses_by_kind() {
        let plan = dispatching(Dispatch::Gathered, Dispatch::Conditional);
        check_header(&LowerRouters, fused(), &plan, include_str!("lower_routers.rs"));
    }

    #[test]
    fn reaches_own_routers_and_passes_over_modules_that_always_run() {
        let mut model = model(1);
        mlp(&mut model, 0).routing.own_router_mut().unwrap().tap = Tap::ModuleInput;
        crate::testing::attention(&mut model, 0).routing = Routing::Always;
        check(
            &LowerRouters,
            at(Phase::Fused, model),
            &dispatching(Dispatch::Gathered, Dispatch::Masked),
            expect![[r"
                - layers.0.mlp: routed by own router on module-input, argmax
                + layers.0.mlp: routed by own router on module-input, argmax, masked
            "]],
        );
    }

    #[test]
    fn keeps_a_dense_model() {
        check(&LowerRouters, at(Phase::Fused, dense(2)), &plan(), expect![[r#""#]]);
    }
}
