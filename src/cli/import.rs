//! `import`: a GGUF file or a training checkpoint becomes a checkpoint directory.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use skipgpt_export::import;
use skipgpt_passes::ir::DType;

use super::{ReportArguments, Verdict, screen};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// What to read: MODEL.gguf, or model.pth of a training run
    input: PathBuf,
    /// The directory to create
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// config.json of the model, for a .pth, which carries none
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How weights are stored
    #[arg(long, value_parser = dtype, default_value = "f32")]
    dtype: DType,
    /// Replace an earlier import
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    report: ReportArguments,
}

pub(crate) fn dtype(text: &str) -> Result<DType, String> {
    match text {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        _ => Err("expected f32, f16 or bf16".into()),
    }
}

pub(crate) fn run(arguments: Arguments) -> Result<Verdict> {
    let options = import::Options {
        force: arguments.force,
        dtype: arguments.dtype,
        config: arguments.config,
        ..import::Options::new(arguments.input, arguments.output)
    };
    let bar = screen::bytes("importing");
    let report = import::import(&options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        screen::go_on()
    })?;
    bar.finish_and_clear();
    screen::report(&report, &arguments.report)?;
    Ok(Verdict::Holds)
}
