//! The model layer by layer: losses and gradients of a batch.
//!
//! The backward is driven here and not by one call over the whole graph. Each layer is a graph of
//! its own, from its input (a variable) to its output; what the layers after it computed enters as
//! the output's gradient ([`seed`]), and the graph is freed once its gradients are taken. With
//! recomputation only the layers' inputs are kept, and each graph is built a second time, with the
//! same noise, when its turn in the backward comes: memory then does not grow with depth.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Device, Result as Candle, Tensor, Var};
use skipgpt_passes::ir::{Dispatch, ModuleId, ModuleKind};

use super::attach;
use super::batch::{Batch, Counts, Totals};
use super::loss::{self, Loss};
use super::on_device;
use super::parameters::Parameter;
use super::random::{self, Use};
use super::settings::Measure;
use crate::model::gradient::{Estimator, hold, seed, widened};
use crate::model::layer::Decision;
use crate::model::router::Routing;
use crate::model::step::{Decide, Relaxation, Step};
use crate::model::{Error, Parts};

/// The frozen model with the parameters that are trained in it.
#[derive(Debug)]
pub(super) struct Network {
    pub(super) parts: Parts,
    pub(super) parameters: Vec<Parameter>,
}

/// What a forward pass is to be trained for.
#[derive(Debug, Clone)]
pub(super) struct Objective {
    /// Sampled decisions and the pull towards a target, in router tuning.
    pub(super) sampling: Option<Sampling>,
    /// Whether predictions are those of the dense model, in place of the text's.
    pub(super) distill: bool,
    /// Whether layers run again for their backward.
    pub(super) recompute: bool,
}

impl Objective {
    /// How routers' scores become decisions.
    pub(super) fn decide(&self) -> Decide {
        match &self.sampling {
            Some(Sampling { estimator, noise, .. }) => {
                Decide::Sampled(Relaxation { estimator: *estimator, noise: noise.clone() })
            }
            None => Decide::Argmax,
        }
    }
}

/// How decisions are sampled in one forward pass, and the pull.
#[derive(Debug, Clone)]
pub(super) struct Sampling {
    /// How, and how their gradients are estimated.
    pub(super) estimator: Estimator,
    /// Differences of Gumbel draws, `[rows]`, by module.
    pub(super) noise: BTreeMap<ModuleId, Tensor>,
    /// The share that should keep.
    pub(super) target: f64,
    /// Of what.
    pub(super) measure: Measure,
    /// How strong the pull is.
    pub(super) alpha: f64,
}

/// A forward pass that waits for its backward.
pub(super) struct Forward {
    step: Step,
    /// Of the batch.
    mask: Option<Tensor>,
    /// By layer; `None` where the layer is to run again.
    graphs: Vec<Option<Graph>>,
    inputs: Vec<Tensor>,
    /// Of the mean over the own windows, with respect to the last layer's output.
    gradient: Tensor,
    /// Of the own windows.
    pub(super) totals: Totals,
}

/// One layer's graph.
pub(super) struct Graph {
    /// The layer's input; `None` where nothing before it is trained.
    pub(super) x: Option<Var>,
    pub(super) y: Tensor,
    pub(super) decisions: Vec<Decision>,
}

impl Network {
    /// The modules that have routers.
    pub(super) fn routed(&self) -> Vec<ModuleId> {
        let mut routed = Vec::new();
        for layer in &self.parts.layers {
            let attention = layer.attention.as_ref().map(|module| &module.routing);
            let mlp = layer.mlp.as_ref().map(|module| &module.routing);
            for (kind, routing) in [(ModuleKind::Attention, attention), (ModuleKind::Mlp, mlp)] {
                if matches!(routing, Some(Routing::Routed { .. })) {
                    routed.push(ModuleId { layer: layer.index, kind });
                }
            }
        }
        routed
    }

