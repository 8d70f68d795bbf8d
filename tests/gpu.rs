//! What the GPU round is made of, as far as it runs without a GPU.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::cli::refused;

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu").join(name)
}

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/training/tiny").join(name)
}

#[track_caller]
fn succeeds(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// Another build's device is refused by every command that has one, with what to build.
#[test]
fn a_device_that_was_not_built_is_refused() {
    if candle_core::utils::cuda_is_available() {
        return;
    }
    let (model, text) = (tiny(""), tiny("README.md"));
    let text = if text.exists() { text } else { script("run.sh") };
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let run = run.to_str().unwrap();
    let cuda = ["--device", "cuda"];
    let train = ["train", "router", "--model", model, "--text", text, "-o", run, "--window", "64"];
    let profile = ["profile", "--model", model, "--text", text, "-o", run];
    let calibrate = ["calibrate", "--model", model, "--text", text, "-o", run];
    let eval = ["eval", "--model", model, "--perplexity", text];
    for command in [&train[..], &profile, &calibrate, &eval] {
        let message = refused(&[command, &cuda].concat());
        assert!(message.contains("`make cuda`"), "{command:?}: {message}");
        assert!(!Path::new(run).exists(), "{command:?} left something");
    }
    for (more, what) in [
        (&["--pad"][..], "leave --pad out"),
        (&["--base-dtype", "f16"], "give --base-dtype bf16 or f32"),
    ] {
        let message = refused(&[&train[..], &cuda, more].concat());
        assert!(message.contains(what), "{message}");
    }
    let (router, lora) = (tiny("router.safetensors"), ["train", "lora", "--model", model]);
    let rest = ["--router", router.to_str().unwrap(), "--text", text, "-o", run, "--window", "64"];
    let message = refused(&[&lora[..], &rest, &cuda].concat());
    assert!(message.contains("give --dropout 0"), "{message}");
}

#[test]
fn parts_are_put_together_and_damage_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let (source, parts) = (folder.path().join("source"), folder.path().join("parts"));
    fs::create_dir_all(source.join("model")).unwrap();
    let bytes: Vec<u8> = (0..2_500_000_u32).map(|i| (i / 251) as u8).collect();
    fs::write(source.join("wheel.whl"), &bytes).unwrap();
    fs::write(source.join("model/config.json"), "{}").unwrap();
    let run = |arguments: &[&Path]| {
        let mut command = Command::new(script("parts.sh"));
        command.env("PART_MB", "1").args(arguments);
        command
    };
    let files = [source.join("wheel.whl"), source.join("model")];
    succeeds(&mut run(&["split".as_ref(), &parts, &files[0], &files[1]]));
    let sizes: Vec<u64> = (0..3)
        .map(|n| fs::metadata(parts.join(format!("wheel.whl.part-00{n}"))).unwrap().len())
        .collect();
    assert_eq!(sizes, [1_000_000, 1_000_000, 500_000]);
    let whole = folder.path().join("whole");
    succeeds(&mut run(&["join".as_ref(), &parts, &whole]));
    assert_eq!(fs::read(whole.join("wheel.whl")).unwrap(), bytes);
    assert_eq!(fs::read_to_string(whole.join("model/config.json")).unwrap(), "{}");
    fs::write(parts.join("wheel.whl.part-001"), &bytes[..1_000_000]).unwrap();
    let output = run(&["join".as_ref(), &parts, &folder.path().join("again")]).output().unwrap();
    assert!(!output.status.success());
    let message = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(message.contains("wheel.whl.part-001: FAILED"), "{message}");
}

/// Compiled objects get code for every card, PTX stays the first one's.
#[test]
fn the_compiler_is_told_of_further_cards() {
    let run = |arguments: &[&str]| {
        succeeds(
            Command::new(script("nvcc.sh"))
                .env("REAL_NVCC", "/bin/echo")
                .env("MORE_COMPUTE_CAPS", "90 120")
                .args(arguments),
        )
    };
    let first = "-gencode=arch=compute_80,code=sm_80";
    assert_eq!(run(&[first, "--ptx", "a.cu"]), format!("{first} --ptx a.cu\n"));
    assert_eq!(
        run(&[first, "-c", "-o", "a.o", "a.cu"]),
        format!(
            "{first} -c -o a.o a.cu -gencode=arch=compute_90,code=sm_90 \
             -gencode=arch=compute_120,code=sm_120\n"
        )
    );
}

/// The round on the processor, with a model of a few thousand parameters: every part gives one JSON
/// document, and the artifacts it makes verify. PyTorch is not asked for.
#[test]
fn the_round_runs_without_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/runtime");
    let parts = ["doctor", "train-smol", "verify-f32", "verify-bf16", "bench-decode"];
    let text = succeeds(
        Command::new(script("run.sh"))
            .env("PROVIDER", "cpu")
            .env("SMALL", "1")
            .env("ROUTER", tiny("router.safetensors"))
            .arg(env!("CARGO_BIN_EXE_skipgpt-export"))
            .args([&runtime, &tiny(""), &folder.path().join("out")])
            .args(parts),
    );
    let found: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(found.len(), parts.len());
    for (part, found) in parts.iter().zip(&found) {
        assert_eq!(found["part"], *part);
        assert_eq!((&found["exit"], &found["provider"]), (&0.into(), &"cpu".into()), "{found}");
    }
    let [doctor, training, verified, bf16, bench] = &found[..] else { unreachable!() };
    assert!(doctor["result"]["cuda"].as_array().unwrap().len() > 5, "{doctor}");
    assert!(training["result"]["tokens_per_second"].as_f64().unwrap() > 0.0, "{training}");
    for dispatch in ["masked", "gathered", "conditional"] {
        assert_eq!(verified["result"][dispatch]["passed"], true, "{verified}");
    }
    assert!(bf16["result"]["refused"].is_string(), "{bf16}");
    let lines = bench["result"]["lines"].as_array().unwrap();
    assert!(lines.len() > 8, "{bench}");
}
