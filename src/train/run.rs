//! What a run begins with: its directory, its texts, its model.

use skipgpt_passes::ir::{self, GateUp, KeyValue};
use skipgpt_passes::validate::validate;

use super::attach;
use super::data::{Corpus, Cut, Order, Tokenisation, Windows};
use super::metrics::Log;
use super::network::Network;
use super::optimizer::AdamW;
use super::record::{self, Record};
use super::settings::{Base, Stage};
use super::share::Share;
use super::state::Store;
use super::trainer::Trainer;
use super::{Error, Event, OnEvent, Outcome, Request, events};
use crate::artifact::hash::{self, InputHashes};
use crate::device::Compute;
use crate::model::dropout::Clock;
use crate::model::ops::Kernels;
use crate::model::{Options, Reference};

/// Where texts are kept tokenised, in the run's directory.
pub(super) const TOKENS: &str = "tokens";

/// Trains, from the beginning or from the last checkpoint, to the end.
///
/// # Errors
///
/// [`Error::NotFinite`] and [`Error::Interrupted`] leave the checkpoints so far; the other variants
/// say what is wrong with the request, its inputs or the directory.
pub fn run(request: &Request<'_>, on_event: OnEvent<'_>) -> Result<Outcome, Error> {
    let (checkpoint, settings, world) = (request.checkpoint, request.settings, request.world);
    settings.check(checkpoint.model.config.max_position_embeddings)?;
    check_stage(request)?;
    check_device(request)?;
    if request.options.tensorboard && !events::AVAILABLE {
        return Err(Error::NoTensorBoard);
    }
    let share = Share::new(world, settings.batch, settings.accumulate)?;
    let options = options(request)?;
    if world.leads() {
        if request.resume {
            record::occupied(request.output)?;
        } else {
            record::vacant(request.output)?;
        }
    }
    let texts = Texts::open(request, on_event)?;
    let (training, held_out) = texts.windows(request)?;
    if world.leads() {
        let record = Record {
            version: record::VERSION,
            settings: settings.clone(),
            checkpoint: identity(request)?,
            text: texts.training.keys(),
            evaluation: texts.evaluation.as_ref().map(Corpus::keys).unwrap_or_default(),
            device: request.device,
        };
        if request.resume {
            record.compare(request.output)?;
        } else {
            record.begin(request.output)?;
        }
    }
    let clock = Clock::default();
    let network = load(request, options, &clock)?;
    let optimizer = AdamW::new(settings.optimizer, &network.parameters);
    let store = Store::new(request.output, request.options.keep_checkpoints);
    let mut trainer = Trainer {
        world,
        share,
        settings,
        order: Order::new(settings.seed, training.len()),
        training,
        held_out,
        network,
        optimizer,
        clock,
        store,
        step: 0,
        tokens: 0,
        recompute: request.options.recompute,
    };
    if request.resume {
        trainer.step = trainer.store.load(&trainer.network.parameters, &mut trainer.optimizer)?;
        trainer.tokens = trainer.tokens_of(0..trainer.step);
    }
    texts.agree(request, trainer.step)?;
    let options = &request.options;
    let log = world
        .leads()
        .then(|| Log::open(request.output, trainer.step, options.tensorboard))
        .transpose()?;
    trainer.finish(request, log, on_event)
}

/// Refuses a checkpoint that the stage cannot begin from.
fn check_stage(request: &Request<'_>) -> Result<(), Error> {
    let checkpoint = request.checkpoint;
    let model = &checkpoint.model;
    let adapted = |layer: &ir::Layer| {
        let attention = layer.attention.iter().flat_map(|module| {
            let KeyValue::Separate { k, v } = &module.kv else { return vec![] };
            vec![&module.q, k, v, &module.o]
        });
        let mlp = layer.mlp.iter().flat_map(|module| {
            let GateUp::Separate { gate, up } = &module.gate_up else { return vec![] };
            vec![gate, up, &module.down]
        });
        attention.chain(mlp).any(|linear| linear.lora.is_some())
    };
    if model.head.lora.is_some() || model.layers.iter().any(adapted) {
        return Err(Error::Adapted(checkpoint.directory.clone()));
    }
    let has_routers = model.routed_modules().next().is_some();
    match request.settings.stage {
        Stage::Lora(_) if !has_routers => Err(Error::NoRouters(checkpoint.directory.clone())),
        _ => Ok(()),
    }
}

/// Refuses what a device does not do.
fn check_device(request: &Request<'_>) -> Result<(), Error> {
    let (settings, processes) = (request.settings, request.world.size());
    match (request.device, &settings.stage) {
        (Compute::Cpu, _) => Ok(()),
        (Compute::Cuda, Stage::Lora(lora)) if lora.dropout > 0.0 => {
            Err(Error::Dropout(lora.dropout))
        }
        _ if settings.pad => Err(Error::Padding),
        _ if processes > 1 => Err(Error::Processes(processes)),
        _ if settings.base == Base::F16 => Err(Error::SmallGradients),
        _ => Ok(()),
    }
}

