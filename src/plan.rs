//! From what was asked for to a [`Plan`]: everything the passes are told.

use skipgpt_passes::ir::{Config, Dispatch};
use skipgpt_passes::plan::{Plan, Quantization};

use crate::profile::{PlanError, Profile};

/// What may be chosen about an export.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Choices {
    /// How routed modules skip; `None` for what was measured to be fastest on a CPU: a branch
    /// around attention, whose core would run for skipped tokens too, and gathered MLP rows, which
    /// cost less than a branch (`docs/lowering.md` has the numbers).
    pub dispatch: Option<Dispatch>,
    /// Which weights are stored in few bits, and how.
    pub quantization: Option<Quantization>,
    /// Whether weights may be rearranged: not when they are shared with the checkpoint.
    pub rearrange: bool,
    /// Remove modules kept at most this often.
    pub prune_below: Option<f64>,
    /// Take the router from modules kept at least this often.
    pub always_above: Option<f64>,
}

/// Thresholds without the rates they apply to, or thresholds that contradict the profile.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A threshold needs measured keep rates.
    #[error("--{0} needs --profile FILE: the keep rates that `profile` measures")]
    NoProfile(&'static str),
    /// The profile does not fit.
    #[error(transparent)]
    Profile(#[from] PlanError),
}

/// The plan for a model of this `config`.
///
/// # Errors
///
/// [`Error`] if thresholds are out of range, or the profile is missing or of another model.
pub fn build(config: &Config, choices: Choices, profile: Option<&Profile>) -> Result<Plan, Error> {
    let Choices { dispatch, quantization, rearrange, prune_below, always_above } = choices;
    let mut plan = Plan {
        removed: Vec::new(),
        always: Vec::new(),
        fuse_key_value: rearrange,
        // One product of twice the width and a copy that splits it again: no faster than two
        // products at one token, slower at many.
        fuse_gate_up: false,
        quantization,
        attention_dispatch: dispatch.unwrap_or(Dispatch::Conditional),
        mlp_dispatch: dispatch.unwrap_or(Dispatch::Conditional),
    };
    if let Some(profile) = profile {
        let selection = profile.plan(config, prune_below, always_above)?;
        plan.removed = selection.removed;
        plan.always = selection.always;
    } else if prune_below.is_some() {
        return Err(Error::NoProfile("prune-below"));
    } else if always_above.is_some() {
        return Err(Error::NoProfile("always-above"));
    }
    Ok(plan)
}
