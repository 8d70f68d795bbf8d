//! Clipping and `AdamW`, as PyTorch computes them.
//!
//! ```text
//! m = β1 · m + (1 − β1) · g          v = β2 · v + (1 − β2) · g²
//! p = p · (1 − lr · decay) − lr · m / (1 − β1ᵗ) / (√(v / (1 − β2ᵗ)) + eps)
//! ```
//!
//! Candle's own optimiser keeps its moments to itself, and a run could not be resumed.

use candle_core::Result;
use serde::{Deserialize, Serialize};

use super::parameters::{self, Parameter};

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPS: f64 = 1e-8;

/// What is added to the norm when gradients are clipped, as in PyTorch.
const CLIP_EPS: f64 = 1e-6;

/// The optimiser's settings but the learning rate, which its schedule gives.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Decoupled weight decay, of every parameter.
    pub weight_decay: f64,
    /// The most that the norm of all gradients together may be; `None` leaves them.
    pub clip: Option<f64>,
}

/// First and second moments, one vector per parameter.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct AdamW {
    settings: Settings,
    pub(super) first: Vec<Vec<f32>>,
    pub(super) second: Vec<Vec<f32>>,
}

impl AdamW {
    pub(super) fn new(settings: Settings, parameters: &[Parameter]) -> Self {
        let zeros: Vec<_> = parameters.iter().map(|one| vec![0.0; one.len()]).collect();
        Self { settings, first: zeros.clone(), second: zeros }
    }

    /// Moves the parameters against `gradients`, whose norm is `norm`; `step` counts from 1.
    pub(super) fn step(
        &mut self,
        parameters: &[Parameter],
        gradients: &[Vec<f32>],
        step: u64,
        rate: f64,
        norm: f64,
    ) -> Result<()> {
        let scale = self.settings.clip.map_or(1.0, |clip| (clip / (norm + CLIP_EPS)).min(1.0));
        let step = i32::try_from(step).unwrap_or(i32::MAX);
        let (bias1, bias2) = (1.0 - BETA1.powi(step), (1.0 - BETA2.powi(step)).sqrt());
        let moments = self.first.iter_mut().zip(&mut self.second);
        let mut all = parameters::values(parameters)?;
        for ((values, gradient), (first, second)) in all.iter_mut().zip(gradients).zip(moments) {
            let each = values.iter_mut().zip(gradient).zip(first.iter_mut().zip(second));
            for ((value, gradient), (first, second)) in each {
                let gradient = f64::from(*gradient) * scale;
                let m = BETA1 * f64::from(*first) + (1.0 - BETA1) * gradient;
                let v = BETA2 * f64::from(*second) + (1.0 - BETA2) * gradient * gradient;
                let decayed = f64::from(*value) * (1.0 - rate * self.settings.weight_decay);
                let moved = decayed - rate / bias1 * m / (v.sqrt() / bias2 + EPS);
                (*value, *first, *second) = (moved as f32, m as f32, v as f32);
            }
        }
        parameters::set(parameters, all)
    }
}

/// The Euclidean norm of all gradients together.
pub(super) fn norm(gradients: &[Vec<f32>]) -> f64 {
    let squares = gradients.iter().flatten().map(|value| f64::from(*value).powi(2));
    squares.sum::<f64>().sqrt()
}
