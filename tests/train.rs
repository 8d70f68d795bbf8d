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

#[test]
fn settings_outside_their_ranges_are_refused() {
    let place = Place::new();
    let share = "a share between 0 and 1, neither included";
    for (stage, more, message) in [
        ("router", &["--skip", "1"][..], format!("--skip is 1; expected {share}")),
        ("router", &["--skip", "0"], format!("--skip is 0; expected {share}")),
        ("router", &["--tau-to", "0"], "--tau-to is 0; expected a number above 0".to_owned()),
        ("router", &["--steps", "0"], "--steps is 0; expected 1 or more".to_owned()),
        ("lora", &["--rank", "0"], "--rank is 0; expected 1 or more".to_owned()),
        ("lora", &["--dropout", "1"], "--dropout is 1; expected 0 or more and under 1".to_owned()),
    ] {
        place.refused(stage, "run", more, &message);
    }
    let message = "--window is 129; expected 2 or more, and no more than the model was trained \
                   for (max_position_embeddings)";
    place.refused("router", "run", &["--window", "129"], message);
    assert!(!place.path("run").exists());
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let place = Place::new();
    fs::write(place.path("empty.txt"), "").unwrap();
    place.refused("router", "run", &["--text", "empty.txt"], "empty.txt: holds no text");
    place.refused(
        "router",
        "run",
        &["--text", "short.txt"],
        "short.txt: cannot read: No such file or directory (os error 2)",
    );
    fs::write(place.path("short.txt"), "a few words").unwrap();
    place.refused(
        "router",
        "run",
        &["--text", "short.txt"],
        "the text has 12 tokens, 0 windows of 32; 1 are needed",
    );

    // The same weights beside the tokenizer of a larger model.
    let model = place.path("model");
    fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(tiny().join(name), model.join(name)).unwrap();
    }
    let text = fs::read_to_string(tiny().join("tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&text).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    for id in 257..300 {
        vocab.insert(format!("token{id}"), id.into());
    }
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    place.refused(
        "router",
        "run",
        &["--model", "model"],
        "model/tokenizer.json: has 300 tokens and the model 264; it is the tokenizer of another model",
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_skipgpt-export"));
    command.args(["train", "lora", "--model"]).arg(tiny()).args(SMALL);
    command.arg("--text").arg(place.path("text.txt")).arg("--output").arg(place.path("run"));
    let message = String::from_utf8(command.output().unwrap().stderr).unwrap();
    let path = tiny().display().to_string();
    let expected = format!(
        "error: {path}: has no routers; LoRA tuning needs those that router tuning gave: name them with --router\n"
    );
    assert_eq!(message, expected);
}

#[test]
fn directories_that_cannot_be_resumed_are_refused() {
    let place = Place::new();
    let more = ["--steps", "4", "--save-every", "2"];
    let resume = |output, more: &[&str], message: &str| {
        place.refused("router", output, &[more, &["--resume"]].concat(), message);
    };
    resume(
        "run",
        &more,
        "run: holds no run to continue (there is no run.json); leave --resume out to begin one",
    );
    fs::create_dir(place.path("other")).unwrap();
    fs::write(place.path("other/notes.txt"), "mine").unwrap();
    let message = "other: is not empty and holds no run; choose another directory";
    place.refused("router", "other", &more, message);
    place.succeeds("router", "run", &more);
    let message =
        "run: holds a run already; continue it with --resume, or choose another directory";
    place.refused("router", "run", &more, message);

    // Of another run: other settings, another text, another stage.
    let differs = "a run continues with what it began with";
    resume(
        "run",
        &["--steps", "4", "--alpha", "20"],
        &format!(
            "run/run.json: settings.stage.router.alpha is 8.0 in the run and 20.0 now; {differs}"
        ),
    );
    fs::write(place.path("new.txt"), "another text ".repeat(40)).unwrap();
    let (code, _, message) =
        place.run("router", "run", &["--steps", "4", "--text", "new.txt", "--resume"]);
    assert!(code == 2 && message.contains("run/run.json: text.0 is "), "{message}");

    // Damage: the checkpoint before it is left, and enough.
    let state = place.path("run/checkpoints/step-000004/state.safetensors");
    let mut bytes = fs::read(&state).unwrap();
    let good = bytes.clone();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&state, &bytes).unwrap();
    resume(
        "run",
        &more,
        "run/checkpoints/step-000004/state.safetensors: is damaged (its hash differs from the recorded one); \
         remove run/checkpoints/step-000004 to continue from the checkpoint before it",
    );
    fs::remove_dir_all(place.path("run/checkpoints/step-000004")).unwrap();
    place.succeeds("router", "run", &[&more[..], &["--resume"]].concat());
    assert!(fs::read(&state).unwrap() == good);
    fs::write(place.path("run/run.json"), "{}").unwrap();
    let (code, _, message) = place.run("router", "run", &[&more[..], &["--resume"]].concat());
    assert!(code == 2 && message.contains("run/run.json: is not the record of a run"), "{message}");
}

/// Processes that do not know of one another would do everything twice, into one directory.
#[cfg(not(feature = "mpi"))]
#[test]
fn a_build_for_one_process_refuses_several() {
    let place = Place::new();
    let mut command = place.command("router", "run", &["--steps", "1"]);
    let Output { status, stderr, .. } = command.env("OMPI_COMM_WORLD_SIZE", "2").output().unwrap();
    let expected = "error: 2 processes were started, and this build cannot share work among them; \
                    build it with --features mpi, or start one process\n";
    assert_eq!((status.code(), String::from_utf8(stderr).unwrap().as_str()), (Some(2), expected));
    assert!(!place.path("run").exists());
}

#[cfg(not(feature = "tensorboard"))]
#[test]
fn event_files_are_refused_by_a_build_that_writes_none() {
    let message = "this build does not write TensorBoard's files; build it with --features tensorboard, or leave --tensorboard out";
    Place::new().refused("router", "run", &["--tensorboard"], message);
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
