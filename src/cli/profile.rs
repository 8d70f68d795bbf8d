//! `profile`: how often each module is kept, on text.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use skipgpt_export::profile;
use skipgpt_export::world::World;

use super::{ReadArguments, Verdict, screen, sources};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    read: ReadArguments,
    /// The profile to write
    #[arg(short, long, value_name = "FILE", value_parser = super::destination(), default_value = "profile.json")]
    output: PathBuf,
}

pub(crate) fn run(arguments: &Arguments, world: &dyn World) -> Result<Verdict> {
    if world.leads() {
        screen::replaceable(&arguments.output, arguments.read.force)?;
    }
    let (checkpoint, tokens) = sources::read(&arguments.read)?;
    let mut reference = sources::reference(&checkpoint.model, &checkpoint, arguments.read.device)?;
    let options = arguments.read.windows();
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
