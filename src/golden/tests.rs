//! A run is as recorded, and every fault shows.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on must stop")]
#![allow(clippy::needless_raw_string_hashes, reason = "blessing writes them")]

mod outside;

use expect_test::{Expect, expect};
use skipgpt_passes::ir::{ModuleId, ModuleKind};

use super::*;
use crate::random::draw;
use crate::tolerance::Tolerances;
use crate::verify::toy::{Failed, Fault, Toy, VOCAB};

const MLP_1: ModuleId = ModuleId { layer: 1, kind: ModuleKind::Mlp };

fn environment() -> Environment {
    Environment {
        onnxruntime: "1.31.1".to_owned(),
        provider: "CPUExecutionProvider".to_owned(),
        threads: 2,
    }
}

fn artifact() -> Artifact {
    let sha256 = BTreeMap::from([("model.onnx".to_owned(), "00ff".to_owned())]);
    Artifact { name: "toy".to_owned(), sha256 }
}

fn prompts() -> Vec<(String, Vec<i64>)> {
    vec![
        ("It is a truth <universally> & \"acknowledged\"".to_owned(), draw(VOCAB, 0, 9)),
        ("\u{1b}\n".to_owned(), draw(VOCAB, 1, 1)),
    ]
}

fn recorded(faults: &[Fault]) -> Golden {
    let options = RecordOptions {
        tokens: 6,
        top: 3,
        ..RecordOptions::new(artifact(), environment(), DType::F32)
    };
    let mut toy = Toy::with(faults.iter().copied());
    record(&mut toy, &prompts(), &options, &mut |_| {}).unwrap()
}

fn options(mode: Mode) -> CheckOptions {
    CheckOptions {
        mode,
        tolerances: Tolerances::of(DType::F32),
        artifact: artifact(),
        environment: environment(),
        tokenized: None,
    }
}

fn checked(golden: &Golden, faults: &[Fault], options: &CheckOptions) -> Report {
    check(&mut Toy::with(faults.iter().copied()), golden, options, &mut |_| {}).unwrap()
}

fn last_line(report: &Report) -> String {
    report.to_string().lines().last().unwrap().to_owned()
}

/// The text, whose one line or lines stand in the expectation.
#[track_caller]
fn says(text: &str, expect: &Expect) {
    // Ending in a newline, so that blessing writes every expectation in one form.
    expect.assert_eq(&format!("{text}\n"));
}

/// Recorded without a fault, checked with these: both modes fail, with these words.
#[track_caller]
fn fails(faults: &[Fault], verdict: &Expect) {
    let golden = recorded(&[]);
    let report = checked(&golden, faults, &options(Mode::Exact));
    assert!(!report.passed, "{report}");
    let report = checked(&golden, faults, &options(Mode::Tolerant));
    assert!(!report.passed, "{report}");
    says(&last_line(&report), verdict);
}

