//! What every layer of one step shares: who may attend to whom, and the rotary tables.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, bail};
use ndarray::Axis;
use skipgpt_passes::ir::ModuleId;

use super::Options;
use super::gradient::{self, Causal, Estimator};
use super::ops::Kernels;
use crate::decoder::{Input, Routing};
use crate::rope;

/// The tensors made from a step's mask and positions.
#[derive(Debug, Clone)]
pub struct Step {
    /// Rows of the batch.
    pub batch: usize,
    /// New tokens per row.
    pub sequence: usize,
    /// Cosines, `[batch, sequence, head_dim / 2]`.
    pub cos: Tensor,
    /// Sines, `[batch, sequence, head_dim / 2]`.
    pub sin: Tensor,
    /// Added to the scores, `[batch, 1, groups · sequence, total]`: 0 or −∞; `None` where every new
    /// token sees every token.
    pub mask: Option<Tensor>,
    /// Which form of the operations is used.
    pub kernels: Kernels,
    /// How routers' scores become decisions.
    pub(crate) decide: Decide,
    /// Where the step is whole sequences without padding, for training: attention in one piece.
    pub(super) causal: Option<Causal>,
    /// Margins `[rows]` that decide in place of a module's own router.
    follow: Vec<(ModuleId, Tensor)>,
}

/// How routers' scores become decisions.
#[derive(Debug, Clone)]
pub(crate) enum Decide {
    /// The higher score decides; a tie keeps.
    Argmax,
    /// Noise is added first, and gradients flow through the relaxation.
    Sampled(Relaxation),
    /// Routers are not asked: every module runs for every token.
    Always,
}

/// How one step's decisions are sampled.
#[derive(Debug, Clone)]
pub(crate) struct Relaxation {
    /// How, and how their gradients are estimated.
    pub(crate) estimator: Estimator,
    /// Differences of two Gumbel draws, `[rows]`, by module.
    pub(crate) noise: BTreeMap<ModuleId, Tensor>,
}

impl Step {
    /// The shared tensors of a step whose shapes were checked.
    pub(super) fn new(
        input: &Input,
        frequencies: &[f32],
        groups: usize,
        options: &Options,
    ) -> Result<Self> {
        let (batch, sequence) = (input.batch(), input.sequence());
        let (cos, sin) = rope::tables(frequencies, input.positions.iter().copied());
        let table = |values: Vec<f32>| {
            Tensor::from_vec(values, (batch, sequence, frequencies.len()), &Device::Cpu)?
                .to_device(&options.device)?
                .to_dtype(options.dtype)
        };
        Ok(Self {
            batch,
            sequence,
            cos: table(cos)?,
            sin: table(sin)?,
            mask: attention_mask(input, groups, &options.device)?,
            kernels: options.kernels,
            decide: Decide::Argmax,
            causal: None,
            follow: Vec::new(),
        })
    }

    /// A step of `batch` whole sequences of `sequence` tokens without padding, from an empty cache
    /// that is not filled: `f32` on the CPU, differentiable.
    pub(crate) fn whole(
        batch: usize,
        sequence: usize,
        frequencies: &[f32],
        decide: Decide,
    ) -> Result<Self> {
        let positions: Vec<i64> = (0..batch).flat_map(|_| 0..sequence as i64).collect();
        let (cos, sin) = rope::tables(frequencies, positions.into_iter());
        let table = |values: Vec<f32>| {
            Tensor::from_vec(values, (batch, sequence, frequencies.len()), &Device::Cpu)
        };
        let (cos, sin) = (table(cos)?, table(sin)?);
        Ok(Self {
            batch,
            sequence,
            causal: Some(Causal { sequence, cos: cos.clone(), sin: sin.clone() }),
            cos,
            sin,
            mask: None,
            kernels: Kernels::Differentiable,
            decide,
            follow: Vec::new(),
        })
    }