/// How the model is loaded: on a device activations have the base's precision too.
fn options(request: &Request<'_>) -> Result<Options, Error> {
    let (device, base) = (request.device.open()?, request.settings.base.dtype());
    Ok(match request.device {
        Compute::Cpu => Options {
            device,
            matrices: Some(base),
            kernels: Kernels::Differentiable,
            ..Options::default()
        },
        Compute::Cuda => {
            Options { device, dtype: base, kernels: Kernels::Device, ..Options::default() }
        }
    })
}

/// Hashes of the files the model is made of.
fn identity(request: &Request<'_>) -> Result<Vec<String>, Error> {
    let digests = InputHashes::start(request.checkpoint.files.clone())?.finish()?;
    Ok(digests.into_iter().map(|digest| digest.sha256).collect())
}

/// The model with what the stage trains.
fn load(request: &Request<'_>, options: Options, clock: &Clock) -> Result<Network, Error> {
    let checkpoint = request.checkpoint;
    let model = validate(&checkpoint.model).map_err(|violations| {
        let lines: Vec<_> = violations.0.iter().map(ToString::to_string).collect();
        Error::Invalid(lines.join("\n"))
    })?;
    let parts = Reference::load_with(model, &checkpoint.sources, options)?.into_parts();
    let seed = request.settings.seed;
    let network = match &request.settings.stage {
        Stage::Router(router) => attach::routers(parts, router, seed)?,
        Stage::Lora(lora) => attach::adapters(parts, lora, seed, clock)?,
    };
    if network.parameters.is_empty() {
        return Err(Error::NothingToTrain);
    }
    Ok(network)
}

/// The texts of a run, tokenised.
struct Texts {
    training: Corpus,
    evaluation: Option<Corpus>,
}

impl Texts {
    fn open(request: &Request<'_>, on_event: OnEvent<'_>) -> Result<Self, Error> {
        let own = request.output.join(TOKENS);
        let how = Tokenisation {
            tokenizer: request.tokenizer,
            directory: &request.checkpoint.directory,
            vocab: request.checkpoint.model.config.vocab_size,
            cache: request.cache.unwrap_or(&own),
            field: request.text_field,
        };
        if !request.world.leads() {
            // The first rank tokenises, and the others find what it made.
            request.world.meet()?;
        }
        let mut progress = |progress| on_event(Event::Tokenising(progress));
        let training = Corpus::open(request.text, how, &mut progress)?;
        let evaluation = if request.evaluation.is_empty() {
            None
        } else {
            let corpus = Corpus::open(request.evaluation, how, &mut progress);
            Some(corpus.map_err(Error::Evaluation)?)
        };
        if request.world.leads() {
            request.world.meet()?;
        }
        Ok(Self { training, evaluation })
    }

    /// Refuses ranks that see other texts or another checkpoint than the first: the run's directory
    /// and the texts must be the same for all.
    fn agree(&self, request: &Request<'_>, step: u64) -> Result<(), Error> {
        let keys = self.training.keys().into_iter();
        let keys = keys.chain(self.evaluation.iter().flat_map(Corpus::keys));
        let digest = hash::of_bytes(keys.collect::<Vec<_>>().join(" ").as_bytes()).sha256;
        let number = u32::from_str_radix(&digest[..8], 16).unwrap_or_default();
        let own = [step as f64, f64::from(number)];
        let mut sums = own;
        request.world.sum(&mut sums)?;
        let size = request.world.size() as f64;
        for (what, (own, sum)) in
            ["the last checkpoint", "the texts"].iter().zip(own.iter().zip(sums))
        {
            // Whole numbers, far under 2^53.
            if (own * size - sum).abs() > 0.5 {
                return Err(Error::Unlike { what });
            }
        }
        Ok(())
    }

    /// What is trained on, and what is evaluated on.
    fn windows(&self, request: &Request<'_>) -> Result<(Windows<'_>, Option<Windows<'_>>), Error> {
        let window = request.settings.window;
        let cut = if request.settings.pad { Cut::Apart } else { Cut::Packed };
        let limit = request.options.evaluation_windows;
        let all = Windows::new(&self.training, window, cut, 1)?;
        if let Some(evaluation) = &self.evaluation {
            let held_out = Windows::new(evaluation, window, cut, 1).map_err(Error::Evaluation)?;
            return Ok((all, Some(held_out.take(limit))));
        }
        match request.settings.hold_out {
            None => Ok((all, None)),
            Some(share) => {
                let (training, held_out) = all.hold_out(share)?;
                Ok((training, Some(held_out.take(limit))))
            }
        }
    }
}
