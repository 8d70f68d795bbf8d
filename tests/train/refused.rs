//! What `train` refuses, and how it says so.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::process::Command;
#[cfg(not(feature = "mpi"))]
use std::process::Output;

use serde_json::Value;

use super::{Place, SMALL, tiny};

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
    let message = "--window is 129; expected 2 to 128, which the model was trained for (max_position_embeddings)";
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
    for (other, difference) in [
        (["--alpha", "20"], "alpha is 8.0 in the run and 20.0 now"),
        (["--skip-of", "weights"], "skip_of is \"modules\" in the run and \"weights\" now"),
    ] {
        let message = format!("run/run.json: settings.stage.router.{difference}; {differs}");
        resume("run", &["--steps", "4", other[0], other[1]], &message);
    }
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
