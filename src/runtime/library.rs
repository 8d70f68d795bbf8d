//! What a shared library says of itself: whether it is ONNX Runtime, its version, its providers.
//!
//! `ort` panics on a library without the entry point it wants, so a library is asked here first
//! and handed to `ort` only when it answered.

use std::ffi::{CStr, c_char};
use std::fmt;
use std::io;
use std::path::Path;
use std::ptr;
use std::str::FromStr;

use ort::sys::{ORT_API_VERSION, OrtApiBase};
use serde::{Serialize, Serializer};

/// A version of ONNX Runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// 1 in every release so far.
    pub major: u32,
    /// The number of the release, and of its C interface.
    pub minor: u32,
    /// The number of the patch release.
    pub patch: u32,
}

impl Version {
    /// The oldest release on which artifacts run.
    pub const OLDEST: Self = Self::new(1, 22, 0);
    /// The release the tool is tested with.
    pub const TESTED: Self = Self::new(1, 31, 1);

    /// `major.minor.patch`.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A version that is not written `1.31.1`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a version such as 1.31.1")]
pub struct BadVersion(String);

impl FromStr for Version {
    type Err = BadVersion;

    /// Takes `1.31`, `1.31.1` and what development builds append, as in `1.32.0-dev`.
    fn from_str(text: &str) -> Result<Self, BadVersion> {
        let bad = || BadVersion(text.to_owned());
        let release = text.split(['-', '+']).next().unwrap_or_default();
        let mut numbers = release.split('.').map(str::parse::<u32>);
        let mut next = || numbers.next().transpose().map_err(|_| bad());
        let (major, minor) = (next()?.ok_or_else(bad)?, next()?.ok_or_else(bad)?);
        Ok(Self::new(major, minor, next()?.unwrap_or(0)))
    }
}

/// Why a place gave no ONNX Runtime.
#[derive(Debug, thiserror::Error)]
pub enum Rejection {
    /// The flag was not used.
    #[error("not given")]
    NotGiven,
    /// The environment variable is empty or absent.
    #[error("not set")]
    NotSet,
    /// Nothing lies there.
    #[error("there is no such file or directory")]
    Missing,
    /// The operating system refuses to read it.
    #[error("cannot be read: {0}")]
    Unreadable(#[source] io::Error),
    /// A directory without the library.
    #[error("the directory holds no {name}", name = super::locate::LIBRARY_NAME)]
    NoLibrary,
    /// Something else than a shared library.
    #[error("it is not a shared library")]
    NotALibrary,
    /// For another processor.
    #[error("it is built for {found}, this process is {this}", this = std::env::consts::ARCH)]
    Architecture {
        /// What it is built for.
        found: String,
    },
    /// The file ends early.
    #[error("the file is truncated: {size} bytes of at least {needed}")]
    Truncated {
        /// Its size in bytes.
        size: u64,
        /// The size its headers call for, in bytes.
        needed: u64,
    },
    /// The dynamic loader refuses it.
    #[error("it cannot be loaded: {0}")]
    Loader(#[source] libloading::Error),
    /// A library of something else.
    #[error("it is not ONNX Runtime: it does not export OrtGetApiBase")]
    NotOnnxRuntime,
    /// A broken or stripped build.
    #[error("it exports OrtGetApiBase, which gives no {missing}")]
    Broken {
        /// What it does not give.
        missing: &'static str,
    },
    /// It states a version that cannot be read.
    #[error("it is ONNX Runtime of an unknown version: {0}")]
    Version(#[source] BadVersion),
    /// It is older than what is to be run needs.
    #[error("it is ONNX Runtime {found}; {minimum} or later is needed")]
    TooOld {
        /// Its version.
        found: Version,
        /// The oldest that will do.
        minimum: Version,
    },
    /// The Python interpreter does not run.
    #[error("it cannot be run: {0}")]
    NoPython(#[source] io::Error),
    /// The Python interpreter has no package of this name.
    #[error("it has no package onnxruntime")]
    NoPackage,
}

/// What a library says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) version: Version,
    pub(super) providers: Vec<String>,
}

/// Loads the library at `path` (absolute) and asks it.
pub(super) fn identify(path: &Path, minimum: Version) -> Result<Identity, Rejection> {
    #[cfg(target_os = "linux")]
    super::elf::check(path)?;
    // SAFETY: loading runs the library's initialisers. The file is one the user named or installed
    // as ONNX Runtime, and its headers were found whole.
    let library = unsafe { libloading::Library::new(path) }.map_err(Rejection::Loader)?;
    // SAFETY: this is the signature of the one symbol of this name in ONNX Runtime's C interface.
    let entry = unsafe {
        library.get::<unsafe extern "system" fn() -> *const OrtApiBase>(b"OrtGetApiBase\0")
    };
    let entry = *entry.map_err(|_| Rejection::NotOnnxRuntime)?;
    // ONNX Runtime keeps threads and thread-local state, so once known it stays loaded.
    std::mem::forget(library);
    // SAFETY: the function takes nothing and gives a pointer to a static, or null.
    let base = unsafe { entry().as_ref() }.ok_or(Rejection::Broken { missing: "interface" })?;
    let version = version(base)?;
    let minimum = minimum.max(Version::OLDEST);
    if version < minimum {
        return Err(Rejection::TooOld { found: version, minimum });
    }
    Ok(Identity { version, providers: providers(base)? })
}

fn version(base: &OrtApiBase) -> Result<Version, Rejection> {
    // SAFETY: gives a static, null-terminated string, or null.
    let text = unsafe { (base.GetVersionString)() };
    if text.is_null() {
        return Err(Rejection::Broken { missing: "version" });
    }
    // SAFETY: as above.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    text.parse().map_err(Rejection::Version)
}

fn providers(base: &OrtApiBase) -> Result<Vec<String>, Rejection> {
    const MISSING: Rejection = Rejection::Broken { missing: "provider list" };
    // SAFETY: gives a pointer to a static table of functions, or null.
    let api = unsafe { (base.GetApi)(ORT_API_VERSION).as_ref() };
    let api = api.ok_or(Rejection::Broken { missing: "C interface of this version" })?;
    let (mut names, mut count) = (ptr::null_mut::<*mut c_char>(), 0);
    // SAFETY: both pointers are to locals; on success the list is ours until it is released.
    let status = unsafe { (api.GetAvailableProviders)(&raw mut names, &raw mut count) };
    if !status.0.is_null() {
        // SAFETY: a status that is not null is ours to release.
        unsafe { (api.ReleaseStatus)(status.0) };
        return Err(MISSING);
    }
    let mut providers = Vec::new();
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the list has `count` null-terminated strings.
        let name = unsafe { CStr::from_ptr(*names.add(index)) };
        providers.push(name.to_string_lossy().into_owned());
    }
    // SAFETY: the list came from `GetAvailableProviders` and is used no more.
    let status = unsafe { (api.ReleaseAvailableProviders)(names, count) };
    if status.0.is_null() { Ok(providers) } else { Err(MISSING) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        let version = |text: &str| text.parse::<Version>().unwrap();
        assert_eq!(version("1.31.1"), Version::TESTED);
        assert_eq!(version("1.32.0-dev+cpu"), Version::new(1, 32, 0));
        assert_eq!(version("1.9"), Version::new(1, 9, 0));
        assert!(version("1.9.1") < version("1.31.0"));
        for text in ["", "1", "one.two", "1.x.0"] {
            assert_eq!(text.parse::<Version>(), Err(BadVersion(text.to_owned())), "{text}");
        }
    }
}
