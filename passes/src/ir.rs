//! The IR: data types only.
//!
//! A [`Model`] is an embedding, a list of [`Layer`]s, a final norm and a head. Weights are
//! *expressions* over tensors that stay in the checkpoint ([`Weight`]), so no type here ever holds
//! tensor data, and a pass that merges a 70B model costs microseconds.
//!
//! Shapes are written `[out, in]` for matrices, as Hugging Face checkpoints store them.

use std::fmt;
use std::ops::Range;

use crate::quantization::Scheme;

/// How far a model is lowered. Each phase forbids, from there on, what its doc says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// As the checkpoint reader built it: adapters unmerged, routers as trained.
    Imported,
    /// No [`Linear::lora`].
    Merged,
    /// No [`Policy::Sampled`]: every router decides by argmax, and a tie keeps.
    Frozen,
    /// No [`Source::Own`] router whose tap is [`Tap::LayerInput`].
    Fused,
    /// No routed module without a [`Dispatch`].
    Lowered,
}

/// How a tensor's elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum DType {
    /// IEEE 754 single precision.
    #[default]
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an `f32`.
    BF16,
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// A decoder-only transformer with routers.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// How far it is lowered.
    pub phase: Phase,
    /// The numbers that are not weights.
    pub config: Config,
    /// Token embedding, `[vocab, hidden]`.
    pub embedding: Weight,
    /// Decoder layers, first to last. A layer with no module left may be absent.
    pub layers: Vec<Layer>,
    /// Scale of the final `RMSNorm`, `[hidden]`.
    pub norm: Weight,
    /// Language-model head, `[vocab, hidden]`. Where the checkpoint ties it, its weight *is* the
    /// embedding's expression.
    pub head: Linear,
}

/// The model's numbers that are not weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Which Hugging Face architecture the checkpoint names.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Added to the mean square in every `RMSNorm`.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Longest sequence the checkpoint was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Number of layers in the checkpoint, before any removal.
    pub num_hidden_layers: usize,
}

/// The architectures the reader knows; all compute the same layer with different parts present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `model_type: "llama"`.
    Llama,
    /// `model_type: "mistral"`, without a sliding window.
    Mistral,
    /// `model_type: "qwen2"`: biases on q, k and v.
    Qwen2,
    /// `model_type: "qwen3"`: a norm on every head of q and k.
    Qwen3,
}

/// Rotary position embedding: pairs `(i, i + head_dim/2)` turn by `position · frequency[i]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies `theta^(-2i/head_dim)`.
    pub theta: f64,
    /// How the frequencies are stretched.
    pub scaling: RopeScaling,
}

/// How the rotary frequencies are stretched for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Unchanged.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths under `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The context length of the original training, in tokens.
        original_max_position_embeddings: usize,
    },
}

/// One decoder layer: an attention module and an MLP module on a residual stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Its place in the checkpoint, which also names its cache; unchanged by removals.
    pub index: usize,
    /// One matrix for the routers of this layer that read [`Tap::LayerInput`] (from
    /// [`Phase::Fused`] on).
    pub router: Option<SharedRouter>,
    /// `None` once removed; the layer then has no cache either.
    pub attention: Option<Attention>,
    /// `None` once removed.
    pub mlp: Option<Mlp>,
}

/// `x + keep · o(core(q(norm(x)), k(norm(x)), v(norm(x))))`, K and V computed for every token.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// Scale of the input `RMSNorm`, `[hidden]`.
    pub norm: Weight,
    /// `[heads · head_dim, hidden]`.
    pub q: Linear,
    /// The key and value projections.
    pub kv: KeyValue,
    /// `[hidden, heads · head_dim]`.
    pub o: Linear,
    /// Scale of the `RMSNorm` on each query head, `[head_dim]` (qwen3).
    pub q_norm: Option<Weight>,
    /// Scale of the `RMSNorm` on each key head, `[head_dim]` (qwen3).
    pub k_norm: Option<Weight>,
    /// Which tokens it runs for.
    pub routing: Routing,
}

/// The key and value projections, each `[kv_heads · head_dim, hidden]`.
#[derive(Debug, Clone, PartialEq)]
pub enum KeyValue {
    /// Two projections.
    Separate {
        /// Keys.
        k: Linear,
        /// Values.
        v: Linear,
    },
    /// One projection, keys above values: `[2 · kv_heads · head_dim, hidden]`.
    Fused(Linear),
}

/// `x + keep · down(silu(gate(norm(x))) · up(norm(x)))`.
#[derive(Debug, Clone, PartialEq)]
pub struct Mlp {
    /// Scale of the post-attention `RMSNorm`, `[hidden]`.
    pub norm: Weight,
    /// The two input projections.
    pub gate_up: GateUp,
    /// `[hidden, intermediate]`.
    pub down: Linear,
    /// Which tokens it runs for.
    pub routing: Routing,
}

