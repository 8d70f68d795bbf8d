//! An artifact's graph as a [`Decoder`].
//!
//! The cache stays in ONNX Runtime's own values: what a step gives as `present` is bound as the
//! next step's `past_key_values`, on the device it was made on, and is copied only for
//! [`Decoder::cache`].

use std::collections::BTreeMap;

use ndarray::{Array2, ArrayD, Ix3, Ix4};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, SessionOutputs};
use ort::value::{DynTensor, DynValue, Tensor};
use skipgpt_passes::ir::ModuleId;

use super::interface::{ATTENTION_MASK, Half, INPUT_IDS, Interface, LOGITS, POSITION_IDS, ROUTING};
use super::tensor::{from_floats, from_integers, to_array, to_ranked};
use super::{Provider, Session};
use crate::decoder::{CacheEntry, Decoder, Input, Logits, Output, Peek, Routing};

/// Why a graph is no decoder, or a step failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The graph lacks an input every decoder has.
    #[error("the graph has no input {name}")]
    MissingInput {
        /// Its name.
        name: String,
    },
    /// The graph lacks an output that is needed.
    #[error("the graph has no output {name}")]
    MissingOutput {
        /// Its name.
        name: String,
    },
    /// The graph wants something a decoder has not.
    #[error(
        "the graph has an input {name}; a decoder has input_ids, attention_mask, position_ids and \
         past_key_values.N.key and .value"
    )]
    UnknownInput {
        /// Its name.
        name: String,
    },
    /// An input or output is not what its name says.
    #[error("the graph's {name} is {found}; expected {expected}")]
    Interface {
        /// The input or output.
        name: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The parts of an input do not fit together.
    #[error("{name} has shape {found:?}; expected {expected:?} [batch, tokens]")]
    InputShape {
        /// The part.
        name: &'static str,
        /// What it should be.
        expected: [usize; 2],
        /// What it is.
        found: [usize; 2],
    },
    /// There is nothing to run.
    #[error("a step needs at least one row and one token; got [{batch}, {sequence}]")]
    Empty {
        /// Rows.
        batch: usize,
        /// New tokens per row.
        sequence: usize,
    },
    /// A token that the model does not have.
    #[error("row {row}, token {position}: id {id} is outside the vocabulary of {vocab}")]
    Token {
        /// The row.
        row: usize,
        /// The place among the new tokens.
        position: usize,
        /// The id.
        id: i64,
        /// Number of tokens in the vocabulary.
        vocab: usize,
    },
    /// The attention mask tells of another past than the cache holds.
    #[error(
        "the attention mask has {past} past tokens in {batch} rows; the cache holds {cached} in \
         {cached_batch}"
    )]
    Past {
        /// Past tokens per row, by the mask.
        past: usize,
        /// Rows of the input.
        batch: usize,
        /// Tokens per row in the cache.
        cached: usize,
        /// Rows of the cache.
        cached_batch: usize,
    },
    /// The graph gave a tensor of another shape than its interface promises.
    #[error("the graph gave {name} with shape {found:?}; expected {expected:?}")]
    Shape {
        /// The output.
        name: String,
        /// What it should be.
        expected: Vec<usize>,
        /// What it is.
        found: Vec<usize>,
    },
    /// The graph gave a tensor of another rank than its interface promises.
    #[error("the graph gave {name} with shape {found:?}; expected rank {expected}")]
    Rank {
        /// The output.
        name: String,
        /// The rank it should have.
        expected: usize,
        /// Its shape.
        found: Vec<usize>,
    },
    /// An input could not be handed over.
    #[error("{name} cannot be handed to ONNX Runtime: {source}")]
    Feed {
        /// The input.
        name: String,
        /// What went wrong.
        source: ort::Error,
    },
    /// An output could not be read.
    #[error("{name} cannot be read from ONNX Runtime: {source}")]
    Read {
        /// The output.
        name: String,
        /// What went wrong.
        source: ort::Error,
    },
    /// The graph takes its decisions from outside, and was given none for these tokens.
    #[error("the graph's {name} takes thresholds for {tokens} tokens; it was given {given}")]
    Unforced {
        /// The input.
        name: String,
        /// Tokens of the step.
        tokens: usize,
        /// Tokens it was given thresholds for.
        given: usize,
    },
    /// A cache of another number of layers.
    #[error("a cache of {found} layers does not fit the graph, which has {expected}")]
    Layers {
        /// Layers with a cache.
        expected: usize,
        /// Layers given.
        found: usize,
    },
    /// The graph failed.
    #[error("ONNX Runtime fails to run the graph: {0}")]
    Run(#[source] ort::Error),
    /// It ran elsewhere than it was asked to.
    #[error(transparent)]
    Session(#[from] super::session::Error),
}

/// A decoder graph under ONNX Runtime.
#[derive(Debug)]
pub struct OnnxDecoder {
    session: Session,
    interface: Interface,
    modules: Vec<ModuleId>,
    cache: Option<Cache>,
    forced: BTreeMap<String, (usize, DynValue)>,
}

/// The cache as ONNX Runtime holds it.
#[derive(Debug)]
struct Cache {
    batch: usize,
    length: usize,
    /// Keys and values in the order of the interface's layers.
    layers: Vec<[DynValue; 2]>,
}

impl OnnxDecoder {
    /// Takes `session` as a decoder. `modules` are those of its output `routing_margins`, in its
    /// order; empty where the graph has no such output.
    pub fn new(session: Session, modules: Vec<ModuleId>) -> Result<Self, Error> {
        let graph = &session.inner;
        let interface = Interface::read(graph.inputs(), graph.outputs(), modules.len())?;
        Ok(Self { session, interface, modules, cache: None, forced: BTreeMap::new() })
    }

    /// The session it runs.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Gives the session back, to end its profile.
    pub fn into_session(self) -> Session {
        self.session
    }

    /// As [`Decoder::step`]; gives the outputs named `extra` too, as `f32` in the order asked for.
    pub fn step_with(
        &mut self,
        input: &Input,
        extra: &[&str],
    ) -> Result<(Output, Vec<ArrayD<f32>>), Error> {
        let (output, extra, cache) = self.run(input, extra)?;
        self.cache = Some(cache);
        Ok((output, extra))
    }

    /// As [`Peek::peek`]; gives the outputs named `extra` too.
    pub fn peek_with(
        &mut self,
        input: &Input,
        extra: &[&str],
    ) -> Result<(Output, Vec<ArrayD<f32>>), Error> {
        let (output, extra, _) = self.run(input, extra)?;
        Ok((output, extra))
    }

    /// Runs `input` on top of the cache; gives the cache after it.
    fn run(
        &mut self,
        input: &Input,
        extra: &[&str],
    ) -> Result<(Output, Vec<ArrayD<f32>>, Cache), Error> {
        let past = self.check(input)?;
        if let Some(name) = extra.iter().find(|name| !self.session.outputs().any(|o| o == **name)) {
            return Err(Error::MissingOutput { name: (*name).to_owned() });
        }
        let binding = self.bind(input, extra)?;
        let (batch, sequence) = (input.batch(), input.sequence());
        let mut outputs = self.session.inner.run_binding(&binding).map_err(Error::Run)?;

        let length = past + sequence;
        let layers = presents(&self.interface, &mut outputs, batch, length)?;
        let logits = super::logits::read(&take(&mut outputs, LOGITS)?, input.logits)?;
        let rows = if input.logits == Logits::Last { 1 } else { sequence };
        expect(LOGITS, logits.shape().to_vec(), &[batch, rows, self.interface.vocab])?;
        let routing = match self.modules.len() {
            0 => None,
            modules => {
                let margins = to_ranked::<Ix3>(ROUTING, &take(&mut outputs, ROUTING)?)?;
                expect(ROUTING, margins.shape().to_vec(), &[modules, batch, sequence])?;
                Some(Routing { modules: self.modules.clone(), margins })
            }
        };
        let extra = extra
            .iter()
            .map(|name| to_array(name, outputs.get(name).ok_or_else(|| missing(name))?))
            .collect::<Result<_, Error>>()?;
        drop(outputs);
        self.session.settle()?;
        Ok((Output { logits, routing }, extra, Cache { batch, length, layers }))
    }

    /// As [`Decoder::step`], for its cache and its time alone: the logits are computed and left where
    /// they are.
    pub fn advance(&mut self, input: &Input) -> Result<(), Error> {
        let length = self.check(input)? + input.sequence();
        let binding = self.bind(input, &[])?;
        let batch = input.batch();
        let mut outputs = self.session.inner.run_binding(&binding).map_err(Error::Run)?;
        let layers = presents(&self.interface, &mut outputs, batch, length)?;
        drop(outputs);
        self.session.settle()?;
        self.cache = Some(Cache { batch, length, layers });
        Ok(())
    }

    /// Takes `entries` as the cache, in the order of [`Decoder::cache`], all of one batch and length.
    pub fn restore(&mut self, entries: impl IntoIterator<Item = CacheEntry>) -> Result<(), Error> {
        let mut extent = None;
        let mut layers = Vec::new();
        let mut entries = entries.into_iter();
        for (layer, entry) in self.interface.layers.iter().zip(&mut entries) {
            let (rows, _, tokens, _) = entry.key.dim();
            let (batch, length) = *extent.get_or_insert((rows, tokens));
            let value = |half: &Half, array| {
                expect(
                    &half.past,
                    ndarray::Array4::shape(array).to_vec(),
                    &half.shape(batch, length),
                )?;
                from_floats(&half.past, half.element, array)
            };
            layers.push([value(&layer.key, &entry.key)?, value(&layer.value, &entry.value)?]);
        }
        let (expected, found) = (self.interface.layers.len(), layers.len() + entries.count());
        if found != expected {
            return Err(Error::Layers { expected, found });
        }
        self.cache = extent.map(|(batch, length)| Cache { batch, length, layers });
        Ok(())
    }

    /// Heads and their width in the cache of every layer that has one: the layer's place, and what
    /// [`OnnxDecoder::restore`] takes for its keys and values.
    pub fn cache_heads(&self) -> impl Iterator<Item = (usize, [(usize, usize); 2])> {
        let heads = |half: &Half| (half.heads, half.head_dim);
        self.interface.layers.iter().map(move |l| (l.index, [heads(&l.key), heads(&l.value)]))
    }

    /// What the graph's input `name` (see [`crate::onnx::force`]) takes in the next steps, `[tokens,
    /// decisions]`.
    pub fn force(&mut self, name: &str, thresholds: &Array2<f32>) -> Result<(), Error> {
        let (tokens, decisions) = thresholds.dim();
        let data: Vec<f32> = thresholds.iter().copied().collect();
        let value = Tensor::from_array(([tokens, decisions], data)).map_err(feed(name))?;
        self.forced.insert(name.to_owned(), (tokens, value.into_dyn()));
        Ok(())
    }

    /// Checks what a mistaken caller would otherwise read as an error from inside a kernel; gives
    /// the number of past tokens.
    fn check(&self, input: &Input) -> Result<usize, Error> {
        let (batch, sequence) = input.ids.dim();
        if batch == 0 || sequence == 0 {
            return Err(Error::Empty { batch, sequence });
        }
        let (cached_batch, cached) =
            self.cache.as_ref().map_or((batch, 0), |cache| (cache.batch, cache.length));
        let shaped = |name, expected: [usize; 2], (rows, columns): (usize, usize)| {
            let found = [rows, columns];
            if found == expected {
                Ok(())
            } else {
                Err(Error::InputShape { name, expected, found })
            }
        };
        shaped(POSITION_IDS, [batch, sequence], input.positions.dim())?;
        let (mask_rows, total) = input.mask.dim();
        if mask_rows != batch || total < sequence {
            shaped(ATTENTION_MASK, [batch, cached + sequence], (mask_rows, total))?;
        }
        let past = total - sequence;
        if past != cached || batch != cached_batch {
            return Err(Error::Past { past, batch, cached, cached_batch });
        }
        let vocab = self.interface.vocab;
        let outside = |id: &i64| usize::try_from(*id).map_or(true, |id| id >= vocab);
        match input.ids.indexed_iter().find(|(_, id)| outside(id)) {
            Some(((row, position), id)) => Err(Error::Token { row, position, id: *id, vocab }),
            None => Ok(past),
        }
    }

    fn bind(&self, input: &Input, extra: &[&str]) -> Result<IoBinding, Error> {
        let mut binding = self.session.inner.create_binding().map_err(Error::Run)?;
        let mut integers = vec![(INPUT_IDS, &input.ids), (ATTENTION_MASK, &input.mask)];
        if self.interface.positions {
            integers.push((POSITION_IDS, &input.positions));
        }
        for (name, array) in integers {
            binding.bind_input(name, &from_integers(name, array)?).map_err(feed(name))?;
        }
        let tokens = input.ids.len();
        for name in &self.interface.forced {
            let unforced = |given| Error::Unforced { name: name.clone(), tokens, given };
            let (given, value) = self.forced.get(name).ok_or_else(|| unforced(0))?;
            if *given != tokens {
                return Err(unforced(*given));
            }
            binding.bind_input(name, value).map_err(feed(name))?;
        }
        let host = memory(AllocationDevice::CPU)?;
        let device = match self.session.provider() {
            Provider::Cpu => memory(AllocationDevice::CPU)?,
            Provider::Cuda => memory(AllocationDevice::CUDA)?,
        };
        for (at, layer) in self.interface.layers.iter().enumerate() {
            for (part, half) in [&layer.key, &layer.value].into_iter().enumerate() {
                let bound = match &self.cache {
                    Some(cache) => binding.bind_input(&half.past, &cache.layers[at][part]),
                    None => empty(half, input.batch())
                        .and_then(|value| binding.bind_input(&half.past, &value)),
                };
                bound.map_err(feed(&half.past))?;
                binding
                    .bind_output_to_device(&half.present, &device)
                    .map_err(feed(&half.present))?;
            }
        }
        binding.bind_output_to_device(LOGITS, &device).map_err(feed(LOGITS))?;
        let routing = (!self.modules.is_empty()).then_some(ROUTING);
        for name in routing.iter().chain(extra) {
            binding.bind_output_to_device(*name, &host).map_err(feed(name))?;
        }
        Ok(binding)
    }
}

impl Decoder for OnnxDecoder {
    type Error = Error;

    fn reset(&mut self) {
        self.cache = None;
    }

    fn step(&mut self, input: &Input) -> Result<Output, Error> {
        self.step_with(input, &[]).map(|(output, _)| output)
    }

    /// Copies the cache to the host; empty before the first step.
    fn cache(&self) -> Result<Vec<CacheEntry>, Error> {
        let Some(cache) = &self.cache else { return Ok(Vec::new()) };
        let entries = self.interface.layers.iter().zip(&cache.layers);
        entries
            .map(|(layer, [key, value])| {
                Ok(CacheEntry {
                    layer: layer.index,
                    key: to_ranked::<Ix4>(&layer.key.present, key)?,
                    value: to_ranked::<Ix4>(&layer.value.present, value)?,
                })
            })
            .collect()
    }

    fn vocab_size(&self) -> usize {
        self.interface.vocab
    }
}

impl Peek for OnnxDecoder {
    fn peek(&mut self, input: &Input) -> Result<Output, Error> {
        self.peek_with(input, &[]).map(|(output, _)| output)
    }
}

/// The caches that a step gives.
fn presents(
    interface: &Interface,
    outputs: &mut SessionOutputs<'_>,
    batch: usize,
    length: usize,
) -> Result<Vec<[DynValue; 2]>, Error> {
    let mut present = |half: &Half| {
        let value = take(outputs, &half.present)?;
        expect(&half.present, shape(&value), &half.shape(batch, length))?;
        Ok::<_, Error>(value)
    };
    let layers = interface.layers.iter();
    layers.map(|layer| Ok([present(&layer.key)?, present(&layer.value)?])).collect()
}

/// A cache of no tokens.
fn empty(half: &Half, batch: usize) -> ort::Result<DynTensor> {
    DynTensor::new(&Allocator::default(), half.element, half.shape(batch, 0))
}

fn memory(device: AllocationDevice<'_>) -> Result<MemoryInfo<'static>, Error> {
    MemoryInfo::new(device, 0, AllocatorType::Device, MemoryType::Default).map_err(Error::Run)
}

fn feed(name: &str) -> impl Fn(ort::Error) -> Error {
    move |source| Error::Feed { name: name.to_owned(), source }
}

fn missing(name: &str) -> Error {
    Error::MissingOutput { name: name.to_owned() }
}

fn take(outputs: &mut SessionOutputs<'_>, name: &str) -> Result<DynValue, Error> {
    outputs.remove(name).ok_or_else(|| missing(name))
}

fn shape(value: &DynValue) -> Vec<usize> {
    let dims = value.dtype().tensor_shape().into_iter().flat_map(|shape| shape.iter());
    dims.map(|dim| *dim as usize).collect()
}

fn expect(name: &str, found: Vec<usize>, expected: &[usize]) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Shape { name: name.to_owned(), expected: expected.to_vec(), found })
}
