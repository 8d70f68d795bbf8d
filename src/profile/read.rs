//! Reads a profile, and refuses what no measurement could have written.

use std::path::{Path, PathBuf};
use std::{fs, io};

use super::{Profile, VERSION};

/// Largest file that is read, in bytes: a thousand layers with every position measured fit.
const LARGEST: u64 = 16 << 20;

/// Why a file is not a profile.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system's word.
    #[error("{}: cannot read the profile: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// Too large to be a profile.
    #[error("{}: {size} bytes; a profile has at most {LARGEST}", path.display())]
    Large {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Not the JSON of a profile.
    #[error("{}: not a profile: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Another version of the file.
    #[error("{}: profile version {found}; this tool reads version {VERSION}: measure it again", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// A number no measurement gives.
    #[error("{}: {field} is {found}; {expected}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// Which, such as `modules[3].keep`.
        field: String,
        /// What it is.
        found: String,
        /// What it must be.
        expected: String,
    },
}

/// Just the version, so that a file of another one is refused as such.
#[derive(serde::Deserialize)]
struct Versioned {
    version: u64,
}

/// The profile in `path`.
///
/// # Errors
///
/// Every variant of [`Error`].
pub fn read(path: &Path) -> Result<Profile, Error> {
    let unreadable = |source| Error::Read { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(unreadable)?.len();
    if size > LARGEST {
        return Err(Error::Large { path: path.to_owned(), size });
    }
    parse(path, &fs::read(path).map_err(unreadable)?)
}

/// The profile in `bytes`; `path` is for messages.
fn parse(path: &Path, bytes: &[u8]) -> Result<Profile, Error> {
    let json = |source| Error::Json { path: path.to_owned(), source };
    let Versioned { version } = serde_json::from_slice(bytes).map_err(json)?;
    if version != u64::from(VERSION) {
        return Err(Error::Version { path: path.to_owned(), found: version });
    }
    let profile: Profile = serde_json::from_slice(bytes).map_err(json)?;
    match plausible(&profile) {
        Ok(()) => Ok(profile),
        Err(Implausible { field, found, expected }) => {
            Err(Error::Field { path: path.to_owned(), field, found, expected })
        }
    }
}

/// What is wrong with a profile's numbers.
struct Implausible {
    field: String,
    found: String,
    expected: String,
}

fn wrong(field: String, found: &impl ToString, expected: &str) -> Implausible {
    Implausible { field, found: found.to_string(), expected: expected.to_owned() }
}

fn plausible(profile: &Profile) -> Result<(), Implausible> {
    const SHARE: &str = "a share is 0 to 1";
    let share = |value: f64| (0.0..=1.0).contains(&value);
    if profile.window == 0 {
        return Err(wrong("window".to_owned(), &0, "a window has at least 1 token"));
    }
    let mut next = 0;
    for (i, range) in profile.positions.iter().enumerate() {
        if range.from != next || range.to <= range.from {
            let found = format!("{}..{}", range.from, range.to);
            return Err(wrong(
                format!("positions[{i}]"),
                &found,
                "ranges follow each other from 0",
            ));
        }
        next = range.to;
    }
    let skipped = profile.skipped;
    let all = [("attention", skipped.attention), ("mlp", skipped.mlp), ("all", skipped.all)];
    for (kind, value) in all {
        if let Some(value) = value.filter(|value| !share(*value)) {
            return Err(wrong(format!("skipped.{kind}"), &value, SHARE));
        }
    }
    for (i, module) in profile.modules.iter().enumerate() {
        let id = module.module;
        if id.layer >= profile.model.num_hidden_layers {
            let expected = format!("the model has {} layers", profile.model.num_hidden_layers);
            return Err(wrong(format!("modules[{i}].module"), &id, &expected));
        }
        if i > 0 && profile.modules[i - 1].module >= id {
            let expected = "modules stand in order, each once";
            return Err(wrong(format!("modules[{i}].module"), &id, expected));
        }
        if !share(module.keep) {
            return Err(wrong(format!("modules[{i}].keep"), &module.keep, SHARE));
        }
        if let Some(j) = module.by_position.iter().position(|rate| !share(*rate)) {
            return Err(wrong(
                format!("modules[{i}].by_position[{j}]"),
                &module.by_position[j],
                SHARE,
            ));
        }
        if module.by_position.len() != profile.positions.len() {
            let expected = format!("there are {} ranges of positions", profile.positions.len());
            let found = format!("{} rates", module.by_position.len());
            return Err(wrong(format!("modules[{i}].by_position"), &found, &expected));
        }
    }
    Ok(())
}

/// A module's identity as text: `layers.3.mlp`.
pub(super) mod id {
    use serde::{Deserialize, Deserializer, Serializer, de};
    use skipgpt_passes::ir::ModuleId;

    /// As it is displayed.
    pub(crate) fn serialize<S: Serializer>(id: &ModuleId, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(id)
    }

    /// The reverse.
    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<ModuleId, D::Error> {
        let text = String::deserialize(from)?;
        ModuleId::parse(&text).ok_or_else(|| {
            de::Error::invalid_value(de::Unexpected::Str(&text), &"a module such as layers.3.mlp")
        })
    }
}

#[cfg(test)]
mod tests;
