//! `bench`: forced decisions and static graphs compute what they should, and a report has its fields.
//! Times are never tested.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::PathBuf;

use candle_core::{DType, Device};
use ndarray::{Array2, Array3, s};
use serde_json::Value;
use skipgpt_export::artifact::{self, Artifact};
use skipgpt_export::bench::Draws;
use skipgpt_export::decoder::{CacheEntry, Decoder, Input, Logits, Output};
use skipgpt_export::onnx::{RouterMargins, force, without};
use skipgpt_export::runtime::{OnnxDecoder, Runtime, Session, Version, session};
use skipgpt_passes::ir::{ModuleId, ModuleKind};
use tempfile::TempDir;

use crate::cli::{refused, run, succeeds, text};
use crate::oracle::{ATOL, CASES, fixture};

const DISPATCHES: [&str; 4] = ["masked", "gathered", "conditional", "auto"];

/// Artifacts of one fixture, exported as they are typed.
struct Exports {
    directory: TempDir,
    case: &'static str,
}

impl Exports {
    fn of(case: &'static str) -> Self {
        Self { directory: TempDir::new().unwrap(), case }
    }

    fn export(&self, name: &str, more: &[&str]) -> String {
        let (output, model) = (self.path(name), text(&fixture(self.case)));
        succeeds(&[&["export", "--model", &model, "--output", &output], more].concat());
        output
    }

    fn dense(&self) -> String {
        self.export("dense", &[])
    }

    fn routed(&self, dispatch: &str) -> String {
        let router = text(&fixture(self.case).join("router.safetensors"));
        self.export(dispatch, &["--router", &router, "--dispatch", dispatch])
    }

    fn path(&self, name: &str) -> String {
        text(&self.directory.path().join(name))
    }
}

fn opened(path: &str) -> Artifact {
    artifact::open(&PathBuf::from(path)).unwrap()
}

