//! What is run: decode, prefill, or both as generation; and the steps it takes.

use std::fmt;
use std::str::FromStr;

use ndarray::Array2;
use serde::{Serialize, Serializer};

use super::draws;
use crate::decoder::{Input, Logits};
use crate::runtime::session;

/// A workload, written `decode:1:128`, `prefill:256` or `mixed:256:128`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// One token per sequence and step.
    Decode {
        /// Sequences in the batch.
        sequences: usize,
        /// Tokens of each in the cache when timing begins.
        cached: usize,
    },
    /// A prompt on an empty cache.
    Prefill {
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// A prompt and what follows it, one sequence.
    Mixed {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens after it, one a step.
        new: usize,
    },
}

/// What is no workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a workload; expected decode:SEQUENCES:CACHED, prefill:TOKENS or \
     mixed:PROMPT:NEW, all at least 1"
)]
pub struct Unknown(String);

impl Workload {
    /// What is run where nothing is said: one of each, the mixed one on real text alone.
    pub fn quick(text: bool) -> Vec<Self> {
        let mut workloads =
            vec![Self::Decode { sequences: 1, cached: 128 }, Self::Prefill { tokens: 256 }];
        workloads.extend(text.then_some(Self::Mixed { prompt: 256, new: 128 }));
        workloads
    }

    /// Everything.
    pub fn full(text: bool) -> Vec<Self> {
        let mut workloads = Vec::new();
        for cached in [128, 1024, 4096] {
            workloads.extend([1, 4, 8].map(|sequences| Self::Decode { sequences, cached }));
        }
        workloads.extend([256, 1024].map(|tokens| Self::Prefill { tokens }));
        workloads.extend(text.then_some(Self::Mixed { prompt: 256, new: 128 }));
        workloads
    }

    /// Rows of the batch.
    pub fn sequences(self) -> usize {
        match self {
            Self::Decode { sequences, .. } => sequences,
            Self::Prefill { .. } | Self::Mixed { .. } => 1,
        }
    }

    /// Tokens that one sample runs: a step, a prefill, a generation.
    pub fn tokens(self) -> usize {
        match self {
            Self::Decode { sequences, .. } => sequences,
            Self::Prefill { tokens } => tokens,
            Self::Mixed { prompt, new } => prompt + new,
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Decode { sequences, cached } => write!(f, "decode:{sequences}:{cached}"),
            Self::Prefill { tokens } => write!(f, "prefill:{tokens}"),
            Self::Mixed { prompt, new } => write!(f, "mixed:{prompt}:{new}"),
        }
    }
}

impl FromStr for Workload {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Self, Unknown> {
        let mut parts = text.split(':');
        let kind = parts.next().unwrap_or_default();
        let numbers: Option<Vec<usize>> =
            parts.map(|part| part.parse().ok().filter(|number| *number > 0)).collect();
        match (kind, numbers.as_deref()) {
            ("decode", Some(&[sequences, cached])) => Ok(Self::Decode { sequences, cached }),
            ("prefill", Some(&[tokens])) => Ok(Self::Prefill { tokens }),
            ("mixed", Some(&[prompt, new])) => Ok(Self::Mixed { prompt, new }),
            _ => Err(Unknown(text.to_owned())),
        }
    }
}

impl Serialize for Workload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where tokens come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tokens {
    /// Ids below `vocab`, drawn.
    Drawn {
        /// The same seed draws the same.
        seed: u64,
        /// Number of tokens in the vocabulary.
        vocab: usize,
    },
    /// A text.
    Text(Vec<i64>),
}

/// How many steps are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps {
    /// Decode steps timed in a round.
    pub decode: usize,
    /// Prefills timed in a round.
    pub prefill: usize,
    /// Decode steps that are run before; a prefill is preceded by one.
    pub warmup: usize,
}

/// The steps of a workload.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Script {
    /// Tokens in the cache before the first step; 0 for none.
    pub(super) start: usize,
    /// Whether every sample begins on an empty cache.
    pub(super) resets: bool,
    /// Run before, not timed.
    pub(super) warmup: Vec<Input>,
    /// The steps of every sample.
    pub(super) samples: Vec<Vec<Input>>,
}

/// A text that is too short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{workload} takes {needed} tokens; the text has {found}: take a longer text")]
pub struct Short {
    /// What was to be run.
    pub workload: Workload,
    /// Tokens it takes.
    pub needed: usize,
    /// Tokens there are.
    pub found: usize,
}

