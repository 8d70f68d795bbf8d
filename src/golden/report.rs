//! What a golden check found.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::check::{CheckOptions, Mode};
use super::{Environment, Golden, Prompt};
use crate::tolerance::Tolerances;

/// Most messages that a prompt lists; further ones are counted.
const LISTED: usize = 20;
/// Most of the steps that may be left out after ties.
const LEFT_OUT: f64 = 0.5;

/// What a golden check found. As JSON, the fields come in this order.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Whether everything is as recorded.
    pub passed: bool,
    /// `exact` or `tolerant`.
    pub mode: &'static str,
    /// Share of the compared tokens that are the recorded ones; `None` where none was compared.
    pub token_agreement: Option<f64>,
    /// Share of the compared decisions, ties that came out the other way apart, that are the
    /// recorded ones; `None` where none was compared.
    pub decision_agreement: Option<f64>,
    /// Largest difference of a log-probability, in nats; NaN (in JSON `null`) where one is NaN.
    pub max_log_prob_error: f64,
    /// Ties among the decisions that came out the other way.
    pub flipped_ties: u64,
    /// How many of those are allowed.
    pub allowed_ties: u64,
    /// Whether the artifact's files are the recorded ones, byte for byte.
    pub same_artifact: bool,
    /// What ran the artifact when it was recorded.
    pub recorded: Environment,
    /// What ran it now.
    pub environment: Environment,
    /// What the artifact computed in when it was recorded.
    pub dtype: String,
    /// The bounds.
    pub tolerances: Tolerances,
    /// Name of the artifact's directory.
    pub artifact: String,
    /// What is wrong with the whole, rather than with one prompt.
    pub failures: Vec<String>,
    /// Prompt by prompt.
    pub prompts: Vec<PromptReport>,
    /// How long it took.
    pub seconds: f64,
}

/// What one prompt's check found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PromptReport {
    /// Which prompt, from 1.
    pub prompt: usize,
    /// Its text.
    pub text: String,
    /// Whether everything is as recorded.
    pub passed: bool,
    /// Greedy tokens compared.
    pub tokens: usize,
    /// Of those, how many are the recorded ones.
    pub equal_tokens: usize,
    /// Of those, how many differ and are ties.
    pub token_ties: usize,
    /// Steps whose tokens were not compared, because a tie before them came out the other way.
    pub steps_left_out: usize,
    /// Decisions.
    pub decisions: Decisions,
    /// Largest difference of a log-probability, in nats; NaN (in JSON `null`) where one is NaN.
    pub max_log_prob_error: f64,
    /// What is wrong, at most twenty messages.
    pub failures: Vec<String>,
    /// How many more there were.
    pub more_failures: usize,
    /// Ties, at most twenty.
    pub notes: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

/// A prompt's decisions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Decisions {
    /// Compared, ties included.
    pub compared: u64,
    /// Of those, how many are the recorded ones.
    pub equal: u64,
    /// Of those, how many were ties and came out the other way.
    pub flipped_ties: u64,
    /// Of those, how many differ and are no tie.
    pub different: u64,
    /// Not compared, because a tie before them came out the other way.
    pub left_out: u64,
}

impl PromptReport {
    pub(super) fn new(number: usize, prompt: &Prompt) -> Self {
        Self {
            prompt: number,
            text: prompt.text.clone(),
            passed: true,
            tokens: 0,
            equal_tokens: 0,
            token_ties: 0,
            steps_left_out: 0,
            decisions: Decisions::default(),
            max_log_prob_error: 0.0,
            failures: Vec::new(),
            more_failures: 0,
            notes: Vec::new(),
            seconds: 0.0,
        }
    }

    pub(super) fn fail(&mut self, message: String) {
        self.passed = false;
        if self.failures.len() < LISTED {
            self.failures.push(message);
        } else {
            self.more_failures += 1;
        }
    }

    pub(super) fn note(&mut self, message: String) {
        if self.notes.len() < LISTED {
            self.notes.push(message);
        }
    }

