//! The rules a model obeys in its phase, and the proof that it does.
//!
//! [`validate`] reports every rule that is broken, each with its place, and never stops at the
//! first. The rules, in the order of [`Rule`]'s variants:
//!
//! - *Config.* Every size is positive; every float is finite and positive; the key/value heads
//!   divide the query heads; `head_dim` is even; llama3's low-frequency factor is under the high one.
//! - *Layers.* Indices ascend strictly and stay under `num_hidden_layers`; at least one layer has
//!   an attention module, because a decoder artifact has at least one cache.
//! - *Shapes.* Embedding, head, norms, projections, biases, adapters and routers have the shapes
//!   their fields' docs give; nothing is empty; adapter scales are finite.
//! - *Weight expressions.* `concat` has parts that agree in all but their rows, `blockdiag` has
//!   parts and each is a matrix, a slice lies inside its whole and is not empty, `transpose` and
//!   merges are of matrices.
//! - *Quantised weights.* Only whole weights of projections, head and embedding are quantised, each
//!   a matrix, in blocks of a length that operators take.
//! - *Tensors.* Two stored tensors of one name have one shape and one dtype.
//! - *Shared routers.* One or two decisions; `2 · decisions` rows; each decision is used by exactly
//!   one module of the layer.
//! - *Phases.* What a phase's doc forbids is absent from there on: adapters from
//!   [`Phase::Merged`], noise from [`Phase::Frozen`], a module's own router on the layer input from
//!   [`Phase::Fused`], routed modules without a dispatch from [`Phase::Lowered`]. And what a phase
//!   introduces is absent before it: merged weights before [`Phase::Merged`]; shared routers, fused
//!   projections, `concat`, `blockdiag` and quantised weights before [`Phase::Fused`]; a dispatch before
//!   [`Phase::Lowered`].

mod layers;
mod weights;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

use crate::ir::{Config, DType, Dispatch, Model, Phase, RopeScaling, Stored};
use crate::print::Shape;

/// Proof that a model obeys every rule of its phase.
#[derive(Debug, Clone, Copy)]
pub struct Validated<'a>(&'a Model);

impl<'a> Validated<'a> {
    /// The model.
    pub const fn model(self) -> &'a Model {
        self.0
    }

    /// How far it is lowered.
    pub const fn phase(self) -> Phase {
        self.0.phase
    }
}

