//! Losses fused with the head: value and gradient without ever holding the logits of every token.
//!
//! Rows go through the head a chunk at a time; a chunk's logits become their own gradient in place,
//! which goes straight back through the head:
//!
//! ```text
//! next token: Σ −log softmax(h · Wᵀ)[target]        dlogits = (p − onehot) / count
//! distilled:  Σ_i p'_i · (log p'_i − log p_i)       dlogits = (p − p') / rows
//! ```
//!
//! where `p'` is the dense model's distribution.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::model::gemm::{Matrix, Threads, multiply};
use crate::model::gradient::{exp, hold};

/// Most elements of a chunk's logits; in tests so few that every loss takes several chunks.
const CHUNK: usize = if cfg!(test) { 32 } else { 12 << 20 };

/// A loss over the rows of a batch.
#[derive(Debug)]
pub(super) struct Loss {
    /// Sum over the rows that count, in nats.
    pub(super) sum: f64,
    /// How many count.
    pub(super) count: usize,
    /// Of the mean, with respect to the head's input, `[rows, hidden]`; empty unless asked for.
    pub(super) gradient: Vec<f32>,
}

impl Loss {
    /// The mean over the rows that count.
    #[cfg(test)]
    pub(super) fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }
}

/// How well `hidden` `[rows, hidden]`, the head's input, predicts `targets`, one per row; `None` is
/// not scored. `head` is `[vocab, hidden]`.
pub(super) fn next_token(
    hidden: &Tensor,
    head: &Tensor,
    targets: &[Option<u32>],
    gradient: bool,
) -> Result<Loss> {
    let count = targets.iter().flatten().count();
    let scale = 1.0 / count.max(1) as f32;
    let mut chunks = Chunks::new(hidden, head, gradient, 1)?;
    let mut sum = 0.0;
    while let Some(rows) = chunks.next_logits()? {
        let width = chunks.vocab;
        let losses = chunks.logits.par_chunks_exact_mut(width).zip(&targets[rows.clone()]);
        let losses: Vec<f64> = losses
            .map(|(row, target)| {
                let Some(target) = target.map(|target| target as usize) else {
                    row.fill(0.0);
                    return 0.0;
                };
                let own = row.get(target).copied().unwrap_or(f32::NAN);
                let log_sum = shares(row);
                if gradient {
                    row[target.min(width - 1)] -= 1.0;
                    for value in &mut *row {
                        *value *= scale;
                    }
                }
                log_sum - f64::from(own)
            })
            .collect();
        sum += losses.iter().sum::<f64>();
        chunks.send_back(rows)?;
    }
    Ok(Loss { sum, count, gradient: chunks.gradient })
}

/// How far the predictions of `hidden` are from those of `teacher`, both `[rows, hidden]`: the
/// Kullback-Leibler divergence, of every row that is `real`.
pub(super) fn distilled(
    hidden: &Tensor,
    teacher: &Tensor,
    head: &Tensor,
    real: &[bool],
) -> Result<Loss> {
    let count = real.iter().filter(|real| **real).count();
    let scale = 1.0 / count.max(1) as f32;
    let mut chunks = Chunks::new(hidden, head, true, 2)?;
    let mut taught = Chunks::new(teacher, head, false, 2)?;
    let mut sum = 0.0;
    while let Some(rows) = chunks.next_logits()? {
        taught.next_logits()?;
        let width = chunks.vocab;
        let pairs = chunks.logits.par_chunks_exact_mut(width);
        let divergences: Vec<f64> = pairs
            .zip(taught.logits.par_chunks_exact_mut(width))
            .zip(&real[rows.clone()])
            .map(|((row, teacher), real)| {
                if !real {
                    row.fill(0.0);
                    return 0.0;
                }
                // Σ p' · (z' − z) before the logits become shares.
                let difference: Vec<f32> =
                    teacher.iter().zip(&*row).map(|(teacher, own)| teacher - own).collect();
                let (log_sum, teacher_log_sum) = (shares(row), shares(teacher));
                let along: f64 = teacher
                    .iter()
                    .zip(&difference)
                    .map(|(share, difference)| f64::from(share * difference))
                    .sum();
                for (value, teacher) in row.iter_mut().zip(&*teacher) {
                    *value = (*value - teacher) * scale;
                }
                along - teacher_log_sum + log_sum
            })
            .collect();
        sum += divergences.iter().sum::<f64>();
        chunks.send_back(rows)?;
    }
    Ok(Loss { sum, count, gradient: chunks.gradient })
}

/// Logits become shares; gives the logarithm of the sum of their exponentials.
fn shares(row: &mut [f32]) -> f64 {
    let highest = row.iter().fold(f32::NEG_INFINITY, |highest, value| highest.max(*value));
    let mut sum = 0.0_f64;
    for block in row.chunks_mut(256) {
        exp::exponentials(block, highest);
        sum += f64::from(block.iter().sum::<f32>());
    }
    let inverse = (1.0 / sum) as f32;
    for value in row {
        *value *= inverse;
    }
    f64::from(highest) + sum.ln()
}

/// Rows on their way through the head.
struct Chunks<'a> {
    hidden: &'a Tensor,
    head: &'a Tensor,
    width: usize,
    vocab: usize,
    rows: usize,
    chunk: usize,
    next: usize,
    /// Of the current chunk, `[chunk, vocab]`.
    logits: Vec<f32>,
    /// `[rows, hidden]`, where it is asked for.
    gradient: Vec<f32>,
}