    pub(super) fn log_prob_error(&mut self, error: f64) {
        self.max_log_prob_error = larger(self.max_log_prob_error, error);
    }
}

/// The larger of two, NaN above all.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

impl Report {
    pub(super) fn new(
        prompts: Vec<PromptReport>,
        golden: &Golden,
        options: &CheckOptions,
        time: Duration,
    ) -> Self {
        let sum = |count: fn(&PromptReport) -> u64| prompts.iter().map(count).sum::<u64>();
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        let compared = sum(|p| p.decisions.compared);
        let flipped_ties = sum(|p| p.decisions.flipped_ties);
        let allowed_ties = (options.tolerances.tie_share * compared as f64).ceil() as u64;
        let (tokens, left_out) = (sum(|p| p.tokens as u64), sum(|p| p.steps_left_out as u64));

        let mut failures = Vec::new();
        if flipped_ties > allowed_ties {
            failures.push(format!(
                "{flipped_ties} ties came out the other way, where {allowed_ties} of {compared} decisions may"
            ));
        }
        if left_out as f64 > LEFT_OUT * (tokens + left_out) as f64 {
            failures.push(format!(
                "{left_out} of {} steps come after a tie that came out the other way: too little is left to compare; record again with other prompts",
                tokens + left_out
            ));
        }
        Self {
            passed: failures.is_empty() && prompts.iter().all(|prompt| prompt.passed),
            mode: match options.mode {
                Mode::Exact => "exact",
                Mode::Tolerant => "tolerant",
            },
            token_agreement: share(sum(|p| p.equal_tokens as u64), tokens),
            decision_agreement: share(sum(|p| p.decisions.equal), compared - flipped_ties),
            max_log_prob_error: prompts.iter().map(|p| p.max_log_prob_error).fold(0.0, larger),
            flipped_ties,
            allowed_ties,
            same_artifact: golden.artifact.sha256 == options.artifact.sha256,
            recorded: golden.environment.clone(),
            environment: options.environment.clone(),
            dtype: golden.dtype.clone(),
            tolerances: options.tolerances,
            artifact: options.artifact.name.clone(),
            failures,
            prompts,
            seconds: time.as_secs_f64(),
        }
    }
}

/// What failed, what was a tie, and last the verdict.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for prompt in &self.prompts {
            for message in &prompt.failures {
                writeln!(f, "prompt {}: {message}", prompt.prompt)?;
            }
            if prompt.more_failures > 0 {
                writeln!(f, "prompt {}: and {} more", prompt.prompt, prompt.more_failures)?;
            }
            for note in &prompt.notes {
                writeln!(f, "prompt {}: {note}", prompt.prompt)?;
            }
        }
        for message in &self.failures {
            writeln!(f, "{message}")?;
        }
        if !self.same_artifact {
            writeln!(f, "the artifact's files are not those that were recorded")?;
        }
        let Environment { onnxruntime, provider, .. } = &self.environment;
        let on = format!("{} on {provider}, ONNX Runtime {onnxruntime}", self.dtype);
        let wrong: Vec<_> = self.prompts.iter().filter(|prompt| !prompt.passed).collect();
        if let Some(first) = wrong.first() {
            let message = first.failures.first().map_or("", String::as_str);
            return write!(
                f,
                "MISMATCH: {} of {} prompts, first prompt {}: {message}; {on}",
                wrong.len(),
                self.prompts.len(),
                first.prompt
            );
        }
        if let Some(message) = self.failures.first() {
            return write!(f, "MISMATCH: {message}; {on}");
        }
        let sum = |count: fn(&PromptReport) -> u64| self.prompts.iter().map(count).sum::<u64>();
        write!(
            f,
            "as recorded: {} prompts, {} of {} tokens, {} of {} decisions, log-probabilities within {:.1e}, {on}, {:.1} s",
            self.prompts.len(),
            sum(|p| p.equal_tokens as u64),
            sum(|p| p.tokens as u64),
            sum(|p| p.decisions.equal),
            sum(|p| p.decisions.compared),
            self.max_log_prob_error,
            self.seconds
        )
    }
}
