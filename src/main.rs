//! Parse, run, exit code.
//!
//! 0: it holds. 1: it was measured and does not. 2: it could not be done.

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod allocator;
mod cli;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command, Verdict};

/// What keeps ONNX Runtime from writing down what it runs and where, and sending it to its maker.
const TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";

fn main() -> ExitCode {
    if std::env::var_os(TELEMETRY).is_none() {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var(TELEMETRY, "1") };
    }
    let filter = EnvFilter::try_from_env("SKIPGPT_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(Cli::parse()) {
        Ok(Verdict::Holds) => ExitCode::SUCCESS,
        Ok(Verdict::Fails) => ExitCode::from(1),
        Ok(Verdict::Stopped) => ExitCode::from(2),
        Err(error) => {
            say(&error);
            ExitCode::from(2)
        }
    }
}

fn say(error: &anyhow::Error) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr().lock(), "error: {}", message(error));
}

/// The chain of causes on one line, those left out that a message before them has already.
fn message(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| {
        if text.is_empty() {
            cause
        } else if text.contains(&cause) {
            text
        } else {
            format!("{text}: {cause}")
        }
    })
}

fn run(cli: Cli) -> anyhow::Result<Verdict> {
    if cli.command.stops_itself() {
        cli::screen::catch_interrupts()?;
    }
    cli::ranks::run(cli.command, say, |command, world| match command {
        Command::Import(arguments) => cli::import::run(arguments),
        Command::Train(command) => cli::train::run(&command, world),
        Command::Profile(arguments) => cli::profile::run(&arguments, world),
        Command::Calibrate(arguments) => cli::calibrate::run(&arguments),
        Command::Export(arguments) => cli::export::run(&arguments),
        Command::Verify(arguments) => cli::verify::run(&arguments),
        Command::Golden(command) => cli::golden::run(&command),
        Command::Generate(arguments) => cli::generate::run(&arguments),
        Command::Eval(arguments) => cli::eval::run(&arguments, world),
        Command::Bench(arguments) => cli::bench::run(&arguments),
        Command::Inspect(arguments) => cli::inspect::run(&arguments),
        Command::Doctor(arguments) => cli::doctor::run(&arguments),
    })
}
