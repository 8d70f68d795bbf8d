//! Which tokens of a choice are given and which are scored.
//!
//! Context and continuation are tokenised as one text, and the number of tokens that the context has
//! by itself says where the scored ones begin: the continuation's first word then has the token that
//! it has in running text. White space at the context's end is first moved to the continuation, whose
//! first word most tokenizers join it with. No special token is added.

use super::task::Item;
use crate::text;

/// A choice, tokenised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Context and continuation.
    pub tokens: Vec<i64>,
    /// The first token that is scored; at least one stands before it, and it is there.
    pub start: usize,
}

/// Why an item cannot be tokenised.
#[derive(Debug)]
pub enum Error {
    /// The tokenizer's word.
    Tokenizer(text::Error),
    /// Nothing to condition on, or nothing to score.
    NoToken {
        /// Which choice, from 0.
        choice: usize,
        /// `context` or `continuation`.
        part: &'static str,
    },
}

/// What stands between a context and its continuation: what is asked for, or a space unless there is
/// white space already.
pub fn separator<'a>(context: &str, asked: Option<&'a str>) -> &'a str {
    match asked {
        Some(asked) => asked,
        None if context.ends_with(char::is_whitespace) => "",
        None => " ",
    }
}

impl Item {
    /// The item's choices in tokens.
    pub(super) fn sequences(
        &self,
        asked: Option<&str>,
        encode: &dyn Fn(&str) -> Result<Vec<i64>, text::Error>,
    ) -> Result<Vec<Sequence>, Error> {
        let mut sequences = Vec::with_capacity(self.choices.len());
        for (place, choice) in self.choices.iter().enumerate() {
            let given = format!("{}{}", choice.context, separator(&choice.context, asked));
            let context = given.trim_end();
            let whole = format!("{given}{}", choice.continuation);
            let tokens = encode(&whole).map_err(Error::Tokenizer)?;
            let start = encode(context).map_err(Error::Tokenizer)?.len();
            if start == 0 {
                return Err(Error::NoToken { choice: place, part: "context" });
            }
            if tokens.len() <= start {
                return Err(Error::NoToken { choice: place, part: "continuation" });
            }
            sequences.push(Sequence { tokens, start });
        }
        Ok(sequences)
    }
}
