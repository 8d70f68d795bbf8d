//! Runs a step: checks its arrays, drives the layers, copies the results out.

use candle_core::{DType, Device, Result as Candle, Tensor};
use ndarray::{Array2, Array3, Array4};
use skipgpt_passes::ir::ModuleId;

use super::cache::Cache;
use super::layer::Observer;
use super::step::Step;
use super::{Error, Reference, Trace};
use crate::decoder::{CacheEntry, Decoder, Follow, Input, Logits, Output, Peek, Routing};

/// A step's results, as tensors.
struct Results {
    /// `[batch, sequence or 1, vocab]`.
    logits: Tensor,
    /// `[batch · sequence]` each.
    margins: Vec<(ModuleId, Tensor)>,
}

impl Decoder for Reference {
    type Error = Error;

    fn reset(&mut self) {
        self.caches.fill_with(Cache::default);
        self.cached = (0, 0);
    }

    fn step(&mut self, input: &Input) -> Result<Output, Error> {
        let results = self.run(input, None, &mut |_| Ok(()))?;
        output(input, &results)
    }

    /// Empty before the first step.
    fn cache(&self) -> Result<Vec<CacheEntry>, Error> {
        let mut entries = Vec::new();
        for (layer, cache) in self.layers.iter().zip(&self.caches) {
            let index = Some(layer.index);
            if let Some((key, value)) = cache.view().map_err(compute(index))? {
                let copy = |tensor: &Tensor| -> Result<Array4<f32>, Error> {
                    let shape = tensor.dims4().map_err(compute(index))?;
                    let values = to_host(tensor).map_err(compute(index))?;
                    Ok(Array4::from_shape_vec(shape, values)?)
                };
                entries.push(CacheEntry {
                    layer: layer.index,
                    key: copy(&key)?,
                    value: copy(&value)?,
                });
            }
        }
        Ok(entries)
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }
}

impl Follow for Reference {
    fn follow(&mut self, input: &Input, routing: &Routing) -> Result<Output, Error> {
        let results = self.run(input, Some(routing), &mut |_| Ok(()))?;
        output(input, &results)
    }
}

impl Peek for Reference {
    fn peek(&mut self, input: &Input) -> Result<Output, Error> {
        let before = self.cached;
        let output = self.step(input)?;
        self.caches.iter_mut().for_each(|cache| cache.truncate(before.1));
        self.cached = before;
        Ok(output)
    }
}

impl Reference {
    /// As [`Decoder::step`], with what every layer read.
    ///
    /// # Errors
    ///
    /// As [`Decoder::step`].
    pub fn step_traced(&mut self, input: &Input) -> Result<(Output, Trace), Error> {
        let mut layer_inputs = Vec::new();
        let results = self.run(input, None, &mut |change| {
            if change.module.is_none() {
                layer_inputs.push(change.before.clone());
            }
            Ok(())
        })?;
        let mut values = Vec::new();
        for (layer, tensor) in self.layers.iter().zip(&layer_inputs) {
            values.extend(to_host(tensor).map_err(compute(Some(layer.index)))?);
        }
        let shape = (self.layers.len(), input.batch(), input.sequence(), self.config.hidden_size);
        let trace = Trace {
            layers: self.layers.iter().map(|layer| layer.index).collect(),
            inputs: Array4::from_shape_vec(shape, values)?,
        };
        Ok((output(input, &results)?, trace))
    }

    /// As [`Decoder::step`]; `observe` hears of every change to the residual stream.
    ///
    /// # Errors
    ///
    /// As [`Decoder::step`], and those of `observe` as [`Error::Compute`] of the layer.
    pub fn step_observed(
        &mut self,
        input: &Input,
        observe: &mut Observer<'_>,
    ) -> Result<Output, Error> {
        let results = self.run(input, None, observe)?;
        output(input, &results)
    }

    fn run(
        &mut self,
        input: &Input,
        follow: Option<&Routing>,
        observe: &mut Observer<'_>,
    ) -> Result<Results, Error> {
        self.check(input)?;
        if let Some(routing) = follow {
            let expected = (routing.modules.len(), input.batch(), input.sequence());
            let found = routing.margins.dim();
            if found != expected {
                return Err(Error::Followed { found, expected });
            }
        }
        let results = self.forward(input, follow, observe);
        if results.is_ok() {
            self.cached = (input.batch(), input.mask.ncols());
        } else {
            // Some layers may have appended and others not.
            self.reset();
        }
        results
    }