impl Tokens {
    /// The first `length` tokens, which every sequence shares.
    pub(super) fn prefix(&self, length: usize) -> Vec<i64> {
        match self {
            Self::Drawn { seed, vocab } => {
                (0..length).map(|position| draws::token(*seed, 0, position, *vocab)).collect()
            }
            Self::Text(ids) => ids.iter().take(length).copied().collect(),
        }
    }

    /// Token `step` of row `row` after a prefix of `start`. Rows of a text go on with pieces of
    /// `steps` tokens that follow each other.
    fn after(&self, start: usize, steps: usize, row: usize, step: usize) -> i64 {
        match self {
            Self::Drawn { seed, vocab } => draws::token(*seed, row, start + step, *vocab),
            Self::Text(ids) => ids[start + row * steps + step],
        }
    }

    fn has(&self, workload: Workload, needed: usize) -> Result<(), Short> {
        match self {
            Self::Text(ids) if ids.len() < needed => {
                Err(Short { workload, needed, found: ids.len() })
            }
            _ => Ok(()),
        }
    }
}

impl Script {
    pub(super) fn new(workload: Workload, tokens: &Tokens, steps: Steps) -> Result<Self, Short> {
        match workload {
            Workload::Decode { sequences, cached } => {
                // The warm-up grows the cache to the length that is asked for.
                let warmup = steps.warmup.min(cached);
                let (start, count) = (cached - warmup, warmup + steps.decode);
                tokens.has(workload, start + sequences * count)?;
                let mut all = Vec::with_capacity(count);
                for step in 0..count {
                    let ids = Array2::from_shape_fn((sequences, 1), |(row, _)| {
                        tokens.after(start, count, row, step)
                    });
                    all.push(input(ids, start + step));
                }
                let samples = all.split_off(warmup).into_iter().map(|input| vec![input]).collect();
                Ok(Self { start, resets: false, warmup: all, samples })
            }
            Workload::Prefill { tokens: length } => {
                tokens.has(workload, length)?;
                let prompt = prompt(tokens, length);
                let samples = vec![vec![prompt.clone()]; steps.prefill];
                Ok(Self { start: 0, resets: true, warmup: vec![prompt], samples })
            }
            Workload::Mixed { prompt: length, new } => {
                tokens.has(workload, length + new)?;
                let mut all = vec![prompt(tokens, length)];
                for step in 0..new {
                    let ids = Array2::from_elem((1, 1), tokens.after(length, new, 0, step));
                    all.push(input(ids, length + step));
                }
                let warmup = all.iter().take(1 + steps.warmup).cloned().collect();
                Ok(Self { start: 0, resets: true, warmup, samples: vec![all] })
            }
        }
    }

    /// Rows of every step.
    pub(super) fn batch(&self) -> usize {
        self.samples.iter().flatten().next().map_or(1, Input::batch)
    }

    /// How the sessions are opened that run it, `options` being how any are: none takes steps that there are
    /// not.
    pub(super) fn session(&self, options: &session::Options) -> session::Options {
        let steps = || self.warmup.iter().chain(self.samples.iter().flatten());
        let one = |input: &Input| input.ids.len() == 1;
        match options.one_each(self.batch()) {
            Some(alone) if steps().all(|input| input.sequence() == 1) => alone,
            beside => session::Options {
                one_token_apart: beside.is_some() && steps().any(one),
                ..options.clone()
            },
        }
    }

    /// Tokens in a row of the cache after the last step, if it is read again and again: a prefill
    /// leaves it at once.
    pub(super) fn longest(&self) -> usize {
        let steps = self.samples.iter().flatten().filter(|input| input.sequence() == 1);
        steps.map(|input| input.mask.ncols()).max().unwrap_or_default()
    }

    /// The steps whose tokens the samples run: every one once.
    pub(super) fn distinct(&self) -> impl Iterator<Item = &Input> {
        let samples = if self.resets { &self.samples[..1] } else { &self.samples[..] };
        samples.iter().flatten()
    }
}

fn prompt(tokens: &Tokens, length: usize) -> Input {
    let ids = tokens.prefix(length);
    input(Array2::from_shape_fn((1, length), |(_, s)| ids[s]), 0)
}

