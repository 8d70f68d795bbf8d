//! What is timed: an artifact as it is, with forced decisions, or without some of its modules.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ndarray::{Array2, Array4};
use skipgpt_passes::ir::{ModuleId, ModuleKind};

use super::foreign::cache_facts;
use super::shares::Facts;
use super::workload::{Script, Tokens, input};
use super::{Error, Place};
use crate::artifact::{self, Artifact, names};
use crate::decoder::{CacheEntry, Decoder, Input, Routing};
use crate::onnx::{RouterMargins, force, without};
use crate::runtime::{CacheFacts, OnnxDecoder, Runtime, Session, session};
use crate::watch::Watched;

/// Tokens of one chunk of the prefix that fills a cache.
const CHUNK: usize = 256;

/// A directory with a decoder graph: an artifact, or another exporter's.
#[derive(Debug, Clone)]
pub struct Source {
    /// The directory, as it was named.
    pub directory: PathBuf,
    /// What this tool knows of it; `None` for another exporter's.
    pub artifact: Option<Artifact>,
    /// What another exporter's `genai_config.json` says of the cache.
    cache: CacheFacts,
}

/// The form of a source that a session runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Form {
    /// As it is.
    AsItIs,
    /// The decisions are inputs.
    Forced,
    /// These modules never run.
    Without(BTreeSet<ModuleId>),
}

/// A loaded form.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) decoder: OnnxDecoder,
    /// Of a forced form.
    inputs: Vec<force::Input>,
}

impl Source {
    /// The directory `directory`: an artifact if it has this tool's manifest, else any directory
    /// with a `model.onnx` of the inputs and outputs a decoder has.
    ///
    /// # Errors
    ///
    /// As [`artifact::open`]; [`artifact::Error::NotAnArtifact`] if there is no graph either, and
    /// [`artifact::Error::Json`] if what lies beside it is no configuration.
    pub fn open(directory: &Path) -> Result<Self, artifact::Error> {
        let (artifact, cache) = match artifact::open(directory) {
            Ok(artifact) => (Some(artifact), CacheFacts::default()),
            Err(artifact::Error::NotAnArtifact(_)) if directory.join(names::MODEL).is_file() => {
                (None, cache_facts(directory)?)
            }
            Err(error) => return Err(error),
        };
        Ok(Self { directory: directory.to_owned(), artifact, cache })
    }

    /// Modules with a router, in the order they run.
    pub(super) fn routed(&self) -> &[ModuleId] {
        self.artifact.as_ref().map_or(&[], |artifact| &artifact.manifest.routing.routed)
    }

    /// Whether it is this tool's own dense form, with every module: what ideals are made of.
    pub(super) fn is_dense(&self) -> bool {
        self.artifact.as_ref().is_some_and(|artifact| {
            let routing = &artifact.manifest.routing;
            routing.routed.is_empty() && routing.removed.is_empty()
        })
    }

    pub(super) fn removes(&self) -> bool {
        self.artifact.as_ref().is_some_and(|a| !a.manifest.routing.removed.is_empty())
    }

    /// Its routed modules of one kind.
    pub(super) fn routed_of(&self, kind: ModuleKind) -> Vec<ModuleId> {
        self.routed().iter().copied().filter(|module| module.kind == kind).collect()
    }

    /// What its work is; `None` for another exporter's.
    pub(super) fn facts(&self) -> Result<Option<Facts>, Error> {
        let Some(artifact) = &self.artifact else { return Ok(None) };
        let bytes = artifact.read(names::MODEL)?;
        Ok(Some(Facts::of(&artifact.manifest, &without::weights(&bytes)?)))
    }

    /// Loads it in `form`.
    pub(super) fn load(
        &self,
        form: &Form,
        runtime: &Runtime,
        options: &session::Options,
    ) -> Result<Opened, Error> {
        let (model, artifact) = match (form, &self.artifact) {
            (Form::AsItIs, _) => (None, self.artifact.as_ref()),
            (_, None) => return Err(artifact::Error::NotAnArtifact(self.directory.clone()).into()),
            (Form::Forced, Some(artifact)) => {
                let routers = artifact.manifest.routing.routers.iter();
                let routers: Vec<_> = routers.map(RouterMargins::from).collect();
                let bytes = artifact.read(names::MODEL)?;
                (Some(force::with_forced(&bytes, &routers)?), Some(artifact))
            }
            (Form::Without(modules), Some(artifact)) => {
                let bytes = without::without(&artifact.read(names::MODEL)?, modules)?;
                (Some((bytes, Vec::new())), Some(artifact))
            }
        };
        let open = |options: &session::Options| match &model {
            None => Session::open(runtime, &self.directory.join(names::MODEL), options),
            Some((bytes, _)) => Session::from_bytes(runtime, bytes, &self.directory, options),
        };
        let session = open(options)?;
        let one_token = options.one_token().as_ref().map(open).transpose()?;
        let inputs = model.map(|(_, inputs)| inputs).unwrap_or_default();
        let emits = artifact.filter(|artifact| artifact.manifest.options.emit_routing);
        let modules = emits.map(|a| a.manifest.routing.routed.clone()).unwrap_or_default();
        let decoder = OnnxDecoder::with_facts(session, modules, self.cache)
            .map_err(|error| self.failed("loading", error))?;
        Ok(Opened { decoder: decoder.with_one_token(one_token), inputs })
    }

