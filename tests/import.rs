//! GGUF and `.pth` files become checkpoints, or are refused by name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad;
mod good;
mod pth;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use skipgpt_export::import::{Error, Options, Report, import};
use tempfile::TempDir;

/// Every model among the fixtures.
const MODELS: [&str; 5] = ["llama", "llama3", "mistral", "qwen2", "qwen3"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn gguf(name: &str) -> PathBuf {
    fixture("gguf").join(format!("{name}.gguf"))
}

/// Imports into `place/out`, and checks that nothing but the output appears or remains.
fn run(place: &TempDir, change: impl FnOnce(&mut Options)) -> Result<Report, Error> {
    let output = place.path().join("out");
    let mut options = Options::new("", &output);
    change(&mut options);
    let existed = output.exists();
    let result = import(&options, &mut |_, _| ControlFlow::Continue(()));
    let left: Vec<_> = fs::read_dir(place.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().contains("partial"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(output.exists(), existed || result.is_ok());
    result
}

/// The directory that the fixture `name` becomes.
fn imported(name: &str) -> TempDir {
    let place = TempDir::new().unwrap();
    run(&place, |options| options.input = gguf(name)).unwrap();
    place
}

fn json(directory: &Path, name: &str) -> serde_json::Value {
    serde_json::from_slice(&fs::read(directory.join(name)).unwrap()).unwrap()
}
