//! The loop.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use super::batch::{Batch, Totals};
use super::data::{Order, Windows};
use super::metrics::{Evaluation, Log, Metrics, Step};
use super::network::{Network, Objective, Sampling};
use super::optimizer::{self, AdamW};
use super::settings::{self, Measure, Settings, Stage};
use super::share::Share;
use super::state::Store;
use super::{Error, Event, OnEvent, Outcome, Request, output};
use crate::model::dropout::Clock;
use crate::model::gradient::Estimator;
use crate::model::step::Decide;
use crate::world::World;

/// A run between two steps.
pub(super) struct Trainer<'a> {
    pub(super) world: &'a dyn World,
    pub(super) share: Share,
    pub(super) settings: &'a Settings,
    pub(super) order: Order,
    pub(super) training: Windows<'a>,
    pub(super) held_out: Option<Windows<'a>>,
    pub(super) network: Network,
    pub(super) optimizer: AdamW,
    pub(super) clock: Clock,
    pub(super) store: Store,
    /// Steps done.
    pub(super) step: u64,
    /// Tokens trained on.
    pub(super) tokens: u64,
    pub(super) recompute: bool,
}

impl Trainer<'_> {
    /// Trains to the last step and writes the result.
    pub(super) fn finish(
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
                Some(last) if !due || last == self.store.place(self.step) => last,
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
            let sampling = objective.sampling.as_ref();
            if self.network.on_device() {
                // One rank, so the pass is whole; loss and gradients come in one copy.
                let (totals, gradients) = self.network.gradients_on_device(&batch, &objective)?;
                self.add(&mut sums, number, &totals, sampling)?;
                sums.add_gradients(gradients);
                continue;
            }
            let forward = self.network.forward(&batch, &objective)?;
            let totals = self.share.totals(self.world, forward.totals)?;
            for (pass, totals) in self.share.passes(turn).zip(&totals) {
                self.add(&mut sums, first + pass, totals, sampling)?;
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
        let tokens = self.tokens_of(self.step..self.step + 1);
        self.step += 1;
        self.tokens += tokens;
        Ok(Step {
            step: self.step,
            loss: sums.loss,
            prediction: sums.prediction,
            keep: sums.keep,
            target: sampling.map(|(_, target)| target),
            tau: sampling.map(|(estimator, _)| estimator.tau()),
            rate,
            gradient_norm: norm,
            tokens: self.tokens,
            tokens_per_second: tokens as f64 / started.elapsed().as_secs_f64(),
        })
    }

    /// Adds what forward pass `pass` gave to `sums`, if it is a number.
    fn add(
        &mut self,
        sums: &mut Sums,
        pass: u64,
        totals: &Totals,
        sampling: Option<&Sampling>,
    ) -> Result<(), Error> {
        let loss = totals.loss(sampling);
        if !loss.is_finite() {
            return Err(self.not_finite("loss", loss, pass));
        }
        let measure = sampling.map(|sampling| sampling.measure).unwrap_or_default();
        sums.add(totals, loss, measure);
        Ok(())
    }

    /// How many tokens steps have, padding left out.
    pub(super) fn tokens_of(&mut self, steps: Range<u64>) -> u64 {
        let samples = (self.settings.accumulate * self.settings.batch) as u64;
        let samples = steps.start * samples..steps.end * samples;
        if self.training.uneven() {
            let lengths = samples.map(|at| self.training.length(self.order.window(at)) as u64);
            return lengths.sum();
        }
        (samples.end - samples.start) * self.settings.window as u64
    }

    /// How decisions are sampled in the step to come, and the target share of keeps; in router tuning.
    fn sampling(&self) -> Option<(Estimator, f64)> {
        let Stage::Router(router) = &self.settings.stage else { return None };
        let at = |line: &super::schedule::Line| line.at(self.step, self.settings.steps);
        let tau = at(&router.tau);
        let estimator = match router.estimator {
            settings::Estimator::Gumbel => Estimator::StraightThrough { tau },
            settings::Estimator::ReinMax => Estimator::ReinMax { tau },
        };
        Some((estimator, 1.0 - at(&router.skip)))
    }

    /// What `batch` is to be trained for, whose first token is `row` of pass `number`.
    fn objective(&self, number: u64, row: usize, batch: &Batch) -> Result<Objective, Error> {
        let sampling = match (&self.settings.stage, self.sampling()) {
            (Stage::Router(router), Some((estimator, target))) => {
                let rows = row..row + batch.rows();
                let noise = self
                    .network
                    .noise(self.settings.seed, number, rows)
                    .map_err(|source| Error::Compute { what: "drawing noise", source })?;
                let (measure, alpha) = (router.skip_of, router.alpha);
                Some(Sampling { estimator, noise, target, measure, alpha })
            }
            _ => None,
        };
        Ok(Objective { sampling, distill: self.settings.distill, recompute: self.recompute })
    }

    /// This rank's windows of forward pass `number`.
    fn batch(&mut self, number: u64) -> Result<Batch, Error> {
        let first = number * self.settings.batch as u64;
        let mut windows = Vec::with_capacity(self.share.windows.len());
        for window in self.share.windows.clone() {
            windows.push(self.training.tokens(self.order.window(first + window as u64))?);
        }
        Ok(Batch::new(windows, self.settings.window))
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
                let batch = Batch::new(vec![windows.tokens(index)?], windows.length(index));
                let (loss, counts) = self.network.evaluate(&batch, decide.clone())?;
                *found = Totals::new(loss.sum, loss.count, counts).0;
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
            skipped: sums.keep(Measure::Modules).map(|keep| 1.0 - keep),
            skipped_weights: sums.keep(Measure::Weights).map(|keep| 1.0 - keep),
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
    fn add(&mut self, pass: &Totals, loss: f64, measure: Measure) {
        self.loss += loss;
        self.prediction += pass.prediction();
        self.keep = pass.keep(measure).map(|keep| keep + self.keep.unwrap_or_default());
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
