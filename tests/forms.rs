//! A graph's forms compute the same for steps of every kind, whatever is kept: with decisions from outside, as static
//! graphs, with caches of either kind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::PathBuf;

use candle_core::{DType, Device};
use ndarray::{Array2, s};
use skipgpt_export::artifact::{self, Artifact};
use skipgpt_export::bench::Draws;
use skipgpt_export::decoder::{CacheEntry, Decoder, Input, Logits, Output};
use skipgpt_export::onnx::{RouterMargins, force, without};
use skipgpt_export::runtime::{OnnxDecoder, Runtime, Session, Shapes, Version, session};
use skipgpt_passes::ir::{ModuleId, ModuleKind};
use tempfile::TempDir;

use crate::cli::{refused, succeeds, text};
use crate::oracle::{ATOL, CASES, fixture};

const DISPATCHES: [&str; 4] = ["masked", "gathered", "conditional", "auto"];

/// Artifacts of one fixture, exported as they are typed.
pub(crate) struct Exports {
    directory: TempDir,
    case: &'static str,
}

impl Exports {
    pub(crate) fn of(case: &'static str) -> Self {
        Self { directory: TempDir::new().unwrap(), case }
    }

    fn export(&self, name: &str, more: &[&str]) -> String {
        let (output, model) = (self.path(name), text(&fixture(self.case)));
        succeeds(&[&["export", "--model", &model, "--output", &output], more].concat());
        output
    }

    pub(crate) fn dense(&self) -> String {
        self.export("dense", &[])
    }

    pub(crate) fn routed(&self, dispatch: &str) -> String {
        let router = text(&fixture(self.case).join("router.safetensors"));
        self.export(dispatch, &["--router", &router, "--dispatch", dispatch])
    }

    pub(crate) fn path(&self, name: &str) -> String {
        text(&self.directory.path().join(name))
    }
}

pub(crate) fn opened(path: &str) -> Artifact {
    artifact::open(&PathBuf::from(path)).unwrap()
}

fn load(artifact: &Artifact, bytes: &[u8]) -> OnnxDecoder {
    load_for(Shapes::Any, artifact, bytes)
}

fn load_for(shapes: Shapes, artifact: &Artifact, bytes: &[u8]) -> OnnxDecoder {
    let runtime = Runtime::find(None, Version::OLDEST).unwrap();
    let options = session::Options { threads: Some(1), shapes, ..session::Options::default() };
    let session = Session::from_bytes(&runtime, bytes, &artifact.directory, &options).unwrap();
    OnnxDecoder::new(session, Vec::new()).unwrap()
}

/// A routed artifact whose decisions are inputs.
struct Forced {
    decoder: OnnxDecoder,
    inputs: Vec<force::Input>,
}

impl Forced {
    fn open(path: &str) -> Self {
        let artifact = opened(path);
        let routers = artifact.manifest.routing.routers.iter();
        let routers: Vec<_> = routers.map(RouterMargins::from).collect();
        let bytes = artifact.read("model.onnx").unwrap();
        let (bytes, inputs) = force::with_forced(&bytes, &routers).unwrap();
        Self { decoder: load(&artifact, &bytes), inputs }
    }

    /// Steps with `skips` asked for every module, row and new token.
    fn step(&mut self, input: &Input, skips: impl Fn(ModuleId, usize, usize) -> bool) -> Output {
        let (rows, sequence) = input.ids.dim();
        for place in &self.inputs {
            let skips = |column: usize, row, token| skips(place.modules[column], row, token);
            let biases = place.biases((rows, sequence), skips);
            self.decoder.force(&place.name, &biases).unwrap();
        }
        self.decoder.step(input).unwrap()
    }
}

/// The artifact as it is on the disk.
fn opened_with(path: &str) -> OnnxDecoder {
    let artifact = opened(path);
    load(&artifact, &artifact.read("model.onnx").unwrap())
}

fn removed(path: &str, modules: &BTreeSet<ModuleId>) -> OnnxDecoder {
    let artifact = opened(path);
    let bytes = artifact.read("model.onnx").unwrap();
    load(&artifact, &without::without(&bytes, modules).unwrap())
}

/// A padded prompt, then a step.
fn inputs() -> [Input; 2] {
    let prompts = [vec![5, 17, 120, 3, 77, 9], vec![1, 90, 44, 8]];
    let first = Input::prompts(&prompts, Logits::All);
    let second = first.then(&[12, 66]);
    [first, second]
}

