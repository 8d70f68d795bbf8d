//! Text out of tokens as they come.

use super::{Error, token};

/// Turns tokens into text as they come. A token may end inside a character: nothing is given out
/// until it is complete.
#[derive(Debug)]
pub struct Stream<'a> {
    tokenizer: &'a tokenizers::Tokenizer,
    ids: Vec<u32>,
    /// Start of the window that is decoded: decoders treat the first token of a text specially, so
    /// it reaches back to tokens already given out.
    start: usize,
    /// End of the tokens whose text was given out.
    given: usize,
}

impl<'a> Stream<'a> {
    pub(super) fn new(tokenizer: &'a tokenizers::Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), start: 0, given: 0 }
    }

    /// The text that `id` completes; empty if none.
    pub fn push(&mut self, id: i64) -> Result<String, Error> {
        self.ids.push(token(id)?);
        self.advance(false)
    }

    /// The text that is left, a torn character as U+FFFD.
    pub fn finish(mut self) -> Result<String, Error> {
        self.advance(true)
    }

    fn advance(&mut self, last: bool) -> Result<String, Error> {
        let decode = |ids: &[u32]| self.tokenizer.decode(ids, true).map_err(Error::Decode);
        let before = decode(&self.ids[self.start..self.given])?;
        let text = decode(&self.ids[self.start..])?;
        if !last && text.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        let new = text.strip_prefix(&before).unwrap_or_default().to_owned();
        if !new.is_empty() {
            self.start = self.given;
            self.given = self.ids.len();
        }
        Ok(new)
    }
}
