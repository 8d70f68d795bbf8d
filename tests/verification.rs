//! `verify` and `golden` on real checkpoints: the reference as imported against its own lowered forms.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use skipgpt_export::checkpoint::{self, Checkpoint, Request};
use skipgpt_export::golden;
use skipgpt_export::model::Reference;
use skipgpt_export::random;
use skipgpt_export::tolerance::Tolerances;
use skipgpt_export::verify::{self, Options, Report};
use skipgpt_passes::ir::{DType, Dispatch, Model, ModuleId, ModuleKind};
use skipgpt_passes::pass;
use skipgpt_passes::plan::Plan;
use skipgpt_passes::registry::PASSES;
use skipgpt_passes::validate::validate;

fn fixture(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle").join(case)
}

/// A fixture with its routers and its adapter.
fn read(case: &str) -> Checkpoint {
    let directory = fixture(case);
    let adapter = directory.join("adapter");
    checkpoint::read(&Request {
        model: Some(&directory),
        router: Some(&directory.join("router.safetensors")),
        adapter: adapter.exists().then_some(adapter.as_path()),
        ..Request::default()
    })
    .unwrap()
}

/// The model after all passes.
fn lowered(imported: &Model, dispatch: Dispatch, always: Vec<ModuleId>) -> Model {
    let plan = Plan {
        removed: Vec::new(),
        always,
        fuse_key_value: true,
        fuse_gate_up: true,
        quantization: None,
        attention_dispatch: dispatch,
        mlp_dispatch: dispatch,
    };
    let mut model = imported.clone();
    pass::run(PASSES, &mut model, &plan, |_, _| {}).unwrap();
    model
}

fn load(model: &Model, checkpoint: &Checkpoint) -> Reference {
    Reference::load(validate(model).unwrap(), &checkpoint.sources).unwrap()
}

fn run(checkpoint: &Checkpoint, artifact: &Model) -> Report {
    // Hundreds of steps of a tiny model cost seconds: half as many show as much.
    let options = Options { greedy_tokens: 24, ..Options::new("candle", "none", DType::F32) };
    let mut reference = load(&checkpoint.model, checkpoint);
    let mut artifact = load(artifact, checkpoint);
    verify::run(&mut reference, &mut artifact, &[], &options, &mut |_| {}).unwrap()
}

#[test]
fn every_dispatch_is_verified_against_the_imported_model() {
    for case in ["llama-gqa", "llama-mha-llama3rope", "llama-bf16-sharded", "qwen2-bias"] {
        let checkpoint = read(case);
        for dispatch in [Dispatch::Masked, Dispatch::Gathered, Dispatch::Conditional] {
            let report = run(&checkpoint, &lowered(&checkpoint.model, dispatch, Vec::new()));
            assert!(report.passed, "{case}, {dispatch}:\n{report}");
            assert_eq!(report.decision_agreement, Some(1.0), "{case}, {dispatch}");
            assert_eq!(report.greedy_agreement, Some(1.0), "{case}, {dispatch}");
            assert!(report.decisions().equal > 1000 && report.max_abs_logit_error > 0.0);
        }
    }
}

#[test]
fn a_router_that_the_artifact_lost_is_found() {
    let checkpoint = read("llama-gqa");
    let lost = ModuleId { layer: 2, kind: ModuleKind::Mlp };
    let report = run(&checkpoint, &lowered(&checkpoint.model, Dispatch::Gathered, vec![lost]));
    assert!(!report.passed, "{report}");
    let divergence = report.first_divergence.unwrap();
    assert_eq!(divergence.place, "decision margin of layers.2.mlp", "{divergence}");
}

#[test]
fn an_adapter_that_the_artifact_lost_is_found_in_its_first_layer() {
    let checkpoint = read("llama-gqa");
    let directory = fixture("llama-gqa");
    let without = checkpoint::read(&Request {
        model: Some(&directory),
        router: Some(&directory.join("router.safetensors")),
        ..Request::default()
    })
    .unwrap();
    let report = run(&checkpoint, &lowered(&without.model, Dispatch::Conditional, Vec::new()));
    assert!(!report.passed, "{report}");
    assert_eq!(report.first_divergence.unwrap().layer, Some(0));
}

#[test]
fn a_golden_file_of_one_dispatch_holds_for_the_others() {
    let checkpoint = read("qwen2-bias");
    let model = |dispatch| load(&lowered(&checkpoint.model, dispatch, Vec::new()), &checkpoint);
    let record = golden::RecordOptions::new(
        golden::Artifact::default(),
        golden::Environment::default(),
        DType::F32,
    );
    let prompts: Vec<_> =
        (0..3).map(|seed| (format!("prompt {seed}"), random::draw(64, seed, 12))).collect();
    let golden =
        golden::record(&mut model(Dispatch::Masked), &prompts, &record, &mut |_| {}).unwrap();
    let mut text = Vec::new();
    golden.write(&mut text).unwrap();
    let golden = golden::Golden::parse(&text).unwrap();
    let options = golden::CheckOptions {
        mode: golden::Mode::Exact,
        tolerances: Tolerances::of(DType::F32),
        artifact: golden::Artifact::default(),
        environment: golden::Environment::default(),
        tokenized: None,
    };
    for dispatch in [Dispatch::Masked, Dispatch::Gathered, Dispatch::Conditional] {
        let report = golden::check(&mut model(dispatch), &golden, &options, &mut |_| {}).unwrap();
        assert!(report.passed, "{dispatch}:\n{report}");
        assert_eq!(report.token_agreement, Some(1.0));
    }
}
