//! Reading logits: the most likely token, log-probabilities.

use std::cmp::Ordering;

use ndarray::{ArrayView1, s};

use crate::decoder::Output;

/// The logits of each row's last position, `[vocab]`.
pub fn last(output: &Output) -> impl Iterator<Item = ArrayView1<'_, f32>> {
    let end = output.logits.dim().1;
    (0..output.logits.dim().0)
        .filter(move |_| end > 0)
        .map(move |row| output.logits.slice(s![row, end - 1, ..]))
}

/// The token of the largest logit, the first of equals. NaN is never the largest; where nothing
/// else is left, the token is 0.
pub fn argmax(logits: &ArrayView1<'_, f32>) -> i64 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (token, logit);
        }
    }
    best.0 as i64
}

/// The `k` most likely tokens with their log-probabilities (nats), most likely first, equals in the
/// order of their ids.
pub fn top(logits: &ArrayView1<'_, f32>, k: usize) -> Vec<(i64, f64)> {
    let normaliser = log_sum_exp(logits);
    let mut tokens: Vec<_> = (0..logits.len()).collect();
    let order = |a: &usize, b: &usize| {
        let (x, y) = (logits[*a], logits[*b]);
        // NaN after every number: it is no candidate.
        let by_logit = y.partial_cmp(&x).unwrap_or_else(|| x.is_nan().cmp(&y.is_nan()));
        if by_logit == Ordering::Equal { a.cmp(b) } else { by_logit }
    };
    if k < tokens.len() && k > 0 {
        tokens.select_nth_unstable_by(k - 1, order);
    }
    tokens.truncate(k);
    tokens.sort_by(order);
    tokens.into_iter().map(|t| (t as i64, f64::from(logits[t]) - normaliser)).collect()
}

/// `ln Σ exp(logit)`, what a logit exceeds its log-probability by. NaN where a logit is NaN.
pub fn log_sum_exp(logits: &ArrayView1<'_, f32>) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if max == f64::NEG_INFINITY {
        return max;
    }
    max + logits.iter().map(|&l| (f64::from(l) - max).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use ndarray::{array, aview1};

    use super::*;

    #[test]
    fn the_largest_is_first_of_equals_and_never_nan() {
        assert_eq!(argmax(&aview1(&[1.0, 3.0, 3.0, 2.0])), 1);
        assert_eq!(argmax(&aview1(&[f32::NAN, -3.0, -2.0])), 2);
        assert_eq!(argmax(&aview1(&[f32::NAN, f32::NAN])), 0);
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let logits = array![0.0_f32, 3.0_f32.ln(), 1000.0 - 1000.0, 0.0];
        let top = top(&logits.view(), 2);
        assert_eq!([top[0].0, top[1].0], [1, 0]);
        assert!((top[0].1 - 0.5_f64.ln()).abs() < 1e-6);
        assert!((top[1].1 - (1.0_f64 / 6.0).ln()).abs() < 1e-6);
    }

    #[test]
    fn large_logits_do_not_overflow() {
        assert!((log_sum_exp(&aview1(&[1000.0, 1000.0])) - (1000.0 + 2.0_f64.ln())).abs() < 1e-9);
    }

    #[test]
    fn nan_shows_in_the_log_probabilities() {
        let top = top(&aview1(&[1.0, f32::NAN, 2.0]), 3);
        assert_eq!([top[0].0, top[1].0, top[2].0], [2, 0, 1]);
        assert!(top.iter().all(|(_, log_prob)| log_prob.is_nan()));
    }

    #[test]
    fn asking_for_more_than_there_is_gives_what_there_is() {
        assert_eq!(top(&aview1(&[1.0, 2.0]), 5).len(), 2);
        assert!(top(&aview1(&[1.0, 2.0]), 0).is_empty());
    }
}
