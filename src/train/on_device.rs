//! Losses and gradients of a batch on a device: the walk of [`super::network`], of tensors alone.
//!
//! From the batch's upload to its end nothing waits for the device. How many decisions keep, and so
//! whether the pull towards the target is up or down, is computed there; losses, shares and the
//! gradients of every parameter come back in one copy at the end.

use candle_core::{D, DType, Device, Result as Candle, Tensor};

use super::batch::{Batch, Counts, Totals};
use super::network::{Graph, Network, Objective, Sampling, outside};
use super::settings::Measure;
use crate::model::Error;
use crate::model::gradient::seed;
use crate::model::layer::Decision;
use crate::model::ops::Kernels;

/// Most elements of a chunk's logits; in tests so few that every loss takes several chunks.
const CHUNK: usize = if cfg!(test) { 32 } else { 1 << 28 };

/// A loss over the rows of a batch.
pub(super) struct Loss {
    /// Sum over the rows that count, in nats: a scalar in `f32`.
    pub(super) sum: Tensor,
    /// How many count.
    pub(super) count: usize,
    /// Of the mean, with respect to the head's input, `[rows, hidden]`.
    pub(super) gradient: Tensor,
}

/// How many of a module's decisions keep, a scalar in `f32`.
pub(super) fn kept(decision: &Decision) -> Candle<Tensor> {
    match &decision.keep {
        Some(keep) => keep.detach().sum_all(),
        None => decision.margins.ge(0.0)?.to_dtype(DType::F32)?.sum_all(),
    }
}

/// As [`super::loss::next_token`].
pub(super) fn next_token(hidden: &Tensor, head: &Tensor, targets: &[Option<u32>]) -> Candle<Loss> {
    let device = hidden.device();
    let count = targets.iter().flatten().count();
    let ids: Vec<u32> = targets.iter().map(|target| target.unwrap_or_default()).collect();
    let counts: Vec<f32> = targets.iter().map(|t| f32::from(u8::from(t.is_some()))).collect();
    let rows = ids.len();
    let (ids, counts) =
        (Tensor::from_vec(ids, rows, device)?, Tensor::from_vec(counts, (rows, 1), device)?);
    chunks(&[hidden], head, count, |logits, (first, length)| {
        let (ids, counts) = (ids.narrow(0, first, length)?, counts.narrow(0, first, length)?);
        let (shares, log_sum) = shares(&logits[0])?;
        let own = logits[0].gather(&ids.unsqueeze(1)?.contiguous()?, 1)?;
        let sum = ((log_sum - own)? * &counts)?.sum_all()?;
        // Of the logits' gradient, p − onehot, the second part is a row of the head.
        let dtype = head.dtype();
        let along = shares.to_dtype(dtype)?.matmul(head)?.to_dtype(DType::F32)?;
        let own = head.index_select(&ids.contiguous()?, 0)?.to_dtype(DType::F32)?;
        Ok((sum, (along - own)?.broadcast_mul(&(counts / count.max(1) as f64)?)?))
    })
}

/// As [`super::loss::distilled`].
pub(super) fn distilled(hidden: &Tensor, teacher: &Tensor, head: &Tensor) -> Candle<Loss> {
    let count = hidden.dim(0)?;
    chunks(&[hidden, teacher], head, count, |logits, _| {
        let ((own, log_sum), (taught, taught_sum)) = (shares(&logits[0])?, shares(&logits[1])?);
        let logs = ((&logits[1] - &logits[0])?.broadcast_sub(&(taught_sum - log_sum)?))?;
        let sum = (&taught * logs)?.sum_all()?;
        let difference = ((own - taught)? / count.max(1) as f64)?;
        let gradient = difference.to_dtype(head.dtype())?.matmul(head)?;
        Ok((sum, gradient.to_dtype(DType::F32)?))
    })
}

/// Softmax over the last dimension, and the logarithm of its sum, `[rows, 1]`.
fn shares(logits: &Tensor) -> Candle<(Tensor, Tensor)> {
    let highest = logits.max_keepdim(D::Minus1)?;
    let powers = logits.broadcast_sub(&highest)?.exp()?;
    let sum = powers.sum_keepdim(D::Minus1)?;
    Ok((powers.broadcast_div(&sum)?, (sum.log()? + highest)?))
}

