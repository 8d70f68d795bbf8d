//! From decisions to the work they skip: shares of decisions, of multiply-adds, of weight bytes.

use std::collections::BTreeMap;

use serde::Serialize;
use skipgpt_passes::ir::{Dispatch, ModuleId, ModuleKind};

use crate::artifact::manifest::Manifest;
use crate::decoder::{Input, Logits, Routing};
use crate::eval::{Decisions, Skipped};
use crate::onnx::without::Stored;

/// What decisions skip of the work of the tokens timed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Shares {
    /// Shares of decisions.
    pub skipped: Skipped,
    /// Of the multiply-adds of the same model without skipping: projections, routers, the head for
    /// every position the graph gives logits of, and the attention core over every key.
    pub multiply_adds: f64,
    /// Of the weight bytes a step reads where every module runs: a module's are skipped in a step if
    /// no token keeps it.
    pub weight_bytes: f64,
}

/// What is known about an artifact's work.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Facts {
    /// Multiply-adds of a token in q and o of one attention module, and in one MLP.
    module: [f64; 2],
    /// Multiply-adds of a token in everything but attention cores and the head.
    everything: f64,
    /// Multiply-adds of a token in the head.
    head: f64,
    /// The tokens of a step that the head is computed for.
    logits: Logits,
    /// Multiply-adds of a token in one attention core, per key.
    core: f64,
    /// Attention modules.
    cores: f64,
    /// Whether skipped attention modules, and skipped MLPs, are not computed.
    saves: [bool; 2],
    /// Bytes of what a module reads only if it runs.
    weights: BTreeMap<ModuleId, u64>,
    /// Bytes of all weights a step reads.
    all_weights: u64,
}

const fn slot(kind: ModuleKind) -> usize {
    match kind {
        ModuleKind::Attention => 0,
        ModuleKind::Mlp => 1,
    }
}

impl Facts {
    /// From an artifact's manifest and the bytes of its weights by initializer.
    pub(super) fn of(manifest: &Manifest, weights: &BTreeMap<String, Stored>) -> Self {
        let Manifest { work, routing, .. } = manifest;
        let removed = |kind| routing.removed.iter().filter(|module| module.kind == kind).count();
        let count = |kind| (manifest.model.num_hidden_layers - removed(kind)).max(1) as f64;
        let (attention, mlp) = (count(ModuleKind::Attention), count(ModuleKind::Mlp));
        let computes = |dispatch| dispatch != Some(Dispatch::Masked);
        let has_head = weights.keys().any(|name| name.starts_with("head."));
        let read = |name: &str| !(has_head && name.starts_with("embedding"));
        let mut own: BTreeMap<ModuleId, u64> = BTreeMap::new();
        for (name, weight) in weights {
            if let Some(module) = skippable(name) {
                *own.entry(module).or_default() += weight.bytes;
            }
        }
        Self {
            module: [
                work.attention.multiply_adds as f64 / attention,
                work.mlp.multiply_adds as f64 / mlp,
            ],
            everything: (work.total().multiply_adds - work.head.multiply_adds) as f64,
            head: work.head.multiply_adds as f64,
            logits: manifest.options.logits,
            core: work.core_per_cached_token as f64 / attention,
            cores: attention,
            saves: [computes(routing.attention_dispatch), computes(routing.mlp_dispatch)],
            weights: own,
            all_weights: weights
                .iter()
                .filter(|(name, weight)| read(name) && !weight.inside)
                .map(|(_, weight)| weight.bytes)
                .sum(),
        }
    }

    /// What the decisions of `steps` skip.
    pub(super) fn shares(&self, steps: &[(Input, Routing)]) -> Shares {
        let mut decisions = Decisions::default();
        let (mut skipped, mut all) = (0.0, 0.0);
        let (mut unread, mut bytes) = (0.0, 0.0);
        for (input, routing) in steps {
            decisions.count(routing, input);
            let keys = input.mask.ncols() as f64;
            all += input.ids.len() as f64 * (self.everything + self.cores * self.core * keys);
            all += self.head
                * match self.logits {
                    Logits::All => input.ids.len() as f64,
                    Logits::Last => input.batch() as f64,
                };
            bytes += self.all_weights as f64;
            for (m, module) in routing.modules.iter().enumerate() {
                let kind = slot(module.kind);
                if !self.saves[kind] {
                    continue;
                }
                let places = ndarray::indices(input.ids.dim());
                let skips = places.into_iter().filter(|(b, s)| !routing.keeps(m, *b, *s)).count();
                let core = if kind == 0 { self.core * keys } else { 0.0 };
                skipped += skips as f64 * (self.module[kind] + core);
                if skips == input.ids.len() {
                    unread += self.weights.get(module).copied().unwrap_or_default() as f64;
                }
            }
        }
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        Shares {
            skipped: decisions.skipped(),
            multiply_adds: share(skipped, all),
            weight_bytes: share(unread, bytes),
        }
    }
}

