//! What `train` takes.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use skipgpt_export::train::data::FIELD;
use skipgpt_export::train::settings::{Base, Measure, Target};

use crate::cli::Device;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train routers for a frozen model (stage 1)
    Router(RouterArguments),
    /// Train a LoRA adapter around frozen routers (stage 2)
    Lora(LoraArguments),
}

#[derive(Debug, Args)]
pub(crate) struct RouterArguments {
    /// The base model: a Hugging Face directory with config.json and safetensors
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// The published settings to begin with; any of them can be given by its own flag
    #[arg(long, value_enum, default_value_t = Preset::Paper)]
    pub(super) preset: Preset,
    /// Share to skip, over layers, both modules and tokens
    #[arg(long, value_name = "SHARE", default_value_t = 0.25)]
    pub(super) skip: f64,
    /// What it is a share of
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = MeasureArgument::Modules)]
    pub(super) skip_of: MeasureArgument,
    /// Share to begin with; it grows to --skip in a line [default: --skip]
    #[arg(long, value_name = "SHARE")]
    pub(super) skip_from: Option<f64>,
    /// Share of the steps over which it grows
    #[arg(long, value_name = "SHARE", default_value_t = 0.5)]
    pub(super) skip_over: f64,
    /// Strength of the pull towards the share [default: 8 (paper), 20 (code)]
    #[arg(long, value_name = "ALPHA")]
    pub(super) alpha: Option<f64>,
    /// Temperature of the first step [default: 5 (gumbel), 1 (reinmax)]
    #[arg(long, value_name = "TAU")]
    pub(super) tau_from: Option<f64>,
    /// Temperature after the last step [default: 1 (gumbel), 0.2 (reinmax)]
    #[arg(long, value_name = "TAU")]
    pub(super) tau_to: Option<f64>,
    /// How decisions are sampled and their gradients estimated
    #[arg(long, value_enum, default_value_t = EstimatorArgument::Gumbel)]
    pub(super) estimator: EstimatorArgument,
    /// Routers to begin with, in place of new ones: a safetensors file or a .pth
    #[arg(long, value_name = "FILE")]
    pub(super) router: Option<PathBuf>,
    /// Initial bias towards keep; 0 is the published initialisation
    #[arg(long, value_name = "BIAS", default_value_t = 0.0, conflicts_with = "router")]
    pub(super) keep_bias: f64,
    /// Layers of a router: one, or two with a relu between
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "router",
          value_parser = clap::value_parser!(u8).range(1..=2))]
    pub(super) router_layers: u8,
    /// Width between the two [default: a quarter of the model's]
    #[arg(long, value_name = "WIDTH", conflicts_with = "router")]
    pub(super) router_width: Option<usize>,
    /// Also write router.pth
    #[arg(long)]
    pub(super) pth: bool,
    #[command(flatten)]
    pub(super) common: CommonArguments,
}

#[derive(Debug, Args)]
pub(crate) struct LoraArguments {
    /// The base model: a Hugging Face directory with config.json and safetensors
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// The routers, as router tuning wrote them
    #[arg(long, value_name = "FILE")]
    pub(super) router: Option<PathBuf>,
    /// Rank of the adapter
    #[arg(long, value_name = "RANK", default_value_t = 16)]
    pub(super) rank: usize,
    /// The adapter is scaled by alpha / rank
    #[arg(long, value_name = "ALPHA", default_value_t = 32.0)]
    pub(super) lora_alpha: f64,
    /// Dropout of the adapter's input
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    pub(super) dropout: f64,
    /// Projections to adapt
    #[arg(long, value_enum, value_delimiter = ',', num_args = 1.., value_name = "PROJECTION",
          default_values_t = [Projection::Q, Projection::V, Projection::Gate])]
    pub(super) targets: Vec<Projection>,
    #[command(flatten)]
    pub(super) common: CommonArguments,
}

