//! The tokens of one file, in a cache.
//!
//! ```text
//! magic (8) | key (64, hexadecimal) | tokens (8) | places (8) | ids, 4 bytes each | places, 16 bytes each
//! ```
//!
//! All numbers are little-endian. A place says at which byte of the text (or row of the table) a token begins, for every
//! [`EVERY`]th token and the first of every document; that of a document's first has [`DOCUMENT`] set. Like every other input the file is read with
//! positioned reads, a window at a time.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::read::Text;
use super::{Error, Place, Tokenisation};
use crate::artifact::hash;

const MAGIC: &[u8; 8] = b"SKIPTOK2";
const KEY: usize = 64;
const HEADER: usize = 8 + KEY + 16;
/// The bit of a token's number that says that a document begins with it.
const DOCUMENT: u64 = 1 << 63;
/// Tokens from one recorded place to the next.
const EVERY: u64 = 128;

/// One file's tokens.
#[derive(Debug)]
pub(super) struct Tokens {
    text: PathBuf,
    /// Whether places are rows of the text.
    rows: bool,
    path: PathBuf,
    file: File,
    key: String,
    count: u64,
    /// (token, byte), in order.
    places: Vec<(u64, u64)>,
    /// Which of them documents begin at.
    documents: Vec<usize>,
}

