//! The binary as it is typed: a real model all the way, exit codes, messages.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::oracle::fixture;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs the binary and gives its exit code, standard output and standard error.
pub(crate) fn run(arguments: &[&str]) -> (i32, String, String) {
    output(Command::new(env!("CARGO_BIN_EXE_skipgpt-export")).args(arguments))
}

fn output(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.current_dir(root()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// Runs a command that must succeed.
pub(crate) fn succeeds(arguments: &[&str]) -> String {
    let (code, stdout, stderr) = run(arguments);
    assert_eq!(code, 0, "{arguments:?}\n{stdout}\n{stderr}");
    stdout
}

/// Runs a command that cannot be done, and gives its message.
pub(crate) fn refused(arguments: &[&str]) -> String {
    let (code, stdout, stderr) = run(arguments);
    assert_eq!((code, stdout.as_str()), (2, ""), "{arguments:?}\n{stderr}");
    stderr
}

/// A directory with the checkpoint and artifact paths of one fixture.
struct Place {
    directory: TempDir,
    model: String,
    router: String,
}

impl Place {
    fn new() -> Self {
        let model = fixture("llama-gqa");
        Self {
            directory: TempDir::new().unwrap(),
            router: text(&model.join("router.pth")),
            model: text(&model),
        }
    }

    fn path(&self, name: &str) -> String {
        text(&self.directory.path().join(name))
    }

    fn export(&self, name: &str, more: &[&str]) -> (i32, String, String) {
        let output = self.path(name);
        let fixed =
            ["export", "--model", &self.model, "--router", &self.router, "--output", &output];
        run(&[&fixed, more].concat())
    }
}

pub(crate) fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// The model that `make model` fetches.
fn gguf() -> PathBuf {
    let path = root().join("target/model/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{}: missing; run `make model`", path.display());
    path
}

#[test]
fn a_real_model_goes_all_the_way() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| text(&directory.path().join(name));
    let (model, artifact) = (path("model"), path("artifact"));
    succeeds(&["import", &text(&gguf()), "--output", &model]);
    let router = "fixtures/smollm2-135m/router.pth";
    let source = ["--model", &model, "--router", router];
    succeeds(&[&["export"], &source[..], &["--output", &artifact]].concat());

    let short = ["--decode-steps", "32", "--greedy-tokens", "16"];
    let report = succeeds(&[&["verify", &artifact], &source[..], &short].concat());
    assert!(report.contains("\nverified: "), "{report}");

    let prompt = "The capital of France is";
    let generate = |more: &[&str]| {
        succeeds(&[&["generate", &artifact, "--prompt", prompt, "--json", "-"], more].concat())
    };
    let greedy = ["--max-new-tokens", "12"];
    let written = tokens(&generate(&greedy));
    assert_eq!(written, tokens(&generate(&greedy)));
    assert_eq!(written, tokens(&generate(&[&greedy[..], &["--step-session"]].concat())));
    let sampled = |seed| {
        let more = ["--max-new-tokens", "12", "--temperature", "1.5", "--seed", seed];
        tokens(&generate(&more))
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));

    let (prompts, golden, junit) = (path("prompts.txt"), path("golden.json"), path("junit.xml"));
    std::fs::write(&prompts, format!("{prompt}\nOnce upon a time\n")).unwrap();
    let record = ["golden", "record", &artifact, "--prompts", &prompts, "--output", &golden];
    succeeds(&[&record[..], &["--max-new-tokens", "8"]].concat());
    let report = succeeds(&["golden", "check", &artifact, &golden, "--junit", &junit]);
    assert!(report.contains("as recorded: "), "{report}");
    assert!(std::fs::read_to_string(&junit).unwrap().contains("failures=\"0\""));

    // One decision, the other way round.
    let mut record = std::fs::read(&golden).unwrap();
    let keep = b"\"keep\": \"";
    let at = record.windows(keep.len()).position(|window| window == keep).unwrap() + keep.len();
    record[at] ^= 1;
    std::fs::write(&golden, record).unwrap();
    let (code, report, _) = run(&["golden", "check", &artifact, &golden]);
    assert_eq!(code, 1, "{report}");
    assert!(report.contains("MISMATCH: "), "{report}");
}

fn tokens(json: &str) -> Vec<i64> {
    let report: serde_json::Value = serde_json::from_str(json).unwrap();
    report["tokens"].as_array().unwrap().iter().map(|token| token.as_i64().unwrap()).collect()
}

