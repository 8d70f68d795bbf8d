//! Each operation beside the one of its name on slices, on the processor.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use candle_core::{Device, Var};

use super::super::{self as slices, tests::agree};
use super::*;

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0.0_f32, 1.0, shape, &Device::Cpu).unwrap()
}

#[test]
fn projections() {
    let (weight, bias) = (random(&[5, 7]), random(&[5]));
    for bias in [None, Some(&bias)] {
        agree(
            &|x: &[Tensor]| frozen_linear(&x[0], &weight, bias).unwrap(),
            &|x: &[Tensor]| slices::frozen_linear(&x[0], &weight, bias).unwrap(),
            &[random(&[6, 7])],
        );
    }
    assert!(frozen_linear(&random(&[6, 8]), &weight, None).is_err());
}

#[test]
fn a_frozen_weight_has_no_gradient() {
    let x = Var::from_tensor(&random(&[3, 4])).unwrap();
    let weight = Var::from_tensor(&random(&[2, 4])).unwrap();
    let y = frozen_linear(&x, &weight, None).unwrap().sum_all().unwrap();
    let store = y.backward().unwrap();
    assert!(store.get(&x).is_some() && store.get(&weight).is_none());
}

#[test]
fn norms() {
    let scale = random(&[9]);
    agree(
        &|x: &[Tensor]| rms_norm(&x[0], &scale, 1e-5).unwrap(),
        &|x: &[Tensor]| slices::rms_norm(&x[0], &scale, 1e-5).unwrap(),
        &[random(&[2, 3, 9])],
    );
}

#[test]
fn sums_of_routed_modules() {
    let keep = Tensor::new(&[[1.0_f32], [0.0], [1.0], [0.0], [1.0]], &Device::Cpu).unwrap();
    agree(
        &|x: &[Tensor]| routed_add(&x[0], &x[1], &x[2]).unwrap(),
        &|x: &[Tensor]| slices::add::routed_add(&x[0], &x[1], &x[2]).unwrap(),
        &[random(&[5, 6]), random(&[5, 6]), keep],
    );
}

#[test]
fn keeps() {
    let noise = random(&[40]);
    for estimator in [Estimator::StraightThrough { tau: 2.5 }, Estimator::ReinMax { tau: 0.6 }] {
        agree(
            &|x: &[Tensor]| sampled(&x[0], &noise, estimator).unwrap(),
            &|x: &[Tensor]| slices::keep::sampled(&x[0], &noise, estimator).unwrap(),
            &[random(&[40])],
        );
    }
}

#[test]
fn a_seed_is_the_gradient() {
    let (x, gradient) = (Var::from_tensor(&random(&[3, 4])).unwrap(), random(&[3, 4]));
    let y = (x.as_tensor() * 2.0).unwrap();
    let store = seed(&y, &gradient).unwrap().backward().unwrap();
    let difference = (store.get(&x).unwrap() - (gradient * 2.0).unwrap()).unwrap();
    assert!(difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-6);
}

/// Three sequences of two query heads a key head: short ones together, long ones in several chunks.
#[test]
fn attentions() {
    let (heads, kv_heads, width) = (4, 2, 6);
    for (sequence, chunked) in [(5, false), (33, true)] {
        assert_eq!(heads * sequence * sequence * 3 > SCORES, chunked);
        let angles = (random(&[3, sequence, 3]) * 3.0).unwrap();
        let tokens = Causal { sequence, cos: angles.cos().unwrap(), sin: angles.sin().unwrap() };
        let inputs = [heads, kv_heads, kv_heads].map(|n| random(&[3 * sequence, n * width]));
        agree(
            &|x: &[Tensor]| {
                attention(&tokens, [&x[0], &x[1], &x[2]], heads, kv_heads, width).unwrap()
            },
            &|x: &[Tensor]| {
                slices::attention(&tokens, [&x[0], &x[1], &x[2]], heads, kv_heads, width).unwrap()
            },
            &inputs,
        );
    }
}
