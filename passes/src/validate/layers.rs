//! Rules on the model's parts: where they are, what shapes they have, who decides.

use super::{Checker, Rule};
use crate::ir::{
    Attention, GateUp, KeyValue, Layer, Mlp, ModuleKind, Phase, Router, Routing, SharedRouter,
    Source, Tap,
};

impl<'a> Checker<'a> {
    pub(super) fn model(&mut self) {
        let model = self.model;
        let (hidden, vocab) = (model.config.hidden_size, model.config.vocab_size);
        self.quantizable("embedding", &model.embedding, [Some(vocab), Some(hidden)]);
        let mut previous = None;
        for layer in &model.layers {
            let path = format!("layers.{}", layer.index);
            if let Some(previous) = previous
                && layer.index <= previous
            {
                self.report(&path, Rule::LayerOrder { previous });
            }
            previous = Some(layer.index);
            let layers = model.config.num_hidden_layers;
            if layer.index >= layers {
                self.report(&path, Rule::LayerOutOfRange { layers });
            }
            self.layer(&path, layer);
        }
        if model.cached_layers().next().is_none() {
            self.report("layers", Rule::NoAttention);
        }
        self.weight("norm", &model.norm, [hidden]);
        self.linear("head", &model.head, [Some(vocab), Some(hidden)]);
    }

    fn layer(&mut self, path: &str, layer: &'a Layer) {
        if let Some(router) = &layer.router {
            self.shared_router(&format!("{path}.router"), router);
        }
        self.slots(path, layer);
        if let Some(attention) = &layer.attention {
            self.attention(&format!("{path}.attention"), attention);
        }
        if let Some(mlp) = &layer.mlp {
            self.mlp(&format!("{path}.mlp"), mlp);
        }
    }

    fn shared_router(&mut self, path: &str, router: &'a SharedRouter) {
        self.not_before(Phase::Fused, path, "a shared router");
        let decisions = router.decisions;
        if !(1..=2).contains(&decisions) {
            self.report(path, Rule::Decisions { decisions });
        }
        let rows = decisions.saturating_mul(2);
        self.scores(path, router.hidden.as_ref(), &router.output, rows);
    }

    /// The linears of a router that gives `rows` scores.
    fn scores(
        &mut self,
        path: &str,
        hidden: Option<&'a crate::ir::Linear>,
        output: &'a crate::ir::Linear,
        rows: usize,
    ) {
        let mut width = self.model.config.hidden_size;
        if let Some(hidden) = hidden {
            self.plain_linear(&format!("{path}.hidden"), hidden, [None, Some(width)]);
            width = hidden.out_features();
        }
        self.plain_linear(&format!("{path}.output"), output, [Some(rows), Some(width)]);
    }

    /// Each decision of a layer is used by exactly one of its modules.
    fn slots(&mut self, path: &str, layer: &Layer) {
        let decisions = layer.router.as_ref().map_or(0, |router| router.decisions);
        let mut used = Vec::new();
        for kind in [ModuleKind::Attention, ModuleKind::Mlp] {
            let Some(Routing::Routed { source: Source::Shared { slot }, .. }) = layer.routing(kind)
            else {
                continue;
            };
            let (path, slot) = (format!("{path}.{kind}"), *slot);
            self.not_before(Phase::Fused, &path, "a shared decision");
            if slot >= decisions {
                self.report(&path, Rule::SlotOutOfRange { slot, decisions });
            }
            if used.contains(&slot) {
                self.report(&path, Rule::SlotTwice { slot });
            }
            used.push(slot);
        }
        // A layer has two modules: more decisions than that are reported as such.
        for slot in (0..decisions.min(2)).filter(|slot| !used.contains(slot)) {
            self.report(&format!("{path}.router"), Rule::SlotUnused { slot });
        }
    }

    fn attention(&mut self, path: &str, attention: &'a Attention) {
        let config = &self.model.config;
        let hidden = config.hidden_size;
        let head_dim = config.head_dim;
        let query = config.num_attention_heads.saturating_mul(head_dim);
        let key_value = config.num_key_value_heads.saturating_mul(head_dim);
        self.routing(path, &attention.routing);
        self.weight(&format!("{path}.norm"), &attention.norm, [hidden]);
        self.linear(&format!("{path}.q"), &attention.q, [Some(query), Some(hidden)]);
        match &attention.kv {
            KeyValue::Separate { k, v } => {
                self.linear(&format!("{path}.k"), k, [Some(key_value), Some(hidden)]);
                self.linear(&format!("{path}.v"), v, [Some(key_value), Some(hidden)]);
            }
            KeyValue::Fused(kv) => {
                let path = format!("{path}.kv");
                self.not_before(Phase::Fused, &path, "a fused projection");
                let rows = key_value.saturating_mul(2);
                self.linear(&path, kv, [Some(rows), Some(hidden)]);
            }
        }
        if let Some(norm) = &attention.q_norm {
            self.weight(&format!("{path}.q_norm"), norm, [head_dim]);
        }
        if let Some(norm) = &attention.k_norm {
            self.weight(&format!("{path}.k_norm"), norm, [head_dim]);
        }
        self.linear(&format!("{path}.o"), &attention.o, [Some(hidden), Some(query)]);
    }

    fn mlp(&mut self, path: &str, mlp: &'a Mlp) {
        let hidden = self.model.config.hidden_size;
        self.routing(path, &mlp.routing);
        self.weight(&format!("{path}.norm"), &mlp.norm, [hidden]);
        let intermediate = match &mlp.gate_up {
            GateUp::Separate { gate, up } => {
                let intermediate = gate.out_features();
                self.linear(&format!("{path}.gate"), gate, [None, Some(hidden)]);
                self.linear(&format!("{path}.up"), up, [Some(intermediate), Some(hidden)]);
                intermediate
            }
            GateUp::Fused(gate_up) => {
                let path = format!("{path}.gate_up");
                self.not_before(Phase::Fused, &path, "a fused projection");
                self.linear(&path, gate_up, [None, Some(hidden)]);
                let rows = gate_up.out_features();
                if !rows.is_multiple_of(2) {
                    self.report(&path, Rule::OddRows { rows });
                }
                rows / 2
            }
        };
        self.linear(&format!("{path}.down"), &mlp.down, [Some(hidden), Some(intermediate)]);
    }

    fn routing(&mut self, path: &str, routing: &'a Routing) {
        let Routing::Routed { source, dispatch } = routing else { return };
        self.dispatch(path, *dispatch);
        if let Source::Own(router) = source {
            self.own_router(&format!("{path}.router"), router);
        }
    }

    fn own_router(&mut self, path: &str, router: &'a Router) {
        if router.is_sampled() {
            self.not_from(Phase::Frozen, path, Rule::SampledOutlived);
        }
        if router.tap == Tap::LayerInput {
            self.not_from(Phase::Fused, path, Rule::OwnRouterOutlived);
        }
        self.scores(path, router.hidden.as_ref(), &router.output, 2);
    }
}
