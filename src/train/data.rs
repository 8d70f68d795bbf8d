//! Text to windows of tokens.
//!
//! Every file is tokenised once, into a cache file named by the hash of its content and of the
//! tokenizer. Documents (a text file, a line of JSONL, or a row of a Parquet file) follow one another, each ended by the
//! end-of-text token where the model has one, and are cut into windows ([`windows`]), together or each
//! by itself. The windows at the end are held out, where that is asked for; the others are
//! visited in an order that is random by epoch and a function of the seed.

mod cache;
#[cfg(feature = "parquet")]
mod parquet;
mod read;
mod windows;

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::random::{self, Use};
use crate::artifact;
use crate::text::{self, Tokenizer};

use cache::Tokens;

pub use windows::{Cut, Windows};

/// The field that holds the text, where none is named.
pub const FIELD: &str = "text";

/// Why there are no windows.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system's word.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        source: io::Error,
    },
    /// A file of a kind that is not read.
    #[error("{}: {kind} files are not read; give plain text, or JSONL with a \"text\" field", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is, by its name.
        kind: String,
    },
    /// A file of a kind that this build does not read.
    #[error("{}: this build does not read Parquet; build it with --features parquet, or give plain text or JSONL", path.display())]
    NotBuilt {
        /// The file.
        path: PathBuf,
    },
    /// A file that is not read as Parquet.
    #[error("{}: cannot be read as Parquet: {found}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
    },
    /// A table without the column that should hold the text.
    #[error("{}: has no column {column}; its columns are {}; name one with --text-field", path.display(), columns.join(", "))]
    Column {
        /// The file.
        path: PathBuf,
        /// The column that was looked for.
        column: String,
        /// Those there are.
        columns: Vec<String>,
    },
    /// A directory without text.
    #[error("{}: holds no .txt, .md, .jsonl or .parquet file", path.display())]
    NoFiles {
        /// The directory.
        path: PathBuf,
    },
    /// A file without text.
    #[error("{}: holds no text", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Bytes that are no text.
    #[error("{}: is not UTF-8 text: the bytes from {offset} on are not", path.display())]
    Utf8 {
        /// The file.
        path: PathBuf,
        /// The first byte that is wrong.
        offset: u64,
    },
    /// A line of JSONL that is no document.
    #[error("{}: line {line}: {found}; expected an object with a string \"{field}\"", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: u64,
        /// What is wrong with it.
        found: String,
        /// The field that should hold the text.
        field: String,
    },
    /// The tokenizer failed.
    #[error("{}: {source}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// The tokenizer's word.
        source: text::Error,
    },
    /// The tokenizer does not belong to the model.
    #[error("{}: has {tokens} tokens and the model {vocab}; it is the tokenizer of another model", path.display())]
    ForeignTokenizer {
        /// The file.
        path: PathBuf,
        /// How many it knows.
        tokens: usize,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// A cache file holds what no tokenizer gave.
    #[error("{}: token {token} is {id}; the model has {vocab} tokens. The file is damaged: remove it", path.display())]
    Token {
        /// The cache file.
        path: PathBuf,
        /// The token's place.
        token: u64,
        /// What stands there.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// The text does not fill the windows that are needed.
    #[error("the text has {tokens} tokens, {windows} windows of {window}; {needed} are needed")]
    Short {
        /// Tokens of the text.
        tokens: u64,
        /// Windows they fill.
        windows: usize,
        /// Tokens in a window.
        window: usize,
        /// Windows needed at least.
        needed: usize,
    },
    /// A file could not be hashed.
    #[error(transparent)]
    Hash(#[from] artifact::Error),
    /// The caller said to stop.
    #[error("interrupted while the text was tokenised")]
    Interrupted,
}

/// How far the tokenisation is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Told of progress; may stop it.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// Texts as one sequence of tokens.
#[derive(Debug)]
pub struct Corpus {
    files: Vec<Tokens>,
    /// Where each file's tokens begin, and their end.
    starts: Vec<u64>,
    vocab: usize,
}

/// Where in the texts a window begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// A byte of it that is at most a hundred or so tokens earlier; of JSONL, that of the line; of a
    /// table, the row.
    pub offset: u64,
    /// Whether that is a row, from 0.
    pub rows: bool,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let unit = if self.rows { "row" } else { "byte" };
        write!(f, "{} from {unit} {} on", self.path.display(), self.offset)
    }
}

