//! From checkpoint to artifact to ONNX Runtime: every fixture, every dispatch, against the oracle
//! and against the reference; and the text of everything on the way, in `fixtures/golden`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use expect_test::expect_file;
use ndarray::s;
use skipgpt_export::artifact::{self, Artifact, manifest};
use skipgpt_export::checkpoint::{self, Checkpoint, Request};
use skipgpt_export::decoder::{Decoder, Input, Logits, Sequences};
use skipgpt_export::generate;
use skipgpt_export::model::Reference;
use skipgpt_export::onnx;
use skipgpt_export::plan::{self, Choices};
use skipgpt_export::runtime::session::Provider;
use skipgpt_export::runtime::{OnnxDecoder, Runtime, Session, Shapes, Version, session};
use skipgpt_export::verify;
use skipgpt_export::watch::{self, Watched};
use skipgpt_passes::ir::{DType, Dispatch, Model, ModuleKind};
use skipgpt_passes::plan::Quantization;
use skipgpt_passes::{PASSES, validate};
use tempfile::TempDir;

use crate::oracle::{ATOL, CASES, Expected, fixture};

/// What of a fixture is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Variant {
    Dense,
    Routed,
    RoutedLora,
}

impl Variant {
    /// What the oracle computed for the case.
    pub(crate) fn all(case: &str) -> Vec<Self> {
        let lora = fixture(case).join("adapter").exists();
        let mut all = vec![Self::Dense, Self::Routed];
        all.extend(lora.then_some(Self::RoutedLora));
        all
    }

    fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Routed => "routed",
            Self::RoutedLora => "routed_lora",
        }
    }

    fn read(self, case: &str) -> Checkpoint {
        let directory = fixture(case);
        let router = directory.join("router.safetensors");
        let adapter = directory.join("adapter");
        let request = Request {
            model: Some(&directory),
            router: (self != Self::Dense).then_some(router.as_path()),
            adapter: (self == Self::RoutedLora).then_some(adapter.as_path()),
            ..Request::default()
        };
        checkpoint::read(&request).unwrap()
    }
}

const DISPATCHES: [Dispatch; 3] = [Dispatch::Masked, Dispatch::Gathered, Dispatch::Conditional];

/// An artifact in a directory of its own.
pub(crate) struct Exported {
    _directory: TempDir,
    pub(crate) artifact: Artifact,
    pub(crate) checkpoint: Checkpoint,
    /// The IR as imported and after every pass.
    stages: Vec<(String, Model)>,
    pub(crate) graph: String,
}

fn export(case: &str, variant: Variant, dispatch: Dispatch, link: bool) -> Exported {
    export_as(case, variant, dispatch, link, (DType::F32, None))
}

