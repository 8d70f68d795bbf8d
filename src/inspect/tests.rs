//! Costs written out by hand, and the report as a person reads it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use expect_test::expect;
use skipgpt_passes::ir::{DType, Linear, Lora, Stored};

use super::*;
use crate::artifact::manifest::Weights;
use crate::artifact::testing::{Bench, model};

#[test]
fn costs_are_those_of_the_shapes() {
    let work = Work::of(&model());
    let cost = |parameters, multiply_adds| Cost { parameters, multiply_adds };
    assert_eq!(work.embedding, cost(6 * 4, 0));
    // One layer has attention: q [8, 4], o [4, 8]; k and v [4, 4].
    assert_eq!(work.attention, cost(64, 64));
    assert_eq!(work.key_value, cost(32, 32));
    // Two layers have an MLP of three [3, 4] matrices, and a router of [4, 4].
    assert_eq!(work.mlp, cost(72, 72));
    assert_eq!(work.routers, cost(32, 32));
    assert_eq!(work.norms, cost(4 * 4, 0));
    // The head is the embedding: work, but no parameters.
    assert_eq!(work.head, cost(0, 24));
    assert_eq!(work.core_per_cached_token, 2 * 2 * 4);
    assert_eq!(work.skippable, 72);
    assert_eq!(work.total(), cost(24 + 64 + 32 + 72 + 32 + 16, 64 + 32 + 72 + 32 + 24));
}

#[test]
fn a_bias_is_a_parameter_and_an_adapter_is_work_too() {
    let stored =
        |shape: [usize; 2]| Stored { name: "x".into(), shape: shape.to_vec(), dtype: DType::F32 };
    let adapted = Linear {
        weight: Weight::Stored(stored([3, 5])),
        bias: Some(Weight::Stored(stored([3, 1]))),
        lora: Some(Lora { down: stored([2, 5]), up: stored([3, 2]), scale: 1.0 }),
    };
    assert_eq!(linear(&adapted), Cost { parameters: 15 + 3 + 16, multiply_adds: 15 + 16 });
}

#[test]
fn an_artifact_and_its_model_are_reported_alike() {
    let bench = Bench::new();
    bench.export("out", Weights::Copy).unwrap();
    let artifact = crate::artifact::open(&bench.output("out")).unwrap();
    let (of_artifact, of_model) = (
        Report::of_artifact(&artifact),
        Report::of_model(&bench.model, Some(&bench.plan), &["merge-lora", "freeze-routers"]),
    );
    assert_eq!(of_artifact.work, of_model.work);
    assert_eq!(of_artifact.routing, of_model.routing);
    assert_eq!(of_artifact.passes, of_model.passes);
    let Totals { routed_modules, dense_modules, .. } = of_artifact.totals;
    assert_eq!((routed_modules, dense_modules), (2, 1));
    assert_eq!(of_model.totals.dense_modules, dense_modules);
}

#[test]
fn the_report_of_a_model() {
    let bench = Bench::new();
    let report = Report::of_model(&bench.model, Some(&bench.plan), &["merge-lora"]);
    expect![[r"
        checkpoint of a llama model: 2 layers, hidden size 4, 2/1 heads of 4, 6 tokens
        phase: Lowered
        passes: merge-lora
        modules: 2 routed, 1 dense, 1 removed
        removed: layers.1.attention
        always: layers.0.attention
        mlp dispatch: conditional
        layers with a cache: 1

                              parameters     multiply-adds/token
        embedding                     24                       0
        key and value                 32                      32
        attention                     64                      64
        mlp                           72                      72
        routers                       32                      32
        norms                         16                       0
        head                           0                      24
        total                        240                     224
        attention core: 16 multiply-adds per cached token
        skippable: 72 multiply-adds/token (32.1 %)
    "]]
    .assert_eq(&report.to_string());
}
