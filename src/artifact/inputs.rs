//! What an artifact is made of, and where it may stand.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::files::record;
use super::hash::Digest;
use super::layout::Layout;
use super::manifest::{self, FileRecord};
use super::staging::{self, Replaceable};
use super::{Error, names};
use crate::checkpoint::Checkpoint;
use crate::onnx::graph::Graph;

/// Every file to hash, and those among them to copy.
pub(crate) fn inputs(checkpoint: &Checkpoint) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let names = [names::CONFIG, names::GENERATION_CONFIG].into_iter();
    let copied: Vec<_> = names
        .chain(names::COPIED.iter().copied())
        .map(|name| checkpoint.directory.join(name))
        .filter(|path| path.is_file())
        .collect();
    let mut seen = BTreeSet::new();
    let all = checkpoint.files.iter().chain(&copied);
    let inputs = all.filter(|path| seen.insert(*path)).cloned().collect();
    (inputs, copied)
}

/// Names for the manifest: relative to the checkpoint, or, outside it, the shortest end of the
/// path that no other input has.
pub(super) fn relative_names(paths: &[PathBuf], directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = Vec::with_capacity(paths.len());
    for path in paths {
        if let Ok(inside) = path.strip_prefix(directory) {
            names.push(inside.to_string_lossy().into_owned());
            continue;
        }
        let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
        let ends = (0..parts.len()).rev().map(|start| parts[start..].join("/"));
        let free = ends.into_iter().find(|end| !names.contains(end));
        names.push(free.unwrap_or_else(|| parts.join("/")));
    }
    names
}

/// What the manifest says of the inputs.
pub(crate) fn records(
    paths: &[PathBuf],
    directory: &Path,
    digests: Vec<Digest>,
) -> Vec<FileRecord> {
    let names = relative_names(paths, directory).into_iter();
    names.zip(digests).map(|(name, digest)| record(name, digest)).collect()
}

/// Whether the directory `output` could be written from `checkpoint`, as far as that can be told without
/// writing.
///
/// # Errors
///
/// [`Error::OnCheckpoint`], [`Error::Exists`] and [`Error::NotReplaceable`].
pub fn check_output(output: &Path, force: bool, checkpoint: &Checkpoint) -> Result<(), Error> {
    outside_checkpoint(output, &checkpoint.directory)?;
    let replace: Option<Replaceable> = force.then_some(manifest::replaceable);
    staging::free(output, replace).map(drop)
}

/// Whether the weights of `graph` can be linked.
///
/// # Errors
///
/// [`Error::Unlinkable`] names the first that cannot.
pub fn check_links(graph: &Graph, checkpoint: &Checkpoint) -> Result<(), Error> {
    Layout::link(&graph.hoisted(), &checkpoint.sources).map(drop)
}

/// A checkpoint inside the directory that is to be replaced would be removed with it.
pub(crate) fn outside_checkpoint(output: &Path, checkpoint: &Path) -> Result<(), Error> {
    let Ok(directory) = checkpoint.canonicalize() else { return Ok(()) };
    let Ok(output_directory) = output.canonicalize() else { return Ok(()) };
    if directory.starts_with(&output_directory) {
        return Err(Error::OnCheckpoint {
            path: output.to_path_buf(),
            checkpoint: checkpoint.to_path_buf(),
        });
    }
    Ok(())
}
