//! `bench`: how long artifacts take beside a baseline, and how much of their work they skip.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;
use skipgpt_export::bench::{self, Caches, Source, Steps, Tokens, Workload, memory};
use skipgpt_export::onnx;
use skipgpt_export::runtime::{Runtime, Version, session};
use skipgpt_export::text::Tokenizer;

use super::{Provider, ReportArguments, RuntimeArguments, Verdict, screen, sources};

#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub(crate) struct Arguments {
    /// What is timed: artifacts, or directories with another exporter's model.onnx
    #[arg(required = true, value_name = "ARTIFACT")]
    artifacts: Vec<PathBuf>,
    /// What they are compared with
    #[arg(long, value_name = "ARTIFACT")]
    baseline: Option<PathBuf>,
    /// decode:SEQUENCES:CACHED, prefill:TOKENS or mixed:PROMPT:NEW
    /// [default: decode:1:128,prefill:256 and, with --text, mixed:256:128]
    #[arg(long = "workload", value_name = "WORKLOAD", value_delimiter = ',')]
    workloads: Vec<Workload>,
    /// Every workload: 1, 4 and 8 sequences, up to 4,096 cached, prefill up to 1,024
    #[arg(long, conflicts_with = "workloads")]
    full: bool,
    /// Run these texts' tokens, in place of drawn ones
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Rounds; in each, every session is opened, timed and closed once
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,
    /// Decode steps timed in a round
    #[arg(long, value_name = "N", default_value_t = 16)]
    steps: usize,
    /// Prefills timed in a round
    #[arg(long, value_name = "N", default_value_t = 3)]
    prefills: usize,
    /// Decode steps before those that are timed
    #[arg(long, value_name = "N", default_value_t = 4)]
    warmup: usize,
    /// Also time drawn decisions that skip these percentages
    #[arg(long, value_name = "PERCENT", value_delimiter = ',')]
    force_skip: Vec<f64>,
    /// Time each of them also with the same modules skipped by every token
    #[arg(long, requires = "force_skip")]
    force_fixed: bool,
    /// Compare with static graphs of the baseline that do the same share of multiply-adds
    #[arg(long)]
    ideal: bool,
    /// Static graphs for each line
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    ideal_seeds: u32,
    /// Of drawn tokens, decisions and removals
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Let caches grow by copies, as in clients that hand over no buffers of their own
    #[arg(long)]
    growing_cache: bool,
    /// Run steps of one token in the session that runs all others, as clients do that have only one
    #[arg(long)]
    one_session: bool,
    /// Leave peak memory out: it takes another process for each artifact and workload
    #[arg(long)]
    no_memory: bool,
    #[command(flatten)]
    runtime: RuntimeArguments,
    #[command(flatten)]
    report: ReportArguments,
    /// Also write the report as comma-separated values
    #[arg(long, value_name = "FILE", value_parser = super::destination())]
    csv: Option<PathBuf>,
    /// Print the peak memory of this process after this workload of one artifact
    #[arg(long, value_name = "WORKLOAD", hide = true)]
    peak_memory: Option<Workload>,
}

