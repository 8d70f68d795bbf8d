//! The same model token by token in `f64`, in loops: no cache, no batch, no tensor library.

use skipgpt_passes::ir::{
    Attention, GateUp, KeyValue, Layer, Linear, Mlp, Model, Routing, Source, Tap, Weight,
};

use crate::sources::Sources;
use crate::{rope, weights};

type Vector = Vec<f64>;

/// What one unpadded sequence gives.
pub(super) struct Run {
    /// One row per token.
    pub(super) logits: Vec<Vector>,
    /// Per routed module, one margin per token.
    pub(super) margins: Vec<Vector>,
    /// Per layer, one row per token.
    pub(super) layer_inputs: Vec<Vec<Vector>>,
}

pub(super) fn run(model: &Model, sources: &Sources, tokens: &[i64]) -> Run {
    let naive = Naive { model, sources };
    let embedding = naive.matrix(&model.embedding);
    let mut state: Vec<Vector> =
        tokens.iter().map(|&token| embedding[token as usize].clone()).collect();
    let (mut margins, mut layer_inputs) = (Vec::new(), Vec::new());
    for layer in &model.layers {
        layer_inputs.push(state.clone());
        let input = state.clone();
        if let Some(attention) = &layer.attention {
            let keep = naive.keep(&attention.routing, layer, &input, &state, &mut margins);
            state = naive.attention(attention, &state, &keep);
        }
        if let Some(mlp) = &layer.mlp {
            let keep = naive.keep(&mlp.routing, layer, &input, &state, &mut margins);
            state = naive.mlp(mlp, &state, &keep);
        }
    }
    let logits =
        state.iter().map(|x| naive.linear(&model.head, &naive.norm(&model.norm, x))).collect();
    Run { logits, margins, layer_inputs }
}

struct Naive<'a> {
    model: &'a Model,
    sources: &'a Sources,
}

