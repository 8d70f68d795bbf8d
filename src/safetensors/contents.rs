//! Which tensors the files hold: the model's weights under the checkpoint's names, renumbered.

use std::borrow::Cow;
use std::collections::BTreeMap;

use skipgpt_passes::ir::{
    Architecture, DType, Layer, Model, ModuleId, ModuleKind, Routing, Source, Stored, Tap, Weight,
};

use super::Error;
use crate::checkpoint::names::{self, Kind};
use crate::sources::{self, Sources};

/// A tensor to write.
#[derive(Debug)]
pub(super) struct Tensor<'a> {
    /// Its values.
    pub(super) weight: Cow<'a, Weight>,
    /// What they are rounded to.
    pub(super) dtype: DType,
}

/// Everything the weight files hold.
#[derive(Debug)]
pub(super) struct Contents<'a> {
    /// The layers that are left, in order, each at its new number.
    pub(super) layers: Vec<&'a Layer>,
    /// Whether every layer that is left has both modules.
    pub(super) plain: bool,
    /// Whether the head shares the embedding's tensor.
    pub(super) tied: bool,
    /// The embedding's dtype: what the configuration says.
    pub(super) dtype: DType,
    /// By name.
    pub(super) weights: BTreeMap<String, Tensor<'a>>,
    /// By name; empty if nothing is routed.
    pub(super) routers: BTreeMap<String, Tensor<'a>>,
}

impl Tensor<'_> {
    /// Its bytes.
    pub(super) fn size(&self) -> u64 {
        self.weight.len() as u64 * self.dtype.size() as u64
    }
}

impl<'a> Contents<'a> {
    /// The contents of `model`'s files. Tensors the checkpoint lacks are added to `sources`.
    pub(super) fn of(
        model: &'a Model,
        dtype: Option<DType>,
        sources: &mut Sources,
    ) -> Result<Self, Error> {
        let layers: Vec<_> = model
            .layers
            .iter()
            .filter(|layer| layer.attention.is_some() || layer.mlp.is_some())
            .collect();
        let plain = layers.iter().all(|layer| layer.attention.is_some() && layer.mlp.is_some());
        if !plain {
            check_block_configs(model, &layers)?;
        }
        check_taps(&layers)?;
        let own =
            base(&model.embedding).ok_or_else(|| Error::Unnamed("embedding".to_owned()))?.dtype;
        let mut contents = Self {
            plain,
            tied: model.head.weight == model.embedding,
            dtype: dtype.unwrap_or(own),
            weights: BTreeMap::new(),
            routers: BTreeMap::new(),
            layers,
        };
        for (path, weight) in model.weights() {
            contents.add(&path, weight, dtype)?;
        }
        if !contents.routers.is_empty() {
            contents.keep_always(model.config.hidden_size, sources)?;
        }
        Ok(contents)
    }

    fn add(&mut self, path: &str, weight: &'a Weight, dtype: Option<DType>) -> Result<(), Error> {
        let stored = base(weight).ok_or_else(|| Error::Unnamed(path.to_owned()))?;
        let mut name = stored.name.clone();
        if path == "head.weight" {
            if self.tied {
                return Ok(());
            }
            // An adapter on a tied head: its base is named as the embedding.
            name = format!("{}.weight", names::HEAD);
        }
        if let Some(layer) = names::layer_index(&name) {
            let (old, rest) = (names::layer(layer, ""), name.clone());
            if let (Some(new), Some(rest)) = (self.number(layer), rest.strip_prefix(&old)) {
                name = names::layer(new, rest);
            }
        }
        let weight = Cow::Borrowed(weight);
        if matches!(names::parse(&name).kind, Kind::Router { .. }) {
            self.routers.insert(name, Tensor { weight, dtype: DType::F32 });
        } else {
            let dtype = dtype.unwrap_or(stored.dtype);
            self.weights.insert(name, Tensor { weight, dtype });
        }
        Ok(())
    }

    /// The new number of the checkpoint's layer `index`.
    fn number(&self, index: usize) -> Option<usize> {
        self.layers.iter().position(|layer| layer.index == index)
    }

    /// A router that keeps every token, for modules that lost theirs: zeros, and a bias for keep.
    ///
    /// The released format has a router for every module; a reader would miss those.
    fn keep_always(&mut self, hidden: usize, sources: &mut Sources) -> Result<(), Error> {
        let mut constant = |name: &str, shape: Vec<usize>, values: &[f32]| {
            let mut bytes = Vec::new();
            sources::encode(values, DType::F32, &mut bytes);
            let stored = Stored { name: name.to_owned(), shape, dtype: DType::F32 };
            sources.insert_memory(stored.clone(), bytes.into()).map(|()| Weight::Stored(stored))
        };
        let weight = constant("always kept: weight", vec![2, hidden], &vec![0.0; 2 * hidden])?;
        let bias = constant("always kept: bias", vec![2], &[1.0, 0.0])?;
        for (number, layer) in self.layers.iter().enumerate() {
            for kind in [ModuleKind::Attention, ModuleKind::Mlp] {
                if !matches!(layer.routing(kind), Some(Routing::Always)) {
                    continue;
                }
                for (part, value) in [("weight", &weight), ("bias", &bias)] {
                    let name = names::router(number, kind, &format!("weight_predictor.{part}"));
                    let weight = Cow::Owned(value.clone());
                    self.routers.insert(name, Tensor { weight, dtype: DType::F32 });
                }
            }
        }
        Ok(())
    }
}

/// The tensor of the base model that a weight is, or is a change of.
fn base(weight: &Weight) -> Option<&Stored> {
    match weight {
        Weight::Stored(stored) => Some(stored),
        Weight::Merged { base: of, .. } | Weight::Cast { of, .. } => base(of),
        Weight::Concat(_)
        | Weight::Slice { .. }
        | Weight::BlockDiagonal(_)
        | Weight::Difference { .. }
        | Weight::Transpose(_)
        | Weight::Quantized { .. } => None,
    }
}

fn check_block_configs(model: &Model, layers: &[&Layer]) -> Result<(), Error> {
    let missing = |layer: &Layer| {
        let kind = if layer.attention.is_none() { ModuleKind::Attention } else { ModuleKind::Mlp };
        ModuleId { layer: layer.index, kind }
    };
    let alone = layers.iter().find(|layer| layer.attention.is_none() || layer.mlp.is_none());
    let architecture = model.config.architecture;
    match (alone, architecture) {
        (Some(layer), Architecture::Qwen2 | Architecture::Qwen3) => {
            Err(Error::Architecture { removed: missing(layer), architecture })
        }
        _ => match layers.first() {
            Some(first) if first.attention.is_none() => Err(Error::FirstAttention(missing(first))),
            _ => Ok(()),
        },
    }
}

fn check_taps(layers: &[&Layer]) -> Result<(), Error> {
    for layer in layers {
        for kind in [ModuleKind::Attention, ModuleKind::Mlp] {
            // Attention's input is the layer's: both taps are the same state.
            if let Some(Routing::Routed { source: Source::Own(router), .. }) = layer.routing(kind)
                && router.tap == Tap::ModuleInput
                && kind == ModuleKind::Mlp
            {
                return Err(Error::Tap(ModuleId { layer: layer.index, kind }));
            }
        }
    }
    Ok(())
}
