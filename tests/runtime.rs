//! ONNX Runtime itself: found, loaded, and running a decoder small enough to compute by hand.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use ndarray::{Array2, Array3, Array4, array};
use skipgpt_export::decoder::{Decoder, Input, Logits, Peek};
use skipgpt_export::generate;
use skipgpt_export::runtime::decoder::Error;
use skipgpt_export::runtime::{
    self, CacheFacts, OnnxDecoder, Optimization, Options, Provider, Rejection, Runtime, Search,
    Session, Version, session,
};
use skipgpt_passes::ir::{ModuleId, ModuleKind};

use self::graph::{Tiny, VOCAB, WEIGHTS, embedding, head};

mod graph;

fn loaded() -> Runtime {
    Runtime::find(None, Version::OLDEST)
        .unwrap_or_else(|error| panic!("{error}\nor, for this project's tests: make runtime"))
}

fn open(tiny: Tiny, options: &Options) -> Session {
    let (bytes, _) = tiny.bytes();
    Session::from_bytes(&loaded(), &bytes, Path::new("."), options).unwrap()
}

fn decoder(tiny: Tiny) -> OnnxDecoder {
    OnnxDecoder::new(open(tiny, &Options::default()), Vec::new()).unwrap()
}

fn modules() -> Vec<ModuleId> {
    let module = |kind| ModuleId { layer: 3, kind };
    vec![module(ModuleKind::Attention), module(ModuleKind::Mlp)]
}

/// The logits of `ids` where `before`, of which `real` counts, is cached.
fn expected(before: &[(i64, bool)], ids: &[i64], real: &[bool]) -> Array2<f32> {
    let new = ids.iter().copied().zip(real.iter().copied());
    let history = before.iter().copied().chain(new).filter(|(_, real)| *real);
    let sum = history.fold([0.0, 0.0], |sum: [f32; 2], (id, _)| {
        let [a, b] = embedding(id);
        [sum[0] + a, sum[1] + b]
    });
    Array2::from_shape_fn((ids.len(), VOCAB), |(s, v)| {
        let ([a, b], [x, y]) = (embedding(ids[s]), head(v));
        (a + sum[0]) * x + (b + sum[1]) * y
    })
}

#[test]
fn peeking_leaves_the_cache_as_it_was() {
    let mut decoder = decoder(Tiny::Plain);
    decoder.peek(&Input::prompts(&[vec![1], vec![2]], Logits::All)).unwrap();
    assert_eq!(decoder.cache().unwrap(), []);
    decoder.step(&Input::row(0, &[5, 1, 2], Logits::Last)).unwrap();
    let cache = decoder.cache().unwrap();
    let before = [(5, true), (1, true), (2, true)];
    for rest in [&[3_i64, 4, 7][..], &[6], &[3, 4]] {
        let output = decoder.peek(&Input::row(3, rest, Logits::All)).unwrap();
        let expected = expected(&before, rest, &vec![true; rest.len()]);
        assert_eq!(output.logits.index_axis(ndarray::Axis(0), 0), expected);
        assert_eq!(decoder.cache().unwrap(), cache);
    }
}

