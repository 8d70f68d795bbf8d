//! Every backward against finite differences, and against candle's own where it can be composed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::float_cmp, reason = "these values are exact")]

use candle_core::{DType, Device, Tensor, Var};

use super::*;
use crate::model::ops::Kernels;

/// Tensors in, a tensor out.
pub(super) type Function<'a> = &'a dyn Fn(&[Tensor]) -> Tensor;

/// Central differences in `f32`: what rounding and curvature leave.
const DIFFERENCE: f32 = 1e-2;
const TOLERANCE: f64 = 4e-3;

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0.0_f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Gradients of `Σ f(inputs) · weights` with respect to every input.
fn gradients(f: Function<'_>, inputs: &[Tensor], weights: &Tensor) -> Vec<Vec<f32>> {
    let vars: Vec<_> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
    let tensors: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let store = (f(&tensors) * weights).unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter().map(|var| values(store.get(var).unwrap())).collect()
}

/// The same sum, in `f64`.
fn value(f: Function<'_>, inputs: &[Tensor], weights: &Tensor) -> f64 {
    let pairs = values(&f(inputs)).into_iter().zip(values(weights));
    pairs.map(|(y, weight)| f64::from(y) * f64::from(weight)).sum()
}

/// Compares the gradients of a dozen elements of every input with finite differences.
#[track_caller]
fn check(f: Function<'_>, inputs: &[Tensor]) {
    let weights = random(f(inputs).dims());
    check_weighted(f, inputs, &weights);
}

#[track_caller]
fn check_weighted(f: Function<'_>, inputs: &[Tensor], weights: &Tensor) {
    for (at, found) in gradients(f, inputs, weights).iter().enumerate() {
        let highest = found.iter().fold(0.0_f32, |highest, value| highest.max(value.abs()));
        for element in (0..found.len()).step_by(found.len().div_ceil(12)) {
            let moved = |by: f32| {
                let mut moved = values(&inputs[at]);
                moved[element] += by;
                let mut inputs = inputs.to_vec();
                inputs[at] = Tensor::from_vec(moved, inputs[at].shape(), &Device::Cpu).unwrap();
                value(f, &inputs, weights)
            };
            let expected = (moved(DIFFERENCE) - moved(-DIFFERENCE)) / f64::from(2.0 * DIFFERENCE);
            let error = (f64::from(found[element]) - expected).abs();
            let bound = TOLERANCE * f64::from(highest.max(0.1));
            assert!(error < bound, "input {at}[{element}]: {} {expected}", found[element]);
        }
    }
}

/// Compares values and gradients of two forms of the same function.
#[track_caller]
pub(super) fn agree(f: Function<'_>, g: Function<'_>, inputs: &[Tensor]) {
    let close = |found: &[f32], expected: &[f32]| {
        assert_eq!(found.len(), expected.len());
        let highest = expected.iter().fold(0.0_f32, |highest, value| highest.max(value.abs()));
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= 2e-5 * highest.max(1.0), "{found} {expected}");
        }
    };
    let (found, expected) = (f(inputs), g(inputs));
    assert_eq!(found.dims(), expected.dims());
    close(&values(&found), &values(&expected));
    let weights = random(found.dims());
    let pairs = gradients(f, inputs, &weights).into_iter().zip(gradients(g, inputs, &weights));
    pairs.for_each(|(found, expected)| close(&found, &expected));
}

#[test]
fn frozen_linears() {
    let (weight, bias) = (random(&[5, 7]), random(&[5]));
    let f = |x: &[Tensor]| frozen_linear(&x[0], &weight, Some(&bias)).unwrap();
    check(&f, &[random(&[6, 7])]);
    let composed = |x: &[Tensor]| Kernels::Fused.linear(&x[0], &weight, Some(&bias)).unwrap();
    agree(&f, &composed, &[random(&[6, 7])]);
}

