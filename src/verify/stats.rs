//! Counts and largest errors.

use serde::Serialize;

/// How two sets of values differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Stats {
    /// Values compared.
    pub compared: u64,
    /// Of those, how many are out of tolerance, those that are not finite included.
    pub beyond: u64,
    /// Of those, how many are NaN or infinite on either side.
    pub not_finite: u64,
    /// Largest `|a − r|`; NaN (in JSON `null`) where a value is not finite.
    pub max_abs_error: f32,
    /// Largest `|a − r|` as a share of the largest magnitude in the reference's vector, vectors of
    /// zeros apart; NaN (in JSON `null`) where a value is not finite.
    pub max_rel_error: f32,
}

/// How two sets of decisions differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Decisions {
    /// Decisions compared, ties included.
    pub compared: u64,
    /// Of those, how many are equal.
    pub equal: u64,
    /// How many are within the tie margin in the reference, whichever way they came out.
    pub near_ties: u64,
    /// Of those, how many came out the other way.
    pub flipped_ties: u64,
    /// How many differ and are no tie.
    pub different: u64,
    /// Decisions that the reference took and the artifact does not report.
    pub unreported: u64,
}

impl Stats {
    /// Counts a pair of values; whether they agree.
    pub(super) fn add(&mut self, reference: f32, artifact: f32, scale: f32, bound: f32) -> bool {
        let error = (artifact - reference).abs();
        let finite = reference.is_finite() && artifact.is_finite();
        let agree = finite && error <= bound;
        self.compared += 1;
        self.beyond += u64::from(!agree);
        self.not_finite += u64::from(!finite);
        let relative = if scale == 0.0 { 0.0 } else { error / scale };
        if finite {
            // `max` would forget a NaN.
            self.max_abs_error = larger(self.max_abs_error, error);
            self.max_rel_error = larger(self.max_rel_error, relative);
        } else {
            self.max_abs_error = f32::NAN;
            self.max_rel_error = f32::NAN;
        }
        agree
    }

    /// The two sets as one.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            compared: self.compared + other.compared,
            beyond: self.beyond + other.beyond,
            not_finite: self.not_finite + other.not_finite,
            max_abs_error: larger(self.max_abs_error, other.max_abs_error),
            max_rel_error: larger(self.max_rel_error, other.max_rel_error),
        }
    }
}

/// The larger of two, NaN above all.
fn larger(a: f32, b: f32) -> f32 {
    if a.is_nan() || a > b { a } else { b }
}

impl Decisions {
    /// The two sets as one.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            compared: self.compared + other.compared,
            equal: self.equal + other.equal,
            near_ties: self.near_ties + other.near_ties,
            flipped_ties: self.flipped_ties + other.flipped_ties,
            different: self.different + other.different,
            unreported: self.unreported + other.unreported,
        }
    }
}
