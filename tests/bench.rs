//! `bench`: a report has its fields, and what cannot be measured is refused. Times are never tested.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use serde_json::Value;
use skipgpt_export::decoder::{Decoder, Input, Logits};
use skipgpt_export::runtime::{Runtime, Version, session};

use crate::cli::{refused, run, succeeds};
use crate::forms::{Exports, opened};

fn bench(arguments: &[&str]) -> Value {
    let json = ["--json", "-", "--threads", "1", "--rounds", "2", "--steps", "3", "--warmup", "1"];
    serde_json::from_str(&succeeds(&[&["bench"], arguments, &json].concat())).unwrap()
}

/// The lines of a workload: decisions and forced percentages.
fn lines<'a>(report: &'a Value, workload: &str) -> Vec<&'a Value> {
    let lines = report["lines"].as_array().unwrap().iter();
    lines.filter(|line| line["workload"] == workload).collect()
}

#[test]
fn a_report_has_a_line_for_everything_that_was_asked_for() {
    let exports = Exports::of("llama-gqa");
    let (dense, routed) = (exports.dense(), exports.routed("auto"));
    let csv = exports.path("report.csv");
    let workloads = "decode:2:8,prefill:12";
    let report = bench(&[
        &routed,
        "--baseline",
        &dense,
        "--workload",
        workloads,
        "--force-skip",
        "0,100",
        "--ideal",
        "--ideal-seeds",
        "2",
        "--csv",
        &csv,
    ]);
    assert_eq!((&report["rounds"], &report["text"]), (&2.into(), &false.into()));
    for workload in ["decode:2:8", "prefill:12"] {
        let lines = lines(&report, workload);
        let decisions: Vec<_> =
            lines.iter().map(|line| line["decisions"].as_str().unwrap()).collect();
        assert_eq!(decisions, ["none", "own", "drawn", "drawn"]);
        for (at, line) in lines.iter().enumerate() {
            assert!(line["ms"]["min"].as_f64().unwrap() > 0.0, "{line}");
            assert!(line["load_seconds"].as_f64().unwrap() > 0.0, "{line}");
            assert_eq!(line["speedup"].is_null(), at == 0, "{line}");
            assert_eq!(line["skips"].is_null(), at == 0, "{line}");
            assert_eq!(line["ideal"].is_null(), at == 0, "{line}");
            assert!(line["peak_memory"].as_u64().unwrap() > 1_000_000, "{line}");
        }
        // Three in each of two rounds.
        assert_eq!(lines[0]["samples"], 6);
        let [none, all] = [lines[2], lines[3]];
        assert_eq!((&none["force_skip"], &all["force_skip"]), (&0.0.into(), &100.0.into()));
        for (share, line) in [(0.0, none), (1.0, all)] {
            for kind in ["attention", "mlp", "all"] {
                assert_eq!(line["skips"]["skipped"][kind], share, "{line}");
            }
        }
        assert_eq!(none["skips"]["multiply_adds"], 0.0);
        let share = all["skips"]["multiply_adds"].as_f64().unwrap();
        assert!(share > 0.5 && share < 1.0, "{share}");
        // What never runs is the same work as what is skipped, but for the routers.
        let ideal = all["ideal"]["multiply_adds"].as_f64().unwrap();
        assert!((ideal - share).abs() < 0.02, "{ideal}, {share}");
        let bytes = all["skips"]["weight_bytes"].as_f64().unwrap();
        assert!(bytes > 0.5 && bytes < 1.0, "{bytes}");
    }
    let csv = std::fs::read_to_string(csv).unwrap();
    assert_eq!(csv.lines().count(), 9);
    assert!(csv.starts_with("workload,artifact,decisions,force_skip,ms_median,"), "{csv}");
}

