//! Artifacts in few bits and in half precision, under ONNX Runtime, against the reference.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use skipgpt_export::checkpoint::Checkpoint;
use skipgpt_export::model::Reference;
use skipgpt_export::sources::{self, Sources};
use skipgpt_export::tolerance::Tolerances;
use skipgpt_export::{quality, readback, verify};
use skipgpt_passes::ir::{DType, Dispatch};
use skipgpt_passes::plan::Quantization;
use skipgpt_passes::quantization::{AccuracyLevel, Bits, Method, Scheme};
use skipgpt_passes::validate;

use crate::end_to_end::{Exported, Variant, export_as};
use crate::oracle::CASES;

const SCHEME: Scheme = Scheme {
    bits: Bits::Four,
    block: 32,
    symmetric: false,
    method: Method::Search,
    accuracy: AccuracyLevel::Int8,
};

const fn all(scheme: Scheme) -> Quantization {
    Quantization { scheme, embedding: true, head: true }
}

fn quantised(case: &str, dispatch: Dispatch, quantization: Quantization) -> Exported {
    let variant = Variant::all(case).pop().unwrap();
    export_as(case, variant, dispatch, false, (DType::F32, Some(quantization)))
}

/// Verifies as the command does.
fn verified(exported: &Exported) -> verify::Report {
    let manifest = &exported.artifact.manifest;
    let scheme = manifest.plan.quantization.map(|quantization| quantization.scheme);
    let rounds = scheme.is_some_and(|scheme| scheme.accuracy.rounds());
    let (checkpoint, nearness) = readback::read(&exported.artifact, &exported.checkpoint).unwrap();
    let model = validate(&checkpoint.model).unwrap();
    let mut reference = Reference::load(model, &checkpoint.sources).unwrap();
    let dtype = manifest.options.dtype;
    let options = verify::Options {
        tolerances: Tolerances::with_scheme(dtype, scheme.as_ref()),
        decode_steps: 8,
        greedy_tokens: 16,
        ..verify::Options::new("cpu", "under test", dtype)
    };
    let mut artifact = if rounds { exported.open_exact() } else { exported.open() };
    let mut report =
        verify::run(&mut reference, &mut artifact, &[], &options, &mut |_| ()).unwrap();
    if let Some(nearness) = nearness {
        report.compare_weights(nearness);
    }
    if rounds {
        let drawn = verify::drawn(manifest.model.vocab_size, 0);
        let mut artifact = exported.open();
        let rounded = quality::compare(&mut reference, &mut artifact, &drawn, |_| ()).unwrap();
        assert!(rounded.logit_error > 1e-4, "level 4 rounds nothing: {rounded}");
        report.compare_rounding(rounded);
    }
    report
}

#[track_caller]
fn check(case: &str, exported: &Exported) {
    let report = verified(exported);
    assert!(report.passed, "{case}: {report}");
}

#[test]
fn every_fixture_in_four_and_eight_bits_is_its_reference() {
    for case in CASES {
        for (bits, accuracy) in [
            (Bits::Four, AccuracyLevel::Unset),
            (Bits::Four, AccuracyLevel::Int8),
            (Bits::Eight, AccuracyLevel::F32),
            (Bits::Eight, AccuracyLevel::Int8),
        ] {
            let scheme = Scheme { bits, accuracy, ..SCHEME };
            check(case, &quantised(case, Dispatch::Gathered, all(scheme)));
        }
    }
}

/// Hidden sizes of the fixtures are no multiples of the longer blocks.
#[test]
fn every_block_length_symmetry_and_method_is_its_reference() {
    for block in [16, 32, 64, 128, 256] {
        for (bits, symmetric, method) in [
            (Bits::Four, true, Method::Nearest),
            (Bits::Four, false, Method::Nearest),
            (Bits::Four, true, Method::Search),
            (Bits::Eight, true, Method::Search),
            (Bits::Eight, false, Method::Nearest),
        ] {
            let accuracy = AccuracyLevel::F32;
            let scheme = Scheme { bits, block, symmetric, method, accuracy };
            check("llama-gqa", &quantised("llama-gqa", Dispatch::Conditional, all(scheme)));
        }
    }
}

#[test]
fn embedding_and_head_stay_floats_where_planned() {
    for (embedding, head) in [(false, false), (false, true), (true, false)] {
        for case in ["llama-gqa", "qwen2-bias"] {
            let quantization = Quantization { scheme: SCHEME, embedding, head };
            let exported = quantised(case, Dispatch::Masked, quantization);
            let gathers = exported.graph.contains("GatherBlockQuantized(");
            assert_eq!(gathers, embedding, "{case}");
            assert_eq!(exported.graph.contains("logits = com.microsoft::MatMulNBits("), head);
            check(case, &exported);
        }
    }
}

