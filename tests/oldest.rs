//! Artifacts under the oldest ONNX Runtime they ask for, and its refusal of those that ask for a later one.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use skipgpt_export::artifact;
use tempfile::TempDir;

use crate::cli::{refused, succeeds, text};
use crate::oracle::fixture;

/// The library folder of a version (`1.22`), which `make runtimes` unpacks.
fn library(version: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.join(format!("target/runtime-{version}/onnxruntime/capi"));
    assert!(folder.is_dir(), "{} is missing: run `make runtimes`", folder.display());
    text(&folder)
}

#[test]
fn artifacts_verify_under_the_oldest_runtime_they_name() {
    let directory = TempDir::new().unwrap();
    let output = text(&directory.path().join("artifact"));
    let (model, router) =
        (text(&fixture("llama-gqa")), fixture("llama-gqa").join("router.safetensors"));
    let router = text(&router);
    let inputs = ["--model", &model, "--router", &router];
    let few = ["--decode-steps", "4", "--greedy-tokens", "4"];
    for (minimum, older, options) in [
        ("1.22", None, &[][..]),
        ("1.22", None, &["--attention", "decomposed"]),
        ("1.22", None, &["--sequences", "one", "--logits", "last"]),
        ("1.22", None, &["--dtype", "int4", "--float-embedding"]),
        ("1.23", Some("1.22"), &["--dtype", "int8", "--float-embedding"]),
        ("1.23", Some("1.22"), &["--dtype", "int4"]),
        ("1.23", Some("1.22"), &["--dtype", "int4", "--dispatch", "gathered"]),
        ("1.23", Some("1.22"), &["--dtype", "int8", "--accuracy-level", "0"]),
        ("1.23", Some("1.22"), &["--dtype", "int8"]),
    ] {
        let place = format!("{options:?}");
        let fixed = ["export", "--output", &output, "--force"];
        succeeds(&[&fixed, &inputs[..], options].concat());
        let graph = artifact::open(output.as_ref()).unwrap().manifest.graph.unwrap();
        assert_eq!(graph.min_onnxruntime, minimum, "{place}");

        let verify = |version| {
            let library = library(version);
            let of = ["verify", &output, "--onnxruntime", &library];
            [&of, &inputs[..], &few].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        let words = verify(minimum);
        let report = succeeds(&words.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(report.contains("verified:"), "{place}: {report}");
        assert!(report.contains(&format!("ONNX Runtime {minimum}.")), "{place}: {report}");
        if let Some(older) = older {
            let words = verify(older);
            let message = refused(&words.iter().map(String::as_str).collect::<Vec<_>>());
            assert!(message.contains(minimum), "{place}: {message}");
        }
    }
}
