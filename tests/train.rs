//! `train` as it is typed: both stages, killed and resumed, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use skipgpt_export::checkpoint;
use skipgpt_passes::ir;
use tempfile::TempDir;

mod refused;
mod stopped;

pub(crate) fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/training/tiny")
}

/// A directory with a text; runs go beside it.
pub(crate) struct Place {
    directory: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self { directory: TempDir::new().unwrap() };
        let mut text = String::new();
        for number in 0..400 {
            writeln!(text, "{number} and {} make {}.", number + 1, 2 * number + 1).unwrap();
        }
        fs::write(place.path("text.txt"), text).unwrap();
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A run of the binary, not yet started.
    pub(crate) fn command(&self, stage: &str, output: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_skipgpt-export"));
        command.args(["train", stage]);
        if !more.contains(&"--model") {
            command.arg("--model").arg(tiny());
        }
        if stage == "lora" && !more.contains(&"--router") {
            command.arg("--router").arg(tiny().join("router.safetensors"));
        }
        if !more.contains(&"--text") {
            command.arg("--text").arg(self.path("text.txt"));
        }
        command.arg("--output").arg(self.path(output)).args(more);
        let own = SMALL.chunks_exact(2).filter(|pair| !more.contains(&pair[0]));
        command.args(own.flatten());
        command.current_dir(self.directory.path());
        command
    }

    /// Exit code, standard output and standard error, without the directory's path.
    fn run(&self, stage: &str, output: &str, more: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(stage, output, more).output().unwrap();
        let root = format!("{}/", self.directory.path().display());
        let text = |bytes| String::from_utf8(bytes).unwrap().replace(&root, "");
        (status.code().unwrap(), text(stdout), text(stderr))
    }

    pub(crate) fn succeeds(&self, stage: &str, output: &str, more: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(stage, output, more);
        assert_eq!(code, 0, "{stdout}\n{stderr}");
        stdout
    }

    #[track_caller]
    fn refused(&self, stage: &str, output: &str, more: &[&str], message: &str) {
        let (code, stdout, stderr) = self.run(stage, output, more);
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        assert_eq!(stderr, format!("error: {message}\n"));
    }

