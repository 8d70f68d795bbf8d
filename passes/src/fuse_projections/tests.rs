use super::*;
use crate::testing::{
    at, attention, biased, check, check_header, dense, evaluate, linear, mlp, model, plan, refused,
    weight,
};
use expect_test::expect;

fn frozen(layers: usize) -> Model {
    at(Phase::Frozen, model(layers))
}

fn fusing(fuse_key_value: bool, fuse_gate_up: bool) -> Plan {
    Plan { fuse_key_value, fuse_gate_up, ..plan() }
}

fn router(model: &mut Model, kind: ModuleKind) -> &mut Router {
    model.layers[0].routing_mut(kind).unwrap().own_router_mut().unwrap()
}

fn two_layer(model: &mut Model, kind: ModuleKind, width: usize) {
    let router = router(model, kind);
    router.hidden = Some(biased(&format!("0.{kind}_hidden"), [width, 8]));
    router.output = biased(&format!("0.{kind}_output"), [2, width]);
}

#[test]
fn fuses_what_reads_the_same_rows() {
    let header = include_str!("../fuse_projections.rs");
    check_header(&FuseProjections, frozen(1), &fusing(true, true), header);
}

#[test]
fn fuses_projections_only_as_planned() {
    check(&FuseProjections, at(Phase::Frozen, dense(2)), &fusing(false, false), expect![[r#""#]]);
    let mut model = at(Phase::Frozen, dense(1));
    attention(&mut model, 0).kv =
        KeyValue::Separate { k: biased("0.k", [4, 8]), v: biased("0.v", [4, 8]) };
    check(
        &FuseProjections,
        model,
        &fusing(true, false),
        expect![[r#"
          layers.0.attention: always
        -   k = linear %0.k[4x8] bias %0.k.bias[4]
        -   v = linear %0.v[4x8] bias %0.v.bias[4]
        +   kv = linear concat(%0.k[4x8], %0.v[4x8]) bias concat(%0.k.bias[4], %0.v.bias[4])
    "#]],
    );
}

#[test]
fn keeps_projections_apart_when_one_has_a_bias() {
    let mut model = at(Phase::Frozen, dense(1));
    attention(&mut model, 0).kv =
        KeyValue::Separate { k: biased("0.k", [4, 8]), v: linear("0.v", [4, 8]) };
    mlp(&mut model, 0).gate_up =
        GateUp::Separate { gate: linear("0.gate", [12, 8]), up: biased("0.up", [12, 8]) };
    check(&FuseProjections, model, &fusing(true, true), expect![[r#""#]]);
}

#[test]
fn two_layer_routers_stand_on_diagonals() {
    let mut model = frozen(1);
    two_layer(&mut model, ModuleKind::Attention, 3);
    two_layer(&mut model, ModuleKind::Mlp, 5);
    check(
        &FuseProjections,
        model,
        &fusing(false, false),
        expect![[r#"
        - layers.0.attention: routed by own router on layer-input, argmax
        -   router.hidden = relu linear %0.attention_hidden[3x8] bias %0.attention_hidden.bias[3]
        -   router.output = linear %0.attention_output[2x3] bias %0.attention_output.bias[2]
        + layers.0.router: 2 decisions on layer-input, argmax
        +   hidden = relu linear concat(%0.attention_hidden[3x8], %0.mlp_hidden[5x8]) bias concat(%0.attention_hidden.bias[3], %0.mlp_hidden.bias[5])
        +   output = linear concat(blockdiag(%0.attention_output[2x3][0..1], %0.mlp_output[2x5][0..1]), blockdiag(%0.attention_output[2x3][1..2], %0.mlp_output[2x5][1..2])) bias concat(%0.attention_output.bias[2][0..1], %0.mlp_output.bias[2][0..1], %0.attention_output.bias[2][1..2], %0.mlp_output.bias[2][1..2])
        + layers.0.attention: routed by decision 0
        - layers.0.mlp: routed by own router on layer-input, argmax
        -   router.hidden = relu linear %0.mlp_hidden[5x8] bias %0.mlp_hidden.bias[5]
        -   router.output = linear %0.mlp_output[2x5] bias %0.mlp_output.bias[2]
        + layers.0.mlp: routed by decision 1
    "#]],
    );
}

#[test]
fn one_router_keeps_its_matrix() {
    let mut model = frozen(1);
    attention(&mut model, 0).routing = Routing::Always;
    check(
        &FuseProjections,
        model,
        &fusing(false, false),
        expect![[r#"
        + layers.0.router: 1 decision on layer-input, argmax
        +   output = linear %0.router_mlp[2x8] bias %0.router_mlp.bias[2]
        - layers.0.mlp: routed by own router on layer-input, argmax
        -   router.output = linear %0.router_mlp[2x8] bias %0.router_mlp.bias[2]
        + layers.0.mlp: routed by decision 0
    "#]],
    );
}

#[test]
fn the_first_module_reads_the_layer_input_whatever_its_tap() {
    let mut model = frozen(2);
    router(&mut model, ModuleKind::Attention).tap = Tap::ModuleInput;
    router(&mut model, ModuleKind::Mlp).tap = Tap::ModuleInput;
    let second = &mut model.layers[1];
    second.attention = None;
    second.routing_mut(ModuleKind::Mlp).unwrap().own_router_mut().unwrap().tap = Tap::ModuleInput;
    check(
        &FuseProjections,
        model,
        &fusing(false, false),
        expect![[r#"
        - layers.0.attention: routed by own router on module-input, argmax
        -   router.output = linear %0.router_attention[2x8] bias %0.router_attention.bias[2]
        + layers.0.router: 1 decision on layer-input, argmax
        +   output = linear %0.router_attention[2x8] bias %0.router_attention.bias[2]
        + layers.0.attention: routed by decision 0
        + layers.1.router: 1 decision on layer-input, argmax
        +   output = linear %1.router_mlp[2x8] bias %1.router_mlp.bias[2]
        - layers.1.mlp: routed by own router on module-input, argmax
        -   router.output = linear %1.router_mlp[2x8] bias %1.router_mlp.bias[2]
        + layers.1.mlp: routed by decision 0
    "#]],
    );
}

#[test]
fn refuses_routers_of_two_forms() {
    let mut model = frozen(1);
    two_layer(&mut model, ModuleKind::Mlp, 5);
    assert_eq!(refused(&FuseProjections, model, &plan()), Unsupported::MixedRouters { layer: 0 });
    let mut model = frozen(1);
    router(&mut model, ModuleKind::Mlp).output.bias = None;
    assert_eq!(
        refused(&FuseProjections, model, &plan()),
        Unsupported::OneRouterBias { layer: 0, linear: "output" }
    );
    let mut model = frozen(1);
    two_layer(&mut model, ModuleKind::Attention, 4);
    two_layer(&mut model, ModuleKind::Mlp, 4);
    router(&mut model, ModuleKind::Attention).hidden.as_mut().unwrap().bias = None;
    assert_eq!(
        refused(&FuseProjections, model, &plan()),
        Unsupported::OneRouterBias { layer: 0, linear: "hidden" }
    );
}

#[test]
fn different_forms_are_fine_where_they_read_different_states() {
    let mut model = frozen(1);
    two_layer(&mut model, ModuleKind::Mlp, 5);
    router(&mut model, ModuleKind::Mlp).tap = Tap::ModuleInput;
    crate::pass::run(&[&FuseProjections], &mut model, &plan(), |_, _| {}).unwrap();
    assert_eq!(model.layers[0].router.as_ref().unwrap().decisions, 1);
}

/// The keep and skip scores of `x`, in the order the router gives them.
fn scores(hidden: Option<&Linear>, output: &Linear, x: &[f64]) -> Vec<f64> {
    let hidden = hidden.map(|hidden| {
        affine(hidden, x).into_iter().map(|value| value.max(0.0)).collect::<Vec<_>>()
    });
    affine(output, hidden.as_deref().unwrap_or(x))
}

fn affine(linear: &Linear, x: &[f64]) -> Vec<f64> {
    let dot = |row: &Vec<f64>| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
    let bias = linear.bias.as_ref().map(evaluate);
    let products = evaluate(&linear.weight);
    let add =
        |(i, row): (usize, &Vec<f64>)| dot(row) + bias.as_ref().map_or(0.0, |bias| bias[i][0]);
    products.iter().enumerate().map(add).collect()
}

#[test]
fn the_shared_router_gives_the_scores_of_both() {
    let x: Vec<f64> = (0..8).map(|i| f64::from(i) - 3.5).collect();
    for width in [None, Some((3, 5))] {
        let mut model = frozen(1);
        if let Some((attention, mlp)) = width {
            two_layer(&mut model, ModuleKind::Attention, attention);
            two_layer(&mut model, ModuleKind::Mlp, mlp);
        }
        let [a, m] = [ModuleKind::Attention, ModuleKind::Mlp].map(|kind| {
            let router = router(&mut model, kind);
            scores(router.hidden.as_ref(), &router.output, &x)
        });
        crate::pass::run(&[&FuseProjections], &mut model, &plan(), |_, _| {}).unwrap();
        let shared = model.layers[0].router.as_ref().unwrap();
        let got = scores(shared.hidden.as_ref(), &shared.output, &x);
        assert_ne!(a, m);
        assert_eq!(got, [a[0], m[0], a[1], m[1]]);
    }
}

#[test]
fn fused_projections_are_one_above_the_other() {
    let mut model = frozen(1);
    crate::pass::run(&[&FuseProjections], &mut model, &fusing(true, true), |_, _| {}).unwrap();
    let rows = |parts: [(&str, [usize; 2]); 2]| -> Vec<Vec<f64>> {
        parts.into_iter().flat_map(|(name, shape)| evaluate(&weight(name, &shape))).collect()
    };
    let KeyValue::Fused(kv) = &attention(&mut model, 0).kv else { panic!("not fused") };
    assert_eq!(evaluate(&kv.weight), rows([("0.k", [4, 8]), ("0.v", [4, 8])]));
    let GateUp::Fused(gate_up) = &mlp(&mut model, 0).gate_up else { panic!("not fused") };
    assert_eq!(evaluate(&gate_up.weight), rows([("0.gate", [12, 8]), ("0.up", [12, 8])]));
}
