//! Small models of random weights, with every part the IR knows.

use std::sync::Arc;

use skipgpt_passes::ir::{
    Architecture, Attention, Config, DType, GateUp, KeyValue, Layer, Linear, Lora, Mlp, Model,
    Phase, Policy, Rope, RopeScaling, Router, Routing, Source, Stored, Tap, Weight,
};

use crate::sources::{self, Sources};

pub(super) const HIDDEN: usize = 16;
pub(super) const VOCAB: usize = 40;
const HEADS: usize = 4;
const HEAD_DIM: usize = 6;
const INTERMEDIATE: usize = 20;
const LAYERS: usize = 3;

/// Which parts the model has.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::struct_excessive_bools, reason = "each part is there or not, whatever the others")]
pub(super) struct Parts {
    pub(super) seed: u32,
    pub(super) routed: bool,
    pub(super) two_layer: bool,
    pub(super) mlp_tap: Tap,
    pub(super) biases: bool,
    pub(super) head_norms: bool,
    pub(super) adapters: bool,
    pub(super) tied: bool,
    pub(super) kv_heads: usize,
}

/// Linear routers on the layer input, and nothing out of the ordinary.
pub(super) const PLAIN: Parts = Parts {
    seed: 1,
    routed: true,
    two_layer: false,
    mlp_tap: Tap::LayerInput,
    biases: false,
    head_norms: false,
    adapters: false,
    tied: true,
    kv_heads: 2,
};

/// Everything at once.
pub(super) const FULL: Parts = Parts {
    seed: 2,
    routed: true,
    two_layer: true,
    mlp_tap: Tap::ModuleInput,
    biases: true,
    head_norms: true,
    adapters: true,
    tied: false,
    kv_heads: 1,
};

/// An Imported model and its tensors.
pub(super) fn build(parts: Parts) -> (Model, Sources) {
    let mut builder = Builder { parts, state: parts.seed, sources: Sources::new() };
    let embedding = builder.weight("embedding", &[VOCAB, HIDDEN], 0.0, 1.0);
    let head = if parts.tied {
        Linear { weight: embedding.clone(), bias: None, lora: None }
    } else {
        builder.linear("head", [VOCAB, HIDDEN], false, false)
    };
    let layers = (0..LAYERS).map(|index| builder.layer(index)).collect();
    let model = Model {
        phase: Phase::Imported,
        config: config(parts.kv_heads),
        embedding,
        layers,
        norm: builder.weight("norm", &[HIDDEN], 1.0, 0.2),
        head,
    };
    (model, builder.sources)
}

fn config(kv_heads: usize) -> Config {
    Config {
        architecture: Architecture::Llama,
        hidden_size: HIDDEN,
        vocab_size: VOCAB,
        num_attention_heads: HEADS,
        num_key_value_heads: kv_heads,
        head_dim: HEAD_DIM,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 100.0, scaling: RopeScaling::Linear { factor: 2.0 } },
        max_position_embeddings: 64,
        num_hidden_layers: LAYERS,
    }
}

struct Builder {
    parts: Parts,
    state: u32,
    sources: Sources,
}

impl Builder {
    fn layer(&mut self, index: usize) -> Layer {
        let Parts { biases, head_norms, mlp_tap, kv_heads, .. } = self.parts;
        let name = |part: &str| format!("{index}.{part}");
        let (queries, keys) = (HEADS * HEAD_DIM, kv_heads * HEAD_DIM);
        let attention = Attention {
            norm: self.weight(&name("attention_norm"), &[HIDDEN], 1.0, 0.2),
            q: self.projection(&name("q"), [queries, HIDDEN], biases),
            kv: KeyValue::Separate {
                k: self.projection(&name("k"), [keys, HIDDEN], biases),
                v: self.projection(&name("v"), [keys, HIDDEN], biases),
            },
            o: self.projection(&name("o"), [HIDDEN, queries], biases),
            q_norm: head_norms.then(|| self.weight(&name("q_norm"), &[HEAD_DIM], 1.0, 0.2)),
            k_norm: head_norms.then(|| self.weight(&name("k_norm"), &[HEAD_DIM], 1.0, 0.2)),
            routing: self.routing(&name("router_attention"), Tap::LayerInput),
        };
        let mlp = Mlp {
            norm: self.weight(&name("mlp_norm"), &[HIDDEN], 1.0, 0.2),
            gate_up: GateUp::Separate {
                gate: self.projection(&name("gate"), [INTERMEDIATE, HIDDEN], biases),
                up: self.projection(&name("up"), [INTERMEDIATE, HIDDEN], biases),
            },
            down: self.projection(&name("down"), [HIDDEN, INTERMEDIATE], biases),
            routing: self.routing(&name("router_mlp"), mlp_tap),
        };
        Layer { index, router: None, attention: Some(attention), mlp: Some(mlp) }
    }

    fn routing(&mut self, name: &str, tap: Tap) -> Routing {
        if !self.parts.routed {
            return Routing::Always;
        }
        let width = if self.parts.two_layer { 7 } else { HIDDEN };
        let hidden = self
            .parts
            .two_layer
            .then(|| self.linear(&format!("{name}.hidden"), [width, HIDDEN], true, false));
        let output = self.linear(&format!("{name}.output"), [2, width], true, false);
        let router = Router { hidden, output, tap, policy: Policy::Sampled };
        Routing::Routed { source: Source::Own(router), dispatch: None }
    }

    fn projection(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Linear {
        self.linear(name, shape, bias, self.parts.adapters)
    }

    fn linear(&mut self, name: &str, [out, width]: [usize; 2], bias: bool, lora: bool) -> Linear {
        let spread = 1.5 / (width as f32).sqrt();
        let weight = self.weight(name, &[out, width], 0.0, spread);
        let bias = bias.then(|| self.weight(&format!("{name}.bias"), &[out], 0.0, 0.3));
        let lora = lora.then(|| Lora {
            down: self.stored(&format!("{name}.a"), &[3, width], 0.0, 0.3),
            up: self.stored(&format!("{name}.b"), &[out, 3], 0.0, 0.3),
            scale: 1.5,
        });
        Linear { weight, bias, lora }
    }

    fn weight(&mut self, name: &str, shape: &[usize], middle: f32, spread: f32) -> Weight {
        Weight::Stored(self.stored(name, shape, middle, spread))
    }

    /// Uniform values of standard deviation `spread` around `middle`.
    fn stored(&mut self, name: &str, shape: &[usize], middle: f32, spread: f32) -> Stored {
        let stored = Stored { name: name.to_owned(), shape: shape.to_vec(), dtype: DType::F32 };
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| middle + spread * 3.0_f32.sqrt() * (2.0 * self.uniform() - 1.0))
            .collect();
        let mut bytes = Vec::new();
        sources::encode(&values, DType::F32, &mut bytes);
        self.sources.insert_memory(stored.clone(), Arc::from(bytes)).unwrap();
        stored
    }

    fn uniform(&mut self) -> f32 {
        self.state = self.state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.state >> 8) as f32 / (1 << 24) as f32
    }
}
