//! The operations of [`super`] on any device and in any precision: of tensors, never of slices.
//!
//! What comes in and goes out has the precision of the base (`bf16` on a GPU); norms, softmax, keeps
//! and sums are computed in `f32`. Nothing here waits for the device: rows that are skipped are
//! computed and multiplied by zero, because leaving them out would take their number, and that is
//! known on the device alone. On the CPU in `f32` each gives what the operation of its name in
//! [`super`] gives, which is how they are tested.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, D, DType, Layout, Result, Shape, Storage, Tensor, bail,
};

use super::known::{of_one, of_three};
use super::{Causal, Estimator};

/// Elements of the scores that are held at once.
const SCORES: usize = if cfg!(test) { 1 << 10 } else { 1 << 27 };

/// `y = x · Wᵀ`: `dx = dy · W`, and no gradient for `W`.
struct Projection {
    /// `[out, in]`.
    weight: Tensor,
}

/// `x` `[rows, in]` to `[rows, out]`; neither `weight` nor `bias` gets a gradient.
pub(crate) fn frozen_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.contiguous()?.apply_op1(Projection { weight: weight.detach() })?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.detach()),
        None => Ok(y),
    }
}

fn product<S: BackendStorage>(x: &S, at: &Layout, weight: &S, of: &Layout) -> Result<(S, Shape)> {
    let (rows, inner) = at.shape().dims2()?;
    let (outer, width) = of.shape().dims2()?;
    if inner != width {
        bail!("[{rows}, {inner}] times the transpose of [{outer}, {width}]");
    }
    let y = x.matmul(weight, (1, rows, outer, inner), at, &of.transpose(0, 1)?)?;
    Ok((y, (rows, outer).into()))
}

impl CustomOp1 for Projection {
    fn name(&self) -> &'static str {
        "projection"
    }

    fn cpu_fwd(&self, x: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
        let (storage, of) = self.weight.storage_and_layout();
        match &*storage {
            Storage::Cpu(weight) => product(x, at, weight, of),
            _ => bail!("the weight is on a device and the activations are not"),
        }
    }

    fn cuda_fwd(&self, x: &CudaStorage, at: &Layout) -> Result<(CudaStorage, Shape)> {
        let (storage, of) = self.weight.storage_and_layout();
        match &*storage {
            Storage::Cuda(weight) => product(x, at, weight, of),
            _ => bail!("the activations are on a device and the weight is not"),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(gradient.detach().contiguous()?.matmul(&self.weight)?))
    }
}

/// `y = x / √(mean(x²) + eps) · scale` over the last dimension; `scale` gets no gradient.
///
/// With `r = 1 / √(mean(x²) + eps)` and `h = scale · dy`: `dx = r · h − r³ · x · mean(x · h)`.
pub(crate) fn rms_norm(x: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    let (input, scale) = (x.detach().contiguous()?, scale.detach());
    let y = candle_nn::ops::rms_norm(&input, &scale, eps as f32)?;
    of_one("device-rms-norm", x, &y, move |gradient| {
        let (x, dy) = (input.to_dtype(DType::F32)?, gradient.to_dtype(DType::F32)?);
        let h = dy.broadcast_mul(&scale.to_dtype(DType::F32)?)?;
        let inverse = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
        let along = ((&x * &h)?.mean_keepdim(D::Minus1)? * inverse.sqr()?)?;
        (h - x.broadcast_mul(&along)?)?.broadcast_mul(&inverse)?.to_dtype(input.dtype())
    })
}

/// `y = x + keep · module`; `x` and `module` `[rows, width]`, `keep` `[rows, 1]` in `f32`.
pub(super) fn routed_add(x: &Tensor, module: &Tensor, keep: &Tensor) -> Result<Tensor> {
    let (output, kept) = (module.detach(), keep.detach());
    let factor = kept.to_dtype(x.dtype())?;
    let y = (x.detach() + output.broadcast_mul(&factor)?)?;
    of_three("device-routed-add", [x, module, keep], &y, move |gradient| {
        let (dy, output) = (gradient.to_dtype(DType::F32)?, output.to_dtype(DType::F32)?);
        let d_keep = (dy * output)?.sum_keepdim(D::Minus1)?;
        Ok([gradient.clone(), gradient.broadcast_mul(&factor)?, d_keep])
    })
}

