#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::convert::Infallible;

use ndarray::Array3;
use skipgpt_passes::ir::ModuleId;

use super::*;
use crate::decoder::{CacheEntry, Output};
use crate::world::{Alone, threads};

/// A decoder of four tokens: token `t` gives its successor `t + 1` half of the probability and the
/// others a sixth each. Its two modules keep what `keeps` says of (module, position).
pub(crate) struct Successor {
    pub(crate) keeps: fn(usize, usize) -> bool,
    pub(crate) reports: bool,
    /// Windows run since the last reset.
    pub(crate) since_reset: usize,
}

impl Successor {
    pub(crate) fn new(keeps: fn(usize, usize) -> bool) -> Self {
        Self { keeps, reports: true, since_reset: 0 }
    }
}

impl Decoder for Successor {
    type Error = Infallible;

    fn reset(&mut self) {
        self.since_reset = 0;
    }

    fn step(&mut self, input: &Input) -> Result<Output, Infallible> {
        assert_eq!(self.since_reset, 0, "windows are run from an empty cache");
        self.since_reset += 1;
        let (batch, sequence) = input.ids.dim();
        let asked = if input.logits == Logits::All { sequence } else { 1 };
        let logits = Array3::from_shape_fn((batch, asked, 4), |(b, s, v)| {
            let token = input.ids[[b, sequence - asked + s]];
            let share: f32 = if v as i64 == (token + 1) % 4 { 0.5 } else { 1.0 / 6.0 };
            share.ln() + 7.0
        });
        let modules = [(0, ModuleKind::Attention), (2, ModuleKind::Mlp)]
            .map(|(layer, kind)| ModuleId { layer, kind })
            .to_vec();
        let keeps = self.keeps;
        let margins =
            Array3::from_shape_fn(
                (2, batch, sequence),
                |(m, _, s)| {
                    if keeps(m, s) { 0.0 } else { -1.0 }
                },
            );
        let routing = self.reports.then_some(Routing { modules, margins });
        Ok(Output { logits, routing })
    }

    fn cache(&self) -> Result<Vec<CacheEntry>, Infallible> {
        Ok(Vec::new())
    }

    fn vocab_size(&self) -> usize {
        4
    }
}

fn options(window: usize) -> Options {
    Options { window, stride: None, limit: None }
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-6
}

#[test]
fn windows_stand_alone_and_leave_out_their_first_token() {
    // Two windows of four and a rest of one: hits 1→2, 2→3; misses 0→0; then 3→0, 0→1 and a miss.
    let tokens = [1, 2, 3, 3, 3, 0, 1, 3, 2];
    let mut decoder = Successor::new(|m, s| m == 0 || s == 0);
    let mut seen = Vec::new();
    let found =
        perplexity(&mut decoder, &tokens, options(4), &Alone, |progress| seen.push(progress))
            .unwrap();
    let (hit, miss) = (2.0_f64.ln(), 6.0_f64.ln());
    let nll = (4.0 * hit + 2.0 * miss) / 6.0;
    assert!(near(found.nll, nll) && near(found.perplexity, nll.exp()), "{found:?}");
    assert_eq!((found.tokens, found.windows, found.window, found.stride), (6, 2, 4, 4));
    // Both windows have the same sum, so the windows do not differ.
    assert!(near(found.nll_standard_error.unwrap(), 0.0));
    let skipped = Skipped { attention: Some(0.0), mlp: Some(0.75), all: Some(0.375) };
    assert_eq!(found.skipped, Some(skipped));
    assert_eq!(seen.iter().map(|p| (p.done, p.windows)).collect::<Vec<_>>(), [(1, 2), (2, 2)]);
    assert!(near(seen[1].perplexity, found.perplexity));
    assert_eq!(decoder.since_reset, 0);
}