/// What turns texts into tokens.
#[derive(Debug, Clone, Copy)]
pub struct Tokenisation<'a> {
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The directory it was read from.
    pub directory: &'a Path,
    /// Rows of the model's embedding.
    pub vocab: usize,
    /// Where the caches lie.
    pub cache: &'a Path,
    /// The field of JSONL, or column of a table, that holds the text.
    pub field: &'a str,
}

impl Corpus {
    /// Tokenises every file named, and those in the directories named, that no cache holds yet.
    ///
    /// # Errors
    ///
    /// Every variant of [`Error`] but [`Error::Short`].
    pub fn open(
        paths: &[PathBuf],
        how: Tokenisation<'_>,
        progress: OnProgress<'_>,
    ) -> Result<Self, Error> {
        let path = how.directory.join("tokenizer.json");
        let tokens = how.tokenizer.vocab_size();
        // Embeddings are padded to round numbers, by far less than this.
        if tokens > how.vocab || tokens < how.vocab / 2 {
            return Err(Error::ForeignTokenizer { path, tokens, vocab: how.vocab });
        }
        let Some(tokenizer) = artifact::hash::of_file(&path, &mut |_| true)? else {
            return Err(Error::Interrupted);
        };
        let texts = read::collect(paths, how.field)?;
        let total = texts.iter().map(|text| text.size).sum();
        let (mut done, mut files, mut starts) = (0, Vec::new(), vec![0]);
        for text in texts {
            let mut advance = |bytes| progress(Progress { done: done + bytes, total });
            let tokens = Tokens::open(&text, how, &tokenizer.sha256, &mut advance)?;
            done += text.size;
            starts.push(starts.last().copied().unwrap_or_default() + tokens.count());
            files.push(tokens);
        }
        Ok(Self { files, starts, vocab: how.vocab })
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.starts.last().copied().unwrap_or_default()
    }

    /// What identifies content and tokenizer of every file, in order.
    pub fn keys(&self) -> Vec<String> {
        self.files.iter().map(|file| file.key().to_owned()).collect()
    }

    /// The `count` tokens from token `start` on.
    fn read(&self, start: u64, count: usize) -> Result<Vec<u32>, Error> {
        let mut tokens = Vec::with_capacity(count);
        let end = start + count as u64;
        for (file, range) in self.files.iter().zip(self.starts.windows(2)) {
            let (from, to) = (start.max(range[0]), end.min(range[1]));
            if from < to {
                file.read(from - range[0], (to - from) as usize, self.vocab, &mut tokens)?;
            }
        }
        Ok(tokens)
    }

    /// Where every document begins, in order.
    fn documents(&self) -> impl Iterator<Item = u64> {
        let files = self.files.iter().zip(&self.starts);
        files.flat_map(|(file, start)| file.documents().map(move |token| start + token))
    }

    /// Where token `token` stands.
    fn place(&self, token: u64) -> Place {
        let at = self.starts.partition_point(|start| *start <= token).saturating_sub(1);
        match self.files.get(at) {
            Some(file) => file.place(token - self.starts[at]),
            None => Place { path: PathBuf::new(), offset: 0, rows: false },
        }
    }
}

/// The order in which windows are visited: each once an epoch.
#[derive(Debug)]
pub struct Order {
    seed: u64,
    count: usize,
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// Of `count` windows.
    pub const fn new(seed: u64, count: usize) -> Self {
        Self { seed, count, epoch: None }
    }

    /// The window that sample `sample` of the run is.
    pub fn window(&mut self, sample: u64) -> usize {
        let count = self.count.max(1);
        let (epoch, at) = (sample / count as u64, (sample % count as u64) as usize);
        if !matches!(&self.epoch, Some((known, _)) if *known == epoch) {
            let mut random = random::generator(self.seed, Use::Order, epoch, 0);
            self.epoch = Some((epoch, random::permutation(&mut random, count)));
        }
        self.epoch.as_ref().map_or(0, |(_, order)| order[at])
    }
}

#[cfg(test)]
mod tests;