fn load(artifact: &Artifact, bytes: &[u8]) -> OnnxDecoder {
    let runtime = Runtime::find(None, Version::OLDEST).unwrap();
    let options = session::Options { threads: Some(1), ..session::Options::default() };
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
        let routers: Vec<RouterMargins> = routers
            .map(|r| RouterMargins { value: r.margins.clone(), modules: r.modules.clone() })
            .collect();
        let bytes = artifact.read("model.onnx").unwrap();
        let (bytes, inputs) = force::with_forced(&bytes, &routers).unwrap();
        Self { decoder: load(&artifact, &bytes), inputs }
    }

    /// Steps with `skips` asked for every module, row and new token.
    fn step(&mut self, input: &Input, skips: impl Fn(ModuleId, usize, usize) -> bool) -> Output {
        let (rows, sequence) = input.ids.dim();
        for place in &self.inputs {
            let shape = (rows, sequence, place.modules.len());
            let biases = Array3::from_shape_fn(shape, |(row, token, column)| {
                let skips = skips(place.modules[column], row, token);
                if skips { f32::NEG_INFINITY } else { f32::INFINITY }
            });
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
        for (row, prompt) in prompts.iter().enumerate() {
            forced.decoder.reset();
            let alone = Input::prompts(std::slice::from_ref(prompt), Logits::All);
            let output = forced.step(&alone, |module, _, s| draws.skips(module, row, s as i64));
            for (a, b) in output.logits.iter().zip(whole.logits.slice(s![row, .., ..])) {
                assert!((a - b).abs() <= ATOL, "{dispatch}, row {row}: {a}, {b}");
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

fn bench(arguments: &[&str]) -> Value {
    let json = ["--json", "-", "--threads", "1", "--rounds", "2", "--steps", "3", "--warmup", "1"];
    serde_json::from_str(&succeeds(&[&["bench"], arguments, &json].concat())).unwrap()
}

/// The lines of a workload: decisions and forced percentages.
fn lines<'a>(report: &'a Value, workload: &str) -> Vec<&'a Value> {
    let lines = report["lines"].as_array().unwrap().iter();
    lines.filter(|line| line["workload"] == workload).collect()
}

#[test]
fn a_report_has_a_line_for_everything_that_was_asked_for() {
    let exports = Exports::of("llama-gqa");
    let (dense, routed) = (exports.dense(), exports.routed("auto"));
    let csv = exports.path("report.csv");
    let workloads = "decode:2:8,prefill:12";
    let report = bench(&[
        &routed,
        "--baseline",
        &dense,
        "--workload",
        workloads,
        "--force-skip",
        "0,100",
        "--ideal",
        "--ideal-seeds",
        "2",
        "--csv",
        &csv,
    ]);
    assert_eq!((&report["rounds"], &report["text"]), (&2.into(), &false.into()));
    for workload in ["decode:2:8", "prefill:12"] {
        let lines = lines(&report, workload);
        let decisions: Vec<_> =
            lines.iter().map(|line| line["decisions"].as_str().unwrap()).collect();
        assert_eq!(decisions, ["none", "own", "drawn", "drawn"]);
        for (at, line) in lines.iter().enumerate() {
            assert!(line["ms"]["min"].as_f64().unwrap() > 0.0, "{line}");
            assert!(line["load_seconds"].as_f64().unwrap() > 0.0, "{line}");
            assert_eq!(line["speedup"].is_null(), at == 0, "{line}");
            assert_eq!(line["skips"].is_null(), at == 0, "{line}");
            assert_eq!(line["ideal"].is_null(), at == 0, "{line}");
            assert!(line["peak_memory"].as_u64().unwrap() > 1_000_000, "{line}");
        }
        // Three in each of two rounds.
        assert_eq!(lines[0]["samples"], 6);
        let [none, all] = [lines[2], lines[3]];
        assert_eq!((&none["force_skip"], &all["force_skip"]), (&0.0.into(), &100.0.into()));
        for (share, line) in [(0.0, none), (1.0, all)] {
            for kind in ["attention", "mlp", "all"] {
                assert_eq!(line["skips"]["skipped"][kind], share, "{line}");
            }
        }
        assert_eq!(none["skips"]["multiply_adds"], 0.0);
        let share = all["skips"]["multiply_adds"].as_f64().unwrap();
        assert!(share > 0.5 && share < 1.0, "{share}");
        // What never runs is the same work as what is skipped, but for the routers.
        let ideal = all["ideal"]["multiply_adds"].as_f64().unwrap();
        assert!((ideal - share).abs() < 0.02, "{ideal}, {share}");
        let bytes = all["skips"]["weight_bytes"].as_f64().unwrap();
        assert!(bytes > 0.5 && bytes < 1.0, "{bytes}");
    }
    let csv = std::fs::read_to_string(csv).unwrap();
    assert_eq!(csv.lines().count(), 9);
    assert!(csv.starts_with("workload,artifact,decisions,force_skip,ms_median,"), "{csv}");
}

#[test]
fn what_is_skipped_is_what_the_routers_decide_on_the_text() {
    let exports = Exports::of("llama-gqa");
    let routed = exports.routed("conditional");
    // One word per token.
    let words: Vec<String> = (0..320).map(|id| format!("\"w{id}\": {id}")).collect();
    let tokenizer = format!(
        "{{\"version\": \"1.0\", \"added_tokens\": [], \"normalizer\": null, \"pre_tokenizer\": \
         {{\"type\": \"WhitespaceSplit\"}}, \"post_processor\": null, \"decoder\": null, \"model\": \
         {{\"type\": \"WordLevel\", \"vocab\": {{{}}}, \"unk_token\": \"w0\"}}}}",
        words.join(", ")
    );
    std::fs::write(PathBuf::from(&routed).join("tokenizer.json"), tokenizer).unwrap();
    let ids: Vec<i64> = (0..14).map(|i| (7 * i * i + 3) % 320).collect();
    let file = exports.path("text.txt");
    let words: Vec<String> = ids.iter().map(|id| format!("w{id}")).collect();
    std::fs::write(&file, words.join(" ")).unwrap();

    let report = bench(&[&routed, "--workload", "mixed:8:6", "--text", &file, "--no-memory"]);
    assert_eq!(report["text"], true);
    let line = lines(&report, "mixed:8:6")[0];
    assert!(line["speedup"].is_null() && line["peak_memory"].is_null(), "{line}");

    let runtime = Runtime::find(None, Version::OLDEST).unwrap();
    let options = session::Options { threads: Some(1), ..session::Options::default() };
    let artifact = opened(&routed);
    let mut watched = skipgpt_export::watch::Watched::open(&artifact, &runtime, &options).unwrap();
    let routing = watched.step(&Input::prompts(&[ids], Logits::All)).unwrap().routing.unwrap();
    let skipped = routing.margins.iter().filter(|margin| **margin < 0.0).count();
    let share = skipped as f64 / routing.margins.len() as f64;
    let found = line["skips"]["skipped"]["all"].as_f64().unwrap();
    assert!((found - share).abs() < 1e-9, "{found}, {share}");

    let message = refused(&["bench", &routed, "--workload", "mixed:8:7", "--text", &file]);
    assert!(message.contains("mixed:8:7 takes 15 tokens; the text has 14"), "{message}");
}

#[test]
fn another_exporter_s_graph_is_timed_without_its_work() {
    let exports = Exports::of("llama-gqa");
    let dense = exports.dense();
    let foreign = exports.path("foreign");
    std::fs::create_dir(&foreign).unwrap();
    for name in ["model.onnx", "model.onnx.data"] {
        let from = PathBuf::from(&dense).join(name);
        std::fs::copy(from, PathBuf::from(&foreign).join(name)).unwrap();
    }
    let report =
        bench(&[&dense, "--baseline", &foreign, "--workload", "decode:1:4", "--no-memory"]);
    let lines = lines(&report, "decode:1:4");
    assert_eq!(lines[0]["decisions"], "unknown");
    assert!(lines[0]["skips"].is_null() && lines[1]["speedup"].is_object());
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    let exports = Exports::of("llama-gqa");
    let (dense, routed) = (exports.dense(), exports.routed("auto"));
    let refused = |arguments: &[&str]| {
        refused(&[&["bench", "--no-memory", "--workload", "decode:1:4"], arguments].concat())
    };
    assert!(refused(&[&routed, "--ideal"]).contains("--baseline"));
    assert!(refused(&[&dense, "--baseline", &routed, "--ideal"]).contains("without routers"));
    assert!(refused(&[&dense, "--force-skip", "40"]).contains("no routers"));
    assert!(refused(&[&routed, "--force-skip", "101"]).contains("0 to 100 percent"));
    assert!(refused(&[&routed, "--rounds", "0"]).contains("--rounds is 0; expected at least 1"));
    assert!(refused(&[&exports.path("nothing")]).contains("is not an artifact"));
    let (code, _, message) = run(&["bench", &dense, "--workload", "decode:1"]);
    assert_eq!(code, 2);
    assert!(message.contains("decode:SEQUENCES:CACHED"), "{message}");
}
