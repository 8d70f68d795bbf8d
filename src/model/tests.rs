#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod build;
mod naive;

use build::{FULL, PLAIN, Parts, VOCAB, build};
use ndarray::{Array2, s};
use skipgpt_passes::ir::{Dispatch, Model, ModuleId, ModuleKind, Tap};
use skipgpt_passes::pass;
use skipgpt_passes::plan::Plan;
use skipgpt_passes::registry::PASSES;
use skipgpt_passes::validate::validate;

use super::*;
use crate::decoder::{Decoder, Input, Logits, Output, Peek};

const TOKENS: [i64; 9] = [3, 17, 39, 0, 8, 8, 25, 11, 30];

/// Largest difference allowed between `f32` here and `f64` in [`naive`].
const TOLERANCE: f64 = 2e-5;

fn load(model: &Model, sources: &Sources) -> Reference {
    Reference::load(validate(model).unwrap(), sources).unwrap()
}

fn plan(dispatch: Dispatch) -> Plan {
    Plan {
        removed: Vec::new(),
        always: Vec::new(),
        fuse_key_value: true,
        fuse_gate_up: true,
        quantization: None,
        attention_dispatch: dispatch,
        mlp_dispatch: dispatch,
    }
}

/// The model after each number of passes, with each dispatch.
fn every_phase(imported: &Model, removed: &[ModuleId]) -> Vec<(String, Model)> {
    let mut models = vec![("imported".to_owned(), imported.clone())];
    for dispatch in [Dispatch::Masked, Dispatch::Gathered, Dispatch::Conditional] {
        let plan = Plan { removed: removed.to_vec(), ..plan(dispatch) };
        pass::run(PASSES, &mut imported.clone(), &plan, |pass, model| {
            models.push((format!("{} {dispatch}", pass.name()), model.clone()));
        })
        .unwrap();
    }
    models
}

#[track_caller]
fn close(
    place: &str,
    found: impl IntoIterator<Item = f32>,
    expected: impl IntoIterator<Item = f64>,
) {
    close_within(TOLERANCE, place, found, expected);
}

#[track_caller]
fn close_within(
    tolerance: f64,
    place: &str,
    found: impl IntoIterator<Item = f32>,
    expected: impl IntoIterator<Item = f64>,
) {
    let (mut found, mut expected) = (found.into_iter(), expected.into_iter());
    let mut length = 0;
    loop {
        match (found.next(), expected.next()) {
            (None, None) => break,
            (Some(a), Some(b)) => {
                assert!((f64::from(a) - b).abs() < tolerance, "{place}: {a} against {b}");
                length += 1;
            }
            (a, b) => panic!("{place}: {a:?} against {b:?} at {length}"),
        }
    }
    assert!(length > 0, "{place}: nothing compared");
}

/// Every phase and dispatch against the same sequence in `f64` loops.
#[track_caller]
fn agrees(parts: Parts) {
    let (imported, sources) = build(parts);
    let expected = naive::run(&imported, &sources, &TOKENS);
    let input = Input::prompts(&[TOKENS.to_vec()], Logits::All);
    for (place, model) in every_phase(&imported, &[]) {
        let (output, trace) = load(&model, &sources).step_traced(&input).unwrap();
        let routing = output.routing.unwrap();
        assert_eq!(routing.modules.len(), expected.margins.len(), "{place}");
        close(&place, output.logits, expected.logits.concat());
        assert_eq!(trace.layers, [0, 1, 2]);
        close(&place, trace.inputs, expected.layer_inputs.concat().concat());
        if parts.routed {
            close(&place, routing.margins, expected.margins.concat());
        }
    }
}

#[test]
fn linear_routers() {
    agrees(PLAIN);
}

#[test]
fn everything_at_once() {
    agrees(FULL);
}

#[test]
fn no_router() {
    agrees(Parts { routed: false, tied: false, biases: true, ..PLAIN });
}

#[test]
fn two_layer_routers_on_the_layer_input() {
    agrees(Parts { two_layer: true, mlp_tap: Tap::LayerInput, kv_heads: 4, ..PLAIN });
}

#[test]
fn linear_routers_on_the_module_input() {
    agrees(Parts { mlp_tap: Tap::ModuleInput, head_norms: true, ..PLAIN });
}

