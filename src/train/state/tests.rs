#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::OpenOptions;

use tempfile::TempDir;

use super::*;
use crate::train::optimizer;

fn state(value: f32) -> (Vec<Parameter>, AdamW) {
    let one = |name: &str, layer| {
        let values = vec![value, value + 0.5];
        Parameter::new(name.to_owned(), layer, &[2], values, &candle_core::Device::Cpu)
    };
    let parameters = vec![one("a", 0).unwrap(), one("b", 1).unwrap()];
    let settings = optimizer::Settings { weight_decay: 0.0, clip: None };
    let mut optimizer = AdamW::new(settings, &parameters);
    optimizer.first[1] = vec![value, -value];
    (parameters, optimizer)
}

#[test]
fn what_is_saved_is_loaded() {
    let directory = TempDir::new().unwrap();
    let store = Store::new(directory.path(), 2);
    let (parameters, optimizer) = state(3.0);
    store.save(7, &parameters, &optimizer).unwrap();
    let (found, mut moments) = state(0.0);
    assert_eq!(store.load(&found, &mut moments).unwrap(), 7);
    assert_eq!(moments, optimizer);
    assert_eq!(found[1].values().unwrap(), [3.0, 3.5]);
}

#[test]
fn a_full_disk_leaves_the_checkpoint_before() {
    let directory = TempDir::new().unwrap();
    let mut store = Store::new(directory.path(), 1);
    let (parameters, optimizer) = state(3.0);
    let good = store.save(7, &parameters, &optimizer).unwrap();
    store.open = |_| OpenOptions::new().write(true).open("/dev/full");
    let error = store.save(8, &state(4.0).0, &optimizer).unwrap_err().to_string();
    assert!(error.contains("step-000008: the disk is full: "), "{error}");
    assert_eq!(store.last(), Some(good));
    let (found, mut moments) = state(0.0);
    assert_eq!(store.load(&found, &mut moments).unwrap(), 7);
    let left: Vec<_> = fs::read_dir(directory.path().join("checkpoints")).unwrap().collect();
    assert_eq!(left.len(), 1);
}

#[test]
fn a_checkpoint_of_other_parameters_is_refused() {
    let directory = TempDir::new().unwrap();
    let store = Store::new(directory.path(), 1);
    let (mut parameters, optimizer) = state(3.0);
    let path = store.save(7, &parameters, &optimizer).unwrap().join("state.safetensors");
    parameters[1].name = "c".to_owned();
    let error = store.load(&parameters, &mut state(3.0).1).unwrap_err();
    let expected =
        format!("{}: tensor first.c is missing; the checkpoint is of another run", path.display());
    assert_eq!(error.to_string(), expected);
}
