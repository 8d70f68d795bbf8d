//! Writes an artifact.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use skipgpt_passes::ir;
use skipgpt_passes::plan::Plan;

use super::clients::Generation;
use super::hash::{Digest, InputHashes};
use super::layout::{Layout, Written};
use super::manifest::{self, FileRecord, GraphFacts, Manifest, ModelFacts, Options, Weights};
use super::output::Output;
use super::staging::{Open, Staging};
use super::{Error, OnProgress, Progress, Step, card, clients, names};
use crate::checkpoint::Checkpoint;
use crate::inspect::Work;
use crate::onnx::graph::{Element, Graph, Initializer};
use crate::onnx::{Attention, proto};
use crate::packed;
use crate::sources::Sources;
use crate::weights;

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
    let staging = Staging::begin_with(request.output, request.force, open)?;
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
    outputs.data(&layout, &checkpoint.sources, &mut tracker)?;
    check_linked(&layout, &checkpoint.sources, &mut tracker)?;
    let mut linked = Vec::new();
    for (path, name) in &layout.files {
        if outputs.records.iter().any(|record| record.name == *name) || is_reserved(name) {
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
            None => super::hash::of_file(path, &mut |_| true)?.ok_or(Error::Interrupted)?,
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

/// The files of the artifact in the making.
pub(crate) struct Files<'a> {
    staging: &'a Staging,
    records: Vec<FileRecord>,
}

impl<'a> Files<'a> {
    /// None yet.
    pub(crate) const fn new(staging: &'a Staging) -> Self {
        Self { staging, records: Vec::new() }
    }

    /// Starts a file that [`Files::close`] ends.
    pub(crate) fn create(&self, name: &str) -> Result<Output, Error> {
        self.staging.create(name)
    }

    /// What a failed write of file `name` means.
    pub(crate) fn explain(&self, name: &str, error: io::Error) -> Error {
        self.staging.explain(name, error)
    }

    /// Writes a JSON file.
    pub(crate) fn json(&mut self, name: &str, value: &impl serde::Serialize) -> Result<(), Error> {
        self.write(name, &clients::json(name, value)?)
    }

    /// Writes a small file.
    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let mut output = self.staging.create(name)?;
        output.write_all(bytes).map_err(|error| self.staging.explain(name, error))?;
        self.close(output)
    }

    /// Copies a file under its own name.
    pub(crate) fn copy(&mut self, path: &Path) -> Result<(), Error> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.copy_as(path, &name)
    }

    fn copy_as(&mut self, path: &Path, name: &str) -> Result<(), Error> {
        const BUFFER: usize = 4 << 20;
        let read = |error| Error::io("read", path, error);
        let mut file = std::fs::File::open(path).map_err(read)?;
        let mut output = self.staging.create(name)?;
        let size = file.metadata().map_err(read)?.len();
        let mut buffer = vec![0; BUFFER.min(size as usize + 1)];
        loop {
            match io::Read::read(&mut file, &mut buffer) {
                Ok(0) => return self.close(output),
                Ok(count) => output
                    .write_all(&buffer[..count])
                    .map_err(|error| self.staging.explain(name, error))?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(read(error)),
            }
        }
    }

    /// Writes `model.onnx.data`, if any weight goes there.
    fn data(
        &mut self,
        layout: &Layout<'_>,
        sources: &Sources,
        tracker: &mut Tracker<'_>,
    ) -> Result<(), Error> {
        if layout.written.is_empty() {
            return Ok(());
        }
        let mut output = self.staging.create(names::DATA)?;
        let failed = |error| self.staging.explain(names::DATA, error);
        for written in &layout.written {
            let (Written::Plain { initializer, .. } | Written::Quantized { initializer, .. }) =
                written;
            let result = match *written {
                Written::Plain { offset, weight, .. } => {
                    output.pad_to(offset).map_err(failed)?;
                    let mut sink = Tracked::new(&mut output, tracker);
                    let result = evaluate(initializer, weight, sources, &mut sink);
                    sink.failure().map_or(result, |error| Err(failed(error)))
                }
                Written::Quantized { weight, place, .. } => {
                    quantise(initializer, weight, &place, sources, &mut output, tracker, &failed)
                }
            };
            result?;
        }
        self.close(output)
    }

    pub(crate) fn close(&mut self, output: Output) -> Result<(), Error> {
        let name = output.name().to_owned();
        let digest = output.finish().map_err(|error| self.staging.explain(&name, error))?;
        self.record(&name, digest);
        Ok(())
    }

    fn record(&mut self, name: &str, digest: Digest) {
        self.records.push(record(name.to_owned(), digest));
    }

    /// The records, by name.
    pub(crate) fn finish(mut self) -> Vec<FileRecord> {
        self.records.sort_by(|a, b| a.name.cmp(&b.name));
        self.records
    }
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

fn record(name: String, Digest { size, sha256 }: Digest) -> FileRecord {
    FileRecord { name, size, sha256 }
}

