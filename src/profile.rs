//! Measured keep rates: how often each routed module runs, on a text.
//!
//! A [`Profile`] is a small JSON file. From it and two thresholds comes a [`Selection`]: modules kept
//! so rarely that they are removed, and modules kept so often that they lose their router.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::{Config, ModuleId, ModuleKind};

use crate::decoder::{Decoder, Input, Logits, Routing};
use crate::eval::{self, Decisions, Options, Skipped, Windows};
use crate::world::{Stopped, World};

pub mod read;

/// The version of the file that is written, and the only one that is read.
pub const VERSION: u32 = 1;

/// How often each routed module runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// [`VERSION`].
    pub version: u32,
    /// What tells the model from others.
    pub model: Fingerprint,
    /// Tokens run.
    pub tokens: usize,
    /// Tokens per window: each was run on its own, from an empty cache.
    pub window: usize,
    /// Shares of decisions that skip.
    pub skipped: Skipped,
    /// The ranges of positions that rates are given for: 0, 1, 2..4, 4..8 and so on.
    pub positions: Vec<Positions>,
    /// The routed modules, in layer order, attention before MLP.
    pub modules: Vec<Module>,
}

/// The sizes a profile and the model it is used for must agree in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Layers of the checkpoint.
    pub num_hidden_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
}

/// A range of positions in a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Positions {
    /// The first.
    pub from: usize,
    /// One past the last.
    pub to: usize,
    /// Tokens that were run at them.
    pub tokens: usize,
}

/// A routed module's rates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Module {
    /// Written `layers.3.mlp`.
    #[serde(with = "read::id")]
    pub module: ModuleId,
    /// Share of tokens that keep it.
    pub keep: f64,
    /// The same for each of [`Profile::positions`].
    pub by_position: Vec<f64>,
}

/// What two thresholds make of a profile.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selection {
    /// Modules to remove, sorted.
    pub removed: Vec<ModuleId>,
    /// Modules that lose their router and run for every token, sorted.
    pub always: Vec<ModuleId>,
}

/// Why a profile could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error<D> {
    /// The text could not be run.
    #[error(transparent)]
    Eval(#[from] eval::Error<D>),
    /// The decoder does not say what it skips.
    #[error("the decoder does not report its routing decisions; profile the checkpoint instead")]
    NoRouting,
    /// No module is routed.
    #[error("no module has a router; give the routers with --router")]
    NoRouters,
    /// The routed modules changed from one window to the next: a bug in the decoder.
    #[error("window {window}: the decoder reports other modules than before")]
    Modules {
        /// From 0.
        window: usize,
    },
    /// Another rank stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Why a profile cannot be used as asked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// A threshold is not a share.
    #[error("--{option} is {value}; it must be 0 to 1")]
    Threshold {
        /// `prune-below` or `always-above`.
        option: &'static str,
        /// What was given.
        value: f64,
    },
    /// A module could be removed and kept at once.
    #[error("--prune-below {below} is not under --always-above {above}")]
    Order {
        /// `--prune-below`.
        below: f64,
        /// `--always-above`.
        above: f64,
    },
    /// The profile is another model's.
    #[error(
        "the profile was measured on a model with {key} {profile}; this one has {model}: measure it again on this model"
    )]
    OtherModel {
        /// The config's name for it.
        key: &'static str,
        /// The profile's.
        profile: usize,
        /// The model's.
        model: usize,
    },
}

impl From<&Config> for Fingerprint {
    fn from(config: &Config) -> Self {
        Self {
            num_hidden_layers: config.num_hidden_layers,
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
        }
    }
}

/// Runs `decoder`, which runs the model of `config`, over `tokens` (a text without special tokens)
/// and counts its decisions, each rank of `world` in its share of the windows; `progress` hears of
/// every window of this rank: (done, in all).
///
/// # Errors
///
/// [`Error::NoRouters`] and [`Error::NoRouting`] if there is nothing to count; otherwise as
/// [`eval::perplexity`].
pub fn measure<D: Decoder>(
    decoder: &mut D,
    config: &Config,
    tokens: &[u32],
    options: Options,
    world: &dyn World,
    mut progress: impl FnMut(usize, usize),
) -> Result<Profile, Error<D::Error>> {
    let windows = Windows::new(tokens.len(), options)?;
    let mut counts = Counts::new(windows.window);
    let mut decisions = Decisions::default();
    let mut done = 0;
    for index in windows.of(world) {
        let input = windows.input(tokens, index, Logits::Last);
        decoder.reset();
        let output = decoder
            .step(&input)
            .map_err(|source| eval::Error::Decoder { window: index, source })?;
        let routing = output.routing.ok_or(Error::NoRouting)?;
        if !counts.learn(&routing) {
            return Err(Error::Modules { window: index });
        }
        if world.takes(index) {
            counts.add(&routing, &input);
            decisions.count(&routing, &input);
        }
        done = (done + world.size()).min(windows.count);
        progress(done, windows.count);
    }
    counts.sum(world)?;
    let decisions = Decisions::of_all(Some(decisions), world)?.unwrap_or_default();
    decoder.reset();
    if counts.modules.is_empty() {
        return Err(Error::NoRouters);
    }
    Ok(Profile {
        version: VERSION,
        model: config.into(),
        tokens: windows.count * windows.window,
        window: windows.window,
        skipped: decisions.skipped(),
        positions: counts.positions(windows.count),
        modules: counts.rates(windows.count),
    })
}

