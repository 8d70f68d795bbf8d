//! Each fault must be found, and named; what is no fault must pass.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on must stop")]
#![allow(clippy::needless_raw_string_hashes, reason = "blessing writes them")]

use expect_test::{Expect, expect};
use skipgpt_passes::ir::{ModuleId, ModuleKind};

use super::toy::{Failed, Fault, Toy, VOCAB};
use super::*;
use crate::random::draw;

const MLP_1: ModuleId = ModuleId { layer: 1, kind: ModuleKind::Mlp };

fn options() -> Options {
    Options {
        decode_steps: 32,
        greedy_tokens: 12,
        ..Options::new("CPUExecutionProvider", "1.31.1", DType::F32)
    }
}

fn attempt(
    reference: &[Fault],
    artifact: &[Fault],
    prompts: &[Vec<i64>],
    options: &Options,
) -> Result<Report, Error<Failed, Failed>> {
    let mut reference = Toy::with(reference.iter().copied());
    let mut artifact = Toy::with(artifact.iter().copied());
    run(&mut reference, &mut artifact, prompts, options, &mut |_| {})
}

fn verify(reference: &[Fault], artifact: &[Fault]) -> Report {
    attempt(reference, artifact, &[], &options()).unwrap()
}

/// The text, whose one line or lines stand in the expectation.
#[track_caller]
fn says(text: &str, expect: &Expect) {
    // Ending in a newline, so that blessing writes every expectation in one form.
    expect.assert_eq(&format!("{text}\n"));
}

/// The artifact has `faults`; the report fails, and its last line says so in these words.
#[track_caller]
fn fails(faults: &[Fault], verdict: &Expect) -> Report {
    let report = verify(&[], faults);
    assert!(!report.passed, "{report}");
    let line = last_line(&report);
    let on = "; f32 on CPUExecutionProvider, ONNX Runtime 1.31.1";
    says(line.strip_suffix(on).unwrap(), verdict);
    report
}

fn last_line(report: &Report) -> String {
    report.to_string().lines().last().unwrap().to_owned()
}