fn text(golden: &Golden) -> String {
    let mut bytes = Vec::new();
    golden.write(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn the_file_reads_back_as_it_was_written() {
    let golden = recorded(&[]);
    let written = text(&golden);
    assert_eq!(Golden::parse(written.as_bytes()).unwrap(), golden);
    assert_eq!(text(&recorded(&[])), written, "the same bytes every time");
    expect![[r#"
        {
          "version": 1,
          "tool": "0.1.0",
          "artifact": {
            "name": "toy",
            "sha256": {
              "model.onnx": "00ff"
            }
          },
          "environment": {
            "onnxruntime": "1.31.1",
            "provider": "CPUExecutionProvider",
            "threads": 2
          },
          "dtype": "f32",
          "prompts": [
            {
              "text": "It is a truth <universally> & \"acknowledged\"",
              "ids": [23,11,14,30,6,19,14,5,10],
              "greedy": [30,30,30,30,30,30],
              "top": [
                [[30,-1.606353],[25,-1.689443],[20,-1.801396]],
                [[30,-1.309449],[25,-1.603666],[20,-1.930302]],
                [[30,-1.287468],[25,-1.536649],[20,-1.819434]],
                [[30,-1.330228],[25,-1.556644],[20,-1.815026]],
                [[30,-1.309305],[25,-1.603382],[20,-1.929882]],
                [[30,-1.289478],[25,-1.52959],[20,-1.803914]]
              ],
              "routing": [
                {"module": "layers.0.attention", "keep": "00110111111111", "min_margin": 0.204239, "near": []},
                {"module": "layers.0.mlp", "keep": "00110111111111", "min_margin": 0.243467, "near": []},
                {"module": "layers.1.attention", "keep": "00100110011011", "min_margin": 0.080459, "near": []},
                {"module": "layers.1.mlp", "keep": "10100100011011", "min_margin": 0.094261, "near": []},
                {"module": "layers.2.attention", "keep": "10010001100100", "min_margin": 0.191474, "near": []},
                {"module": "layers.2.mlp", "keep": "00010001110110", "min_margin": 0.184821, "near": []}
              ]
            },
            {
              "text": "\u001b\n",
              "ids": [8],
              "greedy": [3,3,3,3,3,3],
              "top": [
                [[3,-1.667192],[8,-1.73649],[13,-1.822133]],
                [[3,-1.689171],[8,-1.804369],[13,-1.935784]],
                [[3,-1.689171],[8,-1.804369],[13,-1.935784]],
                [[3,-1.689171],[8,-1.804369],[13,-1.935784]],
                [[3,-1.689171],[8,-1.804369],[13,-1.935784]],
                [[3,-1.689171],[8,-1.804369],[13,-1.935784]]
              ],
              "routing": [
                {"module": "layers.0.attention", "keep": "000000", "min_margin": 0.488231, "near": []},
                {"module": "layers.0.mlp", "keep": "000000", "min_margin": 0.400567, "near": []},
                {"module": "layers.1.attention", "keep": "000000", "min_margin": 0.206317, "near": []},
                {"module": "layers.1.mlp", "keep": "111111", "min_margin": 0.015035, "near": []},
                {"module": "layers.2.attention", "keep": "000000", "min_margin": 0.458364, "near": []},
                {"module": "layers.2.mlp", "keep": "000000", "min_margin": 1.001877, "near": []}
              ]
            }
          ]
        }
    "#]].assert_eq(&written);
}

#[test]
fn the_same_artifact_is_as_recorded() {
    let golden = recorded(&[]);
    let lines = [Mode::Exact, Mode::Tolerant].map(|mode| {
        let mut report = checked(&golden, &[], &options(mode));
        report.seconds = 0.5;
        assert!(report.passed && report.same_artifact);
        assert_eq!(report.token_agreement, Some(1.0));
        assert_eq!(report.decision_agreement, Some(1.0));
        // The file has six decimals.
        assert!(report.max_log_prob_error <= 5e-7);
        last_line(&report)
    });
    assert_eq!(lines[0], lines[1]);
    says(
        &lines[0],
        &expect![[r#"
        as recorded: 2 prompts, 12 of 12 tokens, 120 of 120 decisions, log-probabilities within 4.8e-7, f32 on CPUExecutionProvider, ONNX Runtime 1.31.1, 0.5 s
    "#]],
    );
}

#[test]
fn rounding_passes_in_both_modes() {
    for mode in [Mode::Exact, Mode::Tolerant] {
        let report = checked(&recorded(&[]), &[Fault::Noise { size: 1e-5 }], &options(mode));
        assert!(report.passed, "{report}");
        assert!(report.max_log_prob_error > 1e-6);
    }
}

#[test]
fn every_fault_is_found() {
    fails(
        &[Fault::Logit { step: 3, by: 9.0 }],
        &expect![[r#"
        MISMATCH: 1 of 2 prompts, first prompt 2: token 3 in place 3 has log-probability -0.000545, recorded was -1.689171 (within 0.001); f32 on CPUExecutionProvider, ONNX Runtime 1.31.1
    "#]],
    );
    fails(
        &[Fault::LogitIs { step: 2, value: f32::NAN }],
        &expect![[r#"
        MISMATCH: 2 of 2 prompts, first prompt 1: token 30 in place 2 has log-probability NaN, recorded was -1.287468 (within 0.001); f32 on CPUExecutionProvider, ONNX Runtime 1.31.1
    "#]],
    );
    fails(
        &[Fault::Flip { module: MLP_1, column: 4 }],
        &expect![[r#"
        MISMATCH: 2 of 2 prompts, first prompt 1: token 4 is kept in layers.1.mlp (margin 0.73680717), recorded was skipped; f32 on CPUExecutionProvider, ONNX Runtime 1.31.1
    "#]],
    );
    fails(
        &[Fault::Flip { module: MLP_1, column: 11 }],
        &expect![[r#"
        MISMATCH: 1 of 2 prompts, first prompt 1: token 11 is kept in layers.1.mlp (margin 0.15207879), recorded was skipped; f32 on CPUExecutionProvider, ONNX Runtime 1.31.1
    "#]],
    );
    fails(
        &[Fault::Mlp { layer: 2, by: 0.01 }],
        &expect![[r#"
        MISMATCH: 1 of 2 prompts, first prompt 1: token 30 in place 0 has log-probability -1.601327, recorded was -1.606353 (within 0.001); f32 on CPUExecutionProvider, ONNX Runtime 1.31.1
    "#]],
    );
    fails(
        &[Fault::Margin { module: MLP_1, column: 4, value: f32::NAN }],
        &expect![[r#"
        MISMATCH: 2 of 2 prompts, first prompt 1: token 4 is neither kept nor skipped in layers.1.mlp (margin NaN), recorded was skipped; f32 on CPUExecutionProvider, ONNX Runtime 1.31.1
    "#]],
    );
    fails(
        &[Fault::Dense],
        &expect![[r#"
        MISMATCH: 2 of 2 prompts, first prompt 1: step 0: the artifact routes [], recorded were [layers.0.attention, layers.0.mlp, layers.1.attention, layers.1.mlp, layers.2.attention, layers.2.mlp]; f32 on CPUExecutionProvider, ONNX Runtime 1.31.1
    "#]],
    );
}

#[test]
fn a_nan_shows_in_the_numbers() {
    let faults = [Fault::LogitIs { step: 2, value: f32::NAN }];
    let report = checked(&recorded(&[]), &faults, &options(Mode::Tolerant));
    assert!(report.max_log_prob_error.is_nan());
    assert!(serde_json::to_value(&report).unwrap()["max_log_prob_error"].is_null());
}

#[test]
fn a_tie_of_decisions_passes_in_the_tolerant_mode_alone() {
    let at = |value| Fault::Margin { module: MLP_1, column: 10, value };
    let golden = recorded(&[at(1e-6)]);
    let near = &golden.prompts[0].routing.as_ref().unwrap()[3].near;
    assert!(near.contains(&(10, 1e-6)), "{near:?}");

    let report = checked(&golden, &[at(-1e-6)], &options(Mode::Tolerant));
    assert_eq!(report.flipped_ties, 1);
    let prompt = &report.prompts[0];
    assert!(prompt.passed && prompt.decisions.left_out > 0, "{report}");
    assert_eq!((prompt.tokens, prompt.steps_left_out), (2, 4));
    assert!(report.passed, "{report}");
    assert!(!checked(&golden, &[at(-1e-6)], &options(Mode::Exact)).passed);
    // As recorded, it is no tie.
    assert!(!checked(&recorded(&[at(0.5)]), &[at(-1e-6)], &options(Mode::Tolerant)).passed);
}

#[test]
fn too_many_ties_fail() {
    let at = |value| Fault::Margin { module: MLP_1, column: 0, value };
    let report = checked(&recorded(&[at(1e-6)]), &[at(-1e-6)], &options(Mode::Tolerant));
    assert!(report.prompts.iter().all(|prompt| prompt.passed), "{report}");
    assert!(!report.passed);
    says(
        &report.failures.join("\n"),
        &expect![[r#"
        2 ties came out the other way, where 1 of 98 decisions may
        12 of 12 steps come after a tie that came out the other way: too little is left to compare; record again with other prompts
    "#]],
    );
}

#[test]
fn what_does_not_depend_on_a_tie_is_still_compared() {
    let tie = |value| Fault::Margin { module: MLP_1, column: 8, value };
    let golden = recorded(&[tie(1e-6)]);
    // Before the tie's token; at it, in an earlier layer; after it, before its keys are read.
    let layer = |layer, kind| ModuleId { layer, kind };
    for (module, column) in [
        (layer(2, ModuleKind::Mlp), 7),
        (layer(0, ModuleKind::Mlp), 8),
        (layer(1, ModuleKind::Attention), 8),
        (layer(2, ModuleKind::Attention), 9),
    ] {
        let wrong = Fault::Margin { module, column, value: f32::NAN };
        let report = checked(&golden, &[tie(-1e-6), wrong], &options(Mode::Tolerant));
        assert_eq!(report.prompts[0].decisions.different, 1, "{module} at {column}: {report}");
    }
    for (module, column) in [(layer(2, ModuleKind::Attention), 8), (layer(2, ModuleKind::Mlp), 9)] {
        let wrong = Fault::Margin { module, column, value: f32::NAN };
        let report = checked(&golden, &[tie(-1e-6), wrong], &options(Mode::Tolerant));
        assert_eq!(report.prompts[0].decisions.different, 0, "{module} at {column}: {report}");
    }
}

#[test]
fn a_tie_of_tokens_passes_in_the_tolerant_mode_alone() {
    let gap = |by| Fault::Gap { step: 3, by };
    let golden = recorded(&[gap(-1e-5)]);
    let report = checked(&golden, &[gap(1e-5)], &options(Mode::Tolerant));
    assert!(report.passed, "{report}");
    assert!(report.token_agreement.unwrap() < 1.0);
    assert_eq!(report.prompts[0].token_ties, 1);
    assert!(!checked(&golden, &[gap(1e-5)], &options(Mode::Exact)).passed);
}

#[test]
fn another_tokenizer_is_found() {
    let golden = recorded(&[]);
    let mut options = options(Mode::Tolerant);
    let mut tokenized: Vec<_> = prompts().into_iter().map(|(_, ids)| ids).collect();
    options.tokenized = Some(tokenized.clone());
    assert!(checked(&golden, &[], &options).passed);
    tokenized[0][5] ^= 1;
    options.tokenized = Some(tokenized);
    let report = checked(&golden, &[], &options);
    assert!(!report.passed);
    says(
        &report.prompts[0].failures[0],
        &expect![[r#"
        the tokenizer gives 9 tokens, recorded were 9; they differ from token 5
    "#]],
    );
}

#[test]
fn another_artifact_is_said_and_no_failure() {
    let mut options = options(Mode::Exact);
    options.artifact.sha256.clear();
    let report = checked(&recorded(&[]), &[], &options);
    assert!(report.passed && !report.same_artifact);
    assert!(report.to_string().contains("not those that were recorded"), "{report}");
}

#[test]
fn an_artifact_that_reports_no_decisions_is_recorded_by_its_values() {
    let golden = recorded(&[Fault::Silent]);
    assert!(golden.prompts.iter().all(|prompt| prompt.routing.is_none()));
    let report = checked(&golden, &[], &options(Mode::Exact));
    assert!(report.passed);
    assert_eq!(report.decision_agreement, None);
    assert!(!checked(&golden, &[Fault::Logit { step: 1, by: 1.0 }], &options(Mode::Exact)).passed);
}

#[test]
fn what_cannot_be_recorded_is_an_error() {
    let base = RecordOptions::new(artifact(), environment(), DType::F32);
    let error = |faults: &[Fault], prompts: &[(String, Vec<i64>)], options: &RecordOptions| {
        let mut toy = Toy::with(faults.iter().copied());
        record(&mut toy, prompts, options, &mut |_| {}).unwrap_err().to_string()
    };
    let prompt = |ids: &[i64]| vec![(String::new(), ids.to_vec())];
    let none = RecordOptions { tokens: 0, ..base.clone() };
    let margin = Fault::Margin { module: MLP_1, column: 0, value: f32::NAN };
    let nan = Fault::LogitIs { step: 0, value: f32::INFINITY };
    says(
        &error(&[], &[], &base),
        &expect![[r#"
        there is no prompt to record; give at least one
    "#]],
    );
    says(
        &error(&[], &prompt(&[]), &base),
        &expect![[r#"
        prompt 1 has no token; give it some text
    "#]],
    );
    says(
        &error(&[], &prompt(&[32]), &base),
        &expect![[r#"
        prompt 1: token 32 is outside the artifact's vocabulary of 32; is the file of another model?
    "#]],
    );
    says(
        &error(&[], &prompts(), &none),
        &expect![[r#"
        tokens is 0; it must be 1 to 1048576
    "#]],
    );
    says(
        &error(&[nan], &prompts(), &base),
        &expect![[r#"
        prompt 1, step 0: a logit is not finite; `verify` finds where it begins
    "#]],
    );
    says(
        &error(&[margin], &prompts(), &base),
        &expect![[r#"
        prompt 1, step 0: a margin is not finite; `verify` finds where it begins
    "#]],
    );
    says(
        &error(&[Fault::Fails { step: 2 }], &prompts(), &base),
        &expect![[r#"
        prompt 1, step 2: the artifact failed
    "#]],
    );
    says(
        &error(&[Fault::Narrow], &prompts(), &base),
        &expect![[r#"
        prompt 1, step 0: logits have shape [1, 1, 31], not [1, 1, 32]
    "#]],
    );
}

#[test]
fn what_cannot_be_checked_is_an_error() {
    let error = |faults: &[Fault], golden: &Golden| -> Error<Failed> {
        let mut toy = Toy::with(faults.iter().copied());
        check(&mut toy, golden, &options(Mode::Exact), &mut |_| {}).unwrap_err()
    };
    says(
        &error(&[Fault::Silent], &recorded(&[])).to_string(),
        &expect![[r#"
        prompt 1, step 0: the artifact does not report the decisions of every routed module; export it with --emit-routing
    "#]],
    );
    let mut other = recorded(&[]);
    other.prompts[1].top[0][2].0 = 99;
    says(
        &error(&[], &other).to_string(),
        &expect![[r#"
        prompt 2: token 99 is outside the artifact's vocabulary of 32; is the file of another model?
    "#]],
    );
}