#[test]
fn prefill_chunks_and_steps_share_one_cache() {
    let mut decoder = decoder(Tiny::Plain);
    assert_eq!(decoder.vocab_size(), VOCAB);
    assert_eq!(decoder.cache().unwrap(), []);

    let first = Input::prompts(&[vec![5, 1, 2], vec![7]], Logits::All);
    let output = decoder.step(&first).unwrap();
    assert_eq!(
        output.logits.index_axis(ndarray::Axis(0), 0),
        expected(&[], &[5, 1, 2], &[true; 3])
    );
    let padded = [(0, false), (0, false), (7, true)];
    assert_eq!(
        output.logits.index_axis(ndarray::Axis(0), 1),
        expected(&padded[..0], &[0, 0, 7], &[false, false, true])
    );
    assert_eq!(output.routing, None);

    // A chunk of two tokens, then one.
    let chunk = Input {
        ids: array![[3, 4], [6, 5]],
        mask: array![[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]],
        positions: array![[3, 4], [1, 2]],
        logits: Logits::Last,
    };
    let output = decoder.step(&chunk).unwrap();
    assert_eq!(output.logits.dim(), (2, 1, VOCAB));
    let whole = expected(&[(5, true), (1, true), (2, true)], &[3, 4], &[true; 2]);
    assert_eq!(output.logits.slice(ndarray::s![0, 0, ..]), whole.row(1));
    let whole = expected(&padded, &[6, 5], &[true; 2]);
    assert_eq!(output.logits.slice(ndarray::s![1, 0, ..]), whole.row(1));
    decoder.step(&chunk.then(&[1, 2])).unwrap();

    let cache = decoder.cache().unwrap();
    assert_eq!(cache.len(), 1);
    assert_eq!(cache[0].layer, 3);
    let rows = [[5, 1, 2, 3, 4, 1], [0, 0, 7, 6, 5, 2]];
    for (factor, half) in [(1.0, &cache[0].key), (2.0, &cache[0].value)] {
        let expected =
            Array4::from_shape_fn((2, 1, 6, 2), |(b, _, t, d)| factor * embedding(rows[b][t])[d]);
        assert_eq!(half, expected);
    }

    decoder.reset();
    assert_eq!(decoder.cache().unwrap(), []);
    let again = decoder.step(&Input::prompts(&[vec![4]], Logits::All)).unwrap();
    assert_eq!(again.logits.index_axis(ndarray::Axis(0), 0), expected(&[], &[4], &[true]));
}

#[test]
fn routing_comes_with_its_modules() {
    let session = open(Tiny::Routing, &Options::default());
    let mut decoder = OnnxDecoder::new(session, modules()).unwrap();
    let output = decoder.step(&Input::prompts(&[vec![5, 1, 2]], Logits::All)).unwrap();
    let routing = output.routing.unwrap();
    assert_eq!(routing.modules, modules());
    assert_eq!(routing.margins, array![[[-1.5, -0.5, 0.5]], [[1.5, 0.5, -0.5]]]);
}

#[test]
fn routing_of_other_modules_is_refused() {
    let refused = |tiny, modules| {
        let session = open(tiny, &Options::default());
        OnnxDecoder::new(session, modules).unwrap_err().to_string()
    };
    assert_eq!(refused(Tiny::Plain, modules()), "the graph has no output routing_margins");
    for modules in [modules()[..1].to_vec(), Vec::new()] {
        let expected = format!("expected a float tensor [{}, batch, sequence]", modules.len());
        let message = refused(Tiny::Routing, modules);
        assert!(message.contains("routing_margins") && message.ends_with(&expected), "{message}");
    }
}

#[test]
fn other_outputs_come_on_request() {
    let mut decoder = decoder(Tiny::Plain);
    let input = Input::prompts(&[vec![1, 2]], Logits::All);
    let (_, extra) = decoder.step_with(&input, &["layers.3.output"]).unwrap();
    assert_eq!(extra, [array![[[4.0, 0.75], [5.0, 1.125]]].into_dyn()]);
    let error = decoder.step_with(&input.then(&[1]), &["layers.9.output"]).unwrap_err();
    assert_eq!(error.to_string(), "the graph has no output layers.9.output");
}

#[test]
fn half_precision_runs_the_same() {
    let mut decoder = decoder(Tiny::Half);
    let input = Input::prompts(&[vec![5, 1, 2]], Logits::All);
    let logits = decoder.step(&input).unwrap().logits;
    assert_eq!(logits.index_axis(ndarray::Axis(0), 0), expected(&[], &[5, 1, 2], &[true; 3]));
    decoder.step(&input.then(&[3])).unwrap();
    assert_eq!(decoder.cache().unwrap()[0].value.dim(), (1, 1, 4, 2));
}

