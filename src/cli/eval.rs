//! `eval`: perplexity of a checkpoint in candle, or of an artifact under ONNX Runtime.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use skipgpt_export::decoder::Decoder;
use skipgpt_export::eval;
use skipgpt_export::text::Tokenizer;

use super::{CheckpointArguments, ReportArguments, RuntimeArguments, Verdict, screen, sources};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The artifact to measure; or name a checkpoint with --model
    artifact: Option<PathBuf>,
    #[command(flatten)]
    checkpoint: CheckpointArguments,
    #[command(flatten)]
    runtime: RuntimeArguments,
    /// Plain text to predict, one or more files
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    perplexity: Vec<PathBuf>,
    /// Tokens in a window; each is predicted on its own
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    window: usize,
    /// Tokens from one window's start to the next one's [default: the window]
    #[arg(long, value_name = "TOKENS")]
    stride: Option<usize>,
    /// Use only the first windows
    #[arg(long, value_name = "WINDOWS")]
    limit: Option<usize>,
    #[command(flatten)]
    report: ReportArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Verdict> {
    match (&arguments.artifact, &arguments.checkpoint.model) {
        (Some(directory), None) => {
            let artifact = sources::artifact(directory)?;
            let tokenizer = Tokenizer::open(directory)?;
            let mut decoder = sources::watched(&artifact, &arguments.runtime)?;
            measure(arguments, &tokenizer, &mut decoder)
        }
        (None, Some(_)) => {
            let checkpoint = sources::checkpoint(&arguments.checkpoint)?;
            let tokenizer = Tokenizer::open(&checkpoint.directory)?;
            let mut decoder = sources::reference(&checkpoint)?;
            measure(arguments, &tokenizer, &mut decoder)
        }
        _ => bail!("eval takes either an artifact or --model DIR"),
    }
}

fn measure<D: Decoder>(
    arguments: &Arguments,
    tokenizer: &Tokenizer,
    decoder: &mut D,
) -> Result<Verdict> {
    let tokens = sources::tokens(tokenizer, &arguments.perplexity)?;
    let options = eval::Options {
        window: arguments.window,
        stride: arguments.stride,
        limit: arguments.limit,
    };
    let bar = screen::count("predicting");
    let report = eval::perplexity(decoder, &tokens, options, |progress| {
        bar.set_length(progress.windows as u64);
        bar.set_position(progress.done as u64);
        bar.set_message(format!("perplexity {:.2}", progress.perplexity));
    })?;
    bar.finish_and_clear();
    screen::report(&report, &arguments.report)?;
    Ok(Verdict::Holds)
}
