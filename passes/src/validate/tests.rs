//! One test per rule: a valid model, one defect, every violation it causes.

use super::*;
use crate::ir::{
    GateUp, KeyValue, Linear, Policy, Rope, Routing, SharedRouter, Source, Tap, Weight,
};
use crate::quantization::{AccuracyLevel, Bits, Method, Scheme};
use crate::testing::{
    adapt, at, attention, biased, dense, fused, linear, lora, lowered, mlp, model, weight,
};
use expect_test::{Expect, expect};

/// The violations of `model` after `spoil`, one a line.
#[track_caller]
#[expect(clippy::needless_pass_by_value, reason = "an expectation is made for one check")]
fn check(mut model: Model, spoil: impl FnOnce(&mut Model), expected: Expect) {
    validate(&model).unwrap();
    spoil(&mut model);
    expected.assert_eq(&format!("{}\n", validate(&model).unwrap_err()));
}

fn shared(model: &mut Model) -> &mut SharedRouter {
    model.layers[0].router.as_mut().unwrap()
}

fn own(routing: &mut Routing) -> &mut crate::ir::Router {
    routing.own_router_mut().unwrap()
}

#[test]
fn a_valid_model_is_proof_of_itself() {
    for phase in [Phase::Imported, Phase::Merged, Phase::Frozen, Phase::Fused, Phase::Lowered] {
        for model in [at(phase, model(2)), at(phase, dense(2))] {
            let proof = validate(&model).unwrap();
            assert_eq!((proof.phase(), proof.model()), (phase, &model));
        }
    }
}

