//! Routers: one per module, of one layer or two, told by the tensors present.
//!
//! ```text
//! model.layers.{i}.router_{attention,mlp}.weight_predictor.{weight,bias}    [2, hidden], [2]
//! model.layers.{i}.router_{attention,mlp}.hidden_layer.{weight,bias}        [width, hidden], [width]
//! ```

use std::path::{Path, PathBuf};

use skipgpt_passes::ir::{Linear, ModuleKind, Policy, Router, Tap, Weight};

use super::catalog::{self, Catalog};
use super::names::{self, Kind};
use crate::sources::Sources;

const OUTPUT: &str = "weight_predictor";
const HIDDEN: &str = "hidden_layer";

/// What is wrong with routers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or a tensor is not what it should be.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    /// The file holds no router.
    #[error("{}: holds no router; expected model.layers.<i>.router_attention.weight_predictor.weight and the like", path.display())]
    None {
        /// The file.
        path: PathBuf,
    },
    /// A router's tensor has a name of no form that is known.
    #[error("{}: tensor {name} is of no known form of router; expected router_attention or router_mlp with weight_predictor and, in the two-layer form, hidden_layer", path.display())]
    UnknownForm {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
    },
    /// A module has no router while others have.
    #[error("{}: layer {layer} has no router for its {kind} module; every layer needs both", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// Which layer.
        layer: usize,
        /// Which module.
        kind: ModuleKind,
    },
    /// A router of a layer the model does not have.
    #[error("{}: tensor {name} is a router of layer {layer}; the model has {layers} layers. The routers are of another model", path.display())]
    ExtraLayer {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// Its layer.
        layer: usize,
        /// How many the model has.
        layers: usize,
    },
    /// The hidden layer is no matrix over the residual stream.
    #[error("{}: tensor {name} has shape {found:?}; expected [width, {hidden}]", path.display())]
    HiddenShape {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// What the file holds.
        found: Vec<usize>,
        /// Width of the residual stream.
        hidden: usize,
    },
}

/// The routers of a checkpoint.
#[derive(Debug)]
pub(super) struct Routers {
    catalog: Catalog,
}

impl Routers {
    /// The routers in `path`; what else it holds is left alone.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        match Self::pick(&mut Catalog::open(path)?)? {
            Some(routers) => Ok(routers),
            None => Err(Error::None { path: path.to_owned() }),
        }
    }

    /// The routers among the tensors of `catalog`, if any.
    pub(super) fn pick(catalog: &mut Catalog) -> Result<Option<Self>, Error> {
        let catalog = catalog.split(|kind| matches!(kind, Kind::Router { .. }));
        for (_, entry) in catalog.iter() {
            if matches!(entry.kind, Kind::Router { part: None, .. }) {
                let (path, name) = (entry.path.as_ref().clone(), entry.name.clone());
                return Err(Error::UnknownForm { path, name });
            }
        }
        Ok((!catalog.is_empty()).then_some(Self { catalog }))
    }

    /// Refuses routers of layers that a model of `layers` layers does not have.
    pub(super) fn check_layers(&self, layers: usize) -> Result<(), Error> {
        let extra = self.catalog.iter().find_map(|(_, entry)| match entry.kind {
            Kind::Router { layer, .. } if layer >= layers => Some((layer, entry)),
            _ => None,
        });
        match extra {
            None => Ok(()),
            Some((layer, entry)) => {
                let (path, name) = (entry.path.as_ref().clone(), entry.name.clone());
                Err(Error::ExtraLayer { path, name, layer, layers })
            }
        }
    }

    /// The router of one module, on a residual stream `hidden` wide.
    pub(super) fn take(
        &mut self,
        layer: usize,
        kind: ModuleKind,
        hidden: usize,
        sources: &mut Sources,
    ) -> Result<Router, Error> {
        let name = |part: &str| names::router(layer, kind, part);
        let has = |part: &str| {
            let parts = ["weight", "bias"].map(|tensor| name(&format!("{part}.{tensor}")));
            parts.iter().any(|name| self.catalog.get(name).is_some())
        };
        let (has_output, has_hidden) = (has(OUTPUT), has(HIDDEN));
        if !has_output && !has_hidden {
            return Err(Error::Missing { path: self.catalog.origin().to_owned(), layer, kind });
        }
        let mut input = hidden;
        let mut hidden_layer = None;
        if has_hidden {
            input = self.width(&name("hidden_layer.weight"), hidden)?;
            hidden_layer = Some(self.linear(&name(HIDDEN), [input, hidden], sources)?);
        }
        let output = self.linear(&name(OUTPUT), [2, input], sources)?;
        Ok(Router { hidden: hidden_layer, output, tap: Tap::LayerInput, policy: Policy::Sampled })
    }

    /// Width of a hidden layer; that of a missing one is asked for later, by its tensors.
    fn width(&self, weight: &str, hidden: usize) -> Result<usize, Error> {
        match self.catalog.get(weight) {
            None => Ok(hidden / 4),
            Some(entry) => match entry.shape[..] {
                [width, columns] if width > 0 && columns == hidden => Ok(width),
                _ => Err(Error::HiddenShape {
                    path: entry.path.as_ref().clone(),
                    name: entry.name.clone(),
                    found: entry.shape.clone(),
                    hidden,
                }),
            },
        }
    }

    fn linear(
        &mut self,
        name: &str,
        shape: [usize; 2],
        sources: &mut Sources,
    ) -> Result<Linear, Error> {
        let weight = self.catalog.take(&format!("{name}.weight"), &shape, sources)?;
        let bias = self.catalog.take(&format!("{name}.bias"), &shape[..1], sources)?;
        let (weight, bias) = (Weight::Stored(weight), Some(Weight::Stored(bias)));
        Ok(Linear { weight, bias, lora: None })
    }
}