impl Arguments {
    /// Whether this process is measured by another one.
    pub(crate) const fn is_measured(&self) -> bool {
        self.peak_memory.is_some()
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<Verdict> {
    if let Some(workload) = arguments.peak_memory {
        return print_peak(arguments, workload);
    }
    let open = |directory: &PathBuf| checked(directory.as_path());
    let baseline = arguments.baseline.as_ref().map(open).transpose()?;
    let artifacts = arguments.artifacts.iter().map(open).collect::<Result<Vec<_>>>()?;
    let all: Vec<&Source> = baseline.iter().chain(&artifacts).collect();
    let runtime = runtime(arguments, &all)?;
    let tokens = tokens(arguments, all[0], &runtime)?;
    let request = bench::Request {
        baseline: baseline.clone(),
        artifacts: artifacts.clone(),
        workloads: workloads(arguments),
        tokens,
    };
    let options = bench::Options {
        rounds: arguments.rounds,
        steps: Steps {
            decode: arguments.steps,
            prefill: arguments.prefills,
            warmup: arguments.warmup,
        },
        force_skip: arguments.force_skip.iter().map(|percent| percent / 100.0).collect(),
        force_fixed: arguments.force_fixed,
        ideals: if arguments.ideal { arguments.ideal_seeds as usize } else { 0 },
        seed: arguments.seed,
        caches: caches(arguments),
        session: session(arguments),
    };
    let bar = screen::count("timing");
    let mut report = bench::run(&request, &options, &runtime, &mut |progress| {
        bar.set_length(progress.sessions as u64);
        bar.set_position(progress.done as u64);
        bar.set_message(progress.workload.to_string());
        screen::go_on()
    })?;
    bar.finish_and_clear();
    if !arguments.no_memory {
        note_memory(arguments, &request.workloads, &all, &mut report);
    }
    screen::report(&report, &arguments.report)?;
    if let Some(path) = &arguments.csv {
        let text = report.to_csv();
        screen::write_file(path, |file| file.write_all(text.as_bytes()))?;
    }
    Ok(Verdict::Holds)
}

/// Adds what memory each artifact takes for each workload. Times are not given up for want of it.
fn note_memory(
    arguments: &Arguments,
    workloads: &[Workload],
    sources: &[&Source],
    report: &mut bench::Report,
) {
    for workload in workloads {
        for source in sources {
            if screen::go_on().is_break() {
                return;
            }
            match peak_of(arguments, &source.directory, *workload) {
                Ok(Some(bytes)) => report.note_memory(&source.directory, *workload, bytes),
                Ok(None) => {}
                Err(error) => tracing::warn!("{error:#}"),
            }
        }
    }
}

fn session(arguments: &Arguments) -> session::Options {
    let options = sources::session_options(&arguments.runtime);
    session::Options { one_token_apart: !arguments.one_session, ..options }
}

const fn caches(arguments: &Arguments) -> Caches {
    if arguments.growing_cache { Caches::Growing } else { Caches::Reserved }
}

fn workloads(arguments: &Arguments) -> Vec<Workload> {
    let text = !arguments.text.is_empty();
    match arguments.workloads.as_slice() {
        [] if arguments.full => Workload::full(text),
        [] => Workload::quick(text),
        chosen => chosen.to_vec(),
    }
}

/// A directory to be timed; an artifact's files are compared with its manifest.
fn checked(directory: &Path) -> Result<Source> {
    let source = Source::open(directory)?;
    if source.artifact.is_some() {
        sources::artifact(directory)?;
    }
    Ok(source)
}

/// ONNX Runtime, of at least the version every artifact asks for.
fn runtime(arguments: &Arguments, sources: &[&Source]) -> Result<Runtime> {
    let mut minimum: Version = onnx::MINIMUM_ONNXRUNTIME.parse()?;
    for source in sources {
        let graph = source.artifact.as_ref().and_then(|a| a.manifest.graph.as_ref());
        if let Some(graph) = graph {
            minimum = minimum.max(graph.min_onnxruntime.parse()?);
        }
    }
    Ok(Runtime::find(arguments.runtime.onnxruntime.as_deref(), minimum)?)
}

fn tokens(arguments: &Arguments, first: &Source, runtime: &Runtime) -> Result<Tokens> {
    if arguments.text.is_empty() {
        let options = sources::session_options(&arguments.runtime);
        let vocab = first.vocab_size(runtime, &options)?;
        return Ok(Tokens::Drawn { seed: arguments.seed, vocab });
    }
    let tokenizer = Tokenizer::open(&first.directory)?;
    let ids = sources::tokens(&tokenizer, &arguments.text)?;
    Ok(Tokens::Text(ids.into_iter().map(i64::from).collect()))
}

/// Peak memory of another process that runs `workload` on the artifact in `directory`.
fn peak_of(arguments: &Arguments, directory: &Path, workload: Workload) -> Result<Option<u64>> {
    let program = std::env::current_exe().context("the program's own path is not known")?;
    let mut command = Command::new(program);
    command.arg("bench").arg("--peak-memory").arg(workload.to_string());
    command.arg("--seed").arg(arguments.seed.to_string());
    let RuntimeArguments { onnxruntime, provider, threads } = &arguments.runtime;
    command.arg("--provider").arg(match provider {
        Provider::Cpu => "cpu",
        Provider::Cuda => "cuda",
    });
    if arguments.growing_cache {
        command.arg("--growing-cache");
    }
    if arguments.one_session {
        command.arg("--one-session");
    }
    if let Some(path) = onnxruntime {
        command.arg("--onnxruntime").arg(path);
    }
    if let Some(threads) = threads {
        command.arg("--threads").arg(threads.to_string());
    }
    command.arg("--").arg(directory).stdin(Stdio::null());
    let output = command.output().context("a process that measures memory does not start")?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        bail!("{}: measuring memory: {}", directory.display(), message.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse().ok())
}

/// What [`peak_of`] starts. The parent has compared the files with their hashes.
fn print_peak(arguments: &Arguments, workload: Workload) -> Result<Verdict> {
    let [directory] = arguments.artifacts.as_slice() else {
        bail!("--peak-memory takes one artifact");
    };
    let source = Source::open(directory)?;
    let runtime = runtime(arguments, &[&source])?;
    let options = session(arguments);
    // Ids of an embedding's first rows alone: any vocabulary has them.
    let tokens = Tokens::Drawn { seed: arguments.seed, vocab: 1 };
    let peak = memory::peak(&source, workload, &tokens, caches(arguments), &runtime, &options)?;
    screen::line(peak.map_or("unknown".to_owned(), |bytes| bytes.to_string()))?;
    Ok(Verdict::Holds)
}