fn check(place: &str, input: &Input, a: &Output, b: &Output) {
    assert_eq!(a.logits.dim(), b.logits.dim(), "{place}");
    for ((row, s, v), logit) in a.logits.indexed_iter() {
        let difference = (logit - b.logits[[row, s, v]]).abs();
        let real = input.is_real(row, s);
        assert!(!real || difference <= ATOL, "{place}: logit [{row}, {s}, {v}]: {difference}");
    }
}

fn check_caches(place: &str, input: &Input, a: &[CacheEntry], b: &[CacheEntry]) {
    assert_eq!(a.len(), b.len(), "{place}");
    for (a, b) in a.iter().zip(b) {
        assert_eq!(a.layer, b.layer, "{place}");
        for (one, other) in [(&a.key, &b.key), (&a.value, &b.value)] {
            assert_eq!(one.dim(), other.dim(), "{place}");
            for ((row, h, t, d), x) in one.indexed_iter() {
                let difference = (x - other[[row, h, t, d]]).abs();
                let real = input.mask[[row, t]] == 1;
                assert!(!real || difference <= ATOL, "{place}: cache {} at {t}", a.layer);
            }
        }
    }
}

#[test]
fn all_kept_is_the_dense_model() {
    for case in CASES {
        let exports = Exports::of(case);
        let mut dense = removed(&exports.dense(), &BTreeSet::new());
        let [first, second] = inputs();
        let expected = [dense.step(&first).unwrap(), dense.step(&second).unwrap()];
        for dispatch in DISPATCHES {
            let mut forced = Forced::open(&exports.routed(dispatch));
            for (input, expected) in [&first, &second].into_iter().zip(&expected) {
                let output = forced.step(input, |_, _, _| false);
                check(&format!("{case}, {dispatch}"), input, &output, expected);
            }
            let (a, b) = (forced.decoder.cache().unwrap(), dense.cache().unwrap());
            check_caches(&format!("{case}, {dispatch}"), &second, &a, &b);
        }
    }
}

