//! The parameters of a stage, put where the model computes with them.

use candle_core::{Device, Tensor};
use skipgpt_passes::ir::{ModuleKind, Tap};

use super::network::Network;
use super::parameters::{Parameter, uniform};
use super::settings::{self, Target};
use crate::checkpoint::names;
use crate::model::attention::{Attention, KeyValue};
use crate::model::dropout::{Clock, Dropout};
use crate::model::layer::Layer;
use crate::model::linear::{self, Linear};
use crate::model::mlp::{GateUp, Mlp};
use crate::model::router::{Router, Routing, Source};
use crate::model::{Error, Parts};

/// The layers of a router, by their released names.
const HIDDEN: &str = "hidden_layer";
const OUTPUT: &str = "weight_predictor";

/// With a bias the weights begin smaller by this factor, so that it decides.
const BIASED_WEIGHTS: f32 = 0.1;

/// A network with a router of its own for every module: the one it has, or a new one.
///
/// The published initialisation is Kaiming's uniform of gain 1, `±√(3 / hidden)`, and no bias. A
/// keep bias `b` scales the output's weights by a tenth and sets its biases to `b` and `−b`. A hidden
/// layer begins with the gain of its relu, `±√(6 / hidden)`, and no bias.
pub(super) fn routers(
    mut parts: Parts,
    settings: &settings::Router,
    seed: u64,
) -> Result<Network, Error> {
    let hidden = parts.config.hidden_size;
    let device = &parts.embedding.device().clone();
    let mut parameters = Vec::new();
    for (at, layer) in parts.layers.iter_mut().enumerate() {
        let attention = layer.attention.as_mut().map(|module| &mut module.routing);
        let mlp = layer.mlp.as_mut().map(|module| &mut module.routing);
        for (kind, routing) in [(ModuleKind::Attention, attention), (ModuleKind::Mlp, mlp)] {
            let Some(routing) = routing else { continue };
            let place = |source| Error::Compute { layer: Some(layer.index), source };
            let mut new = NewRouter {
                layer: layer.index,
                at,
                kind,
                seed,
                device,
                parameters: &mut parameters,
            };
            let router = match routing {
                Routing::Routed { source: Source::Own { router, .. }, .. } => new.given(router),
                _ => new.router(settings, hidden),
            };
            let router = router.map_err(place)?;
            let source = Source::Own { router, tap: Tap::LayerInput };
            *routing = Routing::Routed { source, dispatch: None };
        }
    }
    let mut network = Network { parts, parameters };
    network.gather();
    Ok(network)
}

/// A router whose layers are made.
struct NewRouter<'a> {
    layer: usize,
    /// The layer's place among those that are left.
    at: usize,
    kind: ModuleKind,
    seed: u64,
    device: &'a Device,
    parameters: &'a mut Vec<Parameter>,
}

impl NewRouter<'_> {
    /// A router that begins as `settings` say.
    fn router(
        &mut self,
        settings: &settings::Router,
        hidden: usize,
    ) -> candle_core::Result<Router> {
        let mut width = hidden;
        let mut first = None;
        if let Some(inner) = settings.width {
            let bound = (6.0 / hidden as f64).sqrt();
            first = Some(self.linear(HIDDEN, [inner, hidden], bound, 1.0, vec![0.0; inner])?);
            width = inner;
        }
        let bias = settings.keep_bias as f32;
        let scale = if bias == 0.0 { 1.0 } else { BIASED_WEIGHTS };
        let bound = (3.0 / width as f64).sqrt();
        let output = self.linear(OUTPUT, [2, width], bound, scale, vec![bias, 0.0 - bias])?;
        Ok(Router { hidden: first, output, decisions: 1 })
    }

    /// A router that begins as `router`.
    fn given(&mut self, router: &Router) -> candle_core::Result<Router> {
        let hidden = router.hidden.as_ref().map(|layer| self.copied(HIDDEN, layer)).transpose()?;
        Ok(Router { hidden, output: self.copied(OUTPUT, &router.output)?, decisions: 1 })
    }

    /// The layer `part` with the values of `layer`, and a bias whether that has one or not.
    fn copied(&mut self, part: &str, layer: &Linear) -> candle_core::Result<Linear> {
        let (outer, inner) = layer.weight.dims2()?;
        let biases = match &layer.bias {
            Some(bias) => bias.to_vec1()?,
            None => vec![0.0; outer],
        };
        self.parameters(part, [outer, inner], layer.weight.flatten_all()?.to_vec1()?, biases)
    }

    /// The layer `part`, `[out, in]`: weights uniform in `±bound`, times `scale`, and `biases`.
    fn linear(
        &mut self,
        part: &str,
        shape: [usize; 2],
        bound: f64,
        scale: f32,
        biases: Vec<f32>,
    ) -> candle_core::Result<Linear> {
        let next = (self.seed, self.parameters.len());
        let weights = uniform(next, bound, shape.iter().product());
        let weights = weights.into_iter().map(|value| value * scale).collect();
        self.parameters(part, shape, weights, biases)
    }

    /// The layer `part`, `[out, in]`, of two parameters.
    fn parameters(
        &mut self,
        part: &str,
        shape: [usize; 2],
        weights: Vec<f32>,
        biases: Vec<f32>,
    ) -> candle_core::Result<Linear> {
        let name = |of: &str| names::router(self.layer, self.kind, &format!("{part}.{of}"));
        let weight = Parameter::new(name("weight"), self.at, &shape, weights, self.device)?;
        let bias = Parameter::new(name("bias"), self.at, &shape[..1], biases, self.device)?;
        let tensor = |one: &Parameter| -> Tensor { one.var.as_tensor().clone() };
        let linear =
            Linear { weight: tensor(&weight), bias: Some(tensor(&bias)), lora: None, heard: None };
        self.parameters.extend([weight, bias]);
        Ok(linear)
    }
}

