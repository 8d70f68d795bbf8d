//! An artifact's graph as a [`Decoder`].
//!
//! The cache stays in ONNX Runtime's own values, on the device it was made on, and is copied only for
//! [`Decoder::cache`]. What a step gives as `present` is bound as the next step's `past_key_values`; or
//! both are one buffer with room for the tokens that [`Decoder::reserve`] announced, where the graph
//! says that they may be.

use std::collections::BTreeMap;

use ndarray::{Array3, ArrayD, Ix3};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, SessionOutputs};
use ort::value::{DynTensor, DynValue, Tensor};
use skipgpt_passes::ir::ModuleId;

use super::interface::{
    ATTENTION_MASK, CacheFacts, Half, INPUT_IDS, Interface, LOGITS, POSITION_IDS, ROUTING,
};
use super::tensor::{from_floats, from_integers, to_array, to_ranked};
use super::{Provider, Session};
use crate::decoder::{CacheEntry, Decoder, Input, Logits, Output, Peek, Routing, Sequences};
use crate::onnx::proto::{SEQUENCES, SHARED_BUFFER};

mod cache;
mod error;
mod sessions;

use cache::Cache;
pub use error::Error;
use sessions::Sessions;

/// A decoder graph under ONNX Runtime.
#[derive(Debug)]
pub struct OnnxDecoder {
    sessions: Sessions,
    interface: Interface,
    modules: Vec<ModuleId>,
    cache: Option<Cache>,
    /// Whether past and present may be one buffer.
    shares: bool,
    /// Which sequences it takes at once.
    sequences: Sequences,
    /// Tokens such a buffer has room for; 0 for none.
    reserved: usize,
    forced: BTreeMap<String, ([usize; 2], DynValue)>,
}

impl OnnxDecoder {
    /// Takes `session` as a decoder. `modules` are those of its output `routing_margins`, in its
    /// order; empty where the graph has no such output.
    pub fn new(session: Session, modules: Vec<ModuleId>) -> Result<Self, Error> {
        Self::with_facts(session, modules, CacheFacts::default())
    }

    /// The same for a graph that leaves open what `facts` say of its cache: another exporter's.
    pub fn with_facts(
        session: Session,
        modules: Vec<ModuleId>,
        facts: CacheFacts,
    ) -> Result<Self, Error> {
        let graph = &session.inner;
        let interface = Interface::read(graph.inputs(), graph.outputs(), modules.len(), facts)?;
        let says = |key, value: &str| {
            let said = graph.metadata().map_err(Error::Run)?.custom(key);
            Ok::<_, Error>(said.is_some_and(|said| said == value))
        };
        let shares = facts.shared_buffer || says(SHARED_BUFFER, "true")?;
        let one = says(SEQUENCES, &Sequences::One.to_string())?;
        let sequences = if one { Sequences::One } else { Sequences::Any };
        let forced = BTreeMap::new();
        let sessions = session.into();
        let (cache, reserved) = (None, 0);
        Ok(Self { sessions, interface, modules, cache, shares, sequences, reserved, forced })
    }

    /// Lets `session`, if there is one, take the steps of one token in one sequence; of the same graph and
    /// [for such steps](super::Shapes::OneEach).
    #[must_use]
    pub fn with_one_token(mut self, session: Option<Session>) -> Self {
        self.sessions.one_token = session;
        self
    }

    /// The session that takes every step.
    pub fn session(&self) -> &Session {
        &self.sessions.any
    }

    /// Gives the session back, to end its profile.
    pub fn into_session(self) -> Session {
        self.sessions.any
    }