#[test]
fn rows_without_a_gradient_send_none() {
    let weight = random(&[5, 7]);
    let f = |x: &[Tensor]| frozen_linear(&x[0], &weight, None).unwrap();
    let keep = Tensor::new(&[[1.0_f32], [0.0], [1.0], [0.0]], &Device::Cpu).unwrap();
    let weights = random(&[4, 5]).broadcast_mul(&keep).unwrap();
    check_weighted(&f, &[random(&[4, 7])], &weights);
    let found = gradients(&f, &[random(&[4, 7])], &weights);
    assert!(found[0][7..14].iter().chain(&found[0][21..]).all(|value| *value == 0.0));
    let none = weights.zeros_like().unwrap();
    assert!(gradients(&f, &[random(&[4, 7])], &none)[0].iter().all(|value| *value == 0.0));
}

#[test]
fn a_frozen_weight_has_no_gradient() {
    let (x, weight) = (Var::from_tensor(&random(&[3, 4])).unwrap(), random(&[2, 4]));
    let weight = Var::from_tensor(&weight).unwrap();
    let y = frozen_linear(&x, &weight, None).unwrap().sum_all().unwrap();
    let store = y.backward().unwrap();
    assert!(store.get(&x).is_some() && store.get(&weight).is_none());
}

#[test]
fn norms() {
    let scale = random(&[9]);
    let f = |x: &[Tensor]| rms_norm(&x[0], &scale, 1e-5).unwrap();
    check(&f, &[random(&[4, 9])]);
    let composed = |x: &[Tensor]| candle_nn::ops::rms_norm_slow(&x[0], &scale, 1e-5).unwrap();
    agree(&f, &composed, &[random(&[2, 3, 9])]);
}

#[test]
fn swiglus() {
    let f = |x: &[Tensor]| swiglu(&x[0], &x[1]).unwrap();
    check(&f, &[random(&[4, 9]), random(&[4, 9])]);
    let composed = |x: &[Tensor]| (x[0].silu().unwrap() * &x[1]).unwrap();
    agree(&f, &composed, &[random(&[4, 9]), random(&[4, 9])]);
}

#[test]
fn routed_adds() {
    let f = |x: &[Tensor]| routed_add(&x[0], &x[1], &x[2]).unwrap();
    check(&f, &[random(&[5, 6]), random(&[5, 6]), random(&[5, 1])]);
    let composed = |x: &[Tensor]| (&x[0] + x[1].broadcast_mul(&x[2]).unwrap()).unwrap();
    agree(&f, &composed, &[random(&[5, 6]), random(&[5, 6]), random(&[5, 1])]);
}

/// Forward hard, backward that of the soft form.
#[test]
fn keeps_go_straight_through() {
    let (noise, tau) = (random(&[40]), 2.5);
    let estimator = Estimator::StraightThrough { tau };
    let hard = |x: &[Tensor]| sampled(&x[0], &noise, estimator).unwrap();
    let soft = |x: &[Tensor]| {
        let scaled = ((&x[0] + &noise).unwrap() / tau).unwrap();
        candle_nn::ops::sigmoid(&scaled).unwrap().reshape((40, 1)).unwrap()
    };
    let margins = random(&[40]);
    let kept = values(&hard(std::slice::from_ref(&margins)));
    for ((keep, margin), noise) in kept.iter().zip(values(&margins)).zip(values(&noise)) {
        assert_eq!(*keep, f32::from(u8::from(margin + noise >= 0.0)));
    }
    let weights = random(&[40, 1]);
    let found = gradients(&hard, std::slice::from_ref(&margins), &weights);
    let expected = gradients(&soft, &[margins], &weights);
    for (found, expected) in found[0].iter().zip(&expected[0]) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
}

/// Of `loss = a · keep²` the ends have slopes 0 and 2a, and the expectation over decisions is exact
/// all the same: `dp / dm · a`.
#[test]
fn rein_max_is_right_to_the_second_order() {
    let margins = [-2.0_f32, -0.3, 0.0, 0.7, 3.0];
    let (a, tau) = (1.5_f32, 0.6_f32);
    let estimator = Estimator::ReinMax { tau: f64::from(tau) };
    let of = |noise: f32| {
        let noise = Tensor::full(noise, margins.len(), &Device::Cpu).unwrap();
        let f = |x: &[Tensor]| {
            let keep = sampled(&x[0], &noise, estimator).unwrap();
            (keep.sqr().unwrap() * f64::from(a)).unwrap()
        };
        let ones = Tensor::ones((margins.len(), 1), DType::F32, &Device::Cpu).unwrap();
        gradients(&f, &[Tensor::new(&margins, &Device::Cpu).unwrap()], &ones).remove(0)
    };
    for ((margin, kept), skipped) in margins.iter().zip(of(10.0)).zip(of(-10.0)) {
        let p = 1.0 / (1.0 + (-margin / tau).exp());
        let (found, expected) = (p * kept + (1.0 - p) * skipped, p * (1.0 - p) / tau * a);
        assert!((found - expected).abs() < 1e-6, "{margin}: {found} {expected}");
        assert!(skipped.abs() < 1e-6, "{margin}: {skipped}");
    }
}

