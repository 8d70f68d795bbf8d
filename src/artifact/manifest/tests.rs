//! The manifest as text, and texts that are not one.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use expect_test::expect;
use skipgpt_passes::plan::Plan;

use super::*;
use crate::artifact::testing::{self, Bench};

#[test]
fn a_plan_survives_its_file_and_a_manifest() {
    let bench = Bench::new();
    let path = bench.output("plan.json");
    let json = plan_to_json(&bench.plan).unwrap();
    expect![[r#"
        {
          "removed": [
            "layers.1.attention"
          ],
          "always": [
            "layers.0.attention"
          ],
          "fuse_key_value": false,
          "fuse_gate_up": false,
          "quantization": null,
          "attention_dispatch": "gathered",
          "mlp_dispatch": "conditional"
        }
    "#]]
    .assert_eq(std::str::from_utf8(&json).unwrap());
    fs::write(&path, json).unwrap();
    assert_eq!(read_plan(&path).unwrap(), bench.plan);
    bench.export("out", Weights::Copy).unwrap();
    assert_eq!(read_plan(&bench.output("out").join("manifest.json")).unwrap(), bench.plan);
}

#[track_caller]
fn check_plan(text: &str, expected: &str) {
    let bench = Bench::new();
    let path = bench.output("plan.json");
    fs::write(&path, text).unwrap();
    let error = read_plan(&path).unwrap_err().to_string();
    assert!(error.ends_with(expected), "{error}");
}

#[test]
fn a_wrong_plan_is_refused_by_its_field() {
    check_plan("{}", "missing field `removed` at line 1 column 2");
    let module = r#"{"removed": ["layers.3.router"]}"#;
    check_plan(
        module,
        "expected a module such as layers.3.attention or layers.0.mlp, found \"layers.3.router\" \
         at line 1 column 32",
    );
    check_plan(r#"{"remove": []}"#, "line 1 column 9");
    check_plan("[", "EOF while parsing a list at line 1 column 1");
}

#[test]
fn a_plan_is_sorted_when_read() {
    let bench = Bench::new();
    let path = bench.output("plan.json");
    let mut plan: Plan = testing::plan();
    let first = ModuleId { layer: 0, kind: ir::ModuleKind::Mlp };
    plan.removed = vec![plan.removed[0], first, first];
    fs::write(&path, plan_to_json(&plan).unwrap()).unwrap();
    assert_eq!(read_plan(&path).unwrap().removed, [first, plan.removed[0]]);
}

/// Rewrites a written manifest and says why it is refused.
#[track_caller]
fn check_manifest(from: &str, to: &str, expected: &str) {
    let bench = Bench::new();
    bench.export("out", Weights::Copy).unwrap();
    let path = bench.output("out").join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(&path, text.replacen(from, to, 1)).unwrap();
    let error = Manifest::read(&bench.output("out")).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn a_wrong_manifest_is_refused() {
    check_manifest(
        "\"manifest_version\": 3",
        "\"manifest_version\": 9",
        "has version 9, written by skipgpt-export 0.1.0; this build reads version 3",
    );
    check_manifest("\"skipgpt-export\"", "\"another\"", "is not an artifact");
    check_manifest("\"README.md\"", "\"../README.md\"", "lists \"../README.md\"");
    check_manifest("\"README.md\"", "\"/etc/passwd\"", "lists \"/etc/passwd\"");
    check_manifest("\"f32\"", "\"f64\"", "unknown variant `f64`");
}

#[test]
fn a_directory_without_a_manifest_is_no_artifact() {
    let bench = Bench::new();
    let error = Manifest::read(&bench.checkpoint.directory).unwrap_err();
    assert!(matches!(error, Error::NotAnArtifact(_)), "{error}");
}

#[test]
fn the_text_has_no_path_of_the_machine() {
    let bench = Bench::new();
    let text = bench.export("out", Weights::Copy).unwrap().to_json().unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(!text.contains(bench.folder.path().to_str().unwrap()));
    let keys: Vec<_> =
        text.lines().filter_map(|line| line.strip_prefix("  \"")?.split('"').next()).collect();
    assert_eq!(
        keys,
        [
            "manifest_version",
            "tool",
            "options",
            "plan",
            "passes",
            "model",
            "routing",
            "cache_layers",
            "work",
            "graph",
            "inputs",
            "outputs"
        ]
    );
}
