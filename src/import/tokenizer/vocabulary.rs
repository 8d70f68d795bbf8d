//! `tokenizer.ggml.tokens` and what is said about each of them.

use std::collections::HashMap;

use super::Error;
use crate::import::config::TokenIds;
use crate::import::metadata::{self, Metadata};

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A piece of text.
    Normal,
    /// Stands for what cannot be spelled.
    Unknown,
    /// Steers the model; left out of decoded text.
    Control,
    /// Added by name; recognised before text is split.
    UserDefined,
    /// Never produced.
    Unused,
    /// One byte, of a `SentencePiece` vocabulary.
    Byte,
}

/// Tokens by id, and the roles some of them have.
#[derive(Debug, Clone, PartialEq)]
pub struct Vocabulary {
    /// The text of each token.
    pub tokens: Vec<String>,
    /// The kind of each token.
    pub kinds: Vec<Kind>,
    /// Id of each text.
    pub ids: HashMap<String, usize>,
    /// Begins a text.
    pub bos: Option<usize>,
    /// Ends a text.
    pub eos: Option<usize>,
    /// Ends a turn, or hands over to a tool: generation stops there too.
    pub turn_ends: Vec<usize>,
    /// Stands for what cannot be spelled.
    pub unknown: Option<usize>,
    /// Fills a batch.
    pub padding: Option<usize>,
    /// Separates two texts.
    pub separator: Option<usize>,
    /// Hides a token.
    pub mask: Option<usize>,
}

impl Vocabulary {
    /// Reads the metadata.
    pub fn read(metadata: Metadata<'_>) -> Result<Self, Error> {
        let key = "tokenizer.ggml.tokens";
        let tokens = metadata
            .strings(key)?
            .ok_or(metadata::Error::Missing { key: key.into(), expected: "an array of strings" })?;
        let mut ids = HashMap::with_capacity(tokens.len());
        for (second, text) in tokens.iter().enumerate() {
            if let Some(first) = ids.insert(text.clone(), second) {
                return Err(Error::Duplicate { first, second, text: text.clone() });
            }
        }
        let id = |name: &str| -> Result<Option<usize>, Error> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            match metadata.count(&key)? {
                Some(id) if id >= tokens.len() => Err(Error::Id { key, id, tokens: tokens.len() }),
                id => Ok(id),
            }
        };
        Ok(Self {
            kinds: kinds(metadata, tokens.len())?,
            tokens: tokens.to_vec(),
            ids,
            bos: id("bos")?,
            eos: id("eos")?,
            turn_ends: [id("eot")?, id("eom")?].into_iter().flatten().collect(),
            unknown: id("unknown")?,
            padding: id("padding")?,
            // The key is misspelled in the format itself.
            separator: id("seperator")?,
            mask: id("mask")?,
        })
    }

    /// Tokens recognised before text is split, `(id, text, special)`: special ones steer the model.
    pub fn added(&self) -> impl Iterator<Item = (usize, &str, bool)> {
        self.tokens.iter().zip(&self.kinds).enumerate().filter_map(|(id, (text, kind))| {
            let special = match kind {
                Kind::Control | Kind::Unknown => true,
                Kind::UserDefined => false,
                Kind::Normal | Kind::Unused | Kind::Byte => return None,
            };
            Some((id, text.as_str(), special))
        })
    }

    /// Tokens with a role, by its name in `special_tokens_map.json`.
    pub fn roles(&self) -> impl Iterator<Item = (&'static str, usize)> {
        [
            ("bos_token", self.bos),
            ("eos_token", self.eos),
            ("unk_token", self.unknown),
            ("sep_token", self.separator),
            ("pad_token", self.padding),
            ("mask_token", self.mask),
        ]
        .into_iter()
        .filter_map(|(role, id)| Some((role, id?)))
    }

    /// The ids that generation needs.
    pub fn token_ids(&self) -> TokenIds {
        let mut eos: Vec<usize> = self.eos.into_iter().collect();
        for &id in &self.turn_ends {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        TokenIds { bos: self.bos, eos, pad: self.padding }
    }
}

fn kinds(metadata: Metadata<'_>, tokens: usize) -> Result<Vec<Kind>, Error> {
    let key = "tokenizer.ggml.token_type";
    let Some(types) = metadata.integers(key)? else { return Ok(vec![Kind::Normal; tokens]) };
    if types.len() != tokens {
        return Err(Error::Length { key, found: types.len(), tokens });
    }
    types
        .iter()
        .enumerate()
        .map(|(id, kind)| match kind {
            1 => Ok(Kind::Normal),
            2 => Ok(Kind::Unknown),
            3 => Ok(Kind::Control),
            4 => Ok(Kind::UserDefined),
            5 => Ok(Kind::Unused),
            6 => Ok(Kind::Byte),
            &found => Err(Error::TokenType { id, found }),
        })
        .collect()
}
