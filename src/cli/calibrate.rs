//! `calibrate`: what the inputs of every projection weigh, on text.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use skipgpt_export::device::Compute;
use skipgpt_export::importance;
use skipgpt_export::model::{self, Reference};
use skipgpt_passes::validate;

use super::{ReadArguments, Verdict, screen, sources};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    read: ReadArguments,
    /// The file to write
    #[arg(short, long, value_name = "FILE", value_parser = super::destination(), default_value = "importance.safetensors")]
    output: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Verdict> {
    let output = &arguments.output;
    screen::replaceable(output, arguments.read.force)?;
    let (checkpoint, tokens) = sources::read(&arguments.read)?;
    let ears = Arc::new(importance::Ears::default());
    let options = model::Options {
        device: Compute::from(arguments.read.device).open()?,
        ears: Some(ears.clone()),
        ..Default::default()
    };
    let model = validate(&checkpoint.model)?;
    let mut reference = Reference::load_with(model, &checkpoint.sources, options)?;
    let options = arguments.read.windows();
    let bar = screen::count("hearing");
    let progress = |done, windows| {
        bar.set_length(windows as u64);
        bar.set_position(done as u64);
    };
    let found = importance::measure(&mut reference, &ears, &tokens, options, progress)?;
    bar.finish_and_clear();
    let bytes = found.to_bytes()?;
    screen::write_file(output, |file| std::io::Write::write_all(file, &bytes))?;
    let (projections, tokens) = (found.projections(), found.tokens());
    screen::line(format_args!(
        "{}: inputs of {projections} projections over {tokens} tokens",
        output.display()
    ))?;
    Ok(Verdict::Holds)
}
