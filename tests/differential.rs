//! The reference against independent implementations: the oracle cases, candle's own Llama.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama;
use ndarray::{Array3, ArrayViewD, s};
use skipgpt_export::checkpoint::{self, Checkpoint, Request};
use skipgpt_export::decoder::{Decoder, Input, Logits, Output};
use skipgpt_export::model::Reference;
use skipgpt_passes::ir::{Dispatch, Model, ModuleKind};
use skipgpt_passes::pass;
use skipgpt_passes::plan::Plan;
use skipgpt_passes::registry::PASSES;
use skipgpt_passes::validate::validate;

use crate::oracle::{ATOL, CASES, Expected, fixture};

/// The model after each number of passes: with each dispatch, and without fused projections.
fn every_phase(imported: &Model) -> Vec<(String, Model)> {
    let mut models = vec![("imported".to_owned(), imported.clone())];
    for (dispatch, fuse) in [
        (Dispatch::Masked, true),
        (Dispatch::Gathered, true),
        (Dispatch::Conditional, true),
        (Dispatch::Conditional, false),
    ] {
        let plan = Plan {
            removed: Vec::new(),
            always: Vec::new(),
            fuse_key_value: fuse,
            fuse_gate_up: fuse,
            quantization: None,
            attention_dispatch: dispatch,
            mlp_dispatch: dispatch,
        };
        pass::run(PASSES, &mut imported.clone(), &plan, |pass, model| {
            models.push((format!("{}, {dispatch}, fused: {fuse}", pass.name()), model.clone()));
        })
        .unwrap();
    }
    models
}

/// Largest difference at the input's real positions; both `[…, batch, sequence, width]`.
fn difference(input: &Input, found: &ArrayViewD<'_, f32>, expected: &ArrayViewD<'_, f32>) -> f32 {
    assert_eq!(found.shape(), expected.shape());
    let rank = found.ndim();
    found
        .indexed_iter()
        .filter(|(index, _)| input.is_real(index[rank - 3], index[rank - 2]))
        .map(|(index, value)| (value - expected[index]).abs())
        .fold(0.0, |worst, d| if d.is_nan() { f32::INFINITY } else { worst.max(d) })
}

fn greedy(reference: &mut Reference, prompt: &[i64], steps: usize) -> Vec<i64> {
    let best =
        |output: &Output| {
            let row = output.logits.slice(s![0, -1, ..]);
            let start = (0, f32::NEG_INFINITY);
            let best = row.iter().enumerate().fold(start, |best, (token, &logit)| {
                if logit > best.1 { (token, logit) } else { best }
            });
            best.0 as i64
        };
    reference.reset();
    let mut tokens = prompt.to_vec();
    let mut input = Input::prompts(&[prompt.to_vec()], Logits::Last);
    for _ in 0..steps {
        let token = best(&reference.step(&input).unwrap());
        tokens.push(token);
        input = input.then(&[token]);
    }
    tokens
}

/// One model against what the oracle computed under `tag`.
fn compare(place: &str, model: &Model, checkpoint: &Checkpoint, expected: &Expected, tag: &str) {
    let mut reference = Reference::load(validate(model).unwrap(), &checkpoint.sources).unwrap();
    let input = expected.input();
    let (output, trace) = reference.step_traced(&input).unwrap();
    let logits = expected.floats(&format!("{tag}.logits"));
    let worst = difference(&input, &output.logits.view().into_dyn(), &logits.view());
    assert!(worst < ATOL, "{place}: logits differ by {worst}");
    let routing = output.routing.unwrap();
    if tag == "dense" {
        assert!(routing.modules.is_empty(), "{place}");
        return;
    }

    let inputs = expected.floats(&format!("{tag}.layer_inputs"));
    let worst = difference(&input, &trace.inputs.view().into_dyn(), &inputs.view());
    assert!(worst < ATOL, "{place}: layer inputs differ by {worst}");

    let layers = trace.layers.len();
    assert_eq!(routing.modules.len(), 2 * layers, "{place}");
    let keeps = [ModuleKind::Attention, ModuleKind::Mlp].map(|kind| {
        let keep = &expected.0[&format!("{tag}.keep_{kind}")];
        let values: Vec<u8> = keep.flatten_all().unwrap().to_vec1().unwrap();
        Array3::from_shape_vec(keep.dims3().unwrap(), values).unwrap()
    });
    let mut seen = [0, 0];
    for (m, id) in routing.modules.iter().enumerate() {
        let keeps = &keeps[usize::from(id.kind == ModuleKind::Mlp)];
        for (b, s) in ndarray::indices(input.ids.dim()) {
            if input.is_real(b, s) {
                let keep = keeps[[id.layer, b, s]] == 1;
                assert_eq!(routing.keeps(m, b, s), keep, "{place}: {id}, row {b}, token {s}");
                seen[usize::from(keep)] += 1;
            }
        }
    }
    assert!(seen.iter().all(|&count| count > 0), "{place}: nothing kept or nothing skipped");

    let tokens = expected.integers(&format!("{tag}.greedy")).into_raw_vec_and_offset().0;
    let prompt = 6;
    let steps = tokens.len() - prompt;
    assert_eq!(greedy(&mut reference, &tokens[..prompt], steps), tokens, "{place}");
}

