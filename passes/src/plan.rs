//! What the passes are told.
//!
//! Searching and rewriting are apart: whatever needs tensors, text or timings to decide ends in a
//! [`Plan`], and the passes apply it. A plan is a plain value, written into every artifact's
//! manifest, so that an export can be repeated from it.

use crate::ir::{Dispatch, ModuleId};
use crate::quantization::Scheme;

/// Every decision the passes apply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Modules that are removed, sorted.
    pub removed: Vec<ModuleId>,
    /// Modules that lose their router and run for every token, sorted.
    pub always: Vec<ModuleId>,
    /// Whether k and v become one projection.
    pub fuse_key_value: bool,
    /// Whether gate and up become one projection.
    pub fuse_gate_up: bool,
    /// Which weights are stored in few bits, and how; `None` for none.
    pub quantization: Option<Quantization>,
    /// How routed attention modules skip.
    pub attention_dispatch: Dispatch,
    /// How routed MLP modules skip.
    pub mlp_dispatch: Dispatch,
}

/// Which weights are stored in few bits, and how. Projections always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantization {
    /// How.
    pub scheme: Scheme,
    /// Whether the embedding is.
    pub embedding: bool,
    /// Whether the head is.
    pub head: bool,
}
