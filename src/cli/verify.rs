//! `verify`: does the artifact compute what the checkpoint it was made from computes?

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use skipgpt_export::artifact::Artifact;
use skipgpt_export::checkpoint::Checkpoint;
use skipgpt_export::model::Reference;
use skipgpt_export::quality::{self, Quality};
use skipgpt_export::readback;
use skipgpt_export::runtime::session;
use skipgpt_export::text::Tokenizer;
use skipgpt_export::tolerance::Tolerances;
use skipgpt_export::verify;
use skipgpt_export::watch::Watched;
use skipgpt_passes::prune_modules;

use super::{
    CheckpointArguments, Device, ReportArguments, RuntimeArguments, Verdict, screen, sources,
};

/// Tokens of each text that an artifact writes to be compared on.
const OWN_TEXT: usize = 63;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The artifact to verify
    artifact: PathBuf,
    #[command(flatten)]
    checkpoint: CheckpointArguments,
    #[command(flatten)]
    runtime: RuntimeArguments,
    /// Where the checkpoint runs
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Prompts to compare on, one a line, in place of drawn tokens
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Which tokens are drawn where no prompts are given
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Steps of one token on the artifact's own cache
    #[arg(long, value_name = "N", default_value_t = 32)]
    decode_steps: usize,
    /// Tokens each side writes on its own
    #[arg(long, value_name = "N", default_value_t = 64)]
    greedy_tokens: usize,
    /// Also measure on this text what the precision costs, against the checkpoint in f32
    #[arg(long, value_name = "FILE", num_args = 1..)]
    against_f32: Vec<PathBuf>,
    /// Tokens in a window of that text
    #[arg(long, value_name = "TOKENS", default_value_t = 512, requires = "against_f32")]
    window: usize,
    /// Windows of that text
    #[arg(long, value_name = "WINDOWS", default_value_t = 16, requires = "against_f32")]
    limit: usize,
    #[command(flatten)]
    report: ReportArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Verdict> {
    let artifact = sources::artifact(&arguments.artifact)?;
    let checkpoint = sources::checkpoint(&arguments.checkpoint)?;
    all_named(&artifact, &checkpoint)?;
    let prompts = match &arguments.prompts {
        Some(path) => {
            let prompts = sources::prompts(path)?;
            let tokenizer = Tokenizer::open(&arguments.artifact)?;
            prompts.iter().map(|prompt| tokenizer.encode(prompt, true)).collect::<Result<_, _>>()?
        }
        None => Vec::new(),
    };
    let mut report = compare(arguments, &artifact, &checkpoint, &prompts)?;
    if !arguments.against_f32.is_empty() {
        report.quality = Some(cost(arguments, &artifact, &checkpoint)?);
    }
    screen::report(&report, &arguments.report)?;
    Ok(if report.passed { Verdict::Holds } else { Verdict::Fails })
}

/// That what the artifact was made with is named: without it every value would differ. Of an adapter that is not
/// only said: the checkpoint may be the one it is merged into.
fn all_named(artifact: &Artifact, checkpoint: &Checkpoint) -> Result<()> {
    let manifest = &artifact.manifest;
    let routed = checkpoint.model.routed_modules().next().is_some();
    let dense = manifest.plan.removed.is_empty() && manifest.plan.always.is_empty();
    let directory = artifact.directory.display();
    match (manifest.routing.routed.is_empty(), routed) {
        (false, false) => bail!("{directory}: was made with routers; name them with --router"),
        (true, true) if dense => bail!("{directory}: was made without routers; leave --router out"),
        _ => {}
    }
    let is_adapter =
        |name: &str| name.ends_with("adapter_config.json") || name.ends_with("lora.pth");
    let recorded = manifest.inputs.iter().find(|record| is_adapter(&record.name));
    let given = checkpoint.files.iter().any(|path| is_adapter(&path.to_string_lossy()));
    if let Some(record) = recorded.filter(|_| !given) {
        tracing::warn!(
            "{directory}: was made with {}; name the adapter with --adapter, unless it is merged into the checkpoint",
            record.name
        );
    }
    Ok(())
}

