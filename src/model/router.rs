//! Routers, and the rows a decision keeps.

use candle_core::{DType, Result, Tensor};
use skipgpt_passes::ir::{Dispatch, Tap};

use super::linear::Linear;

/// A module's own router, or the one its layer shares. Always in `f32`: rounding a router to a
/// narrower dtype flips decisions near a tie.
#[derive(Debug, Clone)]
pub struct Router {
    /// Followed by `relu`, in two-layer routers.
    pub hidden: Option<Linear>,
    /// `[2n, …]`: keep scores of `n` decisions, then their skip scores.
    pub output: Linear,
    /// How many decisions it makes.
    pub decisions: usize,
}

impl Router {
    /// Keep score minus skip score of every decision: `[rows, hidden]` to `[rows, decisions]`, `f32`.
    pub fn margins(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.to_dtype(DType::F32)?;
        if let Some(hidden) = &self.hidden {
            x = hidden.forward(&x)?.relu()?;
        }
        let scores = self.output.forward(&x)?;
        scores.narrow(1, 0, self.decisions)? - scores.narrow(1, self.decisions, self.decisions)?
    }
}

/// Which tokens a module runs for.
#[derive(Debug, Clone)]
pub enum Routing {
    /// Every token.
    Always,
    /// The tokens a router keeps.
    Routed {
        /// Where the decision comes from.
        source: Source,
        /// `None` before dispatch is chosen: what [`Dispatch::Masked`] computes.
        dispatch: Option<Dispatch>,
    },
}

/// Where a module's decision comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// The module's own router.
    Own {
        /// Makes one decision.
        router: Router,
        /// What it reads.
        tap: Tap,
    },
    /// A decision of the layer's shared router.
    Shared {
        /// Evaluated once per layer and step; both modules hold the same one.
        router: Router,
        /// Which.
        slot: usize,
    },
}

/// The rows a module runs for, as its dispatch has them.
#[derive(Debug, Clone)]
pub enum Rows {
    /// Every row.
    All,
    /// Every row is computed; the result is multiplied by keep, `[rows, 1]`, 0 or 1.
    Masked(Tensor),
    /// The rows listed, `[kept]` of `u32`, are computed and added back where they came from.
    Gathered(Tensor),
    /// No row: nothing is computed.
    None,
}

impl Rows {
    /// The rows kept by `margins` `[rows]`: those at 0 and above, so that a tie keeps.
    pub fn new(margins: &Tensor, dispatch: Option<Dispatch>) -> Result<Self> {
        let gathered = match dispatch {
            None | Some(Dispatch::Masked) => {
                return Ok(Self::Masked(margins.ge(0.0)?.to_dtype(DType::F32)?.unsqueeze(1)?));
            }
            Some(Dispatch::Gathered) => true,
            Some(Dispatch::Conditional) => false,
        };
        let kept: Vec<u32> = (0_u32..)
            .zip(margins.to_vec1::<f32>()?)
            .filter_map(|(row, margin)| (margin >= 0.0).then_some(row))
            .collect();
        if kept.is_empty() && !gathered {
            return Ok(Self::None);
        }
        let length = kept.len();
        Ok(Self::Gathered(Tensor::from_vec(kept, length, margins.device())?))
    }

    /// The rows of `x` `[rows, width]` that are computed.
    pub fn gather(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::All | Self::Masked(_) | Self::None => Ok(x.clone()),
            Self::Gathered(kept) => x.index_select(kept, 0),
        }
    }

    /// `residual` `[rows, width]` plus what [`Rows::gather`]'s rows became.
    pub fn add(&self, residual: &Tensor, computed: &Tensor) -> Result<Tensor> {
        match self {
            Self::All => residual + computed,
            Self::Masked(keep) => {
                residual + computed.broadcast_mul(&keep.to_dtype(computed.dtype())?)?
            }
            Self::Gathered(kept) => residual.index_add(kept, computed, 0),
            Self::None => Ok(residual.clone()),
        }
    }

    /// `computed`, one row for each of [`Rows::gather`]'s, at its place among `rows` rows; zeros
    /// elsewhere.
    pub fn spread(&self, computed: &Tensor, rows: usize) -> Result<Tensor> {
        match self {
            Self::All | Self::Masked(_) | Self::None => Ok(computed.clone()),
            Self::Gathered(kept) => {
                let width = computed.dim(1)?;
                Tensor::zeros((rows, width), computed.dtype(), computed.device())?
                    .index_add(kept, computed, 0)
            }
        }
    }
}