#[test]
fn mistaken_inputs_are_named_and_leave_the_cache_alone() {
    let mut decoder = decoder(Tiny::Plain);
    let first = Input::prompts(&[vec![5, 1]], Logits::All);
    decoder.step(&first).unwrap();
    let cached = decoder.cache().unwrap();
    let next = first.then(&[3]);
    let with = |change: fn(&mut Input)| {
        let mut input = next.clone();
        change(&mut input);
        input
    };
    let cases = [
        (first.clone(), "the attention mask has 0 past tokens in 1 rows; the cache holds 2 in 1"),
        (
            Input::prompts(&[vec![1], vec![2]], Logits::All),
            "the attention mask has 0 past tokens in 2 rows; the cache holds 2 in 1",
        ),
        (
            with(|input| input.ids = array![[8]]),
            "row 0, token 0: id 8 is outside the vocabulary of 8",
        ),
        (
            with(|input| input.ids = array![[-1]]),
            "row 0, token 0: id -1 is outside the vocabulary of 8",
        ),
        (
            with(|input| input.ids = Array2::zeros((1, 0))),
            "a step needs at least one row and one token; got [1, 0]",
        ),
        (
            with(|input| input.positions = array![[1, 2]]),
            "position_ids has shape [1, 2]; expected [1, 1] [batch, tokens]",
        ),
        (
            with(|input| input.mask = array![[1, 1, 1], [1, 1, 1]]),
            "attention_mask has shape [2, 3]; expected [1, 3] [batch, tokens]",
        ),
        (
            with(|input| input.mask = Array2::zeros((1, 0))),
            "attention_mask has shape [1, 0]; expected [1, 3] [batch, tokens]",
        ),
    ];
    for (input, message) in cases {
        assert_eq!(decoder.step(&input).unwrap_err().to_string(), message);
        assert_eq!(decoder.cache().unwrap(), cached);
    }
    decoder.step(&next).unwrap();
}

#[test]
fn a_graph_that_loses_its_past_is_caught() {
    let mut decoder = decoder(Tiny::Forgetful);
    // The mask is as long as the cache should be, so the graph itself only runs with one token.
    let first = Input::prompts(&[vec![5]], Logits::All);
    decoder.step(&first).unwrap();
    let error = decoder.step(&first.then(&[1])).unwrap_err();
    let message = "the graph gave present.3.key with shape [1, 1, 1, 2]; expected [1, 1, 2, 2]";
    assert_eq!(error.to_string(), message);
}

#[test]
fn what_is_no_decoder_is_refused() {
    let refused = |tiny| {
        OnnxDecoder::new(open(tiny, &Options::default()), Vec::new()).unwrap_err().to_string()
    };
    let message = refused(Tiny::Strange);
    assert!(message.starts_with("the graph has an input pixel_values; a decoder has"), "{message}");
    let message = refused(Tiny::Open);
    assert!(message.contains("with fixed heads"), "{message}");
    let message = refused(Tiny::NoPresentValue);
    assert_eq!(message, "the graph has no output present.3.value");
}

#[test]
fn what_a_graph_leaves_open_can_be_said_beside_it() {
    let session = open(Tiny::Open, &Options::default());
    let facts = CacheFacts { head_dim: Some(2), ..CacheFacts::default() };
    let mut decoder = OnnxDecoder::with_facts(session, Vec::new(), facts).unwrap();
    let mut known = self::decoder(Tiny::Plain);
    let first = Input::prompts(&[vec![5, 1, 2]], Logits::All);
    for input in [first.clone(), first.then(&[3])] {
        let [a, b] = [&mut decoder, &mut known].map(|d| d.step(&input).unwrap().logits);
        assert_eq!(a, b);
    }
}

