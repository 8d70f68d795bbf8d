//! Text to tokens and back: the tokenizer, the chat template and the ids that end a text.
//!
//! Reads what Hugging Face libraries read from a model's directory: `tokenizer.json`,
//! `tokenizer_config.json`, `chat_template.jinja`, and the end-of-text ids of
//! `generation_config.json`, `config.json` or `genai_config.json`, the first that has any.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

mod clock;
mod stream;
mod template;

pub use self::stream::Stream;
pub use self::template::{ChatTemplate, Message};

/// Why text could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is missing or unreadable.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// A file is not JSON.
    #[error("{}: is not JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: serde_json::Error,
    },
    /// A value in a file is not what its key says.
    #[error("{}: {key} is {found}; expected {expected}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is, as JSON.
        found: String,
    },
    /// The tokenizer's description is not understood.
    #[error("{}: is not a tokenizer: {source}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: tokenizers::Error,
    },
    /// A text cannot be tokenised.
    #[error("the text cannot be tokenised: {0}")]
    Encode(#[source] tokenizers::Error),
    /// Tokens cannot be turned into text.
    #[error("the tokens cannot be turned into text: {0}")]
    Decode(#[source] tokenizers::Error),
    /// An id that is no token's.
    #[error("{0} is not a token id")]
    Id(i64),
    /// The directory has no chat template.
    #[error("{}: there is no chat template (chat_template.jinja, or chat_template in \
             tokenizer_config.json); give the prompt as plain text", directory.display())]
    NoTemplate {
        /// The directory.
        directory: PathBuf,
    },
    /// The chat template is wrong, or refuses the messages.
    #[error("{}: the chat template fails: {source:#}", path.display())]
    Template {
        /// The file it is in.
        path: PathBuf,
        /// What went wrong.
        source: minijinja::Error,
    },
}

/// A model's tokenizer, with its chat template and end-of-text ids.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    directory: PathBuf,
    template: Option<ChatTemplate>,
    eos: Vec<i64>,
}

impl Tokenizer {
    /// Reads the files of `directory`, a checkpoint or an artifact.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let path = directory.join("tokenizer.json");
        let bytes =
            std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let refused = |source| Error::Tokenizer { path: path.clone(), source };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(refused)?;
        // Left over from training in some files; Hugging Face's own libraries ignore them.
        inner.with_truncation(None).map_err(refused)?.with_padding(None);
        Ok(Self {
            inner,
            directory: directory.to_owned(),
            template: ChatTemplate::open(directory)?,
            eos: eos(directory)?,
        })
    }

    /// Token ids of `text`. `special` adds what the tokenizer puts around a whole text, such as a
    /// begin-of-text token; a rendered chat has it already.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<i64>, Error> {
        let encoding = self.inner.encode_fast(text, special).map_err(Error::Encode)?;
        Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
    }

    /// Tokens of `text` without special ones, each with the byte it begins at.
    pub fn encode_with_places(&self, text: &str) -> Result<Vec<(u32, usize)>, Error> {
        let encoding = self.inner.encode(text, false).map_err(Error::Encode)?;
        let places = encoding.get_offsets().iter().map(|(start, _)| *start);
        Ok(encoding.get_ids().iter().copied().zip(places).collect())
    }

    /// Number of tokens, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The text of `ids`, without special tokens.
    pub fn decode(&self, ids: &[i64]) -> Result<String, Error> {
        let ids = ids.iter().map(|id| token(*id)).collect::<Result<Vec<_>, _>>()?;
        self.inner.decode(&ids, true).map_err(Error::Decode)
    }

    /// Turns tokens into text as they come.
    pub fn stream(&self) -> Stream<'_> {
        Stream::new(&self.inner)
    }

    /// The prompt that asks for an answer to `messages`, to be encoded without special tokens.
    pub fn chat(&self, messages: &[Message]) -> Result<String, Error> {
        match &self.template {
            Some(template) => template.render(messages, true),
            None => Err(Error::NoTemplate { directory: self.directory.clone() }),
        }
    }

    /// Ids after which a text is over; empty where no file states any.
    pub fn eos(&self) -> &[i64] {
        &self.eos
    }
}

fn token(id: i64) -> Result<u32, Error> {
    u32::try_from(id).map_err(|_| Error::Id(id))
}

/// The JSON file `path`; `None` where there is none.
fn json(path: &Path) -> Result<Option<Value>, Error> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Read { path: path.to_owned(), source }),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| Error::Json { path: path.to_owned(), source })
}

fn eos(directory: &Path) -> Result<Vec<i64>, Error> {
    let places = [
        ("generation_config.json", "/eos_token_id"),
        ("config.json", "/eos_token_id"),
        ("genai_config.json", "/model/eos_token_id"),
    ];
    for (name, pointer) in places {
        let path = directory.join(name);
        let Some(file) = json(&path)? else { continue };
        let ids = match file.pointer(pointer) {
            None | Some(Value::Null) => continue,
            Some(Value::Array(ids)) => ids.iter().map(Value::as_i64).collect(),
            Some(id) => id.as_i64().map(|id| vec![id]),
        };
        return ids.ok_or_else(|| Error::Key {
            path,
            key: "eos_token_id",
            expected: "a token id or a list of them",
            found: file.pointer(pointer).map(Value::to_string).unwrap_or_default(),
        });
    }
    Ok(Vec::new())
}

#[cfg(test)]
mod tests;
