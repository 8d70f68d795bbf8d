//! Writes an artifact.

use std::path::Path;

use skipgpt_passes::ir;
use skipgpt_passes::plan::Plan;

use super::clients::Generation;
use super::data::{self, Tracker};
use super::files::Files;
use super::hash::{self, InputHashes};
use super::inputs::{inputs, outside_checkpoint, records};
use super::layout::Layout;
use super::manifest::{self, GraphFacts, Manifest, ModelFacts, Options, Weights};
use super::staging::{Open, Staging};
use super::{Error, OnProgress, card, names};
use crate::checkpoint::Checkpoint;
use crate::inspect::Work;
use crate::onnx::graph::Graph;
use crate::onnx::{Attention, proto};

/// What is to be written, and where.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The directory to create.
    pub output: &'a Path,
    /// Whether an earlier export may be replaced.
    pub force: bool,
    /// The model the graph was lowered from.
    pub model: &'a ir::Model,
    /// The graph.
    pub graph: &'a Graph,
    /// Where the tensors lie.
    pub checkpoint: &'a Checkpoint,
    /// What the passes applied.
    pub plan: &'a Plan,
    /// The passes that ran, in order.
    pub passes: &'a [&'a str],
    /// What was asked for.
    pub options: Options,
    /// The oldest ONNX Runtime that runs the graph.
    pub min_onnxruntime: &'a str,
}

/// Writes the artifact; the directory appears only once everything in it is on the disk.
///
/// # Errors
///
/// [`Error::Exists`] and [`Error::NotReplaceable`] for a taken path, [`Error::NoSpace`] for a full
/// disk, [`Error::Weight`] for a weight that cannot be read or is not finite, [`Error::Unlinkable`]
/// for one that cannot be shared. After any of them nothing is left behind.
pub fn write(request: &Request<'_>, progress: OnProgress<'_>) -> Result<Manifest, Error> {
    outside_checkpoint(request.output, &request.checkpoint.directory)?;
    let staging = Staging::begin(request.output, request.force)?;
    write_staged(request, staging, progress)
}

/// [`write()`] with another way to create files.
#[cfg_attr(not(test), allow(dead_code, reason = "tests put a full disk here"))]
pub(super) fn write_with(
    request: &Request<'_>,
    open: Open,
    progress: OnProgress<'_>,
) -> Result<Manifest, Error> {
    let staging = Staging::begin_with(request.output, None, open)?;
    write_staged(request, staging, progress)
}

fn write_staged(
    request: &Request<'_>,
    mut staging: Staging,
    progress: OnProgress<'_>,
) -> Result<Manifest, Error> {
    let Request { model, checkpoint, .. } = *request;
    // ONNX Runtime follows hard links from the main graph alone.
    let hoisted;
    let graph = if request.options.weights == Weights::Link {
        hoisted = request.graph.hoisted();
        &hoisted
    } else {
        request.graph
    };
    let layout = match request.options.weights {
        Weights::Copy => Layout::copy(graph),
        Weights::Link => Layout::link(graph, &checkpoint.sources)?,
    };
    staging.require(layout.size)?;
    let generation = Generation::read(&checkpoint.directory)?;
    let (inputs, copied) = inputs(checkpoint);
    // Reads the inputs from first byte to last beside everything below; stops if that fails.
    let hashes = InputHashes::start(inputs.clone())?;

    let mut outputs = Files::new(&staging);
    for path in &copied {
        outputs.copy(path)?;
    }
    if let Some(defaults) = generation.defaults() {
        outputs.json(names::GENERATION_CONFIG, &defaults)?;
    }
    let dtype = request.options.dtype.to_string();
    let shared = request.options.attention == Attention::Grouped;
    outputs.json(names::GENAI_CONFIG, &generation.genai(&model.config, shared))?;
    let sequences = request.options.sequences.to_string();
    let metadata = [
        ("dtype", dtype.as_str()),
        ("min_onnxruntime", request.min_onnxruntime),
        (proto::SEQUENCES, sequences.as_str()),
        (proto::SHARED_BUFFER, if shared { "true" } else { "false" }),
    ];
    outputs.write(names::MODEL, &proto::encode(graph, &layout.placements, &metadata)?)?;
    let mut tracker = Tracker::new(progress, layout.total());
    data::write(&mut outputs, &layout, &checkpoint.sources, &mut tracker)?;
    data::check_linked(&layout, &checkpoint.sources, &mut tracker)?;
    let mut linked = Vec::new();
    for (path, name) in &layout.files {
        if outputs.has(name) || is_reserved(name) {
            return Err(Error::NameTaken(path.clone()));
        }
        if staging.link(path, name)? {
            linked.push((path, name));
        } else {
            outputs.copy_as(path, name)?;
        }
    }

    let digests = hashes.finish()?;
    for (path, name) in linked {
        // The same file: its hash is known once the inputs are hashed.
        let index = inputs.iter().position(|input| input == path);
        let digest = match index.and_then(|index| digests.get(index)) {
            Some(digest) => digest.clone(),
            None => hash::of_file(path, &mut |_| true)?.ok_or(Error::Interrupted)?,
        };
        outputs.record(name, digest);
    }
    let mut manifest = Manifest {
        manifest_version: manifest::VERSION,
        tool: manifest::Tool::this(),
        options: request.options,
        plan: request.plan.clone(),
        passes: request.passes.iter().map(ToString::to_string).collect(),
        model: ModelFacts::of(&model.config),
        routing: manifest::Routing::of(model, request.plan),
        cache_layers: model.cached_layers().collect(),
        work: Work::of(model),
        graph: Some(GraphFacts::of(graph, request.min_onnxruntime)),
        inputs: records(&inputs, &checkpoint.directory, digests),
        outputs: Vec::new(),
    };
    outputs.write(names::CARD, card::text(&manifest).as_bytes())?;
    manifest.outputs = outputs.finish();
    Files::new(&staging).write(names::MANIFEST, &manifest.to_json()?)?;
    staging.commit()?;
    Ok(manifest)
}

fn is_reserved(name: &str) -> bool {
    [names::MANIFEST, names::CARD].contains(&name)
}