#[test]
fn the_oldest_runtime_follows_from_the_operators() {
    for (bits, embedding, oldest) in
        [(Bits::Four, true, "1.23"), (Bits::Eight, false, "1.23"), (Bits::Four, false, "1.22")]
    {
        let scheme = Scheme { bits, ..SCHEME };
        let quantization = Quantization { scheme, embedding, head: true };
        let exported = quantised("llama-gqa", Dispatch::Masked, quantization);
        let graph = exported.artifact.manifest.graph.as_ref().unwrap();
        assert_eq!(graph.min_onnxruntime, oldest);
    }
}

#[test]
fn routers_are_never_quantised() {
    let exported = quantised("llama-gqa", Dispatch::Conditional, all(SCHEME));
    let products = exported.graph.lines().filter(|l| l.contains(".router.margins.product = "));
    let plain: Vec<bool> = products.map(|line| line.contains("::FusedMatMul(")).collect();
    assert!(!plain.is_empty() && plain.into_iter().all(|plain| plain));
}

/// ONNX Runtime before 1.29 computes with codes of the graph around a branch as if they were others.
#[test]
fn codes_lie_in_the_branch_that_reads_them() {
    let exported = quantised("llama-gqa", Dispatch::Conditional, all(SCHEME));
    let codes = exported.graph.lines().filter(|line| line.contains(" = codes "));
    let (main, inner): (Vec<&str>, Vec<&str>) =
        codes.partition(|line| line.starts_with("  weight"));
    let routed = |line: &&str| line.contains(".mlp.") || line.contains(".attention.");
    assert!(!main.is_empty() && !main.iter().any(routed), "{main:?}");
    assert!(inner.iter().any(|line| line.contains(".mlp.gate")));
    assert!(inner.iter().any(|line| line.contains(".attention.every.qkv")));
}

/// The checkpoint with the rows of one tensor moved down by one.
fn with_moved_rows(checkpoint: &Checkpoint, moved: &str) -> Checkpoint {
    let mut sources = Sources::new();
    for stored in checkpoint.sources.iter() {
        let mut bytes = vec![0; sources::size(stored) as usize];
        checkpoint.sources.read_at(&stored.name, 0, &mut bytes).unwrap();
        if stored.name == moved {
            let row = bytes.len() / stored.shape[0];
            bytes.rotate_right(row);
        }
        sources.insert_memory(stored.clone(), bytes.into()).unwrap();
    }
    Checkpoint { sources, ..checkpoint.clone() }
}

#[test]
fn codes_of_another_row_are_noticed() {
    let exported = quantised("llama-gqa", Dispatch::Masked, all(SCHEME));
    let own = readback::read(&exported.artifact, &exported.checkpoint).unwrap().1.unwrap();
    assert!(own.passed && own.matrices > 8, "{own}");
    let linears = exported.checkpoint.model.linears();
    for path in ["layers.0.attention.v", "layers.1.mlp.up", "head"] {
        let (_, linear) = linears.iter().find(|(found, _)| found == path).unwrap();
        let moved = with_moved_rows(&exported.checkpoint, &linear.weight.stored()[0].name);
        let nearness = readback::read(&exported.artifact, &moved).unwrap().1.unwrap();
        assert!(!nearness.passed, "{path}");
        let worst = nearness.worst.unwrap();
        assert!(worst.starts_with(path) || path == "head", "{path}: {worst}");
    }
}

#[test]
fn half_precision_is_near_its_reference() {
    for case in CASES {
        for dispatch in [Dispatch::Masked, Dispatch::Gathered, Dispatch::Conditional] {
            let variant = Variant::all(case).pop().unwrap();
            let exported = export_as(case, variant, dispatch, false, (DType::F16, None));
            check(case, &exported);
        }
    }
}

#[test]
fn bf16_is_written_and_refused_by_name_on_the_cpu() {
    let exported =
        export_as("llama-gqa", Variant::Routed, Dispatch::Masked, false, (DType::BF16, None));
    let runtime =
        skipgpt_export::runtime::Runtime::find(None, skipgpt_export::runtime::Version::OLDEST)
            .unwrap();
    let options = skipgpt_export::runtime::session::Options::default();
    let error = skipgpt_export::watch::Watched::open(&exported.artifact, &runtime, &options);
    let message = error.unwrap_err().to_string();
    assert!(message.contains("ONNX Runtime's CPU provider has no bf16 MatMul"), "{message}");
}