    pub(crate) fn metrics(&self, output: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(output).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The bytes of a finished run: its last checkpoint and its result.
    pub(crate) fn bytes(&self, output: &str, step: &str, result: &str) -> Vec<Vec<u8>> {
        let names = [
            &format!("checkpoints/step-{step}/state.safetensors"),
            &format!("checkpoints/step-{step}/state.json"),
            result,
        ];
        names.map(|name| fs::read(self.path(output).join(name)).unwrap()).to_vec()
    }

    /// Starts a run, kills it once a checkpoint is there, and resumes it to the end.
    fn kill_and_resume(&self, stage: &str, output: &str, more: &[&str], steps: &str) {
        let more = [more, &["--steps", steps, "--save-every", "5"]].concat();
        let mut command = self.command(stage, output, &more);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let checkpoint = self.path(output).join("checkpoints/step-000005");
        let started = Instant::now();
        while !checkpoint.exists() {
            assert!(started.elapsed() < Duration::from_mins(2), "no checkpoint");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success(), "the run was over before it was killed");
        self.succeeds(stage, output, &[&more[..], &["--resume"]].concat());
    }

    /// A run of `steps` steps that is killed and resumed, with `killed`, ends in the bytes of one that is
    /// not, with `whole`.
    #[track_caller]
    fn ends_in_the_same_bytes(
        &self,
        stage: &str,
        (killed, whole): (&[&str], &[&str]),
        steps: &str,
        result: &str,
    ) {
        self.kill_and_resume(stage, "killed", killed, steps);
        let whole = [whole, &["--steps", steps, "--save-every", steps]].concat();
        self.succeeds(stage, "whole", &whole);
        let bytes = |output| self.bytes(output, &format!("{steps:0>6}"), result);
        assert!(bytes("killed") == bytes("whole"));
        assert_eq!(losses(&self.metrics("killed")), losses(&self.metrics("whole")));
    }
}

/// Two windows of 32 tokens a pass, two passes a step.
const SMALL: [&str; 8] =
    ["--batch", "2", "--accumulate", "2", "--window", "32", "--eval-every", "10"];

fn losses(metrics: &[Value]) -> Vec<(u64, f64)> {
    let steps = metrics.iter().filter(|line| line["kind"] == "step");
    steps.map(|line| (line["step"].as_u64().unwrap(), line["loss"].as_f64().unwrap())).collect()
}

#[test]
fn killed_router_tuning_ends_in_the_same_bytes() {
    let given = tiny().join("router.safetensors");
    let given = ["--router", given.to_str().unwrap(), "--estimator", "reinmax"];
    let new = ["--schedule", "cosine", "--skip-from", "0.1", "--seed", "5"];
    for more in [&new[..], &given] {
        let place = Place::new();
        place.ends_in_the_same_bytes("router", (more, more), "400", "router.safetensors");
    }
}

/// A step of next to no length leaves them as they were given.
#[test]
fn routers_go_on_from_routers() {
    let place = Place::new();
    let given = tiny().join("router.safetensors");
    let router = ["--router", given.to_str().unwrap()];
    let more = ["--steps", "1", "--learning-rate", "1e-12", "--weight-decay", "0"];
    place.succeeds("router", "run", &[&router[..], &more].concat());
    let values = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut names = tensors.names();
        names.sort_unstable();
        let of = |name: &str| tensors.tensor(name).unwrap().data().to_vec();
        names.into_iter().map(|name| (name.to_owned(), of(name))).collect::<Vec<_>>()
    };
    let (given, found) = (values(&given), values(&place.path("run/router.safetensors")));
    assert!(!given.is_empty() && given.len() == found.len());
    for ((name, given), (own, found)) in given.iter().zip(&found) {
        let of = |bytes: &[u8]| -> Vec<f32> {
            let chunks = bytes.as_chunks::<4>().0.iter();
            chunks.map(|chunk| f32::from_le_bytes(*chunk)).collect()
        };
        let far =
            of(given).iter().zip(of(found)).any(|(given, found)| (given - found).abs() > 1e-9);
        assert!(name == own && !far, "{name} {own}");
    }
    let (code, _, message) =
        place.run("router", "other", &[&router[..], &["--keep-bias", "1.5"]].concat());
    assert!(code == 2 && message.contains("cannot be used with"), "{message}");
}

/// The target is one of weights, and is met in weights: of attention and MLP in other shares than of
/// modules.
#[test]
fn weights_can_be_what_is_skipped() {
    let place = Place::new();
    let given = tiny().join("router.safetensors");
    let more = ["--router", given.to_str().unwrap(), "--estimator", "reinmax", "--alpha", "64"];
    let target = ["--skip-of", "weights", "--skip", "0.4"];
    let pace = ["--steps", "80", "--learning-rate", "1e-2"];
    place.succeeds("router", "run", &[&more[..], &target, &pace].concat());
    let metrics = place.metrics("run");
    let keeps: Vec<_> = metrics.iter().filter_map(|line| line["keep"].as_f64()).collect();
    let last = &keeps[60..];
    let mean = last.iter().sum::<f64>() / last.len() as f64;
    assert!((mean - 0.6).abs() < 0.05 && last.len() == 20, "{mean}");
    let evaluation = metrics.iter().rfind(|line| line["kind"] == "evaluation").unwrap();
    let [modules, weights] =
        ["skipped", "skipped_weights"].map(|share| evaluation[share].as_f64().unwrap());
    assert!((modules - weights).abs() > 1e-3, "{modules} {weights}");
}

#[test]
fn killed_lora_tuning_ends_in_the_same_bytes() {
    let place = Place::new();
    let whole = ["--rank", "4", "--seed", "5"];
    let killed = [&whole[..], &["--recompute"]].concat();
    let result = "adapter/adapter_model.safetensors";
    place.ends_in_the_same_bytes("lora", (&killed, &whole), "300", result);
}

