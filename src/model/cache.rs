//! The KV cache: keys and values of every token so far, in buffers that double when full.

use candle_core::{Result, Tensor};

/// One layer's cache. Not `Clone`: buffers are written in place.
#[derive(Debug, Default)]
pub struct Cache {
    buffers: Option<Buffers>,
    length: usize,
}

/// Each `[batch, kv_heads, capacity, head_dim]`.
#[derive(Debug)]
struct Buffers {
    key: Tensor,
    value: Tensor,
    capacity: usize,
}

/// Fewest tokens a buffer has room for once it grows.
const SMALLEST: usize = 32;

impl Cache {
    /// Appends keys and values `[batch, kv_heads, sequence, head_dim]` and gives those of every token,
    /// `[batch, kv_heads, total, head_dim]`.
    ///
    /// The first ones are kept as they are; later ones go into buffers with room to spare, so that a
    /// decoding step copies one token and not the whole cache.
    pub fn append(&mut self, key: &Tensor, value: &Tensor) -> Result<(Tensor, Tensor)> {
        let (key, value) = (key.contiguous()?, value.contiguous()?);
        let total = self.length + key.dim(2)?;
        let buffers = match self.buffers.take() {
            None => Buffers { key, value, capacity: total },
            Some(mut buffers) => {
                if total > buffers.capacity {
                    buffers =
                        buffers.grown(self.length, total.next_power_of_two().max(SMALLEST))?;
                }
                buffers.key.slice_set(&key, 2, self.length)?;
                buffers.value.slice_set(&value, 2, self.length)?;
                buffers
            }
        };
        let whole = buffers.view(total)?;
        self.buffers = Some(buffers);
        self.length = total;
        Ok(whole)
    }

    /// Forgets all but the first `length` tokens.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        if self.length == 0 {
            // The next tokens may be of another batch.
            self.buffers = None;
        }
    }

    /// Keys and values of every token, `[batch, kv_heads, total, head_dim]`; `None` while empty.
    pub fn view(&self) -> Result<Option<(Tensor, Tensor)>> {
        self.buffers.as_ref().map(|buffers| buffers.view(self.length)).transpose()
    }
}

impl Buffers {
    fn view(&self, length: usize) -> Result<(Tensor, Tensor)> {
        Ok((self.key.narrow(2, 0, length)?, self.value.narrow(2, 0, length)?))
    }

    fn grown(&self, length: usize, capacity: usize) -> Result<Self> {
        let (key, value) = self.view(length)?;
        let copy = |old: &Tensor| {
            let (batch, heads, _, width) = old.dims4()?;
            let new = Tensor::zeros((batch, heads, capacity, width), old.dtype(), old.device())?;
            new.slice_set(&old.contiguous()?, 2, 0)?;
            Ok::<_, candle_core::Error>(new)
        };
        Ok(Self { key: copy(&key)?, value: copy(&value)?, capacity })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use candle_core::Device;

    use super::*;

    #[test]
    fn appends_of_any_length_concatenate() {
        let mut cache = Cache::default();
        assert!(cache.view().unwrap().is_none());
        let mut parts = Vec::new();
        for new in [3, 1, 1, 40, 1, 7] {
            let part = Tensor::randn(0.0_f32, 1.0, (2, 3, new, 4), &Device::Cpu).unwrap();
            parts.push(part.clone());
            let (key, value) = cache.append(&part, &(&part * 2.0).unwrap()).unwrap();
            let whole = Tensor::cat(&parts, 2).unwrap();
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(flat(&key), flat(&whole));
            assert_eq!(flat(&value), flat(&(whole * 2.0).unwrap()));
        }
        assert_eq!(cache.view().unwrap().unwrap().0.dims(), [2, 3, 53, 4]);
    }

    #[test]
    fn what_is_forgotten_is_written_over() {
        let filled = |value: f32, batch, length| {
            Tensor::full(value, (batch, 1, length, 1), &Device::Cpu).unwrap()
        };
        let mut cache = Cache::default();
        cache.append(&filled(1.0, 1, 2), &filled(1.0, 1, 2)).unwrap();
        cache.append(&filled(2.0, 1, 3), &filled(2.0, 1, 3)).unwrap();
        cache.truncate(9);
        cache.truncate(3);
        let (key, _) = cache.append(&filled(3.0, 1, 1), &filled(3.0, 1, 1)).unwrap();
        let key: Vec<f32> = key.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(key, [1.0, 1.0, 2.0, 3.0]);
        cache.truncate(0);
        assert!(cache.view().unwrap().is_none());
        let (key, _) = cache.append(&filled(4.0, 2, 1), &filled(4.0, 2, 1)).unwrap();
        assert_eq!(key.dims(), [2, 1, 1, 1]);
    }
}