#[test]
fn graphs_load_from_files_and_from_memory_beside_their_weights() {
    let folder = tempfile::tempdir().unwrap();
    let (bytes, weights) = Tiny::External.bytes();
    fs::write(folder.path().join(WEIGHTS), weights).unwrap();
    let path = folder.path().join("model.onnx");
    fs::write(&path, &bytes).unwrap();
    let options =
        Options { threads: Some(1), optimization: Optimization::Basic, ..Options::default() };
    let input = Input::prompts(&[vec![5, 1, 2]], Logits::All);
    for session in [
        Session::open(&loaded(), &path, &options).unwrap(),
        Session::from_bytes(&loaded(), &bytes, folder.path(), &options).unwrap(),
    ] {
        let mut decoder = OnnxDecoder::new(session, Vec::new()).unwrap();
        let logits = decoder.step(&input).unwrap().logits;
        assert_eq!(logits.index_axis(ndarray::Axis(0), 0), expected(&[], &[5, 1, 2], &[true; 3]));
    }

    let elsewhere = tempfile::tempdir().unwrap();
    let error = Session::from_bytes(&loaded(), &bytes, elsewhere.path(), &options).unwrap_err();
    assert!(matches!(error, session::Error::Model { .. }), "{error}");
    assert!(error.to_string().contains(WEIGHTS), "{error}");
}

#[test]
fn what_is_no_graph_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    let refused = || Session::open(&loaded(), &path, &Options::default()).unwrap_err().to_string();
    assert_eq!(refused(), format!("{}: there is no such file", path.display()));
    fs::write(&path, "not a graph").unwrap();
    let message = refused();
    let start = format!("{}: ONNX Runtime does not load the graph: ", path.display());
    assert!(message.starts_with(&start), "{message}");
}

#[test]
fn a_missing_provider_is_refused_with_the_command() {
    let runtime = loaded();
    if runtime.found().providers.iter().any(|name| name == Provider::Cuda.name()) {
        session::try_provider(&runtime, Provider::Cpu).unwrap();
        return;
    }
    let (bytes, _) = Tiny::Plain.bytes();
    let options = Options { provider: Provider::Cuda, ..Options::default() };
    let error = Session::from_bytes(&runtime, &bytes, Path::new("."), &options).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("has no CUDAExecutionProvider"), "{message}");
    assert!(message.ends_with("pip install onnxruntime-gpu==1.31.1"), "{message}");
}

#[test]
fn a_profile_is_written_where_it_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { profile: Some(folder.path().join("profile")), ..Options::default() };
    let mut decoder = OnnxDecoder::new(open(Tiny::Plain, &options), Vec::new()).unwrap();
    decoder.step(&Input::prompts(&[vec![5, 1, 2]], Logits::All)).unwrap();
    let path = decoder.into_session().end_profile().unwrap();
    assert!(path.starts_with(folder.path()), "{}", path.display());
    assert!(fs::read_to_string(path).unwrap().contains("MatMul"));
}

/// What a session on a GPU always does, asked of one on the processor.
#[test]
fn the_first_step_tells_where_its_nodes_ran() {
    let options = Options { placement: true, ..Options::default() };
    let mut decoder = OnnxDecoder::new(open(Tiny::Plain, &options), Vec::new()).unwrap();
    assert!(decoder.session().placement().is_none());
    for ids in [vec![5, 1, 2], vec![3]] {
        decoder.reset();
        decoder.step(&Input::prompts(&[ids], Logits::All)).unwrap();
        let placement = decoder.session().placement().unwrap();
        placement.check().unwrap();
        assert_eq!(placement.nodes.keys().collect::<Vec<_>>(), [Provider::Cpu.name()]);
        assert_eq!(placement.nodes[Provider::Cpu.name()], placement.total());
        assert!(placement.stray.is_empty() && placement.to_host.count == 0);
    }
    // Nothing of the profile stays behind, of a session that ran or of one that did not.
    let own = format!("skipgpt-export-{}-", std::process::id());
    drop((decoder, open(Tiny::Plain, &options)));
    let left = || {
        let entries = fs::read_dir(std::env::temp_dir()).unwrap().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&own)).count()
    };
    // Another test of this process may be trying a provider.
    let gone = (0..100).any(|_| {
        left() == 0 || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            false
        }
    });
    assert!(gone, "{} directories are left", left());
    // The cache's time alone is a step too.
    let mut decoder = OnnxDecoder::new(open(Tiny::Plain, &options), Vec::new()).unwrap();
    decoder.advance(&Input::prompts(&[vec![5, 1, 2]], Logits::All)).unwrap();
    assert!(decoder.session().placement().is_some());
    let mut decoder = OnnxDecoder::new(open(Tiny::Plain, &Options::default()), Vec::new()).unwrap();
    decoder.step(&Input::prompts(&[vec![5]], Logits::All)).unwrap();
    assert!(decoder.session().placement().is_none());
}