/// The MLP's input projections, each `[intermediate, hidden]`.
#[derive(Debug, Clone, PartialEq)]
pub enum GateUp {
    /// Two projections.
    Separate {
        /// Passes through `silu`.
        gate: Linear,
        /// Multiplies it.
        up: Linear,
    },
    /// One projection, gate above up: `[2 · intermediate, hidden]`.
    Fused(Linear),
}

/// Which tokens a module runs for.
#[derive(Debug, Clone, PartialEq)]
pub enum Routing {
    /// Every token.
    Always,
    /// The tokens a router keeps.
    Routed {
        /// Where the decision comes from.
        source: Source,
        /// How skipped tokens are skipped; chosen by `lower-routers`.
        dispatch: Option<Dispatch>,
    },
}

/// Where a module's decision comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// The module's own router.
    Own(Router),
    /// A decision of the layer's [`SharedRouter`].
    Shared {
        /// Which of its decisions, from 0.
        slot: usize,
    },
}

/// A small network that scores, per token, *keep* (row 0 of its output) against *skip* (row 1).
#[derive(Debug, Clone, PartialEq)]
pub struct Router {
    /// `[width, hidden]`, followed by `relu`, in two-layer routers.
    pub hidden: Option<Linear>,
    /// `[2, hidden]`, or `[2, width]` in two-layer routers.
    pub output: Linear,
    /// What it reads.
    pub tap: Tap,
    /// How its scores become a decision.
    pub policy: Policy,
}

/// The routers of one layer as one matrix.
///
/// With `n` decisions the output is `[2n, …]`: the keep scores of decisions `0..n`, then their skip
/// scores. Decision `i` keeps a token where `score[i] >= score[n + i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedRouter {
    /// `[width, hidden]`, followed by `relu`, in two-layer routers.
    pub hidden: Option<Linear>,
    /// `[2 · decisions, hidden or width]`.
    pub output: Linear,
    /// How many decisions it makes: 1 or 2.
    pub decisions: usize,
}

/// The state a router reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tap {
    /// The residual stream at the layer's input, before any norm, for both modules (`SkipGPT`).
    LayerInput,
    /// The residual stream at the module's input: for the MLP, after attention.
    ModuleInput,
}

/// How a router's scores become a decision.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Policy {
    /// As trained: the argmax of scores plus Gumbel noise, temperature `tau` in the gradient.
    /// Executed without noise, it is [`Policy::Argmax`].
    Sampled,
    /// The higher score decides; a tie keeps.
    Argmax,
}

/// How a routed module skips.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dispatch {
    /// Everything is computed and multiplied by keep.
    Masked,
    /// Kept rows are gathered, computed and scattered back.
    Gathered,
    /// As gathered, inside a branch taken only if any token is kept.
    Conditional,
}

/// `y = x · Wᵀ + bias`, plus `scale · (x · Aᵀ) · Bᵀ` where an adapter is attached.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Weight>,
    /// Present in [`Phase::Imported`] only.
    pub lora: Option<Lora>,
}

/// A low-rank adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// A, `[rank, in]`.
    pub down: Stored,
    /// B, `[out, rank]`.
    pub up: Stored,
    /// `alpha / rank`, or `alpha / √rank` for rslora.
    pub scale: f64,
}

/// A tensor of the checkpoint, by the name its reader gave it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Stored {
    /// Unique among the base model, routers and adapter.
    pub name: String,
    /// Row-major dimensions.
    pub shape: Vec<usize>,
    /// How the file stores it.
    pub dtype: DType,
}

/// What a weight is, as arithmetic over stored tensors. Evaluated in `f32`, rounded once.
#[derive(Debug, Clone, PartialEq)]
pub enum Weight {
    /// A tensor of the checkpoint.
    Stored(Stored),
    /// `base + scale · B · A`, summed in `f32`.
    Merged {
        /// `[out, in]`.
        base: Box<Weight>,
        /// The adapter folded into it.
        lora: Lora,
    },
    /// Rows of each, one after the other.
    Concat(Vec<Weight>),
    /// Some rows of another weight.
    Slice {
        /// The whole.
        of: Box<Weight>,
        /// Which rows.
        rows: Range<usize>,
    },
    /// Matrices along the diagonal, zeros elsewhere.
    BlockDiagonal(Vec<Weight>),
    /// Element by element, in `f32`: the margins of routers are differences of their scores' rows.
    Difference {
        /// What is subtracted from.
        of: Box<Weight>,
        /// What is subtracted, of the same shape.
        minus: Box<Weight>,
    },
    /// `[in, out]` of an `[out, in]` matrix.
    Transpose(Box<Weight>),
    /// The same values, rounded to another dtype.
    Cast {
        /// The values.
        of: Box<Weight>,
        /// What they are rounded to.
        dtype: DType,
    },
    /// A matrix in few bits. Stands only as the whole weight of a projection, of the head or of the
    /// embedding.
    Quantized {
        /// The values, `[out, in]`.
        of: Box<Weight>,
        /// How they are stored.
        scheme: Scheme,
    },
}

