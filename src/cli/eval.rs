//! `eval`: perplexity and multiple choice of checkpoints in candle and of artifacts under ONNX
//! Runtime, beside what static pruning gives.

use std::convert::Infallible;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use skipgpt_export::checkpoint::Checkpoint;
use skipgpt_export::decoder::Peek;
use skipgpt_export::eval::baseline::{self, Similarities, Unit};
use skipgpt_export::eval::choices::{self, Task, pairs, task};
use skipgpt_export::eval::report::{self, Earlier, Engine, Measured, Report, Text};
use skipgpt_export::eval::{self, Options};
use skipgpt_export::text::Tokenizer;
use skipgpt_export::world::World;
use skipgpt_passes::ir::Model;

use super::{
    CheckpointArguments, Device, ReportArguments, RuntimeArguments, Verdict, screen, sources,
};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// An artifact to measure, under ONNX Runtime
    #[arg(required_unless_present = "model")]
    artifact: Option<PathBuf>,
    /// A checkpoint to measure, in candle
    #[command(flatten)]
    checkpoint: CheckpointArguments,
    #[command(flatten)]
    runtime: RuntimeArguments,
    /// Where the checkpoint runs
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Plain text to predict, one or more files
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "choices")]
    perplexity: Vec<PathBuf>,
    /// Multiple-choice tasks, one or more JSONL files
    #[arg(long, value_name = "FILE", num_args = 1..)]
    choices: Vec<PathBuf>,
    /// Tokens in a window; each is predicted on its own
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    window: usize,
    /// Tokens from one window's start to the next one's [default: the window]
    #[arg(long, value_name = "TOKENS")]
    stride: Option<usize>,
    /// Use only so many items of each task, drawn by --seed, and the first so many windows of each text
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Use only the first windows of each text [default: --limit]
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Which items --limit draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What stands between context and continuation in every task; \n is a line break [default: a
    /// space, unless there is white space]
    #[arg(long, value_name = "TEXT")]
    separator: Option<String>,
    /// The same for one task, by its file's name
    #[arg(long, value_name = "TASK=TEXT", value_parser = task_separator)]
    task_separator: Vec<(String, String)>,
    /// Compare item by item with the first model in an earlier --json report [default: with the first
    /// model measured now]
    #[arg(long, value_name = "FILE", requires = "choices")]
    against: Option<PathBuf>,
    /// Also measure the checkpoint without routers and adapter: whole, or pruned at --skip
    #[arg(long, value_enum, value_delimiter = ',', requires = "model")]
    baseline: Vec<Baseline>,
    /// Share of blocks or modules that are pruned
    #[arg(long, value_name = "SHARE")]
    skip: Option<f64>,
    /// Plain text on which blocks and modules are compared, one or more files
    #[arg(long, value_name = "FILE", num_args = 1..)]
    calibration: Vec<PathBuf>,
    /// Use only the first windows of the calibration text
    #[arg(long, value_name = "N", default_value_t = 16)]
    calibration_windows: usize,
    #[command(flatten)]
    report: ReportArguments,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Baseline {
    /// Every module, every token
    Dense,
    /// Without the layers whose output is most like their input
    Blocks,
    /// Without the attention and MLP modules that change the residual stream least
    Modules,
}

pub(crate) fn run(arguments: &Arguments, world: &dyn World) -> Result<Verdict> {
    let asked = Asked::read(arguments, world)?;
    let pruning = arguments.pruning()?;
    let mut report = Report::default();
    if let Some(directory) = &arguments.artifact {
        let artifact = sources::artifact(directory)?;
        let tokenizer = Tokenizer::open(directory)?;
        let mut decoder = sources::watched(&artifact, &arguments.runtime)?;
        let manifest = &artifact.manifest;
        let name = artifact.directory.file_name().map(|name| name.to_string_lossy().into_owned());
        report.measured.push(asked.measure(
            &tokenizer,
            &mut decoder,
            Subject {
                name: name.unwrap_or_else(|| "artifact".to_owned()),
                engine: Engine::OnnxRuntime,
                modules: 2 * manifest.model.num_hidden_layers,
                routed: manifest.routing.routed.len(),
                removed: manifest.routing.removed.clone(),
            },
        )?);
    }
    if arguments.checkpoint.model.is_some() {
        let checkpoint = sources::checkpoint(&arguments.checkpoint)?;
        let tokenizer = Tokenizer::open(&checkpoint.directory)?;
        let measured = asked.candle("checkpoint", &tokenizer, &checkpoint, &checkpoint.model)?;
        report.measured.push(measured);
    }
    if !arguments.baseline.is_empty() {
        let plain = CheckpointArguments {
            router: None,
            adapter: None,
            lora_alpha: None,
            ..arguments.checkpoint.clone()
        };
        let checkpoint = sources::checkpoint(&plain)?;
        baselines(arguments, &asked, pruning, &checkpoint, &mut report)?;
    }
    report.compare(asked.earlier.as_ref())?;
    screen::report(&report, &arguments.report)?;
    Ok(Verdict::Holds)
}

/// Measures the checkpoint's baselines in the order they were named.
fn baselines(
    arguments: &Arguments,
    asked: &Asked<'_>,
    pruning: Option<f64>,
    checkpoint: &Checkpoint,
    report: &mut Report,
) -> Result<()> {
    let tokenizer = Tokenizer::open(&checkpoint.directory)?;
    let dense = baseline::dense(&checkpoint.model)?;
    let similarities = match pruning {
        Some(rate) => {
            let found = similarities(arguments, asked.world, &tokenizer, checkpoint, &dense)?;
            Some((rate, found))
        }
        None => None,
    };
    for kind in &arguments.baseline {
        let (name, unit) = match kind {
            Baseline::Dense => ("dense", None),
            Baseline::Blocks => ("blocks", Some(Unit::Blocks)),
            Baseline::Modules => ("modules", Some(Unit::Modules)),
        };
        let model = match (unit, &similarities) {
            (Some(unit), Some((rate, similarities))) => {
                let removed = similarities.choose(unit, *rate)?;
                baseline::prune(&checkpoint.model, removed, unit)?
            }
            _ => dense.clone(),
        };
        report.measured.push(asked.candle(name, &tokenizer, checkpoint, &model)?);
    }
    Ok(())
}

fn similarities(
    arguments: &Arguments,
    world: &dyn World,
    tokenizer: &Tokenizer,
    checkpoint: &Checkpoint,
    dense: &Model,
) -> Result<Similarities> {
    let tokens = sources::tokens(tokenizer, &arguments.calibration)?;
    let mut reference = sources::reference(dense, checkpoint, arguments.device)?;
    let limit = Some(arguments.calibration_windows);
    let options = Options { window: arguments.window, stride: None, limit };
    let bar = screen::count("comparing");
    let found = baseline::measure(&mut reference, &tokens, options, world, |done, windows| {
        bar.set_length(windows as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    found.context("the calibration text cannot be measured")
}

impl Arguments {
    /// The skip rate, where something is pruned.
    fn pruning(&self) -> Result<Option<f64>> {
        if self.baseline.iter().all(|kind| *kind == Baseline::Dense) {
            if self.skip.is_some() || !self.calibration.is_empty() {
                bail!("--skip and --calibration are for --baseline blocks or modules");
            }
            return Ok(None);
        }
        let rate = self.skip.context("--baseline blocks or modules needs --skip SHARE")?;
        if self.calibration.is_empty() {
            bail!("--baseline blocks or modules needs --calibration FILE, a plain text");
        }
        Ok(Some(rate))
    }
}

/// A model before it is measured.
struct Subject {
    name: String,
    engine: Engine,
    modules: usize,
    routed: usize,
    removed: Vec<skipgpt_passes::ir::ModuleId>,
}

/// What every model is measured on, and who measures it.
struct Asked<'a> {
    world: &'a dyn World,
    texts: Vec<PathBuf>,
    windows: Options,
    tasks: Vec<Task>,
    choices: choices::Options,
    earlier: Option<Earlier>,
    device: Device,
}

impl<'a> Asked<'a> {
    /// Reads the tasks and the earlier report, and holds what was asked for against them before
    /// anything is loaded.
    fn read(arguments: &Arguments, world: &'a dyn World) -> Result<Self> {
        let tasks = task::read_all(&arguments.choices)?;
        let all = arguments.separator.iter().flat_map(|text| {
            let text = breaks(text);
            tasks.iter().map(move |task| (task.name.clone(), text.clone()))
        });
        let choices = choices::Options {
            limit: arguments.limit,
            seed: arguments.seed,
            separators: all.chain(arguments.task_separator.iter().cloned()).collect(),
        };
        let earlier = arguments.against.as_deref().map(report::read).transpose()?;
        if let (Some(earlier), Some(path)) = (&earlier, &arguments.against) {
            pairs::check(&tasks, &choices, &earlier.choices)
                .with_context(|| format!("{}: cannot be compared with", path.display()))?;
        }
        let windows = Options {
            window: arguments.window,
            stride: arguments.stride,
            limit: arguments.windows.or(arguments.limit),
        };
        if !arguments.perplexity.is_empty() {
            windows.check()?;
        }
        if !tasks.is_empty() {
            choices::check::<Infallible>(&tasks, &choices)?;
        }
        let (texts, device) = (arguments.perplexity.clone(), arguments.device);
        Ok(Self { world, texts, windows, tasks, choices, earlier, device })
    }

    fn candle(
        &self,
        name: &str,
        tokenizer: &Tokenizer,
        checkpoint: &Checkpoint,
        model: &Model,
    ) -> Result<Measured> {
        let imported: Vec<_> = checkpoint.model.modules().collect();
        let mut decoder = sources::reference(model, checkpoint, self.device)?;
        self.measure(
            tokenizer,
            &mut decoder,
            Subject {
                name: name.to_owned(),
                engine: Engine::Candle,
                modules: 2 * model.config.num_hidden_layers,
                routed: model.routed_modules().count(),
                removed: imported.into_iter().filter(|id| model.routing(*id).is_none()).collect(),
            },
        )
    }

    fn measure<D: Peek>(
        &self,
        tokenizer: &Tokenizer,
        decoder: &mut D,
        subject: Subject,
    ) -> Result<Measured> {
        let Subject { name, engine, modules, routed, removed } = subject;
        let mut texts = Vec::new();
        for path in &self.texts {
            let tokens = sources::tokens(tokenizer, std::slice::from_ref(path))?;
            let bar = screen::count("predicting");
            let progress = |progress: eval::Progress| {
                bar.set_length(progress.windows as u64);
                bar.set_position(progress.done as u64);
                bar.set_message(format!("{name}, perplexity {:.2}", progress.perplexity));
            };
            let perplexity = eval::perplexity(decoder, &tokens, self.windows, self.world, progress)
                .with_context(|| path.display().to_string())?;
            bar.finish_and_clear();
            screen::note(format_args!("{name}: {} read", path.display()));
            texts.push(Text { text: path.display().to_string(), perplexity });
        }
        let mut scores = None;
        if !self.tasks.is_empty() {
            let bar = screen::count("choosing");
            let encode = |text: &str| tokenizer.encode(text, false);
            let mut task = String::new();
            let progress = |progress: choices::Progress<'_>| {
                if progress.task != task {
                    progress.task.clone_into(&mut task);
                    let (done, items) = (progress.done, progress.items);
                    let told = format!("{name}: {task}, from item {done} of {items} on");
                    bar.suspend(|| screen::note(told));
                }
                bar.set_length(progress.items as u64);
                bar.set_position(progress.done as u64);
                bar.set_message(format!("{name}, {}", progress.task));
            };
            let (tasks, options) = (&self.tasks, &self.choices);
            let found = choices::measure(decoder, tasks, options, &encode, self.world, progress)?;
            scores = Some(found);
            bar.finish_and_clear();
        }
        let (choices, comparison) = (scores, None);
        Ok(Measured { name, engine, modules, routed, removed, texts, choices, comparison })
    }
}

fn task_separator(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((task, separator)) if !task.is_empty() => Ok((task.to_owned(), breaks(separator))),
        _ => Err("expected TASK=TEXT, such as arc_easy='\\nAnswer: '".to_owned()),
    }
}

/// A shell's single quotes hold no line break, so `\n` stands for one.
fn breaks(text: &str) -> String {
    text.replace("\\n", "\n")
}
