//! Several processes under `mpirun`, against one.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use serde_json::Value;

use crate::train::{Place, tiny};

/// More processes than cores, by root, in a container: what tests need and users may not. Every
/// process sees all cores, so that products are summed as one process sums them.
const FLAGS: [&str; 6] =
    ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--mca", "btl"];

/// Between processes of this machine.
const TRANSPORTS: &str = "self,vader,tcp";

/// Of values after thirty steps, in which the sums of two processes were ordered otherwise than one's.
const TOLERANCE: f32 = 1e-4;

/// `command` in `processes` processes.
fn mpirun(processes: usize, command: &Command) -> Command {
    let mut all = Command::new("mpirun");
    all.args(FLAGS).args([TRANSPORTS, "-n", &processes.to_string()]);
    all.arg(command.get_program()).args(command.get_args());
    if let Some(directory) = command.get_current_dir() {
        all.current_dir(directory);
    }
    all
}

fn output(mut command: Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// The tensors of a safetensors file.
fn values(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let floats =
        |data: &[u8]| data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    tensors.iter().map(|(name, tensor)| (name.to_owned(), floats(tensor.data()))).collect()
}

/// Trains with one process and with two, and compares.
#[track_caller]
fn alike(stage: &str, result: &str, more: &[&str]) {
    let place = Place::new();
    let more = [more, &["--steps", "30", "--eval-every", "10", "--seed", "5"]].concat();
    place.succeeds(stage, "one", &more);
    let (code, stdout, stderr) = output(mpirun(2, &place.command(stage, "two", &more)));
    assert_eq!(code, 0, "{stdout}\n{stderr}");
    // One of them reports.
    assert_eq!(stdout.matches("held-out windows").count(), 1, "{stdout}");
    let close = |a: &Value, b: &Value| {
        let (a, b) = (a.as_f64().unwrap_or_default(), b.as_f64().unwrap_or_default());
        assert!((a - b).abs() <= 1e-3 * a.abs(), "{a} {b}");
    };
    let (one, two) = (place.metrics("one"), place.metrics("two"));
    assert_eq!(one.len(), two.len());
    for (one, two) in one.iter().zip(&two) {
        assert_eq!((&one["kind"], &one["step"]), (&two["kind"], &two["step"]));
        for name in ["loss", "prediction", "keep", "gradient_norm", "perplexity", "tokens"] {
            close(&one[name], &two[name]);
        }
    }
    let [one, two] = ["one", "two"].map(|run| values(&place.path(run).join(result)));
    assert!(!one.is_empty() && one.keys().eq(two.keys()));
    for (name, values) in &one {
        for (a, b) in values.iter().zip(&two[name]) {
            assert!((a - b).abs() < TOLERANCE, "{name}: {a} {b}");
        }
    }
}

#[test]
fn two_processes_tune_routers_as_one_does() {
    // Whole passes each; then one pass between them.
    alike("router", "router.safetensors", &["--batch", "1", "--accumulate", "2"]);
    alike("router", "router.safetensors", &["--batch", "3", "--accumulate", "1"]);
}

#[test]
fn two_processes_tune_an_adapter_as_one_does() {
    let more = ["--batch", "2", "--accumulate", "1", "--rank", "4"];
    alike("lora", "adapter/adapter_model.safetensors", &more);
}

#[test]
fn killed_processes_resume_to_the_same_bytes() {
    let place = Place::new();
    let more = ["--steps", "300", "--save-every", "5", "--seed", "5"];
    let mut command = mpirun(2, &place.command("router", "killed", &more));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let checkpoint = place.path("killed/checkpoints/step-000005");
    let started = Instant::now();
    while !checkpoint.exists() {
        assert!(started.elapsed() < Duration::from_mins(2), "no checkpoint");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Whoever is killed by SIGTERM takes the processes along; mpirun waits until they are gone.
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    assert!(!child.wait().unwrap().success(), "the run was over before it was killed");
    assert!(!place.path("killed/router.safetensors").exists());

    let resume = [&more[..], &["--resume"]].concat();
    for (name, more) in [("killed", &resume[..]), ("whole", &more[..])] {
        let (code, _, message) = output(mpirun(2, &place.command("router", name, more)));
        assert_eq!(code, 0, "{message}");
    }
    let bytes = |run| place.bytes(run, "000300", "router.safetensors");
    assert!(bytes("killed") == bytes("whole"));
}

#[test]
fn one_process_that_fails_stops_all_and_says_why() {
    let place = Place::new();
    // All refuse, and one says so.
    let (code, stdout, stderr) =
        output(mpirun(2, &place.command("router", "run", &["--skip", "1"])));
    assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
    let message = "error: --skip is 1; expected a share between 0 and 1, neither included\n";
    assert_eq!(stderr.matches(message).count(), 1, "{stderr}");
    assert_eq!(stderr.matches("error:").count(), 1, "{stderr}");
    // The second alone cannot read its text.
    let own = place.command("router", "run", &["--steps", "5"]);
    let other = place.command("router", "run", &["--steps", "5", "--text", "missing.txt"]);
    let mut both = mpirun(1, &own);
    both.args([":", "-n", "1"]).arg(other.get_program()).args(other.get_args());
    let started = Instant::now();
    let (code, stdout, stderr) = output(both);
    assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
    assert!(stderr.contains("error: missing.txt: cannot read: No such file"), "{stderr}");
    assert_eq!(stderr.matches("error:").count(), 1, "{stderr}");
    assert!(started.elapsed() < Duration::from_mins(1));
    // What cannot be shared is not done twice.
    let mut inspect = Command::new(env!("CARGO_BIN_EXE_skipgpt-export"));
    inspect.arg("inspect").arg("--model").arg(tiny());
    let (code, _, stderr) = output(mpirun(2, &inspect));
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("error: 2 processes were started for a command that runs in one"),
        "{stderr}"
    );
}

#[test]
fn eval_and_profile_measure_what_one_process_measures() {
    let place = Place::new();
    let (model, router) = (tiny(), tiny().join("router.safetensors"));
    let text = place.path("text.txt");
    let tasks = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/choices/sentences.jsonl");
    let command = |name: &str, more: &[&OsStr]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_skipgpt-export"));
        command.arg(name).arg("--model").arg(&model).arg("--router").arg(&router).args(more);
        command.current_dir(place.path(""));
        command
    };
    let os = OsStr::new;
    let eval = command(
        "eval",
        &[
            os("--perplexity"),
            text.as_os_str(),
            os("--choices"),
            tasks.as_os_str(),
            os("--window"),
            os("40"),
            os("--limit"),
            os("5"),
            os("--baseline"),
            os("dense,modules"),
            os("--skip"),
            os("0.3"),
            os("--calibration"),
            text.as_os_str(),
            os("--json"),
            os("-"),
        ],
    );
    let report = |processes| {
        let (code, stdout, stderr) = output(mpirun(processes, &eval));
        assert_eq!(code, 0, "{stderr}");
        serde_json::from_str::<Value>(&stdout).unwrap()
    };
    let one = report(1);
    assert_eq!(one["measured"].as_array().unwrap().len(), 3);
    assert_eq!(one, report(2));
    assert_eq!(one, report(3));
    let profile = |processes, name| {
        let more =
            ["--text".as_ref(), text.as_os_str(), os("--window"), os("40"), os("-o"), os(name)];
        let (code, stdout, stderr) = output(mpirun(processes, &command("profile", &more)));
        assert_eq!(code, 0, "{stderr}");
        assert!(!stdout.is_empty());
        fs::read(place.path(name)).unwrap()
    };
    assert!(profile(1, "one.json") == profile(2, "two.json"));
}