#[test]
fn all_skipped_is_the_embedding_normed_and_projected() {
    let exports = Exports::of("llama-gqa");
    let path = fixture("llama-gqa").join("model.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let tensor = |name: &str| tensors[name].to_dtype(DType::F32).unwrap();
    let embedding = tensor("model.embed_tokens.weight").to_vec2::<f32>().unwrap();
    let scale = tensor("model.norm.weight").to_vec1::<f32>().unwrap();
    let logits = |token: i64| -> Vec<f32> {
        let x = &embedding[token as usize];
        let mean = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
        let normed: Vec<f32> =
            x.iter().zip(&scale).map(|(v, s)| v / (mean + 1e-5).sqrt() * s).collect();
        let dot = |row: &Vec<f32>| row.iter().zip(&normed).map(|(a, b)| a * b).sum();
        embedding.iter().map(dot).collect()
    };
    let [input, _] = inputs();
    let dense = exports.dense();
    let all: BTreeSet<ModuleId> = (0..4).flat_map(both).collect();
    let mut outputs = vec![removed(&dense, &all).step(&input).unwrap()];
    for dispatch in DISPATCHES {
        outputs.push(Forced::open(&exports.routed(dispatch)).step(&input, |_, _, _| true));
    }
    for output in outputs {
        for ((row, s), token) in input.ids.indexed_iter() {
            for (found, expected) in output.logits.slice(s![row, s, ..]).iter().zip(logits(*token))
            {
                assert!((found - expected).abs() <= ATOL, "[{row}, {s}]: {found}, {expected}");
            }
        }
    }
}

fn both(layer: usize) -> [ModuleId; 2] {
    [ModuleKind::Attention, ModuleKind::Mlp].map(|kind| ModuleId { layer, kind })
}

/// The same modules skipped for every token, and never run at all.
#[test]
fn a_static_graph_is_the_routed_one_with_its_decisions() {
    for case in CASES {
        let exports = Exports::of(case);
        let dense = exports.dense();
        for (number, dispatch) in DISPATCHES.into_iter().enumerate() {
            let mut forced = Forced::open(&exports.routed(dispatch));
            let routed = forced.inputs.iter().flat_map(|input| input.modules.clone());
            // Every module in some of the four, none in all of them.
            let chosen: BTreeSet<ModuleId> = routed
                .filter(|m| {
                    let place = 2 * m.layer + usize::from(m.kind == ModuleKind::Mlp);
                    (place + number).is_multiple_of(3) || place % 4 == number
                })
                .collect();
            assert!(!chosen.is_empty());
            let mut ideal = removed(&dense, &chosen);
            let place = format!("{case}, {dispatch}, without {chosen:?}");
            for input in inputs() {
                let output = forced.step(&input, |module, _, _| chosen.contains(&module));
                check(&place, &input, &output, &ideal.step(&input).unwrap());
            }
            let (a, b) = (forced.decoder.cache().unwrap(), ideal.cache().unwrap());
            check_caches(&place, &inputs()[1], &a, &b);
        }
    }
}

/// Decisions that differ between the tokens of a batch are each token's own: a row alone gives the
/// same.
#[test]
fn decisions_are_forced_token_by_token() {
    let exports = Exports::of("llama-gqa");
    let draws = Draws { seed: 3, skip: 0.4, fixed: false };
    let prompts = [vec![5, 17, 200, 3], vec![1, 300, 44, 8]];
    let together = Input::prompts(&prompts, Logits::All);
    for dispatch in DISPATCHES {
        let path = exports.routed(dispatch);
        let mut forced = Forced::open(&path);
        let whole = forced.step(&together, |module, row, s| draws.skips(module, row, s as i64));
        // Of one token in each row: some modules skip both, one of them, or none.
        let next = together.then(&[9, 9]);
        let next_of_each = forced.step(&next, |module, row, _| draws.skips(module, row, 4));
        for (row, prompt) in prompts.iter().enumerate() {
            forced.decoder.reset();
            let alone = Input::prompts(std::slice::from_ref(prompt), Logits::All);
            let output = forced.step(&alone, |module, _, s| draws.skips(module, row, s as i64));
            let next = forced.step(&alone.then(&[9]), |module, _, _| draws.skips(module, row, 4));
            let both = [(output, &whole), (next, &next_of_each)];
            for (alone, together) in both {
                for (a, b) in alone.logits.iter().zip(together.logits.slice(s![row, .., ..])) {
                    assert!((a - b).abs() <= ATOL, "{dispatch}, row {row}: {a}, {b}");
                }
            }
        }
    }
}

#[test]
fn biases_must_be_given_for_every_token() {
    let exports = Exports::of("llama-gqa");
    let mut forced = Forced::open(&exports.routed("auto"));
    let [first, second] = inputs();
    let error = forced.decoder.step(&first).unwrap_err().to_string();
    let expected = "the graph's forced.layers.0 takes biases for tokens [2, 6] [batch, sequence]; it was given those of [0, 0]";
    assert_eq!(error, expected);
    forced.step(&first, |_, _, _| false);
    let error = forced.decoder.step(&second).unwrap_err().to_string();
    assert!(
        error.contains("for tokens [2, 1] [batch, sequence]; it was given those of [2, 6]"),
        "{error}"
    );
}

/// A cache that was taken out and put back goes on as it would have.
#[test]
fn a_cache_can_be_put_back() {
    let exports = Exports::of("llama-gqa");
    let dense = exports.dense();
    let [first, second] = inputs();
    let mut decoder = removed(&dense, &BTreeSet::new());
    decoder.advance(&first).unwrap();
    let cache = decoder.cache().unwrap();
    let expected = decoder.step(&second).unwrap();
    let mut other = removed(&dense, &BTreeSet::new());
    other.restore(cache.iter().cloned()).unwrap();
    assert_eq!(other.step(&second).unwrap().logits, expected.logits);
    let error = other.restore(cache.into_iter().skip(1)).unwrap_err().to_string();
    assert_eq!(error, "a cache of 3 layers does not fit the graph, which has 4");
}

/// A padded prompt, single tokens, a chunk on top of them, and more tokens than were announced.
fn steps() -> Vec<Input> {
    let [first, second] = inputs();
    let third = second.then(&[3, 9]);
    let (mut chunk, rows) = (third.clone(), third.batch());
    chunk.ids = Array2::from_shape_fn((rows, 3), |(b, s)| (7 + 5 * b + s) as i64);
    let ones = Array2::ones((rows, 3));
    chunk.mask = ndarray::concatenate![ndarray::Axis(1), third.mask, ones];
    let before = third.positions.clone();
    chunk.positions = Array2::from_shape_fn((rows, 3), |(b, s)| before[[b, 0]] + 1 + s as i64);
    chunk.logits = Logits::All;
    let fifth = chunk.then(&[21, 22]);
    let sixth = fifth.then(&[23, 24]);
    vec![first, second, third, chunk, fifth, sixth]
}

#[test]
fn one_buffer_for_past_and_present_is_the_same_cache() {
    for case in ["llama-gqa", "qwen3-head-norm"] {
        let exports = Exports::of(case);
        let paths =
            [vec![exports.dense()], DISPATCHES.map(|d| exports.routed(d)).to_vec()].concat();
        for path in paths {
            let (mut growing, mut shared) = (removed(&path, &BTreeSet::new()), opened_with(&path));
            // The last two steps hold more than was announced.
            shared.reserve(11);
            for (index, input) in steps().iter().enumerate() {
                let place = format!("{case}, {path}, step {index}");
                let (a, b) = (growing.step(input).unwrap(), shared.step(input).unwrap());
                check(&place, input, &b, &a);
                let caches = (shared.cache().unwrap(), growing.cache().unwrap());
                check_caches(&place, input, &caches.0, &caches.1);
            }
        }
    }
}

#[test]
fn a_cache_that_grew_moves_into_a_buffer() {
    let exports = Exports::of("llama-gqa");
    let path = exports.dense();
    let (mut growing, mut moved) = (opened_with(&path), opened_with(&path));
    for (index, input) in steps().iter().take(5).enumerate() {
        if index == 2 {
            moved.reserve(32);
        }
        let (a, b) = (growing.step(input).unwrap(), moved.step(input).unwrap());
        check(&format!("step {index}"), input, &b, &a);
        let caches = (moved.cache().unwrap(), growing.cache().unwrap());
        check_caches(&format!("step {index}"), input, &caches.0, &caches.1);
    }
}

#[test]
fn attention_by_elementary_operators_is_the_same() {
    let exports = Exports::of("llama-gqa");
    let router = text(&fixture("llama-gqa").join("router.safetensors"));
    for dispatch in DISPATCHES {
        let grouped = exports.routed(dispatch);
        let more = ["--router", &router, "--dispatch", dispatch, "--attention", "decomposed"];
        let decomposed = exports.export(&format!("{dispatch}-decomposed"), &more);
        let kinds = [&grouped, &decomposed].map(|path| {
            let operators = opened(path).manifest.graph.unwrap().operators;
            operators.contains_key("com.microsoft.GroupQueryAttention")
        });
        assert_eq!(kinds, [true, false], "{dispatch}");
        let (mut a, mut b) = (opened_with(&grouped), opened_with(&decomposed));
        for (index, input) in steps().iter().enumerate() {
            let place = format!("{dispatch}, step {index}");
            check(&place, input, &a.step(input).unwrap(), &b.step(input).unwrap());
            check_caches(&place, input, &a.cache().unwrap(), &b.cache().unwrap());
        }
    }
    let model = text(&fixture("mistral-wide-heads"));
    let output = exports.path("refused");
    let arguments = ["export", "--model", &model, "--output", &output, "--attention", "grouped"];
    assert!(refused(&arguments).contains("this model's head_dim is 22"));
}

/// Routers of zeros leave every margin at 0.
#[test]
fn a_tie_keeps() {
    let exports = Exports::of("llama-gqa");
    let router = fixture("llama-gqa").join("router.safetensors");
    let tensors = candle_core::safetensors::load(router, &Device::Cpu).unwrap();
    let zeros = tensors.iter().map(|(name, tensor)| (name, tensor.zeros_like().unwrap())).collect();
    let ties = exports.path("ties.safetensors");
    candle_core::safetensors::save(&zeros, &ties).unwrap();
    let mut dense = opened_with(&exports.dense());
    let expected: Vec<Output> = steps().iter().map(|step| dense.step(step).unwrap()).collect();
    for dispatch in DISPATCHES {
        let path = exports.export(dispatch, &["--router", &ties, "--dispatch", dispatch]);
        let mut routed = opened_with(&path);
        for (index, (step, expected)) in steps().iter().zip(&expected).enumerate() {
            check(
                &format!("{dispatch}, step {index}"),
                step,
                &routed.step(step).unwrap(),
                expected,
            );
        }
    }
}

/// A session that knows how many sequences there are lacks the other forms.
#[test]
fn a_session_for_a_token_in_each_sequence_is_the_same() {
    let exports = Exports::of("llama-gqa");
    let [first, second] = inputs();
    let paths = [vec![exports.dense()], DISPATCHES.map(|d| exports.routed(d)).to_vec()].concat();
    for path in paths {
        let artifact = opened(&path);
        let bytes = artifact.read("model.onnx").unwrap();
        let mut any = load(&artifact, &bytes);
        any.advance(&first).unwrap();
        let mut of_two = load_for(Shapes::OneEach(2), &artifact, &bytes);
        of_two.restore(any.cache().unwrap()).unwrap();
        for input in [second.clone(), second.then(&[7, 8])] {
            check(&path, &input, &of_two.step(&input).unwrap(), &any.step(&input).unwrap());
            check_caches(&path, &input, &of_two.cache().unwrap(), &any.cache().unwrap());
        }
    }
}