impl<'a> Chunks<'a> {
    /// `sharing` such walks hold logits at the same time.
    fn new(hidden: &'a Tensor, head: &'a Tensor, gradient: bool, sharing: usize) -> Result<Self> {
        let (rows, width) = hidden.dims2()?;
        let vocab = head.dim(0)?;
        let chunk = (CHUNK / sharing / vocab.max(1)).clamp(1, rows.max(1));
        let gradient = if gradient { vec![0.0; rows * width] } else { Vec::new() };
        Ok(Self { hidden, head, width, vocab, rows, chunk, next: 0, logits: Vec::new(), gradient })
    }

    /// Computes the next chunk's logits; gives its rows.
    fn next_logits(&mut self) -> Result<Option<std::ops::Range<usize>>> {
        let rows = self.next..(self.next + self.chunk).min(self.rows);
        if rows.is_empty() {
            return Ok(None);
        }
        self.next = rows.end;
        self.logits.resize(rows.len() * self.vocab, 0.0);
        let (hidden, head) = (hold(self.hidden)?, hold(self.head)?);
        let hidden = &hidden[rows.start * self.width..rows.end * self.width];
        let hidden = Matrix::new(hidden, rows.len(), self.width)?;
        let head = Matrix::new(&head, self.vocab, self.width)?;
        multiply(&mut self.logits, false, hidden, head.t(), Threads::All)?;
        Ok(Some(rows))
    }

    /// Sends the chunk's logits, now gradients, back through the head.
    fn send_back(&mut self, rows: std::ops::Range<usize>) -> Result<()> {
        if self.gradient.is_empty() {
            return Ok(());
        }
        let head = hold(self.head)?;
        let out = &mut self.gradient[rows.start * self.width..rows.end * self.width];
        let logits = Matrix::new(&self.logits, rows.len(), self.vocab)?;
        multiply(out, false, logits, Matrix::new(&head, self.vocab, self.width)?, Threads::All)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use candle_core::{D, Device, Var};

    use super::*;

    fn random(rows: usize, columns: usize) -> Tensor {
        Tensor::randn(0.0_f32, 1.0, (rows, columns), &Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[track_caller]
    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        let highest = expected.iter().fold(0.0_f32, |highest, v| highest.max(v.abs()));
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5 * highest.max(1.0), "{found} {expected}");
        }
    }

    /// As candle's own operations compute it, over the whole of the logits.
    fn composed(x: &Var, head: &Tensor) -> Tensor {
        candle_nn::ops::log_softmax(&x.matmul(&head.t().unwrap()).unwrap(), D::Minus1).unwrap()
    }

    #[test]
    fn next_tokens_as_candle_computes_them() {
        let (x, head) = (Var::from_tensor(&random(7, 6)).unwrap(), random(11, 6));
        let targets = [Some(3), None, Some(10), Some(0), Some(3), Some(7), None];
        let found = next_token(&x.detach(), &head, &targets, true).unwrap();
        let kept = [0_u32, 2, 3, 4, 5];
        let logs = composed(&x, &head).index_select(&Tensor::new(&kept, &Device::Cpu).unwrap(), 0);
        let ids: Vec<u32> = targets.iter().flatten().copied().collect();
        let ids = Tensor::from_vec(ids, (5, 1), &Device::Cpu).unwrap();
        let loss = logs.unwrap().gather(&ids, 1).unwrap().mean_all().unwrap().neg().unwrap();
        close(&[found.mean() as f32], &[loss.to_scalar().unwrap()]);
        close(&found.gradient, &values(loss.backward().unwrap().get(&x).unwrap()));
        let value = next_token(&x.detach(), &head, &targets, false).unwrap();
        assert!(value.gradient.is_empty());
        assert_eq!(value.sum.to_bits(), found.sum.to_bits());
    }

    #[test]
    fn divergence_as_candle_computes_it() {
        let (x, head) = (Var::from_tensor(&random(7, 6)).unwrap(), random(11, 6));
        let teacher = Var::from_tensor(&random(7, 6)).unwrap();
        let found = distilled(&x.detach(), &teacher.detach(), &head, &[true; 7]).unwrap();
        let (own, taught) = (composed(&x, &head), composed(&teacher, &head).detach());
        let terms = (taught.exp().unwrap() * (&taught - own).unwrap()).unwrap();
        let loss = (terms.sum_all().unwrap() / 7.0).unwrap();
        close(&[found.mean() as f32], &[loss.to_scalar().unwrap()]);
        close(&found.gradient, &values(loss.backward().unwrap().get(&x).unwrap()));
        assert!(distilled(&x.detach(), &x.detach(), &head, &[true; 7]).unwrap().sum.abs() < 1e-5);
    }

    #[test]
    fn chunks_change_nothing() {
        let (x, head) = (random(5, 6), random(CHUNK / 2, 6));
        let targets = [Some(1), Some(2), Some(3), Some(4), Some(5)];
        // Two rows a chunk; each row alone must give the same.
        let whole = next_token(&x, &head, &targets, true).unwrap();
        for (row, target) in targets.iter().enumerate() {
            let one = x.narrow(0, row, 1).unwrap().contiguous().unwrap();
            let alone = next_token(&one, &head, &[*target], true).unwrap();
            let scaled: Vec<f32> = alone.gradient.iter().map(|value| value / 5.0).collect();
            close(&whole.gradient[row * 6..][..6], &scaled);
        }
    }
}
