//! What a run is told, and whether it makes sense.

use std::borrow::Cow;

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::optimizer;
use super::schedule::{Line, Rate};

/// A setting outside its range.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{name} is {found}; expected {expected}")]
pub struct Error {
    /// As it is typed.
    pub name: &'static str,
    /// What was given.
    pub found: String,
    /// What would do.
    pub expected: Cow<'static, str>,
}

/// Everything that decides what a run computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Which of the two stages.
    pub stage: Stage,
    /// Optimiser steps.
    pub steps: u64,
    /// Windows of a forward pass.
    pub batch: usize,
    /// Forward passes of an optimiser step.
    pub accumulate: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Whether documents stay apart, each in windows of its own, and windows are padded.
    #[serde(default)]
    pub pad: bool,
    /// Of initial weights, noise and order.
    pub seed: u64,
    /// The learning rate.
    pub rate: Rate,
    /// The optimiser.
    pub optimizer: optimizer::Settings,
    /// What the frozen base is kept in.
    #[serde(default)]
    pub base: Base,
    /// Whether the dense model's predictions are learned in place of the text.
    pub distill: bool,
    /// The share of the windows that is held out; `None` where a text of its own is evaluated, or
    /// none.
    pub hold_out: Option<f64>,
}

/// What the matrices of the frozen base are kept in. On the processor products are `f32` in any case; on
/// a GPU products and activations are this too. Norms, routers, adapters and losses are `f32` on both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Base {
    /// As they are.
    #[default]
    F32,
    /// Rounded: half the memory.
    F16,
    /// Rounded, with the range of `f32`.
    Bf16,
}

impl Base {
    /// As candle calls it.
    pub(super) const fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// The two stages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Router tuning: the base is frozen.
    Router(Router),
    /// LoRA tuning: base and routers are frozen, decisions are argmax.
    Lora(Lora),
}

/// Router tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Router {
    /// The share to skip, over layers, both modules and tokens.
    pub skip: Line,
    /// What it is a share of.
    #[serde(default)]
    pub skip_of: Measure,
    /// How strong the pull towards it is.
    pub alpha: f64,
    /// The temperature.
    pub tau: Line,
    /// How decisions are sampled and their gradients estimated.
    #[serde(default)]
    pub estimator: Estimator,
    /// The initial bias towards keep; 0 is the published initialisation.
    pub keep_bias: f64,
    /// The width of a hidden layer; `None` for routers of one layer.
    #[serde(default)]
    pub width: Option<usize>,
}

/// What decisions count as, in the share that is skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Measure {
    /// All the same, as published.
    #[default]
    Modules,
    /// As many as the module has weights that a skipped token does not need: those of q and o, or of
    /// gate, up and down.
    Weights,
}

impl Measure {
    /// What a decision counts as, of a module with as many skippable `weights`.
    pub(super) const fn of(self, weights: f64) -> f64 {
        match self {
            Self::Modules => 1.0,
            Self::Weights => weights,
        }
    }
}

/// How a decision is sampled and its gradient estimated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Estimator {
    /// Straight through the Gumbel-softmax at temperature [`Router::tau`], as published.
    #[default]
    Gumbel,
    /// `ReinMax`, right to the second order; decisions too are drawn at the temperature.
    ReinMax,
}

/// LoRA tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Rows of A.
    pub rank: usize,
    /// The product is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Of A's input.
    pub dropout: f64,
    /// The projections adapted.
    pub targets: Vec<Target>,
}

/// A projection that can be adapted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention's output.
    O,
    /// Passes through `silu`.
    Gate,
    /// Multiplies it.
    Up,
    /// The MLP's output.
    Down,
}

impl Target {
    /// Every target, in the order they lie in a layer.
    pub const ALL: [Self; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Its name in a layer of a checkpoint: `self_attn.q_proj`.
    pub const fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Its name in PEFT's `target_modules`: `q_proj`.
    pub fn module(self) -> &'static str {
        self.path().rsplit('.').next().unwrap_or_default()
    }
}

impl Settings {
    /// Refuses settings outside their ranges; `longest` is the model's longest sequence.
    ///
    /// # Errors
    ///
    /// [`Error`] names the first.
    pub fn check(&self, longest: usize) -> Result<(), Error> {
        let positive = "a number above 0";
        let ensure = |holds: bool, name, found: &dyn std::fmt::Display, expected: &'static str| {
            let expected = Cow::Borrowed(expected);
            if holds { Ok(()) } else { Err(Error { name, found: found.to_string(), expected }) }
        };
        let inside = |value: f64| value > 0.0 && value < 1.0;
        let share = |value: f64| (0.0..=1.0).contains(&value);
        let above = |value: f64| value.is_finite() && value > 0.0;
        ensure(self.steps > 0, "--steps", &self.steps, "1 or more")?;
        ensure(self.batch > 0, "--batch", &self.batch, "1 or more")?;
        ensure(self.accumulate > 0, "--accumulate", &self.accumulate, "1 or more")?;
        if !(2..=longest).contains(&self.window) {
            return Err(Error {
                name: "--window",
                found: self.window.to_string(),
                expected: Cow::Owned(format!(
                    "2 to {longest}, which the model was trained for (max_position_embeddings)"
                )),
            });
        }
        let rate = &self.rate;
        ensure(above(rate.peak), "--learning-rate", &rate.peak, positive)?;
        ensure(share(rate.warm_up), "--warm-up", &rate.warm_up, "a share of the steps, 0 to 1")?;
        let decay = self.optimizer.weight_decay;
        ensure(decay.is_finite() && decay >= 0.0, "--weight-decay", &decay, "0 or more")?;
        if let Some(clip) = self.optimizer.clip {
            ensure(above(clip), "--clip", &clip, "a number above 0, or 0 for none")?;
        }
        if let Some(held) = self.hold_out {
            ensure(inside(held), "--hold-out", &held, "a share between 0 and 1")?;
        }
        match &self.stage {
            Stage::Router(router) => {
                let expected = "a share between 0 and 1, neither included";
                ensure(inside(router.skip.to), "--skip", &router.skip.to, expected)?;
                let from = router.skip.from;
                ensure(share(from), "--skip-from", &from, "a share from 0 to 1")?;
                let over = router.skip.share;
                ensure(share(over), "--skip-over", &over, "a share of the steps, 0 to 1")?;
                ensure(
                    router.alpha.is_finite() && router.alpha >= 0.0,
                    "--alpha",
                    &router.alpha,
                    "0 or more",
                )?;
                ensure(above(router.tau.from), "--tau-from", &router.tau.from, positive)?;
                ensure(above(router.tau.to), "--tau-to", &router.tau.to, positive)?;
                let width = router.width.unwrap_or(1);
                ensure(width > 0, "--router-width", &width, "1 or more")?;
                let bias = router.keep_bias;
                ensure(bias.is_finite(), "--keep-bias", &bias, "a finite number")
            }
            Stage::Lora(lora) => {
                ensure(lora.rank > 0, "--rank", &lora.rank, "1 or more")?;
                ensure(above(lora.alpha), "--lora-alpha", &lora.alpha, positive)?;
                let dropout = (0.0..1.0).contains(&lora.dropout);
                ensure(dropout, "--dropout", &lora.dropout, "0 or more and under 1")?;
                ensure(!lora.targets.is_empty(), "--targets", &"empty", "one projection or more")
            }
        }
    }
}
