//! Other formats to a plain Hugging Face checkpoint directory.
//!
//! ```text
//! MODEL.gguf ── gguf (header) ──▶ config, names, rope ──▶ config.json, generation_config.json
//!                  │          └─▶ tokenizer ──▶ tokenizer.json, tokenizer_config.json, …
//!                  └─ quantized ─▶ weights ──▶ model.safetensors, a few rows at a time
//! model.pth + config.json ── pth ─▶ the same, and router.safetensors
//! ```
//!
//! Whatever would make the directory compute something else than the file is refused by name.

pub mod config;
mod directory;
pub mod gguf;
pub mod metadata;
pub mod names;
pub mod pth;
pub mod quantized;
pub mod rope;
pub mod tokenizer;
pub mod weights;

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::Serialize;
use skipgpt_passes::ir::DType;

use config::{Config, WeightFacts};
use gguf::Gguf;
use metadata::Metadata;
use weights::Entry;

use crate::artifact::{self, staging::Staging};
use crate::checkpoint;

/// What to import, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The file to read.
    pub input: PathBuf,
    /// The checkpoint directory to make.
    pub output: PathBuf,
    /// Whether an existing output is replaced.
    pub force: bool,
    /// How weights are written.
    pub dtype: DType,
    /// The `config.json` of a `.pth` file, which states none.
    pub config: Option<PathBuf>,
}

impl Options {
    /// From `input` to a new directory `output`, weights as `f32`.
    pub fn new(input: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            input: input.into(),
            output: output.into(),
            force: false,
            dtype: DType::F32,
            config: None,
        }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The checkpoint directory.
    pub output: PathBuf,
    /// Its `model_type`.
    pub architecture: String,
    /// Number of base tensors.
    pub tensors: usize,
    /// Number of base weights.
    pub parameters: u64,
    /// Bytes of all tensors written.
    pub bytes: u64,
    /// Number of tensors in `router.safetensors`.
    pub router_tensors: usize,
    /// Number of adapter tensors that stay in the input.
    pub adapter_tensors: usize,
    /// The files, relative to the directory.
    pub files: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { output, architecture, tensors, router_tensors, adapter_tensors, .. } = self;
        let (millions, megabytes) = (self.parameters as f64 / 1e6, self.bytes as f64 / 1e6);
        write!(
            f,
            "{}: {architecture}, {millions:.1} M weights in {tensors} tensors, {megabytes:.1} MB",
            output.display()
        )?;
        if *router_tensors > 0 {
            write!(f, "\nrouters: {router_tensors} tensors in {}", pth::ROUTER)?;
        }
        if *adapter_tensors > 0 {
            write!(
                f,
                "\nadapters: {adapter_tensors} tensors stay in the input; \
                 give it to --adapter, with --lora-alpha"
            )?;
        }
        Ok(())
    }
}

