//! Gradients against PyTorch's, and steps that must agree with one another.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use skipgpt_passes::ir::{ModuleId, ModuleKind};
use skipgpt_passes::validate::validate;

use super::attach;
use super::batch::{Batch, Totals};
use super::network::{Network, Objective, Sampling};
use super::settings::{self, Lora, Measure, Router, Target};
use crate::checkpoint::{self, Checkpoint};
use crate::eval;
use crate::model::dropout::Clock;
use crate::model::gradient::Estimator;
use crate::model::ops::Kernels;
use crate::model::step::Decide;
use crate::model::{Options, Parts, Reference};
use crate::train::schedule::Line;
use crate::world::Alone;

/// Relative to the largest gradient of a tensor.
const TOLERANCE: f32 = 1e-4;

pub(super) fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/training/tiny")
}

pub(super) fn checkpoint(router: bool) -> Checkpoint {
    let (model, routers) = (tiny(), tiny().join("router.safetensors"));
    let request = checkpoint::Request {
        model: Some(&model),
        router: router.then_some(&routers),
        ..checkpoint::Request::default()
    };
    checkpoint::read(&request).unwrap()
}

pub(super) fn parts(router: bool) -> Parts {
    parts_as(router, Kernels::Differentiable, DType::F32)
}

/// On a device both the kernels and the base's precision are others; both run on the processor too.
pub(super) fn parts_as(router: bool, kernels: Kernels, dtype: DType) -> Parts {
    let checkpoint = checkpoint(router);
    let options = Options { dtype, kernels, ..Options::default() };
    let model = validate(&checkpoint.model).unwrap();
    Reference::load_with(model, &checkpoint.sources, options).unwrap().into_parts()
}

pub(super) fn router_settings() -> Router {
    let line = |value| Line { from: value, to: value, share: 0.0 };
    let estimator = settings::Estimator::Gumbel;
    Router {
        skip: line(0.25),
        skip_of: Measure::Modules,
        alpha: 8.0,
        estimator,
        tau: line(2.0),
        keep_bias: 0.0,
        width: None,
    }
}

fn lora_settings(dropout: f64) -> Lora {
    let targets = vec![Target::Q, Target::V, Target::Gate];
    Lora { rank: 3, alpha: 6.0, dropout, targets }
}

/// What a forward and backward pass gave.
pub(super) struct Pass {
    pub(super) loss: f64,
    pub(super) prediction: f64,
    pub(super) keep: Option<f64>,
    pub(super) gradients: Vec<Vec<f32>>,
}

/// A pass in one piece.
pub(super) fn pass(network: &Network, batch: &Batch, objective: &Objective) -> Pass {
    let sampling = objective.sampling.as_ref();
    let (totals, gradients) = if network.on_device() {
        network.gradients_on_device(batch, objective).unwrap()
    } else {
        let forward = network.forward(batch, objective).unwrap();
        let totals = forward.totals;
        (totals, network.backward(forward, sampling, &totals).unwrap())
    };
    let measure = sampling.map(|sampling| sampling.measure).unwrap_or_default();
    let (loss, prediction) = (totals.loss(sampling), totals.prediction());
    Pass { loss, prediction, keep: totals.keep(measure), gradients }
}

/// What PyTorch computed.
pub(super) struct Expected(HashMap<String, Tensor>);

impl Expected {
    pub(super) fn read() -> Self {
        let path = tiny().join("expected.safetensors");
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    }

