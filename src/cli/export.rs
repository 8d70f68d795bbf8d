//! `export`: a checkpoint, its routers and its adapter become an artifact.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use skipgpt_export::artifact::{self, manifest};
use skipgpt_export::checkpoint::Checkpoint;
use skipgpt_export::decoder::{Logits, Sequences};
use skipgpt_export::onnx::graph::Graph;
use skipgpt_export::profile;
use skipgpt_export::{importance, inspect, onnx, plan, safetensors};
use skipgpt_passes::ir::{Config, DType, Dispatch, Model};
use skipgpt_passes::plan::Plan;
use skipgpt_passes::prune_modules::PruneModules;
use skipgpt_passes::quantization::Method;
use skipgpt_passes::validate::Validated;
use skipgpt_passes::{PASSES, Pass, registry, validate};

use super::precision::{PrecisionArgument, PrecisionArguments};
use super::{CheckpointArguments, Provider, ReportArguments, Verdict, screen, sources};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    checkpoint: CheckpointArguments,
    /// The artifact directory to create
    #[arg(short, long, value_name = "ARTIFACT", required_unless_present_any = ["dry_run", "stop_after"])]
    output: Option<PathBuf>,
    /// What is written
    #[arg(long, value_enum, default_value_t = FormatArgument::Onnx)]
    format: FormatArgument,
    #[command(flatten)]
    precision: PrecisionArguments,
    /// How routed modules skip (ONNX)
    #[arg(long, value_enum, default_value_t = DispatchArgument::Auto)]
    dispatch: DispatchArgument,
    /// How attention is lowered (ONNX)
    #[arg(long, value_enum, default_value_t = AttentionArgument::Auto)]
    attention: AttentionArgument,
    /// The ONNX Runtime provider it is for: what --dispatch and --attention auto choose
    #[arg(long, value_enum, default_value_t = Provider::Cpu)]
    provider: Provider,
    /// Keep rates that `profile` measured
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// What inputs of projections weigh, as `calibrate` measured it: weights in few bits are searched for by it
    #[arg(long, value_name = "FILE")]
    importance: Option<PathBuf>,
    /// Remove modules kept for at most this share of tokens (needs --profile)
    #[arg(long, value_name = "SHARE")]
    prune_below: Option<f64>,
    /// Take the router from modules kept for at least this share of tokens (needs --profile)
    #[arg(long, value_name = "SHARE")]
    always_above: Option<f64>,
    /// Apply the plan of this file (a plan, or another artifact's manifest) in place of the options
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dispatch", "profile", "prune_below", "always_above"])]
    plan: Option<PathBuf>,
    /// Write the weights, or share the checkpoint's own file where nothing changes
    #[arg(long, value_enum, default_value_t = WeightsArgument::Copy)]
    weights: WeightsArgument,
    /// Give the decisions as an output, `routing_margins`
    #[arg(long)]
    emit_routing: bool,
    /// The positions whose logits the graph gives (ONNX)
    #[arg(long, value_enum, default_value_t = LogitsArgument::All)]
    logits: LogitsArgument,
    /// Which sequences the graph takes (ONNX): one alone needs no form for batches and padding
    #[arg(long, value_enum, default_value_t = SequencesArgument::Any)]
    sequences: SequencesArgument,
    /// Print the IR after this pass
    #[arg(long, value_name = "PASS")]
    print_after: Option<String>,
    /// Write the IR after every pass into this directory
    #[arg(long, value_name = "DIR")]
    dump_ir: Option<PathBuf>,
    /// Print the IR after this pass and stop
    #[arg(long, value_name = "PASS", conflicts_with = "json")]
    stop_after: Option<String>,
    /// Read, check and plan everything, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace an earlier artifact
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    report: ReportArguments,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormatArgument {
    /// An artifact for ONNX Runtime
    Onnx,
    /// A Hugging Face checkpoint: adapter merged, modules removed, routers beside it
    Safetensors,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DispatchArgument {
    /// The fastest measured: conditional, or masked where --profile says that skipping does not pay; for
    /// cuda masked
    Auto,
    /// Everything is computed and multiplied by the decision
    Masked,
    /// Kept rows are gathered, computed and scattered back
    Gathered,
    /// As gathered, and nothing runs where no token is kept
    Conditional,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AttentionArgument {
    /// Grouped, if heads have a width of whole sixteens; decomposed in f16 on cpu and in f32 on cuda
    Auto,
    /// `GroupQueryAttention` where there is one token a sequence; no f32 on CUDA
    Grouped,
    /// Elementary operators alone
    Decomposed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogitsArgument {
    /// Every one, as `eval` needs them
    All,
    /// The last of each sequence, `[batch, 1, vocab]`: enough to write text, and less work in prefill
    Last,
}

impl From<LogitsArgument> for Logits {
    fn from(argument: LogitsArgument) -> Self {
        match argument {
            LogitsArgument::All => Self::All,
            LogitsArgument::Last => Self::Last,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SequencesArgument {
    /// Any number, padded on the left
    Any,
    /// One at a time, without padding; grouped attention in f32
    One,
}

impl From<SequencesArgument> for Sequences {
    fn from(argument: SequencesArgument) -> Self {
        match argument {
            SequencesArgument::Any => Self::Any,
            SequencesArgument::One => Self::One,
        }
    }
}

impl AttentionArgument {
    fn attention(self, config: &Config, arguments: &Arguments) -> Result<onnx::Attention> {
        let possible = onnx::Attention::for_config(config);
        let (provider, dtype) = (arguments.provider.into(), arguments.precision.float());
        match self {
            Self::Auto => Ok(onnx::Attention::auto(config, dtype, provider)),
            Self::Decomposed => Ok(onnx::Attention::Decomposed),
            Self::Grouped if possible == onnx::Attention::Grouped => Ok(possible),
            Self::Grouped => bail!(
                "--attention grouped: GroupQueryAttention rotates heads of whole sixteens; this \
                 model's head_dim is {}",
                config.head_dim
            ),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WeightsArgument {
    /// Into the artifact's own file
    Copy,
    /// The checkpoint's safetensors file, hard-linked
    Link,
}

impl DispatchArgument {
    /// `None` leaves the choice to the plan.
    fn dispatch(self) -> Option<Dispatch> {
        match self {
            Self::Auto => None,
            Self::Masked => Some(Dispatch::Masked),
            Self::Gathered => Some(Dispatch::Gathered),
            Self::Conditional => Some(Dispatch::Conditional),
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<Verdict> {
    let start = Instant::now();
    fits_format(arguments)?;
    let mut checkpoint = sources::checkpoint(&arguments.checkpoint)?;
    let router = checkpoint.directory.join(safetensors::ROUTERS);
    if arguments.checkpoint.router.is_none() && router.is_file() {
        tracing::warn!("{}: is not used; name it with --router to skip", router.display());
    }
    let plan = planned(arguments, &checkpoint)?;
    if let Some(path) = &arguments.importance {
        if plan.quantization.is_none_or(|q| q.scheme.method != Method::Search) {
            bail!("--importance is for --dtype int8 or int4 with --quant-method search");
        }
        importance::attach(&mut checkpoint, path)?;
    }
    let attention = arguments.attention.attention(&checkpoint.model.config, arguments)?;
    let passes = match (&arguments.stop_after, arguments.format) {
        (Some(name), _) => registry::through(name)?,
        (None, FormatArgument::Onnx) => PASSES,
        (None, FormatArgument::Safetensors) => registry::through(PruneModules.name())?,
    };
    let model = lower(arguments, &checkpoint, &plan, passes)?;
    if arguments.stop_after.is_some() {
        screen::print(&model.to_string())?;
        return Ok(Verdict::Holds);
    }
    let names: Vec<&str> = passes.iter().map(|pass| pass.name()).collect();
    let of_checkpoint = (arguments.precision.dtype != PrecisionArgument::F32)
        .then_some(arguments.precision.float());
    let graph = match arguments.format {
        FormatArgument::Safetensors => None,
        FormatArgument::Onnx => {
            let options = onnx::Options {
                dtype: arguments.precision.float(),
                emit_routing: arguments.emit_routing,
                attention,
                logits: arguments.logits.into(),
                sequences: arguments.sequences.into(),
            };
            Some(onnx::lower(validate(&model)?, options)?)
        }
    };
    let Some(output) = arguments.output.as_deref().filter(|_| !arguments.dry_run) else {
        check(arguments, &checkpoint, graph.as_ref(), validate(&model)?, of_checkpoint)?;
        let report = inspect::Report::of_model(&model, Some(&plan), &names);
        screen::report(&report, &arguments.report)?;
        return Ok(Verdict::Holds);
    };
    let bar = screen::bytes("writing");
    let mut progress = |progress: artifact::Progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        screen::go_on()
    };
    match &graph {
        Some(graph) => {
            artifact::write(
                &artifact::Request {
                    output,
                    force: arguments.force,
                    model: &model,
                    graph,
                    checkpoint: &checkpoint,
                    plan: &plan,
                    passes: &names,
                    options: recorded(arguments, attention),
                    min_onnxruntime: onnx::minimum_onnxruntime(graph),
                },
                &mut progress,
            )?;
        }
        None => {
            safetensors::write(
                &safetensors::Request {
                    output,
                    force: arguments.force,
                    model: validate(&model)?,
                    checkpoint: &checkpoint,
                    plan: &plan,
                    passes: &names,
                    options: recorded(arguments, attention),
                    dtype: of_checkpoint,
                },
                &mut progress,
            )?;
        }
    }
    bar.finish_and_clear();
    let report = inspect::Report::of_artifact(&artifact::open(output)?);
    screen::report(&report, &arguments.report)?;
    let seconds = start.elapsed().as_secs_f64();
    screen::note(format_args!("{}: exported in {seconds:.1} s", output.display()));
    Ok(Verdict::Holds)
}

/// Refuses options of graphs where none is written.
fn fits_format(arguments: &Arguments) -> Result<()> {
    let of_graphs = [
        ("--logits last", arguments.logits == LogitsArgument::Last),
        ("--sequences one", arguments.sequences == SequencesArgument::One),
        ("--emit-routing", arguments.emit_routing),
    ];
    if arguments.format == FormatArgument::Safetensors
        && let Some((option, _)) = of_graphs.iter().find(|(_, given)| *given)
    {
        bail!("{option}: --format safetensors holds no graph; it is for ONNX");
    }
    Ok(())
}

/// Refuses what the export would, as far as that can be told without writing.
fn check(
    arguments: &Arguments,
    checkpoint: &Checkpoint,
    graph: Option<&Graph>,
    model: Validated<'_>,
    dtype: Option<DType>,
) -> Result<()> {
    if let Some(output) = &arguments.output {
        artifact::check_output(output, arguments.force, checkpoint)?;
    }
    match graph {
        None => safetensors::check(model, checkpoint, dtype)?,
        Some(graph) if arguments.weights == WeightsArgument::Link => {
            artifact::check_links(graph, checkpoint)?;
        }
        Some(_) => {}
    }
    Ok(())
}

fn planned(arguments: &Arguments, checkpoint: &Checkpoint) -> Result<Plan> {
    let link = arguments.weights == WeightsArgument::Link;
    if let Some(path) = &arguments.plan {
        if let Some(option) = arguments.precision.first_option() {
            bail!("--{option}: the plan of --plan says how weights are quantised");
        }
        let plan = artifact::manifest::read_plan(path)?;
        arguments
            .precision
            .agrees(plan.quantization.map(|quantization| quantization.scheme.bits))?;
        holds_floats(arguments, plan.quantization.is_some())?;
        return Ok(plan);
    }
    let quantization = arguments.precision.quantization()?;
    holds_floats(arguments, quantization.is_some())?;
    let profile = arguments.profile.as_deref().map(profile::read::read).transpose()?;
    let choices = plan::Choices {
        dispatch: arguments.dispatch.dispatch(),
        provider: arguments.provider.into(),
        dtype: arguments.precision.float(),
        quantization,
        rearrange: !link,
        prune_below: arguments.prune_below,
        always_above: arguments.always_above,
    };
    Ok(plan::build(&checkpoint.model, choices, profile.as_ref())?)
}

fn holds_floats(arguments: &Arguments, quantized: bool) -> Result<()> {
    if quantized && arguments.format == FormatArgument::Safetensors {
        bail!("--format safetensors holds floats; weights in 4 and 8 bits are for ONNX");
    }
    Ok(())
}

/// Runs the passes, showing the IR where that was asked for.
fn lower(
    arguments: &Arguments,
    checkpoint: &Checkpoint,
    plan: &Plan,
    passes: &[&dyn Pass],
) -> Result<Model> {
    if let Some(name) = &arguments.print_after
        && !passes.iter().any(|pass| pass.name() == name)
    {
        registry::find(name)?;
        bail!("--print-after {name}: that pass does not run before --stop-after");
    }
    let mut model = checkpoint.model.clone();
    let mut number = 0;
    let mut shown = Ok(());
    skipgpt_passes::run(passes, &mut model, plan, |pass, model| {
        number += 1;
        let asked = arguments.print_after.as_deref() == Some(pass.name());
        if shown.is_ok() {
            shown = show(arguments.dump_ir.as_deref(), asked, number, pass.name(), model);
        }
    })?;
    shown?;
    Ok(model)
}

fn show(dump: Option<&Path>, print: bool, number: usize, pass: &str, model: &Model) -> Result<()> {
    if print {
        screen::print(&model.to_string())?;
    }
    if let Some(directory) = dump {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("{}: cannot be created", directory.display()))?;
        let path = directory.join(format!("{number:02}-{pass}.ir"));
        std::fs::write(&path, model.to_string())
            .with_context(|| format!("{}: cannot be written", path.display()))?;
    }
    Ok(())
}

/// What the manifest says was asked for.
fn recorded(arguments: &Arguments, attention: onnx::Attention) -> manifest::Options {
    let planned = arguments.plan.is_some();
    manifest::Options {
        format: match arguments.format {
            FormatArgument::Onnx => manifest::Format::Onnx,
            FormatArgument::Safetensors => manifest::Format::Safetensors,
        },
        dtype: arguments.precision.float(),
        weights: match arguments.weights {
            WeightsArgument::Copy => manifest::Weights::Copy,
            WeightsArgument::Link => manifest::Weights::Link,
        },
        dispatch: arguments.dispatch.dispatch().filter(|_| !planned),
        emit_routing: arguments.emit_routing,
        attention,
        logits: arguments.logits.into(),
        sequences: arguments.sequences.into(),
        prune_below: arguments.prune_below,
        always_above: arguments.always_above,
    }
}
