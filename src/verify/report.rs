//! What a verification found.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::Options;
use super::compare::Tally;
use super::place::{Divergence, Tie};
use super::stats::{Decisions, Stats};
use crate::decoder::Logits;
use crate::quality::Quality;
use crate::readback::Nearness;
use crate::runtime::Placement;
use crate::tolerance::{self, Tolerances};

/// Most ties that are listed one by one.
const LISTED: usize = 100;

/// What a verification found. As JSON, the fields come in this order; `docs/verification.md`
/// explains them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Whether the artifact computes what the reference computes.
    pub passed: bool,
    /// Share of the decisions, ties that came out the other way apart, that are equal: 1 where
    /// nothing is routed, `None` where the artifact reports no decisions.
    pub decision_agreement: Option<f64>,
    /// The ties.
    pub ties: Ties,
    /// Largest `|artifact − reference|` of a logit; NaN (in JSON `null`) where one is not finite.
    pub max_abs_logit_error: f32,
    /// Largest `|artifact − reference|` in a cache; NaN (in JSON `null`) where one is not finite.
    pub max_abs_cache_error: f32,
    /// Share of the greedy tokens before the first difference; `None` where none were asked for.
    pub greedy_agreement: Option<f64>,
    /// The execution provider that ran the artifact.
    pub provider: String,
    /// Version of the ONNX Runtime that ran it.
    pub onnxruntime: String,
    /// What the artifact computes in.
    pub dtype: String,
    /// Of which positions of a step it gives logits: what was compared of them.
    pub logits: Logits,
    /// The bounds.
    pub tolerances: Tolerances,
    /// How near quantised weights are to the checkpoint's; `None` where none are quantised.
    pub weights: Option<Nearness>,
    /// What rounding activations does to the artifact, everything else of which is compared without
    /// it; `None` where it rounds none.
    pub rounding: Option<Rounding>,
    /// What its precision costs; `None` where no text was given.
    pub quality: Option<Quality>,
    /// Where the graph's nodes ran; told on another provider than the CPU's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// Case by case.
    pub cases: Vec<CaseReport>,
    /// Where the artifact first goes wrong, in the first case in which it does.
    pub first_divergence: Option<Divergence>,
    /// How long it took.
    pub seconds: f64,
}

/// What rounding activations to 8 bits does to an artifact that allows it, against the reference,
/// which rounds none.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rounding {
    /// Whether [`Quality::logit_error`] is within the bound.
    pub passed: bool,
    /// The bound.
    pub bound: f64,
    /// The comparison.
    pub quality: Quality,
}

/// Decisions on which the reference's own scores are equal up to rounding.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ties {
    /// How many there were, whichever way they came out.
    pub near: u64,
    /// How many came out the other way in the artifact.
    pub flipped: u64,
    /// How many of those are allowed.
    pub allowed: u64,
    /// Those that came out the other way, the first hundred.
    pub listed: Vec<Tie>,
}

/// What one case found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaseReport {
    /// Its name.
    pub name: String,
    /// Whether everything agrees in it, ties apart.
    pub passed: bool,
    /// Prompt tokens of each row.
    pub prompt_tokens: Vec<usize>,
    /// Steps run: prompt chunks, then one per token, the reference's own text included.
    pub steps: usize,
    /// Decisions.
    pub decisions: Decisions,
    /// Logits.
    pub logits: Stats,
    /// Caches.
    pub cache: Stats,
    /// Layer outputs; nothing is compared where they were not asked for, or not kept.
    pub layers: Stats,
    /// The texts the two wrote.
    pub greedy: Option<Greedy>,
    /// Where it first goes wrong.
    pub first_divergence: Option<Divergence>,
    #[serde(skip)]
    ties: Vec<Tie>,
}

/// The texts the two wrote, each on its own.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Greedy {
    /// Tokens the artifact wrote.
    pub tokens: usize,
    /// How many of them the reference wrote as well, before the first difference.
    pub equal: usize,
    /// The first difference.
    pub first_difference: Option<GreedyDifference>,
}

/// The first token in which two texts differ.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GreedyDifference {
    /// Its place in the text, from 0.
    pub index: usize,
    /// The reference's token.
    pub reference: i64,
    /// The artifact's.
    pub artifact: i64,
    /// By how much the reference prefers its own, in logits.
    pub gap: f32,
    /// Whether a tie excuses it: the gap is within tolerance, or a decision before it was a tie
    /// that came out the other way.
    pub tie: bool,
}

