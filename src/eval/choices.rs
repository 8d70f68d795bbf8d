//! Multiple choice: which of an item's choices a decoder finds most likely.
//!
//! A choice is scored by the log-likelihood of its tokens after its context ([`encode`] says which
//! tokens those are). `acc` is the share of items whose right choice scores highest, `acc_norm` the
//! same after each score is divided by the bytes of the choice's text. Of equal scores the first
//! wins. What the choices of an item have in common is run once ([`score`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Decisions, Skipped};
use crate::decoder::{LastOnly, Peek, gives_all};
use crate::text;
use crate::world::{Stopped, World};

pub mod encode;
pub mod pairs;
pub mod score;
pub mod stats;
pub mod task;

pub use stats::Score;
pub use task::Task;

/// What of the tasks is measured, and how.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// Items of each task at most, drawn by [`Options::seed`]; all where not given.
    pub limit: Option<usize>,
    /// Which items are drawn.
    pub seed: u64,
    /// What stands between context and continuation, by task's name; see [`encode::separator`] for
    /// the others.
    pub separators: BTreeMap<String, String>,
}

/// How far an evaluation is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress<'a> {
    /// The task being run.
    pub task: &'a str,
    /// Items done, of all tasks.
    pub done: usize,
    /// Items in all tasks.
    pub items: usize,
}

/// What was measured. As JSON, the fields come in this order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choices {
    /// Items of each task at most.
    pub limit: Option<usize>,
    /// Which items were drawn.
    pub seed: u64,
    /// The mean of the tasks' `acc`, each counted alike.
    pub acc: Score,
    /// The mean of the tasks' `acc_norm`.
    pub acc_norm: Score,
    /// What the routers skipped, over every token run; `None` where the decoder does not report it.
    pub skipped: Option<Skipped>,
    /// In the order they were given.
    pub tasks: Vec<TaskScores>,
}

/// What was measured on one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskScores {
    /// The file's name, without its extension.
    pub task: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// What stood between context and continuation; `null` for a space where there was none.
    pub separator: Option<String>,
    /// Share of items whose right choice is the most likely.
    pub acc: Score,
    /// The same for log-likelihoods per byte.
    pub acc_norm: Score,
    /// In the order of the file.
    pub items: Vec<ItemScores>,
}

