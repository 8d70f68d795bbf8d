//! From what was asked for to a [`Plan`]: everything the passes are told.

use skipgpt_passes::ir::{Config, Dispatch};
use skipgpt_passes::plan::{Plan, Quantization};

use crate::profile::{PlanError, Profile};
use crate::runtime::Provider;

/// What may be chosen about an export.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Choices {
    /// How routed modules skip; `None` for what is best on `provider`.
    ///
    /// On a CPU that was measured: a branch around either kind of module (`docs/lowering.md` has the
    /// numbers). On a GPU nothing was, and every decision that changes what runs is waited for there; so
    /// every module is computed, and nothing can be slower than that.
    pub dispatch: Option<Dispatch>,
    /// The ONNX Runtime provider the artifact is made for.
    pub provider: Provider,
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
    let Choices { dispatch, provider, quantization, rearrange, prune_below, always_above } =
        choices;
    let auto = match provider {
        Provider::Cpu => Dispatch::Conditional,
        Provider::Cuda => Dispatch::Masked,
    };
    let mut plan = Plan {
        removed: Vec::new(),
        always: Vec::new(),
        fuse_key_value: rearrange,
        // One product of twice the width and a copy that splits it again: no faster than two
        // products at one token, slower at many.
        fuse_gate_up: false,
        quantization,
        attention_dispatch: dispatch.unwrap_or(auto),
        mlp_dispatch: dispatch.unwrap_or(auto),
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::artifact::testing::config;

    #[test]
    fn auto_dispatch_is_the_providers() {
        let planned = |choices| {
            let plan = build(&config(), choices, None).unwrap();
            (plan.attention_dispatch, plan.mlp_dispatch)
        };
        let (masked, gathered) = (Dispatch::Masked, Dispatch::Gathered);
        let conditional = Dispatch::Conditional;
        assert_eq!(planned(Choices::default()), (conditional, conditional));
        let cuda = Choices { provider: Provider::Cuda, ..Choices::default() };
        assert_eq!(planned(cuda), (masked, masked));
        let told = Choices { dispatch: Some(gathered), ..cuda };
        assert_eq!(planned(told), (gathered, gathered));
    }
}
