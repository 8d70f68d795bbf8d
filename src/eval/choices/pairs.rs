//! Two models on the same items, compared item by item.
//!
//! The difference of two accuracies on the same items varies less than either accuracy does, because
//! most items are easy or hard for both. So each item gives the difference of its two results (1, 0
//! or −1), and the interval is that of their mean.

use serde::{Deserialize, Serialize};

use super::stats::{self, Score};
use super::{Choices, ItemScores, Options, Task, TaskScores};

/// Standard errors to either side of a mean that hold 95 % of a normal distribution.
const NORMAL_95: f64 = 1.959_963_984_540_054;

/// One model's results less another's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The other model's name.
    pub against: String,
    /// The mean of the tasks' differences in `acc`.
    pub acc: Difference,
    /// The mean of the tasks' differences in `acc_norm`.
    pub acc_norm: Difference,
    /// Task by task.
    pub tasks: Vec<TaskDifference>,
}

/// The difference on one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskDifference {
    /// The task.
    pub task: String,
    /// In `acc`.
    pub acc: Difference,
    /// In `acc_norm`.
    pub acc_norm: Difference,
    /// Items that only this model gets right, by `acc`.
    pub gained: usize,
    /// Items that only the other gets right, by `acc`.
    pub lost: usize,
}

/// A mean difference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Above 0 where this model is better.
    pub mean: f64,
    /// Its standard error.
    pub standard_error: Option<f64>,
    /// Both ends of the 95 % interval, from the normal distribution.
    pub interval: Option<[f64; 2]>,
}

/// Why two results cannot be compared item by item.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// Means over other tasks.
    #[error(
        "the tasks are {now:?} here and {before:?} there; measure the same ones in the same order"
    )]
    Tasks {
        /// Here.
        now: Vec<String>,
        /// There.
        before: Vec<String>,
    },
    /// Another file of the same name.
    #[error("{task}: the file has SHA-256 {now} here and {before} there; measure the same file")]
    File {
        /// The task.
        task: String,
        /// Here.
        now: String,
        /// There.
        before: String,
    },
    /// The prompts differ.
    #[error(
        "{task}: between context and continuation stands {} here and {} there; use the same separator",
        quoted(now.as_ref()), quoted(before.as_ref())
    )]
    Separator {
        /// The task.
        task: String,
        /// Here.
        now: Option<String>,
        /// There.
        before: Option<String>,
    },
    /// The samples differ.
    #[error(
        "{task}: the items are not the same ({} here, {} there); use --limit and --seed as there: {}, seed {seed}",
        .now, .before, limited(*limit)
    )]
    Items {
        /// The task.
        task: String,
        /// How many there are here.
        now: usize,
        /// And there.
        before: usize,
        /// The limit there.
        limit: Option<usize>,
        /// The seed there.
        seed: u64,
    },
}

fn quoted(separator: Option<&String>) -> String {
    separator.map_or_else(|| "a space where there is none".to_owned(), |text| format!("{text:?}"))
}

fn limited(limit: Option<usize>) -> String {
    limit.map_or_else(|| "no limit".to_owned(), |limit| format!("limit {limit}"))
}

/// Which items some results are of.
#[derive(Debug, PartialEq)]
struct Sample {
    task: String,
    sha256: String,
    separator: Option<String>,
    lines: Vec<usize>,
}

/// Whether results of `tasks` with `options` can be compared with `before`.
///
/// # Errors
///
/// [`Error`] unless they are of the same items.
pub fn check(tasks: &[Task], options: &Options, before: &Choices) -> Result<(), Error> {
    let sample = |task: &Task| Sample {
        task: task.name.clone(),
        sha256: task.sha256.clone(),
        separator: options.separators.get(&task.name).cloned(),
        lines: task.sample(options.limit, options.seed).iter().map(|item| item.line).collect(),
    };
    same(&tasks.iter().map(sample).collect::<Vec<_>>(), before)
}

/// `now` less `before`, which is called `against`.
///
/// # Errors
///
/// [`Error`] unless both are of the same items.
pub fn compare(now: &Choices, before: &Choices, against: &str) -> Result<Comparison, Error> {
    same(&samples(now), before)?;
    let pairs = now.tasks.iter().zip(&before.tasks);
    let tasks: Vec<_> = pairs.map(|(now, before)| TaskDifference::new(now, before)).collect();
    let mean = |of: fn(&TaskDifference) -> Difference| {
        Difference::from(stats::mean_of(tasks.iter().map(|task| of(task).score())))
    };
    Ok(Comparison {
        against: against.to_owned(),
        acc: mean(|task| task.acc),
        acc_norm: mean(|task| task.acc_norm),
        tasks,
    })
}

fn samples(choices: &Choices) -> Vec<Sample> {
    let sample = |task: &TaskScores| Sample {
        task: task.task.clone(),
        sha256: task.sha256.clone(),
        separator: task.separator.clone(),
        lines: task.items.iter().map(|item| item.line).collect(),
    };
    choices.tasks.iter().map(sample).collect()
}

fn same(now: &[Sample], choices: &Choices) -> Result<(), Error> {
    let before = samples(choices);
    let names = |samples: &[Sample]| -> Vec<String> {
        samples.iter().map(|sample| sample.task.clone()).collect()
    };
    if names(now) != names(&before) {
        return Err(Error::Tasks { now: names(now), before: names(&before) });
    }
    for (now, before) in now.iter().zip(before) {
        let task = now.task.clone();
        if now.sha256 != before.sha256 {
            return Err(Error::File { task, now: now.sha256.clone(), before: before.sha256 });
        }
        if now.separator != before.separator {
            let now = now.separator.clone();
            return Err(Error::Separator { task, now, before: before.separator });
        }
        if now.lines != before.lines {
            let (now, before) = (now.lines.len(), before.lines.len());
            let (limit, seed) = (choices.limit, choices.seed);
            return Err(Error::Items { task, now, before, limit, seed });
        }
    }
    Ok(())
}

impl TaskDifference {
    /// Of results on the same items.
    fn new(now: &TaskScores, before: &TaskScores) -> Self {
        let items = || now.items.iter().zip(&before.items);
        let mean = |right: fn(&ItemScores) -> bool| {
            let one = |item| f64::from(u8::from(right(item)));
            let differences: Vec<_> = items().map(|(a, b)| one(a) - one(b)).collect();
            Difference::from(stats::mean(&differences))
        };
        Self {
            task: now.task.clone(),
            acc: mean(|item| item.acc),
            acc_norm: mean(|item| item.acc_norm),
            gained: items().filter(|(now, before)| now.acc && !before.acc).count(),
            lost: items().filter(|(now, before)| !now.acc && before.acc).count(),
        }
    }
}

impl Difference {
    fn score(self) -> Score {
        Score { mean: self.mean, standard_error: self.standard_error }
    }
}

impl From<Score> for Difference {
    fn from(Score { mean, standard_error }: Score) -> Self {
        let interval =
            standard_error.map(|error| [-1.0, 1.0].map(|s| mean + s * NORMAL_95 * error));
        Self { mean, standard_error, interval }
    }
}
