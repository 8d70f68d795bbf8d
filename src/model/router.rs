//! Routers, and the rows a decision keeps.

use candle_core::{DType, Result, Tensor};
use skipgpt_passes::ir::{Dispatch, Tap};

use super::gradient;
use super::linear::Linear;
use super::ops::Kernels;

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
    pub fn margins(&self, x: &Tensor, kernels: Kernels) -> Result<Tensor> {
        let mut x = x.to_dtype(DType::F32)?;
        if let Some(hidden) = &self.hidden {
            x = hidden.forward(&x, kernels)?.relu()?;
        }
        let scores = self.output.forward(&x, kernels)?;
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
    /// As [`Rows::Masked`], with a keep that gradients flow through.
    Sampled(Tensor),
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
            Self::All | Self::Masked(_) | Self::Sampled(_) | Self::None => Ok(x.clone()),
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
            Self::Sampled(keep) => gradient::routed_add(residual, computed, keep),
            Self::Gathered(kept) => residual.index_add(kept, computed, 0),
            Self::None => Ok(residual.clone()),
        }
    }

    /// `computed`, one row for each of [`Rows::gather`]'s, at its place among `rows` rows; zeros
    /// elsewhere.
    pub fn spread(&self, computed: &Tensor, rows: usize) -> Result<Tensor> {
        match self {
            Self::All | Self::Masked(_) | Self::Sampled(_) | Self::None => Ok(computed.clone()),
            Self::Gathered(kept) => {
                let width = computed.dim(1)?;
                Tensor::zeros((rows, width), computed.dtype(), computed.device())?
                    .index_add(kept, computed, 0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use candle_core::Device;

    use super::*;

    fn rows(margins: &[f32], dispatch: Option<Dispatch>) -> Rows {
        Rows::new(&Tensor::new(margins, &Device::Cpu).unwrap(), dispatch).unwrap()
    }

    /// The rows of `[[10], [11], [12]]` that are computed, and the residual after 1 is added to each.
    fn run(rows: &Rows) -> (Vec<f32>, Vec<f32>) {
        let x = Tensor::new(&[[10.0_f32], [11.0], [12.0]], &Device::Cpu).unwrap();
        let computed = rows.gather(&x).unwrap();
        let ones = computed.ones_like().unwrap();
        let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
        (flat(computed), flat(rows.add(&x, &ones).unwrap()))
    }

    #[test]
    fn each_dispatch_computes_its_rows_and_a_tie_keeps() {
        let margins = [0.0, -0.5, f32::MIN_POSITIVE];
        let (all, kept) = (vec![10.0, 11.0, 12.0], vec![10.0, 12.0]);
        let after = vec![11.0, 11.0, 13.0];
        for (dispatch, computed) in [
            (None, &all),
            (Some(Dispatch::Masked), &all),
            (Some(Dispatch::Gathered), &kept),
            (Some(Dispatch::Conditional), &kept),
        ] {
            assert_eq!(run(&rows(&margins, dispatch)), (computed.clone(), after.clone()));
        }
        assert_eq!(run(&Rows::All).1, [11.0, 12.0, 13.0]);
    }

    #[test]
    fn only_conditional_leaves_the_branch_out() {
        let none = [-1.0, -f32::MIN_POSITIVE, f32::NAN];
        assert!(matches!(rows(&none, Some(Dispatch::Conditional)), Rows::None));
        let gathered = rows(&none, Some(Dispatch::Gathered));
        assert_eq!(run(&gathered), (vec![], vec![10.0, 11.0, 12.0]));
    }

    #[test]
    fn spread_puts_rows_where_they_came_from() {
        let rows = rows(&[1.0, -1.0, 1.0], Some(Dispatch::Gathered));
        let computed = Tensor::new(&[[5.0_f32, 6.0], [7.0, 8.0]], &Device::Cpu).unwrap();
        let spread: Vec<Vec<f32>> = rows.spread(&computed, 3).unwrap().to_vec2().unwrap();
        assert_eq!(spread, [[5.0, 6.0], [0.0, 0.0], [7.0, 8.0]]);
    }
}
