//! IR to tensors: every weight expression is evaluated once and becomes one tensor.

use candle_core::{DType, Device, Tensor};
use skipgpt_passes::ir::{self, ModuleId, ModuleKind, Stored, Weight};

use super::attention::{Attention, KeyValue};
use super::layer::Layer;
use super::linear::{Heard, Linear, Lora};
use super::mlp::{GateUp, Mlp};
use super::norm::Norm;
use super::router::{Router, Routing, Source};
use super::{Error, Options};
use crate::sources::Sources;
use crate::{importance, weights};

/// Evaluates weights where the options want them.
pub(super) struct Loader<'a> {
    pub(super) config: &'a ir::Config,
    pub(super) sources: &'a Sources,
    pub(super) options: &'a Options,
}

impl Loader<'_> {
    pub(super) fn layer(&self, layer: &ir::Layer) -> Result<Layer, Error> {
        let shared = layer.router.as_ref().map(|router| self.shared_router(router)).transpose()?;
        let attention = layer.attention.as_ref();
        let mlp = layer.mlp.as_ref();
        let id = |kind| ModuleId { layer: layer.index, kind };
        Ok(Layer {
            index: layer.index,
            attention: attention
                .map(|module| self.attention(module, shared.as_ref(), id(ModuleKind::Attention)))
                .transpose()?,
            mlp: mlp
                .map(|module| self.mlp(module, shared.as_ref(), id(ModuleKind::Mlp)))
                .transpose()?,
        })
    }

    fn attention(
        &self,
        module: &ir::Attention,
        shared: Option<&Router>,
        id: ModuleId,
    ) -> Result<Attention, Error> {
        let norm = |weight: &Option<Weight>| weight.as_ref().map(|w| self.norm(w)).transpose();
        Ok(Attention {
            norm: self.norm(&module.norm)?,
            q: self.linear(&module.q)?,
            kv: match &module.kv {
                ir::KeyValue::Separate { k, v } => {
                    KeyValue::Separate { k: self.linear(k)?, v: self.linear(v)? }
                }
                ir::KeyValue::Fused(both) => KeyValue::Fused(self.linear(both)?),
            },
            o: self.linear(&module.o)?,
            q_norm: norm(&module.q_norm)?,
            k_norm: norm(&module.k_norm)?,
            routing: self.routing(&module.routing, shared, id)?,
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
        })
    }

    fn mlp(&self, module: &ir::Mlp, shared: Option<&Router>, id: ModuleId) -> Result<Mlp, Error> {
        Ok(Mlp {
            norm: self.norm(&module.norm)?,
            gate_up: match &module.gate_up {
                ir::GateUp::Separate { gate, up } => {
                    GateUp::Separate { gate: self.linear(gate)?, up: self.linear(up)? }
                }
                ir::GateUp::Fused(both) => GateUp::Fused(self.linear(both)?),
            },
            down: self.linear(&module.down)?,
            routing: self.routing(&module.routing, shared, id)?,
        })
    }

    fn routing(
        &self,
        routing: &ir::Routing,
        shared: Option<&Router>,
        id: ModuleId,
    ) -> Result<Routing, Error> {
        let ir::Routing::Routed { source, dispatch } = routing else {
            return Ok(Routing::Always);
        };
        let source = match (source, shared) {
            (ir::Source::Own(router), _) => Source::Own {
                router: self.router(router.hidden.as_ref(), &router.output, 1)?,
                tap: router.tap,
            },
            (&ir::Source::Shared { slot }, Some(shared)) if slot < shared.decisions => {
                Source::Shared { router: shared.clone(), slot }
            }
            (&ir::Source::Shared { slot }, _) => return Err(Error::NoDecision { id, slot }),
        };
        Ok(Routing::Routed { source, dispatch: *dispatch })
    }

    fn shared_router(&self, router: &ir::SharedRouter) -> Result<Router, Error> {
        self.router(router.hidden.as_ref(), &router.output, router.decisions)
    }

    fn router(
        &self,
        hidden: Option<&ir::Linear>,
        output: &ir::Linear,
        decisions: usize,
    ) -> Result<Router, Error> {
        Ok(Router {
            hidden: hidden.map(|linear| self.linear_as(linear, DType::F32)).transpose()?,
            output: self.linear_as(output, DType::F32)?,
            decisions,
        })
    }

    pub(super) fn norm(&self, weight: &Weight) -> Result<Norm, Error> {
        Ok(Norm { scale: self.tensor(weight)?, eps: self.config.rms_norm_eps })
    }

    pub(super) fn linear(&self, linear: &ir::Linear) -> Result<Linear, Error> {
        self.heard(self.matrix(&linear.weight)?, linear)
    }

    fn linear_as(&self, linear: &ir::Linear, dtype: DType) -> Result<Linear, Error> {
        self.around(self.tensor_as(&linear.weight, dtype)?, linear, dtype)
    }

    /// A frozen matrix.
    pub(super) fn matrix(&self, weight: &Weight) -> Result<Tensor, Error> {
        self.tensor_as(weight, self.options.matrices.unwrap_or(self.options.dtype))
    }

    /// The projection whose weight is already a tensor.
    pub(super) fn tied(&self, weight: Tensor, linear: &ir::Linear) -> Result<Linear, Error> {
        self.heard(weight, linear)
    }

    fn heard(&self, weight: Tensor, linear: &ir::Linear) -> Result<Linear, Error> {
        let heard = self.options.ears.as_ref().zip(importance::name_at(&linear.weight, 0));
        let heard = heard.map(|(ears, name)| Heard { ears: ears.clone(), name: name.into() });
        Ok(Linear { heard, ..self.around(weight, linear, self.options.dtype)? })
    }

    fn around(&self, weight: Tensor, linear: &ir::Linear, dtype: DType) -> Result<Linear, Error> {
        let stored = |stored: &Stored| self.tensor_as(&Weight::Stored(stored.clone()), dtype);
        let bias = linear.bias.as_ref().map(|bias| self.tensor_as(bias, dtype)).transpose()?;
        let lora = match &linear.lora {
            Some(lora) => Some(Lora {
                down: stored(&lora.down)?,
                up: stored(&lora.up)?,
                scale: lora.scale,
                dropout: None,
            }),
            None => None,
        };
        Ok(Linear { weight, bias, lora, heard: None })
    }

    pub(super) fn tensor(&self, weight: &Weight) -> Result<Tensor, Error> {
        self.tensor_as(weight, self.options.dtype)
    }

    fn tensor_as(&self, weight: &Weight, dtype: DType) -> Result<Tensor, Error> {
        let values = weights::values(weight, self.sources)?;
        Tensor::from_vec(values, weight.shape(), &Device::Cpu)
            .and_then(|tensor| tensor.to_dtype(dtype)?.to_device(&self.options.device))
            .map_err(|source| Error::Load {
                weight: weight.stored().iter().map(|stored| stored.name.clone()).collect(),
                source,
            })
    }
}