/// Every rule a model breaks, each with its place: one a line when displayed. Never empty.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub struct Violations(pub Vec<Violation>);

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, violation) in self.0.iter().enumerate() {
            write!(f, "{}{violation}", if i == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

/// One broken rule.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{path}: {rule}")]
pub struct Violation {
    /// Where: `config`, `layers.3.mlp.gate`, `layers.3.attention.q.lora.down`.
    pub path: String,
    /// What.
    pub rule: Rule,
}

/// A rule, as broken: what was expected and what was found.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Rule {
    /// A size of the config is 0.
    #[error("{key} is 0")]
    ZeroSize {
        /// The config's name for it.
        key: &'static str,
    },
    /// A float is NaN, infinite, zero or negative.
    #[error("{key} is {value}, not a positive number")]
    NotPositive {
        /// The config's name for it.
        key: &'static str,
        /// What it is.
        value: f64,
    },
    /// The key/value heads do not divide the query heads.
    #[error("{query} query heads are not a multiple of {key_value} key/value heads")]
    HeadsNotDivisible {
        /// Query heads.
        query: usize,
        /// Key/value heads.
        key_value: usize,
    },
    /// Rotary embedding turns pairs, and `head_dim` is odd.
    #[error("head_dim {head_dim} is odd; rotary embedding turns pairs")]
    OddHeadDim {
        /// What it is.
        head_dim: usize,
    },
    /// llama3's ramp between low and high frequencies is empty or backwards.
    #[error("low_freq_factor {low} is not under high_freq_factor {high}")]
    RopeRamp {
        /// The low-frequency factor.
        low: f64,
        /// The high-frequency factor.
        high: f64,
    },
    /// A layer does not come after the one before it.
    #[error("follows layer {previous}; indices ascend strictly")]
    LayerOrder {
        /// The index of the layer before it.
        previous: usize,
    },
    /// A layer's index is not one of the checkpoint's.
    #[error("the checkpoint has {layers} layers, counted from 0")]
    LayerOutOfRange {
        /// `num_hidden_layers`.
        layers: usize,
    },
    /// No attention module is left.
    #[error("no attention module is left, and a decoder needs one cache")]
    NoAttention,
    /// A shape is not what its place asks for.
    #[error("shape is [{}], expected [{expected}]", Shape(.found))]
    Shape {
        /// What its place asks for.
        expected: Pattern,
        /// What it is.
        found: Vec<usize>,
    },
    /// A dimension is 0.
    #[error("shape [{}] is empty", Shape(.found))]
    Empty {
        /// The shape.
        found: Vec<usize>,
    },
    /// A fused projection cannot be halved.
    #[error("{rows} rows are not two equal halves")]
    OddRows {
        /// How many there are.
        rows: usize,
    },
    /// An adapter's scale is NaN or infinite.
    #[error("adapter scale is {scale}, not a finite number")]
    Scale {
        /// What it is.
        scale: f64,
    },
    /// A `concat` or `blockdiag` of nothing.
    #[error("{function} has no parts")]
    NoParts {
        /// `concat` or `blockdiag`.
        function: &'static str,
    },
    /// A slice is empty or reaches past the end of its whole.
    #[error("rows {start}..{end} of a weight with {rows} rows")]
    SliceOutOfRange {
        /// First row.
        start: usize,
        /// One past the last row.
        end: usize,
        /// How many the whole has.
        rows: usize,
    },
    /// A quantised weight where only plain ones may stand: in a router, a norm, a bias, or inside
    /// another expression.
    #[error("is quantised; only whole weights of projections, head and embedding may be")]
    MisplacedQuantized,
    /// A block of a length that no operator takes.
    #[error("a block of {block} elements; expected 16, 32, 64, 128 or 256")]
    Block {
        /// The length.
        block: usize,
    },
    /// One name, two tensors.
    #[error("%{name} is [{}] {dtype} here and [{}] {} before", Shape(.shape), Shape(&.before.0), .before.1)]
    NameConflict {
        /// The tensor's name.
        name: String,
        /// Its shape here.
        shape: Vec<usize>,
        /// Its dtype here.
        dtype: DType,
        /// Shape and dtype of the same name, earlier in the model.
        before: (Vec<usize>, DType),
    },
    /// A shared router makes neither one nor two decisions.
    #[error("{decisions} decisions; a layer has one or two")]
    Decisions {
        /// How many it makes.
        decisions: usize,
    },
    /// A module uses a decision that its layer does not make.
    #[error("uses decision {slot}; the layer's router makes {decisions}")]
    SlotOutOfRange {
        /// Which it uses.
        slot: usize,
        /// How many there are; 0 without a shared router.
        decisions: usize,
    },
    /// Two modules use one decision.
    #[error("uses decision {slot}, and so does the layer's attention")]
    SlotTwice {
        /// The decision.
        slot: usize,
    },
    /// No module uses a decision.
    #[error("no module uses decision {slot}")]
    SlotUnused {
        /// The decision.
        slot: usize,
    },
    /// A [`crate::ir::Linear::lora`] from [`Phase::Merged`] on.
    #[error("an adapter outlived merge-lora")]
    AdapterOutlived,
    /// A [`crate::ir::Policy::Sampled`] from [`Phase::Frozen`] on.
    #[error("a sampled router outlived freeze-routers")]
    SampledOutlived,
    /// A module's own router on the layer input from [`Phase::Fused`] on.
    #[error("an own router on the layer input outlived fuse-projections")]
    OwnRouterOutlived,
    /// A routed module without a [`Dispatch`] from [`Phase::Lowered`] on.
    #[error("routed, but lower-routers chose no dispatch")]
    NoDispatch,
    /// Something came before the phase that introduces it.
    #[error("{what} before phase {phase}")]
    TooEarly {
        /// What it is.
        what: &'static str,
        /// The phase that introduces it.
        phase: Phase,
    },
}

/// A shape with some dimensions left open, written `?`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(pub Vec<Option<usize>>);

impl Pattern {
    fn matches(&self, shape: &[usize]) -> bool {
        let fits = |(want, have): (&Option<usize>, &usize)| want.is_none_or(|want| want == *have);
        self.0.len() == shape.len() && self.0.iter().zip(shape).all(fits)
    }
}

impl<const N: usize> From<[usize; N]> for Pattern {
    fn from(shape: [usize; N]) -> Self {
        Self(shape.map(Some).to_vec())
    }
}

impl<const N: usize> From<[Option<usize>; N]> for Pattern {
    fn from(shape: [Option<usize>; N]) -> Self {
        Self(shape.to_vec())
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, size) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "x" };
            match size {
                Some(size) => write!(f, "{separator}{size}")?,
                None => write!(f, "{separator}?")?,
            }
        }
        Ok(())
    }
}

