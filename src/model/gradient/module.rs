//! A frozen module under a sampled keep, in one piece: `y = x + keep · module(norm(x))`.
//!
//! The same arithmetic as the module written with the operations beside this one, which a test
//! compares it with. In one piece the backward gathers the kept rows once and carries them through,
//! where a chain of operations fills and scans whole tensors at every link, and less has to be kept
//! from the forward: neither the norm's output nor the SwiGLU's is read again, since no weight here
//! has a gradient.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::attention::{Attention, Causal};
use super::values::{among_workers, hold, live, matrix, slice, tensor, widened};
use super::{norm, swiglu};
use crate::model::gemm::{Matrix, Threads, multiply};

/// A projection without a gradient: `[out, in]` and `[out]`.
#[derive(Debug, Clone)]
pub(crate) struct Frozen {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
}

impl Frozen {
    /// `x · Wᵀ + bias`.
    fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let (outer, inner) = self.weight.dims2()?;
        let rows = x.len() / inner;
        let mut y = vec![0.0; rows * outer];
        let weight = widened(&self.weight)?;
        let weight = hold(&weight)?;
        let weight = Matrix::new(&weight, outer, inner)?;
        multiply(&mut y, false, Matrix::new(x, rows, inner)?, weight.t(), Threads::All)?;
        if let Some(bias) = &self.bias {
            let bias = hold(bias)?;
            y.par_chunks_exact_mut(outer).for_each(|row| {
                row.iter_mut().zip(&*bias).for_each(|(value, bias)| *value += bias);
            });
        }
        Ok(y)
    }

    /// `d · W`, or that added to `out`.
    fn backward(&self, d: &[f32], out: &mut [f32], accumulate: bool) -> Result<()> {
        let (outer, inner) = self.weight.dims2()?;
        let weight = widened(&self.weight)?;
        let weight = hold(&weight)?;
        let weight = Matrix::new(&weight, outer, inner)?;
        let d = Matrix::new(d, d.len() / outer, outer)?;
        multiply(out, accumulate, d, weight, Threads::All)
    }

    fn width(&self) -> Result<usize> {
        self.weight.dim(0)
    }
}

/// What lies between the norm and the sum.
enum Interior {
    Mlp { gate: Frozen, up: Frozen, down: Frozen },
    Attention { q: Frozen, k: Frozen, v: Frozen, o: Frozen, core: Attention },
}

struct Sampled {
    scale: Tensor,
    eps: f32,
    interior: Interior,
    /// From the forward to the backward: what the interior reads again, then its output.
    kept: Mutex<Vec<Vec<f32>>>,
}

/// `x + keep · down(silu(gate(norm(x))) · up(norm(x)))`, `x` `[rows, hidden]`, `keep` `[rows, 1]`.
pub(crate) fn sampled_mlp(
    [x, keep]: [&Tensor; 2],
    (scale, eps): (&Tensor, f64),
    [gate, up, down]: [Frozen; 3],
) -> Result<Tensor> {
    apply([x, keep], (scale, eps), Interior::Mlp { gate, up, down })
}

/// `x + keep · o(core(q(norm(x)), k(norm(x)), v(norm(x))))`, heads `(query heads, key heads, width)`.
pub(crate) fn sampled_attention(
    [x, keep]: [&Tensor; 2],
    (scale, eps): (&Tensor, f64),
    [q, k, v, o]: [Frozen; 4],
    tokens: &Causal,
    (heads, kv_heads, head_dim): (usize, usize, usize),
) -> Result<Tensor> {
    let core = Attention { tokens: tokens.clone(), heads, kv_heads, head_dim };
    apply([x, keep], (scale, eps), Interior::Attention { q, k, v, o, core })
}

fn apply(
    [x, keep]: [&Tensor; 2],
    (scale, eps): (&Tensor, f64),
    interior: Interior,
) -> Result<Tensor> {
    let (scale, kept) = (scale.detach(), Mutex::default());
    let op = Sampled { scale, eps: eps as f32, interior, kept };
    x.contiguous()?.apply_op2(&keep.contiguous()?, op)
}

