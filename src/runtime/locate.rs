//! Finds ONNX Runtime's shared library.
//!
//! Looked at, in order: the command line, the environment, the project's own `target/runtime`
//! (where `make runtime` unpacks it), an installed Python package, the system's library folders.
//! What the user named must do: a named place that does not is an error, not passed over.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Serialize;

use super::library::{Identity, Rejection, Version, identify};

/// The library's plain name on this system.
pub const LIBRARY_NAME: &str = if cfg!(target_os = "windows") {
    "onnxruntime.dll"
} else if cfg!(target_os = "macos") {
    "libonnxruntime.dylib"
} else {
    "libonnxruntime.so"
};

/// Where the library lies in an unpacked wheel, an unpacked release and an installed package.
const FOLDERS: [&str; 4] = ["", "lib", "capi", "onnxruntime/capi"];

/// Prints where a package lies without importing it, and does not look in the current directory.
const ASK_PYTHON: &str = "import sys, importlib.util as u; sys.path = [p for p in sys.path if p]; \
                          s = u.find_spec('onnxruntime'); \
                          print((s.submodule_search_locations or [''])[0] if s else '')";

/// Which rule led to a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// `--onnxruntime`.
    Flag,
    /// `ORT_DYLIB_PATH`.
    Environment,
    /// `target/runtime`.
    Project,
    /// A Python package.
    Python,
    /// A library folder of the system.
    System,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flag => "--onnxruntime",
            Self::Environment => "ORT_DYLIB_PATH",
            Self::Project => "target/runtime",
            Self::Python => "Python package",
            Self::System => "system library",
        })
    }
}

/// ONNX Runtime, found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Found {
    /// The shared library; absolute.
    pub path: PathBuf,
    /// The rule that led to it.
    pub how: How,
    /// What it states.
    pub version: Version,
    /// What it was built with, such as `CPUExecutionProvider`; whether the machine lets one run is
    /// another question.
    pub providers: Vec<String>,
}

/// A place that was looked at in vain.
#[derive(Debug)]
pub struct Attempt {
    /// The rule that led to it.
    pub how: How,
    /// The place; `None` where the rule names none.
    pub place: Option<PathBuf>,
    /// Why it did not do.
    pub rejection: Rejection,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Some(place) => write!(f, "{} {}: {}", self.how, place.display(), self.rejection),
            None => write!(f, "{}: {}", self.how, self.rejection),
        }
    }
}

/// How a search ended, and every place that was looked at in vain before.
#[derive(Debug)]
pub struct Outcome {
    /// The library, if any place had one that will do.
    pub found: Option<Found>,
    /// In the order they were looked at.
    pub tried: Vec<Attempt>,
}

/// No place has a library that will do.
#[derive(Debug, thiserror::Error)]
pub struct NotFound {
    /// Every place that was looked at.
    pub tried: Vec<Attempt>,
    /// The oldest version that would do.
    pub minimum: Version,
}

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ONNX Runtime {} or later was not found; looked at", self.minimum)?;
        for attempt in &self.tried {
            writeln!(f, "  {attempt}")?;
        }
        write!(f, "To install it: {}", install_command(super::Provider::Cpu))
    }
}

/// What to type to have an ONNX Runtime with `provider`.
pub fn install_command(provider: super::Provider) -> String {
    let package = match provider {
        super::Provider::Cpu => "onnxruntime",
        super::Provider::Cuda => "onnxruntime-gpu",
    };
    format!("pip install {package}=={}", Version::TESTED)
}

/// Where to look.
#[derive(Debug, Clone, Default)]
pub struct Search {
    /// `--onnxruntime`: the library or a directory that holds it.
    pub flag: Option<PathBuf>,
    /// `ORT_DYLIB_PATH`: likewise.
    pub environment: Option<PathBuf>,
    /// Folders whose `target/runtime` may hold the library: those above the program.
    pub roots: Vec<PathBuf>,
    /// Python interpreters to ask.
    pub pythons: Vec<PathBuf>,
    /// Folders of the system.
    pub system: Vec<PathBuf>,
}

impl Search {
    /// The places of this process; `flag` is what the command line names.
    pub fn of_process(flag: Option<&Path>) -> Self {
        let variable = |name| env::var_os(name).filter(|value| !value.is_empty());
        // Never the current directory: what lies there is not of whoever installed the program.
        let program = env::current_exe().unwrap_or_default();
        let roots: Vec<PathBuf> = program.ancestors().skip(1).map(Path::to_owned).collect();
        let mut pythons = Vec::new();
        if let Some(environment) = variable("VIRTUAL_ENV") {
            let folder = if cfg!(windows) { "Scripts" } else { "bin" };
            pythons.push(Path::new(&environment).join(folder).join("python"));
        }
        pythons.push(PathBuf::from("python3"));
        let search_path = variable("LD_LIBRARY_PATH").unwrap_or_default();
        let mut system: Vec<PathBuf> =
            env::split_paths(&search_path).filter(|path| path.is_absolute()).collect();
        let triple = format!("/usr/lib/{}-linux-gnu", env::consts::ARCH);
        let usual = ["/usr/local/lib64", "/usr/local/lib", &triple, "/usr/lib64", "/usr/lib"];
        system.extend(usual.map(PathBuf::from));
        Self {
            flag: flag.map(Path::to_owned),
            environment: variable("ORT_DYLIB_PATH").map(PathBuf::from),
            roots: without_repeats(roots),
            pythons,
            system: without_repeats(system),
        }
    }

