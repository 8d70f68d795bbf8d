//! `train`: routers, then an adapter around them.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use skipgpt_export::checkpoint::Checkpoint;
use skipgpt_export::text::Tokenizer;
use skipgpt_export::train::data::FIELD;
use skipgpt_export::train::schedule::{Line, Rate, Shape};
use skipgpt_export::train::settings::{Base, Estimator, Lora, Router, Settings, Stage, Target};
use skipgpt_export::train::{Event, Options, Request, metrics, optimizer, run as train};
use skipgpt_export::world::World;

use super::{CheckpointArguments, Device, Verdict, memory, screen, sources};

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
    model: PathBuf,
    /// The published settings to begin with; any of them can be given by its own flag
    #[arg(long, value_enum, default_value_t = Preset::Paper)]
    preset: Preset,
    /// Share of modules to skip, over layers, both modules and tokens
    #[arg(long, value_name = "SHARE", default_value_t = 0.25)]
    skip: f64,
    /// Share to begin with; it grows to --skip in a line [default: --skip]
    #[arg(long, value_name = "SHARE")]
    skip_from: Option<f64>,
    /// Share of the steps over which it grows
    #[arg(long, value_name = "SHARE", default_value_t = 0.5)]
    skip_over: f64,
    /// Strength of the pull towards the share [default: 8 (paper), 20 (code)]
    #[arg(long, value_name = "ALPHA")]
    alpha: Option<f64>,
    /// Temperature of the first step [default: 5 (gumbel), 1 (reinmax)]
    #[arg(long, value_name = "TAU")]
    tau_from: Option<f64>,
    /// Temperature after the last step [default: 1 (gumbel), 0.2 (reinmax)]
    #[arg(long, value_name = "TAU")]
    tau_to: Option<f64>,
    /// How decisions are sampled and their gradients estimated
    #[arg(long, value_enum, default_value_t = EstimatorArgument::Gumbel)]
    estimator: EstimatorArgument,
    /// Routers to begin with, in place of new ones: a safetensors file or a .pth
    #[arg(long, value_name = "FILE")]
    router: Option<PathBuf>,
    /// Initial bias towards keep; 0 is the published initialisation
    #[arg(long, value_name = "BIAS", default_value_t = 0.0, conflicts_with = "router")]
    keep_bias: f64,
    /// Layers of a router: one, or two with a relu between
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "router",
          value_parser = clap::value_parser!(u8).range(1..=2))]
    router_layers: u8,
    /// Width between the two [default: a quarter of the model's]
    #[arg(long, value_name = "WIDTH", conflicts_with = "router")]
    router_width: Option<usize>,
    /// Also write router.pth
    #[arg(long)]
    pth: bool,
    #[command(flatten)]
    common: CommonArguments,
}

#[derive(Debug, Args)]
pub(crate) struct LoraArguments {
    /// The base model: a Hugging Face directory with config.json and safetensors
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The routers, as router tuning wrote them
    #[arg(long, value_name = "FILE")]
    router: Option<PathBuf>,
    /// Rank of the adapter
    #[arg(long, value_name = "RANK", default_value_t = 16)]
    rank: usize,
    /// The adapter is scaled by alpha / rank
    #[arg(long, value_name = "ALPHA", default_value_t = 32.0)]
    lora_alpha: f64,
    /// Dropout of the adapter's input
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    dropout: f64,
    /// Projections to adapt
    #[arg(long, value_enum, value_delimiter = ',', num_args = 1.., value_name = "PROJECTION",
          default_values_t = [Projection::Q, Projection::V, Projection::Gate])]
    targets: Vec<Projection>,
    #[command(flatten)]
    common: CommonArguments,
}

