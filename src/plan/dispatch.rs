//! What `auto` dispatch is on a CPU: a model of what a branch costs and saves.
//!
//! Counted is a step of one token, where a branch pays least: of several tokens the kept ones are
//! gathered, and a module is left out for some of them in any case. Such a step takes as long as its
//! weights take to read, so both sides are in bytes. A branch costs what a few of ONNX Runtime's nodes
//! do, and these cost the more, the more weights pass through the processor's caches between them;
//! `docs/lowering.md` has the measurements.

use skipgpt_passes::cost::ModuleCost;
use skipgpt_passes::ir::{Dispatch, ModuleId, ModuleKind};

/// Bytes of weights that take as long to read as a branch does where nothing is read between its nodes.
const BRANCH: f64 = 30e3;

/// What comes on top of them, as a share of the weights of the layer.
const BRANCH_SHARE: f64 = 0.012;

/// How the modules of `kind` are best skipped, of a model of these `modules` whose weights take `bytes`
/// each: by a branch, if the weights that their skipped tokens do not read are more than those that
/// the branches are worth, else masked. `keep` has the share of tokens that keep a module, and none for
/// one that does not decide.
pub(super) fn fastest(
    modules: &[ModuleCost],
    kind: ModuleKind,
    bytes: f64,
    keep: impl Fn(ModuleId) -> Option<f64>,
) -> Dispatch {
    let (mut saved, mut branches) = (0.0, 0.0);
    for module in modules.iter().filter(|module| module.id.kind == kind) {
        let Some(keep) = keep(module.id) else { continue };
        let layer = modules.iter().filter(|other| other.id.layer == module.id.layer);
        let layer: u64 = layer.map(|other| other.skippable + other.always).sum();
        saved += (1.0 - keep) * module.skippable as f64 * bytes;
        branches += BRANCH + BRANCH_SHARE * layer as f64 * bytes;
    }
    if saved < branches { Dispatch::Masked } else { Dispatch::Conditional }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three layers of `hidden`, an MLP of 8/3 of it, and keys and values a third of the queries.
    fn modules(hidden: u64) -> Vec<ModuleCost> {
        let square = hidden * hidden;
        let of = |layer, kind, skippable, always| {
            let id = ModuleId { layer, kind };
            ModuleCost { id, skippable, always, routed: true }
        };
        let attention = |layer| of(layer, ModuleKind::Attention, 2 * square, 2 * square / 3);
        let mlp = |layer| of(layer, ModuleKind::Mlp, 8 * square, 0);
        (0..3).flat_map(|layer| [attention(layer), mlp(layer)]).collect()
    }

    #[track_caller]
    fn masked_from(hidden: u64, kind: ModuleKind, bytes: f64, rates: [f64; 2]) {
        let dispatch = |keep| fastest(&modules(hidden), kind, bytes, |_| Some(keep));
        let found = rates.map(dispatch);
        assert_eq!(found, [Dispatch::Conditional, Dispatch::Masked], "{kind:?} {bytes}");
    }

    /// The smaller what is skipped beside its layer, and the layer beside a branch, the more of it has
    /// to be skipped.
    #[test]
    fn a_branch_has_to_save_what_it_costs() {
        masked_from(576, ModuleKind::Mlp, 4.0, [0.97, 0.99]);
        masked_from(576, ModuleKind::Mlp, 0.625, [0.96, 0.98]);
        masked_from(576, ModuleKind::Attention, 4.0, [0.92, 0.95]);
        masked_from(576, ModuleKind::Attention, 0.625, [0.86, 0.89]);
        masked_from(4096, ModuleKind::Attention, 0.625, [0.93, 0.94]);
    }

    /// Modules without a decision neither save nor cost: here one module's rate stands for all.
    #[test]
    fn only_modules_that_decide_count() {
        let of = |rate: fn(usize) -> Option<f64>| {
            fastest(&modules(576), ModuleKind::Mlp, 4.0, |id| rate(id.layer))
        };
        assert_eq!(of(|_| Some(1.0)), Dispatch::Masked);
        assert_eq!(of(|layer| (layer == 2).then_some(0.9)), Dispatch::Conditional);
        assert_eq!(of(|layer| Some(if layer == 2 { 0.9 } else { 1.0 })), Dispatch::Conditional);
        assert_eq!(of(|layer| Some(if layer == 2 { 0.96 } else { 1.0 })), Dispatch::Masked);
    }
}
