//! `train`: routers, then an adapter around them.

use anyhow::{Result, bail};
use skipgpt_export::checkpoint::Checkpoint;
use skipgpt_export::text::Tokenizer;
use skipgpt_export::train::schedule::{Line, Rate, Shape};
use skipgpt_export::train::settings::{Estimator, Lora, Router, Settings, Stage, Target};
use skipgpt_export::train::{Options, Request, optimizer, run as train};
use skipgpt_export::world::World;

use super::{CheckpointArguments, Verdict, screen, sources};

mod arguments;
mod progress;

pub(crate) use arguments::Command;
use arguments::{
    CommonArguments, EstimatorArgument, LoraArguments, Preset, RouterArguments, Schedule,
};
use progress::{Bars, described};

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
        skip_of: arguments.skip_of.into(),
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
