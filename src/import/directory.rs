//! A directory that appears whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Everything an import may write.
pub const FILES: &[&str] = &[
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "router.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];

/// Why the directory could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is something already.
    #[error("{} exists; name another directory or pass --force to replace it", path.display())]
    Exists {
        /// The output path.
        path: PathBuf,
    },
    /// What is there is no checkpoint directory, and might be dear to someone.
    #[error(
        "{} holds {found}, which no import writes: it is not replaced, even with --force; \
         name another directory", path.display()
    )]
    NotReplaceable {
        /// The output path.
        path: PathBuf,
        /// The first thing in it that is no file of a checkpoint.
        found: String,
    },
    /// The path has no last component.
    #[error("{} does not name a directory that could be made", path.display())]
    NoName {
        /// The output path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// A directory being filled beside its place; dropped before [`Staged::finish`], it is removed.
#[derive(Debug)]
pub struct Staged {
    place: PathBuf,
    temporary: PathBuf,
    done: bool,
}

impl Staged {
    /// Begins a directory that will stand at `place`.
    pub fn begin(place: &Path, force: bool) -> Result<Self, Error> {
        if fs::symlink_metadata(place).is_ok() {
            if !force {
                return Err(Error::Exists { path: place.to_owned() });
            }
            replaceable(place)?;
        }
        let name = place.file_name().ok_or_else(|| Error::NoName { path: place.to_owned() })?;
        if let Some(parent) = place.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            fs::create_dir_all(parent).map_err(io_error("create", parent))?;
        }
        let temporary = place.with_file_name(beside(name, "partial"));
        fs::create_dir(&temporary).map_err(io_error("create", &temporary))?;
        Ok(Self { place: place.to_owned(), temporary, done: false })
    }

    /// Where it is being filled.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// A new file in it, at the relative path `name`.
    pub fn create(&self, name: &str) -> Result<BufWriter<File>, Error> {
        let path = self.temporary.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io_error("create", parent))?;
        }
        let file = File::create_new(&path).map_err(io_error("create", &path))?;
        Ok(BufWriter::with_capacity(1 << 20, file))
    }

    /// Ends a file made by [`Staged::create`]: all of it is on the disk afterwards.
    pub fn close(&self, name: &str, file: BufWriter<File>) -> Result<(), Error> {
        let sync = |file: BufWriter<File>| file.into_inner()?.sync_all();
        sync(file).map_err(io_error("write", &self.temporary.join(name)))
    }

    /// A whole small file at the relative path `name`.
    pub fn write(&self, name: &str, contents: &[u8]) -> Result<(), Error> {
        let mut file = self.create(name)?;
        file.write_all(contents).map_err(io_error("write", &self.temporary.join(name)))?;
        self.close(name, file)
    }

    /// Puts the directory in its place; what stood there is moved aside first and removed after.
    pub fn finish(mut self) -> Result<(), Error> {
        sync_directory(&self.temporary)?;
        let old = self
            .place
            .with_file_name(beside(self.place.file_name().unwrap_or_default(), "replaced"));
        let replaces = fs::symlink_metadata(&self.place).is_ok();
        if replaces {
            replaceable(&self.place)?;
            fs::rename(&self.place, &old).map_err(io_error("move", &self.place))?;
        }
        if let Err(source) = fs::rename(&self.temporary, &self.place) {
            if replaces {
                // The old directory goes back; the error to report is the first one.
                fs::rename(&old, &self.place).map_err(io_error("move", &old))?;
            }
            return Err(io_error("move", &self.temporary)(source));
        }
        self.done = true;
        if let Some(parent) = self.place.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_directory(parent)?;
        }
        if replaces {
            fs::remove_dir_all(&old).map_err(io_error("remove", &old))?;
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.done {
            // Nothing is left to tell about it: the caller already has an error.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Whether a directory holds nothing but files of a checkpoint, as an import writes them.
fn replaceable(place: &Path) -> Result<(), Error> {
    let refuse = |found: String| Err(Error::NotReplaceable { path: place.to_owned(), found });
    let kind = fs::symlink_metadata(place).map_err(io_error("look at", place))?.file_type();
    if !kind.is_dir() {
        return refuse("something that is not a directory".into());
    }
    for entry in fs::read_dir(place).map_err(io_error("list", place))? {
        let name = entry.map_err(io_error("list", place))?.file_name();
        if !name.to_str().is_some_and(|name| FILES.contains(&name)) {
            return refuse(format!("{}", name.display()));
        }
    }
    Ok(())
}

/// A hidden name beside `name` that no other process uses.
fn beside(name: &std::ffi::OsStr, what: &str) -> OsString {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{what}-{}", std::process::id()));
    hidden
}

/// Makes the entries of a directory durable, where the system has such a thing.
fn sync_directory(path: &Path) -> Result<(), Error> {
    #[cfg(unix)]
    File::open(path).and_then(|directory| directory.sync_all()).map_err(io_error("sync", path))?;
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}