#[test]
fn a_faithful_artifact_passes() {
    let mut report = verify(&[], &[]);
    report.seconds = 0.5;
    assert!(report.passed);
    assert_eq!(report.decision_agreement, Some(1.0));
    assert_eq!(report.greedy_agreement, Some(1.0));
    assert_eq!(report.max_abs_logit_error.to_bits(), 0);
    assert!(report.cases.iter().all(|case| case.logits.compared > 0 && case.cache.compared > 0));
    says(
        &report.to_string(),
        &expect![[r#"
        prefill       ok        decisions 144/144 logits 0.0e0  caches 0.0e0
        single-token  ok        decisions 30/30 logits 0.0e0  caches 0.0e0
        decode        ok        decisions 336/336 logits 0.0e0  caches 0.0e0
        batch         ok        decisions 444/444 logits 0.0e0  caches 0.0e0
        chunked       ok        decisions 168/168 logits 0.0e0  caches 0.0e0
        chunked-batch ok        decisions 372/372 logits 0.0e0  caches 0.0e0
        greedy-1      ok        decisions 210/210 logits 0.0e0  caches 0.0e0  text 12/12
        verified: 7 cases, 1704 decisions equal, logits within 0.0e0, caches within 0.0e0, greedy text equal (12 tokens), f32 on CPUExecutionProvider, ONNX Runtime 1.31.1, 0.5 s
    "#]],
    );
}

#[test]
fn of_an_artifact_that_gives_no_others_the_last_logits_are_compared() {
    let (all, mut last) = (verify(&[], &[]), verify(&[], &[Fault::LastOnly]));
    last.seconds = 0.5;
    says(
        &last_line(&last),
        &expect![[r#"
        verified: 7 cases, 1704 decisions equal, each step's last logits within 0.0e0, caches within 0.0e0, greedy text equal (12 tokens), f32 on CPUExecutionProvider, ONNX Runtime 1.31.1, 0.5 s
    "#]],
    );
    for (all, last) in all.cases.iter().zip(&last.cases) {
        assert_eq!((all.decisions, all.cache.compared), (last.decisions, last.cache.compared));
        let fewer = last.logits.compared < all.logits.compared;
        let single = ["single-token", "greedy-1"].contains(&last.name.as_str());
        assert!(last.logits.compared > 0 && fewer != single, "{last}");
    }
    fails(
        &[Fault::LastOnly, Fault::Logit { step: 0, by: 0.01 }],
        &expect![[r#"
            MISMATCH: prefill, step 0: logits (the final norm or the head, or the last layer) is 6.1677084, not 6.157708 (within 9.0e-4), at row 0, token 23
        "#]],
    );
}

#[test]
fn both_decisions_occur_in_what_is_compared() {
    // Else the toy would not show that a decision was missed.
    let mut toy = Toy::default();
    let input = crate::decoder::Input::prompts(&[draw(VOCAB, 0, 24)], crate::decoder::Logits::All);
    let routing = crate::decoder::Decoder::step(&mut toy, &input).unwrap().routing.unwrap();
    for margins in routing.margins.outer_iter() {
        let kept = margins.iter().filter(|margin| **margin >= 0.0).count();
        assert!((3..22).contains(&kept), "{kept} of 24");
    }
    assert!(routing.margins.iter().all(|margin| margin.abs() > 1e-3), "no tie by accident");
}

#[test]
fn rounding_passes() {
    let report = verify(&[], &[Fault::Noise { size: 1e-5 }]);
    assert!(report.passed, "{report}");
    assert!((1e-6..1e-4).contains(&report.max_abs_logit_error));
}

#[test]
fn a_wrong_logit_is_found() {
    fails(
        &[Fault::Logit { step: 0, by: 0.01 }],
        &expect![[r#"
        MISMATCH: prefill, step 0: logits (the final norm or the head, or the last layer) is 8.034013, not 8.024013 (within 5.0e-4), at row 0, token 0
    "#]],
    );
    fails(
        &[Fault::Logit { step: 20, by: -0.01 }],
        &expect![[r#"
        MISMATCH: decode, step 20: logits (the final norm or the head, or the last layer) is 5.1682377, not 5.178238 (within 9.1e-4), at row 0, token 43
    "#]],
    );
}

#[test]
fn a_wrong_decision_is_found_where_it_is_taken() {
    let report = fails(
        &[Fault::Flip { module: MLP_1, column: 10 }],
        &expect![[r#"
        MISMATCH: prefill, step 0: layer 1 diverges first: decision margin of layers.1.mlp is 0.71914583, not -0.71914583 (within 1.0e-3), at row 0, token 10
    "#]],
    );
    assert!(report.decision_agreement.unwrap() < 1.0);
    assert_eq!(report.ties.flipped, 0);
    // The reference follows the decision, so nothing after it differs.
    assert_eq!(report.max_abs_logit_error.to_bits(), 0);
    // In decode, in the second chunk.
    for column in [40, 13] {
        let report = verify(&[], &[Fault::Flip { module: MLP_1, column }]);
        assert!(!report.passed, "{report}");
    }
}

#[test]
fn a_wrong_decision_that_is_not_reported_is_found_by_its_values() {
    fails(
        &[Fault::Silent, Fault::Flip { module: MLP_1, column: 10 }],
        &expect![[r#"
        MISMATCH: prefill, step 0: layer 2 diverges first: key in the cache of layer 2 (its key projection, or the layer before it) is -1.7594433, not -1.5152481 (within 3.5e-4), at row 0, token 10
    "#]],
    );
}

#[test]
fn an_artifact_that_reports_no_decisions_passes_by_its_values() {
    let report = verify(&[], &[Fault::Silent]);
    assert!(report.passed);
    assert_eq!(report.decision_agreement, None);
    assert!(last_line(&report).contains("decisions not reported by the artifact"), "{report}");
    assert!(report.decisions().unreported > 100);
}

#[test]
fn an_artifact_without_a_router_is_taken_to_keep() {
    let report = verify(&[], &[Fault::Dense]);
    assert!(!report.passed);
    let divergence = report.first_divergence.unwrap();
    assert!(divergence.place.starts_with("decision margin of"), "{divergence}");
    let report = verify(&[Fault::Dense], &[]);
    assert!(!report.passed, "a router that the reference does not have");
}

#[test]
fn nothing_routed_is_full_agreement() {
    let report = verify(&[Fault::Dense], &[Fault::Dense]);
    assert!(report.passed);
    assert_eq!(report.decision_agreement, Some(1.0));
    assert!(last_line(&report).contains("nothing routed"), "{report}");
}

#[test]
fn a_tie_may_come_out_either_way() {
    let at = |value| Fault::Margin { module: MLP_1, column: 10, value };
    let report = verify(&[at(1e-6)], &[at(-1e-6)]);
    // One in each case whose prompt, or text, reaches column 10, in each of its rows.
    assert!(report.ties.flipped > 1, "{report}");
    assert_eq!(report.decision_agreement, Some(1.0));
    assert!(report.first_divergence.is_none());
    assert_eq!(report.max_abs_logit_error.to_bits(), 0, "followed, so no value differs");
    assert_eq!(report.ties.listed[0].module, "layers.1.mlp");
    assert_eq!(report.ties.listed[0].token, 10);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["ties"]["listed"][0]["case"], "prefill");
}

#[test]
fn ties_are_allowed_up_to_their_share() {
    let at = |value| Fault::Margin { module: MLP_1, column: 10, value };
    let mut options = options();
    options.tolerances.tie_share = 0.01;
    let report = attempt(&[at(1e-6)], &[at(-1e-6)], &[], &options).unwrap();
    assert!(report.passed, "{report}");
    assert!(last_line(&report).contains("more are ties"), "{report}");
    options.tolerances.tie_share = 1e-4;
    let report = attempt(&[at(1e-6)], &[at(-1e-6)], &[], &options).unwrap();
    assert!(!report.passed);
    assert!(last_line(&report).contains("ties came out the other way, where 1 of"), "{report}");
}

#[test]
fn a_margin_that_is_no_tie_in_the_reference_is_none_in_the_artifact() {
    let at = |value| Fault::Margin { module: MLP_1, column: 10, value };
    let report = verify(&[at(0.5)], &[at(-1e-6)]);
    assert!(!report.passed);
    assert_eq!(report.ties.flipped, 0);
    let report = verify(&[at(f32::NAN)], &[at(-1e-6)]);
    assert!(!report.passed, "NaN in the reference");
    let report = verify(&[at(-1e-6)], &[at(f32::NAN)]);
    assert!(!report.passed, "NaN in the artifact");
}

#[test]
fn a_wrong_cache_entry_is_found() {
    let wrong = |value, column| Fault::Cache { layer: 2, value, column, by: 0.01 };
    fails(
        &[wrong(false, 3)],
        &expect![[r#"
        MISMATCH: prefill, step 0: layer 2 diverges first: key in the cache of layer 2 (its key projection, or the layer before it) is 1.7424519, not 1.7324519 (within 3.1e-4), at row 0, token 3
    "#]],
    );
    let report = fails(
        &[wrong(true, 50)],
        &expect![[r#"
        MISMATCH: decode, step 27: layer 2 diverges first: value in the cache of layer 2 (its value projection, or the layer before it) is -2.6985538, not -2.7085538 (within 3.7e-4), at row 0, token 50
    "#]],
    );
    assert!(report.max_abs_cache_error > 0.009);
    let report = verify(&[], &[Fault::Cache { layer: 0, value: true, column: 1, by: f32::NAN }]);
    assert!(!report.passed && report.max_abs_cache_error.is_nan());
}

#[test]
fn a_cache_entry_of_padding_means_nothing() {
    // Only the batches have padding, in their other rows; row 0 has none in column 0 either.
    let wrong = Fault::Cache { layer: 0, value: false, column: 0, by: 9.0 };
    let prompts = [vec![3, 4], vec![5, 6, 7, 8]];
    let report = attempt(&[], &[wrong], &prompts, &options()).unwrap();
    let batch = report.cases.iter().find(|case| case.name == "batch").unwrap();
    assert!(batch.passed, "{report}");
    let single = report.cases.iter().find(|case| case.name == "decode").unwrap();
    assert!(!single.passed, "{report}");
}

#[test]
fn a_wrong_module_is_named_by_the_layer_after_it() {
    fails(
        &[Fault::Mlp { layer: 1, by: 0.01 }],
        &expect![[r#"
        MISMATCH: prefill, step 0: layer 2 diverges first: key in the cache of layer 2 (its key projection, or the layer before it) is -0.07631226, not -0.06027071 (within 2.1e-4), at row 0, token 0
    "#]],
    );
    // The last layer has none after it.
    fails(
        &[Fault::Mlp { layer: 2, by: 0.01 }],
        &expect![[r#"
        MISMATCH: prefill, step 0: logits (the final norm or the head, or the last layer) is 10.804476, not 10.727066 (within 7.1e-4), at row 0, token 3
    "#]],
    );
}

#[test]
fn layer_outputs_name_the_layer_itself() {
    let options = Options { layer_outputs: true, ..options() };
    for layer in 0..toy::LAYERS {
        let report = attempt(&[], &[Fault::Mlp { layer, by: 0.01 }], &[], &options).unwrap();
        let divergence = report.first_divergence.unwrap();
        assert_eq!(divergence.place, format!("output of layer {layer}"));
    }
    let report = attempt(&[], &[], &[], &options).unwrap();
    assert!(report.passed && report.cases.iter().all(|case| case.layers.compared > 0));
}

#[test]
fn nan_never_passes() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let faults = [Fault::LogitIs { step: 0, value }];
        let report = verify(&[], &faults);
        let place = report.first_divergence.as_ref().map(|first| (first.step, first.layer));
        assert_eq!((report.passed, place), (false, Some((0, None))), "{report}");
        assert!(report.max_abs_logit_error.is_nan());
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["max_abs_logit_error"].is_null() && json["passed"] == false);
        assert!(!verify(&faults, &faults).passed, "the same in both is no better");
    }
}

#[test]
fn padding_bugs_are_found_by_the_batches_alone() {
    for fault in [Fault::SeesPadding, Fault::CountsPadding] {
        let report = verify(&[], &[fault]);
        let failed: Vec<_> =
            report.cases.iter().filter(|case| !case.passed).map(|case| &case.name).collect();
        assert_eq!(failed, ["batch", "chunked-batch"], "{fault:?}");
    }
}

#[test]
fn a_cache_forgotten_between_chunks_is_found_by_the_chunks_alone() {
    let report = verify(&[], &[Fault::ForgetsChunks]);
    let failed: Vec<_> =
        report.cases.iter().filter(|case| !case.passed).map(|case| &case.name).collect();
    assert_eq!(failed, ["chunked", "chunked-batch"]);
}

#[test]
fn a_drift_is_found_once_it_leaves_the_bounds() {
    fails(
        &[Fault::Drift { by: 1e-4 }],
        &expect![[r#"
        MISMATCH: decode, step 10: logits (the final norm or the head, or the last layer) is -12.789458, not -12.790459 (within 9.1e-4), at row 0, token 33
    "#]],
    );
}

#[test]
fn a_token_tie_is_counted_and_passes() {
    // The reference prefers one of two equals, the artifact the other.
    let report = verify(&[Fault::Gap { step: 4, by: -1e-5 }], &[Fault::Gap { step: 4, by: 1e-5 }]);
    assert!(report.passed, "{report}");
    assert!(report.greedy_agreement.unwrap() < 1.0);
    let greedy = report.cases.iter().find_map(|case| case.greedy.as_ref()).unwrap();
    let difference = greedy.first_difference.as_ref().unwrap();
    assert_eq!((greedy.equal, difference.index, difference.tie), (4, 4, true));
    assert!(last_line(&report).contains("greedy text equal up to ties"), "{report}");
}

#[test]
fn another_token_that_is_no_tie_is_found() {
    let mut options = options();
    options.tolerances.logits.atol = 100.0;
    let gap = |by| [Fault::Gap { step: 4, by }];
    let report = attempt(&gap(-0.1), &gap(0.1), &[], &options).unwrap();
    assert!(!report.passed);
    let divergence = report.first_divergence.as_ref().unwrap();
    assert_eq!((divergence.place.as_str(), divergence.step), ("greedy token", 4), "{report}");
}

#[test]
fn a_reference_that_is_not_one_function_of_its_input_is_found() {
    // It follows the text without a fault, and writes another one.
    let reference = [Fault::Resets { after: 7, by: 50.0 }];
    let report = attempt(&reference, &[], &[draw(VOCAB, 9, 5)], &options()).unwrap();
    assert!(!report.passed && report.first_divergence.is_none());
    assert!(last_line(&report).contains("writes another text"), "{report}");
}

#[test]
fn what_cannot_be_compared_is_an_error() {
    let error = |artifact: &[Fault], prompts: &[Vec<i64>]| {
        attempt(&[], artifact, prompts, &options()).unwrap_err().to_string()
    };
    says(
        &error(&[Fault::NoCache { layer: 1 }], &[]),
        &expect![[r#"
        case `prefill`: the artifact gives caches of layers [0, 2], the reference of [0, 1, 2]; are both of one checkpoint, with the same modules removed?
    "#]],
    );
    says(
        &error(&[Fault::Narrow], &[]),
        &expect![[r#"
        case `prefill`, step 0: the artifact gave logits of shape [1, 24, 31], not [1, 24, 32]
    "#]],
    );
    says(
        &error(&[Fault::Fails { step: 1 }], &[]),
        &expect![[r#"
        case `single-token`, step 1: the artifact failed
    "#]],
    );
    says(
        &error(&[], &[vec![1], vec![]]),
        &expect![[r#"
        prompt 1 has no token; give at least one
    "#]],
    );
    says(
        &error(&[], &[vec![32]]),
        &expect![[r#"
        prompt 0: token 32 is outside the vocabulary of 32; was it made with another tokenizer?
    "#]],
    );
    says(
        &error(&[], &[vec![-1]]),
        &expect![[r#"
        prompt 0: token -1 is outside the vocabulary of 32; was it made with another tokenizer?
    "#]],
    );
}

#[test]
fn the_fields_come_in_a_fixed_order() {
    let json = serde_json::to_value(verify(&[], &[])).unwrap();
    let fields: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
    says(
        &fields.join(" "),
        &expect![[r#"
            passed decision_agreement ties max_abs_logit_error max_abs_cache_error greedy_agreement provider onnxruntime dtype logits tolerances weights rounding quality cases first_divergence seconds
        "#]],
    );
    let fields: Vec<_> = json["cases"][0].as_object().unwrap().keys().map(String::as_str).collect();
    says(
        &fields.join(" "),
        &expect![[r#"
        name passed prompt_tokens steps decisions logits cache layers greedy first_divergence
    "#]],
    );
}

#[test]
fn progress_counts_every_step_of_every_case() {
    let mut seen: Vec<(String, usize, usize)> = Vec::new();
    let (mut reference, mut artifact) = (Toy::default(), Toy::default());
    run(&mut reference, &mut artifact, &[], &options(), &mut |progress| {
        let Progress { case, step, steps } = progress;
        if seen.last().is_none_or(|last| last.0 != case) {
            seen.push((case.to_owned(), 0, steps));
        }
        let last = seen.last_mut().unwrap();
        assert_eq!((last.1 + 1, last.2), (step, steps));
        last.1 = step;
    })
    .unwrap();
    assert_eq!(seen.len(), 7);
    for (case, step, steps) in seen {
        assert_eq!(step, steps, "{case}");
    }
}
