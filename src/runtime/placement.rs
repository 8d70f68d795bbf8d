//! Where ONNX Runtime ran each node, read from its own profile.
//!
//! A provider that has no kernel for a node leaves it to the processor without a word, and copies
//! what goes in and out. So the first step of a session on a GPU is profiled, and the profile is read:
//! an array of events, of which those named `…_kernel_time` carry `provider`, `op_name` and the types
//! and shapes that went in and out. Nodes inside an `If` have events of their own; those of a branch
//! that was not entered have none.
//!
//! **What may be left on the processor**: arithmetic on shapes and positions, which ONNX Runtime keeps
//! there on purpose, because the next node needs the numbers there. The rule:
//!
//! - A node through which a floating-point number passes, in or out, is a fallback, and an error.
//!   Asking for a shape (`Shape`, `Size`) reads no number.
//! - A node of whole numbers and booleans alone may stay. Where every tensor of it has [`SMALL`] of them
//!   at most it is arithmetic on shapes; a larger one is per token (positions, masks, decisions), and is
//!   listed apart: not wrong, but worth a look where time is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::session::Provider;

/// Numbers a tensor of shape arithmetic has at most.
pub const SMALL: u64 = 8;

/// Nodes named in an error.
const NAMED: usize = 6;

/// Why a profile tells nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no profile.
    #[error("{}: ONNX Runtime's profile cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// It is not one.
    #[error("{}: is no profile of ONNX Runtime: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Nothing ran.
    #[error("{}: the profile has no node", .0.display())]
    Empty(PathBuf),
    /// Something ran elsewhere than it was asked to.
    #[error(
        "{stray} of {nodes} nodes were left to the CPU provider by {provider}: {}; export for this provider (docs/gpu.md says which operators it has), or run with --provider cpu",
        list(named, *stray)
    )]
    Fallback {
        /// The provider asked for.
        provider: &'static str,
        /// Nodes that ran.
        nodes: usize,
        /// Nodes that ran elsewhere and should not have.
        stray: usize,
        /// The first of them, with their operators.
        named: Vec<String>,
    },
}

fn list(named: &[String], all: usize) -> String {
    let rest = if all > named.len() { ", …" } else { "" };
    format!("{}{rest}", named.join(", "))
}

/// Where the nodes of a step ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// The provider that was asked for.
    pub asked: Provider,
    /// Nodes by the provider that ran them, copies not counted.
    pub nodes: BTreeMap<String, usize>,
    /// Nodes on the processor that are arithmetic on shapes.
    pub shapes: Vec<Node>,
    /// Nodes on the processor that have whole numbers or booleans for every token.
    pub indices: Vec<Node>,
    /// Nodes on the processor that should have run on the provider: floating-point numbers pass through.
    pub stray: Vec<Node>,
    /// Copies from the device that ONNX Runtime inserted.
    pub to_host: Copies,
    /// Copies to the device that ONNX Runtime inserted.
    pub to_device: Copies,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Node {
    /// As the graph names it.
    pub name: String,
    /// Its operator.
    pub operator: String,
}

/// Copies of one direction in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Copies {
    /// How many.
    pub count: usize,
    /// Bytes of all.
    pub bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Event {
    #[serde(default)]
    cat: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    args: Args,
}

#[derive(Debug, Default, Deserialize)]
struct Args {
    op_name: Option<String>,
    provider: Option<String>,
    #[serde(default)]
    input_type_shape: Vec<BTreeMap<String, Vec<i64>>>,
    #[serde(default)]
    output_type_shape: Vec<BTreeMap<String, Vec<i64>>>,
}

impl Args {
    /// See the header of this file.
    fn kind(&self) -> Kind {
        let asks = matches!(self.op_name.as_deref(), Some("Shape" | "Size"));
        let read = if asks { &[] } else { self.input_type_shape.as_slice() };
        let tensors = || self.output_type_shape.iter().chain(read).flatten();
        let whole = |element: &str| ["bool", "int", "uint"].iter().any(|k| element.starts_with(k));
        if self.output_type_shape.is_empty() || !tensors().all(|(element, _)| whole(element)) {
            Kind::Stray
        } else if tensors().all(|(_, shape)| elements(shape) <= SMALL) {
            Kind::Shape
        } else {
            Kind::Index
        }
    }

    fn bytes(&self) -> u64 {
        let tensors = self.output_type_shape.iter().flatten();
        tensors.map(|(element, shape)| elements(shape).saturating_mul(width(element))).sum()
    }
}

