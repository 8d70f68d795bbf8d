//! Static pruning, for comparison: what removing the same modules for every token would give.
//!
//! Which modules go is decided by how little they change the residual stream: the mean over the tokens
//! of a text of the cosine between the stream before and after, highest first. [`Unit::Blocks`] removes
//! whole layers, as `ShortGPT` does (its block influence is one minus that mean); [`Unit::Modules`]
//! ranks attention and MLP modules in one list, as LLM-Drop does. All are chosen at once, from
//! one run of the whole model.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{DType, Result as Candle, Tensor};
use skipgpt_passes::Unsupported;
use skipgpt_passes::ir::{Model, ModuleId};
use skipgpt_passes::plan::Plan;
use skipgpt_passes::prune_modules;

use super::{Options, Windows};
use crate::decoder::{Decoder, Logits};
use crate::model::layer::Change;
use crate::model::{self, Reference};
use crate::plan;
use crate::world::World;

/// What is removed as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Layers, attention and MLP together.
    Blocks,
    /// Attention and MLP modules, each by itself.
    Modules,
}

/// How little each module and each layer changes the residual stream, on a text.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Similarities {
    /// Mean cosine between a layer's input and output, by its place in the checkpoint.
    pub layers: BTreeMap<usize, f64>,
    /// Mean cosine between the residual stream before and after a module.
    pub modules: BTreeMap<ModuleId, f64>,
    /// Tokens run.
    pub tokens: usize,
}

/// Why similarities could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text could not be run.
    #[error(transparent)]
    Eval(Box<super::Error<model::Error>>),
    /// The residual stream is zero or not finite.
    #[error(
        "{place}: the cosine similarity of its input and output is {value}; are the weights damaged?"
    )]
    NotFinite {
        /// The module or layer.
        place: String,
        /// What was computed.
        value: f64,
    },
}

impl From<super::Error<model::Error>> for Error {
    fn from(error: super::Error<model::Error>) -> Self {
        Self::Eval(Box::new(error))
    }
}

/// Why nothing can be removed as asked.
#[derive(Debug, thiserror::Error)]
pub enum PruneError {
    /// A rate outside the open interval.
    #[error("the skip rate is {0}; it must be above 0 and below 1")]
    Rate(f64),
    /// The rate rounds to none or to all.
    #[error(
        "a skip rate of {rate} removes {removed} of {all} {unit}; it must leave one and remove one"
    )]
    Rounded {
        /// The rate.
        rate: f64,
        /// What is removed as one.
        unit: Unit,
        /// How many would be removed.
        removed: usize,
        /// How many there are.
        all: usize,
    },
    /// The passes do not remove these modules.
    #[error("{unit}: {source}")]
    Unsupported {
        /// What is removed as one.
        unit: Unit,
        /// The pass's word.
        source: Unsupported,
    },
    /// No plan could be made.
    #[error(transparent)]
    Plan(#[from] plan::Error),
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blocks => "blocks",
            Self::Modules => "modules",
        })
    }
}

/// Runs `reference` over `tokens` (a text without special tokens), each rank of `world` its share of
/// the windows; `progress` hears of every window of this rank: (done, in all).
///
/// # Errors
///
/// [`Error`] if the text does not fill a window, or a cosine is not finite.
pub fn measure(
    reference: &mut Reference,
    tokens: &[u32],
    options: Options,
    world: &dyn World,
    mut progress: impl FnMut(usize, usize),
) -> Result<Similarities, Error> {
    let windows = Windows::new(tokens.len(), options)?;
    let (mut sums, mut own, mut done) = (Similarities::default(), Vec::new(), 0);
    for window in windows.of(world) {
        let input = windows.input(tokens, window, Logits::Last);
        sums = Similarities::default();
        reference.reset();
        reference
            .step_observed(&input, &mut |change| sums.add(change))
            .map_err(|source| super::Error::Decoder { window, source })?;
        own.push((window, sums.values_mut().map(|value| *value).collect::<Vec<_>>()));
        done = (done + world.size()).min(windows.count);
        progress(done, windows.count);
    }
    reference.reset();
    // Another rank's windows are zero here, so that no sum depends on the number of ranks.
    let width = sums.values_mut().count();
    let mut all = vec![0.0; windows.count * width];
    for (window, values) in own.into_iter().filter(|(window, _)| world.takes(*window)) {
        all[window * width..][..width].copy_from_slice(&values);
    }
    world.sum(&mut all).map_err(super::Error::Stopped)?;
    sums.values_mut().for_each(|sum| *sum = 0.0);
    for window in all.chunks_exact(width.max(1)) {
        sums.values_mut().zip(window).for_each(|(sum, value)| *sum += value);
    }
    sums.tokens = windows.count * windows.window;
    let tokens = sums.tokens as f64;
    sums.values_mut().for_each(|sum| *sum /= tokens);
    let layers = sums.layers.iter().map(|(layer, value)| (format!("layers.{layer}"), *value));
    let modules = sums.modules.iter().map(|(module, value)| (module.to_string(), *value));
    match layers.chain(modules).find(|(_, value)| !value.is_finite()) {
        Some((place, value)) => Err(Error::NotFinite { place, value }),
        None => Ok(sums),
    }
}