/// New tokens after `past` cached ones, without padding.
pub(super) fn input(ids: Array2<i64>, past: usize) -> Input {
    let (rows, sequence) = ids.dim();
    Input {
        mask: Array2::ones((rows, past + sequence)),
        positions: Array2::from_shape_fn((rows, sequence), |(_, s)| (past + s) as i64),
        ids,
        logits: Logits::Last,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{Provider, Shapes};

    const STEPS: Steps = Steps { decode: 4, prefill: 2, warmup: 3 };

    fn script(workload: &str, tokens: &Tokens) -> Result<Script, Short> {
        Script::new(workload.parse().expect("a workload"), tokens, STEPS)
    }

    #[test]
    fn workloads_read_as_they_are_written() {
        for workload in Workload::full(true) {
            assert_eq!(workload.to_string().parse(), Ok(workload));
        }
        assert_eq!(Workload::full(true).len(), 12);
        assert_eq!(Workload::quick(false).len(), 2);
        for wrong in ["", "decode", "decode:1", "decode:0:4", "prefill:x", "mixed:1:2:3", "chat:1"]
        {
            assert_eq!(wrong.parse::<Workload>(), Err(Unknown(wrong.to_owned())));
        }
    }

    #[test]
    fn no_session_takes_steps_that_there_are_not() {
        let on = |provider, workload, apart| {
            let options = session::Options {
                provider,
                one_token_apart: apart,
                ..session::Options::default()
            };
            let script = script(workload, &Tokens::Drawn { seed: 1, vocab: 50 }).expect("drawn");
            let session::Options { shapes, one_token_apart, .. } = script.session(&options);
            (shapes, one_token_apart)
        };
        let sessions = |workload, apart| on(Provider::Cpu, workload, apart);
        assert_eq!(sessions("decode:1:10", true), (Shapes::OneEach(1), false));
        assert_eq!(sessions("decode:2:10", true), (Shapes::OneEach(2), false));
        assert_eq!(sessions("prefill:4", true), (Shapes::Any, false));
        assert_eq!(sessions("mixed:4:3", true), (Shapes::Any, true));
        assert_eq!(sessions("decode:1:10", false), (Shapes::Any, false));
        assert_eq!(sessions("mixed:4:3", false), (Shapes::Any, false));
        assert_eq!(on(Provider::Cuda, "decode:1:10", true), (Shapes::Any, false));
    }

    #[test]
    fn decode_is_timed_from_the_cache_asked_for() {
        let script = script("decode:2:10", &Tokens::Drawn { seed: 1, vocab: 50 }).expect("drawn");
        assert_eq!((script.start, script.resets), (7, false));
        assert_eq!(script.warmup.len(), 3);
        let pasts: Vec<_> = script.samples.iter().map(|sample| sample[0].past()).collect();
        assert_eq!(pasts, [10, 11, 12, 13]);
        let first = &script.samples[0][0];
        assert_eq!((first.batch(), first.sequence(), first.positions[[1, 0]]), (2, 1, 10));
        assert_eq!(script.distinct().count(), 4);
        let short =
            self::script("decode:2:2", &Tokens::Drawn { seed: 1, vocab: 50 }).expect("drawn");
        assert_eq!((short.start, short.warmup.len(), short.samples[0][0].past()), (0, 2, 2));
    }

    #[test]
    fn rows_of_a_text_go_on_with_different_pieces() {
        let text = Tokens::Text((0..21).collect());
        let script = script("decode:2:10", &text).expect("long enough");
        let ids: Vec<_> = script.warmup.iter().map(|i| (i.ids[[0, 0]], i.ids[[1, 0]])).collect();
        assert_eq!(ids, [(7, 14), (8, 15), (9, 16)]);
        assert_eq!(script.samples[3][0].ids[[1, 0]], 20);
        let short = Tokens::Text((0..20).collect());
        let error = self::script("decode:2:10", &short).expect_err("too short");
        assert_eq!((error.needed, error.found), (21, 20));
    }

    #[test]
    fn prompts_begin_on_an_empty_cache() {
        let text = Tokens::Text((0..9).collect());
        let prefill = script("prefill:5", &text).expect("long enough");
        assert_eq!((prefill.samples.len(), prefill.distinct().count()), (2, 1));
        assert_eq!(prefill.samples[1][0].ids.row(0).to_vec(), [0, 1, 2, 3, 4]);
        let mixed = script("mixed:5:4", &text).expect("long enough");
        assert_eq!((mixed.warmup.len(), mixed.samples.len(), mixed.samples[0].len()), (4, 1, 5));
        let last = &mixed.samples[0][4];
        assert_eq!((last.past(), last.ids[[0, 0]]), (8, 8));
        assert!(script("mixed:5:5", &text).is_err());
    }
}