/// As [`super::keep::sampled`].
pub(super) fn sampled(margins: &Tensor, noise: &Tensor, estimator: Estimator) -> Result<Tensor> {
    let noisy = (margins.detach() + (noise.detach() * estimator.noise())?)?;
    let kept = noisy.ge(0.0)?.to_dtype(margins.dtype())?;
    let keep = kept.unsqueeze(1)?;
    let values = margins.detach();
    of_one("device-sampled-keep", margins, &keep, move |gradient| {
        let slope = match estimator {
            Estimator::StraightThrough { tau } => {
                let soft = candle_nn::ops::sigmoid(&(&noisy / tau)?)?;
                ((&soft - soft.sqr()?)? / tau)?
            }
            Estimator::ReinMax { tau } => {
                let share = candle_nn::ops::sigmoid(&(&values / tau)?)?;
                ((&kept - share)?.abs()? / (2.0 * tau))?
            }
        };
        gradient.squeeze(1)? * slope
    })
}

/// A scalar whose backward sends `gradient` into `y`.
pub(super) fn seed(y: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let gradient = gradient.detach();
    let zero = Tensor::zeros((), DType::F32, y.device())?;
    of_one("device-seed", y, &zero, move |_| Ok(gradient.clone()))
}

/// The shapes of an attention core, and its rotary tables in the precision of the base.
struct Core {
    batch: usize,
    sequence: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    cos: Tensor,
    sin: Tensor,
    /// `[sequence, sequence]`, 0 or −∞, in `f32`.
    mask: Tensor,
    /// Of `q`, `k` and `v`, not rotated.
    dtype: DType,
}

/// [`super::attention()`]: causal self-attention of whole sequences, `RoPE` included.
///
/// The shares are computed again in the backward, some sequences at a time:
///
/// ```text
/// dV = Pᵀ · dy    dP = dy · Vᵀ    dS = P ∘ (dP − Σ dy · y)    dQ = dS · K    dK = dSᵀ · Q
/// ```
pub(crate) fn attention(
    tokens: &Causal,
    [q, k, v]: [&Tensor; 3],
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
) -> Result<Tensor> {
    let (sequence, dtype) = (tokens.sequence, q.dtype());
    let core = Core {
        batch: q.dim(0)? / sequence.max(1),
        sequence,
        heads,
        kv_heads,
        head_dim,
        cos: tokens.cos.to_dtype(dtype)?,
        sin: tokens.sin.to_dtype(dtype)?,
        mask: causal_mask(sequence, q)?,
        dtype,
    };
    let inputs = [q.detach(), k.detach(), v.detach()];
    let y = core.forward(&inputs)?;
    let output = y.clone();
    of_three("device-attention", [q, k, v], &y, move |gradient| {
        core.backward(&inputs, &output, gradient)
    })
}

/// Which keys a query sees, made where `like` is.
fn causal_mask(sequence: usize, like: &Tensor) -> Result<Tensor> {
    let places = Tensor::arange(0, sequence as u32, like.device())?;
    let shape = (sequence, sequence);
    let query = places.unsqueeze(1)?.broadcast_as(shape)?;
    let key = places.unsqueeze(0)?.broadcast_as(shape)?;
    let seen = key.le(&query)?;
    let zero = Tensor::zeros(shape, DType::F32, like.device())?;
    let hidden = Tensor::full(f32::NEG_INFINITY, shape, like.device())?;
    seen.where_cond(&zero, &hidden)
}

/// Heads of some sequences, `[sequences, heads, sequence, head_dim]` each.
struct Heads {
    query: Tensor,
    key: Tensor,
    value: Tensor,
}

