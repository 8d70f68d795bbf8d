//! From samples to what is reported: quantiles, and ratios of medians with their range over rounds.

use serde::{Deserialize, Serialize};

/// How samples spread; in the samples' unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// A quarter is smaller.
    pub lower_quartile: f64,
    /// Half is smaller.
    pub median: f64,
    /// Three quarters are smaller.
    pub upper_quartile: f64,
}

/// A ratio of medians.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Of all samples.
    pub median: f64,
    /// Of the round where it was lowest.
    pub lowest: f64,
    /// Of the round where it was highest.
    pub highest: f64,
}

/// Samples by round; every round has at least one.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Rounds(Vec<Vec<f64>>);

/// A median over everything and one per round.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Medians {
    pub(super) all: f64,
    rounds: Vec<f64>,
}

impl Spread {
    /// Of samples in any order; all 0 without samples.
    pub(super) fn of(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = samples.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        Self {
            min: quantile(&sorted, 0.0),
            lower_quartile: quantile(&sorted, 0.25),
            median: quantile(&sorted, 0.5),
            upper_quartile: quantile(&sorted, 0.75),
        }
    }

    /// Every number times `factor`.
    pub(super) fn times(self, factor: f64) -> Self {
        Self {
            min: self.min * factor,
            lower_quartile: self.lower_quartile * factor,
            median: self.median * factor,
            upper_quartile: self.upper_quartile * factor,
        }
    }
}

/// The value below which a share of `sorted` lies, between neighbours where it falls between them.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = share * last as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * place.fract()
}

impl Rounds {
    /// Adds the samples of one more round.
    pub(super) fn push(&mut self, samples: Vec<f64>) {
        self.0.push(samples);
    }

    pub(super) fn count(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }

    pub(super) fn spread(&self) -> Spread {
        Spread::of(self.0.iter().flatten().copied())
    }

    pub(super) fn medians(&self) -> Medians {
        let of = |round: &Vec<f64>| Spread::of(round.iter().copied()).median;
        Medians { all: self.spread().median, rounds: self.0.iter().map(of).collect() }
    }
}

impl Medians {
    /// The mean of several, round by round. `None` of none.
    pub(super) fn mean(several: &[Self]) -> Option<Self> {
        let (first, count) = (several.first()?, several.len() as f64);
        let mean = |of: &dyn Fn(&Self) -> f64| several.iter().map(of).sum::<f64>() / count;
        let rounds = (0..first.rounds.len()).map(|round| mean(&|m: &Self| m.rounds[round]));
        Some(Self { all: mean(&|m: &Self| m.all), rounds: rounds.collect() })
    }
}

impl Ratio {
    /// `numerator / denominator`, of the same rounds.
    pub(super) fn of(numerator: &Medians, denominator: &Medians) -> Self {
        let rounds = numerator.rounds.iter().zip(&denominator.rounds).map(|(a, b)| a / b);
        let (mut lowest, mut highest) = (f64::INFINITY, f64::NEG_INFINITY);
        for ratio in rounds {
            lowest = lowest.min(ratio);
            highest = highest.max(ratio);
        }
        Self { median: numerator.all / denominator.all, lowest, highest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(samples: &[&[f64]]) -> Rounds {
        Rounds(samples.iter().map(|round| round.to_vec()).collect())
    }

    #[test]
    fn quantiles_lie_between_neighbours() {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0]);
        let expected = Spread { min: 1.0, lower_quartile: 1.75, median: 2.5, upper_quartile: 3.25 };
        assert_eq!(spread, expected);
        let one = Spread { min: 7.0, lower_quartile: 7.0, median: 7.0, upper_quartile: 7.0 };
        assert_eq!(Spread::of([7.0]), one);
        assert_eq!(spread.times(2.0), Spread::of([8.0, 2.0, 6.0, 4.0]));
    }

    #[test]
    fn a_ratio_is_of_all_samples_and_ranges_over_rounds() {
        let slow = rounds(&[&[10.0, 12.0, 11.0], &[20.0, 20.0, 20.0]]);
        let fast = rounds(&[&[10.0, 10.0, 50.0], &[5.0, 5.0, 5.0]]);
        let ratio = Ratio::of(&slow.medians(), &fast.medians());
        // Medians of all: 16 and 7.5; by round 11/10 and 20/5.
        assert_eq!(ratio, Ratio { median: 16.0 / 7.5, lowest: 1.1, highest: 4.0 });
        assert_eq!((slow.count(), slow.spread().min), (6, 10.0));
    }

    #[test]
    fn several_are_averaged_round_by_round() {
        let one = rounds(&[&[1.0], &[2.0]]).medians();
        let two = rounds(&[&[3.0], &[6.0]]).medians();
        let mean = Medians::mean(&[one.clone(), two]).expect("two");
        assert_eq!(mean, Medians { all: 3.0, rounds: vec![2.0, 4.0] });
        let ratio = Ratio::of(&mean, &one);
        assert_eq!((ratio.lowest, ratio.highest), (2.0, 2.0));
        assert_eq!(Medians::mean(&[]), None);
    }
}
