//! The windows of a forward pass, and what is summed over them.

use candle_core::{Device, Result, Tensor};

use super::network::Sampling;

/// Windows of one length, one after the other; those with fewer tokens are padded at their end, where
/// no real token sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Batch {
    /// `[windows · window]`.
    ids: Vec<u32>,
    /// Number of real tokens, by window.
    lengths: Vec<usize>,
}

impl Batch {
    /// Windows of `window` tokens at most, padded to it.
    pub(super) fn new(windows: Vec<Vec<u32>>, window: usize) -> Self {
        let lengths = windows.iter().map(Vec::len).collect();
        let mut ids = Vec::with_capacity(windows.len() * window);
        for (at, tokens) in windows.into_iter().enumerate() {
            ids.extend(tokens);
            ids.resize((at + 1) * window, 0);
        }
        Self { ids, lengths }
    }

    /// `[windows · window]`.
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Number of windows.
    pub(super) fn windows(&self) -> usize {
        self.lengths.len()
    }

    /// Number of real tokens.
    pub(super) fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Number of rows: of tokens, padding included.
    pub(super) fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Rows of a window.
    pub(super) fn window(&self) -> usize {
        self.ids.len() / self.lengths.len().max(1)
    }

    /// Whether each row is a real token.
    pub(super) fn real(&self) -> impl Iterator<Item = bool> {
        let window = self.window();
        self.lengths.iter().flat_map(move |length| (0..window).map(move |at| at < *length))
    }

    /// 1 for a real token and 0 for padding, `[rows, 1]`; `None` without padding.
    pub(super) fn mask(&self) -> Result<Option<Tensor>> {
        if self.real().all(|real| real) {
            return Ok(None);
        }
        let mask: Vec<f32> = self.real().map(|real| f32::from(u8::from(real))).collect();
        Tensor::from_vec(mask, (self.rows(), 1), &Device::Cpu).map(Some)
    }

    /// The next token of every real token but the last of each window.
    pub(super) fn targets(&self) -> Vec<Option<u32>> {
        let window = self.window();
        let rows = self.lengths.iter().enumerate().flat_map(|(index, length)| {
            (0..window).map(move |at| (at + 1 < *length).then_some(index * window + at + 1))
        });
        rows.map(|next| next.map(|next| self.ids[next])).collect()
    }
}

/// Sums over the windows of a forward pass: the predictions' losses, in nats, and their number, the
/// decisions that keep, and all of them.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Totals(pub(super) [f64; Totals::COUNT]);

impl Totals {
    /// How many there are.
    pub(super) const COUNT: usize = 4;

    /// The mean loss of the predictions, in nats.
    pub(super) fn prediction(&self) -> f64 {
        self.0[0] / self.0[1].max(1.0)
    }

    /// The share of decisions that keep; `None` if nothing is routed.
    pub(super) fn keep(&self) -> Option<f64> {
        (self.0[3] > 0.0).then(|| self.0[2] / self.0[3])
    }

    /// The loss of the predictions and the pull towards the target.
    pub(super) fn loss(&self, sampling: Option<&Sampling>) -> f64 {
        let pull = sampling.zip(self.keep());
        let pull = pull.map(|(sampling, keep)| sampling.alpha * (sampling.target - keep).abs());
        self.prediction() + pull.unwrap_or_default()
    }

    /// What the loss gains with every decision that keeps, by the pull alone.
    pub(super) fn pull(&self, sampling: Option<&Sampling>) -> f64 {
        let Some((sampling, keep)) = sampling.zip(self.keep()) else { return 0.0 };
        let sign = match keep.total_cmp(&sampling.target) {
            std::cmp::Ordering::Less => -1.0,
            std::cmp::Ordering::Equal => 0.0,
            std::cmp::Ordering::Greater => 1.0,
        };
        sampling.alpha * sign / self.0[3]
    }
}