#[allow(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
#[derive(Debug, Args)]
pub(crate) struct CommonArguments {
    /// Text to train on: files and directories of plain text, JSONL or Parquet
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    pub(super) text: Vec<PathBuf>,
    /// Field of JSONL, or column of Parquet files, that holds the text
    #[arg(long, value_name = "NAME", default_value = FIELD)]
    pub(super) text_field: String,
    /// The run's directory
    #[arg(short, long, value_name = "DIR")]
    pub(super) output: PathBuf,
    /// Continue the run in the directory from its last checkpoint; give the same settings
    #[arg(long)]
    pub(super) resume: bool,
    /// Optimiser steps
    #[arg(long, default_value_t = 10_000)]
    pub(super) steps: u64,
    /// Windows of a forward pass
    #[arg(long, value_name = "WINDOWS", default_value_t = 16)]
    pub(super) batch: usize,
    /// Forward passes of an optimiser step
    #[arg(long, value_name = "PASSES", default_value_t = 1)]
    pub(super) accumulate: usize,
    /// Tokens of a window
    #[arg(long, value_name = "TOKENS", default_value_t = 4096)]
    pub(super) window: usize,
    /// Keep documents apart: each is cut into windows of its own, the last one padded; padding counts
    /// for nothing
    #[arg(long)]
    pub(super) pad: bool,
    /// Where it is trained; cuda in a build of `make cuda`
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    pub(super) device: Device,
    /// Of initial weights, noise and the order of the windows
    #[arg(long, default_value_t = 43)]
    pub(super) seed: u64,
    /// Highest learning rate [default: 2e-3 for routers, 2e-4 for LoRA]
    #[arg(long, value_name = "RATE")]
    pub(super) learning_rate: Option<f64>,
    /// How it goes [default: constant (paper), cosine (code, and LoRA)]
    #[arg(long, value_enum)]
    pub(super) schedule: Option<Schedule>,
    /// Share of the steps over which it rises [default: 0.1 with cosine, else 0]
    #[arg(long, value_name = "SHARE")]
    pub(super) warm_up: Option<f64>,
    /// Decoupled weight decay
    #[arg(long, value_name = "DECAY", default_value_t = 0.01)]
    pub(super) weight_decay: f64,
    /// Clip gradients to this norm; 0 leaves them
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
    pub(super) clip: f64,
    /// What the frozen base is kept in, and on cuda activations too; routers, adapters and losses
    /// are f32 [default: f32 on cpu, bf16 on cuda]
    #[arg(long, value_enum, value_name = "DTYPE")]
    pub(super) base_dtype: Option<BaseDtype>,
    /// Learn the dense model's predictions in place of the text
    #[arg(long)]
    pub(super) distill: bool,
    /// Run each layer again for its backward: less memory, more time
    #[arg(long)]
    pub(super) recompute: bool,
    /// Share of the windows held out for evaluation, from the end; 0 for none
    #[arg(long, value_name = "SHARE", default_value_t = 0.02, conflicts_with = "eval_text")]
    pub(super) hold_out: f64,
    /// Text to evaluate on, in place of a held-out share
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(super) eval_text: Vec<PathBuf>,
    /// Steps from one evaluation to the next; 0 evaluates at the end alone
    #[arg(long, value_name = "STEPS", default_value_t = 500)]
    pub(super) eval_every: u64,
    /// Windows of an evaluation, at most
    #[arg(long, value_name = "WINDOWS", default_value_t = 16)]
    pub(super) eval_windows: usize,
    /// Steps from one checkpoint to the next; 0 writes one at the end alone
    #[arg(long, value_name = "STEPS", default_value_t = 500)]
    pub(super) save_every: u64,
    /// Checkpoints kept
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(super) keep_checkpoints: usize,
    /// Also write metrics as TensorBoard's event files, to tensorboard/ in the run's directory
    #[arg(long)]
    pub(super) tensorboard: bool,
    /// Where tokenised texts are kept [default: in the run's directory]
    #[arg(long, value_name = "DIR")]
    pub(super) cache: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Preset {
    /// Alpha 8, constant rate
    Paper,
    /// Alpha 20, cosine with 10 % warm-up
    Code,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum EstimatorArgument {
    /// Straight through the Gumbel-softmax, as published
    Gumbel,
    /// `ReinMax`, right to the second order; decisions too are drawn at the temperature
    Reinmax,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum MeasureArgument {
    /// Of decisions, all the same, as published
    Modules,
    /// Of the weights that skipped modules do without: what a decode step saves
    Weights,
}

impl From<MeasureArgument> for Measure {
    fn from(measure: MeasureArgument) -> Self {
        match measure {
            MeasureArgument::Modules => Self::Modules,
            MeasureArgument::Weights => Self::Weights,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum BaseDtype {
    F32,
    F16,
    Bf16,
}

impl From<BaseDtype> for Base {
    fn from(dtype: BaseDtype) -> Self {
        match dtype {
            BaseDtype::F32 => Self::F32,
            BaseDtype::F16 => Self::F16,
            BaseDtype::Bf16 => Self::Bf16,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Schedule {
    Constant,
    Cosine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl From<Projection> for Target {
    fn from(projection: Projection) -> Self {
        match projection {
            Projection::Q => Self::Q,
            Projection::K => Self::K,
            Projection::V => Self::V,
            Projection::O => Self::O,
            Projection::Gate => Self::Gate,
            Projection::Up => Self::Up,
            Projection::Down => Self::Down,
        }
    }
}

impl CommonArguments {
    pub(super) fn base(&self) -> Base {
        match (self.base_dtype, self.device) {
            (Some(dtype), _) => dtype.into(),
            (None, Device::Cpu) => Base::F32,
            (None, Device::Cuda) => Base::Bf16,
        }
    }
}
