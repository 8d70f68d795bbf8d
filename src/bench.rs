//! Artifacts and a baseline, timed side by side under the tool's own runtime.
//!
//! A workload is timed in rounds. In every round each session is opened, warmed up, timed and closed
//! again, one after the other, and the order turns round from one round to the next: two live
//! sessions would take each other's processor time, and a machine that slows down does so for all.
//! Decode is decode: from a cache that was filled before, step by step, the cache growing; tokens
//! come from a text or are drawn, the same for everyone.
//!
//! What is skipped is counted on the very tokens that are timed, in a pass of its own, because
//! watching costs time.

use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use skipgpt_passes::ir::ModuleId;

use crate::decoder::{CacheEntry, Sequences};
use crate::onnx::{force, without};
use crate::runtime::{self, Runtime, session};
use crate::{artifact, watch};

mod draws;
mod foreign;
mod measure;
pub mod memory;
mod plan;
pub mod report;
mod shares;
mod stats;
mod subject;
mod workload;

pub use draws::Draws;
pub use measure::Caches;
pub use report::Report;
pub use shares::Shares;
pub use stats::{Ratio, Spread};
pub use subject::Source;
pub use workload::{Short, Steps, Tokens, Workload};

use plan::{Ideals, Plan};
use shares::Facts;
use subject::Form;
use workload::Script;

/// How things are timed.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Rounds; at least 1.
    pub rounds: usize,
    /// Steps in a round; `decode` and `prefill` at least 1.
    pub steps: Steps,
    /// Shares of decisions to force, 0 to 1; each is a line of its own beside the artifact's own
    /// decisions.
    pub force_skip: Vec<f64>,
    /// Whether each of them is also a line with the same modules skipped by every token.
    pub force_fixed: bool,
    /// Static graphs per line to compare with; 0 for none. Needs a dense baseline.
    pub ideals: usize,
    /// Of drawn decisions and removals.
    pub seed: u64,
    /// How caches are held.
    pub caches: Caches,
    /// How sessions run.
    pub session: session::Options,
}

/// What is timed.
#[derive(Debug, Clone)]
pub struct Request {
    /// What everything is compared with.
    pub baseline: Option<Source>,
    /// What is compared; at least one.
    pub artifacts: Vec<Source>,
    /// What they run.
    pub workloads: Vec<Workload>,
    /// On which tokens.
    pub tokens: Tokens,
}

/// How far a benchmark is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The workload that is timed.
    pub workload: Workload,
    /// Sessions done of it.
    pub done: usize,
    /// Sessions of it in all rounds.
    pub sessions: usize,
}

