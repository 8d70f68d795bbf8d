#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::convert::Infallible;
use std::ops::ControlFlow;

use ndarray::Array3;
use skipgpt_passes::ir::ModuleId;

use super::*;
use crate::decoder::CacheEntry;

/// After token `t` comes `t + 1`, by 4 logits; wraps at the vocabulary of 10. Skips the MLP of odd
/// tokens, and attention never.
#[derive(Default)]
struct Counter {
    past: usize,
    steps: Vec<usize>,
    logit: Option<f32>,
}

impl Decoder for Counter {
    type Error = Infallible;

    fn reset(&mut self) {
        self.past = 0;
    }

    fn step(&mut self, input: &Input) -> Result<Output, Infallible> {
        assert_eq!(input.past(), self.past);
        self.past += input.sequence();
        self.steps.push(input.sequence());
        let last = input.ids[[0, input.sequence() - 1]];
        let mut logits = Array3::zeros((1, 1, 10));
        logits[[0, 0, ((last + 1) % 10) as usize]] = self.logit.unwrap_or(4.0);
        let module = |kind| ModuleId { layer: 0, kind };
        let margins = Array3::from_shape_fn((2, 1, input.sequence()), |(m, _, s)| {
            if m == 1 && input.ids[[0, s]] % 2 == 1 { -1.0 } else { 0.0 }
        });
        let modules = vec![module(ModuleKind::Attention), module(ModuleKind::Mlp)];
        Ok(Output { logits, routing: Some(Routing { modules, margins }) })
    }

    fn cache(&self) -> Result<Vec<CacheEntry>, Infallible> {
        Ok(Vec::new())
    }

    fn vocab_size(&self) -> usize {
        10
    }
}

fn run(options: &Options) -> (Report, Counter) {
    let mut decoder = Counter { past: 99, ..Counter::default() };
    let mut seen = Vec::new();
    let report = tokens(&mut decoder, &[1, 2, 3], options, |id| {
        seen.push(id);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(report.tokens, seen);
    (report, decoder)
}

#[test]
fn stops_after_the_tokens_asked_for_without_a_step_too_many() {
    let (report, decoder) = run(&Options { max_new_tokens: 3, ..Options::default() });
    assert_eq!((report.tokens.as_slice(), report.stop), (&[4, 5, 6][..], Stop::MaxNewTokens));
    assert_eq!(decoder.steps, [3, 1, 1]);
    assert!(report.decode_tokens_per_second.is_some_and(|speed| speed > 0.0));
}

#[test]
fn stops_at_an_end_token_and_keeps_it() {
    let options = Options { max_new_tokens: 9, eos: vec![0, 6], ..Options::default() };
    let (report, _) = run(&options);
    assert_eq!((report.tokens.as_slice(), report.stop), (&[4, 5, 6][..], Stop::EndOfText));
}

#[test]
fn stops_where_the_context_ends() {
    let options = Options { max_new_tokens: 9, context_length: Some(5), ..Options::default() };
    let (report, decoder) = run(&options);
    assert_eq!((report.tokens.as_slice(), report.stop), (&[4, 5][..], Stop::ContextLength));
    assert_eq!(decoder.steps, [3, 1]);
}

#[test]
fn no_tokens_is_a_prefill() {
    let (report, decoder) = run(&Options::default());
    assert_eq!((report.tokens.len(), report.stop), (0, Stop::MaxNewTokens));
    assert_eq!(decoder.steps, [3]);
    assert_eq!(report.decode_tokens_per_second, None);
}

#[test]
fn skips_are_counted_per_kind() {
    let (report, _) = run(&Options { max_new_tokens: 4, ..Options::default() });
    let skipped = |mlp: f64| Some(Skipped { attention: Some(0.0), mlp: Some(mlp) });
    assert_eq!(report.prefill_skipped, skipped(2.0 / 3.0));
    // Tokens 4, 5 and 6 were run; 7 was only chosen.
    assert_eq!(report.decode_skipped, skipped(1.0 / 3.0));
}

#[test]
fn a_seed_decides_and_top_1_is_greedy() {
    let sampled = |seed, top_k| {
        let sampling = Sampling::Random { temperature: 2.0, top_k, top_p: Some(0.99), seed };
        run(&Options { sampling, max_new_tokens: 24, ..Options::default() }).0.tokens
    };
    let greedy = run(&Options { max_new_tokens: 24, ..Options::default() }).0.tokens;
    assert_eq!(sampled(7, None), sampled(7, None));
    assert_ne!(sampled(7, None), sampled(8, None));
    assert_ne!(sampled(7, None), greedy);
    assert_eq!(sampled(7, Some(1)), greedy);
}

#[test]
fn whoever_reads_may_end_it() {
    let mut decoder = Counter { past: 99, ..Counter::default() };
    let options = Options { max_new_tokens: 9, ..Options::default() };
    let report = tokens(&mut decoder, &[1, 2, 3], &options, |id| match id {
        5 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    let report = report.unwrap();
    assert_eq!((report.tokens.as_slice(), report.stop), (&[4, 5][..], Stop::Asked));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |prompt: &[i64], options: &Options| {
        tokens(&mut Counter::default(), prompt, options, |_| ControlFlow::Continue(()))
            .unwrap_err()
            .to_string()
    };
    let random = |temperature, top_k, top_p| Options {
        sampling: Sampling::Random { temperature, top_k, top_p, seed: 0 },
        ..Options::default()
    };
    assert!(refused(&[], &Options::default()).contains("prompt is empty"));
    let full = Options { context_length: Some(2), ..Options::default() };
    let message = "the prompt has 2 tokens, which leaves none of the model's 2";
    assert_eq!(refused(&[1, 2], &full), message);
    let message = "temperature is 0; expected a number above 0";
    assert_eq!(refused(&[1], &random(0.0, None, None)), message);
    assert_eq!(refused(&[1], &random(1.0, Some(0), None)), "top-k is 0; expected at least 1");
    let message = "top-p is 1.5; expected a number above 0 and at most 1";
    assert_eq!(refused(&[1], &random(1.0, None, Some(1.5))), message);
}

#[test]
fn logits_that_are_no_numbers_are_refused() {
    let mut decoder = Counter { logit: Some(f32::NAN), ..Counter::default() };
    let options = Options { max_new_tokens: 1, ..Options::default() };
    let error = tokens(&mut decoder, &[1, 2], &options, |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, Error::NotFinite { position: 2 }), "{error}");
}

#[test]
fn the_first_of_equal_logits_wins() {
    assert_eq!(argmax(&ArrayView1::from(&[0.0, 3.0, -1.0, 3.0])), Some(1));
    assert_eq!(argmax(&ArrayView1::from(&[0.0, f32::INFINITY])), None);
    assert_eq!(argmax(&ArrayView1::from(&[])), None);
}
