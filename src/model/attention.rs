//! `x + keep · o(core(q(norm(x)), k(norm(x)), v(norm(x))))`.
//!
//! Keys and values are computed and cached for every token, whatever the decision: later tokens
//! attend to them. Where rows are gathered, q and o see the kept rows alone.

use candle_core::{Result, Tensor, bail};

use super::cache::Cache;
use super::gradient::{self, Causal, Frozen};
use super::linear::Linear;
use super::mlp::halves;
use super::norm::Norm;
use super::ops::Kernels;
use super::router::{Routing, Rows};
use super::step::Step;

/// Self-attention.
#[derive(Debug, Clone)]
pub struct Attention {
    /// Over the residual stream.
    pub norm: Norm,
    /// Queries.
    pub q: Linear,
    /// Keys and values.
    pub kv: KeyValue,
    /// Back to the residual stream.
    pub o: Linear,
    /// Over each query head (qwen3).
    pub q_norm: Option<Norm>,
    /// Over each key head (qwen3).
    pub k_norm: Option<Norm>,
    /// Which tokens it runs for.
    pub routing: Routing,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// The key and value projections, as the IR has them.
#[derive(Debug, Clone)]
pub enum KeyValue {
    /// Two projections.
    Separate {
        /// Keys.
        k: Linear,
        /// Values.
        v: Linear,
    },
    /// One projection, keys above values.
    Fused(Linear),
}

impl Attention {
    /// The residual stream `[rows, hidden]` after the module; the new keys and values enter `cache`.
    pub fn forward(
        &self,
        x: &Tensor,
        rows: &Rows,
        step: &Step,
        cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        if let Some(tokens) = &step.causal {
            if cache.is_some() {
                bail!("a step of whole sequences fills no cache");
            }
            return self.whole(x, rows, tokens, step);
        }
        let normed = self.norm.forward(x, step.kernels)?;
        let (key, value) = self.keys_and_values(&normed, step)?;
        let (key, value) = match cache {
            Some(cache) => cache.append(&key, &value)?,
            None => (key.contiguous()?, value.contiguous()?),
        };
        if matches!(rows, Rows::None) {
            return Ok(x.clone());
        }
        let query = self.q.forward_rows(&rows.gather(&normed)?, rows, step.kernels)?;
        let query = head_norm(self.q_norm.as_ref(), query, self.head_dim, step)?;
        let query = self.split(&rows.spread(&query, step.rows())?, self.heads, step)?;
        let query = step.kernels.rope(&query, &step.cos, &step.sin)?;
        let seen = self.core(&query, &key, &value, step)?;
        rows.add(x, &self.o.forward_rows(&rows.gather(&seen)?, rows, step.kernels)?)
    }

    /// Keys (after `RoPE`) and values of the new tokens, `[batch, kv_heads, sequence, head_dim]`.
    fn keys_and_values(&self, normed: &Tensor, step: &Step) -> Result<(Tensor, Tensor)> {
        let (key, value) = self.projected(normed, step)?;
        let key = self.split(&key, self.kv_heads, step)?;
        let value = self.split(&value, self.kv_heads, step)?;
        Ok((step.kernels.rope(&key, &step.cos, &step.sin)?, value))
    }

    /// Keys, normalised but not rotated, and values, `[rows, kv_heads · head_dim]`.
    fn projected(&self, normed: &Tensor, step: &Step) -> Result<(Tensor, Tensor)> {
        let kernels = step.kernels;
        let (key, value) = match &self.kv {
            KeyValue::Separate { k, v } => {
                (k.forward(normed, kernels)?, v.forward(normed, kernels)?)
            }
            KeyValue::Fused(both) => halves(&both.forward(normed, kernels)?)?,
        };
        Ok((head_norm(self.k_norm.as_ref(), key, self.head_dim, step)?, value))
    }

    /// [`Attention::forward`] over whole sequences.
    fn whole(&self, x: &Tensor, rows: &Rows, tokens: &Causal, step: &Step) -> Result<Tensor> {
        if matches!(rows, Rows::None) {
            return Ok(x.clone());
        }
        let heads = (self.heads, self.kv_heads, self.head_dim);
        if let (Rows::Sampled(keep), Some(frozen), Kernels::Differentiable) =
            (rows, self.frozen(), step.kernels)
        {
            let norm = (&self.norm.scale, self.norm.eps);
            return gradient::sampled_attention([x, keep], norm, frozen, tokens, heads);
        }
        let normed = self.norm.forward(x, step.kernels)?;
        let (key, value) = self.projected(&normed, step)?;
        let query = self.q.forward_rows(&rows.gather(&normed)?, rows, step.kernels)?;
        let query = head_norm(self.q_norm.as_ref(), query, self.head_dim, step)?;
        let query = rows.spread(&query, step.rows())?;
        let inputs = [&query, &key, &value];
        let core = match step.kernels {
            Kernels::Device => gradient::device::attention,
            _ => gradient::attention,
        };
        let seen = core(tokens, inputs, self.heads, self.kv_heads, self.head_dim)?;
        rows.add(x, &self.o.forward_rows(&rows.gather(&seen)?, rows, step.kernels)?)
    }

    /// The projections, where nothing of them is trained or adapted and no head has a norm.
    fn frozen(&self) -> Option<[Frozen; 4]> {
        let KeyValue::Separate { k, v } = &self.kv else { return None };
        let plain = self.q_norm.is_none() && self.k_norm.is_none();
        let frozen = [self.q.frozen()?, k.frozen()?, v.frozen()?, self.o.frozen()?];
        plain.then_some(frozen)
    }

    /// `[rows, heads · head_dim]` to `[batch, heads, sequence, head_dim]`.
    fn split(&self, x: &Tensor, heads: usize, step: &Step) -> Result<Tensor> {
        x.reshape((step.batch, step.sequence, heads, self.head_dim))?.transpose(1, 2)
    }

    /// Softmax of the scaled scores, times the values: `[rows, heads · head_dim]`.
    ///
    /// The query heads of a key head are stacked along the sequence, so that keys and values are
    /// never repeated.
    fn core(&self, query: &Tensor, key: &Tensor, value: &Tensor, step: &Step) -> Result<Tensor> {
        let (batch, sequence) = (step.batch, step.sequence);
        let groups = self.heads / self.kv_heads;
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let query = (query.contiguous()? * scale)?.reshape((
            batch,
            self.kv_heads,
            groups * sequence,
            self.head_dim,
        ))?;
        let mut scores = query.matmul(&key.transpose(2, 3)?)?;
        if let Some(mask) = &step.mask {
            scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
        }
        let seen = step.kernels.softmax(&scores)?.matmul(value)?;
        seen.reshape((batch, self.heads, sequence, self.head_dim))?
            .transpose(1, 2)?
            .reshape((step.rows(), self.heads * self.head_dim))
    }
}

/// `x` `[rows, heads · head_dim]` with every head normalised, where there is a norm.
fn head_norm(norm: Option<&Norm>, x: Tensor, head_dim: usize, step: &Step) -> Result<Tensor> {
    let Some(norm) = norm else { return Ok(x) };
    let (rows, width) = x.dims2()?;
    let heads = x.reshape((rows, width / head_dim, head_dim))?;
    norm.forward(&heads, step.kernels)?.reshape((rows, width))
}
