//! Where each weight's bytes lie: in `model.onnx.data`, or in the checkpoint's own files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use skipgpt_passes::ir::{Stored, Weight};

use super::{Error, names};
use crate::onnx::graph::{Data, Element, Graph, Initializer, Part, Placement, Quantized};
use crate::packed;
use crate::sources::{Location, Sources};

/// Weights begin at multiples of this, so that a runtime can map each by itself.
const PAGE: u64 = 4096;
/// With linked weights, a changed weight of at most this many bytes is written all the same.
const SMALL: u64 = 1 << 20;

/// Every weight's place.
#[derive(Debug, Default)]
pub struct Layout<'a> {
    /// By initializer name.
    pub placements: BTreeMap<String, Placement>,
    /// What `model.onnx.data` holds, in order, each at its offset.
    pub written: Vec<Written<'a>>,
    /// Size of `model.onnx.data`; 0 if there is none.
    pub size: u64,
    /// Weights that stay where they are.
    pub linked: Vec<(&'a Initializer, &'a Weight)>,
    /// The checkpoint's files that the artifact shares, with their names in it.
    pub files: Vec<(PathBuf, String)>,
}

/// What `model.onnx.data` holds for one weight.
#[derive(Debug, Clone, Copy)]
pub enum Written<'a> {
    /// A weight in the initializer's dtype.
    Plain {
        /// First byte.
        offset: u64,
        /// The first initializer that reads it.
        initializer: &'a Initializer,
        /// Its value.
        weight: &'a Weight,
    },
    /// A matrix in few bits: codes, then scales, then zero points.
    Quantized {
        /// The initializer of the codes that was met first.
        initializer: &'a Initializer,
        /// The matrix.
        weight: &'a Weight,
        /// Where its parts lie.
        place: packed::Place,
    },
}

impl<'a> Layout<'a> {
    /// Every weight in `model.onnx.data`; equal weights once, and rows of another weight inside of it.
    pub fn copy(graph: &'a Graph) -> Self {
        let mut layout = Self::default();
        let all = graph.all_initializers();
        let (inside, whole): (Vec<&Initializer>, Vec<_>) =
            all.iter().partition(|tensor| is_inside_another(&all, tensor));
        for initializer in whole.into_iter().chain(inside) {
            match &initializer.data {
                Data::Inline(_) => {}
                Data::Weight(weight) => layout.write(initializer, weight),
                Data::Quantized(quantized) => layout.write_quantized(initializer, quantized),
            }
        }
        layout
    }

    /// Every weight that the checkpoint holds as the graph wants it stays in its file.
    ///
    /// # Errors
    ///
    /// [`Error::Unlinkable`] names a weight of the shared files that would have to change, unless
    /// it is small.
    pub fn link(graph: &'a Graph, sources: &Sources) -> Result<Self, Error> {
        let mut layout = Self::default();
        let mut changed = Vec::new();
        let is_quantized = |tensor: &&Initializer| matches!(tensor.data, Data::Quantized(_));
        if let Some(initializer) = graph.all_initializers().into_iter().find(is_quantized) {
            let (name, reason) = (initializer.name.clone(), Unlinkable::Quantized);
            return Err(Error::Unlinkable { name, reason });
        }
        for (initializer, weight) in graph.weights() {
            match linkable(initializer, weight, sources) {
                Ok(location) => {
                    let file = layout.share(location);
                    let Location { offset, length, .. } = location;
                    let place = Placement { location: file, offset, length };
                    layout.placements.insert(initializer.name.clone(), place);
                    layout.linked.push((initializer, weight));
                }
                Err(reason) => changed.push((initializer, weight, reason)),
            }
        }
        for (initializer, weight, reason) in changed {
            let shared = weight.stored().iter().any(|stored| layout.shares(stored, sources));
            if layout.files.is_empty() || (shared && initializer.size() > SMALL) {
                return Err(Error::Unlinkable { name: initializer.name.clone(), reason });
            }
            layout.write(initializer, weight);
        }
        Ok(layout)
    }

    /// Bytes the weights take, wherever they lie.
    pub fn total(&self) -> u64 {
        self.size + self.linked.iter().map(|(initializer, _)| initializer.size()).sum::<u64>()
    }

    fn write(&mut self, initializer: &'a Initializer, weight: &'a Weight) {
        let same = self.written.iter().find_map(|written| match written {
            Written::Plain { offset, initializer: other, weight: all }
                if other.element == initializer.element =>
            {
                let row = weight.columns() as u64 * initializer.element.size() as u64;
                first_row(all, weight).map(|first| *offset + first as u64 * row)
            }
            Written::Plain { .. } | Written::Quantized { .. } => None,
        });
        let offset = same.unwrap_or_else(|| {
            let offset = self.reserve(initializer.size());
            self.written.push(Written::Plain { offset, initializer, weight });
            offset
        });
        self.place(initializer, offset);
    }