impl CaseReport {
    pub(super) fn new(
        name: String,
        prompt_tokens: Vec<usize>,
        steps: usize,
        mut tally: Tally<'_>,
        greedy: Option<Greedy>,
    ) -> Self {
        let ties = std::mem::take(&mut tally.ties);
        let (decisions, logits, cache, layers) =
            (tally.decisions, tally.logits, tally.cache, tally.layers);
        let first_divergence = tally.first();
        let text = greedy
            .as_ref()
            .and_then(|greedy| greedy.first_difference.as_ref())
            .is_none_or(|difference| difference.tie);
        let passed = first_divergence.is_none() && text;
        Self {
            name,
            passed,
            prompt_tokens,
            steps,
            decisions,
            logits,
            cache,
            layers,
            greedy,
            first_divergence,
            ties,
        }
    }
}

impl Report {
    pub(super) fn new(
        mut cases: Vec<CaseReport>,
        options: &Options,
        given: Logits,
        time: Duration,
    ) -> Self {
        let decisions =
            cases.iter().fold(Decisions::default(), |sum, case| sum.and(case.decisions));
        let logits = cases.iter().fold(Stats::default(), |sum, case| sum.and(case.logits));
        let cache = cases.iter().fold(Stats::default(), |sum, case| sum.and(case.cache));
        let mut listed: Vec<_> = cases.iter_mut().flat_map(|case| case.ties.drain(..)).collect();
        listed.truncate(LISTED);
        let ties = Ties {
            near: decisions.near_ties,
            flipped: decisions.flipped_ties,
            allowed: (options.tolerances.tie_share * decisions.compared as f64).ceil() as u64,
            listed,
        };
        let judged = decisions.compared - decisions.flipped_ties;
        let decision_agreement = match (judged, decisions.unreported) {
            (0, 0) => Some(1.0),
            (_, 0) => Some(decisions.equal as f64 / judged as f64),
            _ => None,
        };
        let texts = cases.iter().filter_map(|case| case.greedy.as_ref());
        let (equal, tokens) =
            texts.fold((0, 0), |(equal, all), text| (equal + text.equal, all + text.tokens));
        Self {
            passed: cases.iter().all(|case| case.passed) && ties.flipped <= ties.allowed,
            decision_agreement,
            ties,
            max_abs_logit_error: logits.max_abs_error,
            max_abs_cache_error: cache.max_abs_error,
            greedy_agreement: (tokens > 0).then(|| equal as f64 / tokens as f64),
            provider: options.provider.clone(),
            onnxruntime: options.onnxruntime.clone(),
            dtype: options.dtype.to_string(),
            logits: given,
            tolerances: options.tolerances,
            weights: None,
            rounding: None,
            quality: None,
            placement: None,
            first_divergence: cases.iter().find_map(|case| case.first_divergence.clone()),
            cases,
            seconds: time.as_secs_f64(),
        }
    }

    /// Adds what reading quantised weights back has shown: part of the verdict.
    pub fn compare_weights(&mut self, nearness: Nearness) {
        self.passed &= nearness.passed;
        self.weights = Some(nearness);
    }

    /// Adds what rounding activations does: part of the verdict.
    pub fn compare_rounding(&mut self, quality: Quality) {
        let bound = tolerance::ROUNDED_LOGITS;
        // NaN is within no bound.
        let passed = quality.logit_error <= bound;
        self.passed &= passed;
        self.rounding = Some(Rounding { passed, bound, quality });
    }

    /// Decisions of all cases.
    pub fn decisions(&self) -> Decisions {
        self.cases.iter().fold(Decisions::default(), |sum, case| sum.and(case.decisions))
    }

    /// Greedy tokens before the first difference, and all of them.
    fn greedy(&self) -> (usize, usize) {
        let texts = self.cases.iter().filter_map(|case| case.greedy.as_ref());
        texts.fold((0, 0), |(equal, all), text| (equal + text.equal, all + text.tokens))
    }