impl Naive<'_> {
    fn keep(
        &self,
        routing: &Routing,
        layer: &Layer,
        layer_input: &[Vector],
        module_input: &[Vector],
        margins: &mut Vec<Vector>,
    ) -> Vec<bool> {
        let Routing::Routed { source, .. } = routing else { return vec![true; layer_input.len()] };
        let own: Vector = (0..layer_input.len())
            .map(|t| {
                let (hidden, output, x, keep, skip) = match source {
                    Source::Own(router) => {
                        let tap = match router.tap {
                            Tap::LayerInput => &layer_input[t],
                            Tap::ModuleInput => &module_input[t],
                        };
                        (router.hidden.as_ref(), &router.output, tap, 0, 1)
                    }
                    Source::Shared { slot } => {
                        let shared = layer.router.as_ref().unwrap();
                        let skip = shared.decisions + slot;
                        (shared.hidden.as_ref(), &shared.output, &layer_input[t], *slot, skip)
                    }
                };
                let mut x = x.clone();
                if let Some(hidden) = hidden {
                    x = self.linear(hidden, &x).iter().map(|v| v.max(0.0)).collect();
                }
                let scores = self.linear(output, &x);
                scores[keep] - scores[skip]
            })
            .collect();
        let keep = own.iter().map(|margin| *margin >= 0.0).collect();
        margins.push(own);
        keep
    }

    fn attention(&self, module: &Attention, state: &[Vector], keep: &[bool]) -> Vec<Vector> {
        let config = &self.model.config;
        let width = config.head_dim;
        let group = config.num_attention_heads / config.num_key_value_heads;
        let normed: Vec<_> = state.iter().map(|x| self.norm(&module.norm, x)).collect();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (t, x) in normed.iter().enumerate() {
            let (k, v) = match &module.kv {
                KeyValue::Separate { k, v } => (self.linear(k, x), self.linear(v, x)),
                KeyValue::Fused(both) => halves(&self.linear(both, x)),
            };
            keys.push(self.heads(&k, module.k_norm.as_ref(), t));
            values.push(v);
        }
        let attend = |t: usize| {
            let query = self.heads(&self.linear(&module.q, &normed[t]), module.q_norm.as_ref(), t);
            let mut seen = Vec::new();
            for (h, query) in query.iter().enumerate() {
                let head = h / group;
                let scores: Vector = (0..=t)
                    .map(|u| dot(query, &keys[u][head]) / (width as f64).sqrt())
                    .map(f64::exp)
                    .collect();
                let sum: f64 = scores.iter().sum();
                seen.extend((0..width).map(|d| {
                    let column = head * width + d;
                    (0..=t).map(|u| scores[u] / sum * values[u][column]).sum::<f64>()
                }));
            }
            self.linear(&module.o, &seen)
        };
        residual(state, keep, attend)
    }

    /// A projection's heads, normalised and turned.
    fn heads(&self, x: &[f64], norm: Option<&Weight>, position: usize) -> Vec<Vector> {
        let frequencies = rope::inverse_frequencies(&self.model.config);
        let half = frequencies.len();
        x.chunks(2 * half)
            .map(|head| {
                let head = norm.map_or_else(|| head.to_vec(), |norm| self.norm(norm, head));
                (0..2 * half)
                    .map(|d| {
                        let angle = position as f64 * f64::from(frequencies[d % half]);
                        let (sin, cos) = angle.sin_cos();
                        if d < half {
                            head[d] * cos - head[d + half] * sin
                        } else {
                            head[d] * cos + head[d - half] * sin
                        }
                    })
                    .collect()
            })
            .collect()
    }

    fn mlp(&self, module: &Mlp, state: &[Vector], keep: &[bool]) -> Vec<Vector> {
        residual(state, keep, |t| {
            let x = self.norm(&module.norm, &state[t]);
            let (gate, up) = match &module.gate_up {
                GateUp::Separate { gate, up } => (self.linear(gate, &x), self.linear(up, &x)),
                GateUp::Fused(both) => halves(&self.linear(both, &x)),
            };
            let inner: Vector =
                gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            self.linear(&module.down, &inner)
        })
    }

    fn norm(&self, scale: &Weight, x: &[f64]) -> Vector {
        let mean = dot(x, x) / x.len() as f64;
        let root = (mean + self.model.config.rms_norm_eps).sqrt();
        x.iter().zip(self.vector(scale)).map(|(x, scale)| x / root * scale).collect()
    }

    fn linear(&self, linear: &Linear, x: &[f64]) -> Vector {
        let mut y: Vector = self.matrix(&linear.weight).iter().map(|row| dot(row, x)).collect();
        if let Some(bias) = &linear.bias {
            y.iter_mut().zip(self.vector(bias)).for_each(|(y, bias)| *y += bias);
        }
        if let Some(lora) = &linear.lora {
            let stored = |stored: &skipgpt_passes::ir::Stored| Weight::Stored(stored.clone());
            let down: Vector =
                self.matrix(&stored(&lora.down)).iter().map(|row| dot(row, x)).collect();
            let up = self.matrix(&stored(&lora.up));
            y.iter_mut().zip(&up).for_each(|(y, row)| *y += lora.scale * dot(row, &down));
        }
        y
    }

    fn vector(&self, weight: &Weight) -> Vector {
        weights::values(weight, self.sources).unwrap().into_iter().map(f64::from).collect()
    }

    fn matrix(&self, weight: &Weight) -> Vec<Vector> {
        self.vector(weight).chunks(weight.columns()).map(<[f64]>::to_vec).collect()
    }
}

fn residual(state: &[Vector], keep: &[bool], module: impl Fn(usize) -> Vector) -> Vec<Vector> {
    let row = |t: usize| {
        if !keep[t] {
            return state[t].clone();
        }
        state[t].iter().zip(module(t)).map(|(x, y)| x + y).collect()
    };
    (0..state.len()).map(row).collect()
}

fn halves(x: &[f64]) -> (Vector, Vector) {
    let (left, right) = x.split_at(x.len() / 2);
    (left.to_vec(), right.to_vec())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
