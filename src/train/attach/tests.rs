//! Routers of two layers.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use candle_core::Device;

use super::*;
use crate::model::ops::Kernels;
use crate::train::tests::{Expected, close, parts, pass, released, router_settings, sampled};

fn settings(width: usize) -> settings::Router {
    settings::Router { width: Some(width), ..router_settings() }
}

fn values(network: &Network, name: &str) -> Vec<f32> {
    let named = |one: &&Parameter| one.name == name;
    network.parameters.iter().find(named).unwrap().values().unwrap()
}

#[test]
fn they_begin_as_documented() {
    let network = routers(parts(false), &settings::Router { keep_bias: 1.5, ..settings(6) }, 1);
    let network = network.unwrap();
    let hidden = network.parts.config.hidden_size;
    let first = "model.layers.1.router_mlp";
    let shapes = [
        ("hidden_layer.weight", vec![6, hidden], (6.0 / hidden as f64).sqrt()),
        ("hidden_layer.bias", vec![6], 0.0),
        ("weight_predictor.weight", vec![2, 6], 0.1 * (3.0_f64 / 6.0).sqrt()),
        ("weight_predictor.bias", vec![2], 1.5),
    ];
    for (name, shape, bound) in shapes {
        let name = format!("{first}.{name}");
        let parameter = network.parameters.iter().find(|one| one.name == name).unwrap();
        assert_eq!(parameter.var.dims(), shape);
        let values = parameter.values().unwrap();
        let highest = values.iter().fold(0.0_f32, |highest, value| highest.max(value.abs()));
        let (highest, bound) = (f64::from(highest), bound + 1e-6);
        assert!(highest <= bound && highest >= 0.5 * (bound - 1e-6), "{name}: {highest} {bound}");
    }
    assert_eq!(values(&network, &format!("{first}.weight_predictor.bias")), [1.5, -1.5]);
    assert_ne!(
        values(&network, "model.layers.0.router_attention.hidden_layer.weight"),
        values(&network, "model.layers.0.router_mlp.hidden_layer.weight")
    );
}

/// A hidden layer that gives `relu(x)` and `relu(−x)` makes any linear router of two layers; what
/// PyTorch says of that one's gradient is the difference of the halves'.
#[test]
fn a_linear_router_in_two_layers_has_its_gradients() {
    let expected = Expected::read();
    let linear = released();
    let hidden = parts(false).config.hidden_size;
    let network = routers(parts(false), &settings(2 * hidden), 1).unwrap();
    for parameter in &network.parameters {
        let (router, part) = parameter.name.rsplit_once('.').unwrap();
        let (router, layer) = router.rsplit_once('.').unwrap();
        let of = |part: &str| -> Vec<Vec<f32>> {
            linear[&format!("{router}.{OUTPUT}.{part}")].to_vec2().unwrap()
        };
        let new: Vec<f32> = match (layer, part) {
            (HIDDEN, "weight") => (0..2 * hidden * hidden)
                .map(|at| match (at / hidden, at % hidden) {
                    (row, column) if row == column => 1.0,
                    (row, column) if row == hidden + column => -1.0,
                    _ => 0.0,
                })
                .collect(),
            (HIDDEN, _) => vec![0.0; 2 * hidden],
            (_, "weight") => {
                let both = |row: Vec<f32>| [row.clone(), row.iter().map(|v| -v).collect()].concat();
                of("weight").into_iter().flat_map(both).collect()
            }
            (_, _) => linear[&parameter.name].to_vec1().unwrap(),
        };
        parameter.set(new).unwrap();
    }
    for recompute in [false, true] {
        let objective = sampled(&expected, recompute, false);
        let pass = pass(&network, &expected.batch(), &objective);
        close(pass.loss, expected.values("router.loss")[0]);
        close(pass.keep.unwrap(), expected.values("router.keep")[0]);
        for (parameter, gradient) in network.parameters.iter().zip(&pass.gradients) {
            if parameter.name.contains(HIDDEN) {
                assert!(gradient.iter().any(|value| *value != 0.0), "{}", parameter.name);
                continue;
            }
            let known = expected.values(&format!("router.gradient.{}", parameter.name));
            let found: Vec<f32> = if parameter.name.ends_with("weight") {
                let halves = |row: &[f32]| -> Vec<f32> {
                    let (right, left) = row.split_at(hidden);
                    right.iter().zip(left).map(|(right, left)| right - left).collect()
                };
                gradient.chunks_exact(2 * hidden).flat_map(halves).collect()
            } else {
                gradient.clone()
            };
            let highest = known.iter().fold(0.0_f32, |highest, value| highest.max(value.abs()));
            for (found, known) in found.iter().zip(&known) {
                let error = (found - known).abs() / highest;
                assert!(error < 1e-4, "{}: {found} {known}", parameter.name);
            }
        }
    }
}

/// Of every parameter of a router, by finite differences of its margins.
#[test]
fn margins_have_the_gradients_of_finite_differences() {
    const STEP: f32 = 1e-3;
    let network = routers(parts(false), &settings(5), 3).unwrap();
    let hidden = network.parts.config.hidden_size;
    let number = |at: usize| ((at * at * 7919 + at * 13) % 1009) as f32 / 504.5 - 1.0;
    let tensor = |rows: usize, width: usize, from: usize| {
        let values: Vec<f32> = (0..rows * width).map(|at| number(at + from)).collect();
        Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
    };
    let (x, weights) = (tensor(9, hidden, 0), tensor(9, 1, 77));
    let attention = network.parts.layers[0].attention.as_ref().unwrap();
    let Routing::Routed { source: Source::Own { router, .. }, .. } = &attention.routing else {
        panic!("the module is not routed")
    };
    let sum = || {
        let margins = router.margins(&x, Kernels::Differentiable).unwrap();
        (margins * &weights).unwrap().sum_all().unwrap()
    };
    for parameter in &network.parameters[..4] {
        // Biases too are somewhere else than at nothing.
        let values = parameter.values().unwrap();
        let moved = values.iter().enumerate().map(|(at, value)| value + 0.1 * number(at));
        parameter.set(moved.collect()).unwrap();
    }
    let gradients = sum().backward().unwrap();
    for parameter in &network.parameters[..4] {
        let found = gradients.get(&parameter.var).unwrap().flatten_all().unwrap();
        let found: Vec<f32> = found.to_vec1().unwrap();
        let highest = found.iter().fold(0.0_f32, |highest, value| highest.max(value.abs()));
        assert!(highest > 0.0, "{}", parameter.name);
        let values = parameter.values().unwrap();
        for (at, found) in found.iter().enumerate() {
            let moved = |by: f32| {
                let mut values = values.clone();
                values[at] += by;
                parameter.set(values).unwrap();
                sum().to_scalar::<f32>().unwrap()
            };
            let difference = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            parameter.set(values.clone()).unwrap();
            let error = (found - difference).abs();
            assert!(error < 2e-2 * highest, "{} {at}: {found} {difference}", parameter.name);
        }
    }
}
