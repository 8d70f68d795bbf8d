//! Means of items and of tasks, with their standard errors.

use serde::{Deserialize, Serialize};

/// A mean.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The mean.
    pub mean: f64,
    /// Its standard error, items taken as drawn independently; `None` where one item tells nothing
    /// about it.
    pub standard_error: Option<f64>,
}

/// The mean of `values`, with the standard error that their sample deviation gives.
pub(super) fn mean(values: &[f64]) -> Score {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let standard_error = (values.len() > 1).then(|| (squares / (count - 1.0) / count).sqrt());
    Score { mean, standard_error }
}

/// The share of items that are right.
pub(super) fn share(right: impl Iterator<Item = bool>) -> Score {
    mean(&right.map(|right| f64::from(u8::from(right))).collect::<Vec<_>>())
}

/// The mean over tasks, each counted alike whatever its number of items. The tasks are fixed and their
/// items drawn, so the variances of the tasks' means add up.
pub(super) fn mean_of(tasks: impl ExactSizeIterator<Item = Score>) -> Score {
    let count = tasks.len() as f64;
    let (mut sum, mut variance) = (0.0, Some(0.0));
    for task in tasks {
        sum += task.mean;
        variance = variance.zip(task.standard_error).map(|(all, own)| all + own * own);
    }
    Score { mean: sum / count, standard_error: variance.map(|all: f64| all.sqrt() / count) }
}
