//! The training code's `model.pth`.

use std::fs;

use super::{fixture, json, run};
use tempfile::TempDir;

const CASE: &str = "oracle/llama-mha-llama3rope";

#[test]
fn base_weights_and_routers_part() {
    let place = TempDir::new().unwrap();
    let report = run(&place, |options| {
        options.input = fixture(CASE).join("model.pth");
        options.config = Some(fixture(CASE).join("config.json"));
    })
    .unwrap();
    assert_eq!((report.tensors, report.router_tensors, report.adapter_tensors), (39, 32, 0));
    for name in ["model.safetensors", "router.safetensors"] {
        let [ours, theirs] = [place.path().join("out").join(name), fixture(CASE).join(name)]
            .map(|path| fs::read(path).unwrap());
        let [ours, theirs] =
            [&ours, &theirs].map(|bytes| safetensors::SafeTensors::deserialize(bytes).unwrap());
        assert_eq!(ours.len(), theirs.len());
        for (tensor, expected) in theirs.iter() {
            assert_eq!(ours.tensor(tensor).unwrap().data(), expected.data(), "{tensor}");
        }
    }
    let config = json(&place.path().join("out"), "config.json");
    assert_eq!(config["torch_dtype"], "float32");
    assert_eq!(config["rope_scaling"]["rope_type"], "llama3");
}

#[test]
fn a_configuration_is_asked_for() {
    let place = TempDir::new().unwrap();
    let input = fixture(CASE).join("model.pth");
    let error = run(&place, |options| options.input.clone_from(&input)).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "{}: a .pth file does not state the model's configuration; name the config.json of \
             the model it was trained from with --config",
            input.display()
        )
    );
}

#[test]
fn routers_alone_are_no_model() {
    let place = TempDir::new().unwrap();
    let input = fixture("oracle/llama-gqa/router.pth");
    let error = run(&place, |options| {
        options.input.clone_from(&input);
        options.config = Some(fixture("oracle/llama-gqa/config.json"));
    })
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "{}: holds no base weights; give a file of routers to --router and one of adapters \
             to --adapter as it is",
            input.display()
        )
    );
}

/// The configuration of another model: the checkpoint reader finds out before anything appears.
#[test]
fn weights_that_do_not_fit_the_configuration_are_refused() {
    let place = TempDir::new().unwrap();
    let error = run(&place, |options| {
        options.input = fixture(CASE).join("model.pth");
        options.config = Some(fixture("oracle/llama-gqa/config.json"));
    })
    .unwrap_err();
    assert!(matches!(error, skipgpt_export::import::Error::Checkpoint { .. }), "{error}");
}