impl Weight {
    /// Dimensions of the value. Meaningful for validated weights: a malformed expression gives the
    /// shape its first operand suggests.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Stored(stored) => stored.shape.clone(),
            Self::Merged { base, .. } => base.shape(),
            Self::Concat(parts) => {
                let mut shape = parts.first().map(Self::shape).unwrap_or_default();
                if let Some(rows) = shape.first_mut() {
                    *rows = parts.iter().map(Self::rows).sum();
                }
                shape
            }
            Self::Slice { of, rows } => {
                let mut shape = of.shape();
                if let Some(first) = shape.first_mut() {
                    *first = rows.len();
                }
                shape
            }
            Self::BlockDiagonal(parts) => {
                vec![parts.iter().map(Self::rows).sum(), parts.iter().map(Self::columns).sum()]
            }
            Self::Transpose(of) => {
                let mut shape = of.shape();
                shape.reverse();
                shape
            }
            Self::Difference { of, .. } | Self::Cast { of, .. } | Self::Quantized { of, .. } => {
                of.shape()
            }
        }
    }

    /// The first dimension; 1 for a scalar.
    pub fn rows(&self) -> usize {
        self.shape().first().copied().unwrap_or(1)
    }

    /// The product of the dimensions after the first.
    pub fn columns(&self) -> usize {
        self.shape().iter().skip(1).product()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The dtype that holds the value exactly: a stored tensor's own, `f32` for sums.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Stored(stored) => stored.dtype,
            Self::Merged { .. } | Self::Difference { .. } | Self::Quantized { .. } => DType::F32,
            Self::Concat(parts) | Self::BlockDiagonal(parts) => {
                let mut dtypes = parts.iter().map(Self::dtype);
                let first = dtypes.next().unwrap_or(DType::F32);
                if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 }
            }
            Self::Slice { of, .. } | Self::Transpose(of) => of.dtype(),
            Self::Cast { dtype, .. } => *dtype,
        }
    }

    /// Every stored tensor the expression reads, adapters included, in order of appearance.
    pub fn stored(&self) -> Vec<&Stored> {
        match self {
            Self::Stored(stored) => vec![stored],
            Self::Merged { base, lora } => {
                let mut all = base.stored();
                all.extend([&lora.down, &lora.up]);
                all
            }
            Self::Concat(parts) | Self::BlockDiagonal(parts) => {
                parts.iter().flat_map(Self::stored).collect()
            }
            Self::Difference { of, minus } => [of.stored(), minus.stored()].concat(),
            Self::Slice { of, .. }
            | Self::Transpose(of)
            | Self::Cast { of, .. }
            | Self::Quantized { of, .. } => of.stored(),
        }
    }
}

/// The two kinds of module of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ModuleKind {
    /// Self-attention.
    Attention,
    /// The feed-forward network.
    Mlp,
}

/// A module of the checkpoint, written `layers.3.mlp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleId {
    /// The layer's place in the checkpoint.
    pub layer: usize,
    /// Which of its two modules.
    pub kind: ModuleKind,
}

impl fmt::Display for ModuleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attention => "attention",
            Self::Mlp => "mlp",
        })
    }
}

impl ModuleId {
    /// The module that is written `text`: `layers.3.mlp`.
    pub fn parse(text: &str) -> Option<Self> {
        let (layer, kind) = text.strip_prefix("layers.")?.split_once('.')?;
        let mut kinds = [ModuleKind::Attention, ModuleKind::Mlp].into_iter();
        let kind = kinds.find(|known| known.to_string() == kind)?;
        let id = Self { layer: layer.parse().ok()?, kind };
        // `+3` and `03` parse as numbers and are not how a module is written.
        (id.to_string() == text).then_some(id)
    }
}

impl fmt::Display for ModuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layers.{}.{}", self.layer, self.kind)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Imported => "Imported",
            Self::Merged => "Merged",
            Self::Frozen => "Frozen",
            Self::Fused => "Fused",
            Self::Lowered => "Lowered",
        })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        })
    }
}

impl fmt::Display for Dispatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Masked => "masked",
            Self::Gathered => "gathered",
            Self::Conditional => "conditional",
        })
    }
}