/// Sends the rows of `inputs` through the head a chunk at a time; `each` gives a chunk's loss and the
/// gradient of the first input's rows.
fn chunks<const N: usize>(
    inputs: &[&Tensor; N],
    head: &Tensor,
    count: usize,
    mut each: impl FnMut(&[Tensor], (usize, usize)) -> Candle<(Tensor, Tensor)>,
) -> Candle<Loss> {
    let hidden = inputs[0];
    let rows = hidden.dim(0)?;
    let length = (CHUNK / N / head.dim(0)?.max(1)).clamp(1, rows.max(1));
    let mut sum = Tensor::zeros((), DType::F32, hidden.device())?;
    let mut gradients = Vec::new();
    for first in (0..rows).step_by(length) {
        let chunk = (first, length.min(rows - first));
        let logits = inputs.iter().map(|input| {
            input.detach().narrow(0, chunk.0, chunk.1)?.matmul(&head.t()?)?.to_dtype(DType::F32)
        });
        let (part, gradient) = each(&logits.collect::<Candle<Vec<_>>>()?, chunk)?;
        sum = (sum + part)?;
        gradients.push(gradient.to_dtype(hidden.dtype())?);
    }
    Ok(Loss { sum, count, gradient: Tensor::cat(&gradients, 0)? })
}

impl Network {
    /// Whether its tensors are computed with as tensors alone.
    pub(super) fn on_device(&self) -> bool {
        self.parts.kernels == Kernels::Device
    }

    /// The loss of the residual stream `x` after the last layer, and its gradient with respect to it.
    pub(super) fn head_on_device(
        &self,
        x: &Tensor,
        batch: &Batch,
        teacher: Option<&Tensor>,
    ) -> Candle<(Loss, Tensor)> {
        let x = candle_core::Var::from_tensor(x)?;
        let normed = self.parts.norm.forward(&x, Kernels::Device)?;
        let head = &self.parts.head.weight;
        let loss = match teacher {
            None => next_token(&normed, head, &batch.targets())?,
            Some(teacher) => {
                distilled(&normed, &self.parts.norm.forward(teacher, Kernels::Device)?, head)?
            }
        };
        let mut store = seed(&normed, &loss.gradient)?.backward()?;
        let gradient = match store.remove(&x) {
            Some(gradient) => gradient,
            None => x.zeros_like()?,
        };
        Ok((loss, gradient))
    }

    /// [`Network::forward`] and [`Network::backward`] in one, on a device: what is summed over the
    /// windows of `batch`, which are the whole pass' and without padding, and the gradients by
    /// parameter.
    pub(super) fn gradients_on_device(
        &self,
        batch: &Batch,
        objective: &Objective,
    ) -> Result<(Totals, Vec<Vec<f32>>), Error> {
        let step = self.step(batch, objective.decide()).map_err(outside)?;
        let teacher = if objective.distill { Some(self.dense(batch)?) } else { None };
        let mut x = self.embed(batch).map_err(outside)?;
        let (mut inputs, mut graphs) = (Vec::new(), Vec::new());
        let mut modules = Vec::new();
        for at in 0..self.parts.layers.len() {
            let graph = self.layer(at, &x, &step)?;
            for decision in &graph.decisions {
                modules.push(Module {
                    kept: kept(decision).map_err(self.place(at))?,
                    decisions: decision.margins.elem_count(),
                    weights: self.counts_as(at, decision.kind, Measure::Weights),
                });
            }
            let y = graph.y.detach();
            inputs.push(std::mem::replace(&mut x, y));
            graphs.push((!objective.recompute).then_some(graph));
        }
        let (loss, mut gradient) =
            self.head_on_device(&x, batch, teacher.as_ref()).map_err(outside)?;
        let pull = match &objective.sampling {
            Some(sampling) => pull(&modules, sampling).map_err(outside)?,
            None => None,
        };
        let mut sums: Vec<Option<Tensor>> = vec![None; self.parameters.len()];
        while let (Some(input), Some(graph)) = (inputs.pop(), graphs.pop()) {
            let at = inputs.len();
            let graph = match graph {
                Some(graph) => graph,
                None => self.layer(at, &input, &step)?,
            };
            let pull = pull.as_ref().zip(objective.sampling.as_ref());
            let back = self.back_on_device(at, graph, &gradient, pull, &mut sums);
            gradient = back.map_err(self.place(at))?;
        }
        self.read(&loss, &modules, &sums).map_err(outside)
    }