    /// From now on argmax decisions compute the rows they keep and no others; on a device, where
    /// their number would have to be waited for, all.
    pub(super) fn gather(&mut self) {
        if self.on_device() {
            return;
        }
        for layer in &mut self.parts.layers {
            let attention = layer.attention.as_mut().map(|module| &mut module.routing);
            let mlp = layer.mlp.as_mut().map(|module| &mut module.routing);
            for routing in [attention, mlp].into_iter().flatten() {
                if let Routing::Routed { dispatch, .. } = routing {
                    *dispatch = Some(Dispatch::Gathered);
                }
            }
        }
    }

    /// The noise of the tokens `rows` of forward pass `number`.
    pub(super) fn noise(
        &self,
        seed: u64,
        number: u64,
        rows: Range<usize>,
    ) -> Candle<BTreeMap<ModuleId, Tensor>> {
        let mut noise = BTreeMap::new();
        for id in self.routed() {
            let module = 2 * id.layer as u64 + u64::from(id.kind == ModuleKind::Mlp);
            let mut random = random::generator(seed, Use::Gumbel, number, module);
            random::skip(&mut random, rows.start as u64);
            let draws: Vec<f32> =
                rows.clone().map(|_| random::gumbel_difference(&mut random)).collect();
            noise.insert(id, Tensor::from_vec(draws, rows.len(), &Device::Cpu)?);
        }
        Ok(noise)
    }

    /// The first half of a pass: everything up to the loss of `batch`, which may be a part of the
    /// pass' windows.
    pub(super) fn forward(&self, batch: &Batch, objective: &Objective) -> Result<Forward, Error> {
        let step = self.step(batch, objective.decide()).map_err(outside)?;
        let teacher = if objective.distill { Some(self.dense(batch)?) } else { None };

        let mut x = self.embed(batch).map_err(outside)?;
        let (mut inputs, mut graphs) = (Vec::new(), Vec::new());
        let mut counts = Counts::default();
        for at in 0..self.parts.layers.len() {
            let graph = self.layer(at, &x, &step)?;
            self.count(at, &graph, batch, &mut counts)?;
            let y = graph.y.detach();
            inputs.push(std::mem::replace(&mut x, y));
            graphs.push((!objective.recompute).then_some(graph));
        }
        let (loss, gradient) = self.head(&x, batch, teacher.as_ref(), true).map_err(outside)?;
        let totals = Totals::new(loss.sum, loss.count, counts);
        let mask = batch.mask().map_err(outside)?;
        Ok(Forward { step, mask, graphs, inputs, gradient, totals })
    }

    /// The second half: the gradients by parameter of the whole pass' loss, as far as they come from
    /// the windows of `forward`; `totals` are the whole pass'.
    pub(super) fn backward(
        &self,
        forward: Forward,
        sampling: Option<&Sampling>,
        totals: &Totals,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let Forward { step, mask, mut graphs, mut inputs, mut gradient, totals: own } = forward;
        let share = own.0[1] / totals.0[1].max(1.0);
        if own.0[1] < totals.0[1] {
            gradient = (gradient * share).map_err(outside)?;
        }
        let measure = sampling.map(|sampling| sampling.measure).unwrap_or_default();
        let pull = (totals.pull(sampling), measure);
        let mut gradients: Vec<_> =
            self.parameters.iter().map(|one| vec![0.0; one.len()]).collect();
        while let (Some(input), Some(graph)) = (inputs.pop(), graphs.pop()) {
            let at = inputs.len();
            let graph = match graph {
                Some(graph) => graph,
                None => self.layer(at, &input, &step)?,
            };
            let place = self.place(at);
            let mask = mask.as_ref();
            gradient =
                self.back(at, graph, &gradient, (pull, mask), &mut gradients).map_err(place)?;
        }
        Ok(gradients)
    }

