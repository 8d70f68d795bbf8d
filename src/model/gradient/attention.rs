//! Causal self-attention of whole sequences, `RoPE` included.
//!
//! Per head, with `Q = rope(q) / √head_dim` and `K = rope(k)`: `P = softmax(Q · Kᵀ)` under the
//! causal mask, `y = P · V`. The shares `P` are not kept but computed again in the backward, block
//! of queries by block of queries, each against the keys it can see:
//!
//! ```text
//! dV += Pᵀ · dy    dP = dy · Vᵀ    dS = P ∘ (dP − Σ dy · y)    dQ = dS · K    dK += dSᵀ · Q
//! ```
//!
//! A query whose `dy` is zero takes no part in the backward.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::exp;
use super::values::{Held, among_workers, hold, live, slice, tensor};
use crate::model::gemm::{Matrix, Threads, multiply};

/// Queries that share a product: few, so that little is computed above the diagonal.
const BLOCK: usize = 64;

/// The shapes and rotary tables of a batch of sequences without padding.
#[derive(Debug, Clone)]
pub(crate) struct Causal {
    /// Tokens of each.
    pub(crate) sequence: usize,
    /// Cosines, `[batch, sequence, head_dim / 2]`.
    pub(crate) cos: Tensor,
    /// Sines, of the same shape.
    pub(crate) sin: Tensor,
}

/// The core: what lies between the projections.
pub(super) struct Attention {
    pub(super) tokens: Causal,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

/// `q` `[batch · sequence, heads · head_dim]`, `k` and `v` `[batch · sequence, kv_heads · head_dim]`,
/// none of them rotated yet, to `[batch · sequence, heads · head_dim]`.
pub(crate) fn attention(
    tokens: &Causal,
    [q, k, v]: [&Tensor; 3],
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
) -> Result<Tensor> {
    let op = Attention { tokens: tokens.clone(), heads, kv_heads, head_dim };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

/// What both directions read.
struct Tables<'a> {
    cos: Held<'a>,
    sin: Held<'a>,
}

impl Attention {
    fn tables(&self) -> Result<Tables<'_>> {
        Ok(Tables { cos: hold(&self.tokens.cos)?, sin: hold(&self.tokens.sin)? })
    }

    /// Head `head` of row `batch` of `x`, `heads` heads wide: rotated and scaled,
    /// `[sequence, head_dim]`.
    fn rotated(
        &self,
        x: &[f32],
        heads: usize,
        (batch, head): (usize, usize),
        scale: f32,
        tables: &Tables<'_>,
    ) -> Vec<f32> {
        let (width, half) = (self.head_dim, self.head_dim / 2);
        let mut out = Vec::with_capacity(self.tokens.sequence * width);
        for token in batch * self.tokens.sequence..(batch + 1) * self.tokens.sequence {
            let x = &x[(token * heads + head) * width..][..width];
            let (cos, sin) = (&tables.cos[token * half..][..half], &tables.sin[token * half..]);
            let (first, second) = x.split_at(half);
            let pairs = || first.iter().zip(second).zip(cos).zip(sin);
            out.extend(pairs().map(|(((a, b), cos), sin)| (a * cos - b * sin) * scale));
            out.extend(pairs().map(|(((a, b), cos), sin)| (a * sin + b * cos) * scale));
        }
        out
    }

    /// Adds `d` `[head_dim]`, of row `token` of the batch, turned back and scaled, to `out`.
    fn add_unrotated(
        &self,
        out: &mut [f32],
        d: &[f32],
        token: usize,
        scale: f32,
        tables: &Tables<'_>,
    ) {
        let half = self.head_dim / 2;
        let (cos, sin) = (&tables.cos[token * half..][..half], &tables.sin[token * half..][..half]);
        let (first, second) = d.split_at(half);
        let (out_first, out_second) = out.split_at_mut(half);
        for pair in 0..half {
            let (a, b) = (first[pair] * scale, second[pair] * scale);
            out_first[pair] += a * cos[pair] + b * sin[pair];
            out_second[pair] += b * cos[pair] - a * sin[pair];
        }
    }

