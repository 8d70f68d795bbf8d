//! Runs a golden file's prompts again and compares.
//!
//! The recorded tokens are fed, so that one token that comes out otherwise does not change all that
//! follow. A decision cannot be fed: after a tie that came out the other way, what depends on it is
//! left out of the comparison and counted, and a check that leaves out too much fails.

use std::collections::BTreeSet;
use std::time::Instant;

use ndarray::ArrayView1;
use skipgpt_passes::ir::{ModuleId, ModuleKind};

use super::record::{in_layer_order, run, same, tokens_exist};
use super::report::{PromptReport, Report};
use super::{Artifact, Environment, Error, Golden, Prompt};
use crate::decoder::{Decoder, Input, Logits, Routing};
use crate::logits::{argmax, last, log_sum_exp};
use crate::tolerance::Tolerances;

/// How strictly to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Tokens and decisions must be the recorded ones. Log-probabilities may differ within
    /// tolerance, as in the other mode: their last bits depend on the machine.
    Exact,
    /// Ties, of decisions and of tokens, may come out the other way.
    Tolerant,
}

/// What the check is told.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckOptions {
    /// How strictly to compare.
    pub mode: Mode,
    /// The bounds.
    pub tolerances: Tolerances,
    /// Which artifact it is.
    pub artifact: Artifact,
    /// What runs it.
    pub environment: Environment,
    /// The tokens that the artifact's tokenizer now gives for each prompt's text, in the order of
    /// the file; a prompt's without a text are not looked at. `None` leaves the tokenizer out.
    pub tokenized: Option<Vec<Vec<i64>>>,
}

/// Runs the prompts of `golden` again and compares what comes out. `progress` is told how many
/// prompts are done.
///
/// # Errors
///
/// Only where nothing can be compared: the artifact fails, lacks a token of the file, or does not
/// report the decisions that the file holds. A difference, NaN included, is a [`Report`] that has
/// not passed.
pub fn check<D: Decoder>(
    artifact: &mut D,
    golden: &Golden,
    options: &CheckOptions,
    progress: &mut dyn FnMut(usize),
) -> Result<Report, Error<D::Error>> {
    let start = Instant::now();
    let vocab = artifact.vocab_size();
    let mut prompts = Vec::with_capacity(golden.prompts.len());
    for (index, prompt) in golden.prompts.iter().enumerate() {
        tokens_exist(index + 1, &prompt.ids, vocab)?;
        tokens_exist(index + 1, &prompt.greedy, vocab)?;
        for top in &prompt.top {
            let tokens: Vec<_> = top.iter().map(|(token, _)| *token).collect();
            tokens_exist(index + 1, &tokens, vocab)?;
        }
        let mut check = Check {
            prompt,
            options,
            flipped: BTreeSet::new(),
            report: PromptReport::new(index + 1, prompt),
        };
        check.ids(options.tokenized.as_ref().map(|all| all.get(index).map_or(&[][..], |ids| ids)));
        check.run(artifact, index + 1)?;
        prompts.push(check.report);
        progress(index + 1);
    }
    Ok(Report::new(prompts, golden, options, start.elapsed()))
}

struct Check<'a> {
    prompt: &'a Prompt,
    options: &'a CheckOptions,
    /// Ties that came out the other way: module and token.
    flipped: BTreeSet<(ModuleId, usize)>,
    report: PromptReport,
}

