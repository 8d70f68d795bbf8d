//! Tasks: JSONL files, one item a line, in one of two forms.
//!
//! ```text
//! {"query": "The sky is", "choices": ["blue", "made of cheese"], "gold": 0}
//! {"context_options": ["Ann lent Bea a pen because Ann", "… because Bea"], "continuation": "had none.", "gold": 1}
//! ```
//!
//! `gold` is the right one's place, from 0. Other fields are ignored, blank lines left out.

use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::artifact::hash;
use crate::random;

/// A file of items.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// The file's name, without its extension.
    pub name: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// In the order of the file.
    pub items: Vec<Item>,
}

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its line in the file, from 1.
    pub line: usize,
    /// Two or more.
    pub choices: Vec<Choice>,
    /// The right one's place.
    pub gold: usize,
}

/// A text and what may follow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// What is given.
    pub context: String,
    /// What is scored.
    pub continuation: String,
}

/// Why a file is no task.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system's word, or bytes that are not UTF-8.
    #[error("{}: cannot be read as UTF-8 text: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// A line is no item.
    #[error("{}:{line}: {source}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong with it.
        source: Malformed,
    },
    /// No line holds anything.
    #[error("{}: holds no item", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Two files have one name, and reports go by names.
    #[error("two tasks are called {name}; rename one of the files")]
    Twice {
        /// The name.
        name: String,
    },
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// Not JSON, or a field of another type.
    #[error("not a multiple-choice item: {}", in_line(.0))]
    Json(#[from] serde_json::Error),
    /// The fields of neither form, or of both.
    #[error(
        "the fields present are {}; an item has `query`, `choices` and `gold`, or `context_options`, `continuation` and `gold`", .0.join(", ")
    )]
    Form(Vec<&'static str>),
    /// Nothing to choose from.
    #[error("`{field}` has {found} of at least 2 entries")]
    Few {
        /// `choices` or `context_options`.
        field: &'static str,
        /// How many there are.
        found: usize,
    },
    /// A text without a visible character.
    #[error("{0} is blank")]
    Blank(String),
    /// No such choice.
    #[error("`gold` is {gold}; the item has {choices} choices, counted from 0")]
    Gold {
        /// What is given.
        gold: i64,
        /// How many there are.
        choices: usize,
    },
}

/// The parser counts lines from where it began, which is the line that is named already.
fn in_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", ", column ")
}

/// A line as it is written.
#[derive(Deserialize)]
struct Line {
    query: Option<String>,
    choices: Option<Vec<String>>,
    context_options: Option<Vec<String>>,
    continuation: Option<String>,
    gold: i64,
}

/// The tasks in `paths`.
///
/// # Errors
///
/// Every variant of [`Error`].
pub fn read_all(paths: &[PathBuf]) -> Result<Vec<Task>, Error> {
    let mut tasks: Vec<Task> = Vec::with_capacity(paths.len());
    for path in paths {
        let task = Task::read(path)?;
        if tasks.iter().any(|other| other.name == task.name) {
            return Err(Error::Twice { name: task.name });
        }
        tasks.push(task);
    }
    Ok(tasks)
}

impl Task {
    /// The task in `path`.
    ///
    /// # Errors
    ///
    /// Every variant of [`Error`] but [`Error::Twice`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let mut items = Vec::new();
        for (line, text) in (1..).zip(text.lines()) {
            if text.trim().is_empty() {
                continue;
            }
            items.push(Item::parse(line, text).map_err(|source| Error::Line {
                path: path.to_owned(),
                line,
                source,
            })?);
        }
        if items.is_empty() {
            return Err(Error::Empty { path: path.to_owned() });
        }
        let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Ok(Self { name, sha256: hash::of_bytes(text.as_bytes()).sha256, items })
    }

    /// `limit` items at most, drawn by `seed` without regard to the file's order, in that order: the
    /// same on any machine.
    pub fn sample(&self, limit: Option<usize>, seed: u64) -> Vec<&Item> {
        let Some(limit) = limit.filter(|limit| *limit < self.items.len()) else {
            return self.items.iter().collect();
        };
        // Every item draws a number, and the lowest win.
        let numbers = random::draw(1 << 62, seed, self.items.len());
        let mut places: Vec<_> = (0..self.items.len()).collect();
        places.sort_by_key(|place| (numbers[*place], *place));
        places.truncate(limit);
        places.sort_unstable();
        places.into_iter().map(|place| &self.items[place]).collect()
    }
}

impl Item {
    fn parse(line: usize, text: &str) -> Result<Self, Malformed> {
        let Line { query, choices, context_options, continuation, gold } =
            serde_json::from_str(text)?;
        let present = [
            ("`query`", query.is_some()),
            ("`choices`", choices.is_some()),
            ("`context_options`", context_options.is_some()),
            ("`continuation`", continuation.is_some()),
            ("`gold`", true),
        ];
        let choices = match (query, choices, context_options, continuation) {
            (Some(query), Some(choices), None, None) => {
                visible("`query`".to_owned(), &query)?;
                enough("choices", &choices)?;
                let choice = |continuation| Choice { context: query.clone(), continuation };
                choices.into_iter().map(choice).collect::<Vec<_>>()
            }
            (None, None, Some(contexts), Some(continuation)) => {
                visible("`continuation`".to_owned(), &continuation)?;
                enough("context_options", &contexts)?;
                let choice = |context| Choice { context, continuation: continuation.clone() };
                contexts.into_iter().map(choice).collect()
            }
            _ => {
                let there = present.into_iter().filter(|(_, there)| *there);
                return Err(Malformed::Form(there.map(|(field, _)| field).collect()));
            }
        };
        match usize::try_from(gold) {
            Ok(gold) if gold < choices.len() => Ok(Self { line, choices, gold }),
            _ => Err(Malformed::Gold { gold, choices: choices.len() }),
        }
    }
}

fn visible(name: String, text: &str) -> Result<(), Malformed> {
    if text.trim().is_empty() { Err(Malformed::Blank(name)) } else { Ok(()) }
}

fn enough(field: &'static str, texts: &[String]) -> Result<(), Malformed> {
    if texts.len() < 2 {
        return Err(Malformed::Few { field, found: texts.len() });
    }
    let mut entries = texts.iter().enumerate();
    entries.try_for_each(|(i, text)| visible(format!("`{field}[{i}]`"), text))
}