#[test]
fn the_fixtures_keep_and_skip() {
    for parts in [PLAIN, FULL] {
        let (imported, sources) = build(parts);
        for margins in naive::run(&imported, &sources, &TOKENS).margins {
            assert!(margins.iter().all(|margin| margin.abs() > 10.0 * TOLERANCE), "{margins:?}");
        }
        let all = naive::run(&imported, &sources, &TOKENS).margins.concat();
        let kept = all.iter().filter(|margin| **margin >= 0.0).count();
        assert!(kept * 5 > all.len() && kept * 5 < all.len() * 4, "{kept} of {}", all.len());
    }
}

#[test]
fn removed_modules_and_layers() {
    let (imported, sources) = build(PLAIN);
    let removed = [(0, ModuleKind::Mlp), (1, ModuleKind::Attention), (1, ModuleKind::Mlp)]
        .map(|(layer, kind)| ModuleId { layer, kind });
    let mut pruned = imported.clone();
    for id in removed {
        match id.kind {
            ModuleKind::Attention => pruned.layers[id.layer].attention = None,
            ModuleKind::Mlp => pruned.layers[id.layer].mlp = None,
        }
    }
    let expected = naive::run(&pruned, &sources, &TOKENS);
    let input = Input::prompts(&[TOKENS.to_vec()], Logits::All);
    let after = |place: &str| ["prune", "fuse", "lower"].iter().any(|p| place.starts_with(p));
    for (place, model) in every_phase(&imported, &removed).iter().filter(|m| after(&m.0)) {
        let mut reference = load(model, &sources);
        let output = reference.step(&input).unwrap();
        close(place, output.logits, expected.logits.concat());
        let layers: Vec<_> = reference.cache().unwrap().iter().map(|entry| entry.layer).collect();
        assert_eq!(layers, [0, 2], "{place}");
    }
}

