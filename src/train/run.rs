//! The loop.

use std::path::PathBuf;
use std::time::Instant;

use skipgpt_passes::ir::{self, GateUp, KeyValue};
use skipgpt_passes::validate::validate;

use super::attach;
use super::data::{Corpus, Order, Tokenisation, Windows};
use super::metrics::{Evaluation, Log, Metrics, Step};
use super::network::{Batch, Network, Objective, Pass, Sampling};
use super::optimizer::{self, AdamW};
use super::record::{self, Record};
use super::settings::{Settings, Stage};
use super::state::Store;
use super::{Error, Event, OnEvent, Outcome, Request, output};
use crate::artifact::hash::InputHashes;
use crate::device::Compute;
use crate::model::dropout::Clock;
use crate::model::step::Decide;
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
    let (checkpoint, settings) = (request.checkpoint, request.settings);
    settings.check(checkpoint.model.config.max_position_embeddings)?;
    check_stage(request)?;
    let options = request.place.options()?;
    if request.resume {
        record::occupied(request.output)?;
    } else {
        record::vacant(request.output)?;
    }
    let texts = Texts::open(request, on_event)?;
    let (training, held_out) = texts.windows(request)?;
    let record = Record {
        version: record::VERSION,
        settings: settings.clone(),
        checkpoint: identity(request)?,
        text: texts.training.keys(),
        evaluation: texts.evaluation.as_ref().map(Corpus::keys).unwrap_or_default(),
        place: request.place,
    };
    if request.resume {
        record.compare(request.output)?;
    }
    let clock = Clock::default();
    let network = load(request, options, &clock)?;
    let optimizer = AdamW::new(settings.optimizer, &network.parameters);
    let store = Store::new(request.output, request.options.keep_checkpoints);
    let mut trainer = Trainer {
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
    } else {
        record.begin(request.output)?;
    }
    let log = Log::open(request.output, trainer.step)?;
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
    match &request.settings.stage {
        Stage::Lora(lora) if request.place.device == Compute::Cuda && lora.dropout > 0.0 => {
            return Err(Error::Dropout(lora.dropout));
        }
        _ => {}
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
        };
        let mut progress = |progress| on_event(Event::Tokenising(progress));
        let training = Corpus::open(request.text, how, &mut progress)?;
        let evaluation = if request.evaluation.is_empty() {
            None
        } else {
            let corpus = Corpus::open(request.evaluation, how, &mut progress);
            Some(corpus.map_err(Error::Evaluation)?)
        };
        Ok(Self { training, evaluation })
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
        mut log: Log,
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
        let mut evaluation = None;
        if self.step == 0
            && let Some(dense) = self.evaluate(&Decide::Always)?
        {
            go_on &= on_event(Event::Dense(&dense)).is_continue();
            log.write(&Metrics::Dense(dense))?;
        }
        let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
        while self.step < steps && go_on {
            let metrics = self.advance()?;
            go_on &= on_event(Event::Step(&metrics)).is_continue();
            log.write(&Metrics::Step(metrics))?;
            let last = self.step == steps;
            if last || due(options.evaluate_every, self.step) {
                evaluation = self.evaluate(&Decide::Argmax)?;
                if let Some(evaluation) = &evaluation {
                    go_on &= on_event(Event::Evaluation(evaluation)).is_continue();
                    log.write(&Metrics::Evaluation(evaluation.clone()))?;
                }
            }
            if last || due(options.save_every, self.step) {
                go_on &= on_event(Event::Saved(&self.save()?)).is_continue();
            }
        }
        if self.step < steps {
            let due = self.step > 0 && !due(options.save_every, self.step);
            let checkpoint = match self.store.last() {
                Some(last) if !due => last,
                _ => self.save()?,
            };
            return Err(Error::Interrupted { step: self.step, checkpoint });
        }
        let parameters = &self.network.parameters;
        let written = match &self.settings.stage {
            Stage::Router(_) => output::routers(request.output, parameters, options.pth)?,
            Stage::Lora(lora) => {
                let base = &request.checkpoint.directory;
                output::adapter(request.output, parameters, lora, base)?
            }
        };
        Ok(Outcome { written, evaluation })
    }

    fn save(&self) -> Result<PathBuf, Error> {
        Ok(self.store.save(self.step, &self.network.parameters, &self.optimizer)?)
    }

    /// One optimiser step.
    fn advance(&mut self) -> Result<Step, Error> {
        let started = Instant::now();
        let settings = self.settings;
        let passes = settings.accumulate as u64;
        let mut sums = Sums::default();
        for pass in 0..passes {
            let number = self.step * passes + pass;
            let (batch, first) = self.batch(number)?;
            self.clock.set(Some(number));
            let computed = self.network.gradients(&batch, &self.objective(number, &batch)?)?;
            if !computed.loss.is_finite() {
                return Err(self.not_finite("loss", computed.loss, first));
            }
            sums.add(computed);
        }
        // The gradients of every pass, whoever computed them, are together from here on.
        sums.divide(passes as f64);
        let norm = optimizer::norm(&sums.gradients);
        if !norm.is_finite() {
            let first = self.order.window(self.step * passes * settings.batch as u64);
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

    fn objective(&self, number: u64, batch: &Batch) -> Result<Objective, Error> {
        let sampling = match (&self.settings.stage, self.sampling()) {
            (Stage::Router(router), Some((tau, target))) => {
                let noise = self
                    .network
                    .noise(self.settings.seed, number, batch.ids.len())
                    .map_err(|source| Error::Compute { what: "drawing noise", source })?;
                Some(Sampling { tau, noise, target, alpha: router.alpha })
            }
            _ => None,
        };
        Ok(Objective { sampling, distill: self.settings.distill, recompute: self.recompute })
    }

    /// The windows of forward pass `number`, and which is the first.
    fn batch(&mut self, number: u64) -> Result<(Batch, usize), Error> {
        let windows = self.settings.batch;
        let mut ids = Vec::with_capacity(windows * self.settings.window);
        let start = number * windows as u64;
        let first = self.order.window(start);
        for sample in start..start + windows as u64 {
            ids.extend(self.training.tokens(self.order.window(sample))?);
        }
        Ok((Batch { ids, windows }, first))
    }

    fn not_finite(&self, what: &'static str, value: f64, first: usize) -> Error {
        let (place, last) = (self.training.place(first), self.store.last());
        Error::NotFinite { step: self.step + 1, what, value, place, last }
    }

    /// Perplexity and skip rate on what is held out, if anything is.
    fn evaluate(&self, decide: &Decide) -> Result<Option<Evaluation>, Error> {
        let Some(windows) = &self.held_out else { return Ok(None) };
        self.clock.set(None);
        let (mut sum, mut count, mut keeps, mut decisions) = (0.0, 0, 0.0, 0);
        for index in 0..windows.len() {
            let batch = Batch { ids: windows.tokens(index)?, windows: 1 };
            let (loss, (kept, of)) = self.network.evaluate(&batch, decide.clone())?;
            sum += loss.sum;
            count += loss.count;
            keeps += kept;
            decisions += of;
        }
        Ok(Some(Evaluation {
            step: self.step,
            perplexity: (sum / count.max(1) as f64).exp(),
            skipped: (decisions > 0).then(|| 1.0 - keeps / decisions as f64),
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
    fn add(&mut self, pass: Pass) {
        self.loss += pass.loss;
        self.prediction += pass.prediction;
        self.keep = pass.keep.map(|keep| keep + self.keep.unwrap_or_default());
        if self.gradients.is_empty() {
            self.gradients = pass.gradients;
            return;
        }
        for (sums, gradients) in self.gradients.iter_mut().zip(&pass.gradients) {
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