/// The module that reads an initializer only for tokens it keeps. Its norm goes with an MLP; an
/// attention module's is needed for keys and values.
fn skippable(name: &str) -> Option<ModuleId> {
    let mut parts = name.strip_prefix("layers.")?.split('.');
    let layer = parts.next()?.parse().ok()?;
    match (parts.next()?, parts.next()?) {
        ("attention", "q" | "o") => Some(ModuleId { layer, kind: ModuleKind::Attention }),
        ("mlp", part) if part != "router" => Some(ModuleId { layer, kind: ModuleKind::Mlp }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array3, array};

    use super::*;
    use crate::bench::workload::input;

    fn module(layer: usize, kind: ModuleKind) -> ModuleId {
        ModuleId { layer, kind }
    }

    fn facts() -> Facts {
        let weights = [(module(0, ModuleKind::Attention), 10), (module(0, ModuleKind::Mlp), 30)];
        Facts {
            module: [100.0, 300.0],
            everything: 900.0,
            head: 100.0,
            logits: Logits::All,
            core: 2.0,
            cores: 2.0,
            saves: [true, true],
            weights: weights.into_iter().collect(),
            all_weights: 100,
        }
    }

    /// Two rows, one token each, 3 cached: the first row skips attention, both skip the MLP.
    fn step() -> (Input, Routing) {
        let margins = Array3::from_shape_vec((2, 2, 1), vec![-1.0, 1.0, -1.0, -1.0]);
        let modules = vec![module(0, ModuleKind::Attention), module(0, ModuleKind::Mlp)];
        (input(array![[1], [2]], 3), Routing { modules, margins: margins.expect("2 x 2") })
    }

    #[test]
    fn shares_count_tokens_and_steps() {
        let shares = facts().shares(&[step()]);
        let skipped = Skipped { attention: Some(0.5), mlp: Some(1.0), all: Some(0.75) };
        assert_eq!(shares.skipped, skipped);
        // 4 keys: a token takes 1000 + 2 cores of 8; skipped are 100 + 8 and twice 300.
        assert!((shares.multiply_adds - 708.0 / 2032.0).abs() < 1e-12, "{shares:?}");
        assert!((shares.weight_bytes - 0.3).abs() < 1e-12, "{shares:?}");
    }

    #[test]
    fn what_is_computed_and_multiplied_by_zero_is_not_skipped() {
        let facts = Facts { saves: [false, true], ..facts() };
        let shares = facts.shares(&[step()]);
        assert_eq!(shares.skipped.attention, Some(0.5));
        assert!((shares.multiply_adds - 600.0 / 2032.0).abs() < 1e-12, "{shares:?}");
        let facts = Facts { saves: [false, false], ..facts };
        assert!(facts.shares(&[step()]).weight_bytes.abs() < 1e-12);
    }

    #[test]
    fn the_head_counts_where_it_is_computed() {
        let margins = Array3::from_shape_vec((1, 2, 3), vec![-1.0, 1.0, 1.0, 1.0, -1.0, 1.0]);
        let modules = vec![module(0, ModuleKind::Mlp)];
        let routing = Routing { modules, margins: margins.expect("2 x 3") };
        let step = [(input(array![[1, 2, 3], [4, 5, 6]], 0), routing)];
        for (logits, heads) in [(Logits::All, 6.0), (Logits::Last, 2.0)] {
            let shares = Facts { logits, ..facts() }.shares(&step);
            // Twice 300, of 6 tokens of 900 and 2 cores of 2 at 3 keys.
            let all = 6.0 * (900.0 + 12.0) + heads * 100.0;
            assert!((shares.multiply_adds - 600.0 / all).abs() < 1e-12, "{shares:?}");
        }
    }

    #[test]
    fn weights_belong_to_modules() {
        let attention = Some(module(3, ModuleKind::Attention));
        assert_eq!(skippable("layers.3.attention.q.weight"), attention);
        assert_eq!(skippable("layers.3.attention.o.bias"), attention);
        assert_eq!(skippable("layers.3.mlp.gate.weight"), Some(module(3, ModuleKind::Mlp)));
        for always in [
            "layers.3.attention.kv.weight",
            "layers.3.attention.norm.weight",
            "layers.3.router.scores.weight",
            "layers.3.mlp.router.scores.weight",
            "embedding.weight",
        ] {
            assert_eq!(skippable(always), None);
        }
    }
}
