//! The artifact: an ONNX graph, its weights, what clients read beside them, and a manifest.
//!
//! [`write()`] makes the directory, whole or not at all; [`open`] reads its manifest back and
//! [`Artifact::verify_hashes`] compares every file with it.

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::{onnx, sources, weights};

pub mod card;
pub mod clients;
mod data;
mod files;
pub mod hash;
mod inputs;
pub mod layout;
pub mod manifest;
pub mod names;
pub mod output;
pub mod staging;
mod write;

pub(crate) use data::{Tracked, Tracker};
pub(crate) use files::Files;
pub use inputs::{check_links, check_output};
pub(crate) use inputs::{inputs, outside_checkpoint, records};
pub use write::{Request, write};

use manifest::{FileRecord, Manifest};

/// How far a long operation is. Answering [`ControlFlow::Break`] ends it with
/// [`Error::Interrupted`] and leaves nothing behind.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// How far a long operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub step: Step,
    /// Bytes done.
    pub done: u64,
    /// Bytes there are.
    pub total: u64,
}

/// The parts of a long operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Weights are written, or checked where they are shared.
    Weights,
    /// Files are compared with their hashes.
    Hashes,
}

/// Why an artifact could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The output path is taken.
    #[error("{}: already exists; --force replaces it", .0.display())]
    Exists(PathBuf),
    /// The output path is taken by something that must not be removed.
    #[error("{}: will not be replaced: {found}; move it away or choose another path", path.display())]
    NotReplaceable {
        /// The output path.
        path: PathBuf,
        /// What would be lost.
        found: String,
    },
    /// The output path ends in `..` or is the root.
    #[error("{}: is not a name for a new directory", .0.display())]
    NoName(PathBuf),
    /// A checkpoint where a graph is needed.
    #[error("{}: holds no graph to run, but a checkpoint (--format safetensors); export it as ONNX", .0.display())]
    NoGraph(PathBuf),
    /// The output directory is the checkpoint, or holds it.
    #[error("{}: holds the checkpoint {}; choose another path", path.display(), checkpoint.display())]
    OnCheckpoint {
        /// The output path.
        path: PathBuf,
        /// The checkpoint's directory.
        checkpoint: PathBuf,
    },
    /// The operating system's word.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What went wrong.
        source: io::Error,
    },
    /// The disk is full, or would be.
    #[error("{}: the disk is full: {needed} bytes are needed, {available} are available", path.display())]
    NoSpace {
        /// The output path.
        path: PathBuf,
        /// Bytes the weights take.
        needed: u64,
        /// Bytes that may be written.
        available: u64,
    },
    /// A thread could not be started, or died.
    #[error("a helper thread failed: {0}")]
    Thread(#[source] io::Error),
    /// A weight could not be evaluated.
    #[error("initializer {name}: {source}")]
    Weight {
        /// The initializer.
        name: String,
        /// Why.
        source: weights::Error,
    },
    /// A weight does not fill its initializer: a bug in the lowering.
    #[error("initializer {name} takes {expected} bytes; its weight gave {found}")]
    WrongSize {
        /// The initializer.
        name: String,
        /// Bytes of its shape.
        expected: u64,
        /// Bytes of the weight.
        found: u64,
    },
    /// The graph could not be serialised.
    #[error(transparent)]
    Proto(#[from] onnx::proto::Error),
    /// Sharing was asked for, and a weight would have to change.
    #[error("initializer {name} cannot be linked: {reason}; use --weights copy")]
    Unlinkable {
        /// The initializer.
        name: String,
        /// Why its tensor cannot be used as it is.
        reason: layout::Unlinkable,
    },
    /// A shared file has the name of another file of the artifact.
    #[error("{}: cannot be linked under its own name, which the artifact needs; use --weights copy", .0.display())]
    NameTaken(PathBuf),
    /// A tensor could not be found.
    #[error(transparent)]
    Source(#[from] sources::Error),
    /// The caller said stop.
    #[error("interrupted; nothing was written")]
    Interrupted,
    /// A JSON file does not read as what it should be.
    #[error("{}: not valid JSON for this tool: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and what was expected.
        source: serde_json::Error,
    },
    /// The directory has no manifest of this tool.
    #[error("{}: is not an artifact: it has no manifest.json of skipgpt-export", .0.display())]
    NotAnArtifact(PathBuf),
    /// Another version of the tool wrote the manifest.
    #[error(
        "{}: has version {found}, written by skipgpt-export {writer}; this build reads version {} (export again, or use that build)",
        path.display(), manifest::VERSION
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The tool's version.
        writer: String,
    },
    /// The manifest lists a file outside the directory.
    #[error("{}: lists {name:?}, which is not a file of the directory", path.display())]
    UnsafeName {
        /// The manifest.
        path: PathBuf,
        /// What it lists.
        name: String,
    },
    /// A file is not what the manifest says.
    #[error(
        "{}: has changed since the export: expected sha256 {expected}, found {found}; export again",
        path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// The manifest's hash.
        expected: String,
        /// The file's hash.
        found: String,
    },
    /// A file is longer or shorter than the manifest says.
    #[error(
        "{}: has changed since the export: expected {expected} bytes, found {found}; export again",
        path.display()
    )]
    Resized {
        /// The file.
        path: PathBuf,
        /// The manifest's size.
        expected: u64,
        /// The file's size.
        found: u64,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), action, source }
    }
}

