//! Reading and writing a golden file. What is read is checked in full: a [`Golden`] that comes out
//! of here has every count, token and name that the check relies on.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::ModuleId;

use super::format::Lines;
use super::{Golden, ModuleDecisions, Prompt, VERSION};

/// Largest file that is read, in bytes.
pub const MAX_BYTES: u64 = 256 << 20;
/// Most alternatives to a token.
pub(super) const MAX_TOP: usize = 100;
/// Most tokens of a prompt, and most that follow it.
pub(super) const MAX_TOKENS: usize = 1 << 20;

/// Why a golden file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system refused.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// More than any golden file has.
    #[error("the golden file has more than {limit} bytes; is it one?")]
    TooLarge {
        /// [`MAX_BYTES`].
        limit: u64,
    },
    /// Not JSON, or not a golden file's.
    #[error("not a golden file: {0}")]
    Json(#[source] serde_json::Error),
    /// Written by another version of the tool.
    #[error("the golden file has version {found}, this tool reads {VERSION}; record it again")]
    Version {
        /// The file's.
        found: u64,
    },
    /// A dtype that is none.
    #[error("dtype: found `{found}`, expected f32, f16 or bf16")]
    DType {
        /// What stands there.
        found: String,
    },
    /// A list that must not be empty is, or is longer than anything recorded.
    #[error("{place}: found {found} entries, expected 1 to {most}")]
    Count {
        /// Which list.
        place: String,
        /// Its length.
        found: usize,
        /// The most allowed.
        most: usize,
    },
    /// Two lists that belong together have different lengths.
    #[error("{place}: found {found} entries, expected {expected}")]
    Length {
        /// Which list.
        place: String,
        /// Its length.
        found: usize,
        /// The length of what it belongs to.
        expected: usize,
    },
    /// A token that is negative.
    #[error("{place}: found token {token}, expected 0 or more")]
    Token {
        /// Where.
        place: String,
        /// The token.
        token: i64,
    },
    /// The likeliest token is not the one that was fed.
    #[error("{place}: the first token is {found}, expected the greedy one, {expected}")]
    NotGreedy {
        /// Where.
        place: String,
        /// The first of the likeliest.
        found: i64,
        /// The greedy token.
        expected: i64,
    },
    /// A log-probability above 0.
    #[error("{place}: found a log-probability of {found}, expected 0 or less")]
    LogProb {
        /// Where.
        place: String,
        /// What stands there.
        found: f64,
    },
    /// Not a module, or not in layer order.
    #[error(
        "{place}: found module `{found}`, expected names like `layers.3.mlp`, each once, in layer order"
    )]
    Module {
        /// Where.
        place: String,
        /// The name.
        found: String,
    },
    /// A decision that is none.
    #[error("{place}: found `{found}`, expected only 0 and 1")]
    Keep {
        /// Where.
        place: String,
        /// The first other character.
        found: char,
    },
    /// A near decision of a token that is not there.
    #[error("{place}: found token {found}, expected less than {tokens}")]
    Near {
        /// Where.
        place: String,
        /// The token's place.
        found: usize,
        /// Number of tokens.
        tokens: usize,
    },
}

impl Golden {
    /// Reads a golden file.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError::Read { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(failed)?;
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
        Self::parse(&bytes)
    }

    /// Reads the bytes of a golden file.
    pub fn parse(bytes: &[u8]) -> Result<Self, FileError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        if bytes.len() as u64 > MAX_BYTES {
            return Err(FileError::TooLarge { limit: MAX_BYTES });
        }
        let Versioned { version } = serde_json::from_slice(bytes).map_err(FileError::Json)?;
        if version != u64::from(VERSION) {
            return Err(FileError::Version { found: version });
        }
        let golden: Self = serde_json::from_slice(bytes).map_err(FileError::Json)?;
        golden.validate()?;
        Ok(golden)
    }

    /// Writes the file's text, ending in a newline.
    pub fn write(&self, sink: &mut impl io::Write) -> io::Result<()> {
        let mut serializer = serde_json::Serializer::with_formatter(&mut *sink, Lines::default());
        self.serialize(&mut serializer)?;
        sink.write_all(b"\n")
    }

    fn validate(&self) -> Result<(), FileError> {
        if self.dtype().is_none() {
            return Err(FileError::DType { found: self.dtype.clone() });
        }
        count("prompts", self.prompts.len(), MAX_TOKENS)?;
        self.prompts
            .iter()
            .enumerate()
            .try_for_each(|(index, prompt)| prompt.validate(&format!("prompts[{index}]")))
    }
}

impl Prompt {
    /// Tokens that were fed: all but the last greedy one. Positive in a file that was read.
    pub(super) fn fed(&self) -> usize {
        (self.ids.len() + self.greedy.len()).saturating_sub(1)
    }

    fn validate(&self, place: &str) -> Result<(), FileError> {
        for (name, tokens) in [("ids", &self.ids), ("greedy", &self.greedy)] {
            let place = format!("{place}.{name}");
            count(&place, tokens.len(), MAX_TOKENS)?;
            tokens.iter().try_for_each(|token| natural(&place, *token))?;
        }
        length(&format!("{place}.top"), self.top.len(), self.greedy.len())?;
        for (step, (top, &greedy)) in self.top.iter().zip(&self.greedy).enumerate() {
            let place = format!("{place}.top[{step}]");
            count(&place, top.len(), MAX_TOP)?;
            for &(token, log_prob) in top {
                natural(&place, token)?;
                if log_prob > 0.0 {
                    return Err(FileError::LogProb { place, found: log_prob });
                }
            }
            if let Some(&(found, _)) = top.first()
                && found != greedy
            {
                return Err(FileError::NotGreedy { place, found, expected: greedy });
            }
        }
        let mut before = None;
        for (index, decisions) in self.routing.iter().flatten().enumerate() {
            let place = format!("{place}.routing[{index}]");
            let id = ModuleId::parse(&decisions.module);
            if id.is_none() || id <= before {
                let found = decisions.module.clone();
                return Err(FileError::Module { place, found });
            }
            before = id;
            decisions.validate(&place, self.fed())?;
        }
        Ok(())
    }
}

impl ModuleDecisions {
    fn validate(&self, place: &str, tokens: usize) -> Result<(), FileError> {
        let place_of = |field: &str| format!("{place}.{field}");
        if let Some(found) = self.keep.chars().find(|c| !matches!(c, '0' | '1')) {
            return Err(FileError::Keep { place: place_of("keep"), found });
        }
        length(&place_of("keep"), self.keep.len(), tokens)?;
        match self.near.iter().find(|(token, _)| *token >= tokens) {
            Some(&(found, _)) => Err(FileError::Near { place: place_of("near"), found, tokens }),
            None => Ok(()),
        }
    }
}

fn count(place: &str, found: usize, most: usize) -> Result<(), FileError> {
    if (1..=most).contains(&found) {
        return Ok(());
    }
    Err(FileError::Count { place: place.to_owned(), found, most })
}

fn length(place: &str, found: usize, expected: usize) -> Result<(), FileError> {
    if found == expected {
        return Ok(());
    }
    Err(FileError::Length { place: place.to_owned(), found, expected })
}

fn natural(place: &str, token: i64) -> Result<(), FileError> {
    if token >= 0 {
        return Ok(());
    }
    Err(FileError::Token { place: place.to_owned(), token })
}