    /// How well the text is predicted, and how many of the decisions keep.
    pub(super) fn evaluate(&self, batch: &Batch, decide: Decide) -> Result<(Loss, Counts), Error> {
        let step = self.step(batch, decide).map_err(outside)?;
        let mut counts = Counts::default();
        let x = self.walk(batch, &step, |at, graph| self.count(at, graph, batch, &mut counts))?;
        if self.on_device() {
            let (loss, _) = self.head_on_device(&x, batch, None).map_err(outside)?;
            let sum = loss.sum.to_scalar::<f32>().map_err(outside)?;
            let loss = Loss { sum: sum.into(), count: loss.count, gradient: Vec::new() };
            return Ok((loss, counts));
        }
        let (loss, _) = self.head(&x, batch, None, false).map_err(outside)?;
        Ok((loss, counts))
    }

    /// The final residual stream of the dense model.
    pub(super) fn dense(&self, batch: &Batch) -> Result<Tensor, Error> {
        let step = self.step(batch, Decide::Always).map_err(outside)?;
        self.walk(batch, &step, |_, _| Ok(()))
    }

    /// Runs the layers, keeping nothing; those of the dense model where routers are not asked.
    fn walk(
        &self,
        batch: &Batch,
        step: &Step,
        mut each: impl FnMut(usize, &Graph) -> Result<(), Error>,
    ) -> Result<Tensor, Error> {
        let mut x = self.embed(batch).map_err(outside)?;
        let dense = matches!(step.decide, Decide::Always);
        for (at, layer) in self.parts.layers.iter().enumerate() {
            let plain = dense.then(|| attach::without_adapters(layer));
            let mut decisions = Vec::new();
            let y = plain
                .as_ref()
                .unwrap_or(layer)
                .forward(&x, step, None, &mut decisions)
                .map_err(self.place(at))?;
            let graph = Graph { x: None, y: y.detach(), decisions };
            each(at, &graph)?;
            x = graph.y;
        }
        Ok(x)
    }

    pub(super) fn step(&self, batch: &Batch, decide: Decide) -> Candle<Step> {
        let step = Step::whole(batch.windows(), batch.window(), &self.parts.frequencies, decide)?;
        if self.on_device() { step.on_device(&self.parts.embedding) } else { Ok(step) }
    }

    /// `[rows, hidden]`.
    pub(super) fn embed(&self, batch: &Batch) -> Candle<Tensor> {
        let embedding = &self.parts.embedding;
        let ids = Tensor::from_slice(batch.ids(), batch.rows(), embedding.device())?;
        let x = embedding.index_select(&ids, 0)?;
        if self.on_device() { Ok(x) } else { widened(&x) }
    }

    pub(super) fn layer(&self, at: usize, x: &Tensor, step: &Step) -> Result<Graph, Error> {
        let place = self.place(at);
        // Every layer has something that is trained, so the first is the first.
        let x_var = if at == 0 { None } else { Some(Var::from_tensor(x).map_err(&place)?) };
        let x = x_var.as_ref().map_or(x, Var::as_tensor);
        let mut decisions = Vec::new();
        let y = self.parts.layers[at].forward(x, step, None, &mut decisions).map_err(&place)?;
        Ok(Graph { x: x_var, y, decisions })
    }

    /// What a decision of layer `at` counts as: 1, or the weights that skipping leaves out.
    pub(super) fn counts_as(&self, at: usize, kind: ModuleKind, measure: Measure) -> f64 {
        let id = ModuleId { layer: self.parts.layers[at].index, kind };
        let module = self.parts.modules.iter().find(|module| module.id == id);
        measure.of(module.map_or(0.0, |module| module.skippable as f64))
    }