    /// As [`Decoder::step`]; gives the outputs named `extra` too, as `f32` in the order asked for.
    pub fn step_with(
        &mut self,
        input: &Input,
        extra: &[&str],
    ) -> Result<(Output, Vec<ArrayD<f32>>), Error> {
        self.make_room(input)?;
        let (output, extra, layers) = self.run(input, extra)?;
        self.append(input, layers);
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

    /// Runs `input` on top of the cache; gives the cache after it too, unless that is where it was.
    fn run(
        &mut self,
        input: &Input,
        extra: &[&str],
    ) -> Result<(Output, Vec<ArrayD<f32>>, Presents), Error> {
        let past = self.check(input)?;
        if let Some(name) =
            extra.iter().find(|name| !self.sessions.any.outputs().any(|o| o == **name))
        {
            return Err(Error::MissingOutput { name: (*name).to_owned() });
        }
        let binding = self.bind(input, extra)?;
        let (batch, sequence) = (input.batch(), input.sequence());
        let length = past + sequence;
        let shared = holds(self.cache.as_ref(), length);
        let mut outputs =
            self.sessions.of(input).inner.run_binding(&binding).map_err(Error::Run)?;
        let layers = presents(&self.interface, &mut outputs, batch, length, shared)?;
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
        self.sessions.of(input).settle()?;
        Ok((Output { logits, routing }, extra, layers))
    }

    /// As [`Decoder::step`], for its cache and its time alone: the logits are computed and left where
    /// they are.
    pub fn advance(&mut self, input: &Input) -> Result<(), Error> {
        let length = self.check(input)? + input.sequence();
        self.make_room(input)?;
        let binding = self.bind(input, &[])?;
        let batch = input.batch();
        let mut outputs =
            self.sessions.of(input).inner.run_binding(&binding).map_err(Error::Run)?;
        let shared = holds(self.cache.as_ref(), length);
        let layers = presents(&self.interface, &mut outputs, batch, length, shared)?;
        drop(outputs);
        self.sessions.of(input).settle()?;
        self.append(input, layers);
        Ok(())
    }

    /// Puts the cache into one buffer, where that may be and `input` fits in.
    fn make_room(&mut self, input: &Input) -> Result<(), Error> {
        let length = self.check(input)? + input.sequence();
        if !self.shares || length > self.reserved {
            return Ok(());
        }
        match &mut self.cache {
            None => {
                let batch = input.batch();
                let cache =
                    Cache::with_room(&self.sessions.any, &self.interface, batch, self.reserved)?;
                self.cache = Some(cache);
            }
            Some(cache)
                if cache.room.is_none() && self.sessions.any.provider() == Provider::Cpu =>
            {
                *cache = cache.moved(&self.sessions.any, &self.interface, self.reserved)?;
            }
            Some(_) => {}
        }
        Ok(())
    }

    /// Takes what a step on `input` gave as the cache.
    fn append(&mut self, input: &Input, layers: Presents) {
        let (batch, length) = (input.batch(), input.mask.ncols());
        match (layers, &mut self.cache) {
            (Some(layers), cache) => *cache = Some(Cache { batch, length, room: None, layers }),
            (None, Some(cache)) => cache.length = length,
            (None, None) => {}
        }
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
        self.cache = extent.map(|(batch, length)| Cache { batch, length, room: None, layers });
        Ok(())
    }

    /// Heads and their width in the cache of every layer that has one: the layer's place, and what
    /// [`OnnxDecoder::restore`] takes for its keys and values.
    pub fn cache_heads(&self) -> impl Iterator<Item = (usize, [(usize, usize); 2])> {
        let heads = |half: &Half| (half.heads, half.head_dim);
        self.interface.layers.iter().map(move |l| (l.index, [heads(&l.key), heads(&l.value)]))
    }

    /// What the graph's input `name` (see [`crate::onnx::force`]) takes in the next steps, `[batch,
    /// sequence, decisions]`.
    pub fn force(&mut self, name: &str, biases: &Array3<f32>) -> Result<(), Error> {
        let (batch, sequence, decisions) = biases.dim();
        let data: Vec<f32> = biases.iter().copied().collect();
        let value = Tensor::from_array(([batch, sequence, decisions], data));
        let value = value.map_err(feed(name))?.into_dyn();
        self.forced.insert(name.to_owned(), ([batch, sequence], value));
        Ok(())
    }

    /// Checks what a mistaken caller would otherwise read as an error from inside a kernel; gives
    /// the number of past tokens.
    fn check(&self, input: &Input) -> Result<usize, Error> {
        let (batch, sequence) = input.ids.dim();
        if batch == 0 || sequence == 0 {
            return Err(Error::Empty { batch, sequence });
        }
        if (input.logits, self.interface.logits) == (Logits::All, Logits::Last) && sequence > 1 {
            return Err(Error::LastOnly { sequence });
        }
        if self.sequences == Sequences::One {
            let rows = input.mask.rows().into_iter();
            let padded = rows.filter(|row| row.iter().any(|&m| m == 0)).count();
            if (batch, padded) != (1, 0) {
                return Err(Error::OneSequence { batch, padded });
            }
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

    fn bind(&mut self, input: &Input, extra: &[&str]) -> Result<IoBinding, Error> {
        let mut binding = self.sessions.of(input).inner.create_binding().map_err(Error::Run)?;
        let mut integers = vec![(INPUT_IDS, &input.ids), (ATTENTION_MASK, &input.mask)];
        if self.interface.positions {
            integers.push((POSITION_IDS, &input.positions));
        }
        for (name, array) in integers {
            binding.bind_input(name, &from_integers(name, array)?).map_err(feed(name))?;
        }
        let tokens = [input.batch(), input.sequence()];
        for name in &self.interface.forced {
            let unforced = |given| Error::Unforced { name: name.clone(), tokens, given };
            let (given, value) = self.forced.get(name).ok_or_else(|| unforced([0, 0]))?;
            if *given != tokens {
                return Err(unforced(*given));
            }
            binding.bind_input(name, value).map_err(feed(name))?;
        }
        let host = memory(AllocationDevice::CPU)?;
        let device = match self.sessions.any.provider() {
            Provider::Cpu => memory(AllocationDevice::CPU)?,
            Provider::Cuda => memory(AllocationDevice::CUDA)?,
        };
        let shared = holds(self.cache.as_ref(), input.mask.ncols());
        for (at, layer) in self.interface.layers.iter().enumerate() {
            for (part, half) in [&layer.key, &layer.value].into_iter().enumerate() {
                let bound = match &self.cache {
                    Some(cache) => binding.bind_input(&half.past, &cache.layers[at][part]),
                    None => empty(half, input.batch())
                        .and_then(|value| binding.bind_input(&half.past, &value)),
                };
                bound.map_err(feed(&half.past))?;
                let bound = match &mut self.cache {
                    Some(cache) if shared => {
                        binding.bind_output(&half.present, &mut cache.layers[at][part])
                    }
                    _ => binding.bind_output_to_device(&half.present, &device),
                };
                bound.map_err(feed(&half.present))?;
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

    fn reserve(&mut self, tokens: usize) {
        self.reserved = tokens;
    }

    fn take_one_token_apart(&mut self, apart: bool) -> bool {
        self.sessions.takes_one_token = apart;
        self.sessions.one_token.is_some()
    }

    /// Copies the cache to the host; empty before the first step.
    fn cache(&self) -> Result<Vec<CacheEntry>, Error> {
        self.cache.as_ref().map_or_else(|| Ok(Vec::new()), |cache| cache.read(&self.interface))
    }

    fn vocab_size(&self) -> usize {
        self.interface.vocab
    }

    fn gives(&self) -> Logits {
        self.interface.logits
    }

    fn takes(&self) -> Sequences {
        self.sequences
    }
}

impl Peek for OnnxDecoder {
    fn peek(&mut self, input: &Input) -> Result<Output, Error> {
        self.peek_with(input, &[]).map(|(output, _)| output)
    }
}

/// The caches that a step gives; `None` if they lie where they lay.
type Presents = Option<Vec<[DynValue; 2]>>;

/// Whether the cache is a buffer with room for `length` tokens.
fn holds(cache: Option<&Cache>, length: usize) -> bool {
    cache.and_then(|cache| cache.room).is_some_and(|room| length <= room)
}

fn presents(
    interface: &Interface,
    outputs: &mut SessionOutputs<'_>,
    batch: usize,
    length: usize,
    shared: bool,
) -> Result<Presents, Error> {
    if shared {
        return Ok(None);
    }
    let mut present = |half: &Half| {
        let value = take(outputs, &half.present)?;
        expect(&half.present, shape(&value), &half.shape(batch, length))?;
        Ok::<_, Error>(value)
    };
    let layers = interface.layers.iter();
    layers
        .map(|layer| Ok([present(&layer.key)?, present(&layer.value)?]))
        .collect::<Result<_, Error>>()
        .map(Some)
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
