//! Log-likelihoods of an item's choices.
//!
//! The tokens that all choices begin with, up to the first scored one, are run once; the rest of each
//! choice is then run on top of that cache, which stays as it was ([`Peek`]). The logits of the last
//! common token score every choice's next one, so a choice of one token costs no step of its own. A
//! choice's last token is scored and never run.

use ndarray::{Array3, ArrayView1, s};

use super::encode::Sequence;
use crate::decoder::{Input, Logits, Output, Peek};
use crate::eval::{Decisions, log_likelihood};

/// Why an item has no scores.
#[derive(Debug, thiserror::Error)]
pub enum Error<D> {
    /// The decoder failed.
    #[error("{0}")]
    Decoder(D),
    /// The decoder gave logits of another shape than it was asked for.
    #[error("the logits are {found:?}; {expected:?} was asked for")]
    Logits {
        /// Their shape.
        found: (usize, usize, usize),
        /// `[batch, sequence, vocab]`.
        expected: (usize, usize, usize),
    },
    /// A prediction is NaN, or gives the token no probability at all.
    #[error(
        "choice {choice}, token {position}: the log-likelihood is {value}; are the weights damaged, or their range too small?"
    )]
    NotFinite {
        /// Which choice, from 0.
        choice: usize,
        /// The token's place in context and continuation.
        position: usize,
        /// What was computed.
        value: f64,
    },
}

/// The log-likelihood of each sequence's scored tokens, in nats; adds the decisions of every token
/// that was run to `decisions`, where the decoder reports them.
pub(super) fn item<D: Peek>(
    decoder: &mut D,
    sequences: &[Sequence],
    decisions: &mut Option<Decisions>,
) -> Result<Vec<f64>, Error<D::Error>> {
    let shared = shared(sequences);
    decoder.reset();
    let mut common = None;
    if let Some(first) = sequences.first().filter(|_| shared > 0) {
        let input = Input::row(0, &first.tokens[..shared], Logits::Last);
        let output = decoder.step(&input).map_err(Error::Decoder)?;
        common = Some(checked(output, &input, 1, decoder.vocab_size(), decisions)?);
    }
    let mut scores = Vec::with_capacity(sequences.len());
    for (choice, Sequence { tokens, start }) in sequences.iter().enumerate() {
        let rest = &tokens[shared..tokens.len() - 1];
        let mut own = None;
        if !rest.is_empty() {
            let input = Input::row(shared, rest, Logits::All);
            let output = decoder.peek(&input).map_err(Error::Decoder)?;
            own = Some(checked(output, &input, rest.len(), decoder.vocab_size(), decisions)?);
        }
        let mut sum = 0.0;
        for (position, &token) in tokens.iter().enumerate().skip(*start) {
            let (logits, row) =
                if position == shared { (&common, 0) } else { (&own, position - 1 - shared) };
            let value = logits.as_ref().map_or(f64::NAN, |logits| {
                let row: ArrayView1<'_, f32> = logits.slice(s![0, row, ..]);
                log_likelihood(&row, usize::try_from(token).unwrap_or(usize::MAX))
            });
            if !value.is_finite() {
                return Err(Error::NotFinite { choice, position, value });
            }
            sum += value;
        }
        scores.push(sum);
    }
    Ok(scores)
}

/// How many tokens all sequences begin with, none of them scored.
fn shared(sequences: &[Sequence]) -> usize {
    let Some((first, others)) = sequences.split_first() else { return 0 };
    let agree = |place: &usize| {
        others.iter().all(|other| other.tokens.get(*place) == first.tokens.get(*place))
    };
    let most = sequences.iter().map(|sequence| sequence.start).min().unwrap_or_default();
    (0..most).take_while(agree).count()
}

/// The logits, if they are as many as were asked for; counts the decisions.
fn checked<D>(
    output: Output,
    input: &Input,
    rows: usize,
    vocab: usize,
    decisions: &mut Option<Decisions>,
) -> Result<Array3<f32>, Error<D>> {
    if let Some(routing) = &output.routing {
        decisions.get_or_insert_default().count(routing, input);
    }
    let (found, expected) = (output.logits.dim(), (1, rows, vocab));
    if found == expected { Ok(output.logits) } else { Err(Error::Logits { found, expected }) }
}
