//! `verify`: does the artifact compute what the checkpoint it was made from computes?

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use skipgpt_export::readback;
use skipgpt_export::text::Tokenizer;
use skipgpt_export::tolerance::Tolerances;
use skipgpt_export::verify;
use skipgpt_export::watch::Watched;

use super::{CheckpointArguments, ReportArguments, RuntimeArguments, Verdict, screen, sources};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The artifact to verify
    artifact: PathBuf,
    #[command(flatten)]
    checkpoint: CheckpointArguments,
    #[command(flatten)]
    runtime: RuntimeArguments,
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
    #[command(flatten)]
    report: ReportArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Verdict> {
    let artifact = sources::artifact(&arguments.artifact)?;
    let checkpoint = sources::checkpoint(&arguments.checkpoint)?;
    let scheme = artifact.manifest.plan.quantization.map(|quantization| quantization.scheme);
    let dtype = artifact.manifest.options.dtype;
    let runtime = sources::runtime(&arguments.runtime, &artifact)?;
    let session = sources::session_options(&arguments.runtime);
    let mut watched = Watched::open(&artifact, &runtime, &session)?;

    // The reference runs what was imported, adapter unmerged; only removals are the plan's, and the
    // values of quantised weights the artifact's.
    let (checkpoint, nearness) = readback::read(&artifact, &checkpoint)?;
    let mut reference = sources::reference(&checkpoint)?;

    let prompts = match &arguments.prompts {
        Some(path) => {
            let tokenizer = Tokenizer::open(&arguments.artifact)?;
            let prompts = sources::prompts(path)?;
            prompts.iter().map(|prompt| tokenizer.encode(prompt, true)).collect::<Result<_, _>>()?
        }
        None => Vec::new(),
    };
    let options = verify::Options {
        seed: arguments.seed,
        decode_steps: arguments.decode_steps,
        greedy_tokens: arguments.greedy_tokens,
        tolerances: Tolerances::with_scheme(dtype, scheme.as_ref()),
        ..verify::Options::new(session.provider.name(), &runtime.found().version.to_string(), dtype)
    };
    let bar = screen::count("verifying");
    let mut report =
        verify::run(&mut reference, &mut watched, &prompts, &options, &mut |progress| {
            bar.set_length(progress.steps as u64);
            bar.set_position(progress.step as u64);
            bar.set_message(progress.case.to_owned());
        })?;
    bar.finish_and_clear();
    report.compare_weights(nearness);
    screen::report(&report, &arguments.report)?;
    Ok(if report.passed { Verdict::Holds } else { Verdict::Fails })
}
