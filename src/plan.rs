//! From what was asked for to a [`Plan`]: everything the passes are told.

use skipgpt_passes::ir::{DType, Dispatch, Model, ModuleKind};
use skipgpt_passes::plan::{Plan, Quantization};

use crate::profile::{PlanError, Profile};
use crate::runtime::Provider;

mod dispatch;

/// What may be chosen about an export.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Choices {
    /// How routed modules skip; `None` for what is best on `provider`.
    ///
    /// On a CPU that was measured (`docs/lowering.md` has the numbers): a branch around either kind of
    /// module, unless a profile says that it skips less than a branch costs. On a GPU nothing was, and
    /// every decision that changes what runs is waited for there; so every module is computed, and
    /// nothing can be slower than that.
    pub dispatch: Option<Dispatch>,
    /// The ONNX Runtime provider the artifact is made for.
    pub provider: Provider,
    /// The type of weights that are not in few bits.
    pub dtype: DType,
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

/// The plan for `model`.
///
/// # Errors
///
/// [`Error`] if thresholds are out of range, or the profile is missing or of another model.
pub fn build(model: &Model, choices: Choices, profile: Option<&Profile>) -> Result<Plan, Error> {
    let Choices { dispatch: told, quantization, rearrange, prune_below, always_above, .. } =
        choices;
    let mut plan = Plan {
        removed: Vec::new(),
        always: Vec::new(),
        fuse_key_value: rearrange,
        // One product of twice the width and a copy that splits it again: no faster than two
        // products at one token, slower at many.
        fuse_gate_up: false,
        quantization,
        attention_dispatch: told.unwrap_or(Dispatch::Conditional),
        mlp_dispatch: told.unwrap_or(Dispatch::Conditional),
    };
    if let Some(profile) = profile {
        let selection = profile.plan(&model.config, prune_below, always_above)?;
        plan.removed = selection.removed;
        plan.always = selection.always;
    } else if prune_below.is_some() {
        return Err(Error::NoProfile("prune-below"));
    } else if always_above.is_some() {
        return Err(Error::NoProfile("always-above"));
    }
    if told.is_none() {
        [plan.attention_dispatch, plan.mlp_dispatch] = [ModuleKind::Attention, ModuleKind::Mlp]
            .map(|kind| auto(model, choices, &plan, profile, kind));
    }
    Ok(plan)
}

/// What is best for the modules of `kind`, which `plan` leaves as they are or prunes.
fn auto(
    model: &Model,
    choices: Choices,
    plan: &Plan,
    profile: Option<&Profile>,
    kind: ModuleKind,
) -> Dispatch {
    match (choices.provider, profile) {
        (Provider::Cuda, _) => Dispatch::Masked,
        (Provider::Cpu, None) => Dispatch::Conditional,
        (Provider::Cpu, Some(profile)) => {
            let bytes = match plan.quantization {
                None => choices.dtype.size() as f64,
                Some(Quantization { scheme, .. }) => {
                    (scheme.block_bytes() + choices.dtype.size()) as f64 / scheme.block as f64
                }
            };
            let keep = |id| {
                let pruned = plan.removed.contains(&id) || plan.always.contains(&id);
                let found = profile.modules.iter().find(|module| module.module == id);
                found.filter(|_| !pruned).map(|module| module.keep)
            };
            dispatch::fastest(&model.multiply_adds().modules, kind, bytes, keep)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use skipgpt_passes::ir::ModuleId;

    use super::*;
    use crate::artifact::testing::model;
    use crate::profile::{self, Module};

    #[test]
    fn auto_dispatch_is_the_providers() {
        let planned = |choices| {
            let plan = build(&model(), choices, None).unwrap();
            (plan.attention_dispatch, plan.mlp_dispatch)
        };
        let (masked, gathered) = (Dispatch::Masked, Dispatch::Gathered);
        let conditional = Dispatch::Conditional;
        assert_eq!(planned(Choices::default()), (conditional, conditional));
        let cuda = Choices { provider: Provider::Cuda, ..Choices::default() };
        assert_eq!(planned(cuda), (masked, masked));
        let told = Choices { dispatch: Some(gathered), ..cuda };
        assert_eq!(planned(told), (gathered, gathered));

        // A branch costs more than all of so small a model; no attention module decides.
        let profile = Profile {
            version: profile::VERSION,
            model: (&model().config).into(),
            tokens: 8,
            window: 8,
            skipped: crate::eval::Skipped { attention: None, mlp: Some(0.9), all: Some(0.9) },
            positions: vec![],
            modules: [0, 1]
                .map(|layer| Module {
                    module: ModuleId { layer, kind: ModuleKind::Mlp },
                    keep: 0.1,
                    by_position: vec![],
                })
                .to_vec(),
        };
        let with_profile = |choices| {
            let plan = build(&model(), choices, Some(&profile)).unwrap();
            (plan.attention_dispatch, plan.mlp_dispatch)
        };
        assert_eq!(with_profile(Choices::default()), (conditional, masked));
        assert_eq!(with_profile(told), (gathered, gathered));
    }
}