#[track_caller]
fn agrees(case: &str, request: &Request<'_>, tag: &str) {
    let directory = fixture(case);
    let checkpoint = checkpoint::read(&Request { model: Some(&directory), ..*request }).unwrap();
    let expected = Expected::of(case);
    for (place, model) in every_phase(&checkpoint.model) {
        compare(&format!("{case} {tag}, {place}"), &model, &checkpoint, &expected, tag);
    }
}

/// Dense, routed and, with an adapter, both.
#[track_caller]
fn case_agrees(case: &str, has_adapter: bool) {
    let router = fixture(case).join("router.safetensors");
    let adapter = fixture(case).join("adapter");
    let routed = Request { router: Some(&router), ..Request::default() };
    agrees(case, &Request::default(), "dense");
    agrees(case, &routed, "routed");
    if has_adapter {
        agrees(case, &Request { adapter: Some(&adapter), ..routed }, "routed_lora");
    }
}

#[test]
fn the_reference_computes_what_the_oracle_computed() {
    for case in CASES {
        case_agrees(case, fixture(case).join("adapter").exists());
    }
}

/// Candle's own Llama, which gives the logits of the last token only.
struct Llama {
    model: llama::Llama,
    config: llama::Config,
}

impl Llama {
    fn load(directory: &Path) -> Self {
        let text = std::fs::read(directory.join("config.json")).unwrap();
        let config: llama::LlamaConfig = serde_json::from_slice(&text).unwrap();
        let config = config.into_config(false);
        let device = &Device::Cpu;
        let tensors =
            candle_core::safetensors::load(directory.join("model.safetensors"), device).unwrap();
        let builder = VarBuilder::from_tensors(tensors, candle_core::DType::F32, device);
        Self { model: llama::Llama::load(builder, &config).unwrap(), config }
    }

    /// The last logits after a prefill of `tokens[..first]` and after each further token.
    fn run(&self, tokens: &[i64], first: usize) -> Vec<Vec<f32>> {
        let device = &Device::Cpu;
        let dtype = candle_core::DType::F32;
        let mut cache = llama::Cache::new(true, dtype, &self.config, device).unwrap();
        let mut step = |tokens: &[i64], position| {
            let ids = Tensor::new(tokens, device).unwrap().unsqueeze(0).unwrap();
            let logits = self.model.forward(&ids, position, &mut cache).unwrap();
            logits.squeeze(0).unwrap().to_vec1().unwrap()
        };
        let mut rows = vec![step(&tokens[..first], 0)];
        rows.extend((first..tokens.len()).map(|t| step(&tokens[t..=t], t)));
        rows
    }
}

#[test]
fn candle_llama_agrees_on_dense_models() {
    for case in ["llama-gqa", "llama-mha-llama3rope"] {
        let directory = fixture(case);
        let request = Request { model: Some(&directory), ..Request::default() };
        let checkpoint = checkpoint::read(&request).unwrap();
        let validated = validate(&checkpoint.model).unwrap();
        let mut reference = Reference::load(validated, &checkpoint.sources).unwrap();
        let tokens = Expected::of(case).input().ids.row(0).to_vec();
        let all = reference
            .step(&Input::prompts(std::slice::from_ref(&tokens), Logits::All))
            .unwrap()
            .logits;
        let llama = Llama::load(&directory);
        for first in [1, 8, tokens.len()] {
            for (row, logits) in llama.run(&tokens, first).into_iter().enumerate() {
                let own = all.slice(s![0, first - 1 + row, ..]);
                let pairs = own.iter().zip(&logits);
                let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max);
                assert!(worst < ATOL, "{case}, prefill {first}, row {row}: {worst}");
            }
        }
    }
}
