//! `profile`: how often each module is kept, on text.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use skipgpt_export::text::Tokenizer;
use skipgpt_export::world::World;
use skipgpt_export::{eval, profile};

use super::{CheckpointArguments, Device, Verdict, screen, sources};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    checkpoint: CheckpointArguments,
    /// Where the checkpoint runs
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Plain text, one or more files
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// The profile to write
    #[arg(short, long, value_name = "FILE", default_value = "profile.json")]
    output: PathBuf,
    /// Tokens in a window
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    window: usize,
    /// Use only the first windows
    #[arg(long, value_name = "WINDOWS")]
    limit: Option<usize>,
    /// Replace an existing profile
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(arguments: &Arguments, world: &dyn World) -> Result<Verdict> {
    if world.leads() && arguments.output.exists() && !arguments.force {
        bail!("{}: already exists; --force replaces it", arguments.output.display());
    }
    let checkpoint = sources::checkpoint(&arguments.checkpoint)?;
    let tokenizer = Tokenizer::open(&checkpoint.directory)?;
    let tokens = sources::tokens(&tokenizer, &arguments.text)?;
    let mut reference = sources::reference(&checkpoint.model, &checkpoint, arguments.device)?;
    let options = eval::Options { window: arguments.window, stride: None, limit: arguments.limit };
    let bar = screen::count("profiling");
    let config = &checkpoint.model.config;
    let progress = |done, windows| {
        bar.set_length(windows as u64);
        bar.set_position(done as u64);
    };
    let profile = profile::measure(&mut reference, config, &tokens, options, world, progress)?;
    bar.finish_and_clear();
    if world.leads() {
        screen::write_json(&arguments.output, &profile)?;
        screen::line(&profile)?;
    }
    Ok(Verdict::Holds)
}