/// The two stages and the reader of their results; the pull towards the target works.
#[test]
fn both_stages_give_what_export_reads() {
    let place = Place::new();
    let more = ["--steps", "150", "--keep-bias", "1.5", "--pth", "--skip", "0.4"];
    let told = place.succeeds("router", "routers", &more);
    assert!(told.contains("held-out windows)\n") && told.contains("router.pth"), "{told}");
    let metrics = place.metrics("routers");
    assert_eq!(metrics[0]["kind"], "dense");
    assert!(metrics[1]["keep"].as_f64().unwrap() > 0.8);
    let last = metrics.iter().rfind(|line| line["kind"] == "step").unwrap();
    assert!((last["keep"].as_f64().unwrap() - 0.6).abs() < 0.15, "{last}");

    let router = place.path("routers/router.safetensors");
    let router = router.to_str().unwrap();
    let lora = ["--router", router, "--steps", "60", "--targets", "q,k,v,o,gate,up,down"];
    let lora = [&lora[..], &["--learning-rate", "1e-2", "--schedule", "constant"]].concat();
    place.succeeds("lora", "lora", &lora);
    let losses = losses(&place.metrics("lora"));
    assert!(losses[losses.len() - 1].1 < losses[0].1 - 0.3, "{losses:?}");

    let (model, adapter) = (tiny(), place.path("lora/adapter"));
    for router in ["routers/router.safetensors", "routers/router.pth"] {
        let read = checkpoint::read(&checkpoint::Request {
            model: Some(&model),
            router: Some(&place.path(router)),
            adapter: Some(&adapter),
            lora_alpha: None,
        });
        let read = read.unwrap();
        let attention = read.model.layers[2].attention.as_ref().unwrap();
        let lora = attention.q.lora.as_ref().unwrap();
        assert_eq!(lora.scale.to_bits(), 2.0_f64.to_bits());
    }
}

/// From training to a verified artifact.
#[test]
fn routers_of_two_layers_are_trained_and_exported() {
    let place = Place::new();
    let more = ["--steps", "40", "--router-layers", "2", "--router-width", "6", "--skip", "0.4"];
    place.succeeds("router", "routers", &more);
    let (model, router) = (tiny(), place.path("routers/router.safetensors"));
    let read = checkpoint::read(&checkpoint::Request {
        model: Some(&model),
        router: Some(&router),
        ..checkpoint::Request::default()
    });
    let hidden = read.unwrap().model.layers[1].mlp.as_ref().map(|module| match &module.routing {
        ir::Routing::Routed { source: ir::Source::Own(router), .. } => router.hidden.clone(),
        _ => None,
    });
    assert_eq!(hidden.flatten().unwrap().weight.shape()[0], 6);
    let artifact = place.path("artifact");
    let run = |arguments: &[&OsStr]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_skipgpt-export"));
        command.args(arguments).arg("--model").arg(&model).arg("--router").arg(&router);
        // ONNX Runtime is found from the project's root.
        let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["export".as_ref(), "-o".as_ref(), artifact.as_ref()]);
    run(&["verify".as_ref(), artifact.as_ref()]);

    let message =
        "--router-width is 6, and a router of one layer has no width; add --router-layers 2";
    place.refused("router", "run", &["--router-width", "6"], message);
    let more = ["--router-layers", "2", "--router-width", "0"];
    place.refused("router", "run", &more, "--router-width is 0; expected 1 or more");
    let more = ["--steps", "40", "--router-layers", "2", "--router-width", "7", "--skip", "0.4"];
    let (code, _, message) = place.run("router", "routers", &[&more[..], &["--resume"]].concat());
    assert!(
        code == 2 && message.contains("settings.stage.router.width is 6 in the run"),
        "{message}"
    );
}

/// Documents of many lengths, each apart; killed and resumed too.
#[test]
fn documents_that_stay_apart_are_padded() {
    let place = Place::new();
    let mut lines = String::new();
    for length in 1..60 {
        writeln!(lines, "{{\"body\": \"{}\"}}", "word ".repeat(length % 17 + 1)).unwrap();
    }
    let text = place.path("text.jsonl");
    fs::write(&text, lines).unwrap();
    let more = ["--text", text.to_str().unwrap(), "--text-field", "body", "--pad", "--seed", "5"];
    place.ends_in_the_same_bytes("router", (&more, &more), "200", "router.safetensors");
    let [killed, whole] = ["killed", "whole"].map(|run| {
        let last = place.metrics(run).into_iter().rfind(|line| line["kind"] == "step").unwrap();
        last["tokens"].as_u64().unwrap()
    });
    // Real tokens are counted: fewer than there is room for.
    assert!(killed == whole && whole > 200 * 4 * 10 && whole < 200 * 4 * 32, "{killed} {whole}");
}

