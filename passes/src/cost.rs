//! Multiply-adds per token: what a routed model saves.
//!
//! Counted are the multiplications by a matrix, `out · in` each, in the form the model is in: an
//! adapter that is not merged costs `rank · (in + out)` more. Not counted are norms, rotary
//! embedding and the attention core, whose cost grows with the cache and not with the weights.
//!
//! Routing skips q, o and the MLP. K and V are projected for every token, because later tokens
//! attend to them; routers and the head run for every token too.

use crate::ir::{Attention, GateUp, KeyValue, Linear, Mlp, Model, ModuleId, ModuleKind, Routing};

/// Multiply-adds of one token through a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cost {
    /// Every module that is left, in the order they run.
    pub modules: Vec<ModuleCost>,
    /// All routers.
    pub routers: u64,
    /// The language-model head.
    pub head: u64,
}

/// Multiply-adds of one token through one module, its router apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModuleCost {
    /// Which module.
    pub id: ModuleId,
    /// What a skipped token saves: q and o, or gate, up and down.
    pub skippable: u64,
    /// What every token costs: k and v; 0 for an MLP.
    pub always: u64,
    /// Whether a router decides.
    pub routed: bool,
}

impl Cost {
    /// Everything, for a token that every module keeps.
    pub fn total(&self) -> u64 {
        let modules: u64 = self.modules.iter().map(|module| module.skippable + module.always).sum();
        modules + self.routers + self.head
    }
}

impl Model {
    /// Multiply-adds of one token, by module.
    pub fn multiply_adds(&self) -> Cost {
        let mut modules = Vec::new();
        let mut routers = 0;
        for layer in &self.layers {
            if let Some(shared) = &layer.router {
                routers += router(shared.hidden.as_ref(), &shared.output);
            }
            for id in layer.modules() {
                let routing = layer.routing(id.kind);
                if let Some(own) = routing.and_then(Routing::own_router) {
                    routers += router(own.hidden.as_ref(), &own.output);
                }
                let (skippable, always) = match id.kind {
                    ModuleKind::Attention => layer.attention.as_ref().map(attention),
                    ModuleKind::Mlp => layer.mlp.as_ref().map(|module| (mlp(module), 0)),
                }
                .unwrap_or_default();
                let routed = routing.is_some_and(Routing::is_routed);
                modules.push(ModuleCost { id, skippable, always, routed });
            }
        }
        Cost { modules, routers, head: linear(&self.head) }
    }
}

/// q and o, then k and v.
fn attention(attention: &Attention) -> (u64, u64) {
    let key_value = match &attention.kv {
        KeyValue::Separate { k, v } => linear(k) + linear(v),
        KeyValue::Fused(kv) => linear(kv),
    };
    (linear(&attention.q) + linear(&attention.o), key_value)
}

fn mlp(mlp: &Mlp) -> u64 {
    let gate_up = match &mlp.gate_up {
        GateUp::Separate { gate, up } => linear(gate) + linear(up),
        GateUp::Fused(gate_up) => linear(gate_up),
    };
    gate_up + linear(&mlp.down)
}

fn router(hidden: Option<&Linear>, output: &Linear) -> u64 {
    hidden.map_or(0, linear) + linear(output)
}

fn linear(linear: &Linear) -> u64 {
    let (rows, columns) = (linear.out_features() as u64, linear.in_features() as u64);
    let adapter = linear.lora.as_ref().map_or(0, |lora| lora.rank() as u64 * (rows + columns));
    rows * columns + adapter
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::Phase;
    use crate::testing::{self, adapt, at, attention_id, fused, mlp_id, model};

    #[test]
    fn counts_by_module() {
        let cost = model(1).multiply_adds();
        assert_eq!(
            cost.modules,
            [
                // q and o are 8x8, k and v 4x8.
                ModuleCost { id: attention_id(0), skippable: 128, always: 64, routed: true },
                // gate and up are 12x8, down 8x12.
                ModuleCost { id: mlp_id(0), skippable: 288, always: 0, routed: true },
            ]
        );
        assert_eq!((cost.routers, cost.head, cost.total()), (32, 256, 768));
    }

    #[test]
    fn fusing_and_merging_keep_the_count_and_an_adapter_adds_to_it() {
        let mut adapted = model(1);
        adapt(&mut testing::attention(&mut adapted, 0).q, "0.q", 2, 1.0);
        assert_eq!(adapted.multiply_adds().total(), 768 + 2 * 16);
        assert_eq!(at(Phase::Lowered, adapted).multiply_adds(), model(1).multiply_adds());
        assert_eq!(fused().multiply_adds(), model(1).multiply_adds());
    }

    #[test]
    fn removed_modules_cost_nothing() {
        let mut model = model(2);
        model.layers[1].attention = None;
        assert_eq!(model.multiply_adds().total(), 128 + 64 + 288 + 288 + 3 * 16 + 256);
    }
}