/// Tokens kept, per module and range of positions.
struct Counts {
    ranges: Vec<(usize, usize)>,
    modules: Vec<ModuleId>,
    kept: Vec<Vec<usize>>,
}

impl Counts {
    fn new(window: usize) -> Self {
        let mut ranges = Vec::new();
        let mut from = 0;
        while from < window {
            let to = if from == 0 { 1 } else { (2 * from).min(window) };
            ranges.push((from, to));
            from = to;
        }
        Self { ranges, modules: Vec::new(), kept: Vec::new() }
    }

    /// Whether the modules are those of the windows before.
    fn learn(&mut self, routing: &Routing) -> bool {
        if self.modules.is_empty() {
            self.modules.clone_from(&routing.modules);
            self.kept = vec![vec![0; self.ranges.len()]; self.modules.len()];
        }
        self.modules == routing.modules
    }

    fn add(&mut self, routing: &Routing, input: &Input) {
        for (m, kept) in self.kept.iter_mut().enumerate() {
            for (kept, &(from, to)) in kept.iter_mut().zip(&self.ranges) {
                let keeps = |s: &usize| routing.keeps(m, 0, *s);
                *kept += (from..to.min(input.sequence())).filter(keeps).count();
            }
        }
    }

    /// Adds the counts of the other ranks.
    fn sum(&mut self, world: &dyn World) -> Result<(), Stopped> {
        let mut counts: Vec<f64> = self.kept.iter().flatten().map(|kept| *kept as f64).collect();
        world.sum(&mut counts)?;
        self.kept.iter_mut().flatten().zip(counts).for_each(|(kept, sum)| *kept = sum as usize);
        Ok(())
    }

    fn positions(&self, windows: usize) -> Vec<Positions> {
        let range = |&(from, to)| Positions { from, to, tokens: (to - from) * windows };
        self.ranges.iter().map(range).collect()
    }

    fn rates(&self, windows: usize) -> Vec<Module> {
        let tokens: Vec<_> = self.positions(windows).iter().map(|range| range.tokens).collect();
        let share = |kept: usize, tokens: usize| kept as f64 / tokens as f64;
        let rates = |(&module, kept): (&ModuleId, &Vec<usize>)| Module {
            module,
            keep: share(kept.iter().sum(), tokens.iter().sum()),
            by_position: kept.iter().zip(&tokens).map(|(&k, &t)| share(k, t)).collect(),
        };
        self.modules.iter().zip(&self.kept).map(rates).collect()
    }
}

impl Profile {
    /// What the thresholds make of the model of `config`: modules kept by a share of tokens at or
    /// under `prune_below` are removed, those at or over `always_above` lose their router.
    ///
    /// # Errors
    ///
    /// [`PlanError`]: thresholds outside 0..=1 or crossed, a profile of another model.
    pub fn plan(
        &self,
        config: &Config,
        prune_below: Option<f64>,
        always_above: Option<f64>,
    ) -> Result<Selection, PlanError> {
        let given = [("prune-below", prune_below), ("always-above", always_above)];
        for (option, value) in given {
            if let Some(value) = value.filter(|value| !(0.0..=1.0).contains(value)) {
                return Err(PlanError::Threshold { option, value });
            }
        }
        if let (Some(below), Some(above)) = (prune_below, always_above)
            && below >= above
        {
            return Err(PlanError::Order { below, above });
        }
        self.matches(config)?;
        let chosen = |keeps: &dyn Fn(f64) -> bool| {
            let modules = self.modules.iter().filter(|module| keeps(module.keep));
            modules.map(|module| module.module).collect::<BTreeSet<_>>().into_iter().collect()
        };
        Ok(Selection {
            removed: chosen(&|keep| prune_below.is_some_and(|below| keep <= below)),
            always: chosen(&|keep| always_above.is_some_and(|above| keep >= above)),
        })
    }

    fn matches(&self, config: &Config) -> Result<(), PlanError> {
        let model = Fingerprint::from(config);
        let sizes = [
            ("num_hidden_layers", self.model.num_hidden_layers, model.num_hidden_layers),
            ("hidden_size", self.model.hidden_size, model.hidden_size),
            ("vocab_size", self.model.vocab_size, model.vocab_size),
        ];
        match sizes.into_iter().find(|(_, profile, model)| profile != model) {
            Some((key, profile, model)) => Err(PlanError::OtherModel { key, profile, model }),
            None => Ok(()),
        }
    }

    /// The mean keep rate of the modules of `kind`; `None` if none is routed.
    pub fn keep(&self, kind: ModuleKind) -> Option<f64> {
        let rates: Vec<_> =
            self.modules.iter().filter(|m| m.module.kind == kind).map(|m| m.keep).collect();
        (!rates.is_empty()).then(|| rates.iter().sum::<f64>() / rates.len() as f64)
    }
}

#[cfg(test)]
mod tests;
