//! `calibrate`, and weights in few bits that are searched for by what it measured.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor, safetensors};
use skipgpt_export::artifact;
use skipgpt_export::text::Tokenizer;
use tempfile::TempDir;

use crate::cli::{refused, succeeds, text};
use crate::oracle::fixture;

/// Windows, and tokens of each.
const WINDOWS: (usize, usize) = (4, 64);

fn own(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A model with a tokenizer, routers and a text.
struct Place {
    directory: TempDir,
    model: String,
    router: String,
    text: String,
}

impl Place {
    fn new() -> Self {
        let tiny = own("fixtures/training/tiny");
        Self {
            directory: TempDir::new().unwrap(),
            router: text(&tiny.join("router.safetensors")),
            model: text(&tiny),
            text: text(&own("docs/ir.md")),
        }
    }

    fn path(&self, name: &str) -> String {
        text(&self.directory.path().join(name))
    }

    /// Measures, and gives the file.
    fn calibrate(&self) -> String {
        self.calibrate_to("importance.safetensors")
    }

    fn calibrate_to(&self, name: &str) -> String {
        let output = self.path(name);
        let (windows, window) = (WINDOWS.0.to_string(), WINDOWS.1.to_string());
        let place = ["--model", &self.model, "--router", &self.router, "--text", &self.text];
        let how = ["--limit", &windows, "--window", &window, "-o", &output];
        let said = succeeds(&[&["calibrate"], &place[..], &how].concat());
        assert!(said.contains("over 256 tokens"), "{said}");
        output
    }

    fn export(&self, name: &str, more: &[&str]) -> String {
        let output = self.path(name);
        let place = ["--model", &self.model, "--router", &self.router, "-o", &output];
        succeeds(&[&["export"], &place[..], more].concat());
        output
    }
}

/// The first projections read the normed embedding: computed here from the checkpoint's own tensors.
#[test]
fn what_is_measured_is_the_mean_square_of_inputs() {
    let place = Place::new();
    let found = safetensors::load(place.calibrate(), &Device::Cpu).unwrap();
    let tensors = safetensors::load(own("fixtures/training/tiny/model.safetensors"), &Device::Cpu);
    let tensors = tensors.unwrap();
    let tokenizer = Tokenizer::open(Path::new(&place.model)).unwrap();
    let ids = tokenizer.encode(&std::fs::read_to_string(&place.text).unwrap(), false).unwrap();
    let count = WINDOWS.0 * WINDOWS.1;
    let ids = Tensor::from_iter(ids[..count].iter().map(|id| *id as u32), &Device::Cpu).unwrap();
    let x = tensors["model.embed_tokens.weight"].index_select(&ids, 0).unwrap();
    let config = std::fs::read_to_string(own("fixtures/training/tiny/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let eps = config["rms_norm_eps"].as_f64().unwrap();
    let root = (x.sqr().unwrap().mean_keepdim(1).unwrap() + eps).unwrap().sqrt().unwrap();
    let scale = &tensors["model.layers.0.input_layernorm.weight"];
    let normed = x.broadcast_div(&root).unwrap().broadcast_mul(scale).unwrap();
    let expected: Vec<f32> = normed.sqr().unwrap().mean(0).unwrap().to_vec1().unwrap();
    for projection in ["q_proj", "k_proj", "v_proj"] {
        let found = &found[&format!("model.layers.0.self_attn.{projection}.weight")];
        let found: Vec<f32> = found.to_vec1().unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= 1e-4 * expected, "{found}, {expected}");
        }
    }
    let layers = config["num_hidden_layers"].as_u64().unwrap() as usize;
    assert_eq!(found.len(), 7 * layers + 1, "every projection and the head");
}

#[test]
fn codes_are_searched_for_by_it_and_verify() {
    let place = Place::new();
    let importance = place.calibrate();
    let again = place.calibrate_to("again.safetensors");
    assert_eq!(std::fs::read(again).unwrap(), std::fs::read(&importance).unwrap());
    let few = ["--dtype", "int4", "--block-size", "16"];
    let plain = place.export("plain", &few);
    let weighed = place.export("weighed", &[&few[..], &["--importance", &importance]].concat());
    let again = place.export("again", &[&few[..], &["--importance", &importance]].concat());
    let [plain, weighed, again] =
        [plain, weighed, again].map(|path| artifact::open(Path::new(&path)).unwrap());
    let weights = |artifact: &artifact::Artifact| artifact.read("model.onnx.data").unwrap();
    assert_ne!(weights(&plain), weights(&weighed));
    assert_eq!(weights(&again), weights(&weighed));
    let names = |artifact: &artifact::Artifact| -> Vec<String> {
        artifact.manifest.inputs.iter().map(|input| input.name.clone()).collect()
    };
    assert!(names(&weighed).contains(&"importance.safetensors".to_owned()));
    assert!(!names(&plain).contains(&"importance.safetensors".to_owned()));
    let (artifact, model) = (text(&weighed.directory), &*place.model);
    let few = ["--decode-steps", "4", "--greedy-tokens", "4"];
    let verify = ["verify", &artifact, "--model", model, "--router", &place.router];
    assert!(succeeds(&[&verify[..], &few].concat()).contains("verified"));
}

#[test]
fn what_it_cannot_be_used_for_is_refused() {
    let place = Place::new();
    let importance = place.calibrate();
    let output = place.path("refused");
    let export = |model: &str, file: &str, more: &[&str]| {
        let arguments = ["export", "--model", model, "-o", &output, "--importance", file];
        refused(&[&arguments[..], more].concat())
    };
    let int4 = &["--dtype", "int4"][..];
    let use_of_it = "--importance is for --dtype int8 or int4 with --quant-method search";
    assert!(export(&place.model, &importance, &[]).contains(use_of_it));
    let nearest = [int4, &["--quant-method", "nearest"]].concat();
    assert!(export(&place.model, &importance, &nearest).contains(use_of_it));

    let other = text(&fixture("llama-gqa"));
    let message = export(&other, &importance, int4);
    assert!(message.contains("run calibrate on this"), "{message}");
    let weights = format!("{other}/model.safetensors");
    let message = export(&other, &weights, int4);
    assert!(message.contains("its metadata lacks format skipgpt-importance"), "{message}");
    let message = export(&other, &place.text, int4);
    assert!(message.contains("not the file that calibrate writes"), "{message}");
    assert!(export(&other, &place.path("nothing"), int4).contains("No such file"));

    let mut bytes = std::fs::read(&importance).unwrap();
    let end = bytes.len() - 4;
    bytes[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    let damaged = place.path("damaged.safetensors");
    std::fs::write(&damaged, bytes).unwrap();
    let message = export(&place.model, &damaged, int4);
    assert!(message.contains("holds NaN at"), "{message}");
    assert!(!Path::new(&output).exists());

    let again = ["calibrate", "--model", &place.model, "--text", &place.text, "-o", &importance];
    assert!(refused(&again).contains("already exists; --force replaces it"));
}