#[test]
fn a_seed_is_the_gradient() {
    let (x, gradient) = (Var::from_tensor(&random(&[3, 4])).unwrap(), random(&[3, 4]));
    let y = (x.as_tensor() * 2.0).unwrap();
    let store = seed(&y, &gradient).unwrap().backward().unwrap();
    assert_eq!(values(store.get(&x).unwrap()), values(&(gradient * 2.0).unwrap()));
}

/// Two sequences long enough for three blocks of queries, two query heads a key head.
struct Heads {
    tokens: Causal,
    batch: usize,
}

const HEADS: (usize, usize, usize) = (4, 2, 6);

fn heads(sequence: usize) -> Heads {
    let angles = (random(&[2, sequence, 3]) * 3.0).unwrap();
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    Heads { tokens: Causal { sequence, cos, sin }, batch: 2 }
}

fn queries_keys_values(sequence: usize) -> Vec<Tensor> {
    let (heads, kv_heads, width) = HEADS;
    [heads, kv_heads, kv_heads].map(|heads| random(&[2 * sequence, heads * width])).to_vec()
}

impl Heads {
    fn fused(&self, x: &[Tensor]) -> Tensor {
        let (heads, kv_heads, width) = HEADS;
        attention(&self.tokens, [&x[0], &x[1], &x[2]], heads, kv_heads, width).unwrap()
    }

    /// Of candle's own operations.
    fn composed(&self, x: &[Tensor]) -> Tensor {
        let ((heads, kv_heads, width), sequence) = (HEADS, self.tokens.sequence);
        let split = |x: &Tensor, heads: usize| {
            let x = x.reshape((self.batch, sequence, heads, width)).unwrap();
            x.transpose(1, 2).unwrap().contiguous().unwrap()
        };
        let rope = |x: &Tensor| {
            Kernels::Differentiable.rope(x, &self.tokens.cos, &self.tokens.sin).unwrap()
        };
        let repeat = |x: Tensor| {
            let index = Tensor::new(&[0_u32, 0, 1, 1], &Device::Cpu).unwrap();
            x.index_select(&index, 1).unwrap()
        };
        let query = (rope(&split(&x[0], heads)) / (width as f64).sqrt()).unwrap();
        let (key, value) = (repeat(rope(&split(&x[1], kv_heads))), repeat(split(&x[2], kv_heads)));
        let hidden = |at: usize| {
            let (row, column) = (at / sequence, at % sequence);
            if column > row { f32::NEG_INFINITY } else { 0.0 }
        };
        let mask: Vec<f32> = (0..sequence * sequence).map(hidden).collect();
        let mask = Tensor::from_vec(mask, (sequence, sequence), &Device::Cpu).unwrap();
        let scores = query.matmul(&key.t().unwrap()).unwrap().broadcast_add(&mask).unwrap();
        let shares = candle_nn::ops::softmax(&scores, candle_core::D::Minus1).unwrap();
        let seen = shares.matmul(&value.contiguous().unwrap()).unwrap();
        seen.transpose(1, 2).unwrap().reshape((self.batch * sequence, heads * width)).unwrap()
    }
}

#[test]
fn attentions() {
    let short = heads(5);
    check(&|x: &[Tensor]| short.fused(x), &queries_keys_values(5));
    let long = heads(150);
    let (f, g) = (|x: &[Tensor]| long.fused(x), |x: &[Tensor]| long.composed(x));
    agree(&f, &g, &queries_keys_values(150));
}