    fn write_quantized(&mut self, initializer: &'a Initializer, quantized: &'a Quantized) {
        let Quantized { weight, scheme, scales: dtype, part } = quantized;
        let same = self.written.iter().find_map(|written| match written {
            Written::Quantized { weight: all, place, .. }
                if (place.scheme, place.dtype) == (*scheme, *dtype) =>
            {
                first_row(all, weight).map(|first| place.from_row(first, weight.columns()))
            }
            Written::Plain { .. } | Written::Quantized { .. } => None,
        });
        let place = same.unwrap_or_else(|| {
            let (rows, columns) = (weight.rows() as u64, weight.columns());
            let mut reserve = |bytes: usize| self.reserve(rows * bytes as u64);
            let place = packed::Place {
                scheme: *scheme,
                dtype: *dtype,
                codes: reserve(scheme.code_bytes(columns)),
                scales: reserve(scheme.blocks(columns) * dtype.size()),
                zeros: reserve(scheme.zero_bytes(columns)),
            };
            self.written.push(Written::Quantized { initializer, weight, place });
            place
        });
        let offset = match part {
            Part::Codes => place.codes,
            Part::Scales => place.scales,
            Part::Zeros => place.zeros,
        };
        self.place(initializer, offset);
    }

    /// The next page's offset, with room for so many bytes.
    fn reserve(&mut self, bytes: u64) -> u64 {
        let offset = self.size.next_multiple_of(PAGE);
        if bytes > 0 {
            self.size = offset + bytes;
        }
        offset
    }

    fn place(&mut self, initializer: &Initializer, offset: u64) {
        let (location, length) = (names::DATA.to_owned(), initializer.size());
        let place = Placement { location, offset, length };
        self.placements.insert(initializer.name.clone(), place);
    }

    /// The name of the shared file that holds `location`.
    fn share(&mut self, location: Location<'_>) -> String {
        if let Some((_, name)) = self.files.iter().find(|(path, _)| path == location.path) {
            return name.clone();
        }
        let taken: BTreeSet<_> = self.files.iter().map(|(_, name)| name.as_str()).collect();
        let own = location.path.file_name().unwrap_or_default().to_string_lossy();
        let mut name = own.to_string();
        let mut number = 2;
        while taken.contains(name.as_str()) {
            name = format!("{number}-{own}");
            number += 1;
        }
        self.files.push((location.path.to_path_buf(), name.clone()));
        name
    }

    fn shares(&self, stored: &Stored, sources: &Sources) -> bool {
        sources
            .location(&stored.name)
            .is_some_and(|location| self.files.iter().any(|(path, _)| path == location.path))
    }
}

/// Whether the weight is some rows of another one of the graph.
fn is_inside_another(all: &[&Initializer], tensor: &Initializer) -> bool {
    all.iter().any(|other| {
        other.element == tensor.element
            && match (&other.data, &tensor.data) {
                (Data::Weight(all), Data::Weight(part)) => is_part(all, part),
                (Data::Quantized(all), Data::Quantized(part)) => {
                    (all.scheme, all.scales, all.part) == (part.scheme, part.scales, part.part)
                        && is_part(&all.weight, &part.weight)
                }
                _ => false,
            }
    })
}

fn is_part(all: &Weight, part: &Weight) -> bool {
    all.rows() > part.rows() && first_row(all, part).is_some()
}

/// Where the rows of `part` begin in `all`, if they are there, whole parts of a stack.
fn first_row(all: &Weight, part: &Weight) -> Option<usize> {
    let (mut stack, mut wanted) = (Vec::new(), Vec::new());
    flatten(all, &mut stack);
    flatten(part, &mut wanted);
    let at = stack.windows(wanted.len()).position(|window| window == wanted)?;
    Some(stack[..at].iter().map(|part| part.rows()).sum())
}

fn flatten<'a>(weight: &'a Weight, parts: &mut Vec<&'a Weight>) {
    match weight {
        Weight::Concat(all) => all.iter().for_each(|part| flatten(part, parts)),
        other => parts.push(other),
    }
}

/// Why a weight cannot stay in the checkpoint's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unlinkable {
    /// It is an expression, not a tensor of the file.
    #[error("it is computed (merged, fused or transposed), not stored")]
    Computed,
    /// It is in few bits.
    #[error("it is quantised, and the checkpoint's is not")]
    Quantized,
    /// Its elements would change.
    #[error("the checkpoint stores it in another dtype")]
    Cast,
    /// Its tensor is not in a file that a runtime can read.
    #[error("its tensor does not lie in a .safetensors file")]
    NotInFile,
    /// Its elements straddle addresses.
    #[error("its bytes are not aligned to its elements; re-save the checkpoint")]
    Misaligned,
}

/// Where a runtime finds the weight as the graph wants it.
fn linkable<'a>(
    initializer: &Initializer,
    weight: &Weight,
    sources: &'a Sources,
) -> Result<Location<'a>, Unlinkable> {
    let stored = match weight {
        Weight::Stored(stored) => stored,
        Weight::Cast { of, dtype } => match &**of {
            Weight::Stored(stored) if stored.dtype == *dtype => stored,
            Weight::Stored(_) => return Err(Unlinkable::Cast),
            _ => return Err(Unlinkable::Computed),
        },
        _ => return Err(Unlinkable::Computed),
    };
    if initializer.element != Element::Float(stored.dtype) {
        return Err(Unlinkable::Cast);
    }
    let location = sources.location(&stored.name).ok_or(Unlinkable::NotInFile)?;
    if location.path.extension().is_none_or(|extension| extension != "safetensors") {
        return Err(Unlinkable::NotInFile);
    }
    if !location.offset.is_multiple_of(stored.dtype.size() as u64) {
        return Err(Unlinkable::Misaligned);
    }
    Ok(location)
}