    pub(super) fn values(&self, name: &str) -> Vec<f32> {
        self.0[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    pub(super) fn batch(&self) -> Batch {
        let ids = self.ids();
        let window = ids.len() / 2;
        Batch::new(ids.chunks_exact(window).map(<[u32]>::to_vec).collect(), window)
    }

    fn ids(&self) -> Vec<u32> {
        let ids = self.0["input_ids"].flatten_all().unwrap().to_vec1::<i32>().unwrap();
        ids.into_iter().map(|id| id as u32).collect()
    }

    /// Keep's draw minus skip's, by module.
    fn noise(&self) -> BTreeMap<ModuleId, Tensor> {
        let gumbel = &self.0["gumbel"];
        let mut noise = BTreeMap::new();
        for layer in 0..gumbel.dim(0).unwrap() {
            for (at, kind) in [ModuleKind::Attention, ModuleKind::Mlp].into_iter().enumerate() {
                let pairs = gumbel.get(layer).unwrap().get(at).unwrap().reshape(((), 2)).unwrap();
                let column = |at| pairs.narrow(1, at, 1).unwrap().squeeze(1).unwrap();
                let difference = (column(0) - column(1)).unwrap();
                noise.insert(ModuleId { layer, kind }, difference);
            }
        }
        noise
    }

    /// That routers have the fixture's losses and gradients, layers computed again or not.
    #[track_caller]
    pub(super) fn check_routers(&self, network: &Network) {
        for recompute in [false, true] {
            let pass = pass(network, &self.batch(), &sampled(self, recompute, false));
            close(pass.loss, self.values("router.loss")[0]);
            close(pass.prediction, self.values("router.prediction")[0]);
            close(pass.keep.unwrap(), self.values("router.keep")[0]);
            self.check_gradients("router", network, &pass);
        }
    }

    /// The same of adapters.
    #[track_caller]
    pub(super) fn check_adapters(&self, network: &Network) {
        for recompute in [false, true] {
            let objective = Objective { sampling: None, distill: false, recompute };
            let pass = pass(network, &self.batch(), &objective);
            close(pass.prediction, self.values("lora.prediction")[0]);
            close(pass.keep.unwrap(), self.values("lora.keep")[0]);
            self.check_gradients("lora", network, &pass);
        }
    }

    #[track_caller]
    pub(super) fn check_gradients(&self, stage: &str, network: &Network, pass: &Pass) {
        self.check_within(TOLERANCE, stage, network, pass);
    }

    #[track_caller]
    pub(super) fn check_within(&self, tolerance: f32, stage: &str, network: &Network, pass: &Pass) {
        for (parameter, found) in network.parameters.iter().zip(&pass.gradients) {
            let expected = self.values(&format!("{stage}.gradient.{}", parameter.name));
            let highest = expected.iter().fold(0.0_f32, |highest, value| highest.max(value.abs()));
            assert!(highest > 0.0, "{}", parameter.name);
            for (found, expected) in found.iter().zip(&expected) {
                let error = (found - expected).abs() / highest;
                assert!(error < tolerance, "{}: {found} {expected}", parameter.name);
            }
        }
    }
}

#[track_caller]
pub(super) fn close(found: f64, expected: f32) {
    assert!((found - f64::from(expected)).abs() < 1e-5 * found.abs(), "{found} {expected}");
}

pub(super) fn sampled(expected: &Expected, recompute: bool, distill: bool) -> Objective {
    let sampling = Sampling {
        estimator: Estimator::StraightThrough { tau: 2.0 },
        noise: expected.noise(),
        target: 0.75,
        measure: Measure::Modules,
        alpha: 8.0,
    };
    Objective { sampling: Some(sampling), distill, recompute }
}

/// The fixture's routers, by name.
pub(super) fn released() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(tiny().join("router.safetensors"), &Device::Cpu).unwrap()
}

/// The fixture's routers in place of new ones.
pub(super) fn routers(expected: &Expected) -> Network {
    routers_in(parts(false), expected)
}

pub(super) fn routers_in(parts: Parts, expected: &Expected) -> Network {
    let network = attach::routers(parts, &router_settings(), 1).unwrap();
    let released = released();
    assert_eq!(released.len(), network.parameters.len());
    for parameter in &network.parameters {
        parameter.var.set(&released[&parameter.name]).unwrap();
        assert!(expected.0.contains_key(&format!("router.gradient.{}", parameter.name)));
    }
    network
}

/// The fixture's adapter in place of a new one.
fn adapter(expected: &Expected) -> Network {
    adapter_in(parts(true), expected)
}

pub(super) fn adapter_in(parts: Parts, expected: &Expected) -> Network {
    let clock = Clock::default();
    let network = attach::adapters(parts, &lora_settings(0.0), 1, &clock).unwrap();
    for parameter in &network.parameters {
        let value = &expected.0[&format!("lora.value.{}", parameter.name)];
        parameter.var.set(value).unwrap();
    }
    network
}

#[test]
fn routers_have_the_gradients_of_pytorch() {
    let expected = Expected::read();
    expected.check_routers(&routers(&expected));
}

#[test]
fn adapters_have_the_gradients_of_pytorch() {
    let expected = Expected::read();
    expected.check_adapters(&adapter(&expected));
}

/// How many weights of a layer's two modules skipping leaves out.
fn weights(parts: &Parts) -> [f64; 2] {
    let config = &parts.config;
    let q_and_o = 2 * config.hidden_size * config.num_attention_heads * config.head_dim;
    let down = &parts.layers[0].mlp.as_ref().unwrap().down.weight;
    [q_and_o, 3 * down.elem_count()].map(|count| count as f64)
}

/// Where weights are what is to be skipped, a decision pulls as its module weighs, on a device too.
/// In the last layer that is seen at once: no other router reads what comes of its decisions.
#[test]
fn the_pull_is_by_weights() {
    let expected = Expected::read();
    let batch = expected.batch();
    let parts = parts(false);
    let ([q_and_o, mlp], last) = (weights(&parts), parts.layers.len() - 1);
    let [own, other] = [Kernels::Differentiable, Kernels::Device].map(|kernels| {
        let network = routers_in(parts_as(false, kernels, DType::F32), &expected);
        let pulled = |measure, alpha| {
            let mut objective = sampled(&expected, false, false);
            let sampling = objective.sampling.as_mut().unwrap();
            (sampling.measure, sampling.alpha, sampling.target) = (measure, alpha, 0.125);
            pass(&network, &batch, &objective)
        };
        let alpha = 4096.0;
        let [plain, modules, weights] = [
            pulled(Measure::Modules, 0.0),
            pulled(Measure::Modules, alpha),
            pulled(Measure::Weights, alpha),
        ];
        let keep = weights.keep.unwrap();
        assert!((keep - modules.keep.unwrap()).abs() > 1e-3, "{keep}");
        assert!((weights.loss - weights.prediction - alpha * (keep - 0.125)).abs() < 1e-6);
        let gradients = plain.gradients.iter().zip(&modules.gradients).zip(&weights.gradients);
        let all = network.parameters.iter().zip(gradients);
        for (parameter, ((plain, modules), weights)) in all.filter(|(one, _)| one.layer == last) {
            let own = if parameter.name.contains("mlp") { mlp } else { q_and_o };
            let factor = (2.0 * own / (q_and_o + mlp)) as f32;
            let highest = modules.iter().fold(0.0_f32, |highest, value| highest.max(value.abs()));
            for ((plain, modules), weights) in plain.iter().zip(modules).zip(weights) {
                let expected = plain + (modules - plain) * factor;
                let error = (weights - expected).abs() / highest;
                assert!(error < TOLERANCE, "{}: {weights} {expected}", parameter.name);
            }
        }
        weights.gradients
    });
    alike(&other, &own);
}

/// With every gate open the student is the teacher.
#[test]
fn distillation_is_the_distance_to_the_dense_model() {
    let expected = Expected::read();
    let network = routers(&expected);
    let distilled = || pass(&network, &expected.batch(), &sampled(&expected, false, true));
    let first = distilled();
    assert!(first.prediction > 0.01, "{}", first.prediction);
    for parameter in &network.parameters {
        let bias = parameter.name.ends_with("bias");
        let values = if bias { vec![100.0, -100.0] } else { vec![0.0; parameter.len()] };
        parameter.set(values).unwrap();
    }
    let pass = distilled();
    assert!(pass.prediction.abs() < 1e-5, "{}", pass.prediction);
    assert_eq!(pass.keep, Some(1.0));
}

/// The teacher has no adapter, however far the student's has been trained.
#[test]
fn adapters_are_taught_by_the_frozen_model() {
    let expected = Expected::read();
    let adapted = adapter(&expected);
    let fresh = attach::adapters(parts(true), &lora_settings(0.0), 1, &Clock::default()).unwrap();
    let distance = |a: &Tensor, b: &Tensor| {
        let squares = (a - b).unwrap().sqr().unwrap();
        squares.max_all().unwrap().to_scalar::<f32>().unwrap()
    };
    let batch = expected.batch();
    let teacher = adapted.dense(&batch).unwrap();
    assert!(distance(&teacher, &fresh.dense(&batch).unwrap()) == 0.0);
}

/// Dropped elements are the same when a layer runs again.
#[test]
fn recomputation_changes_nothing_under_dropout() {
    let expected = Expected::read();
    let clock = Clock::default();
    let network = attach::adapters(parts(true), &lora_settings(0.5), 1, &clock).unwrap();
    for parameter in &network.parameters {
        let value = &expected.0[&format!("lora.value.{}", parameter.name)];
        parameter.var.set(value).unwrap();
    }
    let gradients = |recompute| {
        let objective = Objective { sampling: None, distill: false, recompute };
        pass(&network, &expected.batch(), &objective).gradients
    };
    let without = gradients(false);
    clock.set(Some((3, 0)));
    assert_eq!(gradients(false), gradients(true));
    assert_ne!(gradients(false), without);
}

/// What a run reports while it trains is what `eval` measures on its result.
#[test]
fn evaluations_agree_with_eval() {
    let expected = Expected::read();
    let network = routers(&expected);
    let batch = expected.batch();
    let (loss, counts) = network.evaluate(&batch, Decide::Argmax).unwrap();
    let checkpoint = checkpoint(true);
    let model = validate(&checkpoint.model).unwrap();
    let mut reference = Reference::load(model, &checkpoint.sources).unwrap();
    let options = eval::Options { window: 70, stride: None, limit: None };
    let report =
        eval::perplexity(&mut reference, &expected.ids(), options, &Alone, |_| ()).unwrap();
    assert!((loss.mean() - report.nll).abs() < 1e-5, "{} {}", loss.mean(), report.nll);
    let skipped = 1.0 - counts.kept / counts.decisions;
    let found = report.skipped.unwrap();
    assert!((skipped - found.all.unwrap()).abs() < 1e-9);
    let [q_and_o, mlp] = weights(&network.parts);
    let by_weight = found.attention.unwrap() * q_and_o + found.mlp.unwrap() * mlp;
    let skipped = 1.0 - counts.kept_weights / counts.weights;
    assert!((skipped - by_weight / (q_and_o + mlp)).abs() < 1e-9, "{skipped}");
}

/// The rows of `noise` from `first` on.
fn part(
    noise: &BTreeMap<ModuleId, Tensor>,
    first: usize,
    count: usize,
) -> BTreeMap<ModuleId, Tensor> {
    let part = |one: &Tensor| one.narrow(0, first, count).unwrap().contiguous().unwrap();
    noise.iter().map(|(id, one)| (*id, part(one))).collect()
}

/// Products of other sizes are summed in another order, or in halves of `bf16` on one side alone.
#[track_caller]
fn alike(found: &[Vec<f32>], expected: &[Vec<f32>]) {
    for (found, expected) in found.iter().zip(expected) {
        let highest = expected.iter().fold(0.0_f32, |highest, value| highest.max(value.abs()));
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= 3.0 * TOLERANCE * highest, "{found} {expected}");
        }
    }
}

