//! What a device computes, computed on the processor: in `f32` beside PyTorch and the walk on
//! slices, and in 16 bits beside `f32`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use candle_core::Device;

use super::super::tests::{
    Expected, adapter_in, close, parts_as, pass, routers, routers_in, sampled,
};
use super::*;
use crate::model::gradient::Estimator;
use crate::model::step::Decide;

fn on_device(router: bool, dtype: DType) -> crate::model::Parts {
    parts_as(router, Kernels::Device, dtype)
}

#[test]
fn routers_have_the_gradients_of_pytorch() {
    let expected = Expected::read();
    expected.check_routers(&routers_in(on_device(false, DType::F32), &expected));
}

#[test]
fn adapters_have_the_gradients_of_pytorch() {
    let expected = Expected::read();
    expected.check_adapters(&adapter_in(on_device(true, DType::F32), &expected));
}

/// A base of 16 bits under routers of 32: `f16`, because candle multiplies no `bf16` on the
/// processor. Decisions are those of `f32` but near ties, of which the fixture has none.
#[test]
fn a_base_of_16_bits_trains_routers_of_32() {
    let expected = Expected::read();
    let network = routers_in(on_device(false, DType::F16), &expected);
    assert!(network.parameters.iter().all(|one| one.var.dtype() == DType::F32));
    let found = pass(&network, &expected.batch(), &sampled(&expected, false, false));
    let prediction = f64::from(expected.values("router.prediction")[0]);
    assert!((found.prediction - prediction).abs() < 2e-3 * prediction, "{}", found.prediction);
    close(found.keep.unwrap(), expected.values("router.keep")[0]);
    expected.check_within(2e-2, "router", &network, &found);
    let network = adapter_in(on_device(true, DType::F16), &expected);
    let objective = Objective { sampling: None, distill: false, recompute: true };
    let pass = pass(&network, &expected.batch(), &objective);
    expected.check_within(2e-2, "lora", &network, &pass);
}

#[test]
fn distillation_and_evaluation_are_those_of_the_processor() {
    let expected = Expected::read();
    let (own, other) = (routers(&expected), routers_in(on_device(false, DType::F32), &expected));
    let (batch, objective) = (expected.batch(), sampled(&expected, false, true));
    let (own_pass, pass) = (pass(&own, &batch, &objective), pass(&other, &batch, &objective));
    assert!((own_pass.prediction - pass.prediction).abs() < 1e-5, "{}", pass.prediction);
    for (own, found) in own_pass.gradients.iter().zip(&pass.gradients) {
        let highest = own.iter().fold(1e-6_f32, |highest, value| highest.max(value.abs()));
        assert!(own.iter().zip(found).all(|(a, b)| (a - b).abs() < 1e-4 * highest));
    }
    let evaluate = |network: &Network| network.evaluate(&batch, Decide::Argmax).unwrap();
    let ((own_loss, own_counts), (loss, counts)) = (evaluate(&own), evaluate(&other));
    assert_eq!((own_counts, own_loss.count), (counts, loss.count));
    assert!((own_loss.sum - loss.sum).abs() < 1e-5 * own_loss.sum, "{}", loss.sum);
}

/// The pull is upwards under the target, downwards over it, and nothing on it.
#[test]
fn the_pull_is_found_where_the_keeps_are() {
    let scalar = |value: f32| Tensor::new(value, &Device::Cpu).unwrap();
    for (keep, expected) in [(0.5, -1.0), (0.75, 0.0), (0.9, 1.0_f32)] {
        let found = direction(&scalar(keep), 0.75).unwrap().to_scalar::<f32>().unwrap();
        assert!((found - expected).abs() < f32::EPSILON, "{keep}: {found}");
    }
    let mut sampling = Sampling {
        estimator: Estimator::StraightThrough { tau: 1.0 },
        noise: BTreeMap::new(),
        target: 0.5,
        measure: Measure::Modules,
        alpha: 8.0,
    };
    assert!(pull(&[], &sampling).unwrap().is_none());
    // 5 of 8 decisions keep; of 4 · 1 + 4 · 3 weights 7.
    let modules = [(4.0, 1.0), (1.0, 3.0)].map(|(kept, weights)| Module {
        kept: scalar(kept),
        decisions: 4,
        weights,
    });
    let found = |sampling: &Sampling| {
        pull(&modules, sampling).unwrap().unwrap().to_scalar::<f32>().unwrap()
    };
    assert!((found(&sampling) - 1.0).abs() < f32::EPSILON);
    sampling.measure = Measure::Weights;
    assert!((found(&sampling) + 0.5).abs() < f32::EPSILON);
}