#[test]
fn a_module_no_token_keeps_or_every_token_keeps() {
    for bias in [-1e6_f32, 1e6] {
        let (imported, mut sources) = build(PLAIN);
        let forced =
            ir::Stored { name: "forced".to_owned(), shape: vec![2], dtype: ir::DType::F32 };
        let bytes: Vec<u8> = [bias, 0.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        sources.insert_memory(forced.clone(), bytes.into()).unwrap();
        let mut imported = imported;
        for layer in &mut imported.layers {
            for kind in [ModuleKind::Attention, ModuleKind::Mlp] {
                let router = layer.routing_mut(kind).and_then(ir::Routing::own_router_mut).unwrap();
                router.output.bias = Some(ir::Weight::Stored(forced.clone()));
            }
        }
        let expected = naive::run(&imported, &sources, &TOKENS);
        let input = Input::prompts(&[TOKENS.to_vec()], Logits::All);
        for (place, model) in every_phase(&imported, &[]) {
            let output = load(&model, &sources).step(&input).unwrap();
            close(&place, output.logits, expected.logits.concat());
        }
    }
}

/// The real positions of row `b`, in order.
fn real(input: &Input, b: usize) -> Vec<usize> {
    (0..input.sequence()).filter(|s| input.is_real(b, *s)).collect()
}

#[test]
fn rows_of_a_padded_batch_are_the_single_rows() {
    let prompts = [TOKENS.to_vec(), TOKENS[2..5].to_vec(), vec![7]];
    let batch = Input::prompts(&prompts, Logits::All);
    let (imported, sources) = build(FULL);
    for (place, model) in every_phase(&imported, &[]) {
        let mut reference = load(&model, &sources);
        let together = reference.step(&batch).unwrap();
        assert!(together.logits.iter().all(|v| v.is_finite()), "{place}: padding gave NaN");
        for (b, prompt) in prompts.iter().enumerate() {
            let alone = naive::run(&imported, &sources, prompt);
            for (t, s) in real(&batch, b).into_iter().enumerate() {
                close(
                    &place,
                    together.logits.slice(s![b, s, ..]).to_vec(),
                    alone.logits[t].clone(),
                );
            }
        }
        // One more token each, on the cache.
        let next = batch.then(&[1, 2, 3]);
        let together = reference.step(&next).unwrap();
        for (b, prompt) in prompts.iter().enumerate() {
            let longer = [prompt.clone(), vec![[1, 2, 3][b]]].concat();
            let alone = naive::run(&imported, &sources, &longer);
            let last = together.logits.slice(s![b, 0, ..]).to_vec();
            close(&place, last, alone.logits[prompt.len()].clone());
        }
    }
}

/// Feeds `tokens` in chunks of the given lengths.
fn in_chunks(reference: &mut Reference, tokens: &[i64], chunks: &[usize]) -> Vec<Output> {
    let mut past = 0;
    let mut outputs = Vec::new();
    for chunk in chunks {
        let input = Input {
            ids: Array2::from_shape_fn((1, *chunk), |(_, s)| tokens[past + s]),
            mask: Array2::ones((1, past + chunk)),
            positions: Array2::from_shape_fn((1, *chunk), |(_, s)| (past + s) as i64),
            logits: Logits::All,
        };
        outputs.push(reference.step(&input).unwrap());
        past += chunk;
    }
    outputs
}

#[test]
fn chunks_on_a_cache_are_the_whole() {
    let (imported, sources) = build(FULL);
    let expected = naive::run(&imported, &sources, &TOKENS);
    for (place, model) in every_phase(&imported, &[]) {
        let mut reference = load(&model, &sources);
        let mut caches = Vec::new();
        for chunks in [vec![9], vec![4, 5], vec![1; 9], vec![2, 1, 6]] {
            let outputs = in_chunks(&mut reference, &TOKENS, &chunks);
            let logits = outputs.iter().flat_map(|output| output.logits.iter().copied());
            close(&place, logits, expected.logits.concat());
            caches.push(reference.cache().unwrap());
            reference.reset();
        }
        assert_eq!(caches[0][0].key.dim(), (1, 1, TOKENS.len(), 6));
        for cache in &caches[1..] {
            for (found, whole) in cache.iter().zip(&caches[0]) {
                let as_f64 = |values: &ndarray::Array4<f32>| values.mapv(f64::from);
                close(&place, found.key.clone(), as_f64(&whole.key));
                close(&place, found.value.clone(), as_f64(&whole.value));
            }
        }
    }
}

#[test]
fn peeking_leaves_the_cache_as_it_was() {
    let (imported, sources) = build(FULL);
    let expected = naive::run(&imported, &sources, &TOKENS);
    let (first, rest) = TOKENS.split_at(4);
    for (place, model) in every_phase(&imported, &[]) {
        let mut reference = load(&model, &sources);
        // On an empty cache, of another batch than what follows.
        reference.peek(&Input::prompts(&[vec![1, 2], vec![3]], Logits::All)).unwrap();
        assert!(reference.cache().unwrap().is_empty(), "{place}");
        reference.step(&Input::row(0, first, Logits::Last)).unwrap();
        let cache = reference.cache().unwrap();
        for other in [&[7_i64, 7, 7, 7, 7, 7][..], &[5]] {
            reference.peek(&Input::row(4, other, Logits::All)).unwrap();
            assert_eq!(reference.cache().unwrap(), cache, "{place}");
        }
        let peeked = reference.peek(&Input::row(4, rest, Logits::All)).unwrap();
        let stepped = reference.step(&Input::row(4, rest, Logits::All)).unwrap();
        assert_eq!(peeked.logits, stepped.logits, "{place}");
        close(&place, stepped.logits, expected.logits[4..].concat());
    }
}

#[test]
fn what_every_module_changes_is_observed() {
    let (imported, sources) = build(PLAIN);
    let mut reference = load(&imported, &sources);
    let input = Input::prompts(&[TOKENS.to_vec()], Logits::Last);
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let mut seen = Vec::new();
    reference
        .step_observed(&input, &mut |change| {
            let (before, after) = (values(change.before), values(change.after));
            seen.push((change.layer, change.module, before, after));
            Ok(())
        })
        .unwrap();
    reference.reset();
    let (_, trace) = reference.step_traced(&input).unwrap();
    assert_eq!(seen.len(), 9);
    for (layer, seen) in seen.chunks_exact(3).enumerate() {
        let kinds: Vec<_> = seen.iter().map(|(index, kind, ..)| (*index, *kind)).collect();
        let kind = |kind| (layer, kind);
        let modules = [Some(ModuleKind::Attention), Some(ModuleKind::Mlp), None].map(kind);
        assert_eq!(kinds, modules);
        let (_, _, input, middle) = &seen[0];
        assert_eq!(
            *input,
            trace.inputs.slice(s![layer, 0, .., ..]).iter().copied().collect::<Vec<_>>()
        );
        assert_eq!((middle, input), (&seen[1].2, &seen[2].2));
        assert_eq!(seen[1].3, seen[2].3);
        assert_ne!(input, middle);
    }
}

#[test]
fn the_last_logits_are_the_last_of_all() {
    let (imported, sources) = build(PLAIN);
    let mut reference = load(&imported, &sources);
    let prompts = [TOKENS.to_vec(), TOKENS[..4].to_vec()];
    let all = reference.step(&Input::prompts(&prompts, Logits::All)).unwrap().logits;
    reference.reset();
    let last = reference.step(&Input::prompts(&prompts, Logits::Last)).unwrap().logits;
    assert_eq!(last.dim(), (2, 1, VOCAB));
    let expected = all.slice(s![.., -1, ..]).mapv(f64::from);
    close("last", last, expected);
}

#[test]
fn a_tied_head_shares_the_embedding() {
    for (tied, parts) in [(true, PLAIN), (false, Parts { tied: false, ..PLAIN })] {
        let (model, sources) = build(parts);
        let reference = load(&model, &sources);
        assert_eq!(reference.head.weight.id() == reference.embedding.id(), tied);
    }
}

#[test]
fn the_differentiable_kernels_agree() {
    let (imported, sources) = build(FULL);
    let input = Input::prompts(&[TOKENS.to_vec(), vec![5, 6]], Logits::All);
    let run = |kernels| {
        let options = Options { kernels, ..Options::default() };
        let validated = validate(&imported).unwrap();
        let mut reference = Reference::load_with(validated, &sources, options).unwrap();
        reference.step(&input).unwrap().logits
    };
    // Training's products may be those of the tile unit, which are rounded a little earlier.
    let fused = run(Kernels::Fused).mapv(f64::from);
    close_within(10.0 * TOLERANCE, "kernels", run(Kernels::Differentiable), fused);
}

#[test]
fn arrays_that_do_not_belong_together_are_refused() {
    let (model, sources) = build(PLAIN);
    let mut reference = load(&model, &sources);
    let good = Input::prompts(&[vec![1, 2, 3]], Logits::Last);
    let mut refused = |change: &dyn Fn(&mut Input), expected: &str| {
        let mut input = good.clone();
        change(&mut input);
        assert_eq!(reference.step(&input).unwrap_err().to_string(), expected);
    };
    refused(&|i| i.ids[[0, 1]] = 40, "ids[0, 1] is 40; it must be in 0..40");
    refused(&|i| i.ids[[0, 2]] = -1, "ids[0, 2] is -1; it must be in 0..40");
    refused(&|i| i.mask[[0, 0]] = 2, "mask[0, 0] is 2; it must be in 0..2");
    refused(&|i| i.positions[[0, 0]] = -3, "positions[0, 0] is -3; it must be in 0..16777216");
    refused(
        &|i| i.mask = Array2::ones((1, 5)),
        "mask is (1, 5); with ids of (1, 3) and a cache of 0 tokens per row it must be (1, 3)",
    );
    refused(
        &|i| i.positions = Array2::zeros((2, 3)),
        "positions is (2, 3); with ids of (1, 3) and a cache of 0 tokens per row it must be (1, 3)",
    );
    refused(&|i| i.ids = Array2::zeros((1, 0)), "the step has no token: its ids are (1, 0)");
    reference.step(&good).unwrap();
    let two = Input::prompts(&[vec![1], vec![2]], Logits::Last);
    assert_eq!(
        reference.step(&two).unwrap_err().to_string(),
        "the step has 2 rows and the cache 1; reset the decoder between batches"
    );
    // A refused step leaves the cache as it was.
    assert_eq!(reference.cache().unwrap()[0].key.dim().2, 3);
    reference.step(&good.then(&[4])).unwrap();
}

#[test]
fn half_precision_is_near() {
    let (imported, sources) = build(Parts { routed: false, ..FULL });
    let options = Options { dtype: DType::F16, ..Options::default() };
    let validated = validate(&imported).unwrap();
    let mut reference = Reference::load_with(validated, &sources, options).unwrap();
    let input = Input::prompts(&[TOKENS.to_vec()], Logits::All);
    let found = reference.step(&input).unwrap().logits;
    let expected = naive::run(&imported, &sources, &TOKENS).logits.concat();
    let worst =
        found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    assert!(worst > TOLERANCE && worst < 0.05, "{worst}");
}
