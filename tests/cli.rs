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

/// What an export would refuse, a dry run refuses too, and writes nothing.
#[test]
fn a_dry_run_refuses_what_the_export_would() {
    let place = Place::new();
    assert_eq!(place.export("artifact", &[]).0, 0);
    let same = |name: &str, more: &[&str]| {
        let (code, _, message) = place.export(name, more);
        let (dry_code, _, dry) = place.export(name, &[more, &["--dry-run"]].concat());
        assert_eq!((code, dry_code), (2, 2), "{message}");
        assert_eq!(message, dry);
    };
    same("artifact", &[]);
    same("other", &["--sequences", "one", "--attention", "decomposed"]);
    same("other", &["--dtype", "f16", "--weights", "link"]);
    assert_eq!(place.export("other", &["--dry-run"]).0, 0);
    assert!(!Path::new(&place.path("other")).exists());
}

/// What holds the weights is the plan's, and where something else is asked for, nobody is told otherwise.
#[test]
fn a_plan_of_another_precision_is_refused() {
    let place = Place::new();
    assert_eq!(place.export("floats", &[]).0, 0);
    assert_eq!(place.export("codes", &["--dtype", "int4"]).0, 0);
    let plan = |name: &str| format!("{}/manifest.json", place.path(name));
    let refused = |plan: &str, more: &[&str]| {
        let (code, _, message) = place.export("out", &[&["--plan", plan], more].concat());
        assert_eq!(code, 2, "{message}");
        message
    };
    let message = refused(&plan("floats"), &["--dtype", "int4"]);
    assert_eq!(
        message,
        "error: --dtype int4: the plan of --plan has weights in floats; leave one of them out\n"
    );
    let message = refused(&plan("codes"), &["--dtype", "int8"]);
    assert!(
        message.contains("--dtype int8: the plan of --plan has weights in 4 bits"),
        "{message}"
    );
    let message = refused(&plan("codes"), &["--format", "safetensors"]);
    assert!(message.contains("--format safetensors holds floats"), "{message}");
    assert_eq!(place.export("out", &["--plan", &plan("codes"), "--dtype", "int4"]).0, 0);
}

/// Hours of work are not begun whose result could not be written, and no other prompts stand in for those
/// that a file lacks.
#[test]
fn files_that_cannot_serve_are_refused_at_once() {
    let place = Place::new();
    assert_eq!(place.export("artifact", &[]).0, 0);
    let (artifact, report) = (place.path("artifact"), place.path("missing/report.json"));
    let message = refused(&["inspect", &artifact, "--json", &report]);
    assert!(message.contains("/missing is no directory"), "{message}");
    let prompts = place.path("prompts.txt");
    std::fs::write(&prompts, "\n \n").unwrap();
    let verify = ["verify", &artifact, "--model", &place.model, "--router", &place.router];
    let message = refused(&[&verify[..], &["--prompts", &prompts]].concat());
    assert_eq!(message, format!("error: {prompts}: holds no prompt; give one a line\n"));
}

/// ONNX Runtime keeps no record of what it runs, which it otherwise does in the user's cache.
#[cfg(target_os = "linux")]
#[test]
fn nothing_is_written_down_about_a_run() {
    let home = TempDir::new().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_skipgpt-export"));
    command.arg("doctor").env("HOME", home.path()).env_remove("XDG_CACHE_HOME");
    let (_, report, told) = output(command.env_remove("ORT_DISABLE_TELEMETRY"));
    assert!(report.contains("ONNX Runtime 1."), "{report}\n{told}");
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
}

/// What would make every value differ is asked for, and not reported value by value.
#[test]
fn what_an_artifact_was_made_with_must_be_named() {
    let place = Place::new();
    let adapter = text(&fixture("llama-gqa").join("adapter"));
    assert_eq!(place.export("adapted", &["--adapter", &adapter]).0, 0);
    let output = place.path("dense");
    succeeds(&["export", "--model", &place.model, "--output", &output]);
    let verify = |name: &str, more: &[&str]| {
        let artifact = place.path(name);
        let message = refused(&[&["verify", &artifact, "--model", &place.model], more].concat());
        message.replace(&artifact, name)
    };
    let router = ["--router", &place.router];
    assert_eq!(
        verify("adapted", &[]),
        "error: adapted: was made with routers; name them with --router\n"
    );
    let artifact = place.path("adapted");
    let more = ["--router", &place.router, "--greedy-tokens", "4"];
    let against =
        |model: &str| run(&[&["verify", &artifact, "--model", model], &more[..]].concat());
    let (code, report, told) = against(&place.model);
    assert_eq!(code, 1, "{report}");
    assert!(told.contains("adapter_config.json; name the adapter with --adapter"), "{told}");
    let merged = ["--adapter", &adapter, "--format", "safetensors", "--dtype", "f32"];
    assert_eq!(place.export("merged", &merged).0, 0);
    let (code, report, told) = against(&place.path("merged"));
    assert_eq!(code, 0, "{report}\n{told}");
    assert_eq!(
        verify("dense", &router),
        "error: dense: was made without routers; leave --router out\n"
    );
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

    // It is no graph, and its routers are used where they are named.
    let message = refused(&["verify", &merged, "--model", &merged, "--router", &router]);
    assert!(message.contains("merged: holds no graph to run"), "{message}");
    let dense = place.path("dense");
    let (code, _, told) = run(&["export", "--model", &merged, "--output", &dense]);
    assert_eq!(code, 0, "{told}");
    assert!(told.contains("router.safetensors: is not used; name it with --router"), "{told}");
}