/// What was measured on one item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ItemScores {
    /// Its line in the file, from 1.
    pub line: usize,
    /// The right choice, from 0.
    pub gold: usize,
    /// Of each choice, in nats.
    pub log_likelihoods: Vec<f64>,
    /// Bytes of each choice's text.
    pub bytes: Vec<usize>,
    /// Whether the right choice is the most likely.
    pub acc: bool,
    /// Whether it is the most likely per byte.
    pub acc_norm: bool,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum Error<D> {
    /// The decoder gives the last position's logits alone.
    #[error(transparent)]
    LastOnly(#[from] LastOnly),
    /// Not one item is to be run.
    #[error("a limit of 0 items leaves nothing to measure; it must be 1 or more")]
    Limit,
    /// There is no task.
    #[error("there is no task to measure; give at least one file")]
    NoTask,
    /// A separator for a task that is not measured.
    #[error("a separator is given for task {task}; the tasks are {}", tasks.join(", "))]
    Separator {
        /// Whose it would be.
        task: String,
        /// Those there are.
        tasks: Vec<String>,
    },
    /// An item's text is not what the tokenizer takes.
    #[error("{task}, line {line}: {source}")]
    Tokenizer {
        /// The task.
        task: String,
        /// The item's line.
        line: usize,
        /// The tokenizer's word.
        source: text::Error,
    },
    /// Nothing to condition on, or nothing to score.
    #[error("{task}, line {line}, choice {choice}: the {part} has no token of its own")]
    NoToken {
        /// The task.
        task: String,
        /// The item's line.
        line: usize,
        /// Which, from 0.
        choice: usize,
        /// `context` or `continuation`.
        part: &'static str,
    },
    /// The item could not be scored.
    #[error("{task}, line {line}: {source}")]
    Item {
        /// The task.
        task: String,
        /// The item's line.
        line: usize,
        /// Why.
        source: score::Error<D>,
    },
    /// Another rank stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Scores every task, or a sample of each, each rank of `world` its share of the items; `encode` gives
/// the tokens of a text without special ones, `progress` hears of every item of this rank.
///
/// # Errors
///
/// Every variant of [`Error`].
pub fn measure<D: Peek>(
    decoder: &mut D,
    tasks: &[Task],
    options: &Options,
    encode: &dyn Fn(&str) -> Result<Vec<i64>, text::Error>,
    world: &dyn World,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<Choices, Error<D::Error>> {
    gives_all(decoder, "multiple choice")?;
    check(tasks, options)?;
    let samples: Vec<_> =
        tasks.iter().map(|task| task.sample(options.limit, options.seed)).collect();
    let items: usize = samples.iter().map(Vec::len).sum();
    let separator = |task: &Task| options.separators.get(&task.name).map(String::as_str);
    let all = || {
        tasks
            .iter()
            .zip(&samples)
            .flat_map(|(task, items)| items.iter().map(move |item| (task, *item)))
    };
    let mut done = 0;
    let mut decisions: Option<Decisions> = None;
    // A score for every choice; those of another rank's items are zero here.
    let mut scores = Vec::new();
    for (number, (task, item)) in all().enumerate() {
        let first = scores.len();
        scores.resize(first + item.choices.len(), 0.0);
        if !world.takes(number) {
            continue;
        }
        let (name, line) = (|| task.name.clone(), item.line);
        let sequences = item.sequences(separator(task), encode).map_err(|failed| match failed {
            encode::Error::Tokenizer(source) => Error::Tokenizer { task: name(), line, source },
            encode::Error::NoToken { choice, part } => {
                Error::NoToken { task: name(), line, choice, part }
            }
        })?;
        let own = score::item(decoder, &sequences, &mut decisions)
            .map_err(|source| Error::Item { task: name(), line, source })?;
        scores[first..].copy_from_slice(&own);
        done = (done + world.size()).min(items);
        progress(Progress { task: &task.name, done, items });
    }
    decoder.reset();
    world.sum(&mut scores)?;
    let decisions = Decisions::of_all(decisions, world)?;
    let mut scores = scores.into_iter();
    let scored: Vec<_> = tasks
        .iter()
        .zip(&samples)
        .map(|(task, items)| {
            let mut own = |item: &task::Item| scores.by_ref().take(item.choices.len()).collect();
            let items = items.iter().map(|item| (*item, own(item)));
            let items: Vec<_> = items.map(|(item, own)| ItemScores::new(item, own)).collect();
            TaskScores::new(task, separator(task), items)
        })
        .collect();
    Ok(Choices {
        limit: options.limit,
        seed: options.seed,
        acc: stats::mean_of(scored.iter().map(|task| task.acc)),
        acc_norm: stats::mean_of(scored.iter().map(|task| task.acc_norm)),
        skipped: decisions.map(|decisions| decisions.skipped()),
        tasks: scored,
    })
}

/// Refuses tasks and options that leave nothing to measure, or name what is not there.
///
/// # Errors
///
/// [`Error::Limit`], [`Error::NoTask`], [`Error::Separator`].
pub fn check<D>(tasks: &[Task], options: &Options) -> Result<(), Error<D>> {
    if options.limit == Some(0) {
        return Err(Error::Limit);
    }
    if tasks.is_empty() {
        return Err(Error::NoTask);
    }
    let unknown = |name: &&String| tasks.iter().all(|task| task.name != **name);
    match options.separators.keys().find(unknown) {
        None => Ok(()),
        Some(name) => Err(Error::Separator {
            task: name.clone(),
            tasks: tasks.iter().map(|task| task.name.clone()).collect(),
        }),
    }
}

impl TaskScores {
    fn new(task: &Task, separator: Option<&str>, items: Vec<ItemScores>) -> Self {
        Self {
            task: task.name.clone(),
            sha256: task.sha256.clone(),
            separator: separator.map(str::to_owned),
            acc: stats::share(items.iter().map(|item| item.acc)),
            acc_norm: stats::share(items.iter().map(|item| item.acc_norm)),
            items,
        }
    }
}

impl ItemScores {
    fn new(item: &task::Item, log_likelihoods: Vec<f64>) -> Self {
        let bytes: Vec<_> = item.choices.iter().map(|choice| choice.continuation.len()).collect();
        let per_byte = log_likelihoods.iter().zip(&bytes).map(|(sum, bytes)| sum / *bytes as f64);
        Self {
            line: item.line,
            gold: item.gold,
            acc: best(log_likelihoods.iter().copied()) == item.gold,
            acc_norm: best(per_byte) == item.gold,
            bytes,
            log_likelihoods,
        }
    }
}

/// The place of the highest, the first of equals.
fn best(scores: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (place, score) in scores.enumerate() {
        if score > best.1 {
            best = (place, score);
        }
    }
    best.0
}

#[cfg(test)]
mod tests;