#[test]
fn a_wrong_artifact_is_exit_code_1() {
    let place = Place::new();
    assert_eq!(place.export("artifact", &[]).0, 0);
    // The same checkpoint with another adapter is another model.
    let adapter = text(&fixture("llama-gqa").join("adapter"));
    let artifact = place.path("artifact");
    let verify = ["verify", &artifact, "--model", &place.model, "--router", &place.router];
    let (code, report, _) = run(&[&verify[..], &["--greedy-tokens", "4"]].concat());
    assert_eq!(code, 0, "{report}");
    let (code, report, _) =
        run(&[&verify[..], &["--adapter", &adapter, "--greedy-tokens", "4"]].concat());
    assert_eq!(code, 1, "{report}");
    assert!(report.contains("MISMATCH: "), "{report}");
}

#[test]
fn an_output_that_exists_is_kept() {
    let place = Place::new();
    assert_eq!(place.export("artifact", &[]).0, 0);
    let (code, _, message) = place.export("artifact", &[]);
    assert_eq!(code, 2);
    assert_eq!(
        message,
        format!("error: {}: already exists; --force replaces it\n", place.path("artifact"))
    );
    assert_eq!(place.export("artifact", &["--force"]).0, 0);
}

/// The linker took jemalloc's `malloc`, and jemalloc found the settings.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn the_allocator_is_set_up() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skipgpt-export"));
    let (code, _, told) = output(command.arg("--version").env("MALLOC_CONF", "stats_print:true"));
    assert_eq!(code, 0, "{told}");
    for setting in ["narenas: 1", "oversize_threshold: 0", "dirty_decay_ms: -1"] {
        assert!(told.contains(&format!("opt.{setting}")), "{setting}: {told}");
    }
}

#[test]
fn a_missing_onnx_runtime_says_what_to_type() {
    let place = Place::new();
    assert_eq!(place.export("artifact", &[]).0, 0);
    let missing = place.path("nothing");
    let message = refused(&[
        "eval",
        &place.path("artifact"),
        "--perplexity",
        "README.md",
        "--onnxruntime",
        &missing,
    ]);
    assert!(message.contains("tokenizer.json") || message.contains(&missing), "{message}");
    let artifact = place.path("artifact");
    let verify = ["verify", &artifact, "--model", &place.model, "--router", &place.router];
    let message = refused(&[&verify[..], &["--onnxruntime", &missing]].concat());
    assert!(
        message.contains(&missing) && message.contains("pip install onnxruntime=="),
        "{message}"
    );
}

#[test]
fn unknown_passes_are_answered_with_the_known_ones() {
    let place = Place::new();
    let (code, _, message) = place.export("artifact", &["--stop-after", "merge"]);
    assert_eq!(code, 2);
    assert!(message.contains("merge-lora, freeze-routers, prune-modules"), "{message}");
}

#[test]
fn the_ir_can_be_seen_on_the_way() {
    let place = Place::new();
    let dump = place.path("ir");
    let (code, printed, message) =
        place.export("artifact", &["--dump-ir", &dump, "--stop-after", "prune-modules"]);
    assert_eq!(code, 0, "{message}");
    assert!(!Path::new(&place.path("artifact")).exists());
    let dumped = std::fs::read_to_string(Path::new(&dump).join("03-prune-modules.ir")).unwrap();
    assert_eq!(printed, dumped);
}

#[test]
fn a_plan_repeats_an_export() {
    let place = Place::new();
    assert_eq!(place.export("first", &["--dispatch", "masked"]).0, 0);
    let manifest = place.path("first/manifest.json");
    assert_eq!(place.export("second", &["--plan", &manifest]).0, 0);
    let read = |name: &str| std::fs::read(place.path(name)).unwrap();
    assert_eq!(read("first/model.onnx"), read("second/model.onnx"));
}

#[test]
fn a_safetensors_export_is_a_checkpoint_again() {
    let place = Place::new();
    let (code, _, message) = place.export("merged", &["--format", "safetensors"]);
    assert_eq!(code, 0, "{message}");
    assert_eq!(place.export("artifact", &[]).0, 0);
    let (merged, artifact) = (place.path("merged"), place.path("artifact"));
    let router = place.path("merged/router.safetensors");
    let verify = ["verify", &artifact, "--model", &merged, "--router", &router];
    let report = succeeds(&[&verify[..], &["--greedy-tokens", "4"]].concat());
    assert!(report.contains("verified: "), "{report}");
}
