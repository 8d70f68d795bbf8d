//! A decoder graph's inputs and outputs: which there are and what shapes they have.
//!
//! | | name | type | shape |
//! |---|---|---|---|
//! | in | `input_ids` | int64 | `[batch, sequence]` |
//! | in | `attention_mask` | int64 | `[batch, total_sequence]` |
//! | in | `position_ids`, optional | int64 | `[batch, sequence]` |
//! | in | `past_key_values.{i}.key`, `.value` | float | `[batch, kv_heads, past_sequence, head_dim]` |
//! | in | `forced.{place}`, optional | float32 | `[batch, sequence, decisions]` |
//! | out | `logits` | float | `[batch, sequence or 1, vocab]` |
//! | out | `present.{i}.key`, `.value` | as the input | `[batch, kv_heads, total_sequence, head_dim]` |
//! | out | `routing_margins`, optional | float | `[modules, batch, sequence]` |
//!
//! Layers without a cache are absent from both lists.

use std::collections::BTreeMap;

use ort::value::{Outlet, Shape, TensorElementType, ValueType};

use super::decoder::Error;
use crate::decoder::Logits;
use crate::onnx::force;

pub(super) const INPUT_IDS: &str = "input_ids";
pub(super) const ATTENTION_MASK: &str = "attention_mask";
pub(super) const POSITION_IDS: &str = "position_ids";
pub(super) const LOGITS: &str = "logits";
pub(super) const ROUTING: &str = "routing_margins";

/// What a configuration beside a graph says of its cache, where the graph itself leaves it open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheFacts {
    /// Key and value heads.
    pub kv_heads: Option<usize>,
    /// Width of one.
    pub head_dim: Option<usize>,
    /// Whether past and present may be one buffer.
    pub shared_buffer: bool,
}

/// What a decoder's graph takes and gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    /// Whether positions are an input.
    pub(super) positions: bool,
    /// The layers that have a cache, by index.
    pub(super) layers: Vec<LayerCache>,
    /// The inputs that stand in for the routers' biases, in the graph's order.
    pub(super) forced: Vec<String>,
    /// Number of tokens in the vocabulary.
    pub(super) vocab: usize,
    /// Of which positions there are logits.
    pub(super) logits: Logits,
}

/// One layer's cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayerCache {
    pub(super) index: usize,
    pub(super) key: Half,
    pub(super) value: Half,
}

/// The keys or the values of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Half {
    /// Name of the input.
    pub(super) past: String,
    /// Name of the output.
    pub(super) present: String,
    /// Element type of both.
    pub(super) element: TensorElementType,
    /// Key and value heads.
    pub(super) heads: usize,
    /// Width of one.
    pub(super) head_dim: usize,
}

impl Half {
    /// `[batch, heads, length, head_dim]`.
    pub(super) fn shape(&self, batch: usize, length: usize) -> [usize; 4] {
        [batch, self.heads, length, self.head_dim]
    }
}

impl Interface {
    /// Reads the interface of a graph that reports routing of `modules` modules (0: of none).
    pub(super) fn read(
        inputs: &[Outlet],
        outputs: &[Outlet],
        modules: usize,
        stated: CacheFacts,
    ) -> Result<Self, Error> {
        let mut positions = false;
        let mut pasts = BTreeMap::new();
        let mut forced = Vec::new();
        for input in inputs {
            match input.name() {
                INPUT_IDS | ATTENTION_MASK => integer(input)?,
                POSITION_IDS => {
                    integer(input)?;
                    positions = true;
                }
                name if name.starts_with(force::PREFIX) => {
                    biases(input)?;
                    forced.push(name.to_owned());
                }
                name => {
                    let (layer, part) =
                        past(name).ok_or_else(|| Error::UnknownInput { name: name.to_owned() })?;
                    pasts.entry(layer).or_insert([None, None])[part] = Some(input);
                }
            }
        }
        for name in [INPUT_IDS, ATTENTION_MASK] {
            find(inputs, name).ok_or(Error::MissingInput { name: name.to_owned() })?;
        }
        let layers = pasts
            .into_iter()
            .map(|(index, [key, value])| {
                let key = half((index, "key"), key, outputs, stated)?;
                let value = half((index, "value"), value, outputs, stated)?;
                Ok(LayerCache { index, key, value })
            })
            .collect::<Result<_, Error>>()?;
        routing(find(outputs, ROUTING), modules)?;
        let (vocab, logits) = logits(outputs)?;
        Ok(Self { positions, layers, forced, vocab, logits })
    }
}