    /// The same step for [`Kernels::Device`]: its tensors where `base` is, the rotary tables in its
    /// precision.
    pub(crate) fn on_device(mut self, base: &Tensor) -> Result<Self> {
        let table = |table: &Tensor| table.to_device(base.device())?.to_dtype(base.dtype());
        (self.cos, self.sin) = (table(&self.cos)?, table(&self.sin)?);
        if let Some(causal) = &mut self.causal {
            (causal.cos, causal.sin) = (self.cos.clone(), self.sin.clone());
        }
        if let Decide::Sampled(relaxation) = &mut self.decide {
            for noise in relaxation.noise.values_mut() {
                *noise = noise.to_device(base.device())?;
            }
        }
        self.kernels = Kernels::Device;
        Ok(self)
    }

    /// Keep `[rows, 1]` of a module whose router says `margins` `[rows]`, where decisions are
    /// sampled.
    pub(super) fn sampled(&self, id: ModuleId, margins: &Tensor) -> Result<Option<Tensor>> {
        let Decide::Sampled(relaxation) = &self.decide else { return Ok(None) };
        let Some(noise) = relaxation.noise.get(&id) else {
            bail!("{id}: no noise was drawn for it");
        };
        gradient::sampled(margins, noise, relaxation.estimator).map(Some)
    }

    /// From here on the modules of `routing`, `[modules, batch, sequence]`, keep what it keeps.
    pub(super) fn follow(&mut self, routing: &Routing, device: &Device) -> Result<()> {
        for (&id, margins) in routing.modules.iter().zip(routing.margins.axis_iter(Axis(0))) {
            let margins = Tensor::from_iter(margins.iter().copied(), device)?;
            self.follow.push((id, margins));
        }
        Ok(())
    }

    /// The margins `[rows]` that decide for a module in place of its own router's.
    pub fn followed(&self, id: ModuleId) -> Option<&Tensor> {
        self.follow.iter().find(|(module, _)| *module == id).map(|(_, margins)| margins)
    }

    /// Number of new tokens of all rows.
    pub const fn rows(&self) -> usize {
        self.batch * self.sequence
    }
}

/// Each new token sees the real tokens up to itself. A padded one also sees itself: with nothing to
/// see its softmax would be 0/0, and the NaN would spread through the residual stream.
///
/// The query heads that share a key head are stacked along the sequence, hence `groups` copies.
fn attention_mask(input: &Input, groups: usize, device: &Device) -> Result<Option<Tensor>> {
    let (batch, sequence, past) = (input.batch(), input.sequence(), input.past());
    let total = past + sequence;
    if sequence == 1 && input.mask.iter().all(|&real| real == 1) {
        return Ok(None);
    }
    let mut mask = Vec::with_capacity(batch * groups * sequence * total);
    for row in input.mask.rows() {
        let first = mask.len();
        for own in past..total {
            mask.extend(row.iter().enumerate().map(|(seen, &real)| {
                let visible = seen == own || (seen < own && real == 1);
                if visible { 0.0_f32 } else { f32::NEG_INFINITY }
            }));
        }
        let end = mask.len();
        for _ in 1..groups {
            mask.extend_from_within(first..end);
        }
    }
    let mask = Tensor::from_vec(mask, (batch, 1, groups * sequence, total), &Device::Cpu)?;
    Ok(Some(mask.to_device(device)?.to_dtype(DType::F32)?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use ndarray::array;

    use super::*;
    use crate::decoder::Logits;

    #[test]
    fn padding_is_hidden_and_sees_itself() {
        let input = Input {
            ids: array![[0, 5]],
            mask: array![[0, 1, 0, 1]],
            positions: array![[0, 1]],
            logits: Logits::All,
        };
        let mask = attention_mask(&input, 2, &Device::Cpu).unwrap().unwrap();
        let (no, yes) = (f32::NEG_INFINITY, 0.0);
        let rows = [[no, yes, yes, no], [no, yes, no, yes]];
        assert_eq!(mask.dims(), [1, 1, 4, 4]);
        assert_eq!(
            mask.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            [rows.concat(), rows.concat()].concat()
        );
    }

    #[test]
    fn a_decoding_step_without_padding_needs_no_mask() {
        let mut input = Input::prompts(&[vec![1, 2]], Logits::Last).then(&[3]);
        assert!(attention_mask(&input, 2, &Device::Cpu).unwrap().is_none());
        input.mask[[0, 0]] = 0;
        assert!(attention_mask(&input, 2, &Device::Cpu).unwrap().is_some());
    }
}