#[test]
fn overlapping_windows_score_each_token_once() {
    let tokens: Vec<u32> = (0..11).map(|t| (t * t) % 4).collect();
    let mut decoder = Successor::new(|_, _| true);
    let whole = perplexity(&mut decoder, &tokens, options(11), &Alone, |_| {}).unwrap();
    for stride in [1, 2, 4] {
        // Each of these strides ends on the last token.
        let options = Options { window: 3, stride: Some(stride), limit: None };
        let found = perplexity(&mut decoder, &tokens, options, &Alone, |_| {});
        if stride == 4 {
            assert!(matches!(found, Err(Error::Stride { stride: 4, window: 3 })));
            continue;
        }
        let found = found.unwrap();
        // What precedes the previous token does not matter to this decoder.
        assert_eq!(found.tokens, 10, "stride {stride}");
        assert!(near(found.nll, whole.nll), "stride {stride}");
    }
}

#[test]
fn the_standard_error_is_that_of_window_means() {
    // Windows of two: one prediction each, hits and misses alternating.
    let tokens = [0, 1, 0, 2, 0, 1, 0, 2];
    let mut decoder = Successor::new(|_, _| true);
    let found = perplexity(&mut decoder, &tokens, options(2), &Alone, |_| {}).unwrap();
    let half = (6.0_f64.ln() - 2.0_f64.ln()) / 2.0;
    // Sample deviation of ±half over four windows, by the root of four.
    let expected = (4.0 * half * half / 3.0).sqrt() / 2.0;
    assert!(near(found.nll_standard_error.unwrap(), expected), "{found:?}");
    let one = Options { limit: Some(1), ..options(2) };
    let found = perplexity(&mut decoder, &tokens, one, &Alone, |_| {}).unwrap();
    assert_eq!((found.windows, found.nll_standard_error), (1, None));
}

#[test]
fn a_decoder_that_does_not_report_has_no_skip_rate() {
    let mut decoder = Successor { reports: false, ..Successor::new(|_, _| true) };
    let found = perplexity(&mut decoder, &[0, 1, 2], options(3), &Alone, |_| {}).unwrap();
    assert_eq!(found.skipped, None);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let refused = |tokens: &[u32], options: Options, expected: &str| {
        let mut decoder = Successor::new(|_, _| true);
        let error = perplexity(&mut decoder, tokens, options, &Alone, |_| {}).unwrap_err();
        assert_eq!(error.to_string(), expected);
    };
    let tokens = [0, 1, 2, 3];
    refused(&tokens, options(1), "a window of 1 tokens predicts nothing; it must have 2 or more");
    refused(
        &tokens,
        Options { stride: Some(0), ..options(3) },
        "the stride is 0; it must be 1 to 3, the window",
    );
    refused(
        &tokens,
        Options { limit: Some(0), ..options(3) },
        "a limit of 0 windows leaves nothing to measure; it must be 1 or more",
    );
    refused(
        &tokens,
        options(5),
        "the text has 4 tokens and a window needs 5; take a longer text or a shorter window",
    );
    refused(
        &[0, 9],
        options(2),
        "window 0, token 1: the log-likelihood is NaN; are the weights damaged, or their range too small?",
    );
}

#[test]
fn ranks_that_share_the_windows_find_what_one_finds() {
    // Five windows for two ranks, and for more ranks than there are windows.
    let tokens: Vec<u32> = (0..17).map(|t| (t * t + t / 3) % 4).collect();
    let run = |world: &dyn World| {
        let mut decoder = Successor::new(|m, s| m == 0 || s == 0);
        let options = Options { window: 5, stride: Some(3), limit: None };
        perplexity(&mut decoder, &tokens, options, world, |_| {}).unwrap()
    };
    let alone = run(&Alone);
    for size in [2, 7] {
        for found in threads::run(size, |world| run(world)) {
            assert_eq!(found, alone);
            assert_eq!(found.nll.to_bits(), alone.nll.to_bits());
        }
    }
}