/// As [`export`], in another precision.
pub(crate) fn export_as(
    case: &str,
    variant: Variant,
    dispatch: Dispatch,
    link: bool,
    (dtype, quantization): (DType, Option<Quantization>),
) -> Exported {
    let checkpoint = variant.read(case);
    let choices = Choices {
        provider: session::Provider::Cpu,
        dispatch: Some(dispatch),
        dtype,
        quantization,
        rearrange: !link,
        prune_below: None,
        always_above: None,
    };
    let plan = plan::build(&checkpoint.model, choices, None).unwrap();
    let mut model = checkpoint.model.clone();
    let mut stages = vec![("00-imported".to_owned(), model.clone())];
    skipgpt_passes::run(PASSES, &mut model, &plan, |pass, model| {
        stages.push((format!("{:02}-{}", stages.len(), pass.name()), model.clone()));
    })
    .unwrap();
    let attention = onnx::Attention::auto(&model.config, dtype, Provider::Cpu);
    let (logits, sequences) = (Logits::All, Sequences::Any);
    let options = onnx::Options { dtype, emit_routing: false, attention, logits, sequences };
    let graph = onnx::lower(validate(&model).unwrap(), options).unwrap();
    let directory = TempDir::new().unwrap();
    let output = directory.path().join("artifact");
    let names: Vec<&str> = PASSES.iter().map(|pass| pass.name()).collect();
    let request = artifact::Request {
        output: &output,
        force: false,
        model: &model,
        graph: &graph,
        checkpoint: &checkpoint,
        plan: &plan,
        passes: &names,
        options: manifest::Options {
            format: manifest::Format::Onnx,
            dtype,
            weights: if link { manifest::Weights::Link } else { manifest::Weights::Copy },
            dispatch: Some(dispatch),
            emit_routing: false,
            attention,
            logits,
            sequences,
            prune_below: None,
            always_above: None,
        },
        min_onnxruntime: onnx::minimum_onnxruntime(&graph),
    };
    artifact::write(&request, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
    let artifact = artifact::open(&output).unwrap();
    let graph = graph.to_string();
    Exported { _directory: directory, artifact, checkpoint, stages, graph }
}

impl Exported {
    pub(crate) fn open(&self) -> Watched {
        self.watched(Watched::open)
    }

    /// As [`Exported::open`], without rounding of activations.
    pub(crate) fn open_exact(&self) -> Watched {
        self.watched(Watched::open_exact)
    }

    fn watched(&self, open: Open) -> Watched {
        let runtime = Runtime::find(None, Version::OLDEST).unwrap();
        let options = session::Options {
            threads: Some(2),
            one_token_apart: true,
            ..session::Options::default()
        };
        open(&self.artifact, &runtime, &options).unwrap()
    }
}

type Open = fn(&Artifact, &Runtime, &session::Options) -> Result<Watched, watch::Error>;

/// Decisions equal at every real position, logits within [`ATOL`], the same greedy text.
fn check_oracle(case: &str, variant: Variant, exported: &Exported) {
    let expected = Expected::of(case);
    let name = variant.name();
    let place = format!("{case}, {name}, {}", exported.artifact.directory.display());
    let mut decoder = exported.open();
    let input = expected.input();
    let output = decoder.step(&input).unwrap();
    let logits = expected.floats(&format!("{name}.logits"));
    for ((b, s, v), found) in output.logits.indexed_iter() {
        if input.is_real(b, s) {
            let difference = (found - logits[[b, s, v]]).abs();
            assert!(difference <= ATOL, "{place}: logit [{b}, {s}, {v}] is off by {difference}");
        }
    }
    if variant == Variant::Dense {
        return;
    }
    let routing = output.routing.unwrap();
    assert!(!routing.modules.is_empty());
    for (m, module) in routing.modules.iter().enumerate() {
        let kind = match module.kind {
            ModuleKind::Attention => "keep_attention",
            ModuleKind::Mlp => "keep_mlp",
        };
        let keep = expected.floats(&format!("{name}.{kind}"));
        for (b, s) in ndarray::indices(input.ids.dim()) {
            if input.is_real(b, s) {
                let kept = keep[[module.layer, b, s]] > 0.5;
                assert_eq!(routing.keeps(m, b, s), kept, "{place}: {module} of token [{b}, {s}]");
            }
        }
    }
    let greedy = expected.integers(&format!("{name}.greedy"));
    let (prompt, rest) = greedy.view().split_at(ndarray::Axis(1), 6);
    let options = generate::Options { max_new_tokens: rest.len(), ..Default::default() };
    let prompt: Vec<i64> = prompt.iter().copied().collect();
    let report =
        generate::tokens(&mut decoder, &prompt, &options, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(report.tokens, rest.iter().copied().collect::<Vec<_>>(), "{place}: greedy text");
}

#[test]
fn artifacts_compute_what_the_oracle_computed() {
    for case in CASES {
        for variant in Variant::all(case) {
            for dispatch in DISPATCHES {
                check_oracle(case, variant, &export(case, variant, dispatch, false));
            }
        }
    }
}

#[test]
fn artifacts_verify_against_the_reference() {
    for case in CASES {
        let variant = Variant::all(case).pop().unwrap();
        for dispatch in DISPATCHES {
            let exported = export(case, variant, dispatch, false);
            let mut artifact = exported.open();
            let checkpoint = &exported.checkpoint;
            let model = validate(&checkpoint.model).unwrap();
            let mut reference = Reference::load(model, &checkpoint.sources).unwrap();
            let options = verify::Options::new("cpu", "under test", DType::F32);
            let report =
                verify::run(&mut reference, &mut artifact, &[], &options, &mut |_| ()).unwrap();
            assert!(report.passed, "{case}, {dispatch}: {report}");
        }
    }
}

/// Prompts of several blocks of queries, whole, in chunks and padded in a batch.
#[test]
fn long_prompts_verify() {
    let tokens = |count: i64, step: i64| (0..count).map(|i| (i * step + 3) % 320).collect();
    let prompts: [Vec<i64>; 2] = [tokens(601, 7), tokens(300, 11)];
    for (case, variant, dispatch) in [
        ("llama-gqa", Variant::Dense, Dispatch::Masked),
        ("llama-gqa", Variant::Routed, Dispatch::Gathered),
        ("llama-gqa", Variant::Routed, Dispatch::Conditional),
        ("llama-mha-llama3rope", Variant::Routed, Dispatch::Conditional),
    ] {
        let exported = export(case, variant, dispatch, false);
        assert!(exported.graph.contains("= Loop("), "{case}");
        let checkpoint = &exported.checkpoint;
        let model = validate(&checkpoint.model).unwrap();
        let mut reference = Reference::load(model, &checkpoint.sources).unwrap();
        let options = verify::Options {
            decode_steps: 2,
            greedy_tokens: 2,
            ..verify::Options::new("cpu", "under test", DType::F32)
        };
        let artifact = &mut exported.open();
        let report = verify::run(&mut reference, artifact, &prompts, &options, &mut |_| ());
        let report = report.unwrap();
        assert!(report.passed, "{case}, {dispatch}: {report}");
    }
}

/// The kinds of nodes that ran, by the profile of a session for steps of one token.
fn kinds_for_one_token(exported: &Exported) -> String {
    let folder = tempfile::tempdir().unwrap();
    let runtime = Runtime::find(None, Version::OLDEST).unwrap();
    let options = session::Options {
        shapes: Shapes::OneEach(1),
        profile: Some(folder.path().join("profile")),
        ..session::Options::default()
    };
    let path = exported.artifact.path("model.onnx");
    let session = Session::open(&runtime, &path, &options).unwrap();
    let mut decoder = OnnxDecoder::new(session, Vec::new()).unwrap();
    let error = decoder.step(&Input::prompts(&[vec![3, 4]], Logits::Last)).unwrap_err();
    assert!(error.to_string().contains("input_ids"), "{error}");
    let first = Input::prompts(&[vec![3]], Logits::All);
    decoder.step(&first).unwrap();
    decoder.step(&first.then(&[4])).unwrap();
    std::fs::read_to_string(decoder.into_session().end_profile().unwrap()).unwrap()
}

/// What choosing among forms costs is not paid where there is nothing to choose.
#[test]
fn a_session_for_one_token_has_no_other_form() {
    let [dense, routed] = [Variant::Dense, Variant::Routed].map(|variant| {
        kinds_for_one_token(&export("llama-gqa", variant, Dispatch::Conditional, false))
    });
    let runs = |profile: &str, kind: &str| profile.contains(&format!(r#""op_name" : "{kind}""#));
    assert!(runs(&dense, "GroupQueryAttention") && runs(&routed, "GroupQueryAttention"));
    assert!(!runs(&dense, "If") && runs(&routed, "If"));
    for other in ["Compress", "ScatterND", "MultiHeadAttention"] {
        assert!(!runs(&dense, other) && !runs(&routed, other), "{other}");
    }
}

#[test]
fn linked_weights_are_the_checkpoint_s_own() {
    for variant in [Variant::Dense, Variant::Routed] {
        let exported = export("llama-gqa", variant, Dispatch::Conditional, true);
        check_oracle("llama-gqa", variant, &exported);
    }
}

#[test]
fn two_exports_are_byte_identical() {
    let read = |exported: &Exported| {
        let outputs = exported.artifact.manifest.outputs.iter();
        let mut files: Vec<(String, Vec<u8>)> = outputs
            .map(|file| {
                (file.name.clone(), std::fs::read(exported.artifact.path(&file.name)).unwrap())
            })
            .collect();
        files.push((
            "manifest.json".into(),
            std::fs::read(exported.artifact.path("manifest.json")).unwrap(),
        ));
        files
    };
    let [first, second] = [(); 2]
        .map(|()| read(&export("llama-gqa", Variant::RoutedLora, Dispatch::Conditional, false)));
    assert!(first.len() > 4);
    for ((name, one), (_, two)) in first.iter().zip(&second) {
        assert!(one == two, "{name} differs");
    }
}

#[test]
fn a_changed_byte_is_noticed() {
    let exported = export("llama-gqa", Variant::Routed, Dispatch::Conditional, false);
    let path = exported.artifact.path("model.onnx.data");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = exported.artifact.verify_hashes(&mut |_| std::ops::ControlFlow::Continue(()));
    let message = error.unwrap_err().to_string();
    assert!(message.contains("model.onnx.data: has changed since the export"), "{message}");
}

fn golden(case: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/golden").join(case);
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

/// The IR after every pass and the graph of every dispatch.
#[test]
fn texts_are_as_recorded() {
    for case in CASES {
        let variant = Variant::all(case).pop().unwrap();
        for dispatch in DISPATCHES {
            let exported = export(case, variant, dispatch, false);
            for (name, model) in &exported.stages {
                // Only the last pass knows the dispatch.
                let name = match model.phase {
                    skipgpt_passes::ir::Phase::Lowered => format!("{name}-{dispatch}.ir"),
                    _ => format!("{name}.ir"),
                };
                expect_file![golden(case).join(name)].assert_eq(&model.to_string());
            }
            let path = golden(case).join(format!("onnx-{dispatch}.txt"));
            expect_file![path].assert_eq(&exported.graph);
        }
    }
}

/// The numbers of every fixture in every dispatch, rounded so that another processor's rounding
/// does not show.
#[test]
fn outputs_are_as_recorded() {
    for case in CASES {
        let variant = Variant::all(case).pop().unwrap();
        for dispatch in DISPATCHES {
            let mut decoder = export(case, variant, dispatch, false).open();
            let input = Expected::of(case).input();
            let output = decoder.step(&input).unwrap();
            let text = outputs(&input, &output);
            let path = golden(case).join(format!("outputs-{dispatch}.txt"));
            expect_file![path].assert_eq(&text);
            assert_eq!(input.logits, Logits::All);
        }
    }
}

fn outputs(
    input: &skipgpt_export::decoder::Input,
    output: &skipgpt_export::decoder::Output,
) -> String {
    use std::fmt::Write;
    let mut text = String::from("row, position: best token, its logit; kept modules\n");
    let routing = output.routing.as_ref().unwrap();
    for (b, s) in ndarray::indices(input.ids.dim()) {
        if !input.is_real(b, s) {
            continue;
        }
        let logits = output.logits.slice(s![b, s, ..]);
        let best = generate::argmax(&logits).unwrap();
        let kept: String = (0..routing.modules.len())
            .map(|m| if routing.keeps(m, b, s) { '1' } else { '0' })
            .collect();
        writeln!(text, "{b}, {s}: {best}, {:.2}; {kept}", logits[best]).unwrap();
    }
    text
}
