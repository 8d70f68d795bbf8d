//! From arguments to the things they name: checkpoints, references, artifacts, text.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use skipgpt_export::artifact::{self, Artifact};
use skipgpt_export::checkpoint::{self, Checkpoint};
use skipgpt_export::device::Compute;
use skipgpt_export::model::{self, Reference};
use skipgpt_export::runtime::{Runtime, Version, session};
use skipgpt_export::text::Tokenizer;
use skipgpt_export::watch::Watched;
use skipgpt_passes::ir::Model;
use skipgpt_passes::validate;

use super::{CheckpointArguments, Device, ReadArguments, RuntimeArguments, screen};

/// Reads the checkpoint that was named.
pub(crate) fn checkpoint(arguments: &CheckpointArguments) -> Result<Checkpoint> {
    let model = arguments.model.as_deref().context("--model DIR is needed: the checkpoint")?;
    Ok(checkpoint::read(&checkpoint::Request {
        model: Some(model),
        router: arguments.router.as_deref(),
        adapter: arguments.adapter.as_deref(),
        lora_alpha: arguments.lora_alpha,
    })?)
}

/// Reads the checkpoint that was named, and the tokens of the text it is to read.
pub(crate) fn read(arguments: &ReadArguments) -> Result<(Checkpoint, Vec<u32>)> {
    let checkpoint = checkpoint(&arguments.checkpoint)?;
    let tokenizer = Tokenizer::open(&checkpoint.directory)?;
    let tokens = tokens(&tokenizer, &arguments.text)?;
    Ok((checkpoint, tokens))
}

/// The reference that runs `model`, a form of the checkpoint's, in `f32`.
pub(crate) fn reference(
    model: &Model,
    checkpoint: &Checkpoint,
    device: Device,
) -> Result<Reference> {
    let options = model::Options { device: Compute::from(device).open()?, ..Default::default() };
    Ok(Reference::load_with(validate(model)?, &checkpoint.sources, options)?)
}

/// Finds ONNX Runtime, of at least the version an artifact asks for.
pub(crate) fn runtime(arguments: &RuntimeArguments, artifact: &Artifact) -> Result<Runtime> {
    let graph = artifact.manifest.graph.as_ref();
    let minimum = graph.map_or(skipgpt_export::onnx::MINIMUM_ONNXRUNTIME, |g| &g.min_onnxruntime);
    let minimum: Version = minimum.parse()?;
    Ok(Runtime::find(arguments.onnxruntime.as_deref(), minimum)?)
}

/// How sessions are to run.
pub(crate) fn session_options(arguments: &RuntimeArguments) -> session::Options {
    session::Options {
        provider: arguments.provider.into(),
        threads: arguments.threads,
        ..session::Options::default()
    }
}

/// An artifact, opened and compared with its manifest's hashes.
pub(crate) fn artifact(directory: &Path) -> Result<Artifact> {
    let artifact = artifact::open(directory)?;
    let bar = screen::bytes("checking");
    artifact.verify_hashes(&mut |progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        screen::go_on()
    })?;
    bar.finish_and_clear();
    Ok(artifact)
}

/// The artifact under ONNX Runtime, reporting its decisions.
pub(crate) fn watched(artifact: &Artifact, arguments: &RuntimeArguments) -> Result<Watched> {
    watched_in(artifact, arguments, &session_options(arguments))
}

/// The same in sessions of these options.
pub(crate) fn watched_in(
    artifact: &Artifact,
    arguments: &RuntimeArguments,
    options: &session::Options,
) -> Result<Watched> {
    let runtime = runtime(arguments, artifact)?;
    Ok(Watched::open(artifact, &runtime, options)?)
}

/// The tokens of text files, one after the other, without special tokens.
pub(crate) fn tokens(tokenizer: &Tokenizer, files: &[PathBuf]) -> Result<Vec<u32>> {
    let mut tokens = Vec::new();
    for file in files {
        let ids = tokenizer.encode(&text(file)?, false)?;
        tokens.extend(ids.into_iter().filter_map(|id| u32::try_from(id).ok()));
    }
    Ok(tokens)
}

/// The prompts of a text file, one a line, blank lines left out.
pub(crate) fn prompts(path: &Path) -> Result<Vec<String>> {
    let text = text(path)?;
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let prompts: Vec<_> = lines.map(str::to_owned).collect();
    if prompts.is_empty() {
        bail!("{}: holds no prompt; give one a line", path.display());
    }
    Ok(prompts)
}

fn text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .with_context(|| format!("{}: cannot be read as UTF-8 text", path.display()))
}