/// An artifact on disk.
#[derive(Debug, Clone, PartialEq)]
pub struct Artifact {
    /// Where it lies.
    pub directory: PathBuf,
    /// What it says about itself.
    pub manifest: Manifest,
}

/// Reads the artifact at `directory`: its manifest, and that every file has its size.
///
/// # Errors
///
/// [`Error::NotAnArtifact`], [`Error::Version`], [`Error::Json`] and [`Error::UnsafeName`] for the
/// manifest; [`Error::Io`] for a missing file, [`Error::Resized`] for one of another size.
pub fn open(directory: &Path) -> Result<Artifact, Error> {
    let manifest = Manifest::read(directory)?;
    let artifact = Artifact { directory: directory.to_path_buf(), manifest };
    for record in &artifact.manifest.outputs {
        let path = artifact.path(&record.name);
        let found = path.metadata().map_err(|error| Error::io("read", &path, error))?.len();
        if found != record.size {
            return Err(Error::Resized { path, expected: record.size, found });
        }
    }
    Ok(artifact)
}

impl Artifact {
    /// Where a file of the artifact lies.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// What the manifest says about a file.
    pub fn record(&self, name: &str) -> Option<&FileRecord> {
        self.manifest.outputs.iter().find(|record| record.name == name)
    }

    /// Compares every file with its hash.
    ///
    /// # Errors
    ///
    /// [`Error::Changed`] names the first file that differs; [`Error::Interrupted`] if `progress`
    /// says so.
    pub fn verify_hashes(&self, progress: OnProgress<'_>) -> Result<(), Error> {
        let records = &self.manifest.outputs;
        let total = records.iter().map(|record| record.size).sum();
        let mut done = 0;
        for record in records {
            let path = self.path(&record.name);
            let mut go_on = |bytes| {
                done += bytes;
                progress(Progress { step: Step::Hashes, done, total }).is_continue()
            };
            let digest = hash::of_file(&path, &mut go_on)?.ok_or(Error::Interrupted)?;
            if digest.sha256 != record.sha256 {
                let (expected, found) = (record.sha256.clone(), digest.sha256);
                return Err(Error::Changed { path, expected, found });
            }
        }
        Ok(())
    }

    /// The bytes of one file, if they are what the manifest says.
    ///
    /// # Errors
    ///
    /// [`Error::NotAnArtifact`] if the artifact has no such file, [`Error::Changed`] if it is not
    /// the one that was written.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let record = self.record(name).ok_or_else(|| match self.manifest.options.format {
            manifest::Format::Safetensors => Error::NoGraph(self.directory.clone()),
            manifest::Format::Onnx => Error::NotAnArtifact(self.directory.clone()),
        })?;
        let path = self.path(name);
        let bytes = std::fs::read(&path).map_err(|error| Error::io("read", &path, error))?;
        let found = hash::of_bytes(&bytes).sha256;
        if found == record.sha256 {
            return Ok(bytes);
        }
        Err(Error::Changed { path, expected: record.sha256.clone(), found })
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
