//! Tensors and numbers become an [`Model`].

use skipgpt_passes::ir::{
    Attention, GateUp, KeyValue, Layer, Linear, Lora, Mlp, Model, ModuleKind, Phase, Routing,
    Source, Stored, Weight,
};
use skipgpt_passes::validate::validate;

use super::catalog::{self, Catalog};
use super::config::Config;
use super::names::{self, EMBEDDING, HEAD, NORM};
use super::peft::Adapter;
use super::router::Routers;
use super::{Error, Result};
use crate::sources::Sources;

/// Bytes compared at a time.
const CHUNK: u64 = 1 << 20;

/// Everything a model is built from; taken apart while it is.
pub(super) struct Parts {
    pub(super) config: Config,
    pub(super) base: Catalog,
    pub(super) routers: Option<Routers>,
    pub(super) adapter: Option<Adapter>,
    /// Tensors of the model so far.
    pub(super) sources: Sources,
}

impl Parts {
    /// The model, in [`Phase::Imported`], and the tensors it names.
    pub(super) fn build(mut self) -> Result<(Model, Sources)> {
        let config = self.config.model.clone();
        let layers = config.num_hidden_layers;
        if let Some(routers) = &self.routers {
            routers.check_layers(layers)?;
        }
        let shape = [config.vocab_size, config.hidden_size];
        let embedding = self.weight(EMBEDDING, &shape)?;
        let mut model = Model {
            phase: Phase::Imported,
            head: Linear { weight: embedding.clone(), bias: None, lora: None },
            embedding,
            layers: Vec::new(),
            norm: self.weight(NORM, &shape[1..])?,
            config,
        };
        for index in 0..layers {
            model.layers.push(self.layer(index)?);
        }
        model.head = self.head(&model.embedding, shape)?;
        self.refuse_rest()?;
        if let Some(adapter) = self.adapter.take() {
            adapter.finish(layers)?;
        }
        validate(&model).map_err(|violations| Error::Invalid {
            violations: violations.0.iter().map(ToString::to_string).collect(),
        })?;
        Ok((model, self.sources))
    }

    fn layer(&mut self, index: usize) -> Result<Layer> {
        let config = &self.config.model;
        let (hidden, width) = (config.hidden_size, config.head_dim);
        let query = config.num_attention_heads * width;
        let key = config.num_key_value_heads * width;
        let inner = self.config.intermediate_size;
        let (bias, head_norm) = (self.config.bias, self.config.head_norm);
        let name = |part: &str| names::layer(index, part);
        let attention = Attention {
            norm: self.weight(&name("input_layernorm.weight"), &[hidden])?,
            q: self.linear(&name("self_attn.q_proj"), [query, hidden], bias.qkv)?,
            kv: KeyValue::Separate {
                k: self.linear(&name("self_attn.k_proj"), [key, hidden], bias.qkv)?,
                v: self.linear(&name("self_attn.v_proj"), [key, hidden], bias.qkv)?,
            },
            o: self.linear(&name("self_attn.o_proj"), [hidden, query], bias.output)?,
            q_norm: self.head_norm(head_norm, &name("self_attn.q_norm.weight"), width)?,
            k_norm: self.head_norm(head_norm, &name("self_attn.k_norm.weight"), width)?,
            routing: self.routing(index, ModuleKind::Attention)?,
        };
        let mlp = Mlp {
            norm: self.weight(&name("post_attention_layernorm.weight"), &[hidden])?,
            gate_up: GateUp::Separate {
                gate: self.linear(&name("mlp.gate_proj"), [inner, hidden], bias.mlp)?,
                up: self.linear(&name("mlp.up_proj"), [inner, hidden], bias.mlp)?,
            },
            down: self.linear(&name("mlp.down_proj"), [hidden, inner], bias.mlp)?,
            routing: self.routing(index, ModuleKind::Mlp)?,
        };
        Ok(Layer { index, router: None, attention: Some(attention), mlp: Some(mlp) })
    }

    fn weight(&mut self, name: &str, shape: &[usize]) -> Result<Weight> {
        match self.base.take(name, shape, &mut self.sources) {
            Ok(stored) => Ok(Weight::Stored(stored)),
            Err(catalog::Error::Missing { path: directory, name, shape }) => {
                Err(Error::Missing { directory, name, shape })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn head_norm(&mut self, present: bool, name: &str, width: usize) -> Result<Option<Weight>> {
        if present { self.weight(name, &[width]).map(Some) } else { Ok(None) }
    }

    fn linear(&mut self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear> {
        let weight = self.weight(&format!("{name}.weight"), &shape)?;
        let bias =
            if bias { Some(self.weight(&format!("{name}.bias"), &shape[..1])?) } else { None };
        Ok(Linear { weight, bias, lora: self.lora(name, shape)? })
    }

    fn lora(&mut self, name: &str, shape: [usize; 2]) -> Result<Option<Lora>> {
        match &mut self.adapter {
            None => Ok(None),
            Some(adapter) => Ok(adapter.take(name, shape, &mut self.sources)?),
        }
    }

    fn routing(&mut self, layer: usize, kind: ModuleKind) -> Result<Routing> {
        let Some(routers) = &mut self.routers else { return Ok(Routing::Always) };
        let hidden = self.config.model.hidden_size;
        let router = routers.take(layer, kind, hidden, &mut self.sources)?;
        Ok(Routing::Routed { source: Source::Own(router), dispatch: None })
    }

    fn head(&mut self, embedding: &Weight, shape: [usize; 2]) -> Result<Linear> {
        let name = format!("{HEAD}.weight");
        if !self.config.tied {
            return self.linear(HEAD, shape, false);
        }
        if self.base.get(&name).is_some() {
            // transformers would use the embedding and leave this one unread.
            let mut alone = Sources::new();
            let head = self.base.take(&name, &shape, &mut alone)?;
            if let Weight::Stored(embedding) = embedding
                && !same(embedding, &self.sources, &head, &alone)?
            {
                return Err(Error::TiedHead { directory: self.base.origin().to_owned() });
            }
        }
        let lora = self.lora(HEAD, shape)?;
        Ok(Linear { weight: embedding.clone(), bias: None, lora })
    }

    /// Refuses tensors the model has no place for: it would not be the model that was trained.
    fn refuse_rest(&self) -> Result<()> {
        let layers = self.config.model.num_hidden_layers;
        let rest = self.base.iter().find(|(name, _)| !names::is_derived(name));
        let Some((canonical, entry)) = rest else { return Ok(()) };
        let (path, name) = (entry.path.as_ref().clone(), entry.name.clone());
        Err(match names::layer_index(canonical) {
            Some(layer) if layer >= layers => Error::ExtraLayer { path, name, layer, layers },
            _ => Error::Unexpected { path, name },
        })
    }
}

/// Whether two stored tensors hold the same bytes.
fn same(a: &Stored, a_sources: &Sources, b: &Stored, b_sources: &Sources) -> Result<bool> {
    let size = crate::sources::size(a);
    if a.dtype != b.dtype || size != crate::sources::size(b) {
        return Ok(false);
    }
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for start in (0..size).step_by(CHUNK as usize) {
        let length = CHUNK.min(size - start) as usize;
        left.resize(length, 0);
        right.resize(length, 0);
        a_sources.read_at(&a.name, start, &mut left)?;
        b_sources.read_at(&b.name, start, &mut right)?;
        if left != right {
            return Ok(false);
        }
    }
    Ok(true)
}
