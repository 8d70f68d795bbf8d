//! What a workload's table needs to be timed: the runs, and the sessions that hold them.

use std::collections::BTreeSet;

use skipgpt_passes::ir::{ModuleId, ModuleKind};

use super::Error;
use super::draws::{Draws, choose};
use super::shares::{Facts, Shares};
use super::stats::Rounds;
use super::subject::{Form, Source};
use super::workload::Script;
use crate::decoder::{Input, Routing};

/// One thing that is timed.
#[derive(Debug)]
pub(super) struct Run {
    /// Which source.
    pub(super) source: usize,
    /// Where its decisions are drawn, and how.
    pub(super) draws: Option<Draws>,
    /// What its decisions skip; `None` where nothing is routed.
    pub(super) shares: Option<Shares>,
    /// The runs whose mean is its ideal; empty where none is asked for.
    pub(super) ideals: Vec<usize>,
    /// Whether it is itself an ideal, and no line of the table.
    pub(super) is_ideal: bool,
    /// Seconds a sample.
    pub(super) seconds: Rounds,
    /// Seconds to load the session it runs in.
    pub(super) loading: Rounds,
}

/// A session that is opened in every round, and the runs in it.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) source: usize,
    pub(super) form: Form,
    pub(super) runs: Vec<usize>,
}

/// Everything that is timed for one workload. The baseline, where there is one, is run 0.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) runs: Vec<Run>,
    pub(super) sessions: Vec<Planned>,
}

/// How ideals are drawn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ideals {
    pub(super) seeds: usize,
    pub(super) seed: u64,
}

impl Plan {
    /// Adds a run in a session of its own.
    pub(super) fn alone(&mut self, source: usize, form: Form, shares: Option<Shares>) -> usize {
        let run = self.run(source, None, shares);
        self.sessions.push(Planned { source, form, runs: vec![run] });
        run
    }

    /// Adds runs of drawn decisions, all in one session.
    pub(super) fn forced(
        &mut self,
        (source, number): (&Source, usize),
        facts: Option<&Facts>,
        script: &Script,
        draws: &[Draws],
    ) {
        let mut runs = Vec::with_capacity(draws.len());
        for draws in draws {
            let decided: Vec<_> = script
                .distinct()
                .map(|step| (step.clone(), draws.routing(source.routed(), step)))
                .collect();
            let shares = facts.map(|facts| facts.shares(&decided));
            runs.push(self.run(number, Some(*draws), shares));
        }
        self.sessions.push(Planned { source: number, form: Form::Forced, runs });
    }

    fn run(&mut self, source: usize, draws: Option<Draws>, shares: Option<Shares>) -> usize {
        self.runs.push(Run {
            source,
            draws,
            shares,
            ideals: Vec::new(),
            is_ideal: false,
            seconds: Rounds::default(),
            loading: Rounds::default(),
        });
        self.runs.len() - 1
    }

    /// Adds the ideals of every run that skips: forms of the baseline, source 0, without as many
    /// modules of each kind as the run skips on average, or without the very ones it never runs.
    pub(super) fn idealise(
        &mut self,
        sources: &[Source],
        facts: &Facts,
        script: &Script,
        ideals: Ideals,
    ) -> Result<(), Error> {
        let mut known: Vec<(BTreeSet<ModuleId>, usize)> = vec![(BTreeSet::new(), 0)];
        for at in 0..self.runs.len() {
            let (source, shares) = (&sources[self.runs[at].source], self.runs[at].shares);
            let Some(shares) = shares.filter(|_| !source.routed().is_empty()) else { continue };
            if source.removes() {
                return Err(Error::IdealOfPruned(source.directory.clone()));
            }
            let fixed = self.runs[at].draws.and_then(|draws| draws.skipped(source.routed()));
            let removed = fixed.map_or_else(|| removals(source, &shares, ideals), |set| vec![set]);
            for removed in removed {
                let found = known.iter().find(|(modules, _)| *modules == removed);
                let run = if let Some((_, run)) = found {
                    *run
                } else {
                    let shares = facts.shares(&never(&removed, script));
                    let run = self.alone(0, Form::Without(removed.clone()), Some(shares));
                    self.runs[run].is_ideal = true;
                    known.push((removed, run));
                    run
                };
                self.runs[at].ideals.push(run);
            }
        }
        Ok(())
    }
}

/// One set of modules per seed, of the mean size that `shares` ask for.
fn removals(source: &Source, shares: &Shares, ideals: Ideals) -> Vec<BTreeSet<ModuleId>> {
    let kinds =
        [(ModuleKind::Attention, shares.skipped.attention), (ModuleKind::Mlp, shares.skipped.mlp)];
    (0..ideals.seeds)
        .map(|seed| {
            let mut removed = BTreeSet::new();
            for (kind, share) in kinds {
                let modules = source.routed_of(kind);
                // One kind is rounded up where the other is rounded down.
                let turn =
                    if kind == ModuleKind::Attention { seed } else { ideals.seeds - 1 - seed };
                let count =
                    dithered(share.unwrap_or_default() * modules.len() as f64, turn, ideals.seeds);
                removed.extend(choose(&modules, count, ideals.seed + seed as u64));
            }
            removed
        })
        .collect()
}

/// `value` as whole numbers whose mean over `turns` turns is nearest to it.
fn dithered(value: f64, turn: usize, turns: usize) -> usize {
    (value + (turn as f64 + 0.5) / turns as f64).floor() as usize
}

/// The decisions of a model whose modules `removed` never run.
fn never(removed: &BTreeSet<ModuleId>, script: &Script) -> Vec<(Input, Routing)> {
    let modules: Vec<ModuleId> = removed.iter().copied().collect();
    let skips = Draws { seed: 0, skip: 1.0, fixed: true };
    script.distinct().map(|step| (step.clone(), skips.routing(&modules, step))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_keep_the_mean() {
        for (value, turns, expected) in [
            (7.5, 3, [7, 8, 8].as_slice()),
            (3.0, 3, &[3, 3, 3]),
            (0.0, 2, &[0, 0]),
            (7.4, 1, &[7]),
            (7.6, 1, &[8]),
            (2.25, 4, &[2, 2, 2, 3]),
        ] {
            let numbers: Vec<usize> = (0..turns).map(|turn| dithered(value, turn, turns)).collect();
            assert_eq!(numbers, expected, "{value}");
        }
    }
}