/// Windows of different lengths in one padded batch, against each by itself: losses, keep rates, and
/// gradients of the whole.
#[test]
fn padding_changes_nothing() {
    let expected = Expected::read();
    let (window, lengths) = (35, [35, 12, 1, 20]);
    let ids = expected.ids();
    let windows: Vec<Vec<u32>> =
        lengths.iter().enumerate().map(|(at, length)| ids[at * 9..][..*length].to_vec()).collect();
    let (router, lora) = (routers(&expected), adapter(&expected));
    let noise = router.noise(3, 5, 0..lengths.len() * window).unwrap();
    for (distill, measure) in [(false, Measure::Modules), (true, Measure::Weights)] {
        for network in [&router, &lora] {
            let sampled = network.parameters.iter().any(|one| one.name.contains("router"));
            let measure = if sampled { measure } else { Measure::default() };
            let objective = |noise: BTreeMap<ModuleId, Tensor>| Objective {
                sampling: sampled.then_some(Sampling {
                    estimator: Estimator::StraightThrough { tau: 2.0 },
                    noise,
                    target: 0.2,
                    measure,
                    alpha: 8.0,
                }),
                distill,
                recompute: false,
            };
            let whole = objective(noise.clone());
            let batch = Batch::new(windows.clone(), window);
            let padded = pass(network, &batch, &whole);
            let alone = |at: usize| {
                let batch = Batch::new(vec![windows[at].clone()], lengths[at]);
                let objective = objective(part(&noise, at * window, lengths[at]));
                (network.forward(&batch, &objective).unwrap(), objective)
            };
            let parts: Vec<_> = (0..lengths.len()).map(alone).collect();
            let mut totals = Totals::default();
            for (forward, _) in &parts {
                let sums = totals.0.iter_mut().zip(forward.totals.0);
                sums.for_each(|(sum, value)| *sum += value);
            }
            assert!((padded.prediction - totals.prediction()).abs() < 1e-5);
            assert!((padded.keep.unwrap() - totals.keep(measure).unwrap()).abs() < 1e-12);
            let mut sums: Vec<Vec<f32>> = Vec::new();
            for (forward, objective) in parts {
                let sampling = objective.sampling.as_ref();
                let gradients = network.backward(forward, sampling, &totals).unwrap();
                if sums.is_empty() {
                    sums = gradients;
                } else {
                    let each = sums.iter_mut().flatten().zip(gradients.iter().flatten());
                    each.for_each(|(sum, value)| *sum += value);
                }
            }
            alike(&padded.gradients, &sums);
            assert!(padded.gradients.iter().flatten().any(|value| *value != 0.0));
        }
    }
}
