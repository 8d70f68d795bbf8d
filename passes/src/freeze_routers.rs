//! Make every router decide without noise: argmax of its scores, a tie keeps.
//!
//! Training samples `argmax(scores + gumbel)` with a temperature in the gradient. The noise and the
//! temperature mean nothing at inference: `keep = score[0] >= score[1]`.
//!
//! ```text
//! - layers.0.attention: routed by own router on layer-input, sampled
//! + layers.0.attention: routed by own router on layer-input, argmax
//! - layers.0.mlp: routed by own router on layer-input, sampled
//! + layers.0.mlp: routed by own router on layer-input, argmax
//! ```

use crate::ir::{Model, ModuleKind, Phase, Policy, Routing};
use crate::pass::{Changed, Pass, Unsupported};
use crate::plan::Plan;

/// [`Phase::Merged`] to [`Phase::Frozen`]. Total.
pub struct FreezeRouters;

impl Pass for FreezeRouters {
    fn name(&self) -> &'static str {
        "freeze-routers"
    }

    fn summary(&self) -> &'static str {
        "Make every router decide by argmax, without noise"
    }

    fn phases(&self) -> (Phase, Phase) {
        (Phase::Merged, Phase::Frozen)
    }

    fn apply(&self, model: &mut Model, _: &Plan) -> Result<Changed, Unsupported> {
        let mut changed = Changed::No;
        for layer in &mut model.layers {
            for kind in [ModuleKind::Attention, ModuleKind::Mlp] {
                let router = layer.routing_mut(kind).and_then(Routing::own_router_mut);
                if let Some(router) = router.filter(|router| router.is_sampled()) {
                    router.policy = Policy::Argmax;
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
    use crate::testing::{at, check, check_header, dense, mlp, model, plan};
    use expect_test::expect;

    #[test]
    fn freezes_both_routers_of_a_layer() {
        let model = at(Phase::Merged, model(1));
        check_header(&FreezeRouters, model, &plan(), include_str!("freeze_routers.rs"));
    }

    #[test]
    fn freezes_what_is_sampled_and_keeps_the_tap() {
        let mut model = at(Phase::Merged, model(1));
        let router = mlp(&mut model, 0).routing.own_router_mut().unwrap();
        router.tap = crate::ir::Tap::ModuleInput;
        crate::testing::attention(&mut model, 0).routing.own_router_mut().unwrap().policy =
            Policy::Argmax;
        check(
            &FreezeRouters,
            model,
            &plan(),
            expect![[r"
                - layers.0.mlp: routed by own router on module-input, sampled
                + layers.0.mlp: routed by own router on module-input, argmax
            "]],
        );
    }

    #[test]
    fn keeps_a_model_without_routers() {
        check(&FreezeRouters, at(Phase::Merged, dense(2)), &plan(), expect![[r#""#]]);
    }
}