    /// Adds a layer's decisions to `counts`.
    fn count(
        &self,
        at: usize,
        graph: &Graph,
        batch: &Batch,
        counts: &mut Counts,
    ) -> Result<(), Error> {
        for decision in &graph.decisions {
            let kept: Candle<f64> = match &decision.keep {
                // Of all rows: on a device none is padding.
                _ if self.on_device() => {
                    on_device::kept(decision).and_then(|k| k.to_scalar::<f32>()).map(f64::from)
                }
                Some(keep) => hold(keep).map(|keep| {
                    let real = keep.iter().zip(batch.real()).filter(|(_, real)| *real);
                    real.map(|(keep, _)| f64::from(*keep)).sum()
                }),
                None => decision.margins.contiguous().and_then(|margins| {
                    let margins = hold(&margins)?;
                    let real = margins.iter().zip(batch.real()).filter(|(_, real)| *real);
                    Ok(real.filter(|(margin, _)| **margin >= 0.0).count() as f64)
                }),
            };
            let weights = self.counts_as(at, decision.kind, Measure::Weights);
            counts.add(kept.map_err(self.place(at))?, batch.tokens(), weights);
        }
        Ok(())
    }

    /// The loss of the residual stream `x` after the last layer, and its gradient with respect to it.
    fn head(
        &self,
        x: &Tensor,
        batch: &Batch,
        teacher: Option<&Tensor>,
        gradient: bool,
    ) -> Candle<(Loss, Tensor)> {
        let weight = &widened(&self.parts.head.weight)?;
        let kernels = crate::model::ops::Kernels::Differentiable;
        let x = Var::from_tensor(x)?;
        let normed = self.parts.norm.forward(&x, kernels)?;
        let mut loss = match teacher {
            None => loss::next_token(&normed, weight, &batch.targets(), gradient)?,
            Some(teacher) => {
                let teacher = self.parts.norm.forward(teacher, kernels)?;
                let real: Vec<_> = batch.real().collect();
                loss::distilled(&normed, &teacher, weight, &real)?
            }
        };
        if !gradient {
            let none = x.detach();
            return Ok((loss, none));
        }
        let incoming = std::mem::take(&mut loss.gradient);
        let incoming = Tensor::from_vec(incoming, normed.shape(), &Device::Cpu)?;
        let mut store = seed(&normed, &incoming)?.backward()?;
        let gradient = match store.remove(&x) {
            Some(gradient) => gradient,
            None => x.zeros_like()?,
        };
        Ok((loss, gradient))
    }

    /// Takes a layer's graph back: adds to its parameters' gradients, gives its input's.
    fn back(
        &self,
        at: usize,
        graph: Graph,
        gradient: &Tensor,
        ((pull, measure), mask): ((f64, Measure), Option<&Tensor>),
        gradients: &mut [Vec<f32>],
    ) -> Candle<Tensor> {
        let mut root = seed(&graph.y, gradient)?;
        for decision in &graph.decisions {
            let Some(keep) = &decision.keep else { continue };
            let kept = mask.map_or_else(|| keep.sum_all(), |mask| (keep * mask)?.sum_all());
            let by = pull * self.counts_as(at, decision.kind, measure);
            root = (root + (kept? * by)?)?;
        }
        let mut store = root.backward()?;
        let own = self.parameters.iter().zip(gradients).filter(|(one, _)| one.layer == at);
        for (parameter, sum) in own {
            if let Some(gradient) = store.remove(&parameter.var) {
                let gradient = gradient.contiguous()?;
                let gradient = hold(&gradient)?;
                sum.iter_mut().zip(&*gradient).for_each(|(sum, value)| *sum += value);
            }
        }
        match graph.x.and_then(|x| store.remove(&x)) {
            Some(gradient) => Ok(gradient),
            // Below the first layer nothing is trained, and nobody reads this.
            None => gradient.zeros_like(),
        }
    }

    /// Names the layer at place `at` in an error.
    pub(super) fn place(&self, at: usize) -> impl Fn(candle_core::Error) -> Error {
        let layer = self.parts.layers.get(at).map(|layer| layer.index);
        move |source| Error::Compute { layer, source }
    }
}

pub(super) fn outside(source: candle_core::Error) -> Error {
    Error::Compute { layer: None, source }
}