/// Why nothing was imported. The output is then as it was before.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The input is no format that is read.
    #[error("{}: expected a file called *.gguf, *.pth or *.pt", path.display())]
    Format {
        /// The input.
        path: PathBuf,
    },
    /// The header does not hold together, or the file cannot be read.
    #[error("{}: {source}", path.display())]
    Gguf {
        /// The input.
        path: PathBuf,
        /// What is wrong.
        source: gguf::Error,
    },
    /// The model is not one that can be imported.
    #[error("{}: {source}", path.display())]
    Config {
        /// The input.
        path: PathBuf,
        /// What is wrong.
        source: config::Error,
    },
    /// The tensors are not those of the model.
    #[error("{}: {source}", path.display())]
    Names {
        /// The input.
        path: PathBuf,
        /// What is wrong.
        source: names::Error,
    },
    /// Rotary divisors that no known scaling gives.
    #[error(
        "{}: the tensor {:?} holds divisors that no llama3 rope scaling gives; \
         config.json could not state them", path.display(), names::ROPE_FREQS
    )]
    RopeFreqs {
        /// The input.
        path: PathBuf,
    },
    /// Rotary divisors of another number than the heads have pairs.
    #[error(
        "{}: the tensor {:?} has shape {found:?}; heads of width {head_dim} need [{}]",
        path.display(), names::ROPE_FREQS, head_dim / 2
    )]
    RopeShape {
        /// The input.
        path: PathBuf,
        /// The tensor's shape.
        found: Vec<usize>,
        /// Width of a head.
        head_dim: usize,
    },
    /// Rotary divisors and another scaling.
    #[error(
        "{}: both the tensor {:?} and rope.scaling.* stretch the rotary frequencies",
        path.display(), names::ROPE_FREQS
    )]
    RopeTwice {
        /// The input.
        path: PathBuf,
    },
    /// The tokenizer cannot be rebuilt.
    #[error("{}: {source}", path.display())]
    Tokenizer {
        /// The input.
        path: PathBuf,
        /// What is wrong.
        source: tokenizer::Error,
    },
    /// A tensor could not be read or written.
    #[error("{}: {source}", path.display())]
    Weights {
        /// The input.
        path: PathBuf,
        /// What is wrong.
        source: weights::Error,
    },
    /// The `.pth` file or its configuration is not what it should be.
    #[error(transparent)]
    Pth(#[from] pth::Error),
    /// What was written is no checkpoint that can be exported.
    #[error("{}: the checkpoint made of it is not whole: {source}", path.display())]
    Checkpoint {
        /// The input.
        path: PathBuf,
        /// What the checkpoint reader said.
        source: Box<checkpoint::Error>,
    },
    /// A configuration for a file that has its own.
    #[error("{}: a GGUF file states the model's configuration; leave --config out", path.display())]
    Configured {
        /// The input.
        path: PathBuf,
    },
    /// The output could not be made.
    #[error(transparent)]
    Output(#[from] artifact::Error),
}

/// Reads `options.input` and writes the checkpoint directory `options.output`, whole or not at all.
///
/// `progress` gets the bytes of tensors written so far and their total, and may stop it.
///
/// # Errors
///
/// Whatever is wrong with the input, or cannot be written; the output is then as it was.
pub fn import(
    options: &Options,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Report, Error> {
    let extension = options.input.extension().and_then(|extension| extension.to_str());
    match extension.map(str::to_ascii_lowercase).as_deref() {
        Some("gguf") => import_gguf(options, progress),
        Some("pth" | "pt") => pth::import(options, progress),
        _ => Err(Error::Format { path: options.input.clone() }),
    }
}

fn import_gguf(
    options: &Options,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Report, Error> {
    let path = || options.input.clone();
    if options.config.is_some() {
        return Err(Error::Configured { path: path() });
    }
    let mut gguf =
        Gguf::open(&options.input).map_err(|source| Error::Gguf { path: path(), source })?;
    let metadata = Metadata(&gguf.metadata);
    let mut config =
        Config::read(metadata).map_err(|source| Error::Config { path: path(), source })?;
    let jobs = names::jobs(&config, &gguf.tensors)
        .map_err(|source| Error::Names { path: path(), source })?;
    let tokenizer = tokenizer::build(metadata, jobs.vocab, config.context)
        .map_err(|source| Error::Tokenizer { path: path(), source })?;
    rope_table(&mut gguf, &mut config, &options.input)?;

    let facts = WeightFacts {
        vocab: jobs.vocab,
        tied: jobs.tied,
        attention_bias: jobs.attention_bias,
        mlp_bias: jobs.mlp_bias,
        dtype: options.dtype,
    };
    let total = weights::entries(&jobs.jobs, options.dtype).iter().map(Entry::bytes).sum();
    let mut files = vec![
        ("config.json".into(), format!("{:#}\n", config.to_json(&facts, &tokenizer.ids))),
        (
            "generation_config.json".into(),
            format!("{:#}\n", config::generation_json(&tokenizer.ids)),
        ),
    ];
    files.extend(tokenizer.files);

    let staging = directory::begin(options, total)?;
    for (name, contents) in &files {
        staging.write(name, contents.as_bytes())?;
    }
    let name = "model.safetensors";
    let mut out = staging.create(name)?;
    let mut done = 0;
    weights::write(&mut gguf.file, &jobs.jobs, options.dtype, &mut out, &mut |bytes| {
        done += bytes;
        progress(done, total)
    })
    .map_err(|source| Error::Weights { path: path(), source })?;
    out.finish().map_err(|error| staging.explain(name, error))?;
    finish(staging, options, None)?;

    Ok(Report {
        output: options.output.clone(),
        architecture: config.architecture.name().into(),
        tensors: jobs.jobs.len(),
        parameters: total / options.dtype.size() as u64,
        bytes: total,
        router_tensors: 0,
        adapter_tensors: 0,
        files: files.into_iter().map(|(name, _)| name).chain([name.to_owned()]).collect(),
    })
}

/// Reads back what was written, as an export would, and puts it in its place.
fn finish(staging: Staging, options: &Options, router: Option<&str>) -> Result<(), Error> {
    let router = router.map(|name| staging.path().join(name));
    checkpoint::read(&checkpoint::Request {
        model: Some(staging.path()),
        router: router.as_deref(),
        ..checkpoint::Request::default()
    })
    .map_err(|source| Error::Checkpoint {
        path: options.input.clone(),
        source: Box::new(source),
    })?;
    Ok(staging.commit()?)
}

/// Turns a table of rotary divisors into the configuration that gives it.
fn rope_table(gguf: &mut Gguf, config: &mut Config, path: &Path) -> Result<(), Error> {
    use skipgpt_passes::ir::RopeScaling;

    let path = || path.to_owned();
    let Some(tensor) = gguf.tensors.get(names::ROPE_FREQS) else { return Ok(()) };
    if tensor.shape != [config.head_dim / 2] {
        let found = tensor.shape.clone();
        return Err(Error::RopeShape { path: path(), found, head_dim: config.head_dim });
    }
    if config.rope_scaling != RopeScaling::None {
        return Err(Error::RopeTwice { path: path() });
    }
    let table = quantized::read_rows(&mut gguf.file, tensor, 0..1)
        .map_err(|source| Error::Weights { path: path(), source: source.into() })?;
    config.rope_scaling = rope::recognise(&table, config.rope_theta)
        .ok_or_else(|| Error::RopeFreqs { path: path() })?;
    Ok(())
}
