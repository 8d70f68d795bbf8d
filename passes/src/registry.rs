//! The one table of passes: the default order, the names for help and options, `docs/passes.md`.

use crate::freeze_routers::FreezeRouters;
use crate::fuse_projections::FuseProjections;
use crate::lower_routers::LowerRouters;
use crate::merge_lora::MergeLora;
use crate::pass::Pass;
use crate::prune_modules::PruneModules;
use crate::quantize::Quantize;

/// Every pass, in the order they run. Each takes the phase the one before it leaves.
pub const PASSES: &[&dyn Pass] =
    &[&MergeLora, &FreezeRouters, &PruneModules, &FuseProjections, &Quantize, &LowerRouters];

/// A name that no pass has: what the user typed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no pass is named `{name}`; the passes are {}", names().join(", "))]
pub struct UnknownPass {
    /// The name.
    pub name: String,
}

/// The names of [`PASSES`], in their order.
pub fn names() -> Vec<&'static str> {
    PASSES.iter().map(|pass| pass.name()).collect()
}

/// The pass of that name.
///
/// # Errors
///
/// [`UnknownPass`], whose message lists the names.
pub fn find(name: &str) -> Result<&'static dyn Pass, UnknownPass> {
    let (pass, _) = through(name)?.split_last().ok_or_else(|| unknown(name))?;
    Ok(*pass)
}

/// The passes up to and including the one of that name.
///
/// # Errors
///
/// [`UnknownPass`], whose message lists the names.
pub fn through(name: &str) -> Result<&'static [&'static dyn Pass], UnknownPass> {
    let found = PASSES.iter().position(|pass| pass.name() == name);
    found.and_then(|last| PASSES.get(..=last)).ok_or_else(|| unknown(name))
}

fn unknown(name: &str) -> UnknownPass {
    UnknownPass { name: name.to_owned() }
}

#[cfg(test)]
mod tests;