/// Where a step failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The source.
    pub directory: PathBuf,
    /// What was done.
    pub doing: &'static str,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.directory.display(), self.doing)
    }
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A number that leaves nothing to measure.
    #[error("{name} is {value}; expected {expected}")]
    Option {
        /// The option.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it should be.
        expected: &'static str,
    },
    /// A batch for an artifact that takes none.
    #[error(
        "{workload}: {} takes one sequence at a time; export it with --sequences any, or leave the workload out",
        artifact.display()
    )]
    OneSequence {
        /// What was to be run.
        workload: Workload,
        /// Its directory.
        artifact: PathBuf,
    },
    /// The text does not reach.
    #[error(transparent)]
    Short(#[from] Short),
    /// An artifact is not what was exported.
    #[error(transparent)]
    Artifact(#[from] artifact::Error),
    /// ONNX Runtime does not load a graph.
    #[error(transparent)]
    Session(#[from] session::Error),
    /// Decisions could not be watched.
    #[error(transparent)]
    Watch(#[from] watch::Error),
    /// Decisions cannot be forced.
    #[error(transparent)]
    Force(#[from] force::Error),
    /// A module cannot be removed.
    #[error(transparent)]
    Without(#[from] without::Error),
    /// A step failed.
    #[error("{place}: {source}")]
    Run {
        /// Where.
        place: Place,
        /// What went wrong.
        source: runtime::decoder::Error,
    },
    /// Decisions are to be forced that are not there.
    #[error("{}: has no routers whose decisions could be forced; leave out --force-skip", .0.display())]
    NothingToForce(PathBuf),
    /// Ideals are static forms of a dense artifact of this tool.
    #[error(
        "--ideal is made from the baseline, which must be an artifact without routers and removals \
         that this tool exported: name one with --baseline"
    )]
    NoDenseBaseline,
    /// A static form of a pruned model is another one.
    #[error("{}: has removed modules, which --ideal does not compare with", .0.display())]
    IdealOfPruned(PathBuf),
    /// The caller said stop.
    #[error("interrupted; nothing was measured to the end")]
    Interrupted,
}

/// A source with what is known of it before it is timed.
struct Prepared {
    facts: Option<Facts>,
    prefix: Vec<CacheEntry>,
}

/// Times everything.
///
/// # Errors
///
/// Every variant of [`Error`].
pub fn run(
    request: &Request,
    options: &Options,
    runtime: &Runtime,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Report, Error> {
    check(request, options)?;
    warn_of_other_logits(request);
    let sources: Vec<Source> = request.baseline.iter().chain(&request.artifacts).cloned().collect();
    let scripts = request
        .workloads
        .iter()
        .map(|workload| Script::new(*workload, &request.tokens, options.steps))
        .collect::<Result<Vec<_>, _>>()?;
    let longest = scripts.iter().map(|script| script.start).max().unwrap_or_default();
    let mut prepared = Vec::with_capacity(sources.len());
    for source in &sources {
        let prefix = match longest {
            0 => Vec::new(),
            length => source.prefix(&request.tokens, length, runtime, &options.session)?,
        };
        prepared.push(Prepared { facts: source.facts()?, prefix });
    }
    let bench = Bench { request, options, runtime, sources: &sources, prepared: &prepared };
    let mut lines = Vec::new();
    for (workload, script) in request.workloads.iter().zip(&scripts) {
        let mut plan = bench.plan(script)?;
        bench.time(&mut plan, *workload, script, progress)?;
        lines.extend(report::lines(*workload, &plan, &sources, request.baseline.is_some()));
    }
    Ok(Report::new(request, options, &runtime.found().version.to_string(), lines))
}

fn check(request: &Request, options: &Options) -> Result<(), Error> {
    let steps = options.steps;
    let counts = [
        ("--rounds", options.rounds),
        ("--steps", steps.decode),
        ("--prefills", steps.prefill),
        ("the number of workloads", request.workloads.len()),
    ];
    if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
        return Err(Error::Option { name, value: 0.0, expected: "at least 1" });
    }
    if let Some(share) = options.force_skip.iter().find(|share| !(0.0..=1.0).contains(*share)) {
        let (name, expected) = ("--force-skip", "0 to 100 percent");
        return Err(Error::Option { name, value: 100.0 * share, expected });
    }
    let batch = request.workloads.iter().find(|workload| workload.sequences() > 1);
    let one = |source: &&Source| {
        let artifact = source.artifact.as_ref();
        artifact.is_some_and(|artifact| artifact.manifest.options.sequences == Sequences::One)
    };
    if let Some(&workload) = batch
        && let Some(source) = request.baseline.iter().chain(&request.artifacts).find(one)
    {
        return Err(Error::OneSequence { workload, artifact: source.directory.clone() });
    }
    let routed = |source: &Source| !source.routed().is_empty();
    if !options.force_skip.is_empty()
        && !request.artifacts.iter().any(routed)
        && let Some(source) = request.artifacts.first()
    {
        return Err(Error::NothingToForce(source.directory.clone()));
    }
    if options.ideals > 0 && !request.baseline.as_ref().is_some_and(Source::is_dense) {
        return Err(Error::NoDenseBaseline);
    }
    Ok(())
}

/// Says whose head is computed for other positions than the baseline's: what is timed differs by that
/// too.
fn warn_of_other_logits(request: &Request) {
    let given = |source: &Source| source.artifact.as_ref().map(|a| a.manifest.options.logits);
    let Some((baseline, expected)) =
        request.baseline.as_ref().and_then(|source| Some((source, given(source)?)))
    else {
        return;
    };
    for source in &request.artifacts {
        if let Some(found) = given(source).filter(|found| *found != expected) {
            tracing::warn!(
                "{} was exported with --logits {found}, the baseline {} with --logits {expected}: in \
                 prefill their times differ by the head, too",
                source.directory.display(),
                baseline.directory.display()
            );
        }
    }
}

/// Everything a workload is timed with.
struct Bench<'a> {
    request: &'a Request,
    options: &'a Options,
    runtime: &'a Runtime,
    sources: &'a [Source],
    prepared: &'a [Prepared],
}

impl Bench<'_> {
    fn plan(&self, script: &Script) -> Result<Plan, Error> {
        let Options { session, seed, force_skip, force_fixed, ideals, .. } = self.options;
        let mut plan = Plan::default();
        for (number, (source, known)) in self.sources.iter().zip(self.prepared).enumerate() {
            let facts = known.facts.as_ref().filter(|_| !source.routed().is_empty());
            let shares = match facts {
                None => None,
                Some(facts) => {
                    let decided = source.decisions(script, &known.prefix, self.runtime, session)?;
                    Some(facts.shares(&decided))
                }
            };
            plan.alone(number, Form::AsItIs, shares);
            let is_baseline = number == 0 && self.request.baseline.is_some();
            if !is_baseline && !force_skip.is_empty() && !source.routed().is_empty() {
                let forms: &[bool] = if *force_fixed { &[false, true] } else { &[false] };
                let draws: Vec<Draws> = force_skip
                    .iter()
                    .flat_map(|&skip| forms.iter().map(move |&fixed| (skip, fixed)))
                    .map(|(skip, fixed)| Draws { seed: *seed, skip, fixed })
                    .collect();
                plan.forced((source, number), facts, script, &draws);
            }
        }
        if *ideals > 0
            && let Some(facts) = self.prepared.first().and_then(|known| known.facts.as_ref())
        {
            let ideals = Ideals { seeds: *ideals, seed: *seed };
            plan.idealise(self.sources, facts, script, ideals)?;
        }
        Ok(plan)
    }

    fn time(
        &self,
        plan: &mut Plan,
        workload: Workload,
        script: &Script,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let options = script.session(&self.options.session);
        let Plan { runs, sessions } = plan;
        let mut done = 0;
        for round in 0..self.options.rounds {
            for at in measure::order(round, sessions.len()) {
                let total = self.options.rounds * sessions.len();
                if progress(Progress { workload, done, sessions: total }).is_break() {
                    return Err(Error::Interrupted);
                }
                let planned = &sessions[at];
                let source = &self.sources[planned.source];
                let modules: &[ModuleId] = source.routed();
                let start = Instant::now();
                let mut opened = source.load(&planned.form, self.runtime, &options)?;
                let loading = start.elapsed().as_secs_f64();
                for turn in measure::order(round, planned.runs.len()) {
                    let run = &mut runs[planned.runs[turn]];
                    let draws = run.draws;
                    let decide = |input: &_| draws.map(|draws| draws.routing(modules, input));
                    let prefix = &self.prepared[planned.source].prefix;
                    let seconds =
                        measure::run(&mut opened, script, prefix, self.options.caches, &decide)
                            .map_err(|error| source.failed("timing", error))?;
                    run.seconds.push(seconds);
                    run.loading.push(vec![loading]);
                }
                done += 1;
            }
        }
        Ok(())
    }
}
