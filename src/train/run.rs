//! The loop.

use std::path::PathBuf;
use std::time::Instant;

use skipgpt_passes::ir::{self, GateUp, KeyValue};
use skipgpt_passes::validate::validate;

use super::attach;
use super::data::{Corpus, Order, Tokenisation, Windows};
use super::metrics::{Evaluation, Log, Metrics, Step};
use super::network::{Batch, Network, Objective, Sampling, Totals};
use super::optimizer::{self, AdamW};
use super::record::{self, Record};
use super::settings::{Settings, Stage};
use super::share::Share;
use super::state::Store;
use super::{Error, Event, OnEvent, Outcome, Request, events, output};
use crate::artifact::hash::{self, InputHashes};
use crate::model::dropout::Clock;
use crate::model::ops::Kernels;
use crate::model::step::Decide;
use crate::model::{self, Reference};
use crate::world::World;

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
    if request.options.tensorboard && !events::AVAILABLE {
        return Err(Error::NoTensorBoard);
    }
    let share = Share::new(world, settings.batch, settings.accumulate)?;
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
        };
        if request.resume {
            record.compare(request.output)?;
        } else {
            record.begin(request.output)?;
        }
    }
    let clock = Clock::default();
    let network = load(request, &clock)?;
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
        recompute: request.options.recompute,
    };
    if request.resume {
        trainer.step = trainer.store.load(&trainer.network.parameters, &mut trainer.optimizer)?;
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
    let routed = |routing: &ir::Routing| matches!(routing, ir::Routing::Routed { .. });
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
    let has_routers = model.layers.iter().any(|layer| {
        layer.attention.as_ref().is_some_and(|module| routed(&module.routing))
            || layer.mlp.as_ref().is_some_and(|module| routed(&module.routing))
    });
    match request.settings.stage {
        Stage::Lora(_) if !has_routers => Err(Error::NoRouters(checkpoint.directory.clone())),
        _ => Ok(()),
    }
}

/// Hashes of the files the model is made of.
fn identity(request: &Request<'_>) -> Result<Vec<String>, Error> {
    let digests = InputHashes::start(request.checkpoint.files.clone())?.finish()?;
    Ok(digests.into_iter().map(|digest| digest.sha256).collect())
}