impl Tokens {
    /// Opens the cache of `text`, after making it where there is none yet.
    pub(super) fn open(
        text: &Text,
        how: Tokenisation<'_>,
        tokenizer: &str,
        advance: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Self, Error> {
        let Some(content) = hash::of_file(&text.path, &mut |_| advance(0).is_continue())? else {
            return Err(Error::Interrupted);
        };
        // Everything that the tokens depend on; the end is not in `tokenizer.json`.
        let end = end(how).map_or("none".to_owned(), |id| id.to_string());
        let field = text.field().map_or("plain".to_owned(), |name| format!("field {name}"));
        let identity = format!("{} {tokenizer} {end} {field}", content.sha256);
        let key = hash::of_bytes(identity.as_bytes()).sha256;
        let path = how.cache.join(format!("{}.tokens", &key[..16]));
        if let Some(tokens) = Self::read_back(text, &path, &key)? {
            return Ok(tokens);
        }
        let failed = |source| Error::Io { path: path.clone(), action: "write", source };
        fs::create_dir_all(how.cache).map_err(failed)?;
        let partial = how.cache.join(format!(".{}.partial-{}", &key[..16], std::process::id()));
        let written = write(&partial, text, how, &key, advance)
            .and_then(|()| fs::rename(&partial, &path).map_err(failed));
        if let Err(error) = written {
            // Nothing useful can be done if this fails too.
            let _ = fs::remove_file(&partial);
            return Err(error);
        }
        Self::read_back(text, &path, &key)?
            .ok_or_else(|| failed(std::io::Error::other("what was written does not read back")))
    }

    /// The cache at `path`, if it is whole and of this key.
    fn read_back(text: &Text, path: &Path, key: &str) -> Result<Option<Self>, Error> {
        let failed = |source| Error::Io { path: path.to_owned(), action: "read", source };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut header = [0; HEADER];
        let size = file.metadata().map_err(failed)?.len();
        if size < HEADER as u64 {
            return Ok(None);
        }
        file.read_exact_at(&mut header, 0).map_err(failed)?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let (count, places) = (number(8 + KEY), number(16 + KEY));
        let expected = count
            .checked_mul(4)
            .and_then(|ids| ids.checked_add(places.checked_mul(16)?))
            .and_then(|body| body.checked_add(HEADER as u64));
        let known = &header[..8] == MAGIC && &header[8..8 + KEY] == key.as_bytes();
        if !known || expected != Some(size) || places == 0 {
            return Ok(None);
        }
        let mut bytes = vec![0; places as usize * 16];
        file.read_exact_at(&mut bytes, HEADER as u64 + count * 4).map_err(failed)?;
        let places: Vec<_> = bytes
            .as_chunks::<16>()
            .0
            .iter()
            .map(|pair| {
                let both = u128::from_le_bytes(*pair);
                (both as u64, (both >> 64) as u64)
            })
            .collect();
        let begins = |(token, _): &(u64, u64)| token & DOCUMENT != 0;
        let documents = (0..places.len()).filter(|at| begins(&places[*at])).collect();
        let places = places.into_iter().map(|(token, byte)| (token & !DOCUMENT, byte)).collect();
        Ok(Some(Self {
            text: text.path.clone(),
            rows: text.has_rows(),
            path: path.to_owned(),
            file,
            key: key.to_owned(),
            count,
            places,
            documents,
        }))
    }

    pub(super) const fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    /// Appends the `count` tokens from `start` on.
    pub(super) fn read(
        &self,
        start: u64,
        count: usize,
        vocab: usize,
        out: &mut Vec<u32>,
    ) -> Result<(), Error> {
        let mut bytes = vec![0; count * 4];
        let failed = |source| Error::Io { path: self.path.clone(), action: "read", source };
        self.file.read_exact_at(&mut bytes, HEADER as u64 + start * 4).map_err(failed)?;
        for (token, id) in (start..).zip(bytes.as_chunks::<4>().0) {
            let id = u32::from_le_bytes(*id);
            if id as usize >= vocab {
                return Err(Error::Token { path: self.path.clone(), token, id, vocab });
            }
            out.push(id);
        }
        Ok(())
    }

    /// The first token of every document, in order.
    pub(super) fn documents(&self) -> impl Iterator<Item = u64> {
        self.documents.iter().map(|at| self.places[*at].0)
    }

    /// Where token `token` stands in the text.
    pub(super) fn place(&self, token: u64) -> Place {
        let at = self.places.partition_point(|(first, _)| *first <= token).saturating_sub(1);
        let offset = self.places.get(at).map_or(0, |(_, byte)| *byte);
        Place { path: self.text.clone(), offset, rows: self.rows }
    }
}

/// The token that ends a document, if there is one.
fn end(how: Tokenisation<'_>) -> Option<u32> {
    how.tokenizer.eos().first().and_then(|id| u32::try_from(*id).ok())
}

/// Tokenises `text` into `path`.
fn write(
    path: &Path,
    text: &Text,
    how: Tokenisation<'_>,
    key: &str,
    advance: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), Error> {
    let failed = |source| Error::Io { path: path.to_owned(), action: "write", source };
    let end = end(how);
    let mut output = BufWriter::new(File::create(path).map_err(failed)?);
    output.write_all(&[0; HEADER]).map_err(failed)?;
    let (mut count, mut places): (u64, Vec<(u64, u64)>) = (0, Vec::new());
    let mut begins = true;
    text.pieces(|piece| {
        let tokens = how
            .tokenizer
            .encode_with_places(&piece.text)
            .map_err(|source| Error::Text { path: text.path.clone(), source })?;
        for (id, byte) in tokens {
            if begins || count.is_multiple_of(EVERY) {
                let byte = if piece.plain { byte as u64 } else { 0 };
                let mark = if begins { DOCUMENT } else { 0 };
                places.push((count | mark, piece.offset + byte));
            }
            begins = false;
            output.write_all(&id.to_le_bytes()).map_err(failed)?;
            count += 1;
        }
        if piece.last {
            if let Some(end) = end {
                output.write_all(&end.to_le_bytes()).map_err(failed)?;
                count += 1;
            }
            begins = true;
        }
        match advance(piece.done) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    })?;
    if places.is_empty() {
        return Err(Error::Empty { path: text.path.clone() });
    }
    for (token, byte) in &places {
        output.write_all(&token.to_le_bytes()).map_err(failed)?;
        output.write_all(&byte.to_le_bytes()).map_err(failed)?;
    }
    output.seek(SeekFrom::Start(0)).map_err(failed)?;
    output.write_all(MAGIC).map_err(failed)?;
    output.write_all(key.as_bytes()).map_err(failed)?;
    output.write_all(&count.to_le_bytes()).map_err(failed)?;
    output.write_all(&(places.len() as u64).to_le_bytes()).map_err(failed)?;
    let file = output.into_inner().map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)
}
