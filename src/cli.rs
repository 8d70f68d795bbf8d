//! What was typed, as types. Each command's meaning is in the file of its name.

pub(crate) mod bench;
pub(crate) mod calibrate;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod generate;
pub(crate) mod golden;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod precision;
pub(crate) mod profile;
pub(crate) mod ranks;
pub(crate) mod screen;
pub(crate) mod sources;
pub(crate) mod train;
pub(crate) mod verify;

use std::path::{Path, PathBuf};

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use rustix::fs::Access;
use skipgpt_export::device::Compute;
use skipgpt_export::runtime::session;

/// Compiles language models with trained SkipGPT routers to ONNX artifacts that skip the work.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Turn a GGUF file or a training checkpoint (.pth) into a Hugging Face checkpoint directory
    Import(import::Arguments),
    /// Train routers, or an adapter around them
    #[command(subcommand)]
    Train(train::Command),
    /// Measure how often each module is kept, on text
    Profile(profile::Arguments),
    /// Measure what the inputs of every projection weigh, on text, for weights in few bits
    Calibrate(calibrate::Arguments),
    /// Compile a checkpoint with its routers and adapter to an artifact
    Export(export::Arguments),
    /// Compare an artifact with the checkpoint it was made from
    Verify(verify::Arguments),
    /// Record an artifact's outputs, or check them against a record
    #[command(subcommand)]
    Golden(golden::Command),
    /// Generate text with an artifact
    Generate(generate::Arguments),
    /// Measure perplexity and multiple choice of checkpoints and artifacts, beside static pruning
    Eval(eval::Arguments),
    /// Time artifacts side by side with a baseline
    Bench(bench::Arguments),
    /// Show what is in an artifact or a checkpoint
    Inspect(inspect::Arguments),
    /// Show which ONNX Runtime is used, and what is missing
    Doctor(doctor::Arguments),
}

impl Command {
    /// Whether it asks [`screen::go_on`] at every turn, and leaves nothing behind if told to stop.
    pub(crate) const fn stops_itself(&self) -> bool {
        match self {
            Self::Import(_) | Self::Train(_) | Self::Export(_) => true,
            Self::Bench(arguments) => !arguments.is_measured(),
            _ => false,
        }
    }
}

/// A file to be written, in a directory that is there and may be written to: a result must not be lost
/// after hours for want of one. `-` and what is no file, such as a pipe, need none.
pub(crate) fn destination() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| {
        let special = path.metadata().is_ok_and(|found| !found.is_file());
        let Some(parent) = path.parent().filter(|_| !special && path != Path::new("-")) else {
            return Ok(path);
        };
        let parent = if parent == Path::new("") { Path::new(".") } else { parent };
        if !parent.is_dir() {
            return Err(format!("{} is no directory", parent.display()));
        }
        match rustix::fs::access(parent, Access::WRITE_OK) {
            Err(error) => Err(format!("{}: {error}", parent.display())),
            Ok(()) => Ok(path),
        }
    })
}

/// A checkpoint and what was trained on it.
#[derive(Debug, Clone, Args)]
pub(crate) struct CheckpointArguments {
    /// Checkpoint: a Hugging Face directory with config.json and safetensors
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Routers: router.safetensors or router.pth; without, the model is dense
    #[arg(long, value_name = "FILE")]
    pub(crate) router: Option<PathBuf>,
    /// LoRA: a PEFT directory, or lora.pth
    #[arg(long, value_name = "PATH")]
    pub(crate) adapter: Option<PathBuf>,
    /// LoRA alpha, for a lora.pth (which does not state it)
    #[arg(long, value_name = "ALPHA", requires = "adapter")]
    pub(crate) lora_alpha: Option<f64>,
}

/// A checkpoint, and the text that it reads to be measured.
#[derive(Debug, Clone, Args)]
pub(crate) struct ReadArguments {
    #[command(flatten)]
    pub(crate) checkpoint: CheckpointArguments,
    /// Where the checkpoint runs
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    pub(crate) device: Device,
    /// Plain text, one or more files
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub(crate) text: Vec<PathBuf>,
    /// Tokens in a window
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub(crate) window: usize,
    /// Use only the first windows
    #[arg(long, value_name = "WINDOWS")]
    pub(crate) limit: Option<usize>,
    /// Replace an existing file
    #[arg(long)]
    pub(crate) force: bool,
}

impl ReadArguments {
    /// The windows it is read in.
    pub(crate) const fn windows(&self) -> skipgpt_export::eval::Options {
        skipgpt_export::eval::Options { window: self.window, stride: None, limit: self.limit }
    }
}

/// How ONNX Runtime is found and run.
#[derive(Debug, Clone, Args)]
pub(crate) struct RuntimeArguments {
    /// ONNX Runtime: the shared library, or a directory that holds it
    #[arg(long, value_name = "PATH")]
    pub(crate) onnxruntime: Option<PathBuf>,
    /// Where the artifact runs
    #[arg(long, value_enum, default_value_t = Provider::Cpu)]
    pub(crate) provider: Provider,
    /// Threads for one operator [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Provider {
    Cpu,
    Cuda,
}

impl From<Provider> for session::Provider {
    fn from(provider: Provider) -> Self {
        match provider {
            Provider::Cpu => Self::Cpu,
            Provider::Cuda => Self::Cuda,
        }
    }
}

/// Where candle computes: training, and the model as it was imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Device {
    #[default]
    Cpu,
    /// An NVIDIA GPU; in a build of `make cuda`
    Cuda,
}

impl From<Device> for Compute {
    fn from(device: Device) -> Self {
        match device {
            Device::Cpu => Self::Cpu,
            Device::Cuda => Self::Cuda,
        }
    }
}

/// Where a report goes besides the terminal.
#[derive(Debug, Clone, Args)]
pub(crate) struct ReportArguments {
    /// Also write the report as JSON; `-` writes it to standard output in place of the text
    #[arg(long, value_name = "FILE", value_parser = destination())]
    pub(crate) json: Option<PathBuf>,
}

/// What a command found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It holds, or it is done.
    Holds,
    /// It was measured and does not hold.
    Fails,
    /// Another process could not do its part, and says why.
    Stopped,
}