/// The model with what the stage trains.
fn load(request: &Request<'_>, clock: &Clock) -> Result<Network, Error> {
    let checkpoint = request.checkpoint;
    let model = validate(&checkpoint.model).map_err(|violations| {
        let lines: Vec<_> = violations.0.iter().map(ToString::to_string).collect();
        Error::Invalid(lines.join("\n"))
    })?;
    let options = model::Options { kernels: Kernels::Differentiable, ..model::Options::default() };
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
        let limit = request.options.evaluation_windows;
        let all = Windows::new(&self.training, window, 1)?;
        if let Some(evaluation) = &self.evaluation {
            let held_out = Windows::new(evaluation, window, 1).map_err(Error::Evaluation)?;
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

/// A run between two steps.
struct Trainer<'a> {
    world: &'a dyn World,
    share: Share,
    settings: &'a Settings,
    order: Order,
    training: Windows<'a>,
    held_out: Option<Windows<'a>>,
    network: Network,
    optimizer: AdamW,
    clock: Clock,
    store: Store,
    /// Steps done.
    step: u64,
    recompute: bool,
}

impl Trainer<'_> {
    /// Trains to the last step and writes the result.
    fn finish(
        mut self,
        request: &Request<'_>,
        mut log: Option<Log>,
        on_event: OnEvent<'_>,
    ) -> Result<Outcome, Error> {
        let (steps, options) = (self.settings.steps, request.options);
        let begins = Event::Begins {
            step: self.step,
            steps,
            windows: self.training.len(),
            parameters: self.network.parameters.iter().map(super::parameters::Parameter::len).sum(),
        };
        let mut go_on = on_event(begins).is_continue();
        let mut write = |metrics| log.as_mut().map_or(Ok(()), |log| log.write(&metrics));
        let mut evaluation = None;
        if self.step == 0
            && let Some(dense) = self.evaluate(&Decide::Always)?
        {
            go_on &= on_event(Event::Dense(&dense)).is_continue();
            write(Metrics::Dense(dense))?;
        }
        let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
        while self.step < steps && self.all(go_on)? {
            let metrics = self.advance()?;
            go_on &= on_event(Event::Step(&metrics)).is_continue();
            write(Metrics::Step(metrics))?;
            let last = self.step == steps;
            if last || due(options.evaluate_every, self.step) {
                evaluation = self.evaluate(&Decide::Argmax)?;
                if let Some(evaluation) = &evaluation {
                    go_on &= on_event(Event::Evaluation(evaluation)).is_continue();
                    write(Metrics::Evaluation(evaluation.clone()))?;
                }
            }
            if (last || due(options.save_every, self.step)) && self.world.leads() {
                go_on &= on_event(Event::Saved(&self.save()?)).is_continue();
            }
        }
        if self.step < steps {
            let due = self.step > 0 && !due(options.save_every, self.step);
            let checkpoint = match self.store.last() {
                Some(last) if !due => last,
                _ if self.world.leads() => self.save()?,
                _ => self.store.place(self.step),
            };
            return Err(Error::Interrupted { step: self.step, checkpoint });
        }
        let written = if self.world.leads() { self.result(request)? } else { Vec::new() };
        self.world.meet()?;
        Ok(Outcome { written, evaluation })
    }

    /// Writes what the run was for.
    fn result(&self, request: &Request<'_>) -> Result<Vec<PathBuf>, Error> {
        let parameters = &self.network.parameters;
        match &self.settings.stage {
            Stage::Router(_) => output::routers(request.output, parameters, request.options.pth),
            Stage::Lora(lora) => {
                let base = &request.checkpoint.directory;
                output::adapter(request.output, parameters, lora, base)
            }
        }
    }

    /// Adds up the gradients of all ranks.
    fn sum(&self, gradients: &mut [Vec<f32>]) -> Result<(), Error> {
        if self.world.size() == 1 {
            return Ok(());
        }
        let mut all = gradients.concat();
        self.world.sum_f32(&mut all)?;
        let mut rest = &all[..];
        for gradient in gradients {
            let (own, others) = rest.split_at(gradient.len());
            gradient.copy_from_slice(own);
            rest = others;
        }
        Ok(())
    }

    /// Whether every rank is to go on.
    fn all(&self, go_on: bool) -> Result<bool, Error> {
        let mut breaks = [f64::from(u8::from(!go_on))];
        self.world.sum(&mut breaks)?;
        Ok(breaks[0] < 0.5)
    }

    fn save(&self) -> Result<PathBuf, Error> {
        Ok(self.store.save(self.step, &self.network.parameters, &self.optimizer)?)
    }

    /// One optimiser step.
    fn advance(&mut self) -> Result<Step, Error> {
        let started = Instant::now();
        let settings = self.settings;
        let passes = settings.accumulate as u64;
        let first = self.step * passes;
        let mut sums = Sums::default();
        for turn in 0..self.share.turns {
            let number = first + self.share.pass(turn);
            let batch = self.batch(number)?;
            let row = self.share.windows.start * settings.window;
            self.clock.set(Some((number, row)));
            let objective = self.objective(number, row, &batch)?;
            let forward = self.network.forward(&batch, &objective)?;
            let totals = self.share.totals(self.world, forward.totals)?;
            let sampling = objective.sampling.as_ref();
            for (pass, totals) in self.share.passes(turn).zip(&totals) {
                let loss = totals.loss(sampling);
                if !loss.is_finite() {
                    return Err(self.not_finite("loss", loss, first + pass));
                }
                sums.add(totals, loss);
            }
            let own = self.share.own(&totals);
            sums.add_gradients(self.network.backward(forward, sampling, own)?);
        }
        self.sum(&mut sums.gradients)?;
        sums.divide(passes as f64);
        let norm = optimizer::norm(&sums.gradients);
        if !norm.is_finite() {
            return Err(self.not_finite("gradient norm", norm, first));
        }
        let rate = settings.rate.at(self.step, settings.steps);
        self.optimizer
            .step(&self.network.parameters, &sums.gradients, self.step + 1, rate, norm)
            .map_err(|source| Error::Compute { what: "the optimiser's step", source })?;
        let sampling = self.sampling();
        self.step += 1;
        let tokens = passes * (settings.batch * settings.window) as u64;
        Ok(Step {
            step: self.step,
            loss: sums.loss,
            prediction: sums.prediction,
            keep: sums.keep,
            target: sampling.map(|(_, target)| target),
            tau: sampling.map(|(tau, _)| tau),
            rate,
            gradient_norm: norm,
            tokens: self.step * tokens,
            tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
        })
    }

    /// The temperature and the target share of keeps of the step to come, in router tuning.
    fn sampling(&self) -> Option<(f64, f64)> {
        let Stage::Router(router) = &self.settings.stage else { return None };
        let at = |line: &super::schedule::Line| line.at(self.step, self.settings.steps);
        Some((at(&router.tau), 1.0 - at(&router.skip)))
    }

    /// What `batch` is to be trained for, whose first token is `row` of pass `number`.
    fn objective(&self, number: u64, row: usize, batch: &Batch) -> Result<Objective, Error> {
        let sampling = match (&self.settings.stage, self.sampling()) {
            (Stage::Router(router), Some((tau, target))) => {
                let rows = row..row + batch.ids.len();
                let noise = self
                    .network
                    .noise(self.settings.seed, number, rows)
                    .map_err(|source| Error::Compute { what: "drawing noise", source })?;
                Some(Sampling { tau, noise, target, alpha: router.alpha })
            }
            _ => None,
        };
        Ok(Objective { sampling, distill: self.settings.distill, recompute: self.recompute })
    }

    /// This rank's windows of forward pass `number`.
    fn batch(&mut self, number: u64) -> Result<Batch, Error> {
        let mut ids = Vec::with_capacity(self.share.windows.len() * self.settings.window);
        let first = number * self.settings.batch as u64;
        for window in self.share.windows.clone() {
            ids.extend(self.training.tokens(self.order.window(first + window as u64))?);
        }
        Ok(Batch { ids, windows: self.share.windows.len() })
    }

    fn not_finite(&mut self, what: &'static str, value: f64, pass: u64) -> Error {
        let first = self.order.window(pass * self.settings.batch as u64);
        let (place, last) = (self.training.place(first), self.store.last());
        Error::NotFinite { step: self.step + 1, what, value, place, last }
    }

    /// Perplexity and skip rate on what is held out, if anything is; each rank runs its share.
    fn evaluate(&self, decide: &Decide) -> Result<Option<Evaluation>, Error> {
        let Some(windows) = &self.held_out else { return Ok(None) };
        self.clock.set(None);
        // Every window's place is another rank's zero, so that no sum depends on their number.
        let mut found = vec![0.0; windows.len() * Totals::COUNT];
        for (index, found) in found.as_chunks_mut().0.iter_mut().enumerate() {
            if self.world.takes(index) {
                let batch = Batch { ids: windows.tokens(index)?, windows: 1 };
                let (loss, (kept, of)) = self.network.evaluate(&batch, decide.clone())?;
                *found = [loss.sum, loss.count as f64, kept, of as f64];
            }
        }
        self.world.sum(&mut found)?;
        let mut sums = Totals::default();
        for found in found.as_chunks::<{ Totals::COUNT }>().0 {
            sums.0.iter_mut().zip(found).for_each(|(sum, value)| *sum += value);
        }
        Ok(Some(Evaluation {
            step: self.step,
            perplexity: sums.prediction().exp(),
            skipped: sums.keep().map(|keep| 1.0 - keep),
            windows: windows.len(),
        }))
    }
}

/// What the forward passes of a step gave together.
#[derive(Default)]
struct Sums {
    loss: f64,
    prediction: f64,
    keep: Option<f64>,
    gradients: Vec<Vec<f32>>,
}

impl Sums {
    fn add(&mut self, pass: &Totals, loss: f64) {
        self.loss += loss;
        self.prediction += pass.prediction();
        self.keep = pass.keep().map(|keep| keep + self.keep.unwrap_or_default());
    }

    fn add_gradients(&mut self, pass: Vec<Vec<f32>>) {
        if self.gradients.is_empty() {
            self.gradients = pass;
            return;
        }
        for (sums, gradients) in self.gradients.iter_mut().zip(&pass) {
            sums.iter_mut().zip(gradients).for_each(|(sum, value)| *sum += value);
        }
    }

    fn divide(&mut self, passes: f64) {
        self.loss /= passes;
        self.prediction /= passes;
        self.keep = self.keep.map(|keep| keep / passes);
        if passes > 1.0 {
            let factor = (1.0 / passes) as f32;
            self.gradients.iter_mut().flatten().for_each(|value| *value *= factor);
        }
    }
}