fn find<'a>(outlets: &'a [Outlet], name: &str) -> Option<&'a Outlet> {
    outlets.iter().find(|outlet| outlet.name() == name)
}

/// Layer and part (0 key, 1 value) in `past_key_values.{layer}.{part}`.
fn past(name: &str) -> Option<(usize, usize)> {
    let (layer, part) = name.strip_prefix("past_key_values.")?.split_once('.')?;
    let part = ["key", "value"].iter().position(|known| *known == part)?;
    Some((layer.parse().ok()?, part))
}

fn tensor(outlet: &Outlet) -> Result<(TensorElementType, &Shape), Error> {
    match outlet.dtype() {
        ValueType::Tensor { ty, shape, .. } => Ok((*ty, shape)),
        other => Err(wrong(outlet, "a tensor", other)),
    }
}

fn integer(outlet: &Outlet) -> Result<(), Error> {
    match tensor(outlet)? {
        (TensorElementType::Int64, shape) if shape.len() == 2 => Ok(()),
        _ => Err(wrong(outlet, "an int64 tensor of rank 2", outlet.dtype())),
    }
}

fn biases(outlet: &Outlet) -> Result<(), Error> {
    match tensor(outlet)? {
        (TensorElementType::Float32, shape) if shape.len() == 3 => Ok(()),
        _ => Err(wrong(outlet, "a float32 tensor of rank 3", outlet.dtype())),
    }
}

fn half(
    (layer, part): (usize, &str),
    input: Option<&Outlet>,
    outputs: &[Outlet],
    stated: CacheFacts,
) -> Result<Half, Error> {
    let past = format!("past_key_values.{layer}.{part}");
    let present = format!("present.{layer}.{part}");
    let input = input.ok_or_else(|| Error::MissingInput { name: past.clone() })?;
    let output =
        find(outputs, &present).ok_or_else(|| Error::MissingOutput { name: present.clone() })?;
    let expected = "a float tensor [batch, kv_heads, past_sequence, head_dim] with fixed heads";
    let (element, shape) = tensor(input)?;
    let (&[_, heads, _, head_dim], true) = (&**shape, is_float(element)) else {
        return Err(wrong(input, expected, input.dtype()));
    };
    let size = |dim, stated| usize::try_from(dim).ok().filter(|dim| *dim > 0).or(stated);
    let (Some(heads), Some(head_dim)) =
        (size(heads, stated.kv_heads), size(head_dim, stated.head_dim))
    else {
        return Err(wrong(input, expected, input.dtype()));
    };
    if tensor(output)?.0 != element {
        return Err(wrong(output, &format!("{element}, as the input {past} is"), output.dtype()));
    }
    Ok(Half { past, present, element, heads, head_dim })
}

/// Number of tokens in the vocabulary, and of which positions there are logits.
fn logits(outputs: &[Outlet]) -> Result<(usize, Logits), Error> {
    let logits =
        find(outputs, LOGITS).ok_or_else(|| Error::MissingOutput { name: LOGITS.to_owned() })?;
    let (element, shape) = tensor(logits)?;
    match **shape {
        [_, positions, vocab] if vocab > 0 && is_float(element) => {
            Ok((vocab as usize, if positions == 1 { Logits::Last } else { Logits::All }))
        }
        _ => Err(wrong(logits, "a float tensor [batch, sequence, vocab]", logits.dtype())),
    }
}

fn routing(output: Option<&Outlet>, modules: usize) -> Result<(), Error> {
    match (output, modules) {
        (None, 0) => Ok(()),
        (None, _) => Err(Error::MissingOutput { name: ROUTING.to_owned() }),
        (Some(output), _) => {
            let (element, shape) = tensor(output)?;
            match **shape {
                [rows, _, _]
                    if is_float(element) && (rows < 0 || usize::try_from(rows) == Ok(modules)) =>
                {
                    Ok(())
                }
                _ => {
                    let expected = format!("a float tensor [{modules}, batch, sequence]");
                    Err(wrong(output, &expected, output.dtype()))
                }
            }
        }
    }
}

fn is_float(element: TensorElementType) -> bool {
    use TensorElementType::{Bfloat16, Float16, Float32};
    matches!(element, Float32 | Float16 | Bfloat16)
}

fn wrong(outlet: &Outlet, expected: &str, found: &ValueType) -> Error {
    Error::Interface {
        name: outlet.name().to_owned(),
        expected: expected.to_owned(),
        found: found.to_string(),
    }
}