    /// Why it has not passed.
    fn mismatch(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(Rounding { bound, quality, .. }) =
            self.rounding.as_ref().filter(|rounding| !rounding.passed)
        {
            return write!(
                f,
                "with activations in 8 bits, logits are {:.1} % apart (within {:.0} %)",
                100.0 * quality.logit_error,
                100.0 * bound
            );
        }
        if let Some(nearness) = self.weights.as_ref().filter(|nearness| !nearness.passed) {
            return write!(
                f,
                "{} of the quantised weights is {:.2} of its length from the checkpoint's (within {})",
                nearness.worst.as_deref().unwrap_or("a row"),
                nearness.max_row_error,
                nearness.bound
            );
        }
        if let Some(divergence) = &self.first_divergence {
            return write!(f, "{divergence}");
        }
        for case in &self.cases {
            if let Some(text) = &case.greedy
                && let Some(difference) = &text.first_difference
                && !difference.tie
            {
                return write!(
                    f,
                    "{}: from token {} the artifact writes another text ({}, not {}) though every step agrees: a decoder's steps depend on more than its input",
                    case.name, difference.index, difference.artifact, difference.reference
                );
            }
        }
        write!(
            f,
            "{} ties came out the other way, where {} of {} decisions may",
            self.ties.flipped,
            self.ties.allowed,
            self.decisions().compared
        )
    }
}

/// One line per case, one per listed tie, and last the verdict.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(nearness) = &self.weights {
            writeln!(f, "{nearness}")?;
        }
        if let Some(Rounding { passed, quality, .. }) = &self.rounding {
            let verdict = if *passed { "ok" } else { "MISMATCH" };
            writeln!(f, "activations   {verdict:<8}  in 8 bits: {quality}")?;
        }
        if let Some(quality) = &self.quality {
            writeln!(f, "quality                 {quality}")?;
        }
        if let Some(placement) = &self.placement {
            writeln!(f, "placement               {placement}")?;
        }
        for case in &self.cases {
            writeln!(f, "{case}")?;
        }
        for tie in &self.ties.listed {
            writeln!(
                f,
                "tie: {} in {}, step {}, row {}, token {}: margin {:.1e}",
                tie.module, tie.case, tie.step, tie.row, tie.token, tie.margin
            )?;
        }
        let on = format!("{} on {}, ONNX Runtime {}", self.dtype, self.provider, self.onnxruntime);
        if !self.passed {
            f.write_str("MISMATCH: ")?;
            self.mismatch(f)?;
            return write!(f, "; {on}");
        }
        let decisions = self.decisions();
        write!(f, "verified: {} cases, ", self.cases.len())?;
        match (decisions.compared, decisions.unreported) {
            (0, 0) => f.write_str("nothing routed, ")?,
            (_, 0) => write!(f, "{} decisions equal, ", decisions.equal)?,
            _ => f.write_str("decisions not reported by the artifact, ")?,
        }
        if self.ties.flipped > 0 {
            write!(f, "{} more are ties, ", self.ties.flipped)?;
        }
        if self.logits == Logits::Last {
            f.write_str("each step's last ")?;
        }
        write!(
            f,
            "logits within {:.1e}, caches within {:.1e}, ",
            self.max_abs_logit_error, self.max_abs_cache_error
        )?;
        match self.greedy() {
            (_, 0) => {}
            (equal, all) if equal == all => write!(f, "greedy text equal ({all} tokens), ")?,
            (equal, all) => write!(f, "greedy text equal up to ties ({equal} of {all} tokens), ")?,
        }
        write!(f, "{on}, {:.1} s", self.seconds)
    }
}

impl fmt::Display for CaseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.passed { "ok" } else { "MISMATCH" };
        write!(f, "{:<13} {verdict:<8} ", self.name)?;
        let decisions = self.decisions;
        if decisions.compared > 0 {
            write!(f, " decisions {}/{}", decisions.equal, decisions.compared)?;
        }
        write!(
            f,
            " logits {:.1e}  caches {:.1e}",
            self.logits.max_abs_error, self.cache.max_abs_error
        )?;
        if self.layers.compared > 0 {
            write!(f, "  layers {:.1e}", self.layers.max_abs_error)?;
        }
        match &self.greedy {
            Some(text) => write!(f, "  text {}/{}", text.equal, text.tokens),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, step {}: ", self.case, self.step)?;
        if let Some(layer) = self.layer {
            write!(f, "layer {layer} diverges first: ")?;
        }
        write!(
            f,
            "{} is {}, not {} (within {:.1e}), at row {}, token {}",
            self.place, self.artifact, self.reference, self.bound, self.row, self.token
        )
    }
}
