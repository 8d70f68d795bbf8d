//! A graph that ONNX Runtime runs.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};

use ort::ep;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use serde::Serialize;

use super::locate::{Found, install_command};
use super::placement::{self, Placement};
use super::{Runtime, Version};
use crate::onnx;

/// Where the graph runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, device 0. Never replaced by the processor where it is missing.
    Cuda,
}

impl Provider {
    /// What ONNX Runtime calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPUExecutionProvider",
            Self::Cuda => "CUDAExecutionProvider",
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        })
    }
}

/// A provider the tool does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a provider; expected cpu or cuda")]
pub struct UnknownProvider(String);

impl FromStr for Provider {
    type Err = UnknownProvider;

    fn from_str(text: &str) -> Result<Self, UnknownProvider> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            other => Err(UnknownProvider(other.to_owned())),
        }
    }
}

/// How far ONNX Runtime rewrites the graph before it runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Optimization {
    /// Not at all.
    Off,
    /// Constants and redundant nodes.
    Basic,
    /// Fused operators too.
    Extended,
    /// Layouts too.
    #[default]
    All,
}

/// Which steps a session takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shapes {
    /// Any.
    #[default]
    Any,
    /// One token in each of so many sequences. ONNX Runtime takes the graph's forms for other steps out when it
    /// loads it, and the branches that choose among them.
    OneEach(usize),
}

/// The names, in this tool's graphs and in those of onnxruntime-genai's builder and optimum, of the
/// dimensions of `input_ids`. ONNX Runtime ignores names that a graph has not.
const TOKEN_DIMENSIONS: [[&str; 2]; 2] = [["batch", "batch_size"], ["sequence", "sequence_length"]];

