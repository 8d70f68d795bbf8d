//! What ONNX Runtime's CUDA provider needs of the machine, and what of it is there.
//!
//! The provider is a library beside ONNX Runtime's own, which names NVIDIA's libraries as needed and
//! opens others when an operator asks for them. ONNX Runtime reports the first that is missing; here
//! each is looked for, with what to install.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::locate::install_command;
use super::session::Provider;

/// The provider's own library.
const PROVIDER: &str = "libonnxruntime_providers_cuda.so";

/// NVIDIA's libraries: beginnings of their names, and what has them.
const SOURCES: [(&str, &str); 8] = [
    ("libcuda.so", "the NVIDIA driver, 580 or later for CUDA 13"),
    ("libcudart.so", "pip install nvidia-cuda-runtime"),
    ("libcublas.so", "pip install nvidia-cublas"),
    ("libcublasLt.so", "pip install nvidia-cublas"),
    ("libcurand.so", "pip install nvidia-curand"),
    ("libcufft.so", "pip install nvidia-cufft"),
    ("libnvrtc.so", "pip install nvidia-cuda-nvrtc"),
    ("libcudnn.so", "pip install nvidia-cudnn-cu13"),
];

/// What the tested version's provider names as needed.
const NEEDED: [&str; 5] =
    ["libcuda.so.1", "libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10"];

/// What it opens when an operator asks for it.
const LATER: [&str; 2] = ["libcudnn.so.9", "libcufft.so.12"];

/// A library the provider needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Library {
    /// Its name, as the loader knows it.
    pub name: String,
    /// Whether the loader finds it.
    pub found: bool,
    /// Whether the provider starts without it, and only some operators do not.
    pub optional: bool,
    /// What has it.
    pub source: String,
}

/// Looks for what the CUDA provider beside the ONNX Runtime in `library` needs.
pub fn libraries(library: &Path) -> Vec<Library> {
    let provider = library.with_file_name(PROVIDER);
    let mut found = vec![Library {
        name: PROVIDER.to_owned(),
        found: provider.is_file(),
        optional: false,
        source: install_command(Provider::Cuda),
    }];
    let needed = needed(&provider);
    let needed = needed.iter().map(String::as_str).filter(|name| source(name).is_some());
    let mut needed: Vec<&str> = needed.collect();
    if needed.is_empty() {
        needed.extend(NEEDED);
    }
    let later = LATER.into_iter().filter(|name| !needed.contains(name)).map(|name| (name, true));
    let all = needed.iter().map(|name| (*name, false)).chain(later);
    found.extend(all.map(|(name, optional)| Library {
        name: name.to_owned(),
        found: opens(name),
        optional,
        source: source(name).unwrap_or_default().to_owned(),
    }));
    found
}

/// What the provider names as needed; nothing where it cannot be read.
fn needed(provider: &Path) -> Vec<String> {
    #[cfg(target_os = "linux")]
    return super::elf::needed(provider).unwrap_or_default();
    #[cfg(not(target_os = "linux"))]
    return Vec::new();
}

fn source(name: &str) -> Option<&'static str> {
    // `libcublas.so` is no beginning of `libcublasLt.so.13`.
    SOURCES.iter().find(|(begin, _)| name.starts_with(begin)).map(|(_, source)| *source)
}

/// Whether the loader finds a library of this name.
fn opens(name: &str) -> bool {
    // SAFETY: loading runs the library's initialisers; these are NVIDIA's own, which the provider
    // would load too.
    unsafe { libloading::Library::new(name) }.is_ok()
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.found, self.optional) {
            (true, _) => write!(f, "{:<33} found", self.name),
            (false, false) => write!(f, "{:<33} missing: {}", self.name, self.source),
            (false, true) => {
                write!(f, "{:<33} missing, needed by some operators: {}", self.name, self.source)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn every_library_says_where_it_comes_from() {
        for name in NEEDED.into_iter().chain(LATER) {
            assert!(source(name).is_some(), "{name}");
        }
        assert_eq!(source("libcublasLt.so.13"), source("libcublas.so.13"));
        assert_eq!(source("libc.so.6"), None);
    }

    #[test]
    fn what_is_missing_is_named_with_its_source() {
        let folder = tempfile::tempdir().unwrap();
        let found = libraries(&folder.path().join("libonnxruntime.so"));
        assert_eq!(found.len(), 1 + NEEDED.len() + LATER.len());
        assert!(!found[0].found);
        assert_eq!(
            found[0].to_string(),
            "libonnxruntime_providers_cuda.so  missing: pip install onnxruntime-gpu==1.31.1"
        );
        std::fs::write(folder.path().join(PROVIDER), "no library").unwrap();
        let found = libraries(&folder.path().join("libonnxruntime.so"));
        assert!(found[0].found);
        let names: Vec<&str> = found[1..].iter().map(|library| &*library.name).collect();
        assert_eq!(names, NEEDED.into_iter().chain(LATER).collect::<Vec<_>>());
    }

    #[test]
    fn a_library_that_every_machine_has_is_found() {
        assert!(opens("libc.so.6"));
        assert!(!opens("libskipgpt-no-such.so.1"));
    }
}
