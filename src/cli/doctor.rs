//! `doctor`: what is installed, what is missing, what to type.

use anyhow::Result;
use clap::Args;
use skipgpt_export::doctor;
use std::path::PathBuf;

use super::{ReportArguments, Verdict, screen};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// ONNX Runtime: the shared library, or a directory that holds it
    #[arg(long, value_name = "PATH")]
    onnxruntime: Option<PathBuf>,
    #[command(flatten)]
    report: ReportArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Verdict> {
    let report = doctor::examine(arguments.onnxruntime.as_deref());
    screen::report(&report, &arguments.report)?;
    Ok(if report.is_healthy() { Verdict::Holds } else { Verdict::Fails })
}
