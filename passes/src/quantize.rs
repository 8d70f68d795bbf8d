//! Store the planned weights in few bits.
//!
//! With `scheme = int4 block=32 symmetric nearest accuracy=4` and `head = true`:
//!
//! ```text
//!   layers.0.attention: routed by decision 0
//! -   q = linear %0.q[8x8]
//! -   kv = linear concat(%0.k[4x8], %0.v[4x8])
//! -   o = linear %0.o[8x8]
//! +   q = linear quantized(int4 block=32 symmetric nearest accuracy=4, %0.q[8x8])
//! +   kv = linear quantized(int4 block=32 symmetric nearest accuracy=4, concat(%0.k[4x8], %0.v[4x8]))
//! +   o = linear quantized(int4 block=32 symmetric nearest accuracy=4, %0.o[8x8])
//!   layers.0.mlp: routed by decision 1
//! -   gate_up = linear concat(%0.gate[12x8], %0.up[12x8])
//! -   down = linear %0.down[8x12]
//! +   gate_up = linear quantized(int4 block=32 symmetric nearest accuracy=4, concat(%0.gate[12x8], %0.up[12x8]))
//! +   down = linear quantized(int4 block=32 symmetric nearest accuracy=4, %0.down[8x12])
//! - head = linear %head[32x8]
//! + head = linear quantized(int4 block=32 symmetric nearest accuracy=4, %head[32x8])
//! ```
//!
//! Projections always; the head and the embedding where the plan says so. A fused projection is
//! quantised as one matrix, which gives each row the codes it would have alone. Routers, norms and
//! biases keep their dtype: a rounded router flips decisions that are nearly ties.
//!
//! Like `prune-modules` this changes what the model computes. Where the embedding is the head's
//! weight and both are quantised, they stay one.

use crate::ir::{GateUp, KeyValue, Layer, Linear, Model, Phase, Weight};
use crate::pass::{Changed, Pass, Unsupported};
use crate::plan::{Plan, Quantization};
use crate::quantization::BLOCKS;

/// [`Phase::Fused`] to [`Phase::Fused`]. Refuses a block length that no operator takes.
pub struct Quantize;

impl Pass for Quantize {
    fn name(&self) -> &'static str {
        "quantize"
    }

    fn summary(&self) -> &'static str {
        "Store projections, and where planned head and embedding, in few bits"
    }

    fn phases(&self) -> (Phase, Phase) {
        (Phase::Fused, Phase::Fused)
    }

    fn apply(&self, model: &mut Model, plan: &Plan) -> Result<Changed, Unsupported> {
        let Some(quantization) = plan.quantization else { return Ok(Changed::No) };
        let Quantization { scheme, embedding, head } = quantization;
        if !BLOCKS.contains(&scheme.block) {
            return Err(Unsupported::Block { block: scheme.block });
        }
        let quantize = |weight: &mut Weight| {
            let of = Box::new(weight.clone());
            *weight = Weight::Quantized { of, scheme };
        };
        let mut changed = embedding || head;
        for projection in projections(model) {
            quantize(&mut projection.weight);
            changed = true;
        }
        if embedding {
            quantize(&mut model.embedding);
        }
        if head {
            quantize(&mut model.head.weight);
        }
        Ok(Changed::from(changed))
    }
}