impl Similarities {
    /// Those of layers, then those of modules.
    fn values_mut(&mut self) -> impl Iterator<Item = &mut f64> {
        self.layers.values_mut().chain(self.modules.values_mut())
    }

    fn add(&mut self, change: Change<'_>) -> Candle<()> {
        let sum = cosines(change.before, change.after)?;
        let layer = change.layer;
        *match change.module {
            None => self.layers.entry(layer).or_default(),
            Some(kind) => self.modules.entry(ModuleId { layer, kind }).or_default(),
        } += sum;
        Ok(())
    }

    /// The modules that go at a skip rate of `rate`, sorted: that share of the units, rounded to the
    /// nearest, those of the highest similarity, of equals the earliest.
    ///
    /// # Errors
    ///
    /// [`PruneError::Rate`], [`PruneError::Rounded`].
    pub fn choose(&self, unit: Unit, rate: f64) -> Result<Vec<ModuleId>, PruneError> {
        if !(rate > 0.0 && rate < 1.0) {
            return Err(PruneError::Rate(rate));
        }
        let mut units: Vec<(Vec<ModuleId>, f64)> = match unit {
            Unit::Modules => self.modules.iter().map(|(id, value)| (vec![*id], *value)).collect(),
            Unit::Blocks => {
                let of = |layer| self.modules.keys().filter(move |id| id.layer == layer).copied();
                self.layers.iter().map(|(layer, value)| (of(*layer).collect(), *value)).collect()
            }
        };
        let all = units.len();
        let removed = (rate * all as f64).round() as usize;
        if removed == 0 || removed == all {
            return Err(PruneError::Rounded { rate, unit, removed, all });
        }
        // The sort is stable, so equals stay in the order of the model.
        units.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        let mut modules: Vec<_> = units.drain(..removed).flat_map(|(ids, _)| ids).collect();
        modules.sort_unstable();
        Ok(modules)
    }
}

/// The sum over rows of the cosine of `before` and `after`, each `[rows, hidden]`.
fn cosines(before: &Tensor, after: &Tensor) -> Candle<f64> {
    let (before, after) = (before.to_dtype(DType::F32)?, after.to_dtype(DType::F32)?);
    let length = |x: &Tensor| x.sqr()?.sum(1)?.sqrt();
    let products = (&before * &after)?.sum(1)?;
    let cosines = (products / (length(&before)? * length(&after)?)?)?;
    cosines.to_dtype(DType::F64)?.sum_all()?.to_scalar()
}

/// `model` without routers, and without the modules in `removed`, which were chosen by `unit`.
///
/// # Errors
///
/// [`PruneError::Unsupported`] if they are not the model's, or every attention is among them.
pub fn prune(model: &Model, removed: Vec<ModuleId>, unit: Unit) -> Result<Model, PruneError> {
    let mut pruned = dense(model)?;
    let plan = Plan { removed, ..plan::build(model, plan::Choices::default(), None)? };
    prune_modules::prune(&mut pruned, &plan)
        .map_err(|source| PruneError::Unsupported { unit, source })?;
    Ok(pruned)
}

/// `model` without routers: every module runs for every token.
///
/// # Errors
///
/// None for a valid model.
pub fn dense(model: &Model) -> Result<Model, PruneError> {
    let always = model.routed_modules().collect();
    let plan = Plan { always, ..plan::build(model, plan::Choices::default(), None)? };
    let mut dense = model.clone();
    prune_modules::prune(&mut dense, &plan)
        .map_err(|source| PruneError::Unsupported { unit: Unit::Modules, source })?;
    Ok(dense)
}

#[cfg(test)]
mod tests;