#[test]
fn attention_leaves_out_queries_without_a_gradient() {
    let sequence = 70;
    let heads = heads(sequence);
    let inputs = queries_keys_values(sequence);
    let keep: Vec<f32> = (0..2 * sequence).map(|row| f32::from(u8::from(row % 3 == 0))).collect();
    let keep = Tensor::from_vec(keep, (2 * sequence, 1), &Device::Cpu).unwrap();
    let weights = random(&[2 * sequence, HEADS.0 * HEADS.2]).broadcast_mul(&keep).unwrap();
    let found = gradients(&|x: &[Tensor]| heads.fused(x), &inputs, &weights);
    let expected = gradients(&|x: &[Tensor]| heads.composed(x), &inputs, &weights);
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        assert!((found - expected).abs() < 2e-5, "{found} {expected}");
    }
    let width = HEADS.0 * HEADS.2;
    assert!(found[0][width..3 * width].iter().all(|value| *value == 0.0));
}

/// Keeps of both kinds, and what a module needs: hidden size 12, 3 sequences' worth of rows.
fn rows_and_keep(rows: usize, hidden: usize) -> Vec<Tensor> {
    let keep: Vec<f32> = (0..rows).map(|row| f32::from(u8::from(row % 4 != 1))).collect();
    vec![random(&[rows, hidden]), Tensor::from_vec(keep, (rows, 1), &Device::Cpu).unwrap()]
}

fn frozen(outer: usize, inner: usize) -> Frozen {
    let weight = (random(&[outer, inner]) * 0.3).unwrap();
    Frozen { weight, bias: Some(random(&[outer])) }
}

fn apply(linear: &Frozen, x: &Tensor) -> Tensor {
    frozen_linear(x, &linear.weight, linear.bias.as_ref()).unwrap()
}

#[test]
fn mlps_in_one_piece() {
    let (scale, parts) = (random(&[12]), [frozen(20, 12), frozen(20, 12), frozen(12, 20)]);
    let whole = |x: &[Tensor]| sampled_mlp([&x[0], &x[1]], (&scale, 1e-5), parts.clone()).unwrap();
    let links = |x: &[Tensor]| {
        let normed = rms_norm(&x[0], &scale, 1e-5).unwrap();
        let inner = swiglu(&apply(&parts[0], &normed), &apply(&parts[1], &normed)).unwrap();
        routed_add(&x[0], &apply(&parts[2], &inner), &x[1]).unwrap()
    };
    agree(&whole, &links, &rows_and_keep(9, 12));
    agree(
        &whole,
        &links,
        &[random(&[9, 12]), Tensor::zeros((9, 1), DType::F32, &Device::Cpu).unwrap()],
    );
}

#[test]
fn attention_in_one_piece() {
    let ((query, key, width), sequence) = (HEADS, 70);
    let heads = heads(sequence);
    let (q, kv) = (query * width, key * width);
    let parts = [frozen(q, 12), frozen(kv, 12), frozen(kv, 12), frozen(12, q)];
    let scale = random(&[12]);
    let whole = |x: &[Tensor]| {
        let norm = (&scale, 1e-5);
        sampled_attention([&x[0], &x[1]], norm, parts.clone(), &heads.tokens, HEADS).unwrap()
    };
    let links = |x: &[Tensor]| {
        let normed = rms_norm(&x[0], &scale, 1e-5).unwrap();
        let inputs = [0, 1, 2].map(|at: usize| apply(&parts[at], &normed));
        routed_add(&x[0], &apply(&parts[3], &heads.fused(&inputs)), &x[1]).unwrap()
    };
    agree(&whole, &links, &rows_and_keep(2 * sequence, 12));
}

/// Below the first layer nothing is trained: keep alone has a gradient.
#[test]
fn a_module_in_one_piece_may_have_nothing_to_train_before_it() {
    let (scale, parts) = (random(&[12]), [frozen(20, 12), frozen(20, 12), frozen(12, 20)]);
    let inputs = rows_and_keep(5, 12);
    let keep = Var::from_tensor(&inputs[1]).unwrap();
    let y = sampled_mlp([&inputs[0], &keep], (&scale, 1e-5), parts).unwrap();
    let store = y.sum_all().unwrap().backward().unwrap();
    assert!(store.get(&keep).is_some() && store.get(&inputs[0]).is_none());
}