impl Interior {
    /// What is read again in the backward, and the output last.
    fn forward(&self, normed: &[f32]) -> Result<Vec<Vec<f32>>> {
        match self {
            Self::Mlp { gate, up, down } => {
                let width = gate.width()?;
                let (gate, up) = (gate.forward(normed)?, up.forward(normed)?);
                let mut inner = vec![0.0; gate.len()];
                inner
                    .par_chunks_exact_mut(width)
                    .zip(gate.par_chunks_exact(width).zip(up.par_chunks_exact(width)))
                    .for_each(|(inner, (gate, up))| swiglu::forward_row(inner, gate, up));
                let output = down.forward(&inner)?;
                Ok(vec![gate, up, output])
            }
            Self::Attention { q, k, v, o, core } => {
                let (q, k, v) = (q.forward(normed)?, k.forward(normed)?, v.forward(normed)?);
                let seen = core.forward([&q, &k, &v])?;
                let output = o.forward(&seen)?;
                Ok(vec![q, k, v, seen, output])
            }
        }
    }

    /// The gradient of the norm's output and the rows it has, from that of the kept rows' output.
    fn backward(
        &self,
        kept: &[Vec<f32>],
        d: &[f32],
        live_rows: &[usize],
        rows: usize,
        hidden: usize,
    ) -> Result<(Vec<f32>, Vec<usize>)> {
        match (self, kept) {
            (Self::Mlp { gate, up, down }, [gates, ups]) => {
                let width = gate.width()?;
                let mut d_up = vec![0.0; live_rows.len() * width];
                down.backward(d, &mut d_up, false)?;
                let mut d_gate = vec![0.0; d_up.len()];
                d_gate
                    .par_chunks_exact_mut(width)
                    .zip(d_up.par_chunks_exact_mut(width))
                    .zip(live_rows)
                    .for_each(|((d_gate, d_up), row)| {
                        let range = row * width..(row + 1) * width;
                        swiglu::backward_row(d_gate, d_up, &gates[range.clone()], &ups[range]);
                    });
                let mut d_normed = vec![0.0; live_rows.len() * hidden];
                gate.backward(&d_gate, &mut d_normed, false)?;
                up.backward(&d_up, &mut d_normed, true)?;
                Ok((d_normed, live_rows.to_vec()))
            }
            (Self::Attention { q, k, v, o, core }, [queries, keys, values, seen]) => {
                let width = q.width()?;
                let mut d_kept = vec![0.0; live_rows.len() * width];
                o.backward(d, &mut d_kept, false)?;
                let mut d_seen = vec![0.0; rows * width];
                scatter(&d_kept, live_rows, width, |at, row| {
                    d_seen[at..at + width].copy_from_slice(row);
                });
                let [d_q, d_k, d_v] = core.backward([queries, keys, values, seen, &d_seen])?;
                let mut d_normed = vec![0.0; rows * hidden];
                k.backward(&d_k, &mut d_normed, false)?;
                v.backward(&d_v, &mut d_normed, true)?;
                let d_q = gather(&d_q, live_rows, width);
                let mut d_kept = vec![0.0; live_rows.len() * hidden];
                q.backward(&d_q, &mut d_kept, false)?;
                scatter(&d_kept, live_rows, hidden, |at, row| {
                    let out = &mut d_normed[at..at + hidden];
                    out.iter_mut().zip(row).for_each(|(out, d)| *out += d);
                });
                Ok((d_normed, (0..rows).collect()))
            }
            _ => bail!("what the forward kept is not this module's"),
        }
    }
}

/// The rows listed, one after the other.
fn gather(x: &[f32], rows: &[usize], width: usize) -> Vec<f32> {
    rows.iter().flat_map(|row| &x[row * width..(row + 1) * width]).copied().collect()
}

/// Gives each of the rows listed with the place it has among all.
fn scatter(x: &[f32], rows: &[usize], width: usize, mut put: impl FnMut(usize, &[f32])) {
    for (row, values) in rows.iter().zip(x.chunks_exact(width)) {
        put(row * width, values);
    }
}