#[allow(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
#[derive(Debug, Args)]
pub(crate) struct CommonArguments {
    /// Text to train on: files and directories of plain text, JSONL or Parquet
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// Field of JSONL, or column of Parquet files, that holds the text
    #[arg(long, value_name = "NAME", default_value = FIELD)]
    text_field: String,
    /// The run's directory
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Continue the run in the directory from its last checkpoint; give the same settings
    #[arg(long)]
    resume: bool,
    /// Optimiser steps
    #[arg(long, default_value_t = 10_000)]
    steps: u64,
    /// Windows of a forward pass
    #[arg(long, value_name = "WINDOWS", default_value_t = 16)]
    batch: usize,
    /// Forward passes of an optimiser step
    #[arg(long, value_name = "PASSES", default_value_t = 1)]
    accumulate: usize,
    /// Tokens of a window
    #[arg(long, value_name = "TOKENS", default_value_t = 4096)]
    window: usize,
    /// Keep documents apart: each is cut into windows of its own, the last one padded; padding counts
    /// for nothing
    #[arg(long)]
    pad: bool,
    /// Where it is trained; cuda in a build of `make cuda`
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Of initial weights, noise and the order of the windows
    #[arg(long, default_value_t = 43)]
    seed: u64,
    /// Highest learning rate [default: 2e-3 for routers, 2e-4 for LoRA]
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// How it goes [default: constant (paper), cosine (code, and LoRA)]
    #[arg(long, value_enum)]
    schedule: Option<Schedule>,
    /// Share of the steps over which it rises [default: 0.1 with cosine, else 0]
    #[arg(long, value_name = "SHARE")]
    warm_up: Option<f64>,
    /// Decoupled weight decay
    #[arg(long, value_name = "DECAY", default_value_t = 0.01)]
    weight_decay: f64,
    /// Clip gradients to this norm; 0 leaves them
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
    clip: f64,
    /// What the frozen base is kept in, and on cuda activations too; routers, adapters and losses
    /// are f32 [default: f32 on cpu, bf16 on cuda]
    #[arg(long, value_enum, value_name = "DTYPE")]
    base_dtype: Option<BaseDtype>,
    /// Learn the dense model's predictions in place of the text
    #[arg(long)]
    distill: bool,
    /// Run each layer again for its backward: less memory, more time
    #[arg(long)]
    recompute: bool,
    /// Share of the windows held out for evaluation, from the end; 0 for none
    #[arg(long, value_name = "SHARE", default_value_t = 0.02, conflicts_with = "eval_text")]
    hold_out: f64,
    /// Text to evaluate on, in place of a held-out share
    #[arg(long, value_name = "PATH", num_args = 1..)]
    eval_text: Vec<PathBuf>,
    /// Steps from one evaluation to the next; 0 evaluates at the end alone
    #[arg(long, value_name = "STEPS", default_value_t = 500)]
    eval_every: u64,
    /// Windows of an evaluation, at most
    #[arg(long, value_name = "WINDOWS", default_value_t = 16)]
    eval_windows: usize,
    /// Steps from one checkpoint to the next; 0 writes one at the end alone
    #[arg(long, value_name = "STEPS", default_value_t = 500)]
    save_every: u64,
    /// Checkpoints kept
    #[arg(long, value_name = "N", default_value_t = 2)]
    keep_checkpoints: usize,
    /// Also write metrics as TensorBoard's event files, to tensorboard/ in the run's directory
    #[arg(long)]
    tensorboard: bool,
    /// Where tokenised texts are kept [default: in the run's directory]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Preset {
    /// Alpha 8, constant rate
    Paper,
    /// Alpha 20, cosine with 10 % warm-up
    Code,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EstimatorArgument {
    /// Straight through the Gumbel-softmax, as published
    Gumbel,
    /// `ReinMax`, right to the second order; decisions too are drawn at the temperature
    Reinmax,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BaseDtype {
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
enum Schedule {
    Constant,
    Cosine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Projection {
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
    fn base(&self) -> Base {
        match (self.base_dtype, self.device) {
            (Some(dtype), _) => dtype.into(),
            (None, Device::Cpu) => Base::F32,
            (None, Device::Cuda) => Base::Bf16,
        }
    }
}

/// What the stage leaves open in the common flags.
struct Defaults {
    rate: f64,
    schedule: Schedule,
}

pub(crate) fn run(command: &Command, world: &dyn World) -> Result<Verdict> {
    match command {
        Command::Router(arguments) => router(arguments, world),
        Command::Lora(arguments) => lora(arguments, world),
    }
}

fn router(arguments: &RouterArguments, world: &dyn World) -> Result<Verdict> {
    let (alpha, schedule) = match arguments.preset {
        Preset::Paper => (8.0, Schedule::Constant),
        Preset::Code => (20.0, Schedule::Cosine),
    };
    let checkpoint = CheckpointArguments {
        model: Some(arguments.model.clone()),
        router: arguments.router.clone(),
        adapter: None,
        lora_alpha: None,
    };
    let checkpoint = sources::checkpoint(&checkpoint)?;
    let width = match (arguments.router_layers, arguments.router_width) {
        (1, Some(width)) => bail!(
            "--router-width is {width}, and a router of one layer has no width; add --router-layers 2"
        ),
        (1, None) => None,
        (_, width) => Some(width.unwrap_or(checkpoint.model.config.hidden_size / 4)),
    };
    let (estimator, tau) = match arguments.estimator {
        EstimatorArgument::Gumbel => (Estimator::Gumbel, (5.0, 1.0)),
        EstimatorArgument::Reinmax => (Estimator::ReinMax, (1.0, 0.2)),
    };
    let from = arguments.skip_from;
    let stage = Stage::Router(Router {
        skip: Line {
            from: from.unwrap_or(arguments.skip),
            to: arguments.skip,
            share: if from.is_some() { arguments.skip_over } else { 0.0 },
        },
        alpha: arguments.alpha.unwrap_or(alpha),
        tau: Line {
            from: arguments.tau_from.unwrap_or(tau.0),
            to: arguments.tau_to.unwrap_or(tau.1),
            share: 1.0,
        },
        estimator,
        keep_bias: arguments.keep_bias,
        width,
    });
    let settings = settings(stage, &arguments.common, &Defaults { rate: 2e-3, schedule });
    start(&checkpoint, &arguments.common, &settings, arguments.pth, world)
}

fn lora(arguments: &LoraArguments, world: &dyn World) -> Result<Verdict> {
    let mut targets: Vec<Target> = arguments.targets.iter().copied().map(Target::from).collect();
    targets.sort_unstable();
    targets.dedup();
    let stage = Stage::Lora(Lora {
        rank: arguments.rank,
        alpha: arguments.lora_alpha,
        dropout: arguments.dropout,
        targets,
    });
    let checkpoint = CheckpointArguments {
        model: Some(arguments.model.clone()),
        router: arguments.router.clone(),
        adapter: None,
        lora_alpha: None,
    };
    let checkpoint = sources::checkpoint(&checkpoint)?;
    let defaults = Defaults { rate: 2e-4, schedule: Schedule::Cosine };
    let settings = settings(stage, &arguments.common, &defaults);
    start(&checkpoint, &arguments.common, &settings, false, world)
}

fn settings(stage: Stage, common: &CommonArguments, defaults: &Defaults) -> Settings {
    let schedule = common.schedule.unwrap_or(defaults.schedule);
    let (shape, warm_up) = match schedule {
        Schedule::Constant => (Shape::Constant, 0.0),
        Schedule::Cosine => (Shape::Cosine, 0.1),
    };
    let none = common.hold_out == 0.0 || !common.eval_text.is_empty();
    Settings {
        stage,
        steps: common.steps,
        batch: common.batch,
        accumulate: common.accumulate,
        window: common.window,
        pad: common.pad,
        seed: common.seed,
        rate: Rate {
            peak: common.learning_rate.unwrap_or(defaults.rate),
            shape,
            warm_up: common.warm_up.unwrap_or(warm_up),
        },
        optimizer: optimizer::Settings {
            weight_decay: common.weight_decay,
            clip: (common.clip != 0.0).then_some(common.clip),
        },
        base: common.base(),
        distill: common.distill,
        hold_out: (!none).then_some(common.hold_out),
    }
}

fn start(
    checkpoint: &Checkpoint,
    common: &CommonArguments,
    settings: &Settings,
    pth: bool,
    world: &dyn World,
) -> Result<Verdict> {
    if common.keep_checkpoints == 0 {
        bail!("--keep-checkpoints is 0; expected 1 or more");
    }
    memory::keep_freed();
    let tokenizer = Tokenizer::open(&checkpoint.directory)?;
    let request = Request {
        checkpoint,
        tokenizer: &tokenizer,
        text: &common.text,
        text_field: &common.text_field,
        evaluation: &common.eval_text,
        output: &common.output,
        cache: common.cache.as_deref(),
        resume: common.resume,
        settings,
        device: common.device.into(),
        options: Options {
            recompute: common.recompute,
            evaluate_every: common.eval_every,
            evaluation_windows: common.eval_windows,
            save_every: common.save_every,
            keep_checkpoints: common.keep_checkpoints,
            pth,
            tensorboard: common.tensorboard,
        },
        world,
    };
    let bars =
        Bars { tokenising: screen::bytes("tokenising"), training: screen::count("training") };
    let outcome = train(&request, &mut |event| {
        bars.show(&event);
        screen::go_on()
    });
    bars.tokenising.finish_and_clear();
    bars.training.finish_and_clear();
    let outcome = outcome?;
    if let Some(evaluation) = &outcome.evaluation {
        screen::line(described(evaluation))?;
    }
    for path in &outcome.written {
        screen::line(path.display())?;
    }
    Ok(Verdict::Holds)
}

/// The progress of both parts of a run.
struct Bars {
    tokenising: indicatif::ProgressBar,
    training: indicatif::ProgressBar,
}

impl Bars {
    fn show(&self, event: &Event<'_>) {
        match event {
            Event::Tokenising(progress) => {
                self.tokenising.set_length(progress.total);
                self.tokenising.set_position(progress.done);
            }
            Event::Begins { step, steps, windows, parameters } => {
                self.tokenising.finish_and_clear();
                self.training.set_length(*steps);
                self.training.set_position(*step);
                self.training.reset_eta();
                let from = if *step > 0 { format!(", from step {step}") } else { String::new() };
                self.note(format!("{windows} windows, {parameters} values to train{from}"));
            }
            Event::Dense(found) => self.note(format!("dense: perplexity {:.2}", found.perplexity)),
            Event::Step(step) => {
                let keep = step.keep.map(|keep| format!(", keep {keep:.3}")).unwrap_or_default();
                self.training.set_message(format!(
                    "loss {:.3}{keep}, {:.0} tokens/s",
                    step.prediction, step.tokens_per_second
                ));
                self.training.set_position(step.step);
            }
            Event::Evaluation(found) => {
                self.note(format!("step {}: {}", found.step, described(found)));
            }
            Event::Saved(path) => tracing::info!("{}: written", path.display()),
        }
    }

    /// A line above the bar.
    fn note(&self, text: String) {
        self.training.suspend(|| screen::note(text));
    }
}

fn described(evaluation: &metrics::Evaluation) -> String {
    let skipped = evaluation
        .skipped
        .map(|skipped| format!(", {:.1} % of modules skipped", 100.0 * skipped))
        .unwrap_or_default();
    format!(
        "perplexity {:.2}{skipped} ({} held-out windows)",
        evaluation.perplexity, evaluation.windows
    )
}
