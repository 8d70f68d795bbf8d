//! `golden`: records what an artifact gives, and checks later runs against the record.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use skipgpt_export::golden::{self, CheckOptions, Environment, Golden, Mode, RecordOptions};
use skipgpt_export::text::Tokenizer;
use skipgpt_export::tolerance::Tolerances;
use skipgpt_export::watch::Watched;
use skipgpt_passes::ir::DType;

use super::{ReportArguments, RuntimeArguments, Verdict, screen, sources};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write an artifact's tokens, probabilities and decisions to a file
    Record(RecordArguments),
    /// Compare an artifact with such a file
    Check(CheckArguments),
}

#[derive(Debug, Args)]
pub(crate) struct RecordArguments {
    /// The artifact to run
    artifact: PathBuf,
    /// Prompts, one a line
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,
    /// The golden file to write
    #[arg(short, long, value_name = "FILE", value_parser = super::destination())]
    output: PathBuf,
    /// Tokens to generate after each prompt
    #[arg(long, value_name = "N", default_value_t = 32)]
    max_new_tokens: usize,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    /// The artifact to run
    artifact: PathBuf,
    /// The golden file
    golden: PathBuf,
    /// Ties too must come out as recorded
    #[arg(long)]
    exact: bool,
    /// Write the result as JUnit XML, one test case a prompt
    #[arg(long, value_name = "FILE", value_parser = super::destination())]
    junit: Option<PathBuf>,
    #[command(flatten)]
    runtime: RuntimeArguments,
    #[command(flatten)]
    report: ReportArguments,
}

pub(crate) fn run(command: &Command) -> Result<Verdict> {
    match command {
        Command::Record(arguments) => record(arguments),
        Command::Check(arguments) => check(arguments),
    }
}

fn record(arguments: &RecordArguments) -> Result<Verdict> {
    screen::replaceable(&arguments.output, arguments.force)?;
    let tokenizer = Tokenizer::open(&arguments.artifact)?;
    let prompts = sources::prompts(&arguments.prompts)?
        .into_iter()
        .map(|text| tokenizer.encode(&text, true).map(|tokens| (text, tokens)))
        .collect::<Result<Vec<_>, _>>()?;
    let opened = Opened::new(&arguments.artifact, &arguments.runtime)?;
    let options = RecordOptions {
        tokens: arguments.max_new_tokens,
        tolerances: opened.tolerances,
        ..RecordOptions::new(opened.artifact, opened.environment, opened.dtype)
    };
    let bar = screen::count("recording");
    bar.set_length(prompts.len() as u64);
    let mut decoder = opened.decoder;
    let golden = golden::record(&mut decoder, &prompts, &options, &mut |done| {
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    screen::write_file(&arguments.output, |file| golden.write(file))?;
    let count = golden.prompts.len();
    screen::line(format_args!("{}: {count} prompts recorded", arguments.output.display()))?;
    Ok(Verdict::Holds)
}

fn check(arguments: &CheckArguments) -> Result<Verdict> {
    let golden = Golden::read(&arguments.golden)
        .with_context(|| format!("{}: cannot be used", arguments.golden.display()))?;
    let opened = Opened::new(&arguments.artifact, &arguments.runtime)?;
    let tokenizer = Tokenizer::open(&arguments.artifact)?;
    let texts = golden.prompts.iter().map(|prompt| prompt.text.as_str());
    let tokenized = texts.map(|text| tokenizer.encode(text, true)).collect::<Result<_, _>>()?;
    let options = CheckOptions {
        mode: if arguments.exact { Mode::Exact } else { Mode::Tolerant },
        tolerances: opened.tolerances,
        artifact: opened.artifact,
        environment: opened.environment,
        tokenized: Some(tokenized),
    };
    let bar = screen::count("checking");
    bar.set_length(golden.prompts.len() as u64);
    let mut decoder = opened.decoder;
    let report = golden::check(&mut decoder, &golden, &options, &mut |done| {
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    screen::report(&report, &arguments.report)?;
    if let Some(path) = &arguments.junit {
        screen::write_file(path, |file| golden::junit(&report, file))?;
    }
    Ok(if report.passed { Verdict::Holds } else { Verdict::Fails })
}

/// An artifact that runs, and what a record says about it.
struct Opened {
    decoder: Watched,
    artifact: golden::Artifact,
    environment: Environment,
    dtype: DType,
    tolerances: Tolerances,
}

impl Opened {
    fn new(directory: &Path, arguments: &RuntimeArguments) -> Result<Self> {
        let artifact = sources::artifact(directory)?;
        let runtime = sources::runtime(arguments, &artifact)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = arguments.threads.unwrap_or(cores);
        let mut options = sources::session_options(arguments);
        options.threads = Some(threads);
        let decoder = Watched::open(&artifact, &runtime, &options)?;
        let dtype = artifact.manifest.options.dtype;
        let scheme = artifact.manifest.plan.quantization.map(|quantization| quantization.scheme);
        let outputs = artifact.manifest.outputs.iter();
        let sha256 = outputs.map(|file| (file.name.clone(), file.sha256.clone())).collect();
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self {
            decoder,
            artifact: golden::Artifact { name, sha256 },
            environment: Environment {
                onnxruntime: runtime.found().version.to_string(),
                provider: options.provider.name().to_owned(),
                threads,
            },
            dtype,
            tolerances: Tolerances::with_scheme(dtype, scheme.as_ref()),
        })
    }
}
