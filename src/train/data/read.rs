//! Which files there are, and their documents, piece by piece.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Error;

/// Bytes of plain text that are tokenised at a time, to the end of a line. A token that would reach
/// over such a seam becomes two.
const PIECE: usize = 1 << 20;

/// A file of texts.
#[derive(Debug, Clone)]
pub(super) struct Text {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    /// Which of a document's fields holds the text; of plain text, nothing.
    field: String,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Jsonl,
    #[cfg(feature = "parquet")]
    Parquet,
}

#[cfg(feature = "parquet")]
const PARQUET: Option<Kind> = Some(Kind::Parquet);
#[cfg(not(feature = "parquet"))]
const PARQUET: Option<Kind> = None;

/// A piece of a document.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) text: String,
    /// Where it begins in the file: the text itself, or the line of JSONL; of a table, the row.
    pub(super) offset: u64,
    /// Bytes of the file before it, about.
    pub(super) done: u64,
    /// Whether bytes of the text are bytes of the file.
    pub(super) plain: bool,
    /// Whether the document ends with it.
    pub(super) last: bool,
}

/// The files named and those in the directories named, each directory's in order of their paths.
///
/// `field` is the one that holds the text, where a document has fields.
pub(super) fn collect(paths: &[PathBuf], field: &str) -> Result<Vec<Text>, Error> {
    let mut texts = Vec::new();
    for path in paths {
        let before = texts.len();
        if path.is_dir() {
            walk(path, field, &mut BTreeSet::new(), &mut texts)?;
            if texts.len() == before {
                return Err(Error::NoFiles { path: path.clone() });
            }
        } else {
            texts.push(text(path, field)?);
        }
    }
    Ok(texts)
}

/// Adds the files under `directory`, links followed; a directory that was `seen` is not read again.
fn walk(
    directory: &Path,
    field: &str,
    seen: &mut BTreeSet<PathBuf>,
    texts: &mut Vec<Text>,
) -> Result<(), Error> {
    let failed = |source| Error::Io { path: directory.to_owned(), action: "list", source };
    if !seen.insert(directory.canonicalize().map_err(failed)?) {
        return Ok(());
    }
    let entries = fs::read_dir(directory).map_err(failed)?;
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    paths.sort();
    for path in paths {
        let extension = extension(&path);
        if path.is_dir() {
            walk(&path, field, seen, texts)?;
        } else if matches!(extension.as_str(), "txt" | "md" | "jsonl" | "parquet") {
            texts.push(text(&path, field)?);
        }
    }
    Ok(())
}

fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

fn text(path: &Path, field: &str) -> Result<Text, Error> {
    let kind = match extension(path).as_str() {
        "jsonl" => Kind::Jsonl,
        "parquet" => PARQUET.ok_or_else(|| Error::NotBuilt { path: path.to_owned() })?,
        kind @ ("json" | "gz" | "zst" | "zip" | "arrow") => {
            return Err(Error::Kind { path: path.to_owned(), kind: format!(".{kind}") });
        }
        _ => Kind::Plain,
    };
    let failed = |source| Error::Io { path: path.to_owned(), action: "read", source };
    let size = fs::metadata(path).map_err(failed)?.len();
    Ok(Text { path: path.to_owned(), size, field: field.to_owned(), kind })
}

impl Text {
    /// Which field its text is in, where that is a choice.
    pub(super) fn field(&self) -> Option<&str> {
        (self.kind != Kind::Plain).then_some(&self.field)
    }

    /// Whether places in it are rows and not bytes.
    pub(super) fn has_rows(&self) -> bool {
        !matches!(self.kind, Kind::Plain | Kind::Jsonl)
    }

    /// Gives the documents' pieces, in order.
    pub(super) fn pieces(&self, each: impl FnMut(Piece) -> Result<(), Error>) -> Result<(), Error> {
        match self.kind {
            Kind::Plain | Kind::Jsonl => self.lines(each),
            #[cfg(feature = "parquet")]
            Kind::Parquet => self.rows(each),
        }
    }

    #[cfg(feature = "parquet")]
    fn rows(&self, mut each: impl FnMut(Piece) -> Result<(), Error>) -> Result<(), Error> {
        let mut empty = true;
        super::parquet::rows(&self.path, &self.field, |row| {
            if row.text.is_empty() {
                return Ok(());
            }
            empty = false;
            let done = (self.size as f64 * row.number as f64 / row.rows.max(1) as f64) as u64;
            each(Piece { text: row.text, offset: row.number, done, plain: false, last: true })
        })?;
        if empty { Err(Error::Empty { path: self.path.clone() }) } else { Ok(()) }
    }

    fn lines(&self, mut each: impl FnMut(Piece) -> Result<(), Error>) -> Result<(), Error> {
        let failed = |source| Error::Io { path: self.path.clone(), action: "read", source };
        let mut lines = BufReader::with_capacity(1 << 18, File::open(&self.path).map_err(failed)?);
        let (mut offset, mut number, mut bytes) = (0, 0, Vec::new());
        let mut pending: Option<Piece> = None;
        loop {
            let read = lines.read_until(b'\n', &mut bytes).map_err(failed)?;
            number += 1;
            if read > 0 && self.kind == Kind::Plain && bytes.len() < PIECE {
                continue;
            }
            let length = bytes.len() as u64;
            let piece = self.piece(std::mem::take(&mut bytes), offset, number)?;
            offset += length;
            if let Some(piece) = piece
                && let Some(before) = pending.replace(piece)
            {
                each(before)?;
            }
            if read == 0 {
                break;
            }
        }
        match pending {
            Some(piece) => each(Piece { last: true, ..piece }),
            None => Err(Error::Empty { path: self.path.clone() }),
        }
    }

    /// The text in `bytes`, if there is any.
    fn piece(&self, bytes: Vec<u8>, offset: u64, line: u64) -> Result<Option<Piece>, Error> {
        let text = String::from_utf8(bytes).map_err(|error| Error::Utf8 {
            path: self.path.clone(),
            offset: offset + error.utf8_error().valid_up_to() as u64,
        })?;
        if self.kind == Kind::Plain {
            let piece = Piece { text, offset, done: offset, plain: true, last: false };
            return Ok(Some(piece).filter(|piece| !piece.text.is_empty()));
        }
        if text.trim().is_empty() {
            return Ok(None);
        }
        let field = &self.field;
        let wrong = |found: String| Error::Line {
            path: self.path.clone(),
            line,
            found,
            field: field.clone(),
        };
        let value: Value =
            serde_json::from_str(&text).map_err(|error| wrong(format!("not JSON ({error})")))?;
        match value.get(field) {
            Some(Value::String(text)) => {
                let text = text.clone();
                let piece = Piece { text, offset, done: offset, plain: false, last: true };
                Ok(Some(piece).filter(|piece| !piece.text.is_empty()))
            }
            Some(_) => Err(wrong(format!("\"{field}\" is not a string"))),
            None => Err(wrong(format!("there is no \"{field}\""))),
        }
    }
}
