//! A corpus cut into windows: one text packed into full ones, or document by document.

use std::sync::Arc;

use super::{Corpus, Error, Place};

/// How documents become windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// One after the other, into full windows; what is left over at the end is not used.
    Packed,
    /// Each by itself, into as many full windows as it fills and one that it does not.
    Apart,
}

/// Consecutive windows of a corpus.
#[derive(Debug, Clone)]
pub struct Windows<'a> {
    corpus: &'a Corpus,
    window: usize,
    first: usize,
    count: usize,
    /// Where each window of the corpus begins, and its tokens; `None` where they are packed.
    apart: Option<Arc<[(u64, usize)]>>,
}

impl<'a> Windows<'a> {
    /// The windows of `window` tokens, at most; at least `needed`.
    ///
    /// # Errors
    ///
    /// [`Error::Short`].
    pub fn new(corpus: &'a Corpus, window: usize, cut: Cut, needed: usize) -> Result<Self, Error> {
        let tokens = corpus.tokens();
        let apart = (cut == Cut::Apart).then(|| apart(corpus, window.max(1)));
        let windows = match &apart {
            None => (tokens / window.max(1) as u64) as usize,
            Some(windows) => windows.len(),
        };
        if windows < needed {
            return Err(Error::Short { tokens, windows, window, needed });
        }
        Ok(Self { corpus, window, first: 0, count: windows, apart })
    }

    /// All but the last `share` of the windows, and those, at least one.
    ///
    /// # Errors
    ///
    /// [`Error::Short`] if either part would be empty.
    pub fn hold_out(self, share: f64) -> Result<(Self, Self), Error> {
        let held = ((self.count as f64 * share).round() as usize).max(1);
        if held >= self.count {
            let (tokens, windows, window) = (self.corpus.tokens(), self.count, self.window);
            return Err(Error::Short { tokens, windows, window, needed: held + 1 });
        }
        let first = self.first + self.count - held;
        Ok((Self { count: self.count - held, ..self.clone() }, Self { first, count: held, ..self }))
    }

    /// The first `limit` windows.
    #[must_use]
    pub fn take(self, limit: usize) -> Self {
        Self { count: self.count.min(limit), ..self }
    }

    /// Number of windows.
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether windows may have fewer tokens than fit.
    pub const fn uneven(&self) -> bool {
        self.apart.is_some()
    }

    /// Number of tokens of window `index`.
    pub fn length(&self, index: usize) -> usize {
        self.range(index).1
    }

    /// The tokens of window `index`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] and [`Error::Token`].
    pub fn tokens(&self, index: usize) -> Result<Vec<u32>, Error> {
        let (start, length) = self.range(index);
        self.corpus.read(start, length)
    }

    /// Where window `index` begins.
    pub fn place(&self, index: usize) -> Place {
        self.corpus.place(self.range(index).0)
    }

    /// The first token of window `index`, and their number.
    fn range(&self, index: usize) -> (u64, usize) {
        let index = self.first + index;
        match &self.apart {
            None => (index as u64 * self.window as u64, self.window),
            Some(windows) => windows.get(index).copied().unwrap_or_default(),
        }
    }
}

/// The windows of every document by itself. A single token predicts nothing, and is no window.
fn apart(corpus: &Corpus, window: usize) -> Arc<[(u64, usize)]> {
    let starts: Vec<_> = corpus.documents().chain([corpus.tokens()]).collect();
    let mut windows = Vec::new();
    for document in starts.windows(2) {
        let (mut start, end) = (document[0], document[1]);
        while end - start >= 2 {
            let length = (end - start).min(window as u64);
            windows.push((start, length as usize));
            start += length;
        }
    }
    windows.into()
}