/// What a node on the processor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Shape,
    Index,
    Stray,
}

fn elements(shape: &[i64]) -> u64 {
    let dims = shape.iter().map(|dim| u64::try_from(*dim).unwrap_or_default());
    dims.fold(1, u64::saturating_mul)
}

/// Bytes of an element, by the profile's name of its type.
fn width(element: &str) -> u64 {
    match element {
        "double" | "int64" | "uint64" => 8,
        "float" | "int32" | "uint32" => 4,
        "float16" | "bfloat16" | "int16" | "uint16" => 2,
        _ => 1,
    }
}

impl Placement {
    /// Reads the profile in `path` of a session that `asked` was given to.
    ///
    /// # Errors
    ///
    /// All but [`Error::Fallback`]: what ran elsewhere is part of the result.
    pub fn read(path: &Path, asked: Provider) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let bytes = fs::read(path).map_err(read)?;
        let events: Vec<Event> = serde_json::from_slice(&bytes)
            .map_err(|source| Error::Parse { path: path.to_owned(), source })?;
        Self::of(&events, asked).ok_or_else(|| Error::Empty(path.to_owned()))
    }

    /// `None` if no node ran.
    fn of(events: &[Event], asked: Provider) -> Option<Self> {
        let mut found = Self {
            asked,
            nodes: BTreeMap::new(),
            shapes: Vec::new(),
            indices: Vec::new(),
            stray: Vec::new(),
            to_host: Copies::default(),
            to_device: Copies::default(),
        };
        let mut seen = BTreeSet::new();
        for Event { name, args, .. } in events.iter().filter(|event| event.cat == "Node") {
            let Some(node) = name.strip_suffix("_kernel_time") else { continue };
            let (Some(operator), Some(provider)) = (&args.op_name, &args.provider) else {
                continue;
            };
            let copies = match operator.as_str() {
                "MemcpyToHost" => Some(&mut found.to_host),
                "MemcpyFromHost" => Some(&mut found.to_device),
                _ => None,
            };
            // A node that ran in several steps is one node.
            if !seen.insert(node) {
                continue;
            }
            if let Some(copies) = copies {
                copies.count += 1;
                copies.bytes = copies.bytes.saturating_add(args.bytes());
                continue;
            }
            *found.nodes.entry(provider.clone()).or_default() += 1;
            if provider == asked.name() {
                continue;
            }
            let list = match args.kind() {
                Kind::Shape => &mut found.shapes,
                Kind::Index => &mut found.indices,
                Kind::Stray => &mut found.stray,
            };
            list.push(Node { name: node.to_owned(), operator: operator.clone() });
        }
        (!found.nodes.is_empty()).then_some(found)
    }

    /// Nodes that ran.
    pub fn total(&self) -> usize {
        self.nodes.values().sum()
    }

    /// That the provider that was asked for ran everything that counts.
    ///
    /// # Errors
    ///
    /// [`Error::Fallback`], with the nodes that it left.
    pub fn check(&self) -> Result<(), Error> {
        let own = self.nodes.get(self.asked.name()).copied().unwrap_or_default();
        if self.stray.is_empty() && own > 0 {
            return Ok(());
        }
        let describe = |node: &Node| format!("{} ({})", node.name, node.operator);
        let left = || self.stray.iter().chain(&self.indices).chain(&self.shapes);
        let stray = if own > 0 { self.stray.len() } else { left().count() };
        Err(Error::Fallback {
            provider: self.asked.name(),
            nodes: self.total(),
            stray,
            named: left().take(NAMED.min(stray)).map(describe).collect(),
        })
    }
}

impl fmt::Display for Placement {
    /// One line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = self.nodes.get(self.asked.name()).copied().unwrap_or_default();
        write!(f, "{own} of {} nodes on {}", self.total(), self.asked.name())?;
        for (nodes, what) in [
            (&self.shapes, "of shape arithmetic"),
            (&self.indices, "of whole numbers per token"),
            (&self.stray, "that it left"),
        ] {
            if !nodes.is_empty() {
                write!(f, ", {} {what} on the processor", nodes.len())?;
            }
        }
        let (host, device) = (self.to_host, self.to_device);
        write!(
            f,
            "; copies inserted: {} from the device ({} bytes), {} to it ({} bytes)",
            host.count, host.bytes, device.count, device.bytes
        )
    }
}

#[cfg(test)]
mod tests;