    fn forward(
        &mut self,
        input: &Input,
        follow: Option<&Routing>,
        observe: &mut Observer<'_>,
    ) -> Result<Results, Error> {
        let groups = self.config.num_attention_heads / self.config.num_key_value_heads;
        let mut step =
            Step::new(input, &self.frequencies, groups, &self.options).map_err(compute(None))?;
        if let Some(routing) = follow {
            step.follow(routing, &self.options.device).map_err(compute(None))?;
        }
        let mut state = self.embed(input).map_err(compute(None))?;
        let mut results_margins = Vec::new();
        for (layer, cache) in self.layers.iter().zip(&mut self.caches) {
            let mut decisions = Vec::new();
            state = layer
                .forward_observed(&state, &step, Some(cache), &mut decisions, observe)
                .map_err(compute(Some(layer.index)))?;
            let id = |kind| ModuleId { layer: layer.index, kind };
            let margins = decisions.into_iter().map(|made| (id(made.kind), made.margins));
            results_margins.extend(margins);
        }
        let logits = self.logits(&state, &step, input.logits).map_err(compute(None))?;
        Ok(Results { logits, margins: results_margins })
    }

    /// `[batch · sequence, hidden]`.
    fn embed(&self, input: &Input) -> Candle<Tensor> {
        let ids = input.ids.iter().map(|&id| id as u32);
        self.embedding.index_select(&Tensor::from_iter(ids, &self.options.device)?, 0)
    }

    /// `[batch, sequence or 1, vocab]`.
    fn logits(&self, state: &Tensor, step: &Step, wanted: Logits) -> Candle<Tensor> {
        let (rows, sequence) = match wanted {
            Logits::All => (state.clone(), step.sequence),
            Logits::Last => {
                let hidden = self.config.hidden_size;
                let state = state.reshape((step.batch, step.sequence, hidden))?;
                let last = state.narrow(1, step.sequence - 1, 1)?;
                (last.reshape((step.batch, hidden))?, 1)
            }
        };
        let logits = self.head.forward(&self.norm.forward(&rows, step.kernels)?, step.kernels)?;
        logits.reshape((step.batch, sequence, self.config.vocab_size))
    }

    fn check(&self, input: &Input) -> Result<(), Error> {
        let ids = input.ids.dim();
        let (batch, sequence) = ids;
        let (rows, cached) = self.cached;
        if batch == 0 || sequence == 0 {
            return Err(Error::Empty(ids));
        }
        if cached > 0 && rows != batch {
            return Err(Error::Batch { cached: rows, found: batch });
        }
        let shaped = |array, found, expected| {
            if found == expected {
                Ok(())
            } else {
                Err(Error::Shape { array, found, ids, cached, expected })
            }
        };
        shaped("mask", input.mask.dim(), (batch, cached + sequence))?;
        shaped("positions", input.positions.dim(), ids)?;
        in_range("ids", &input.ids, self.config.vocab_size as i64)?;
        in_range("mask", &input.mask, 2)?;
        // Positions become `f32`, which holds whole numbers up to here exactly.
        in_range("positions", &input.positions, 1 << f32::MANTISSA_DIGITS)
    }
}

fn in_range(name: &'static str, values: &Array2<i64>, end: i64) -> Result<(), Error> {
    match values.indexed_iter().find(|(_, value)| !(0..end).contains(*value)) {
        None => Ok(()),
        Some(((row, column), &found)) => Err(Error::Range { array: name, row, column, found, end }),
    }
}

fn compute(layer: Option<usize>) -> impl Fn(candle_core::Error) -> Error {
    move |source| Error::Compute { layer, source }
}

/// A tensor's elements, row-major.
fn to_host(tensor: &Tensor) -> Candle<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()
}

fn output(input: &Input, results: &Results) -> Result<Output, Error> {
    let shape = results.logits.dims3().map_err(compute(None))?;
    let logits = to_host(&results.logits).map_err(compute(None))?;
    let mut margins = Vec::new();
    for (id, values) in &results.margins {
        margins.extend(to_host(values).map_err(compute(Some(id.layer)))?);
    }
    let modules: Vec<_> = results.margins.iter().map(|(id, _)| *id).collect();
    let routed = (modules.len(), input.batch(), input.sequence());
    Ok(Output {
        logits: Array3::from_shape_vec(shape, logits)?,
        routing: Some(Routing { modules, margins: Array3::from_shape_vec(routed, margins)? }),
    })
}