impl Core {
    fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// The sequences that are computed together.
    fn chunks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let one = self.heads * self.sequence * self.sequence;
        let (batch, size) = (self.batch, (SCORES / one.max(1)).max(1));
        (0..batch).step_by(size).map(move |first| (first, size.min(batch - first)))
    }

    /// `[rows, heads · head_dim]` to the heads of `count` sequences from `first` on,
    /// `[count, heads, sequence, head_dim]`.
    fn split(&self, x: &Tensor, heads: usize, (first, count): (usize, usize)) -> Result<Tensor> {
        x.narrow(0, first * self.sequence, count * self.sequence)?
            .reshape((count, self.sequence, heads, self.head_dim))?
            .transpose(1, 2)?
            .contiguous()
    }

    fn rotate(&self, x: &Tensor, (first, count): (usize, usize), back: bool) -> Result<Tensor> {
        let cos = self.cos.narrow(0, first, count)?.contiguous()?;
        let sin = self.sin.narrow(0, first, count)?.contiguous()?;
        let sin = if back { sin.neg()? } else { sin };
        candle_nn::rotary_emb::rope(&x.contiguous()?, &cos, &sin)
    }

    fn heads(&self, [q, k, v]: &[Tensor; 3], chunk: (usize, usize)) -> Result<Heads> {
        let query = self.rotate(&self.split(q, self.heads, chunk)?, chunk, false)?;
        Ok(Heads {
            query: (query * self.scale())?,
            key: self.rotate(&self.split(k, self.kv_heads, chunk)?, chunk, false)?,
            value: self.split(v, self.kv_heads, chunk)?,
        })
    }

    /// The query heads of a key head, one after the other: `[count, kv_heads, groups · sequence, …]`.
    fn grouped(&self, x: &Tensor) -> Result<Tensor> {
        let (count, heads, sequence, width) = x.dims4()?;
        let groups = heads / self.kv_heads;
        x.contiguous()?.reshape((count, self.kv_heads, groups * sequence, width))
    }

    /// And apart again.
    fn ungrouped(&self, x: &Tensor) -> Result<Tensor> {
        let (count, _, _, width) = x.dims4()?;
        x.contiguous()?.reshape((count, self.heads, self.sequence, width))
    }

    /// `[count, kv_heads, groups · sequence, sequence]`, in `f32`.
    fn shares(&self, heads: &Heads) -> Result<Tensor> {
        let scores = self.grouped(&heads.query)?.matmul(&heads.key.t()?)?.to_dtype(DType::F32)?;
        let shape = scores.shape().clone();
        let scores = scores.reshape(((), self.sequence, self.sequence))?;
        let scores = scores.broadcast_add(&self.mask)?;
        candle_nn::ops::softmax_last_dim(&scores)?.reshape(shape)
    }

    fn forward(&self, inputs: &[Tensor; 3]) -> Result<Tensor> {
        let seen = self.chunks().map(|chunk| {
            let heads = self.heads(inputs, chunk)?;
            let seen = self.shares(&heads)?.to_dtype(self.dtype)?.matmul(&heads.value)?;
            join(&self.ungrouped(&seen)?)
        });
        Tensor::cat(&seen.collect::<Result<Vec<_>>>()?, 0)
    }

    fn backward(&self, inputs: &[Tensor; 3], y: &Tensor, dy: &Tensor) -> Result<[Tensor; 3]> {
        let (mut d_q, mut d_k, mut d_v) = (Vec::new(), Vec::new(), Vec::new());
        for chunk in self.chunks() {
            let heads = self.heads(inputs, chunk)?;
            let shares = self.shares(&heads)?;
            let output = self.grouped(&self.split(y, self.heads, chunk)?)?;
            let incoming = self.grouped(&self.split(dy, self.heads, chunk)?)?;
            let narrow = shares.to_dtype(self.dtype)?;
            let value = narrow.t()?.matmul(&incoming)?;
            let along = (output.to_dtype(DType::F32)? * incoming.to_dtype(DType::F32)?)?
                .sum_keepdim(D::Minus1)?;
            let scores = incoming.matmul(&heads.value.t()?)?.to_dtype(DType::F32)?;
            let scores = (shares * scores.broadcast_sub(&along)?)?.to_dtype(self.dtype)?;
            let query = (self.ungrouped(&scores.matmul(&heads.key)?)? * self.scale())?;
            let key = scores.t()?.matmul(&self.grouped(&heads.query)?)?;
            d_q.push(join(&self.rotate(&query, chunk, true)?)?);
            d_k.push(join(&self.rotate(&key, chunk, true)?)?);
            d_v.push(join(&value)?);
        }
        Ok([Tensor::cat(&d_q, 0)?, Tensor::cat(&d_k, 0)?, Tensor::cat(&d_v, 0)?])
    }
}

/// The way back from [`Core::split`]: `[count · sequence, heads · head_dim]`.
fn join(x: &Tensor) -> Result<Tensor> {
    let (count, heads, sequence, width) = x.dims4()?;
    x.transpose(1, 2)?.reshape((count * sequence, heads * width))
}

#[cfg(test)]
mod tests;