#[test]
fn the_last_tokens_logits_are_those_of_all() {
    let session = || open(Tiny::Plain, &Options::default());
    let prompts = [vec![5, 1, 2], vec![3, 4, 1]];
    let logits = |wanted| {
        let mut decoder = OnnxDecoder::new(session(), Vec::new()).unwrap();
        decoder.step(&Input::prompts(&prompts, wanted)).unwrap().logits
    };
    let (all, last) = (logits(Logits::All), logits(Logits::Last));
    assert_eq!(all.dim(), (2, 3, VOCAB));
    assert_eq!(last, all.slice(ndarray::s![.., 2.., ..]));
}

#[test]
fn the_library_states_its_version_and_another_is_not_loaded() {
    let found = loaded().found().clone();
    assert!(found.version >= Version::OLDEST);
    assert!(found.providers.iter().any(|name| name == Provider::Cpu.name()), "{found:?}");
    assert!(found.path.is_absolute());

    let next = Version::new(2, 0, 0);
    let search = Search { flag: Some(found.path.clone()), ..Search::default() };
    let error = search.find(next).unwrap_err();
    assert!(
        matches!(&error.tried[0].rejection, Rejection::TooOld { found: version, minimum }
            if (*version, *minimum) == (found.version, next)),
        "{error}"
    );
    let error = Runtime::find(None, next).unwrap_err();
    assert!(matches!(error, runtime::Error::LoadedIsTooOld { .. }), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("libonnxruntime.so");
    std::os::unix::fs::symlink(&found.path, &link).unwrap();
    let error = Runtime::find(Some(folder.path()), Version::OLDEST).unwrap_err();
    assert!(matches!(error, runtime::Error::AnotherIsLoaded { .. }), "{error}");
    assert!(error.to_string().contains(link.to_str().unwrap()), "{error}");
}

#[test]
fn generation_runs_on_the_cache() {
    let session = open(Tiny::Routing, &Options::default());
    let mut decoder = OnnxDecoder::new(session, modules()).unwrap();
    let options = generate::Options { max_new_tokens: 4, ..generate::Options::default() };
    let report =
        generate::tokens(&mut decoder, &[0, 0], &options, |_| ControlFlow::Continue(())).unwrap();
    // Zeros give equal logits, of which the first wins.
    assert_eq!(report.tokens, [0; 4]);
    let skipped = report.decode_skipped.unwrap();
    assert_eq!((skipped.attention, skipped.mlp), (Some(0.0), Some(1.0)));
    assert_eq!(report.prefill_skipped.unwrap().attention, Some(1.0));
    let logits = decoder.step(&Input::prompts(&[vec![0]], Logits::Last));
    assert!(matches!(logits, Err(Error::Past { cached: 5, .. })), "{logits:?}");
    decoder.reset();
    let zeros: Array3<f32> = Array3::zeros((1, 1, VOCAB));
    let logits = decoder.step(&Input::prompts(&[vec![0]], Logits::Last)).unwrap().logits;
    assert_eq!(logits, zeros);
}

#[test]
fn the_doctor_finds_what_is_there() {
    let found = loaded().found().clone();
    let report = skipgpt_export::doctor::examine(None);
    assert!(report.is_healthy(), "{report}");
    assert_eq!(report.onnxruntime.as_ref(), Some(&found));
    let text = report.to_string();
    assert!(text.contains(&format!("ONNX Runtime {}", found.version)), "{text}");
    assert!(text.contains(found.path.to_str().unwrap()), "{text}");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["onnxruntime"]["version"], found.version.to_string());
    assert_eq!(json["providers"][0]["works"], true);
}