/// Weights that stay where they are must be finite too.
fn check_linked(
    layout: &Layout<'_>,
    sources: &Sources,
    tracker: &mut Tracker<'_>,
) -> Result<(), Error> {
    for (initializer, weight) in &layout.linked {
        evaluate(initializer, weight, sources, &mut Tracked::new(&mut io::sink(), tracker))?;
    }
    Ok(())
}

fn evaluate<W: Write>(
    initializer: &Initializer,
    weight: &ir::Weight,
    sources: &Sources,
    sink: &mut Tracked<'_, '_, W>,
) -> Result<(), Error> {
    let name = || initializer.name.clone();
    let before = sink.tracker.done;
    // A weight in an integer initializer is a bug whose bytes then do not fit either.
    let dtype = match initializer.element {
        Element::Float(dtype) => dtype,
        Element::Int64 | Element::Int32 | Element::Uint8 | Element::Bool => ir::DType::F32,
    };
    let expected = initializer.size();
    let planned = weight.len() as u64 * dtype.size() as u64;
    if planned != expected {
        return Err(Error::WrongSize { name: name(), expected, found: planned });
    }
    let result = weights::write(weight, dtype, sources, sink);
    if sink.tracker.stopped {
        return Err(Error::Interrupted);
    }
    result.map_err(|source| Error::Weight { name: name(), source })?;
    let found = sink.tracker.done - before;
    if found == expected { Ok(()) } else { Err(Error::WrongSize { name: name(), expected, found }) }
}

/// Writes the parts of a matrix in few bits.
fn quantise(
    initializer: &Initializer,
    weight: &ir::Weight,
    place: &packed::Place,
    sources: &Sources,
    output: &mut Output,
    tracker: &mut Tracker<'_>,
    failed: &impl Fn(io::Error) -> Error,
) -> Result<(), Error> {
    let packed::Place { scheme, dtype, codes, scales, zeros } = place;
    output.pad_to(*codes).map_err(failed)?;
    let mut sink = Tracked::new(output, tracker);
    let result = weights::quantized::write(weight, scheme, *dtype, sources, &mut sink);
    if let Some(error) = sink.failure() {
        return Err(failed(error));
    }
    if tracker.stopped() {
        return Err(Error::Interrupted);
    }
    let name = || initializer.name.clone();
    let sides = result.map_err(|source| Error::Weight { name: name(), source })?;
    for (offset, bytes) in [(scales, &sides.scales), (zeros, &sides.zeros)] {
        if bytes.is_empty() {
            continue;
        }
        output.pad_to(*offset).map_err(failed)?;
        let mut sink = Tracked::new(output, tracker);
        let result = sink.write_all(bytes);
        if let Some(error) = sink.failure() {
            return Err(failed(error));
        }
        result.map_err(|_| Error::Interrupted)?;
    }
    let (rows, columns) = (weight.rows(), weight.columns());
    let bytes = |each: usize| (rows * each) as u64;
    let (expected, found) = if scheme.symmetric {
        (scales + bytes(scheme.blocks(columns) * dtype.size()), output.size())
    } else {
        (zeros + bytes(scheme.zero_bytes(columns)), output.size())
    };
    if found == expected { Ok(()) } else { Err(Error::WrongSize { name: name(), expected, found }) }
}

/// Counts the bytes of the weights and asks whether to go on.
pub(crate) struct Tracker<'a> {
    progress: OnProgress<'a>,
    done: u64,
    total: u64,
    stopped: bool,
}

impl<'a> Tracker<'a> {
    /// Nothing done of `total` bytes.
    pub(crate) fn new(progress: OnProgress<'a>, total: u64) -> Self {
        Self { progress, done: 0, total, stopped: false }
    }

    /// Whether the caller said stop.
    pub(crate) const fn stopped(&self) -> bool {
        self.stopped
    }
}

/// A destination that reports to a [`Tracker`].
pub(crate) struct Tracked<'a, 'b, W> {
    inner: &'a mut W,
    tracker: &'a mut Tracker<'b>,
    /// Why the destination refused; the evaluator only says that it did.
    failure: Option<io::Error>,
}

impl<'a, 'b, W> Tracked<'a, 'b, W> {
    /// Everything goes on to `inner`.
    pub(crate) const fn new(inner: &'a mut W, tracker: &'a mut Tracker<'b>) -> Self {
        Self { inner, tracker, failure: None }
    }

    /// Why the destination refused, if it did.
    pub(crate) fn failure(self) -> Option<io::Error> {
        self.failure
    }
}

impl<W: Write> Write for Tracked<'_, '_, W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.inner.write_all(buffer) {
            let kind = error.kind();
            self.failure = Some(error);
            return Err(kind.into());
        }
        let Tracker { progress, done, total, stopped } = &mut *self.tracker;
        *done += buffer.len() as u64;
        match progress(Progress { step: Step::Weights, done: *done, total: *total }) {
            ControlFlow::Continue(()) => Ok(buffer.len()),
            ControlFlow::Break(()) => {
                *stopped = true;
                Err(io::ErrorKind::Other.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

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

fn is_reserved(name: &str) -> bool {
    [names::MANIFEST, names::CARD].contains(&name)
}

/// An artifact inside the checkpoint, or the other way round, would be removed or hashed with it.
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
