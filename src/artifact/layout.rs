//! Where each weight's bytes lie: in `model.onnx.data`, or in the checkpoint's own files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use skipgpt_passes::ir::{Stored, Weight};

use super::{Error, names};
use crate::onnx::graph::{Element, Graph, Initializer, Placement};
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
    pub written: Vec<(u64, &'a Initializer, &'a Weight)>,
    /// Size of `model.onnx.data`; 0 if there is none.
    pub size: u64,
    /// Weights that stay where they are.
    pub linked: Vec<(&'a Initializer, &'a Weight)>,
    /// The checkpoint's files that the artifact shares, with their names in it.
    pub files: Vec<(PathBuf, String)>,
}

impl<'a> Layout<'a> {
    /// Every weight in `model.onnx.data`; equal weights once.
    pub fn copy(graph: &'a Graph) -> Self {
        let mut layout = Self::default();
        for (initializer, weight) in graph.weights() {
            layout.write(initializer, weight);
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
        let same = self.written.iter().find(|(_, other, other_weight)| {
            other.element == initializer.element && *other_weight == weight
        });
        let offset = if let Some((offset, ..)) = same {
            *offset
        } else {
            let offset = self.size.next_multiple_of(PAGE);
            self.size = offset + initializer.size();
            self.written.push((offset, initializer, weight));
            offset
        };
        let place =
            Placement { location: names::DATA.to_owned(), offset, length: initializer.size() };
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

/// Why a weight cannot stay in the checkpoint's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unlinkable {
    /// It is an expression, not a tensor of the file.
    #[error("it is computed (merged, fused or transposed), not stored")]
    Computed,
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