    /// The window of head `head` of row `batch` of `x`: `[sequence, head_dim]`, where it lies.
    fn window<'a>(
        &self,
        x: &'a [f32],
        heads: usize,
        (batch, head): (usize, usize),
        rows: usize,
    ) -> Result<Matrix<'a>> {
        let start = (batch * self.tokens.sequence * heads + head) * self.head_dim;
        Matrix::within(&x[start..], rows, self.head_dim, heads * self.head_dim)
    }

    /// Every (batch, head), in the order of per-head buffers.
    fn place(&self, task: usize) -> (usize, usize) {
        (task / self.heads, task % self.heads)
    }

    fn key_head(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// One head's output, `[sequence, head_dim]`.
    fn forward_head(
        &self,
        out: &mut [f32],
        [q, k, v]: [&[f32]; 3],
        (batch, head): (usize, usize),
        tables: &Tables<'_>,
    ) -> Result<()> {
        let width = self.head_dim;
        let key_head = (batch, self.key_head(head));
        let query = self.rotated(q, self.heads, (batch, head), self.scale(), tables);
        let key = self.rotated(k, self.kv_heads, key_head, 1.0, tables);
        let mut shares = Vec::new();
        for first in (0..self.tokens.sequence).step_by(BLOCK) {
            let end = (first + BLOCK).min(self.tokens.sequence);
            let rows = end - first;
            shares.resize(rows * end, 0.0);
            let block = Matrix::new(&query[first * width..end * width], rows, width)?;
            let keys = Matrix::new(&key[..end * width], end, width)?;
            multiply(&mut shares, false, block, keys.t(), Threads::One)?;
            for (row, shares) in shares.chunks_exact_mut(end).enumerate() {
                softmax(shares, first + row + 1);
            }
            let values = self.window(v, self.kv_heads, key_head, end)?;
            let shares = Matrix::new(&shares, rows, end)?;
            multiply(&mut out[first * width..end * width], false, shares, values, Threads::One)?;
        }
        Ok(())
    }

    /// One head's gradients, `[3, sequence, head_dim]`: of the rotated query, the rotated key, the
    /// value.
    fn backward_head(
        &self,
        out: &mut [f32],
        [q, k, v, y, dy]: [&[f32]; 5],
        (batch, head): (usize, usize),
        tables: &Tables<'_>,
    ) -> Result<()> {
        let (width, sequence) = (self.head_dim, self.tokens.sequence);
        let key_head = (batch, self.key_head(head));
        let query = self.rotated(q, self.heads, (batch, head), self.scale(), tables);
        let key = self.rotated(k, self.kv_heads, key_head, 1.0, tables);
        let (d_query, rest) = out.split_at_mut(sequence * width);
        let (d_key, d_value) = rest.split_at_mut(sequence * width);
        let row = |at: usize| {
            let start = ((batch * sequence + at) * self.heads + head) * width;
            start..start + width
        };
        for first in (0..sequence).step_by(BLOCK) {
            let end = (first + BLOCK).min(sequence);
            let rows: Vec<usize> = (first..end).filter(|at| live(&dy[row(*at)])).collect();
            let gather = |x: &[f32]| -> Vec<f32> {
                rows.iter().flat_map(|at| &x[row(*at)]).copied().collect()
            };
            let (block_y, block_dy) = (gather(y), gather(dy));
            let block: Vec<f32> =
                rows.iter().flat_map(|at| &query[at * width..][..width]).copied().collect();
            let live_rows = rows.len();
            let queries = Matrix::new(&block, live_rows, width)?;
            let incoming = Matrix::new(&block_dy, live_rows, width)?;
            let keys = Matrix::new(&key[..end * width], end, width)?;
            let values = self.window(v, self.kv_heads, key_head, end)?;
            let mut shares = vec![0.0; live_rows * end];
            multiply(&mut shares, false, queries, keys.t(), Threads::One)?;
            for (at, shares) in rows.iter().zip(shares.chunks_exact_mut(end)) {
                softmax(shares, at + 1);
            }
            let weights = Matrix::new(&shares, live_rows, end)?;
            multiply(&mut d_value[..end * width], true, weights.t(), incoming, Threads::One)?;
            let mut d_scores = vec![0.0; live_rows * end];
            multiply(&mut d_scores, false, incoming, values.t(), Threads::One)?;
            let outputs = block_y.chunks_exact(width).zip(block_dy.chunks_exact(width));
            let scores = d_scores.chunks_exact_mut(end).zip(shares.chunks_exact(end));
            for ((d_scores, shares), (y, dy)) in scores.zip(outputs) {
                let mean: f32 = y.iter().zip(dy).map(|(y, dy)| y * dy).sum();
                d_scores.iter_mut().zip(shares).for_each(|(d, share)| *d = share * (*d - mean));
            }
            let d_scores = Matrix::new(&d_scores, live_rows, end)?;
            let mut d_block = vec![0.0; live_rows * width];
            multiply(&mut d_block, false, d_scores, keys, Threads::One)?;
            multiply(&mut d_key[..end * width], true, d_scores.t(), queries, Threads::One)?;
            for (at, d) in rows.iter().zip(d_block.chunks_exact(width)) {
                d_query[at * width..][..width].copy_from_slice(d);
            }
        }
        Ok(())
    }
}