#[test]
fn every_violation_is_reported() {
    let spoil = |model: &mut Model| {
        model.norm = weight("norm", &[7]);
        model.config.head_dim = 3;
        model.layers[1].index = 0;
    };
    check(
        model(2),
        spoil,
        expect![[r#"
        config: head_dim 3 is odd; rotary embedding turns pairs
        layers.0.attention.q: shape is [8x8], expected [6x8]
        layers.0.attention.k: shape is [4x8], expected [3x8]
        layers.0.attention.v: shape is [4x8], expected [3x8]
        layers.0.attention.o: shape is [8x8], expected [8x6]
        layers.0: follows layer 0; indices ascend strictly
        layers.0.attention.q: shape is [8x8], expected [6x8]
        layers.0.attention.k: shape is [4x8], expected [3x8]
        layers.0.attention.v: shape is [4x8], expected [3x8]
        layers.0.attention.o: shape is [8x8], expected [8x6]
        norm: shape is [7], expected [8]
    "#]],
    );
}

#[test]
fn config_sizes_are_positive() {
    let spoil = |model: &mut Model| {
        model.config.vocab_size = 0;
        model.config.num_key_value_heads = 0;
        model.config.max_position_embeddings = 0;
    };
    check(
        model(1),
        spoil,
        expect![[r#"
        config: vocab_size is 0
        config: num_key_value_heads is 0
        config: max_position_embeddings is 0
        embedding: shape is [32x8], expected [0x8]
        layers.0.attention.k: shape is [4x8], expected [0x8]
        layers.0.attention.v: shape is [4x8], expected [0x8]
        head: shape is [32x8], expected [0x8]
    "#]],
    );
}

#[test]
fn config_floats_are_positive_numbers() {
    let spoil = |model: &mut Model| {
        model.config.rms_norm_eps = 0.0;
        model.config.rope =
            Rope { theta: f64::INFINITY, scaling: RopeScaling::Linear { factor: f64::NAN } };
    };
    check(
        model(1),
        spoil,
        expect![[r#"
        config: rms_norm_eps is 0, not a positive number
        config: rope_theta is inf, not a positive number
        config: factor is NaN, not a positive number
    "#]],
    );
}

#[test]
fn llama3_scaling_has_a_ramp() {
    let scaling = |low, original| RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: low,
        high_freq_factor: 4.0,
        original_max_position_embeddings: original,
    };
    let spoil = |model: &mut Model| model.config.rope.scaling = scaling(4.0, 0);
    check(
        model(1),
        spoil,
        expect![[r#"
        config: low_freq_factor 4 is not under high_freq_factor 4
        config: original_max_position_embeddings is 0
    "#]],
    );
    let spoil = |model: &mut Model| {
        model.config.rope.scaling = RopeScaling::Llama3 {
            factor: f64::NAN,
            low_freq_factor: -2.0,
            high_freq_factor: 0.0,
            original_max_position_embeddings: 64,
        };
    };
    check(
        model(1),
        spoil,
        expect![[r#"
        config: factor is NaN, not a positive number
        config: low_freq_factor is -2, not a positive number
        config: high_freq_factor is 0, not a positive number
    "#]],
    );
    let mut fine = model(1);
    fine.config.rope.scaling = scaling(1.0, 64);
    validate(&fine).unwrap();
}

#[test]
fn key_value_heads_divide_the_query_heads() {
    let spoil = |model: &mut Model| {
        model.config.num_attention_heads = 3;
        model.config.num_key_value_heads = 2;
        model.layers[0].attention = None;
        model.layers[1].attention = None;
    };
    check(
        model(2),
        spoil,
        expect![[r#"
        config: 3 query heads are not a multiple of 2 key/value heads
        layers: no attention module is left, and a decoder needs one cache
    "#]],
    );
}

#[test]
fn layers_ascend_and_exist_in_the_checkpoint() {
    check(
        model(3),
        |model| model.layers.swap(0, 1),
        expect![[r#"
        layers.0: follows layer 1; indices ascend strictly
    "#]],
    );
    check(
        model(2),
        |model| model.layers[1].index = 2,
        expect![[r#"
        layers.2: the checkpoint has 2 layers, counted from 0
    "#]],
    );
    let mut gap = model(3);
    gap.layers.remove(1);
    validate(&gap).unwrap();
}

#[test]
fn an_attention_module_is_left() {
    check(
        model(1),
        |model| model.layers[0].attention = None,
        expect![[r#"
        layers: no attention module is left, and a decoder needs one cache
    "#]],
    );
    check(
        model(1),
        |model| model.layers.clear(),
        expect![[r#"
        layers: no attention module is left, and a decoder needs one cache
    "#]],
    );
}

#[test]
fn projections_have_their_shapes() {
    let spoil = |model: &mut Model| {
        model.embedding = weight("embed", &[32, 9]);
        model.head = linear("head", [31, 8]);
        let attention = attention(model, 0);
        attention.norm = weight("norm0", &[8, 1]);
        attention.q = linear("q", [4, 8]);
        attention.kv = KeyValue::Separate { k: linear("k", [8, 8]), v: linear("v", [4, 4]) };
        attention.o = linear("o", [8, 4]);
        attention.q_norm = Some(weight("q_norm", &[8]));
        attention.k_norm = Some(weight("k_norm", &[2]));
        let mlp = mlp(model, 0);
        mlp.norm = weight("norm1", &[12]);
        mlp.gate_up = GateUp::Separate { gate: linear("gate", [10, 8]), up: linear("up", [12, 8]) };
    };
    check(
        model(1),
        spoil,
        expect![[r#"
        embedding: shape is [32x9], expected [32x8]
        layers.0.attention.norm: shape is [8x1], expected [8]
        layers.0.attention.q: shape is [4x8], expected [8x8]
        layers.0.attention.k: shape is [8x8], expected [4x8]
        layers.0.attention.v: shape is [4x4], expected [4x8]
        layers.0.attention.q_norm: shape is [8], expected [4]
        layers.0.attention.k_norm: shape is [2], expected [4]
        layers.0.attention.o: shape is [8x4], expected [8x8]
        layers.0.mlp.norm: shape is [12], expected [8]
        layers.0.mlp.up: shape is [12x8], expected [10x8]
        layers.0.mlp.down: shape is [8x12], expected [8x10]
        head: shape is [31x8], expected [32x8]
    "#]],
    );
    check(
        model(1),
        |model| {
            let gate_up =
                GateUp::Separate { gate: linear("gate", [0, 8]), up: linear("up", [0, 8]) };
            mlp(model, 0).gate_up = gate_up;
        },
        expect![[r#"
            layers.0.mlp.gate: shape [0x8] is empty
            layers.0.mlp.up: shape [0x8] is empty
            layers.0.mlp.down: shape is [8x12], expected [8x0]
        "#]],
    );
}

#[test]
fn fused_projections_have_two_halves() {
    let spoil = |model: &mut Model| {
        attention(model, 0).kv = KeyValue::Fused(linear("kv", [4, 8]));
        mlp(model, 0).gate_up = GateUp::Fused(linear("gate_up", [25, 8]));
    };
    check(
        fused(),
        spoil,
        expect![[r#"
        layers.0.attention.kv: shape is [4x8], expected [8x8]
        layers.0.mlp.gate_up: 25 rows are not two equal halves
    "#]],
    );
}

#[test]
fn a_bias_has_the_rows_of_its_weight() {
    let spoil = |model: &mut Model| {
        attention(model, 0).q.bias = Some(weight("q.bias", &[4]));
        mlp(model, 0).down.bias = Some(weight("down.bias", &[8, 1]));
    };
    check(
        model(1),
        spoil,
        expect![[r#"
        layers.0.attention.q.bias: shape is [4], expected [8]
        layers.0.mlp.down.bias: shape is [8x1], expected [8]
    "#]],
    );
}

#[test]
fn an_adapter_fits_its_linear() {
    let spoil = |model: &mut Model| {
        attention(model, 0).q.lora = Some(lora("q", [4, 12], 2, f64::NAN));
        mlp(model, 0).down.lora = Some(lora("down", [8, 12], 0, 1.0));
        let mut uneven = lora("head", [32, 8], 2, 1.0);
        uneven.up.shape = vec![32, 3];
        model.head.lora = Some(uneven);
    };
    check(
        model(1),
        spoil,
        expect![[r#"
        layers.0.attention.q: adapter scale is NaN, not a finite number
        layers.0.attention.q.lora.down: shape is [2x12], expected [?x8]
        layers.0.attention.q.lora.up: shape is [4x2], expected [8x2]
        layers.0.mlp.down.lora.down: shape [0x12] is empty
        layers.0.mlp.down.lora.up: shape [8x0] is empty
        head.lora.up: shape is [32x3], expected [32x2]
    "#]],
    );
    let spoil = |model: &mut Model| {
        let head = model.head.weight.clone();
        let lora = lora("head", [32, 9], 2, f64::INFINITY);
        model.head.weight = Weight::Merged { base: Box::new(head), lora };
    };
    check(
        at(Phase::Merged, model(1)),
        spoil,
        expect![[r#"
        head: adapter scale is inf, not a finite number
        head.lora.down: shape is [2x9], expected [?x8]
    "#]],
    );
}

#[test]
fn own_routers_have_two_rows_and_fitting_widths() {
    let spoil = |model: &mut Model| {
        own(&mut attention(model, 0).routing).output = biased("r", [3, 8]);
        let two_layer = own(&mut mlp(model, 0).routing);
        two_layer.hidden = Some(linear("hidden", [16, 7]));
        two_layer.output = linear("output", [2, 8]);
    };
    check(
        model(1),
        spoil,
        expect![[r#"
        layers.0.attention.router.output: shape is [3x8], expected [2x8]
        layers.0.mlp.router.hidden: shape is [16x7], expected [?x8]
        layers.0.mlp.router.output: shape is [2x8], expected [2x16]
    "#]],
    );
}

#[test]
fn shared_routers_have_two_rows_per_decision() {
    let spoil = |model: &mut Model| shared(model).output = linear("r", [2, 8]);
    check(
        fused(),
        spoil,
        expect![[r#"
        layers.0.router.output: shape is [2x8], expected [4x8]
    "#]],
    );
    let spoil = |model: &mut Model| {
        shared(model).hidden = Some(linear("hidden", [5, 8]));
        shared(model).output = linear("r", [4, 6]);
    };
    check(
        fused(),
        spoil,
        expect![[r#"
        layers.0.router.output: shape is [4x6], expected [4x5]
    "#]],
    );
}

#[test]
fn each_decision_is_used_once() {
    let slot = |routing: &mut Routing, to: usize| {
        let Routing::Routed { source: Source::Shared { slot }, .. } = routing else {
            panic!("not shared")
        };
        *slot = to;
    };
    check(
        fused(),
        |model| slot(&mut mlp(model, 0).routing, 0),
        expect![[r#"
        layers.0.mlp: uses decision 0, and so does the layer's attention
        layers.0.router: no module uses decision 1
    "#]],
    );
    check(
        fused(),
        |model| slot(&mut mlp(model, 0).routing, 2),
        expect![[r#"
        layers.0.mlp: uses decision 2; the layer's router makes 2
        layers.0.router: no module uses decision 1
    "#]],
    );
    check(
        fused(),
        |model| mlp(model, 0).routing = Routing::Always,
        expect![[r#"
        layers.0.router: no module uses decision 1
    "#]],
    );
    check(
        fused(),
        |model| model.layers[0].router = None,
        expect![[r#"
        layers.0.attention: uses decision 0; the layer's router makes 0
        layers.0.mlp: uses decision 1; the layer's router makes 0
    "#]],
    );
    let spoil = |model: &mut Model| shared(model).decisions = 3;
    check(
        fused(),
        spoil,
        expect![[r#"
        layers.0.router: 3 decisions; a layer has one or two
        layers.0.router.output: shape is [4x8], expected [6x8]
    "#]],
    );
    let spoil = |model: &mut Model| shared(model).decisions = 0;
    check(
        fused(),
        spoil,
        expect![[r#"
        layers.0.router: 0 decisions; a layer has one or two
        layers.0.router.output: shape is [4x8], expected [0x8]
        layers.0.attention: uses decision 0; the layer's router makes 0
        layers.0.mlp: uses decision 1; the layer's router makes 0
    "#]],
    );
}

fn down(weight: Weight) -> impl FnOnce(&mut Model) {
    move |model| mlp(model, 0).down = Linear { weight, bias: None, lora: None }
}

#[test]
fn weight_expressions_are_well_formed() {
    let slice = |rows| Weight::Slice { of: Box::new(weight("w", &[8, 12])), rows };
    check(
        fused(),
        down(Weight::Concat(vec![])),
        expect![[r#"
        layers.0.mlp.down: concat has no parts
        layers.0.mlp.down: shape is [], expected [8x12]
    "#]],
    );
    let parts = vec![weight("a", &[4, 12]), weight("b", &[4, 11]), weight("c", &[4])];
    check(
        fused(),
        down(Weight::Concat(parts)),
        expect![[r#"
        layers.0.mlp.down.concat.1: shape is [4x11], expected [?x12]
        layers.0.mlp.down.concat.2: shape is [4], expected [?x12]
        layers.0.mlp.down: shape is [12x12], expected [8x12]
    "#]],
    );
    check(
        fused(),
        down(Weight::BlockDiagonal(vec![])),
        expect![[r#"
        layers.0.mlp.down: blockdiag has no parts
        layers.0.mlp.down: shape [0x0] is empty
    "#]],
    );
    let parts = vec![weight("a", &[8, 11]), weight("b", &[1])];
    check(
        fused(),
        down(Weight::BlockDiagonal(parts)),
        expect![[r#"
        layers.0.mlp.down.blockdiag.1: shape is [1], expected [?x?]
        layers.0.mlp.down: shape is [9x12], expected [8x12]
    "#]],
    );
    check(
        fused(),
        down(slice(1..9)),
        expect![[r#"
        layers.0.mlp.down: rows 1..9 of a weight with 8 rows
    "#]],
    );
    check(
        fused(),
        down(slice(3..3)),
        expect![[r#"
        layers.0.mlp.down: rows 3..3 of a weight with 8 rows
        layers.0.mlp.down: shape [0x12] is empty
    "#]],
    );
    check(
        fused(),
        down(Weight::Transpose(Box::new(weight("w", &[12])))),
        expect![[r#"
        layers.0.mlp.down: shape is [12], expected [?x?]
        layers.0.mlp.down: shape is [12], expected [8x12]
    "#]],
    );
    let cast = Weight::Cast { of: Box::new(slice(8..9)), dtype: DType::F16 };
    check(
        fused(),
        down(cast),
        expect![[r#"
        layers.0.mlp.down: rows 8..9 of a weight with 8 rows
        layers.0.mlp.down: shape is [1x12], expected [8x12]
    "#]],
    );
    let merged =
        Weight::Merged { base: Box::new(weight("w", &[8])), lora: lora("w", [8, 12], 2, 1.0) };
    check(
        fused(),
        down(merged),
        expect![[r#"
        layers.0.mlp.down: shape is [8], expected [?x?]
        layers.0.mlp.down.lora.down: shape is [2x12], expected [?x1]
        layers.0.mlp.down: shape is [8], expected [8x12]
    "#]],
    );
    let mut fine = fused();
    down(Weight::Transpose(Box::new(weight("w", &[12, 8]))))(&mut fine);
    validate(&fine).unwrap();
}

#[test]
fn defects_are_found_inside_every_expression() {
    let bad = || {
        let of = Box::new(weight("w", &[8, 12]));
        Weight::Slice { of, rows: 1..9 }
    };
    let tall = Weight::Slice { of: Box::new(weight("t", &[12, 8])), rows: 1..13 };
    let wrappers = [
        Weight::Merged { base: Box::new(bad()), lora: lora("w", [8, 12], 2, 1.0) },
        Weight::Concat(vec![bad()]),
        Weight::BlockDiagonal(vec![bad()]),
        Weight::Slice { of: Box::new(bad()), rows: 0..8 },
        Weight::Transpose(Box::new(tall)),
        Weight::Cast { of: Box::new(bad()), dtype: DType::F16 },
    ];
    let reports: Vec<_> = wrappers
        .into_iter()
        .map(|wrapper| {
            let mut model = fused();
            down(wrapper)(&mut model);
            format!("{}\n", validate(&model).unwrap_err())
        })
        .collect();
    expect![[r#"
        layers.0.mlp.down: rows 1..9 of a weight with 8 rows
        layers.0.mlp.down.concat.0: rows 1..9 of a weight with 8 rows
        layers.0.mlp.down.blockdiag.0: rows 1..9 of a weight with 8 rows
        layers.0.mlp.down: rows 1..9 of a weight with 8 rows
        layers.0.mlp.down: rows 1..13 of a weight with 12 rows
        layers.0.mlp.down: rows 1..9 of a weight with 8 rows
    "#]]
    .assert_eq(&reports.concat());
}

#[test]
fn one_name_is_one_tensor() {
    check(
        model(1),
        |model| model.norm = weight("0.q", &[8]),
        expect![[r#"
        norm: %0.q is [8] f32 here and [8x8] f32 before
    "#]],
    );
    let spoil = |model: &mut Model| {
        let Weight::Stored(stored) = &mut model.head.weight else { panic!("not stored") };
        stored.name = "embed".to_owned();
        stored.dtype = DType::BF16;
    };
    check(
        model(1),
        spoil,
        expect![[r#"
        head: %embed is [32x8] bf16 here and [32x8] f32 before
    "#]],
    );
    let spoil = |model: &mut Model| model.head.lora = Some(lora("0.q", [32, 8], 2, 1.0));
    let mut adapted = model(1);
    adapt(&mut attention(&mut adapted, 0).q, "0.q", 2, 1.0);
    check(
        adapted,
        spoil,
        expect![[r#"
        head.lora.up: %0.q.b is [32x2] f32 here and [8x2] f32 before
    "#]],
    );
    let mut tied = model(1);
    tied.head.weight = tied.embedding.clone();
    validate(&tied).unwrap();
}

#[test]
fn phases_forbid_what_they_replaced() {
    let spoil = |model: &mut Model| adapt(&mut model.head, "head", 2, 1.0);
    check(
        at(Phase::Merged, model(1)),
        spoil,
        expect![[r#"
        head: an adapter outlived merge-lora
    "#]],
    );
    let spoil = |model: &mut Model| own(&mut mlp(model, 0).routing).policy = Policy::Sampled;
    check(
        at(Phase::Frozen, model(1)),
        spoil,
        expect![[r#"
        layers.0.mlp.router: a sampled router outlived freeze-routers
    "#]],
    );
    let mut after_attention = model(1);
    own(&mut mlp(&mut after_attention, 0).routing).tap = Tap::ModuleInput;
    let spoil = |model: &mut Model| own(&mut mlp(model, 0).routing).tap = Tap::LayerInput;
    check(
        at(Phase::Fused, after_attention),
        spoil,
        expect![[r#"
        layers.0.mlp.router: an own router on the layer input outlived fuse-projections
    "#]],
    );
    let spoil = |model: &mut Model| {
        let Routing::Routed { dispatch, .. } = &mut mlp(model, 0).routing else { panic!("dense") };
        *dispatch = None;
    };
    check(
        lowered(Dispatch::Masked),
        spoil,
        expect![[r#"
        layers.0.mlp: routed, but lower-routers chose no dispatch
    "#]],
    );
}

#[test]
fn phases_wait_for_what_they_introduce() {
    let spoil = |phase| move |model: &mut Model| model.phase = phase;
    check(
        lowered(Dispatch::Masked),
        spoil(Phase::Fused),
        expect![[r#"
        layers.0.attention: a dispatch before phase Lowered
        layers.0.mlp: a dispatch before phase Lowered
    "#]],
    );
    check(
        fused(),
        spoil(Phase::Frozen),
        expect![[r#"
        layers.0.router: a shared router before phase Fused
        layers.0.router.output: concat before phase Fused
        layers.0.router.output.bias: concat before phase Fused
        layers.0.attention: a shared decision before phase Fused
        layers.0.mlp: a shared decision before phase Fused
        layers.0.attention.kv: a fused projection before phase Fused
        layers.0.attention.kv: concat before phase Fused
        layers.0.mlp.gate_up: a fused projection before phase Fused
        layers.0.mlp.gate_up: concat before phase Fused
    "#]],
    );
    let mut adapted = dense(1);
    adapt(&mut adapted.head, "head", 2, 1.0);
    check(
        at(Phase::Merged, adapted),
        spoil(Phase::Imported),
        expect![[r#"
        head: a merged weight before phase Merged
    "#]],
    );
    let diagonal = Weight::BlockDiagonal(vec![weight("a", &[4, 6]), weight("b", &[4, 6])]);
    check(
        model(1),
        down(diagonal),
        expect![[r#"
        layers.0.mlp.down: blockdiag before phase Fused
    "#]],
    );
}

#[test]
fn only_whole_weights_are_quantised() {
    let scheme = |block| Scheme {
        bits: Bits::Four,
        block,
        symmetric: true,
        method: Method::Nearest,
        accuracy: AccuracyLevel::Unset,
    };
    let quantized =
        |of: Weight, block| Weight::Quantized { of: Box::new(of), scheme: scheme(block) };
    let spoil = |model: &mut Model| {
        model.norm = quantized(weight("norm", &[8]), 32);
        shared(model).output.weight = quantized(shared(model).output.weight.clone(), 32);
        let attention = attention(model, 0);
        attention.q.bias = Some(quantized(weight("q.bias", &[8]), 32));
        let half = |name| quantized(weight(name, &[4, 8]), 32);
        attention.kv = KeyValue::Fused(Linear {
            weight: Weight::Concat(vec![half("0.k"), half("0.v")]),
            bias: None,
            lora: None,
        });
        attention.o.weight = quantized(quantized(attention.o.weight.clone(), 32), 32);
        mlp(model, 0).down.weight = quantized(weight("0.down", &[8, 13]), 24);
    };
    check(
        fused(),
        spoil,
        expect![[r#"
        layers.0.router.output: is quantised; only whole weights of projections, head and embedding may be
        layers.0.attention.q.bias: is quantised; only whole weights of projections, head and embedding may be
        layers.0.attention.kv.concat.0: is quantised; only whole weights of projections, head and embedding may be
        layers.0.attention.kv.concat.1: is quantised; only whole weights of projections, head and embedding may be
        layers.0.attention.o: is quantised; only whole weights of projections, head and embedding may be
        layers.0.mlp.down: a block of 24 elements; expected 16, 32, 64, 128 or 256
        layers.0.mlp.down: shape is [8x13], expected [8x12]
        norm: is quantised; only whole weights of projections, head and embedding may be
    "#]],
    );
    let early = |model: &mut Model| {
        model.embedding = quantized(model.embedding.clone(), 32);
        model.head.weight = quantized(model.head.weight.clone(), 256);
    };
    let mut model = fused();
    early(&mut model);
    validate(&model).unwrap();
    check(
        at(Phase::Frozen, crate::testing::model(1)),
        early,
        expect![[r#"
        embedding: a quantised weight before phase Fused
        head: a quantised weight before phase Fused
    "#]],
    );
}
