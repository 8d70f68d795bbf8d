//! The windows of a forward pass, and what is summed over them.

use candle_core::{Device, Result, Tensor};

use super::network::Sampling;
use super::settings::Measure;

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

/// Decisions, counted.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Counts {
    /// Those that keep.
    pub(super) kept: f64,
    /// All.
    pub(super) decisions: f64,
    /// The skippable weights of those that keep.
    pub(super) kept_weights: f64,
    /// Of all.
    pub(super) weights: f64,
}

impl Counts {
    /// Adds `kept` of `decisions` of a module with as many skippable `weights`.
    pub(super) fn add(&mut self, kept: f64, decisions: usize, weights: f64) {
        let decisions = decisions as f64;
        self.kept += kept;
        self.decisions += decisions;
        self.kept_weights += kept * weights;
        self.weights += decisions * weights;
    }
}

/// Sums over the windows of a forward pass: the predictions' losses, in nats, their number, and
/// [`Counts`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Totals(pub(super) [f64; Totals::COUNT]);

impl Totals {
    /// How many there are.
    pub(super) const COUNT: usize = 6;

    pub(super) fn new(loss: f64, predictions: usize, counts: Counts) -> Self {
        let Counts { kept, decisions, kept_weights, weights } = counts;
        Self([loss, predictions as f64, kept, decisions, kept_weights, weights])
    }

    /// The mean loss of the predictions, in nats.
    pub(super) fn prediction(&self) -> f64 {
        self.0[0] / self.0[1].max(1.0)
    }

    /// How much keeps, and of how much.
    fn kept(&self, measure: Measure) -> (f64, f64) {
        match measure {
            Measure::Modules => (self.0[2], self.0[3]),
            Measure::Weights => (self.0[4], self.0[5]),
        }
    }

    /// The share that keeps; `None` if nothing is routed.
    pub(super) fn keep(&self, measure: Measure) -> Option<f64> {
        let (kept, all) = self.kept(measure);
        (all > 0.0).then(|| kept / all)
    }

    /// The loss of the predictions and the pull towards the target.
    pub(super) fn loss(&self, sampling: Option<&Sampling>) -> f64 {
        let pull = sampling.and_then(|sampling| {
            let keep = self.keep(sampling.measure)?;
            Some(sampling.alpha * (sampling.target - keep).abs())
        });
        self.prediction() + pull.unwrap_or_default()
    }

    /// What the loss gains by the pull alone, by unit of the measure that keeps.
    pub(super) fn pull(&self, sampling: Option<&Sampling>) -> f64 {
        let Some(sampling) = sampling else { return 0.0 };
        let Some(keep) = self.keep(sampling.measure) else { return 0.0 };
        let sign = match keep.total_cmp(&sampling.target) {
            std::cmp::Ordering::Less => -1.0,
            std::cmp::Ordering::Equal => 0.0,
            std::cmp::Ordering::Greater => 1.0,
        };
        sampling.alpha * sign / self.kept(sampling.measure).1
    }
}
