//! The residual stream between modules.
//!
//! A module that runs for every token leaves its change pending: the norm that follows adds it and
//! norms the sum in one operator, `SkipSimplifiedLayerNormalization`.

use skipgpt_passes::ir::{DType, Weight};

use super::builder::{Builder, Name};
use super::graph::{Attribute, Dim};

/// The shape of a value of every token.
pub(crate) fn every_token(width: usize) -> Vec<Dim> {
    vec![Dim::Symbolic("batch"), Dim::Symbolic("sequence"), Dim::Fixed(width)]
}

/// The residual stream, `[batch, sequence, hidden]`.
pub(super) enum Stream {
    /// A value.
    Value(Name),
    /// A value and what is to be added to it.
    Pending {
        /// The stream before the module.
        x: Name,
        /// What the module adds.
        change: Name,
        /// What the sum is called.
        sum: Name,
    },
}

impl Stream {
    /// The stream as one value.
    pub(super) fn value(self, b: &mut Builder) -> Name {
        match self {
            Self::Value(x) => x,
            Self::Pending { x, change, sum } => b.op(&sum, "Add", &[&x, &change]),
        }
    }

    /// Of each sequence the row numbered by `rows` `[batch, 1, 1]`: `[batch, 1, hidden]`, values named after
    /// `name`. What is pending is gathered too, so that it is added for these rows alone.
    pub(super) fn gathered(self, b: &mut Builder, name: &str, rows: &str) -> Self {
        let mut gather = |name: &str, x: &str| {
            b.op_with(name, "GatherND", &[x, rows], vec![("batch_dims", Attribute::Int(1))])
        };
        match self {
            Self::Value(x) => Self::Value(gather(name, &x)),
            Self::Pending { x, change, sum } => Self::Pending {
                x: gather(name, &x),
                change: gather(&format!("{name}.change"), &change),
                sum,
            },
        }
    }

    /// The stream normed, and the stream itself.
    pub(super) fn norm(
        self,
        b: &mut Builder,
        name: &str,
        scale: &Weight,
        eps: f64,
    ) -> (Name, Name) {
        match self {
            Self::Pending { x, change, sum } if b.dtype == DType::F32 => {
                let scale = b.weight(&format!("{name}.weight"), scale);
                let eps = vec![("epsilon", Attribute::Float(eps as f32))];
                let (op, outputs) = ("SkipSimplifiedLayerNormalization", [name, "", "", &sum]);
                b.microsoft_outputs(op, &[&x, &change, &scale], &outputs, eps);
                (name.to_owned(), sum)
            }
            other => {
                let x = other.value(b);
                (b.rms_norm(name, &x, scale, eps), x)
            }
        }
    }
}