/// The artifact against the reference of the same weights.
fn compare(
    arguments: &Arguments,
    artifact: &Artifact,
    checkpoint: &Checkpoint,
    prompts: &[Vec<i64>],
) -> Result<verify::Report> {
    let runtime = sources::runtime(&arguments.runtime, artifact)?;
    let session =
        session::Options { one_token_apart: true, ..sources::session_options(&arguments.runtime) };
    let scheme = artifact.manifest.plan.quantization.map(|quantization| quantization.scheme);
    let rounds = scheme.is_some_and(|scheme| scheme.accuracy.rounds());
    let open = if rounds { Watched::open_exact } else { Watched::open };
    let mut watched = open(artifact, &runtime, &session)?;
    // The reference runs what was imported, adapter unmerged; only removals are the plan's, and the
    // values of quantised weights the artifact's.
    let (read, nearness) = readback::read(artifact, checkpoint)?;
    let mut reference = sources::reference(&read.model, &read, arguments.device)?;

    let dtype = artifact.manifest.options.dtype;
    let options = verify::Options {
        seed: arguments.seed,
        decode_steps: arguments.decode_steps,
        greedy_tokens: arguments.greedy_tokens,
        tolerances: Tolerances::with_scheme(dtype, scheme.as_ref()),
        ..verify::Options::new(session.provider.name(), &runtime.found().version.to_string(), dtype)
    };
    let bar = screen::count("verifying");
    let mut report =
        verify::run(&mut reference, &mut watched, prompts, &options, &mut |progress| {
            bar.set_length(progress.steps as u64);
            bar.set_position(progress.step as u64);
            bar.set_message(progress.case.to_owned());
        })?;
    bar.finish_and_clear();
    report.placement = watched.placement().cloned();
    if let Some(nearness) = nearness {
        report.compare_weights(nearness);
    }
    if rounds {
        let texts = if prompts.is_empty() {
            let drawn = verify::drawn(artifact.manifest.model.vocab_size, arguments.seed);
            let starts: Vec<Vec<i64>> = drawn.iter().map(|tokens| tokens[..1].to_vec()).collect();
            quality::own_texts(&mut watched, &starts, OWN_TEXT, arguments.seed)?
        } else {
            prompts.to_vec()
        };
        drop(watched);
        let quality = measure(arguments, artifact, &mut reference, &texts)?;
        report.compare_rounding(quality);
    }
    Ok(report)
}

/// What the precision costs, on text.
fn cost(arguments: &Arguments, artifact: &Artifact, checkpoint: &Checkpoint) -> Result<Quality> {
    let tokenizer = Tokenizer::open(&arguments.artifact)?;
    let tokens = sources::tokens(&tokenizer, &arguments.against_f32)?;
    let windows = tokens.chunks_exact(arguments.window.max(1)).take(arguments.limit);
    let windows: Vec<Vec<i64>> =
        windows.map(|window| window.iter().map(|&token| token.into()).collect()).collect();
    let mut imported = checkpoint.model.clone();
    prune_modules::prune(&mut imported, &artifact.manifest.plan)?;
    let mut reference = sources::reference(&imported, checkpoint, arguments.device)?;
    measure(arguments, artifact, &mut reference, &windows)
}

fn measure(
    arguments: &Arguments,
    artifact: &Artifact,
    reference: &mut Reference,
    sequences: &[Vec<i64>],
) -> Result<Quality> {
    let mut watched = sources::watched(artifact, &arguments.runtime)?;
    let bar = screen::count("comparing");
    bar.set_length(sequences.len() as u64);
    let quality = quality::compare(reference, &mut watched, sequences, |done| {
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    Ok(quality)
}