/// Every projection: what modules multiply by, routers apart.
fn projections(model: &mut Model) -> impl Iterator<Item = &mut Linear> {
    model.layers.iter_mut().flat_map(|Layer { attention, mlp, .. }| {
        let mut all = Vec::new();
        if let Some(attention) = attention {
            all.push(&mut attention.q);
            match &mut attention.kv {
                KeyValue::Separate { k, v } => all.extend([k, v]),
                KeyValue::Fused(kv) => all.push(kv),
            }
            all.push(&mut attention.o);
        }
        if let Some(mlp) = mlp {
            match &mut mlp.gate_up {
                GateUp::Separate { gate, up } => all.extend([gate, up]),
                GateUp::Fused(gate_up) => all.push(gate_up),
            }
            all.push(&mut mlp.down);
        }
        all
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantization::{AccuracyLevel, Bits, Method, Scheme};
    use crate::testing::{adapt, at, attention, check, check_header, fused, model, plan};
    use expect_test::expect;

    const SCHEME: Scheme = Scheme {
        bits: Bits::Four,
        block: 32,
        symmetric: true,
        method: Method::Nearest,
        accuracy: AccuracyLevel::Int8,
    };

    fn planned(scheme: Scheme, embedding: bool, head: bool) -> Plan {
        Plan { quantization: Some(Quantization { scheme, embedding, head }), ..plan() }
    }

    #[test]
    fn takes_projections_and_the_head() {
        let plan = planned(SCHEME, false, true);
        check_header(&Quantize, fused(), &plan, include_str!("quantize.rs"));
    }

    #[test]
    fn takes_merged_and_separate_projections_as_they_stand() {
        let mut model = model(1);
        adapt(&mut attention(&mut model, 0).q, "0.q", 2, 2.0);
        let apart = Plan { fuse_key_value: false, fuse_gate_up: false, ..plan() };
        crate::pass::run(&crate::PASSES[..4], &mut model, &apart, |_, _| {}).unwrap();
        let eight = Scheme { bits: Bits::Eight, symmetric: false, ..SCHEME };
        check(
            &Quantize,
            model,
            &planned(eight, true, false),
            expect![[r#"
                - embedding = %embed[32x8]
                + embedding = quantized(int8 block=32 asymmetric nearest accuracy=4, %embed[32x8])
                  layers.0.attention: routed by decision 0
                -   q = linear %0.q[8x8] + 2 * %0.q.b[8x2] @ %0.q.a[2x8]
                -   k = linear %0.k[4x8]
                -   v = linear %0.v[4x8]
                -   o = linear %0.o[8x8]
                +   q = linear quantized(int8 block=32 asymmetric nearest accuracy=4, %0.q[8x8] + 2 * %0.q.b[8x2] @ %0.q.a[2x8])
                +   k = linear quantized(int8 block=32 asymmetric nearest accuracy=4, %0.k[4x8])
                +   v = linear quantized(int8 block=32 asymmetric nearest accuracy=4, %0.v[4x8])
                +   o = linear quantized(int8 block=32 asymmetric nearest accuracy=4, %0.o[8x8])
                  layers.0.mlp: routed by decision 1
                -   gate = linear %0.gate[12x8]
                -   up = linear %0.up[12x8]
                -   down = linear %0.down[8x12]
                +   gate = linear quantized(int8 block=32 asymmetric nearest accuracy=4, %0.gate[12x8])
                +   up = linear quantized(int8 block=32 asymmetric nearest accuracy=4, %0.up[12x8])
                +   down = linear quantized(int8 block=32 asymmetric nearest accuracy=4, %0.down[8x12])
            "#]],
        );
    }

    #[test]
    fn a_tied_head_stays_tied_where_both_are_quantised() {
        let mut model = model(1);
        model.head.weight = model.embedding.clone();
        let model = at(Phase::Fused, model);
        for (embedding, head, tied) in
            [(true, true, true), (true, false, false), (false, true, false)]
        {
            let mut model = model.clone();
            Quantize.apply(&mut model, &planned(SCHEME, embedding, head)).unwrap();
            assert_eq!(model.head.weight == model.embedding, tied);
        }
    }

    #[test]
    fn keeps_everything_without_a_plan_and_what_was_removed_away() {
        check(&Quantize, fused(), &plan(), expect![[r#""#]]);
        let mut model = fused();
        model.layers[0].mlp = None;
        model.layers[0].router = None;
        attention(&mut model, 0).routing = crate::ir::Routing::Always;
        check(
            &Quantize,
            model,
            &planned(SCHEME, false, false),
            expect![[r#"
              layers.0.attention: always
            -   q = linear %0.q[8x8]
            -   kv = linear concat(%0.k[4x8], %0.v[4x8])
            -   o = linear %0.o[8x8]
            +   q = linear quantized(int4 block=32 symmetric nearest accuracy=4, %0.q[8x8])
            +   kv = linear quantized(int4 block=32 symmetric nearest accuracy=4, concat(%0.k[4x8], %0.v[4x8]))
            +   o = linear quantized(int4 block=32 symmetric nearest accuracy=4, %0.o[8x8])
        "#]],
        );
    }

    #[test]
    fn refuses_a_block_no_operator_takes() {
        for block in [0, 8, 24, 512] {
            let plan = planned(Scheme { block, ..SCHEME }, false, false);
            let refusal = crate::testing::refused(&Quantize, fused(), &plan);
            assert_eq!(refusal, Unsupported::Block { block });
        }
    }
}