/// Checks `model` against the rules of its phase, which the module's header lists.
///
/// # Errors
///
/// [`Violations`] holds every rule that is broken, with its place.
pub fn validate(model: &Model) -> Result<Validated<'_>, Violations> {
    let mut checker = Checker::new(model);
    checker.config();
    checker.model();
    if checker.violations.is_empty() {
        Ok(Validated(model))
    } else {
        Err(Violations(checker.violations))
    }
}

/// What is known while walking a model.
struct Checker<'a> {
    model: &'a Model,
    violations: Vec<Violation>,
    /// The first use of every tensor name.
    tensors: BTreeMap<&'a str, &'a Stored>,
}

impl<'a> Checker<'a> {
    const fn new(model: &'a Model) -> Self {
        Self { model, violations: Vec::new(), tensors: BTreeMap::new() }
    }

    fn report(&mut self, path: &str, rule: Rule) {
        self.violations.push(Violation { path: path.to_owned(), rule });
    }

    /// Reports `what` where the model has not reached `phase`.
    fn not_before(&mut self, phase: Phase, path: &str, what: &'static str) {
        if self.model.phase < phase {
            self.report(path, Rule::TooEarly { what, phase });
        }
    }

    /// Reports `rule` where the model has reached `phase`.
    fn not_from(&mut self, phase: Phase, path: &str, rule: Rule) {
        if self.model.phase >= phase {
            self.report(path, rule);
        }
    }

    fn config(&mut self) {
        let Config {
            architecture: _,
            hidden_size,
            vocab_size,
            num_attention_heads: query,
            num_key_value_heads: key_value,
            head_dim,
            rms_norm_eps,
            rope,
            max_position_embeddings,
            num_hidden_layers,
        } = self.model.config;
        let sizes = [
            ("hidden_size", hidden_size),
            ("vocab_size", vocab_size),
            ("num_attention_heads", query),
            ("num_key_value_heads", key_value),
            ("head_dim", head_dim),
            ("max_position_embeddings", max_position_embeddings),
            ("num_hidden_layers", num_hidden_layers),
        ];
        for (key, _) in sizes.into_iter().filter(|&(_, size)| size == 0) {
            self.report("config", Rule::ZeroSize { key });
        }
        self.positive("rms_norm_eps", rms_norm_eps);
        if key_value != 0 && !query.is_multiple_of(key_value) {
            self.report("config", Rule::HeadsNotDivisible { query, key_value });
        }
        if !head_dim.is_multiple_of(2) {
            self.report("config", Rule::OddHeadDim { head_dim });
        }
        self.positive("rope_theta", rope.theta);
        match rope.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => self.positive("factor", factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings,
            } => {
                self.positive("factor", factor);
                self.positive("low_freq_factor", low);
                self.positive("high_freq_factor", high);
                if low >= high {
                    self.report("config", Rule::RopeRamp { low, high });
                }
                if original_max_position_embeddings == 0 {
                    let key = "original_max_position_embeddings";
                    self.report("config", Rule::ZeroSize { key });
                }
            }
        }
    }

    fn positive(&mut self, key: &'static str, value: f64) {
        if !(value.is_finite() && value > 0.0) {
            self.report("config", Rule::NotPositive { key, value });
        }
    }

    /// Reports a dispatch that is missing or came early.
    fn dispatch(&mut self, path: &str, dispatch: Option<Dispatch>) {
        match dispatch {
            Some(_) => self.not_before(Phase::Lowered, path, "a dispatch"),
            None => self.not_from(Phase::Lowered, path, Rule::NoDispatch),
        }
    }
}
