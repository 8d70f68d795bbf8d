//! What changes over the steps: learning rate, temperature, target.

use serde::{Deserialize, Serialize};

/// How the learning rate goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// The same throughout.
    Constant,
    /// Half a cosine from the full rate to 0.
    Cosine,
}

/// The learning rate over the steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// The highest.
    pub peak: f64,
    /// What follows the warm-up.
    pub shape: Shape,
    /// The share of the steps over which the rate rises from nothing.
    pub warm_up: f64,
}

impl Rate {
    /// The rate of step `step` of `steps`, from 0.
    ///
    /// It rises by equal amounts, the first step's included, over `round(warm_up · steps)` steps.
    pub fn at(&self, step: u64, steps: u64) -> f64 {
        let warm_up = (self.warm_up * steps as f64).round();
        let step = step as f64;
        if step < warm_up {
            return self.peak * (step + 1.0) / warm_up;
        }
        match self.shape {
            Shape::Constant => self.peak,
            Shape::Cosine => {
                let share = (step - warm_up) / (steps as f64 - warm_up).max(1.0);
                self.peak * 0.5 * (1.0 + (std::f64::consts::PI * share).cos())
            }
        }
    }
}

/// A number that moves in a line over a share of the steps and then stays.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// At the first step.
    pub from: f64,
    /// Once the share is over.
    pub to: f64,
    /// The share of the steps.
    pub share: f64,
}

impl Line {
    /// Its value at step `step` of `steps`, from 0.
    pub fn at(&self, step: u64, steps: u64) -> f64 {
        let length = (self.share * steps as f64).max(f64::MIN_POSITIVE);
        self.from + (self.to - self.from) * (step as f64 / length).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    }

    #[test]
    fn rates() {
        let cosine = Rate { peak: 2.0, shape: Shape::Cosine, warm_up: 0.1 };
        close(cosine.at(0, 100), 0.2);
        close(cosine.at(9, 100), 2.0);
        close(cosine.at(10, 100), 2.0);
        close(cosine.at(55, 100), 1.0);
        assert!(cosine.at(99, 100) > 0.0);
        let constant = Rate { peak: 2.0, shape: Shape::Constant, warm_up: 0.0 };
        close(constant.at(0, 100), 2.0);
        close(constant.at(99, 100), 2.0);
    }

    #[test]
    fn lines() {
        let tau = Line { from: 5.0, to: 1.0, share: 1.0 };
        close(tau.at(0, 4), 5.0);
        close(tau.at(3, 4), 2.0);
        let target = Line { from: 0.0, to: 0.25, share: 0.5 };
        close(target.at(1, 4), 0.125);
        close(target.at(3, 4), 0.25);
        close(Line { from: 3.0, to: 1.0, share: 0.0 }.at(1, 4), 1.0);
    }
}