/// A network with a new adapter on every target: A uniform in `±1 / √in`, B zero, as PEFT begins.
pub(super) fn adapters(
    mut parts: Parts,
    settings: &settings::Lora,
    seed: u64,
    clock: &Clock,
) -> Result<Network, Error> {
    let device = &parts.embedding.device().clone();
    let mut parameters = Vec::new();
    for (at, layer) in parts.layers.iter_mut().enumerate() {
        for target in &settings.targets {
            let linear = projection(layer.attention.as_mut(), layer.mlp.as_mut(), *target);
            let Some(linear) = linear else { continue };
            let place = |source| Error::Compute { layer: Some(layer.index), source };
            let (outer, inner) = linear.weight.dims2().map_err(place)?;
            let path = names::layer(layer.index, target.path());
            let next = (seed, parameters.len());
            let bound = 1.0 / (inner as f64).sqrt();
            let new = |side: &str, shape: [usize; 2], values| {
                Parameter::new(names::lora(&path, side), at, &shape, values, device).map_err(place)
            };
            let weights = uniform(next, bound, settings.rank * inner);
            let down = new("lora_A", [settings.rank, inner], weights)?;
            let zeros = vec![0.0; outer * settings.rank];
            let up = new("lora_B", [outer, settings.rank], zeros)?;
            let tensor = |one: &Parameter| -> Tensor { one.var.as_tensor().clone() };
            linear.lora = Some(linear::Lora {
                down: tensor(&down),
                up: tensor(&up),
                scale: settings.alpha / settings.rank as f64,
                dropout: (settings.dropout > 0.0).then(|| Dropout {
                    rate: settings.dropout,
                    seed,
                    place: parameters.len() as u64,
                    clock: clock.clone(),
                }),
            });
            parameters.extend([down, up]);
        }
    }
    let mut network = Network { parts, parameters };
    network.gather();
    Ok(network)
}

/// The layer as the checkpoint has it, over the same weights.
pub(super) fn without_adapters(layer: &Layer) -> Layer {
    let mut layer = layer.clone();
    for target in Target::ALL {
        if let Some(linear) = projection(layer.attention.as_mut(), layer.mlp.as_mut(), target) {
            linear.lora = None;
        }
    }
    layer
}

/// The projection `target` of a layer, where it stands alone.
fn projection<'a>(
    attention: Option<&'a mut Attention>,
    mlp: Option<&'a mut Mlp>,
    target: Target,
) -> Option<&'a mut Linear> {
    match target {
        Target::Q => attention.map(|module| &mut module.q),
        Target::O => attention.map(|module| &mut module.o),
        Target::K | Target::V => match (&mut attention?.kv, target) {
            (KeyValue::Separate { k, .. }, Target::K) => Some(k),
            (KeyValue::Separate { v, .. }, _) => Some(v),
            (KeyValue::Fused(_), _) => None,
        },
        Target::Gate | Target::Up => match (&mut mlp?.gate_up, target) {
            (GateUp::Separate { gate, .. }, Target::Gate) => Some(gate),
            (GateUp::Separate { up, .. }, _) => Some(up),
            (GateUp::Fused(_), _) => None,
        },
        Target::Down => mlp.map(|module| &mut module.down),
    }
}

#[cfg(test)]
mod tests;