/// How a session runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// Where.
    pub provider: Provider,
    /// Threads inside an operator; `None` leaves it to ONNX Runtime, which takes one per core.
    pub threads: Option<usize>,
    /// How far the graph is rewritten before.
    pub optimization: Optimization,
    /// Which steps it takes.
    pub shapes: Shapes,
    /// Whether a decoder has a further session, for one token of one sequence.
    pub one_token_apart: bool,
    /// Where to write a profile: a path that ONNX Runtime completes with a time and `.json`.
    pub profile: Option<PathBuf>,
    /// Whether the first step tells where its nodes ran ([`Session::placement`]). On another provider
    /// than the CPU's it always does, unless a profile is asked for: this is told from one.
    pub placement: bool,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The library was built without the provider.
    #[error(
        "{}: ONNX Runtime {version} has no {name} (it has {has}); {command}",
        path.display(), name = provider.name(), has = providers.join(", "),
        command = install_command(*provider)
    )]
    NoProvider {
        /// The provider asked for.
        provider: Provider,
        /// The library.
        path: PathBuf,
        /// Its version.
        version: Version,
        /// The providers it has.
        providers: Vec<String>,
    },
    /// The library has the provider and the machine does not let it run.
    #[error("{}: {name} does not start: {source}", path.display(), name = provider.name())]
    ProviderFailed {
        /// The provider asked for.
        provider: Provider,
        /// The library.
        path: PathBuf,
        /// What went wrong.
        source: ort::Error,
    },
    /// An option was refused.
    #[error("ONNX Runtime refuses the session's options: {0}")]
    Options(#[source] ort::Error),
    /// There is no graph there.
    #[error("{}: there is no such file", path.display())]
    NoModel {
        /// The path.
        path: PathBuf,
    },
    /// A folder's name cannot be handed to ONNX Runtime.
    #[error("{}: the folder of a graph's external data must have a name in UTF-8", path.display())]
    FolderName {
        /// The folder.
        path: PathBuf,
    },
    /// The graph was refused.
    #[error("{}: ONNX Runtime does not load the graph: {source}", path.display())]
    Model {
        /// The graph, or the folder of one that came from memory.
        path: PathBuf,
        /// What went wrong.
        source: ort::Error,
    },
    /// Its nodes did not run where they should.
    #[error(transparent)]
    Placement(#[from] placement::Error),
    /// There is no place for the profile of the first step.
    #[error("{}: cannot be created, for the profile of the first step: {source}", path.display())]
    Scratch {
        /// The directory.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// The graph that tries a provider could not be written: a bug.
    #[error("the graph that tries a provider: {0}")]
    Probe(#[from] onnx::proto::Error),
    /// No profile came of it.
    #[error("ONNX Runtime wrote no profile: {0}")]
    Profile(#[source] ort::Error),
}

/// A graph, loaded.
#[derive(Debug)]
pub struct Session {
    pub(super) inner: ort::session::Session,
    provider: Provider,
    /// Where the next step is profiled for its nodes' places; goes after the session, which may write
    /// there to its end.
    scratch: Option<Scratch>,
    placement: Option<Placement>,
}

impl Session {
    /// Loads the graph in the file `path`, such as an artifact's `model.onnx`, with its external
    /// data.
    pub fn open(runtime: &Runtime, path: &Path, options: &Options) -> Result<Self, Error> {
        if !path.is_file() {
            return Err(Error::NoModel { path: path.to_owned() });
        }
        let scratch = options.settles().then(Scratch::new).transpose()?;
        let mut builder = builder(runtime, options, scratch.as_ref())?;
        let inner = builder.commit_from_file(path);
        Self::opened(inner, path, options, scratch)
    }

    /// Loads the graph in `bytes`, a serialised `ModelProto`, whose external data lies in
    /// `folder`.
    pub fn from_bytes(
        runtime: &Runtime,
        bytes: &[u8],
        folder: &Path,
        options: &Options,
    ) -> Result<Self, Error> {
        let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
        let name =
            absolute.to_str().ok_or_else(|| Error::FolderName { path: folder.to_owned() })?;
        let scratch = options.settles().then(Scratch::new).transpose()?;
        let mut builder = builder(runtime, options, scratch.as_ref())?
            .with_config_entry("session.model_external_initializers_file_folder_path", name)
            .map_err(|error| Error::Options(error.into()))?;
        let inner = builder.commit_from_memory(bytes);
        Self::opened(inner, folder, options, scratch)
    }

    fn opened(
        inner: ort::Result<ort::session::Session>,
        path: &Path,
        options: &Options,
        scratch: Option<Scratch>,
    ) -> Result<Self, Error> {
        match inner {
            Ok(inner) => Ok(Self { inner, provider: options.provider, scratch, placement: None }),
            Err(source) => Err(Error::Model { path: path.to_owned(), source }),
        }
    }

    /// The provider that was asked for, and runs the graph.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// Names of the graph's inputs, in its order.
    pub fn inputs(&self) -> impl Iterator<Item = &str> {
        self.inner.inputs().iter().map(ort::value::Outlet::name)
    }

    /// Names of the graph's outputs, in its order.
    pub fn outputs(&self) -> impl Iterator<Item = &str> {
        self.inner.outputs().iter().map(ort::value::Outlet::name)
    }

    /// Where the nodes of the first step ran, once there was one and [`Options::placement`] asked for
    /// it.
    pub fn placement(&self) -> Option<&Placement> {
        self.placement.as_ref()
    }

    /// After the first step: reads where its nodes ran.
    ///
    /// # Errors
    ///
    /// [`Error::Placement`] if some ran elsewhere than they were asked to.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        let Some(_scratch) = self.scratch.take() else { return Ok(()) };
        let path = self.end_profile()?;
        let placement = Placement::read(&path, self.provider)?;
        tracing::info!("{placement}");
        placement.check()?;
        self.placement = Some(placement);
        Ok(())
    }

    /// Ends the profile that [`Options::profile`] asked for and gives its path.
    pub fn end_profile(&mut self) -> Result<PathBuf, Error> {
        self.inner.end_profiling().map(PathBuf::from).map_err(Error::Profile)
    }
}

impl Options {
    /// The same for the further session, if there is to be one. Not on CUDA, where it was never tried.
    pub fn one_token(&self) -> Option<Self> {
        self.one_each(1)
    }

    /// As [`Self::one_token`], for one token in each of so many sequences.
    pub fn one_each(&self, sequences: usize) -> Option<Self> {
        let asked = self.one_token_apart && self.provider == Provider::Cpu;
        asked.then(|| Self {
            shapes: Shapes::OneEach(sequences),
            one_token_apart: false,
            profile: None,
            placement: false,
            ..self.clone()
        })
    }

    /// Whether the first step is profiled for its nodes' places.
    fn settles(&self) -> bool {
        self.profile.is_none() && (self.placement || self.provider != Provider::Cpu)
    }
}

/// A directory of its own for a profile that nobody keeps.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, Error> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("skipgpt-export-{}-{number}", std::process::id());
            let path = std::env::temp_dir().join(name);
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(Self(path)),
                // Left by another process that had this one's number.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(Error::Scratch { path, source }),
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A directory among temporary ones that stays costs its few kilobytes and nothing else.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whether `provider` starts on this machine.
///
/// # Errors
///
/// [`Error::NoProvider`] or [`Error::ProviderFailed`], which name what is missing.
pub fn try_provider(runtime: &Runtime, provider: Provider) -> Result<(), Error> {
    let options = Options { provider, ..Options::default() };
    // Registering a provider touches no device; opening a graph on it does.
    let graph = onnx::probe()?;
    match Session::from_bytes(runtime, &graph, Path::new("."), &options) {
        Ok(_) => Ok(()),
        Err(Error::Model { source, .. }) => {
            let path = runtime.found().path.clone();
            Err(Error::ProviderFailed { provider, path, source })
        }
        Err(error) => Err(error),
    }
}

fn builder(
    runtime: &Runtime,
    options: &Options,
    scratch: Option<&Scratch>,
) -> Result<SessionBuilder, Error> {
    let level = match options.optimization {
        Optimization::Off => GraphOptimizationLevel::Disable,
        Optimization::Basic => GraphOptimizationLevel::Level1,
        Optimization::Extended => GraphOptimizationLevel::Level2,
        Optimization::All => GraphOptimizationLevel::All,
    };
    let refused = |error: ort::Error<SessionBuilder>| Error::Options(error.into());
    let mut builder = ort::session::Session::builder(&runtime.environment)
        .map_err(Error::Options)?
        .with_optimization_level(level)
        .map_err(refused)?;
    if let Some(threads) = options.threads {
        builder = builder.with_intra_threads(threads).map_err(refused)?;
    }
    if let Shapes::OneEach(sequences) = options.shapes {
        for (names, size) in TOKEN_DIMENSIONS.into_iter().zip([sequences as i64, 1]) {
            for name in names {
                builder = builder.with_dimension_override(name, size).map_err(refused)?;
            }
        }
    }
    let scratch = scratch.map(|scratch| scratch.0.join("profile"));
    if let Some(profile) = options.profile.as_ref().or(scratch.as_ref()) {
        builder = builder.with_profiling(profile).map_err(refused)?;
    }
    with_provider(builder, options.provider, runtime.found())
}

/// Registers `provider`. ONNX Runtime's own providers fall back silently; this does not.
fn with_provider(
    builder: SessionBuilder,
    provider: Provider,
    found: &Found,
) -> Result<SessionBuilder, Error> {
    if !found.providers.iter().any(|name| name == provider.name()) {
        return Err(Error::NoProvider {
            provider,
            path: found.path.clone(),
            version: found.version,
            providers: found.providers.clone(),
        });
    }
    match provider {
        Provider::Cpu => Ok(builder),
        Provider::Cuda => builder
            // `f32` is `f32`: on by default, TF32 would keep 10 bits of a product's operands.
            .with_execution_providers([ep::CUDA::default()
                .with_tf32(false)
                .build()
                .error_on_failure()])
            .map_err(|error| Error::ProviderFailed {
                provider,
                path: found.path.clone(),
                source: error.into(),
            }),
    }
}
