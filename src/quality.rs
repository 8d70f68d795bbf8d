//! What an artifact's precision costs: two decoders on the same text, each by its own decisions.
//!
//! `verify` compares an artifact with a reference of the same weights, value by value. Another
//! precision is another model, whose values may all differ; what can be said of it is how much worse
//! it predicts, and how often it chooses alike.

use std::ops::ControlFlow;

use std::fmt;

use ndarray::{ArrayView1, Axis};
use serde::Serialize;

use crate::decoder::{Decoder, Input, Logits, Output};
use crate::generate::{self, Sampling};
use crate::logits::{argmax, log_sum_exp};

/// How two decoders compare on a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quality {
    /// Places compared: every token of every sequence.
    pub positions: usize,
    /// Perplexity of the reference, over every token of a sequence but the first.
    pub reference_perplexity: f64,
    /// Perplexity of the artifact.
    pub artifact_perplexity: f64,
    /// Share of the places with the same most likely token.
    pub top_agreement: f64,
    /// Share of the routers' decisions that are the same; `None` where one of the two reports none.
    pub decision_agreement: Option<f64>,
    /// Mean over the places of `Σ p·ln(p / q)`, `p` being the reference's probabilities and `q` the
    /// artifact's, in nats.
    pub divergence: f64,
    /// Mean over the places of `|a − r| / |r|`, the logits of a place as a vector.
    pub logit_error: f64,
}

/// Why two decoders could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum Error<R: std::error::Error + 'static, A: std::error::Error + 'static> {
    /// The reference failed.
    #[error("sequence {sequence}: the reference failed")]
    Reference {
        /// From 0.
        sequence: usize,
        /// Why.
        #[source]
        source: R,
    },
    /// The artifact failed.
    #[error("sequence {sequence}: the artifact failed")]
    Artifact {
        /// From 0.
        sequence: usize,
        /// Why.
        #[source]
        source: A,
    },
    /// The two are of different checkpoints.
    #[error(
        "sequence {sequence}: the reference's logits are {reference:?}, the artifact's {artifact:?}"
    )]
    Shape {
        /// From 0.
        sequence: usize,
        /// `[batch, sequence, vocab]`.
        reference: (usize, usize, usize),
        /// `[batch, sequence, vocab]`.
        artifact: (usize, usize, usize),
    },
    /// There is nothing to compare on.
    #[error("there is no text to compare on")]
    NoText,
}

/// Runs both over each of `sequences`, from an empty cache; `progress` gets the number done. An artifact
/// that gives the last position's logits alone takes a sequence token by token.
///
/// # Errors
///
/// Every variant of [`Error`].
pub fn compare<R: Decoder, A: Decoder>(
    reference: &mut R,
    artifact: &mut A,
    sequences: &[Vec<i64>],
    mut progress: impl FnMut(usize),
) -> Result<Quality, Error<R::Error, A::Error>> {
    let mut sums = Sums::default();
    for (sequence, tokens) in sequences.iter().enumerate() {
        let whole = Input::row(0, tokens, Logits::All);
        reference.reset();
        artifact.reset();
        let r = reference.step(&whole).map_err(|source| Error::Reference { sequence, source })?;
        for input in steps(artifact.gives(), whole) {
            let a = artifact.step(&input).map_err(|source| Error::Artifact { sequence, source })?;
            let (rows, positions, vocab) = r.logits.dim();
            let expected = (rows, input.sequence(), vocab);
            if positions != tokens.len() || a.logits.dim() != expected {
                let (reference, artifact) = (r.logits.dim(), a.logits.dim());
                return Err(Error::Shape { sequence, reference, artifact });
            }
            sums.add(tokens, input.past(), &r, &a);
        }
        progress(sequence + 1);
    }
    reference.reset();
    artifact.reset();
    if sums.positions == 0 { Err(Error::NoText) } else { Ok(sums.quality()) }
}

/// Sequences to compare on where nobody has given a text: what `decoder` writes after each of `starts`, every token
/// drawn by its own probabilities. Drawn evenly from the vocabulary they would be no text to the model, whose
/// predictions, and routers, are then at their least certain.
///
/// # Errors
///
/// As [`generate::tokens`].
pub fn own_texts<D: Decoder>(
    decoder: &mut D,
    starts: &[Vec<i64>],
    tokens: usize,
    seed: u64,
) -> Result<Vec<Vec<i64>>, generate::Error<D::Error>> {
    let go_on = |_| ControlFlow::Continue(());
    let write = |(start, seed): (&Vec<i64>, u64)| {
        let sampling = Sampling::Random { temperature: 1.0, top_k: None, top_p: None, seed };
        let options =
            generate::Options { sampling, max_new_tokens: tokens, ..generate::Options::default() };
        let written = generate::tokens(decoder, start, &options, go_on)?.tokens;
        Ok([start.as_slice(), &written].concat())
    };
    starts.iter().zip(seed..).map(write).collect()
}

/// The steps in which a decoder that gives these logits gives those of every token of `whole`.
fn steps(gives: Logits, whole: Input) -> Vec<Input> {
    let token = |(past, id): (usize, &i64)| Input::row(past, &[*id], Logits::Last);
    match gives {
        Logits::All => vec![whole],
        Logits::Last => whole.ids.iter().enumerate().map(token).collect(),
    }
}

#[derive(Debug, Default)]
struct Sums {
    positions: usize,
    predicted: usize,
    reference: f64,
    artifact: f64,
    same: usize,
    /// Equal, and all; all is 0 where one reports none.
    decisions: (usize, usize),
    divergence: f64,
    error: f64,
}

