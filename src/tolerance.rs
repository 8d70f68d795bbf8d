//! How far two runs of one model may differ: every bound, by name and dtype, in one table.
//!
//! A value `a` agrees with the reference's `r` when `|a − r| ≤ atol + rtol · max|r|`, the maximum
//! taken over the vector both stand in: the logits of one token, a head's key or value at one
//! position, a token's residual stream. A sum of products errs with the size of its terms, not of
//! its result, so bounds on single elements would have to be as wide as the largest of them needs.

use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::DType;
use skipgpt_passes::quantization::Scheme;

/// How far a value may stand from the reference's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tolerance {
    /// In the values' own unit.
    pub atol: f32,
    /// As a share of the largest magnitude in the reference's vector.
    pub rtol: f32,
}

/// The bounds of one dtype.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tolerances {
    /// Logits of one token, `[vocab]`.
    pub logits: Tolerance,
    /// A head's key or value at one position, `[head_dim]`.
    pub cache: Tolerance,
    /// A token's residual stream after a layer, `[hidden]`.
    pub layer: Tolerance,
    /// A decision whose margin (keep score minus skip score) is this near to 0 in the reference is
    /// a tie: either answer is right.
    pub tie_margin: f32,
    /// Ties that came out the other way may be this share of all decisions (rounded up to whole
    /// decisions).
    pub tie_share: f64,
    /// Where the reference prefers its token by no more than this over the artifact's, in logits
    /// or log-probabilities, either token is right.
    pub token_gap: f32,
    /// A log-probability may stand this far from the recorded one, in nats.
    pub log_prob: f32,
}

/// The table. An artifact's row is that of the dtype it computes in, whatever holds its weights.
const TABLE: [(DType, Tolerances); 3] = [
    (
        DType::F32,
        Tolerances {
            logits: Tolerance { atol: 1e-4, rtol: 5e-5 },
            cache: Tolerance { atol: 1e-4, rtol: 1e-4 },
            layer: Tolerance { atol: 1e-4, rtol: 1e-4 },
            tie_margin: 1e-3,
            tie_share: 1e-3,
            token_gap: 1e-3,
            log_prob: 1e-3,
        },
    ),
    (
        DType::F16,
        Tolerances {
            logits: Tolerance { atol: 5e-2, rtol: 2e-2 },
            cache: Tolerance { atol: 5e-2, rtol: 5e-2 },
            layer: Tolerance { atol: 5e-2, rtol: 5e-2 },
            tie_margin: 5e-2,
            tie_share: 1e-2,
            token_gap: 0.3,
            log_prob: 0.3,
        },
    ),
    (
        DType::BF16,
        Tolerances {
            logits: Tolerance { atol: 0.15, rtol: 6e-2 },
            cache: Tolerance { atol: 0.15, rtol: 6e-2 },
            layer: Tolerance { atol: 0.15, rtol: 6e-2 },
            tie_margin: 0.3,
            tie_share: 5e-2,
            token_gap: 0.5,
            log_prob: 0.5,
        },
    ),
];

/// The bounds of artifacts with matrices in few bits that compute in `f32`: as theirs, but for the
/// worse condition of a model whose weights are coarse.
const FEW_BITS: Tolerances = Tolerances {
    logits: Tolerance { atol: 1e-3, rtol: 5e-4 },
    cache: Tolerance { atol: 1e-3, rtol: 5e-4 },
    layer: Tolerance { atol: 1e-3, rtol: 5e-4 },
    tie_margin: 2e-3,
    tie_share: 2e-3,
    token_gap: 5e-3,
    log_prob: 5e-3,
};

/// How far the logits of a place may stand from the reference's, as a share of their length as a
/// vector and in the mean over places, where products round activations to 8 bits and the
/// reference's do not. Rounding errs by about a hundredth; depth makes more of it.
pub const ROUNDED_LOGITS: f64 = 0.25;

impl Tolerances {
    /// The bounds for artifacts that compute in `dtype`, with matrices in few bits where there is
    /// a `scheme`, and activations that no product rounds.
    pub fn with_scheme(dtype: DType, scheme: Option<&Scheme>) -> Self {
        match (dtype, scheme) {
            (DType::F32, Some(_)) => FEW_BITS,
            _ => Self::of(dtype),
        }
    }

    /// The bounds for artifacts that compute in `dtype`.
    pub const fn of(dtype: DType) -> Self {
        let row = match dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
        };
        TABLE[row].1
    }
}

impl Tolerance {
    /// The largest difference allowed in a vector whose largest magnitude is `scale`.
    pub fn bound(&self, scale: f32) -> f32 {
        self.atol + self.rtol * scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each bound of a row, in one order.
    fn bounds(t: &Tolerances) -> [f64; 10] {
        [
            t.logits.atol.into(),
            t.logits.rtol.into(),
            t.cache.atol.into(),
            t.cache.rtol.into(),
            t.layer.atol.into(),
            t.layer.rtol.into(),
            t.tie_margin.into(),
            t.tie_share,
            t.token_gap.into(),
            t.log_prob.into(),
        ]
    }

    #[test]
    fn every_dtype_finds_its_own_row() {
        for (dtype, row) in TABLE {
            assert_eq!(Tolerances::of(dtype), row, "{dtype}");
        }
    }

    #[test]
    fn bounds_are_positive_and_widen_from_f32_to_f16_to_bf16() {
        for pair in TABLE.windows(2) {
            for (narrow, wide) in bounds(&pair[0].1).into_iter().zip(bounds(&pair[1].1)) {
                assert!(0.0 < narrow && narrow < wide, "{pair:?}");
            }
        }
    }

    #[test]
    fn a_bound_grows_with_the_vector() {
        let tolerance = Tolerance { atol: 0.5, rtol: 0.25 };
        assert!((tolerance.bound(0.0) - 0.5).abs() < f32::EPSILON);
        assert!((tolerance.bound(8.0) - 2.5).abs() < f32::EPSILON);
    }
}