impl CustomOp2 for Sampled {
    fn name(&self) -> &'static str {
        "sampled-module"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        keep: &CpuStorage,
        keep_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, keep) = (slice(x, x_layout)?, slice(keep, keep_layout)?);
        let y = among_workers(|| self.forward(x, keep, matrix(x_layout.shape()).1))?;
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        keep: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        among_workers(|| self.backward(x, keep, gradient))
    }
}

impl Sampled {
    /// The module's output, `[rows, hidden]`; what the backward reads goes to its place.
    fn forward(&self, x: &[f32], keep: &[f32], hidden: usize) -> Result<Vec<f32>> {
        let scale = hold(&self.scale)?;
        let mut y = vec![0.0; x.len()];
        y.par_chunks_exact_mut(hidden)
            .zip(x.par_chunks_exact(hidden))
            .for_each(|(normed, x)| norm::forward_row(normed, x, &scale, self.eps));
        let kept = self.interior.forward(&y)?;
        let output = kept.last().map(Vec::as_slice).unwrap_or_default();
        y.par_chunks_exact_mut(hidden)
            .zip(x.par_chunks_exact(hidden).zip(output.par_chunks_exact(hidden)))
            .zip(keep)
            .for_each(|((y, (x, output)), keep)| {
                for ((y, x), output) in y.iter_mut().zip(x).zip(output) {
                    *y = x + keep * output;
                }
            });
        match self.kept.lock() {
            Ok(mut place) => *place = kept,
            Err(_) => bail!("a thread failed while it held what the forward keeps"),
        }
        Ok(y)
    }

    /// The gradients of `x`, where it has one, and of `keep`.
    fn backward(
        &self,
        x: &Tensor,
        keep: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut kept = match self.kept.lock() {
            Ok(mut place) => std::mem::take(&mut *place),
            Err(_) => bail!("a thread failed while it held what the forward keeps"),
        };
        let Some(output) = kept.pop() else {
            bail!("the backward of a sampled module ran twice");
        };
        let gradient = gradient.contiguous()?;
        let (rows, hidden) = matrix(x.shape());
        let (dy, held, keeps) = (hold(&gradient)?, hold(x)?, hold(keep)?);
        let d_keep: Vec<f32> = dy
            .par_chunks_exact(hidden)
            .zip(output.par_chunks_exact(hidden))
            .map(|(dy, output)| dy.iter().zip(output).map(|(dy, output)| dy * output).sum())
            .collect();
        drop(output);
        let d_keep = Some(tensor(d_keep, keep.shape())?);
        if !x.track_op() {
            return Ok((None, d_keep));
        }
        let mut dx = dy.to_vec();
        let live_rows: Vec<usize> = (0..rows)
            .filter(|row| keeps[*row] != 0.0 && live(&dy[row * hidden..(row + 1) * hidden]))
            .collect();
        if live_rows.is_empty() {
            return Ok((Some(tensor(dx, x.shape())?), d_keep));
        }
        let mut d = gather(&dy, &live_rows, hidden);
        d.par_chunks_exact_mut(hidden).zip(&live_rows).for_each(|(d, row)| {
            for d in d {
                *d *= keeps[*row];
            }
        });
        let (mut d_normed, rows) = self.interior.backward(&kept, &d, &live_rows, rows, hidden)?;
        let scale = hold(&self.scale)?;
        d_normed.par_chunks_exact_mut(hidden).zip(&rows).for_each(|(d, row)| {
            let x = &held[row * hidden..(row + 1) * hidden];
            norm::backward_row(d, x, &scale, self.eps);
        });
        scatter(&d_normed, &rows, hidden, |at, row| {
            let out = &mut dx[at..at + hidden];
            out.iter_mut().zip(row).for_each(|(out, d)| *out += d);
        });
        Ok((Some(tensor(dx, x.shape())?), d_keep))
    }
}
