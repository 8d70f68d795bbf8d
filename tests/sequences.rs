//! `--sequences one`: the same numbers without the forms for padding and batches, and a refusal of both.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use skipgpt_export::artifact;
use skipgpt_export::decoder::{Decoder, Input, Logits, Sequences};
use skipgpt_export::onnx::without;
use skipgpt_export::runtime::{OnnxDecoder, Runtime, Session, Shapes, Version, session};
use skipgpt_export::watch::Watched;
use skipgpt_passes::ir::{ModuleId, ModuleKind};
use tempfile::TempDir;

use crate::cli::{refused, succeeds, text};
use crate::logits::open;
use crate::oracle::{ATOL, CASES, fixture};

/// The models whose heads `GroupQueryAttention` takes.
fn grouped() -> impl Iterator<Item = &'static str> {
    CASES.into_iter().filter(|case| {
        let config = std::fs::read(fixture(case).join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let number = |key: &str| config[key].as_u64();
        let width = || number("hidden_size").unwrap() / number("num_attention_heads").unwrap();
        number("head_dim").unwrap_or_else(width).is_multiple_of(16)
    })
}

fn export(directory: &TempDir, case: &str, routed: bool, more: &[&str]) -> String {
    let (model, output) = (text(&fixture(case)), text(&directory.path().join("artifact")));
    let router = text(&fixture(case).join("router.safetensors"));
    let router: &[&str] = if routed { &["--router", &router] } else { &[] };
    let fixed = ["export", "--model", &model, "--output", &output, "--sequences", "one", "--force"];
    succeeds(&[&fixed, router, more].concat());
    output
}

/// Prompts, single tokens, chunks and greedy text, in every precision of weights, of each way to skip.
#[test]
fn artifacts_of_one_sequence_verify() {
    let directory = TempDir::new().unwrap();
    assert!(grouped().count() > 4);
    for case in grouped() {
        let (model, router) = (text(&fixture(case)), fixture(case).join("router.safetensors"));
        for (routed, more) in [
            (false, &[][..]),
            (false, &["--dtype", "int4", "--logits", "last"]),
            (true, &["--dispatch", "masked"]),
            (true, &["--dispatch", "gathered"]),
            (true, &["--dispatch", "conditional"]),
            (true, &["--dispatch", "conditional", "--dtype", "int8", "--logits", "last"]),
        ] {
            let exported = export(&directory, case, routed, more);
            let router = text(&router);
            let router: &[&str] = if routed { &["--router", &router] } else { &[] };
            let few = ["--decode-steps", "6", "--greedy-tokens", "6"];
            let report =
                succeeds(&[&["verify", &exported, "--model", &model], router, &few].concat());
            // Without the two cases of batches; one more for steps of one token apart.
            assert!(report.contains("verified: 6 cases"), "{case}, {more:?}: {report}");
        }
    }
}

/// What a client that opens one session runs.
#[test]
fn nothing_is_left_to_choose_but_by_decisions() {
    let directory = TempDir::new().unwrap();
    let operators = |routed, more: &[&str]| {
        let exported = export(&directory, "llama-gqa", routed, more);
        artifact::open(exported.as_ref()).unwrap().manifest.graph.unwrap().operators
    };
    let dense = operators(false, &[]);
    assert_eq!(dense["com.microsoft.GroupQueryAttention"], 4);
    for other in ["If", "com.microsoft.MultiHeadAttention", "Where", "ReduceMin"] {
        assert!(!dense.contains_key(other), "{other}");
    }
    let gathered = operators(true, &["--dispatch", "gathered"]);
    assert!(
        !gathered.contains_key("If") && !gathered.contains_key("com.microsoft.MultiHeadAttention")
    );
    let conditional = operators(true, &["--dispatch", "conditional"]);
    // All that there are kept, however many, one skipped, and some of several.
    assert_eq!(conditional["com.microsoft.GroupQueryAttention"], 2 * 4);
    assert_eq!(conditional["com.microsoft.MultiHeadAttention"], 4);
}