    /// Number of tokens in its vocabulary; another exporter's graph is loaded to ask it.
    ///
    /// # Errors
    ///
    /// [`Error`] if that does not load, or is no decoder.
    pub fn vocab_size(
        &self,
        runtime: &Runtime,
        options: &session::Options,
    ) -> Result<usize, Error> {
        if let Some(artifact) = &self.artifact {
            return Ok(artifact.manifest.model.vocab_size);
        }
        Ok(self.load(&Form::AsItIs, runtime, &in_one_session(options))?.decoder.vocab_size())
    }

    /// Its cache of the first `length` tokens, one row.
    pub(super) fn prefix(
        &self,
        tokens: &Tokens,
        length: usize,
        runtime: &Runtime,
        options: &session::Options,
    ) -> Result<Vec<CacheEntry>, Error> {
        let mut opened = self.load(&Form::AsItIs, runtime, &in_one_session(options))?;
        let ids = tokens.prefix(length);
        for (chunk, ids) in ids.chunks(CHUNK).enumerate() {
            let ids = Array2::from_shape_fn((1, ids.len()), |(_, s)| ids[s]);
            let step = input(ids, chunk * CHUNK);
            opened.decoder.advance(&step).map_err(|e| self.failed("filling the cache", e))?;
        }
        opened.decoder.cache().map_err(|e| self.failed("filling the cache", e))
    }

    /// What its own routers decide on the steps of `script` that are timed.
    pub(super) fn decisions(
        &self,
        script: &Script,
        prefix: &[CacheEntry],
        runtime: &Runtime,
        options: &session::Options,
    ) -> Result<Vec<(Input, Routing)>, Error> {
        let Some(artifact) = &self.artifact else { return Ok(Vec::new()) };
        let mut watched = Watched::open(artifact, runtime, &script.session(options))?;
        if script.start > 0 {
            watched.restore(rows(prefix, script.batch(), script.start))?;
        }
        if !script.resets {
            for step in &script.warmup {
                watched.step(step)?;
            }
        }
        let mut decided = Vec::new();
        for step in script.distinct() {
            let routing = watched.step(step)?.routing;
            decided.extend(routing.map(|routing| (step.clone(), routing)));
        }
        Ok(decided)
    }

    /// A step's error, with its place.
    pub(super) fn failed(
        &self,
        doing: &'static str,
        source: crate::runtime::decoder::Error,
    ) -> Error {
        Error::Run { place: Place { directory: self.directory.clone(), doing }, source }
    }
}

impl Opened {
    /// Makes `routing` the decisions of the next step of a forced form.
    pub(super) fn force(
        &mut self,
        routing: &Routing,
    ) -> Result<(), crate::runtime::decoder::Error> {
        for input in &self.inputs {
            self.decoder.force(&input.name, &super::draws::biases(input, routing))?;
        }
        Ok(())
    }
}

/// `options` for what is not timed.
fn in_one_session(options: &session::Options) -> session::Options {
    session::Options { one_token_apart: false, ..options.clone() }
}

/// The first `length` tokens of a cache of one row, in every one of `batch` rows. What the cache is
/// shorter, its last token is repeated.
pub(super) fn rows(
    cache: &[CacheEntry],
    batch: usize,
    length: usize,
) -> impl Iterator<Item = CacheEntry> {
    let repeat = move |half: &Array4<f32>| {
        let (_, heads, cached, width) = half.dim();
        Array4::from_shape_fn((batch, heads, length, width), |(_, h, t, d)| {
            half[[0, h, t.min(cached - 1), d]]
        })
    };
    cache.iter().map(move |entry| CacheEntry {
        layer: entry.layer,
        key: repeat(&entry.key),
        value: repeat(&entry.value),
    })
}
