//! The directory that an import makes: what may stand there, and what must stay.

use std::fs::{self, File};
use std::path::Path;

use super::Options;
use crate::artifact::Error;
use crate::artifact::staging::{Replaceable, Staging};

/// Everything an import may write.
const FILES: &[&str] = &[
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

/// Begins the directory, of `bytes` bytes of tensors.
pub(super) fn begin(options: &Options, bytes: u64) -> Result<Staging, Error> {
    let place = &options.output;
    if let Some(parent) = place.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(|error| Error::io("create", parent, error))?;
    }
    for read in [Some(&options.input), options.config.as_ref()].into_iter().flatten() {
        keeps(place, read)?;
    }
    let replace: Option<Replaceable> = options.force.then_some(replaceable);
    let mut staging = Staging::begin_with(place, replace, |path| File::create_new(path))?;
    staging.require(bytes)?;
    Ok(staging)
}

/// That the file `read` is not lost with what stands at `place`.
fn keeps(place: &Path, read: &Path) -> Result<(), Error> {
    let (Ok(directory), Ok(file)) = (place.canonicalize(), read.canonicalize()) else {
        return Ok(());
    };
    if file.starts_with(directory) {
        let found = format!("it holds {}, which is read", read.display());
        return Err(Error::NotReplaceable { path: place.to_owned(), found });
    }
    Ok(())
}

/// Whether a directory holds nothing but files of a checkpoint, as an import writes them.
fn replaceable(place: &Path) -> Result<(), Error> {
    let refuse = |found: String| Err(Error::NotReplaceable { path: place.to_owned(), found });
    if !place.is_dir() {
        return refuse("it is not a directory".to_owned());
    }
    let failed = |error| Error::io("list", place, error);
    for entry in fs::read_dir(place).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if !name.to_str().is_some_and(|name| FILES.contains(&name)) {
            return refuse(format!("it holds {}, which no import writes", name.display()));
        }
    }
    Ok(())
}