    /// [`Network::back`], on a device.
    fn back_on_device(
        &self,
        at: usize,
        graph: Graph,
        gradient: &Tensor,
        pull: Option<(&Tensor, &Sampling)>,
        sums: &mut [Option<Tensor>],
    ) -> Candle<Tensor> {
        let mut root = seed(&graph.y, gradient)?;
        if let Some((pull, sampling)) = pull {
            for decision in &graph.decisions {
                let Some(keep) = &decision.keep else { continue };
                let by = self.counts_as(at, decision.kind, sampling.measure);
                root = (root + ((keep.sum_all()? * pull)? * by)?)?;
            }
        }
        let mut store = root.backward()?;
        for (parameter, sum) in self.parameters.iter().zip(sums) {
            if parameter.layer == at
                && let Some(gradient) = store.remove(&parameter.var)
            {
                *sum = Some(match sum.take() {
                    Some(sum) => (sum + gradient)?,
                    None => gradient,
                });
            }
        }
        match graph.x.and_then(|x| store.remove(&x)) {
            Some(gradient) => Ok(gradient),
            // Below the first layer nothing is trained, and nobody reads this.
            None => gradient.zeros_like(),
        }
    }

    /// What the pass gave, in one copy.
    fn read(
        &self,
        loss: &Loss,
        modules: &[Module],
        sums: &[Option<Tensor>],
    ) -> Candle<(Totals, Vec<Vec<f32>>)> {
        let device = loss.sum.device();
        let mut parts = vec![loss.sum.reshape(1)?];
        for one in modules {
            parts.push(one.kept.reshape(1)?);
        }
        for (parameter, sum) in self.parameters.iter().zip(sums) {
            parts.push(match sum {
                Some(sum) => sum.flatten_all()?.to_dtype(DType::F32)?,
                None => Tensor::zeros(parameter.len(), DType::F32, device)?,
            });
        }
        let values = Tensor::cat(&parts, 0)?.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
        let (scalars, mut rest) = values.split_at(1 + modules.len());
        let mut counts = Counts::default();
        for (one, kept) in modules.iter().zip(&scalars[1..]) {
            counts.add(f64::from(*kept), one.decisions, one.weights);
        }
        let totals = Totals::new(scalars[0].into(), loss.count, counts);
        let mut gradients = Vec::new();
        for parameter in &self.parameters {
            let (own, others) = rest.split_at(parameter.len());
            gradients.push(own.to_vec());
            rest = others;
        }
        Ok((totals, gradients))
    }
}

/// A module's decisions in a pass.
struct Module {
    /// How many keep, a scalar in `f32`.
    kept: Tensor,
    decisions: usize,
    /// The weights that one which skips does without.
    weights: f64,
}

/// What the loss gains by the pull alone, by unit of the measure that keeps; `None` if nothing is routed.
fn pull(modules: &[Module], sampling: &Sampling) -> Candle<Option<Tensor>> {
    let unit = |one: &Module| sampling.measure.of(one.weights);
    let all: f64 = modules.iter().map(|one| one.decisions as f64 * unit(one)).sum();
    let Some((first, others)) = modules.split_first() else { return Ok(None) };
    // Counts of whole numbers: exact in `f32` up to 2^24 by module, and summed as shares after.
    let share = |one: &Module| &one.kept * (unit(one) / all);
    let mut keep = share(first)?;
    for one in others {
        keep = (keep + share(one)?)?;
    }
    (direction(&keep, sampling.target)? * (sampling.alpha / all)).map(Some)
}

/// 1 where `keep` is over the target, −1 where it is under, 0 on it.
fn direction(keep: &Tensor, target: f64) -> Candle<Tensor> {
    let above = keep.gt(target)?.to_dtype(DType::F32)?;
    let below = keep.lt(target)?.to_dtype(DType::F32)?;
    above - below
}

#[cfg(test)]
mod tests;
