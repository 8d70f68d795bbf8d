//! `inspect`: what is in an artifact or a checkpoint.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use skipgpt_export::artifact;
use skipgpt_export::inspect::Report;

use super::{CheckpointArguments, ReportArguments, Verdict, screen, sources};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The artifact; or name a checkpoint with --model
    artifact: Option<PathBuf>,
    #[command(flatten)]
    checkpoint: CheckpointArguments,
    /// Print the checkpoint's IR, as imported
    #[arg(long, conflicts_with_all = ["artifact", "json"])]
    ir: bool,
    #[command(flatten)]
    report: ReportArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Verdict> {
    match (&arguments.artifact, &arguments.checkpoint.model) {
        (Some(directory), None) => {
            let report = Report::of_artifact(&artifact::open(directory)?);
            screen::report(&report, &arguments.report)?;
        }
        (None, Some(_)) => {
            let checkpoint = sources::checkpoint(&arguments.checkpoint)?;
            if arguments.ir {
                screen::print(&checkpoint.model.to_string())?;
            } else {
                let report = Report::of_model(&checkpoint.model, None, &[]);
                screen::report(&report, &arguments.report)?;
            }
        }
        _ => bail!("inspect takes either an artifact or --model DIR"),
    }
    Ok(Verdict::Holds)
}
