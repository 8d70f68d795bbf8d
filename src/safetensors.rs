//! The other back end: a Frozen model as a Hugging Face checkpoint.
//!
//! Adapters are merged into their projections, removed modules are gone, routers lie beside the
//! model in `router.safetensors`, named as they are released. The checkpoint is *plain*, one that
//! any library reads, where only whole layers were removed: the others are renumbered. Where a
//! layer lost one of its modules it is of the `nemotron-nas` form, whose `block_configs` say which.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use skipgpt_passes::ir::{Architecture, DType, ModuleId, Phase};
use skipgpt_passes::plan::Plan;
use skipgpt_passes::validate::Validated;

use crate::artifact::clients::Generation;
use crate::artifact::hash::InputHashes;
use crate::artifact::manifest::{self, Manifest, ModelFacts, Options};
use crate::artifact::staging::Staging;
use crate::artifact::{self, Files, OnProgress, Tracked, Tracker, card, names};
use crate::checkpoint::Checkpoint;
use crate::inspect::Work;
use crate::sources::Sources;
use crate::{sources, weights};

mod config;
mod contents;
mod header;
#[cfg(test)]
mod tests;

use contents::{Contents, Tensor};

/// The weights.
pub const MODEL: &str = "model.safetensors";
/// The routers.
pub const ROUTERS: &str = "router.safetensors";

/// Why a checkpoint could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model is not in the phase the back end takes: a bug in the caller.
    #[error("the safetensors back end takes Frozen models; this one is {0}")]
    WrongPhase(Phase),
    /// A module reads another state than the file format can say.
    #[error(
        "{0}: its router reads the state after attention; the released router format has only \
         routers of the layer's input (use --format onnx)"
    )]
    Tap(ModuleId),
    /// No runtime reads layers with one module of this architecture.
    #[error(
        "{removed}: removed alone, which only nemotron-nas checkpoints can say, and those are of \
         llama's form, not {architecture:?}'s; remove both modules of the layer, or use --format onnx"
    )]
    Architecture {
        /// The first module that was removed alone.
        removed: ModuleId,
        /// The checkpoint's architecture.
        architecture: Architecture,
    },
    /// Runtimes of the `nemotron-nas` form size the cache by the first layer.
    #[error(
        "{0}: removed, but the first layer of a nemotron-nas checkpoint must have its attention; \
         keep it, or use --format onnx"
    )]
    FirstAttention(ModuleId),
    /// A weight is an expression that has no name in a checkpoint: a bug in a pass.
    #[error("{0}: is not a tensor of the checkpoint; this is a bug")]
    Unnamed(String),
    /// `config.json` does not read as an object.
    #[error("{}: not valid JSON for this tool: {source}", path.display())]
    Config {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A weight could not be evaluated.
    #[error("tensor {name}: {source}")]
    Weight {
        /// The tensor, as named in the output.
        name: String,
        /// Why.
        source: weights::Error,
    },
    /// A tensor could not be found, or is there twice.
    #[error(transparent)]
    Source(#[from] sources::Error),
    /// The directory could not be written.
    #[error(transparent)]
    Artifact(#[from] artifact::Error),
}

/// What is to be written, and where.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The directory to create.
    pub output: &'a Path,
    /// Whether an earlier export may be replaced.
    pub force: bool,
    /// The model, Frozen.
    pub model: Validated<'a>,
    /// Where the tensors lie.
    pub checkpoint: &'a Checkpoint,
    /// What the passes applied.
    pub plan: &'a Plan,
    /// The passes that ran, in order.
    pub passes: &'a [&'a str],
    /// What was asked for.
    pub options: Options,
    /// The dtype of every weight but the routers', which stay `f32`; `None` keeps each one's own.
    pub dtype: Option<DType>,
}

/// Whether `model` can be written in this format.
///
/// # Errors
///
/// [`Error::Tap`], [`Error::Architecture`] and [`Error::FirstAttention`].
pub fn check(
    model: Validated<'_>,
    checkpoint: &Checkpoint,
    dtype: Option<DType>,
) -> Result<(), Error> {
    let contents = Contents::of(model.model(), dtype, &mut checkpoint.sources.clone())?;
    let path = checkpoint.directory.join(names::CONFIG);
    config::rewrite(&path, model.model(), &contents).map(drop)
}