    /// Looks, in order, for a library of at least `minimum`.
    pub fn run(&self, minimum: Version) -> Outcome {
        let mut tried = Vec::new();
        let found = self.first(minimum, &mut tried);
        Outcome { found, tried }
    }

    /// As [`Search::run`].
    ///
    /// # Errors
    ///
    /// [`NotFound`], with every place and why it did not do.
    pub fn find(&self, minimum: Version) -> Result<Found, NotFound> {
        let Outcome { found, tried } = self.run(minimum);
        found.ok_or(NotFound { tried, minimum: minimum.max(Version::OLDEST) })
    }

    fn first(&self, minimum: Version, tried: &mut Vec<Attempt>) -> Option<Found> {
        let named = [
            (How::Flag, &self.flag, Rejection::NotGiven),
            (How::Environment, &self.environment, Rejection::NotSet),
        ];
        for (how, place, absent) in named {
            match place {
                Some(place) => return look(how, place, minimum, tried),
                None => tried.push(Attempt { how, place: None, rejection: absent }),
            }
        }
        let mut project = self.roots.iter().map(|root| root.join("target/runtime"));
        if let Some(found) = project.find_map(|p| look(How::Project, &p, minimum, tried)) {
            return Some(found);
        }
        for python in &self.pythons {
            match ask_python(python) {
                Ok(package) => {
                    if let Some(found) = look(How::Python, &package, minimum, tried) {
                        return Some(found);
                    }
                }
                Err(rejection) => {
                    tried.push(Attempt {
                        how: How::Python,
                        place: Some(python.clone()),
                        rejection,
                    });
                }
            }
        }
        self.system.iter().find_map(|folder| look(How::System, folder, minimum, tried))
    }
}

fn without_repeats(paths: Vec<PathBuf>) -> Vec<PathBuf> {
    let mut unique: Vec<PathBuf> = Vec::new();
    for path in paths {
        if !unique.contains(&path) {
            unique.push(path);
        }
    }
    unique
}

/// The library at `place` (a file, or a directory that holds it) if it will do; if not, why not.
fn look(how: How, place: &Path, minimum: Version, tried: &mut Vec<Attempt>) -> Option<Found> {
    let mut path = std::path::absolute(place).unwrap_or_else(|_| place.to_owned());
    let identity = library_at(&path).and_then(|library| {
        path = library;
        identify(&path, minimum)
    });
    match identity {
        Ok(Identity { version, providers }) => Some(Found { path, how, version, providers }),
        Err(rejection) => {
            tried.push(Attempt { how, place: Some(path), rejection });
            None
        }
    }
}

fn library_at(place: &Path) -> Result<PathBuf, Rejection> {
    match place.metadata() {
        Ok(metadata) if metadata.is_file() => return Ok(place.to_owned()),
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(Rejection::NotALibrary),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Rejection::Missing);
        }
        Err(error) => return Err(Rejection::Unreadable(error)),
    }
    FOLDERS
        .iter()
        .find_map(|folder| newest_library(&place.join(folder)))
        .ok_or(Rejection::NoLibrary)
}

/// The library in `folder`: the plain name, or else the one with the highest version in its name.
fn newest_library(folder: &Path) -> Option<PathBuf> {
    let names = folder.read_dir().ok()?.filter_map(|entry| Some(entry.ok()?.file_name()));
    let mut libraries: Vec<(Vec<u32>, OsString)> =
        names.filter_map(|name| Some((version_in(&name)?, name))).collect();
    libraries.sort();
    if libraries.iter().any(|(_, name)| name == LIBRARY_NAME) {
        return Some(folder.join(LIBRARY_NAME));
    }
    libraries.pop().map(|(_, name)| folder.join(name))
}

/// The version in a library's file name; empty for the plain name, `None` for other files.
fn version_in(name: &OsStr) -> Option<Vec<u32>> {
    let name = name.to_str()?;
    if name == LIBRARY_NAME {
        return Some(Vec::new());
    }
    let (stem, suffix) = LIBRARY_NAME.rsplit_once('.')?;
    let inner = match name.strip_prefix(LIBRARY_NAME) {
        Some(rest) => rest.strip_prefix('.')?,
        None => {
            name.strip_prefix(stem)?.strip_prefix('.')?.strip_suffix(suffix)?.strip_suffix('.')?
        }
    };
    inner.split('.').map(|number| number.parse().ok()).collect()
}

/// Where `python`'s package onnxruntime lies.
fn ask_python(python: &Path) -> Result<PathBuf, Rejection> {
    let output = Command::new(python)
        .args(["-c", ASK_PYTHON])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map_err(Rejection::NoPython)?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.trim() {
        "" => Err(Rejection::NoPackage),
        package => Ok(PathBuf::from(package)),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
