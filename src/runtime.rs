//! ONNX Runtime: found and loaded at run time, never linked.
//!
//! [`locate`] finds the shared library, [`Runtime`] loads it, [`Session`] holds a graph it runs and
//! [`OnnxDecoder`] makes a [`Decoder`](crate::decoder::Decoder) of one. Nothing outside this module
//! knows `ort`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ort::environment::Environment;
use ort::logging::LogLevel;

pub mod cuda;
pub mod decoder;
#[cfg(target_os = "linux")]
mod elf;
mod interface;
mod library;
pub mod locate;
mod logits;
pub mod placement;
pub mod session;
mod tensor;

pub use self::decoder::OnnxDecoder;
pub use self::interface::CacheFacts;
pub use self::library::{BadVersion, Rejection, Version};
pub use self::locate::{Found, Search};
pub use self::placement::Placement;
pub use self::session::{Optimization, Options, Provider, Session, Shapes};

/// ONNX Runtime, loaded. A process loads one library and keeps it.
#[derive(Debug, Clone)]
pub struct Runtime {
    environment: Environment,
    found: Arc<Found>,
}

/// Why ONNX Runtime is not there to be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No place has it.
    #[error(transparent)]
    NotFound(#[from] locate::NotFound),
    /// The library was found and examined and still does not load.
    #[error("{}: ONNX Runtime does not load: {source}", path.display())]
    Load {
        /// The library.
        path: PathBuf,
        /// What went wrong.
        source: ort::LoadDynamicError,
    },
    /// The library refuses to start.
    #[error("{}: ONNX Runtime does not start: {source}", path.display())]
    Start {
        /// The library.
        path: PathBuf,
        /// What went wrong.
        source: ort::Error,
    },
    /// The process has another one already.
    #[error(
        "{}: this process has loaded ONNX Runtime {version} from {} already, and can hold only one",
        asked.display(), loaded.display()
    )]
    AnotherIsLoaded {
        /// The library asked for.
        asked: PathBuf,
        /// The library in use.
        loaded: PathBuf,
        /// The version in use.
        version: Version,
    },
    /// The library in use is older than what is asked for now.
    #[error(
        "{}: this process has loaded ONNX Runtime {version}; {minimum} or later is needed",
        loaded.display()
    )]
    LoadedIsTooOld {
        /// The library in use.
        loaded: PathBuf,
        /// The version in use.
        version: Version,
        /// The oldest that will do.
        minimum: Version,
    },
}

/// `ort` allows one environment per process; releasing it at exit would race the library's own
/// clean-up, so it is never released.
static LOADED: Mutex<Option<Runtime>> = Mutex::new(None);

impl Runtime {
    /// Finds and loads ONNX Runtime of at least `minimum`; `flag` is what the command line names.
    /// What the process has loaded already serves again, unless the command line names another.
    pub fn find(flag: Option<&Path>, minimum: Version) -> Result<Self, Error> {
        if flag.is_none()
            && let Some(runtime) = LOADED.lock().unwrap_or_else(PoisonError::into_inner).as_ref()
        {
            return runtime.at_least(minimum);
        }
        Self::load(Search::of_process(flag).find(minimum)?)
    }

    /// Loads the library that was found.
    pub fn load(found: Found) -> Result<Self, Error> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = loaded.as_ref() {
            if runtime.found.path == found.path {
                return Ok(runtime.clone());
            }
            return Err(Error::AnotherIsLoaded {
                asked: found.path,
                loaded: runtime.found.path.clone(),
                version: runtime.found.version,
            });
        }
        let start = |source| Error::Start { path: found.path.clone(), source };
        let environment = ort::init_from(&found.path)
            .map_err(|source| Error::Load { path: found.path.clone(), source })?
            .with_name("skipgpt-export")
            .with_telemetry(false)
            .with_logger(Arc::new(log))
            .build()
            .map_err(start)?;
        environment.set_log_level(LogLevel::Warning);
        let runtime = Self { environment, found: Arc::new(found) };
        *loaded = Some(runtime.clone());
        Ok(runtime)
    }

    fn at_least(&self, minimum: Version) -> Result<Self, Error> {
        if self.found.version >= minimum {
            return Ok(self.clone());
        }
        Err(Error::LoadedIsTooOld {
            loaded: self.found.path.clone(),
            version: self.found.version,
            minimum,
        })
    }

    /// The library in use.
    pub fn found(&self) -> &Found {
        &self.found
    }
}

/// What ONNX Runtime has to say goes where the program's own log goes, not to standard error.
fn log(level: LogLevel, category: &str, _id: &str, place: &str, message: &str) {
    match level {
        LogLevel::Verbose => tracing::trace!(target: "onnxruntime", category, place, "{message}"),
        LogLevel::Info => tracing::debug!(target: "onnxruntime", category, place, "{message}"),
        LogLevel::Warning => tracing::warn!(target: "onnxruntime", category, place, "{message}"),
        LogLevel::Error | LogLevel::Fatal => {
            tracing::error!(target: "onnxruntime", category, place, "{message}");
        }
    }
}