impl Sums {
    /// Adds what both gave: the reference of all `tokens`, the artifact of those after the first `past`.
    fn add(&mut self, tokens: &[i64], past: usize, reference: &Output, artifact: &Output) {
        for (step, a) in artifact.logits.index_axis(Axis(0), 0).outer_iter().enumerate() {
            let at = past + step;
            let r = reference.logits.slice(ndarray::s![0, at, ..]);
            let (r_sum, a_sum) = (log_sum_exp(&r), log_sum_exp(&a));
            self.positions += 1;
            self.same += usize::from(argmax(&r) == argmax(&a));
            self.divergence += divergence((&r, r_sum), (&a, a_sum));
            self.error += distance(&r, &a);
            if let Some(&next) = tokens.get(at + 1) {
                self.predicted += 1;
                self.reference += r_sum - f64::from(r[next as usize]);
                self.artifact += a_sum - f64::from(a[next as usize]);
            }
        }
        if let (Some(r), Some(a)) = (&reference.routing, &artifact.routing)
            && r.modules == a.modules
        {
            let sequence = a.margins.dim().2;
            let own = r.margins.slice(ndarray::s![.., .., past..past + sequence]);
            self.decisions.1 += own.len();
            let pairs = own.iter().zip(&a.margins);
            self.decisions.0 += pairs.filter(|(r, a)| (**r >= 0.0) == (**a >= 0.0)).count();
        }
    }

    fn quality(&self) -> Quality {
        let mean = |sum: f64, count: usize| sum / count.max(1) as f64;
        let (equal, decisions) = self.decisions;
        Quality {
            positions: self.positions,
            reference_perplexity: mean(self.reference, self.predicted).exp(),
            artifact_perplexity: mean(self.artifact, self.predicted).exp(),
            top_agreement: mean(self.same as f64, self.positions),
            decision_agreement: (decisions > 0).then(|| mean(equal as f64, decisions)),
            divergence: mean(self.divergence, self.positions),
            logit_error: mean(self.error, self.positions),
        }
    }
}

/// `Σ p·ln(p / q)` of logits given with their log-sum-exp.
fn divergence(
    (r, r_sum): (&ArrayView1<'_, f32>, f64),
    (a, a_sum): (&ArrayView1<'_, f32>, f64),
) -> f64 {
    let each = r.iter().zip(a).map(|(&r, &a)| {
        let (r, a) = (f64::from(r) - r_sum, f64::from(a) - a_sum);
        r.exp() * (r - a)
    });
    each.sum()
}

/// `|a − r| / |r|`.
fn distance(r: &ArrayView1<'_, f32>, a: &ArrayView1<'_, f32>) -> f64 {
    let (mut difference, mut length) = (0.0, 0.0);
    for (&r, &a) in r.iter().zip(a) {
        difference += (f64::from(a) - f64::from(r)).powi(2);
        length += f64::from(r).powi(2);
    }
    if difference == 0.0 { 0.0 } else { (difference / length).sqrt() }
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "perplexity {:.2} (reference {:.2}), most likely token the same at {:.1} % of {} places",
            self.artifact_perplexity,
            self.reference_perplexity,
            100.0 * self.top_agreement,
            self.positions
        )?;
        if let Some(share) = self.decision_agreement {
            write!(f, ", {:.2} % of decisions the same", 100.0 * share)?;
        }
        write!(
            f,
            ", divergence {:.4}, logits {:.1} % apart",
            self.divergence,
            100.0 * self.logit_error
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::verify::toy::{Fault, Toy};

    #[test]
    fn a_decoder_s_own_texts_begin_as_asked_and_differ_by_seed() {
        let starts = [vec![1], vec![1], vec![2, 3]];
        let write = |seed| own_texts(&mut Toy::default(), &starts, 12, seed).unwrap();
        let texts = write(5);
        for (start, text) in starts.iter().zip(&texts) {
            assert_eq!((text.len(), &text[..start.len()]), (start.len() + 12, start.as_slice()));
        }
        assert_ne!(texts[0], texts[1]);
        assert_eq!((texts, write(5)[1].clone()), (write(5), write(6)[0].clone()));
    }

    #[test]
    fn a_decoder_is_as_good_as_itself() {
        let sequences = [vec![1, 2, 3, 4], vec![5, 6]];
        let mut done = Vec::new();
        let quality =
            compare(&mut Toy::default(), &mut Toy::default(), &sequences, |n| done.push(n))
                .unwrap();
        assert_eq!((quality.positions, done), (6, vec![1, 2]));
        assert!((quality.top_agreement - 1.0).abs() < 1e-12);
        assert!(quality.divergence.abs() < 1e-9 && quality.logit_error.abs() < 1e-12);
        assert!((quality.artifact_perplexity - quality.reference_perplexity).abs() < 1e-12);
        let mut last = Toy::with([Fault::LastOnly]);
        let stepped = compare(&mut Toy::default(), &mut last, &sequences, |_| ()).unwrap();
        assert_eq!((stepped.positions, stepped.decision_agreement), (6, Some(1.0)));
        assert!(stepped.divergence.abs() < 1e-9 && stepped.logit_error < 1e-6, "{stepped}");
        let perplexities = [&stepped, &quality].map(|quality| quality.artifact_perplexity);
        assert!((perplexities[0] - perplexities[1]).abs() < 1e-4, "{perplexities:?}");
        let none = compare(&mut Toy::default(), &mut Toy::default(), &[], |_| ());
        assert!(matches!(none, Err(Error::NoText)));
    }
}