#[test]
fn other_sequences_are_refused() {
    let directory = TempDir::new().unwrap();
    let exported = export(&directory, "llama-gqa", true, &[]);
    let mut decoder = open(&exported);
    assert_eq!(decoder.takes(), Sequences::One);
    let message = |input: &Input, decoder: &mut Watched| {
        let error = decoder.step(input).unwrap_err();
        std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source())
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(": ")
    };
    let unequal = [vec![3, 5, 7], vec![4]];
    let found = message(&Input::prompts(&unequal, Logits::All), &mut decoder);
    assert!(found.contains("2 sequences of which 1 are padded"), "{found}");
    assert!(found.contains("--sequences any"), "{found}");
    let mut padded = Input::row(0, &[3, 5, 7], Logits::All);
    padded.mask[[0, 0]] = 0;
    let found = message(&padded, &mut decoder);
    assert!(found.contains("1 sequences of which 1 are padded"), "{found}");

    let manifest = artifact::open(exported.as_ref()).unwrap().manifest;
    assert_eq!(manifest.options.sequences, Sequences::One);
    let card = std::fs::read_to_string(format!("{exported}/README.md")).unwrap();
    assert!(card.contains("one sequence at a time"), "{card}");

    let bench = ["bench", &exported, "--workload", "decode:1:8,decode:4:8", "--no-memory"];
    let found = refused(&bench);
    let expected = format!(
        "decode:4:8: {exported} takes one sequence at a time; export it with --sequences any"
    );
    assert!(found.contains(&expected), "{found}");
}

/// A batch that the session fixes is none of the artifact's.
#[test]
fn a_padded_row_enters_a_session_for_one_token() {
    let directory = TempDir::new().unwrap();
    let (model, output) = (text(&fixture("llama-gqa")), text(&directory.path().join("any")));
    succeeds(&["export", "--model", &model, "--output", &output]);
    let runtime = Runtime::find(None, Version::OLDEST).unwrap();
    let options = session::Options { shapes: Shapes::OneEach(1), ..session::Options::default() };
    let path = directory.path().join("any/model.onnx");
    let session = Session::open(&runtime, &path, &options).unwrap();
    let mut decoder = OnnxDecoder::new(session, Vec::new()).unwrap();
    assert_eq!(decoder.takes(), Sequences::Any);
    let mut padding = Input::row(0, &[3], Logits::All);
    padding.mask[[0, 0]] = 0;
    decoder.step(&padding).unwrap();
    decoder.step(&padding.then(&[5])).unwrap();
}

#[test]
fn where_it_saves_no_form_it_is_refused() {
    let directory = TempDir::new().unwrap();
    let (model, output) = (text(&fixture("llama-gqa")), text(&directory.path().join("none")));
    let fixed = ["export", "--model", &model, "--output", &output, "--sequences", "one"];
    for (more, expected) in [
        (["--attention", "decomposed"], "decomposed in f32: leave --sequences one out"),
        (["--dtype", "f16"], "decomposed in f16: leave --sequences one out"),
        (["--format", "safetensors"], "--sequences one: --format safetensors holds no graph"),
    ] {
        let message = refused(&[&fixed[..], &more].concat());
        assert!(message.contains(expected), "{message}");
    }
}

/// Modules can be taken from such a graph too: keys and values of removed attention stay what they were.
#[test]
fn a_static_graph_of_one_sequence_keeps_its_caches() {
    let directory = TempDir::new().unwrap();
    for case in ["llama-gqa", "qwen2-bias"] {
        let exported = export(&directory, case, false, &[]);
        let artifact = artifact::open(exported.as_ref()).unwrap();
        let bytes = artifact.read("model.onnx").unwrap();
        let runtime = Runtime::find(None, Version::OLDEST).unwrap();
        let options = session::Options { threads: Some(1), ..session::Options::default() };
        let caches = |bytes: &[u8]| {
            let session = Session::from_bytes(&runtime, bytes, &artifact.directory, &options);
            let mut decoder = OnnxDecoder::new(session.unwrap(), Vec::new()).unwrap();
            let prompt = Input::row(0, &[3, 9, 4, 11], Logits::All);
            decoder.step(&prompt).unwrap();
            decoder.step(&prompt.then(&[5])).unwrap();
            decoder.cache().unwrap()
        };
        // The last layer's attention changes no cache but by what it appends.
        let last = artifact.manifest.model.num_hidden_layers - 1;
        let removed = BTreeSet::from([ModuleId { layer: last, kind: ModuleKind::Attention }]);
        let (whole, narrowed) =
            (caches(&bytes), caches(&without::without(&bytes, &removed).unwrap()));
        assert_eq!(whole.len(), narrowed.len());
        for (a, b) in whole.iter().zip(&narrowed) {
            for (a, b) in [(&a.key, &b.key), (&a.value, &b.value)] {
                let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max);
                assert!(a.dim() == b.dim() && worst <= ATOL, "{case}: {worst}");
            }
        }
    }
}