#[test]
fn what_is_skipped_is_what_the_routers_decide_on_the_text() {
    let exports = Exports::of("llama-gqa");
    let routed = exports.routed("conditional");
    // One word per token.
    let words: Vec<String> = (0..320).map(|id| format!("\"w{id}\": {id}")).collect();
    let tokenizer = format!(
        "{{\"version\": \"1.0\", \"added_tokens\": [], \"normalizer\": null, \"pre_tokenizer\": \
         {{\"type\": \"WhitespaceSplit\"}}, \"post_processor\": null, \"decoder\": null, \"model\": \
         {{\"type\": \"WordLevel\", \"vocab\": {{{}}}, \"unk_token\": \"w0\"}}}}",
        words.join(", ")
    );
    std::fs::write(PathBuf::from(&routed).join("tokenizer.json"), tokenizer).unwrap();
    let ids: Vec<i64> = (0..14).map(|i| (7 * i * i + 3) % 320).collect();
    let file = exports.path("text.txt");
    let words: Vec<String> = ids.iter().map(|id| format!("w{id}")).collect();
    std::fs::write(&file, words.join(" ")).unwrap();

    let report = bench(&[&routed, "--workload", "mixed:8:6", "--text", &file, "--no-memory"]);
    assert_eq!(report["text"], true);
    let line = lines(&report, "mixed:8:6")[0];
    assert!(line["speedup"].is_null() && line["peak_memory"].is_null(), "{line}");

    let runtime = Runtime::find(None, Version::OLDEST).unwrap();
    let options = session::Options { threads: Some(1), ..session::Options::default() };
    let artifact = opened(&routed);
    let mut watched = skipgpt_export::watch::Watched::open(&artifact, &runtime, &options).unwrap();
    let routing = watched.step(&Input::prompts(&[ids], Logits::All)).unwrap().routing.unwrap();
    let skipped = routing.margins.iter().filter(|margin| **margin < 0.0).count();
    let share = skipped as f64 / routing.margins.len() as f64;
    let found = line["skips"]["skipped"]["all"].as_f64().unwrap();
    assert!((found - share).abs() < 1e-9, "{found}, {share}");

    let message = refused(&["bench", &routed, "--workload", "mixed:8:7", "--text", &file]);
    assert!(message.contains("mixed:8:7 takes 15 tokens; the text has 14"), "{message}");
}

#[test]
fn another_exporter_s_graph_is_timed_without_its_work() {
    let exports = Exports::of("llama-gqa");
    let dense = exports.dense();
    let foreign = exports.path("foreign");
    std::fs::create_dir(&foreign).unwrap();
    for name in ["model.onnx", "model.onnx.data"] {
        let from = PathBuf::from(&dense).join(name);
        std::fs::copy(from, PathBuf::from(&foreign).join(name)).unwrap();
    }
    let report =
        bench(&[&dense, "--baseline", &foreign, "--workload", "decode:1:4", "--no-memory"]);
    let lines = lines(&report, "decode:1:4");
    assert_eq!(lines[0]["decisions"], "unknown");
    assert!(lines[0]["skips"].is_null() && lines[1]["speedup"].is_object());
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    let exports = Exports::of("llama-gqa");
    let (dense, routed) = (exports.dense(), exports.routed("auto"));
    let refused = |arguments: &[&str]| {
        refused(&[&["bench", "--no-memory", "--workload", "decode:1:4"], arguments].concat())
    };
    assert!(refused(&[&routed, "--ideal"]).contains("--baseline"));
    assert!(refused(&[&dense, "--baseline", &routed, "--ideal"]).contains("without routers"));
    assert!(refused(&[&dense, "--force-skip", "40"]).contains("no routers"));
    assert!(refused(&[&routed, "--force-skip", "101"]).contains("0 to 100 percent"));
    assert!(refused(&[&routed, "--rounds", "0"]).contains("--rounds is 0; expected at least 1"));
    assert!(refused(&[&exports.path("nothing")]).contains("No such file"));
    let (code, _, message) = run(&["bench", &dense, "--workload", "decode:1"]);
    assert_eq!(code, 2);
    assert!(message.contains("decode:SEQUENCES:CACHED"), "{message}");
}
