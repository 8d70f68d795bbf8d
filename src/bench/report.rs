//! What was measured: lines of a table, for people, as JSON and as CSV.

use std::fmt::{self, Write as _};
use std::path::Path;

use serde::Serialize;

use super::plan::{Plan, Run};
use super::stats::{Medians, Ratio, Spread};
use super::{Caches, Draws, Options, Request, Shares, Source, Tokens, Workload};

mod csv;
mod table;

/// Everything that was measured, and how.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// ONNX Runtime's version.
    pub onnxruntime: String,
    /// Where sessions ran.
    pub provider: String,
    /// Threads inside an operator; `None` is ONNX Runtime's choice.
    pub threads: Option<usize>,
    /// Rounds.
    pub rounds: usize,
    /// Decode steps run before those that are timed.
    pub warmup: usize,
    /// Of everything drawn.
    pub seed: u64,
    /// Whether caches grew by copies, step by step.
    pub growing_cache: bool,
    /// Whether steps of one token ran in the session of all others.
    pub one_session: bool,
    /// Whether the tokens were a text's; otherwise they were drawn.
    pub text: bool,
    /// Line by line: by workload, the baseline first.
    pub lines: Vec<Line>,
}

/// One artifact's time on one workload.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// What was run.
    pub workload: Workload,
    /// The artifact, as it was named.
    pub artifact: String,
    /// Whose decisions skipped.
    pub decisions: Decisions,
    /// The share of decisions that were to be skipped, in percent, where they were drawn.
    pub force_skip: Option<f64>,
    /// Milliseconds of a sample: a decode step, a prefill, a whole generation.
    pub ms: Spread,
    /// The median for each token of a sample, over all sequences.
    pub ms_per_token: f64,
    /// Samples over all rounds.
    pub samples: usize,
    /// The baseline's time through this one: above 1 is faster. `None` for the baseline.
    pub speedup: Option<Ratio>,
    /// What was skipped; `None` where nothing is routed or nothing is known.
    pub skips: Option<Shares>,
    /// The comparison with static graphs.
    pub ideal: Option<Ideal>,
    /// Median seconds to load the session.
    pub load_seconds: f64,
    /// Most bytes of memory that a process took which does this and nothing else.
    pub peak_memory: Option<u64>,
}

/// Whose decisions skip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decisions {
    /// Nothing is routed.
    None,
    /// The artifact's routers'.
    Own,
    /// Drawn ones, for each token apart.
    Drawn,
    /// Drawn ones, the same for all tokens.
    Fixed,
    /// Another exporter's graph.
    Unknown,
}

/// Static graphs of the baseline that do the same share of the work.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ideal {
    /// How many were timed.
    pub graphs: usize,
    /// The mean of their medians, in milliseconds.
    pub ms: f64,
    /// Their time through this one: 1 is reached when skipping costs nothing.
    pub reached: Ratio,
    /// The mean share of the baseline's multiply-adds that they lack.
    pub multiply_adds: f64,
}

impl Report {
    pub(super) fn new(
        request: &Request,
        options: &Options,
        onnxruntime: &str,
        lines: Vec<Line>,
    ) -> Self {
        Self {
            onnxruntime: onnxruntime.to_owned(),
            provider: options.session.provider.to_string(),
            threads: options.session.threads,
            rounds: options.rounds,
            warmup: options.steps.warmup,
            seed: options.seed,
            growing_cache: options.caches == Caches::Growing,
            one_session: options.session.one_token().is_none(),
            text: matches!(request.tokens, Tokens::Text(_)),
            lines,
        }
    }

    /// Notes the peak memory of `artifact` on `workload`, on every line of the two.
    pub fn note_memory(&mut self, artifact: &Path, workload: Workload, bytes: u64) {
        let name = artifact.display().to_string();
        for line in &mut self.lines {
            if line.artifact == name && line.workload == workload {
                line.peak_memory = Some(bytes);
            }
        }
    }

    /// One row per line of the table, under a row of names.
    pub fn to_csv(&self) -> String {
        csv::table(self)
    }
}

/// The lines of one workload.
pub(super) fn lines(
    workload: Workload,
    plan: &Plan,
    sources: &[Source],
    baseline: bool,
) -> Vec<Line> {
    let medians: Vec<Medians> = plan.runs.iter().map(|run| run.seconds.medians()).collect();
    let runs = plan.runs.iter().enumerate().filter(|(_, run)| !run.is_ideal);
    runs.map(|(at, run)| {
        let source = &sources[run.source];
        let compared = baseline && at > 0;
        let ms = run.seconds.spread().times(1e3);
        Line {
            workload,
            artifact: source.directory.display().to_string(),
            decisions: match (&source.artifact, run.draws, source.routed()) {
                (_, Some(Draws { fixed: true, .. }), _) => Decisions::Fixed,
                (_, Some(_), _) => Decisions::Drawn,
                (None, ..) => Decisions::Unknown,
                (Some(_), None, []) => Decisions::None,
                (Some(_), None, _) => Decisions::Own,
            },
            force_skip: run.draws.map(|draws| 100.0 * draws.skip),
            ms_per_token: ms.median / workload.tokens() as f64,
            ms,
            samples: run.seconds.count(),
            speedup: compared.then(|| Ratio::of(&medians[0], &medians[at])),
            skips: run.shares,
            ideal: ideal(run, &medians[at], plan, &medians),
            load_seconds: run.loading.spread().median,
            peak_memory: None,
        }
    })
    .collect()
}

fn ideal(run: &Run, own: &Medians, plan: &Plan, medians: &[Medians]) -> Option<Ideal> {
    let graphs: Vec<Medians> = run.ideals.iter().map(|at| medians[*at].clone()).collect();
    let mean = Medians::mean(&graphs)?;
    let share = |at: &usize| plan.runs[*at].shares.map_or(0.0, |shares| shares.multiply_adds);
    Some(Ideal {
        graphs: graphs.len(),
        ms: 1e3 * mean.all,
        reached: Ratio::of(&mean, own),
        multiply_adds: run.ideals.iter().map(share).sum::<f64>() / graphs.len() as f64,
    })
}

impl Line {
    /// The artifact's folder.
    fn name(&self) -> &str {
        let path = Path::new(&self.artifact);
        path.file_name().and_then(|name| name.to_str()).unwrap_or(&self.artifact)
    }

    /// Whose decisions, in a word.
    fn decided(&self) -> String {
        let mut text = String::new();
        match (self.decisions, self.force_skip) {
            (Decisions::Drawn, Some(percent)) => {
                // Writing to a string does not fail.
                let _ = write!(text, "drawn {percent} %");
            }
            (Decisions::Fixed, Some(percent)) => {
                let _ = write!(text, "fixed {percent} %");
            }
            (Decisions::Own, _) => text.push_str("own"),
            (Decisions::Unknown, _) => text.push('?'),
            _ => text.push('-'),
        }
        text
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        table::write(self, f)
    }
}

#[cfg(test)]
mod tests;
