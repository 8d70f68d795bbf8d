//! Where something differs.

use serde::Serialize;
use skipgpt_passes::ir::{ModuleId, ModuleKind};

/// A decision that was a tie in the reference and came out the other way in the artifact.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tie {
    /// The case.
    pub case: String,
    /// The step, from 0.
    pub step: usize,
    /// The module, such as `layers.3.mlp`.
    pub module: String,
    /// Row of the batch.
    pub row: usize,
    /// The row's token, padding not counted.
    pub token: usize,
    /// The reference's keep score minus its skip score.
    pub margin: f32,
}

/// The first place where the artifact is wrong, in the order in which a model computes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Divergence {
    /// The case.
    pub case: String,
    /// The step, from 0.
    pub step: usize,
    /// The first layer that diverges; `None` where only the logits do.
    pub layer: Option<usize>,
    /// What differs there.
    pub place: String,
    /// Row of the batch.
    pub row: usize,
    /// The row's token, padding not counted.
    pub token: usize,
    /// What the reference has.
    pub reference: f32,
    /// What the artifact has.
    pub artifact: f32,
    /// The largest difference allowed; for a decision, the tie margin.
    pub bound: f32,
}

/// A kind of value, placed where a model computes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// In layers: by layer, then by kind, keys before decisions before the output.
    Layer(usize, Part),
    /// After all layers.
    Logits,
    /// After the logits.
    Token,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Key,
    Value,
    Decision(ModuleKind),
    Output,
}

impl Place {
    pub(super) fn describe(self) -> String {
        match self {
            Self::Layer(layer, Part::Key) => format!(
                "key in the cache of layer {layer} (its key projection, or the layer before it)"
            ),
            Self::Layer(layer, Part::Value) => format!(
                "value in the cache of layer {layer} (its value projection, or the layer before it)"
            ),
            Self::Layer(layer, Part::Decision(kind)) => {
                format!("decision margin of {}", ModuleId { layer, kind })
            }
            Self::Layer(layer, Part::Output) => format!("output of layer {layer}"),
            Self::Logits => "logits (the final norm or the head, or the last layer)".to_owned(),
            Self::Token => "greedy token".to_owned(),
        }
    }
}
