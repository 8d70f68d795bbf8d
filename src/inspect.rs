//! What a model costs: parameters and multiply-adds, by kind of module.

use std::fmt;

use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::{GateUp, KeyValue, Linear, Model, Router, Routing, Source, Weight};

mod report;
#[cfg(test)]
mod tests;

pub use report::{Report, Totals};

/// Parameters of a part of the model, and its multiply-adds for one token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Weights, biases included.
    pub parameters: u64,
    /// Multiply-adds for one token that is not skipped.
    pub multiply_adds: u64,
}

/// Costs by kind. Norms and activations are left out of the multiply-adds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// The token embedding: parameters only.
    pub embedding: Cost,
    /// Key and value projections: computed for every token.
    pub key_value: Cost,
    /// Query and output projections: skippable where attention is routed.
    pub attention: Cost,
    /// Gate, up and down projections: skippable where the MLP is routed.
    pub mlp: Cost,
    /// Routers: computed for every token.
    pub routers: Cost,
    /// Norm scales.
    pub norms: Cost,
    /// The language-model head; without parameters where it shares the embedding's.
    pub head: Cost,
    /// Multiply-adds of the attention core for one token, per token in the cache.
    pub core_per_cached_token: u64,
    /// Multiply-adds for one token in modules that may be skipped, the attention core apart.
    pub skippable: u64,
}

impl Work {
    /// The costs of `model`, in any phase.
    pub fn of(model: &Model) -> Self {
        let mut work = Self::default();
        let config = &model.config;
        work.embedding.parameters = model.embedding.len() as u64;
        for layer in &model.layers {
            if let Some(attention) = &layer.attention {
                let mut own = linear(&attention.q);
                own.add(linear(&attention.o));
                work.attention.add(own);
                match &attention.kv {
                    KeyValue::Separate { k, v } => {
                        work.key_value.add(linear(k));
                        work.key_value.add(linear(v));
                    }
                    KeyValue::Fused(both) => work.key_value.add(linear(both)),
                }
                let norms = [Some(&attention.norm), attention.q_norm.as_ref()];
                for norm in norms.into_iter().chain([attention.k_norm.as_ref()]).flatten() {
                    work.norms.parameters += norm.len() as u64;
                }
                work.core_per_cached_token +=
                    2 * (config.num_attention_heads * config.head_dim) as u64;
                work.routed(&attention.routing, own);
            }
            if let Some(mlp) = &layer.mlp {
                let mut own = linear(&mlp.down);
                match &mlp.gate_up {
                    GateUp::Separate { gate, up } => {
                        own.add(linear(gate));
                        own.add(linear(up));
                    }
                    GateUp::Fused(both) => own.add(linear(both)),
                }
                work.mlp.add(own);
                work.norms.parameters += mlp.norm.len() as u64;
                work.routed(&mlp.routing, own);
            }
            if let Some(shared) = &layer.router {
                work.routers.add(router(shared.hidden.as_ref(), &shared.output));
            }
        }
        work.norms.parameters += model.norm.len() as u64;
        work.head = linear(&model.head);
        if model.head.weight == model.embedding {
            work.head.parameters -= model.embedding.len() as u64;
        }
        work
    }

    fn routed(&mut self, routing: &Routing, own: Cost) {
        if let Routing::Routed { source, .. } = routing {
            self.skippable += own.multiply_adds;
            if let Source::Own(Router { hidden, output, .. }) = source {
                self.routers.add(router(hidden.as_ref(), output));
            }
        }
    }

    /// Every kind with its name, in the order of the report.
    pub const fn kinds(&self) -> [(&'static str, Cost); 7] {
        [
            ("embedding", self.embedding),
            ("key and value", self.key_value),
            ("attention", self.attention),
            ("mlp", self.mlp),
            ("routers", self.routers),
            ("norms", self.norms),
            ("head", self.head),
        ]
    }

    /// The whole model.
    pub fn total(&self) -> Cost {
        let mut total = Cost::default();
        for (_, cost) in self.kinds() {
            total.add(cost);
        }
        total
    }
}

impl Cost {
    fn add(&mut self, other: Self) {
        self.parameters += other.parameters;
        self.multiply_adds += other.multiply_adds;
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<16}{:>16}{:>24}", "", "parameters", "multiply-adds/token")?;
        for (name, cost) in self.kinds().into_iter().chain([("total", self.total())]) {
            writeln!(f, "{name:<16}{:>16}{:>24}", cost.parameters, cost.multiply_adds)?;
        }
        writeln!(
            f,
            "attention core: {} multiply-adds per cached token",
            self.core_per_cached_token
        )?;
        let total = self.total().multiply_adds.max(1);
        let share = 100.0 * self.skippable as f64 / total as f64;
        write!(f, "skippable: {} multiply-adds/token ({share:.1} %)", self.skippable)
    }
}

fn router(hidden: Option<&Linear>, output: &Linear) -> Cost {
    let mut cost = linear(output);
    if let Some(hidden) = hidden {
        cost.add(linear(hidden));
    }
    cost
}

fn linear(linear: &Linear) -> Cost {
    let weights = linear.weight.len() as u64;
    let mut cost = Cost { parameters: weights, multiply_adds: weights };
    cost.parameters += linear.bias.as_ref().map_or(0, Weight::len) as u64;
    if let Some(lora) = &linear.lora {
        let adapter: usize = [&lora.down, &lora.up]
            .iter()
            .map(|stored| stored.shape.iter().product::<usize>())
            .sum();
        cost.add(Cost { parameters: adapter as u64, multiply_adds: adapter as u64 });
    }
    cost
}
