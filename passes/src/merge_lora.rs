//! Fold each `LoRA` adapter into the linear it adapts.
//!
//! `y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ` equals `y = x·(W + s·B·A)ᵀ`, so one multiplication remains:
//!
//! ```text
//!   layers.0.attention: routed by own router on layer-input, sampled
//! -   q = linear %0.q[8x8] lora(2 * %0.q.b[8x2] @ %0.q.a[2x8])
//! +   q = linear %0.q[8x8] + 2 * %0.q.b[8x2] @ %0.q.a[2x8]
//! ```
//!
//! Any linear may be adapted: projections, routers, the head. A head tied to the embedding becomes
//! its own weight, and the embedding stays as it is. The sum stays symbolic; whoever evaluates it
//! computes it in `f32` and rounds once.

use crate::ir::{Model, Phase, Weight};
use crate::pass::{Changed, Pass, Unsupported};
use crate::plan::Plan;

/// [`Phase::Imported`] to [`Phase::Merged`]. Total: every valid adapter can be merged.
pub struct MergeLora;

impl Pass for MergeLora {
    fn name(&self) -> &'static str {
        "merge-lora"
    }

    fn summary(&self) -> &'static str {
        "Fold each LoRA adapter into the linear it adapts"
    }

    fn phases(&self) -> (Phase, Phase) {
        (Phase::Imported, Phase::Merged)
    }

    fn apply(&self, model: &mut Model, _: &Plan) -> Result<Changed, Unsupported> {
        let mut changed = Changed::No;
        for linear in model.linears_mut() {
            if let Some(lora) = linear.lora.take() {
                linear.weight = Weight::Merged { base: Box::new(linear.weight.clone()), lora };
                changed = Changed::Yes;
            }
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{adapt, attention, check, check_header, mlp, model, plan};
    use expect_test::expect;

    #[test]
    fn folds_the_adapter_and_nothing_else() {
        let mut model = model(1);
        adapt(&mut attention(&mut model, 0).q, "0.q", 2, 2.0);
        check_header(&MergeLora, model, &plan(), include_str!("merge_lora.rs"));
    }

    #[test]
    fn folds_adapters_of_any_linear_and_leaves_biases() {
        let mut model = model(2);
        let q = &mut attention(&mut model, 0).q;
        q.bias = Some(crate::testing::weight("0.q.bias", &[8]));
        adapt(q, "0.q", 1, 2.0);
        let router = mlp(&mut model, 0).routing.own_router_mut().unwrap();
        adapt(&mut router.output, "0.r", 1, 0.25);
        adapt(&mut mlp(&mut model, 1).down, "1.down", 4, 0.5);
        check(
            &MergeLora,
            model,
            &plan(),
            expect![[r"
                  layers.0.attention: routed by own router on layer-input, sampled
                -   q = linear %0.q[8x8] lora(2 * %0.q.b[8x1] @ %0.q.a[1x8]) bias %0.q.bias[8]
                +   q = linear %0.q[8x8] + 2 * %0.q.b[8x1] @ %0.q.a[1x8] bias %0.q.bias[8]
                  layers.0.mlp: routed by own router on layer-input, sampled
                -   router.output = linear %0.router_mlp[2x8] lora(0.25 * %0.r.b[2x1] @ %0.r.a[1x8]) bias %0.router_mlp.bias[2]
                +   router.output = linear %0.router_mlp[2x8] + 0.25 * %0.r.b[2x1] @ %0.r.a[1x8] bias %0.router_mlp.bias[2]
                  layers.1.mlp: routed by own router on layer-input, sampled
                -   down = linear %1.down[8x12] lora(0.5 * %1.down.b[8x4] @ %1.down.a[4x12])
                +   down = linear %1.down[8x12] + 0.5 * %1.down.b[8x4] @ %1.down.a[4x12]
            "]],
        );
    }

    #[test]
    fn unties_an_adapted_head_and_leaves_the_embedding() {
        let mut model = model(1);
        model.head.weight = model.embedding.clone();
        adapt(&mut model.head, "head", 2, 1.0);
        check(
            &MergeLora,
            model,
            &plan(),
            expect![[r"
                - head = linear %embed[32x8] lora(1 * %head.b[32x2] @ %head.a[2x8])
                + head = linear %embed[32x8] + 1 * %head.b[32x2] @ %head.a[2x8]
            "]],
        );
    }

    #[test]
    fn keeps_a_model_without_adapters() {
        check(&MergeLora, model(2), &plan(), expect![[r#""#]]);
    }

    #[test]
    fn reaches_every_linear_of_a_model() {
        let mut model = model(2);
        let mut count = 0;
        for linear in model.linears_mut() {
            adapt(linear, &format!("adapter.{count}"), 1, 1.0);
            count += 1;
        }
        crate::pass::run(&[&MergeLora], &mut model, &plan(), |_, _| {}).unwrap();
        let merged = |linear: &crate::ir::Linear| matches!(linear.weight, Weight::Merged { .. });
        assert_eq!(model.linears().into_iter().filter(|(_, linear)| merged(linear)).count(), count);
        // Two layers of q, k, v, o, gate, up, down and two routers; the head.
        assert_eq!((count, model.phase), (19, Phase::Merged));
    }
}