/// The tests' model with its matrices rounded to `dtype` and stored as before.
fn rounded(place: &Place, name: &str, round: fn(f32) -> f32) -> String {
    let model = place.path(name);
    fs::create_dir(&model).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        fs::copy(tiny().join(name), model.join(name)).unwrap();
    }
    let bytes = fs::read(tiny().join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| {
            assert_eq!(tensor.dtype(), Dtype::F32);
            let values = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            let matrix = tensor.shape().len() > 1;
            let values = values.map(|value| if matrix { round(value) } else { value });
            let data: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
            (name.to_owned(), tensor.shape().to_vec(), data)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, data)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    fs::write(model.join("model.safetensors"), file).unwrap();
    model.to_str().unwrap().to_owned()
}

/// Products are those of the rounded weights, in f32.
#[test]
fn a_base_in_half_precision_is_a_rounded_base() {
    let place = Place::new();
    let f16 = |value| half::f16::from_f32(value).to_f32();
    let bf16 = |value| half::bf16::from_f32(value).to_f32();
    let bytes = |run: &str, file: &str| fs::read(place.path(run).join(file)).unwrap();
    for (dtype, round) in [("f16", f16 as fn(f32) -> f32), ("bf16", bf16)] {
        let model = rounded(&place, dtype, round);
        for (stage, file) in
            [("router", "router.safetensors"), ("lora", "adapter/adapter_model.safetensors")]
        {
            let more = ["--steps", "12", "--seed", "5", "--distill"];
            let run = |name: &str, own: &[&str]| {
                let name = format!("{stage}-{dtype}-{name}");
                place.succeeds(stage, &name, &[&more[..], own].concat());
                bytes(&name, file)
            };
            let half = run("half", &["--base-dtype", dtype]);
            assert!(half == run("rounded", &["--model", &model]), "{stage}, {dtype}");
            assert!(half != run("whole", &[]), "{stage}, {dtype}");
        }
    }
}

#[test]
fn the_last_checkpoints_are_kept() {
    let place = Place::new();
    let more = ["--steps", "12", "--save-every", "2", "--keep-checkpoints", "3"];
    place.succeeds("router", "run", &more);
    let mut kept: Vec<_> = fs::read_dir(place.path("run/checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    kept.sort();
    assert_eq!(kept, ["step-000008", "step-000010", "step-000012"]);
}

#[test]
fn numbers_that_blow_up_stop_the_run_and_name_the_batch() {
    let place = Place::new();
    let more = ["--steps", "20", "--save-every", "1", "--clip", "0", "--schedule", "constant"];
    let more = [&more[..], &["--learning-rate", "1e30"]].concat();
    let (code, _, message) = place.run("lora", "run", &more);
    assert_eq!(code, 2);
    let start = message.split(" is ").next().unwrap();
    assert!(start.starts_with("error: step ") && start.contains(": the "), "{message}");
    assert!(message.contains("; its batch begins in text.txt from byte "), "{message}");
    assert!(
        message.contains(" on; the last good checkpoint is run/checkpoints/step-0"),
        "{message}"
    );
    let good = message.trim().rsplit(' ').next().unwrap();
    assert!(place.path(good).join("state.safetensors").exists(), "{good}");
}

#[cfg(feature = "tensorboard")]
#[test]
fn event_files_lie_beside_the_metrics() {
    let place = Place::new();
    let more = ["--steps", "3", "--tensorboard"];
    place.succeeds("router", "run", &more);
    let files: Vec<_> = fs::read_dir(place.path("run/tensorboard")).unwrap().collect();
    assert_eq!(files.len(), 1);
    let bytes = fs::read(files[0].as_ref().unwrap().path()).unwrap();
    let names = |name: &str| bytes.windows(name.len()).filter(|at| *at == name.as_bytes()).count();
    assert_eq!([names("train/loss"), names("evaluation/perplexity")], [3, 1]);
}