/// Writes the checkpoint; the directory appears only once everything in it is on the disk.
///
/// # Errors
///
/// [`Error::Tap`], [`Error::Architecture`] and [`Error::FirstAttention`] for a model this format
/// cannot hold; [`Error::Weight`] for a weight that cannot be read or is not finite;
/// [`Error::Artifact`] as for [`artifact::write()`]. After any of them nothing is left behind.
pub fn write(request: &Request<'_>, progress: OnProgress<'_>) -> Result<Manifest, Error> {
    if request.model.phase() != Phase::Frozen {
        return Err(Error::WrongPhase(request.model.phase()));
    }
    let (model, checkpoint) = (request.model.model(), request.checkpoint);
    let mut sources = checkpoint.sources.clone();
    let contents = Contents::of(model, request.dtype, &mut sources)?;
    let path = checkpoint.directory.join(names::CONFIG);
    let config = config::rewrite(&path, model, &contents)?;

    artifact::outside_checkpoint(request.output, &checkpoint.directory)?;
    let mut staging = Staging::begin(request.output, request.force)?;
    let total = header::size(&contents.weights) + header::size(&contents.routers);
    staging.require(total)?;
    let generation = Generation::read(&checkpoint.directory)?;
    let (inputs, copied) = artifact::inputs(checkpoint);
    let hashes = InputHashes::start(inputs.clone())?;
    let mut files = Files::new(&staging);
    for path in copied.iter().filter(|path| path.file_name() != Some(names::CONFIG.as_ref())) {
        files.copy(path)?;
    }
    files.json(names::CONFIG, &config)?;
    if let Some(defaults) = generation.defaults() {
        files.json(names::GENERATION_CONFIG, &defaults)?;
    }
    let mut tracker = Tracker::new(progress, total);
    write_tensors(&mut files, MODEL, &contents.weights, &sources, &mut tracker)?;
    if !contents.routers.is_empty() {
        write_tensors(&mut files, ROUTERS, &contents.routers, &sources, &mut tracker)?;
    }
    let inputs = artifact::records(&inputs, &checkpoint.directory, hashes.finish()?);
    let mut manifest = Manifest {
        manifest_version: manifest::VERSION,
        tool: manifest::Tool::this(),
        options: Options { dtype: contents.dtype, ..request.options },
        plan: request.plan.clone(),
        passes: request.passes.iter().map(ToString::to_string).collect(),
        model: ModelFacts::of(&model.config),
        routing: manifest::Routing::of(model, request.plan),
        cache_layers: model.cached_layers().collect(),
        work: Work::of(model),
        graph: None,
        inputs,
        outputs: Vec::new(),
    };
    files.write(names::CARD, card::text(&manifest).as_bytes())?;
    manifest.outputs = files.finish();
    Files::new(&staging).write(names::MANIFEST, &manifest.to_json()?)?;
    staging.commit()?;
    Ok(manifest)
}

/// One file: its header, then every tensor in the order of the header.
fn write_tensors(
    files: &mut Files<'_>,
    name: &str,
    tensors: &BTreeMap<String, Tensor<'_>>,
    sources: &Sources,
    tracker: &mut Tracker<'_>,
) -> Result<(), Error> {
    let explain = |error| files.explain(name, error);
    let mut output = files.create(name)?;
    output.write_all(&header::bytes(tensors)).map_err(explain)?;
    for (tensor_name, tensor) in header::order(tensors) {
        let mut sink = Tracked::new(&mut output, tracker);
        let result = weights::write(&tensor.weight, tensor.dtype, sources, &mut sink);
        let failure = sink.failure();
        if tracker.stopped() {
            return Err(artifact::Error::Interrupted.into());
        }
        if let Some(error) = failure {
            return Err(explain(error).into());
        }
        result.map_err(|source| Error::Weight { name: tensor_name.clone(), source })?;
    }
    Ok(files.close(output)?)
}