impl Check<'_> {
    /// The tokenizer's tokens against the file's.
    fn ids(&mut self, tokenized: Option<&[i64]>) {
        let Some(found) = tokenized.filter(|_| !self.prompt.text.is_empty()) else { return };
        let expected = &self.prompt.ids;
        if found != expected {
            let at = found.iter().zip(expected).take_while(|(a, b)| a == b).count();
            self.report.fail(format!(
                "the tokenizer gives {} tokens, recorded were {}; they differ from token {at}",
                found.len(),
                expected.len()
            ));
        }
    }

    fn run<D: Decoder>(&mut self, artifact: &mut D, number: usize) -> Result<(), Error<D::Error>> {
        let start = Instant::now();
        artifact.reset();
        let mut input = Input::prompts(std::slice::from_ref(&self.prompt.ids), Logits::Last);
        let mut first = 0;
        for (step, &token) in self.prompt.greedy.iter().enumerate() {
            let output = run(artifact, number, step, &input)?;
            match (&self.prompt.routing, &output.routing) {
                (Some(_), None) => return Err(Error::NoRouting { prompt: number, step }),
                (Some(_), Some(routing)) => self.decisions(step, first, routing),
                (None, _) => {}
            }
            for logits in last(&output) {
                self.token(step, &logits);
            }
            first += input.sequence();
            input = input.then(&[token]);
        }
        self.report.seconds = start.elapsed().as_secs_f64();
        Ok(())
    }

    /// The decisions of a step whose first token is number `first`.
    fn decisions(&mut self, step: usize, first: usize, found: &Routing) {
        let recorded = self.prompt.routing.as_deref().unwrap_or_default();
        if !same(recorded, found) {
            let names = |modules: Vec<String>| modules.join(", ");
            self.report.fail(format!(
                "step {step}: the artifact routes [{}], recorded were [{}]",
                names(found.modules.iter().map(ToString::to_string).collect()),
                names(recorded.iter().map(|module| module.module.clone()).collect())
            ));
            return;
        }
        // Token by token, each in layer order: what a decision depends on comes before it.
        for s in 0..found.margins.dim().2 {
            for (decisions, m) in recorded.iter().zip(in_layer_order(found)) {
                let token = first + s;
                let id = found.modules[m];
                if self.depends(id, token) {
                    self.report.decisions.left_out += 1;
                    continue;
                }
                let margin = found.margins[[m, 0, s]];
                let keep = decisions.keep.as_bytes()[token] == b'1';
                self.report.decisions.compared += 1;
                if !margin.is_nan() && keep == (margin >= 0.0) {
                    self.report.decisions.equal += 1;
                    continue;
                }
                let tie = decisions.near.iter().find(|(t, _)| *t == token).is_some_and(
                    |(_, recorded)| recorded.abs() <= self.options.tolerances.tie_margin,
                );
                if tie && self.options.mode == Mode::Tolerant && !margin.is_nan() {
                    self.report.decisions.flipped_ties += 1;
                    self.flipped.insert((id, token));
                    self.report
                        .note(format!("tie at token {token} in {id} came out the other way"));
                } else {
                    self.report.decisions.different += 1;
                    let what = |keep| if keep { "kept" } else { "skipped" };
                    self.report.fail(format!(
                        "token {token} is {} in {id} (margin {margin}), recorded was {}",
                        if margin.is_nan() { "neither kept nor skipped" } else { what(!keep) },
                        what(keep)
                    ));
                }
            }
        }
    }

    /// Whether a decision depends on a tie that came out the other way.
    ///
    /// It changes the layer's output at its own token, and through the next layer's keys and values
    /// every later token from that layer's attention on.
    fn depends(&self, id: ModuleId, token: usize) -> bool {
        self.flipped.iter().any(|&(tie, at)| {
            let next = ModuleId { layer: tie.layer + 1, kind: ModuleKind::Attention };
            (at == token && id > tie) || (at < token && id > next)
        })
    }

    /// The next token, and the likeliest tokens' log-probabilities.
    fn token(&mut self, step: usize, logits: &ArrayView1<'_, f32>) {
        if !self.flipped.is_empty() {
            self.report.steps_left_out += 1;
            return;
        }
        let (recorded, greedy) = (&self.prompt.top[step], self.prompt.greedy[step]);
        let found = argmax(logits);
        self.report.tokens += 1;
        if found == greedy {
            self.report.equal_tokens += 1;
        } else {
            // How much less likely the file has it; what the file does not list is no tie.
            let gap = recorded
                .iter()
                .find(|(token, _)| *token == found)
                .map(|(_, log_prob)| recorded[0].1 - log_prob);
            let tie = gap.is_some_and(|gap| gap <= f64::from(self.options.tolerances.token_gap));
            let message = format!("token {found} in place {step}, recorded was {greedy}");
            if tie && self.options.mode == Mode::Tolerant {
                self.report.token_ties += 1;
                self.report.note(format!("tie: {message}"));
            } else {
                self.report.fail(message);
            }
        }
        let normaliser = log_sum_exp(logits);
        for &(token, log_prob) in recorded {
            let now = f64::from(logits[token as usize]) - normaliser;
            let error = (now - log_prob).abs();
            self.report.log_prob_error(error);
            let bound = self.options.tolerances.log_prob;
            if error.is_nan() || error > f64::from(bound) {
                self.report.fail(format!(
                    "token {token} in place {step} has log-probability {now:.6}, recorded was {log_prob:.6} (within {bound})"
                ));
            }
        }
    }
}