/// Scores of the first `seen` keys become shares; the others become 0.
fn softmax(scores: &mut [f32], seen: usize) {
    let (seen, hidden) = scores.split_at_mut(seen);
    hidden.fill(0.0);
    let highest = seen.iter().fold(f32::NEG_INFINITY, |highest, score| highest.max(*score));
    let mut sum = 0.0;
    exp::exponentials(seen, highest);
    for share in &*seen {
        sum += share;
    }
    for share in seen {
        *share /= sum;
    }
}

impl Attention {
    /// What every head sees, `[batch · sequence, heads · head_dim]`.
    pub(super) fn forward(&self, inputs: [&[f32]; 3]) -> Result<Vec<f32>> {
        let tables = self.tables()?;
        let (width, sequence) = (self.head_dim, self.tokens.sequence);
        let mut heads = vec![0.0; inputs[0].len()];
        heads.par_chunks_exact_mut(sequence * width).enumerate().try_for_each(|(task, out)| {
            self.forward_head(out, inputs, self.place(task), &tables)
        })?;
        // [batch, heads, sequence, head_dim] to [batch, sequence, heads, head_dim].
        let mut y = vec![0.0; heads.len()];
        y.par_chunks_exact_mut(self.heads * width).enumerate().for_each(|(row, y)| {
            let (batch, token) = (row / sequence, row % sequence);
            for (head, y) in y.chunks_exact_mut(width).enumerate() {
                let task = batch * self.heads + head;
                y.copy_from_slice(&heads[(task * sequence + token) * width..][..width]);
            }
        });
        Ok(y)
    }

    /// Gradients of queries, keys and values; `inputs` are these, the output and its gradient.
    pub(super) fn backward(&self, inputs: [&[f32]; 5]) -> Result<[Vec<f32>; 3]> {
        let tables = self.tables()?;
        let (width, sequence) = (self.head_dim, self.tokens.sequence);
        let size = sequence * width;
        let mut heads = vec![0.0; 3 * inputs[0].len()];
        heads.par_chunks_exact_mut(3 * size).enumerate().try_for_each(|(task, out)| {
            self.backward_head(out, inputs, self.place(task), &tables)
        })?;
        let [mut d_q, mut d_k, mut d_v] = [0, 1, 2].map(|at| vec![0.0; inputs[at].len()]);
        // What part `part` of the heads' gradients has for a token.
        let of = |part: usize, row: usize, head: usize| {
            let (batch, token) = (row / sequence, row % sequence);
            let start = (3 * (batch * self.heads + head) + part) * size + token * width;
            &heads[start..start + width]
        };
        d_q.par_chunks_exact_mut(self.heads * width).enumerate().for_each(|(row, d_q)| {
            for (head, d_q) in d_q.chunks_exact_mut(width).enumerate() {
                self.add_unrotated(d_q, of(0, row, head), row, self.scale(), &tables);
            }
        });
        let row_width = self.kv_heads * width;
        d_k.par_chunks_exact_mut(row_width)
            .zip(d_v.par_chunks_exact_mut(row_width))
            .enumerate()
            .for_each(|(row, (d_k, d_v))| {
                for head in 0..self.heads {
                    let place = self.key_head(head) * width;
                    let (d_k, d_v) = (&mut d_k[place..][..width], &mut d_v[place..][..width]);
                    self.add_unrotated(d_k, of(1, row, head), row, 1.0, &tables);
                    d_v.iter_mut().zip(of(2, row, head)).for_each(|(out, d)| *out += d);
                }
            });
        Ok([d_q, d_k, d_v])
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [slice(q, q_layout)?, slice(k, k_layout)?, slice(v, v_layout)?];
        let y = among_workers(|| self.forward(inputs))?;
        Ok((CpuStorage::F32(y), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let held = [hold(q)?, hold(k)?, hold(v)?, hold(y)?, hold(&gradient)?];
        let inputs = held.each_ref().map(|held| &**held);
        let [d_q, d_k, d_v] = among_workers(|| self.backward(inputs))?;
        Ok((
            Some(tensor(d_q, q.shape())?),
            Some(tensor(d_k, k.shape())?),
            Some(tensor(d_v, v.shape())?),
        ))
    }
}
