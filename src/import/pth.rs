//! The training code's `model.pth` as a checkpoint and its routers.
//!
//! The file holds the whole wrapped model: base weights under `model.layers.N.block.`, routers
//! beside them, and adapters after the second stage. Base weights go to `model.safetensors` under
//! their plain names, routers to `router.safetensors`, as `f32` whatever the dtype asked for:
//! rounding flips near ties. Adapters stay where they are; `--adapter` reads them from the file.
//!
//! The file states no configuration, so a `config.json` is asked for. The tokenizer files beside
//! it are copied with it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core as candle;
use serde_json::Value;
use skipgpt_passes::ir::DType;

use super::config::dtype_name;
use super::weights::{self, Entry};
use super::{Options, Report, directory, finish};
use crate::artifact::staging::Staging;
use crate::checkpoint::names::{self, Kind};
use crate::checkpoint::pth::{self, Archive};

/// Most bytes a `config.json` may have.
const CONFIG_LIMIT: u64 = 4 << 20;
const CONFIG: &str = "config.json";
const MODEL: &str = "model.safetensors";
/// The file that routers are written to.
pub const ROUTER: &str = "router.safetensors";
/// Files beside `config.json` that belong to a checkpoint and are copied as they are.
const COMPANIONS: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];

/// Why a `.pth` could not be imported.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No configuration was named.
    #[error(
        "{}: a .pth file does not state the model's configuration; name the config.json of the \
         model it was trained from with --config", path.display()
    )]
    NoConfig {
        /// The input.
        path: PathBuf,
    },
    /// The configuration could not be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The configuration is far too large for one.
    #[error("{}: {size} bytes long; a config.json has at most {CONFIG_LIMIT}", path.display())]
    LargeConfig {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The configuration is not a JSON object.
    #[error("{}: not a JSON object: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The archive is damaged or holds other things than tensors.
    #[error(transparent)]
    Archive(Box<pth::Error>),
    /// A tensor whose name has a form that is not read.
    #[error("{}: the tensor {name:?} shows {form}, which is not imported", path.display())]
    Name {
        /// The input.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// What its name shows.
        form: String,
    },
    /// One tensor under two names.
    #[error("{}: the tensors {first:?} and {second:?} are both {canonical}", path.display())]
    Duplicate {
        /// The input.
        path: PathBuf,
        /// One spelling.
        first: String,
        /// The other.
        second: String,
        /// The plain name.
        canonical: String,
    },
    /// A tensor that does not hold weights.
    #[error("{}: the tensor {name:?} holds {found}; expected f32, f16 or bf16", path.display())]
    Dtype {
        /// The input.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// Its dtype.
        found: &'static str,
    },
    /// A tensor that candle cannot widen.
    #[error("{}: the tensor {name:?} cannot be read: {source}", path.display())]
    Convert {
        /// The input.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// What candle said.
        source: Box<candle::Error>,
    },
    /// A weight that is NaN or infinite.
    #[error("{}: the tensor {name:?} holds {value} at position {at}", path.display())]
    NotFinite {
        /// The input.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// Where, row-major.
        at: usize,
        /// The value.
        value: f32,
    },
    /// Only adapters or routers.
    #[error(
        "{}: holds no base weights; give a file of routers to --router and one of adapters to \
         --adapter as it is", path.display()
    )]
    NoBase {
        /// The input.
        path: PathBuf,
    },
}

impl From<pth::Error> for Error {
    fn from(source: pth::Error) -> Self {
        Self::Archive(Box::new(source))
    }
}

/// The tensors of the file by what they are, each list sorted by plain name.
struct Contents {
    base: Vec<Named>,
    routers: Vec<Named>,
    adapters: usize,
}

/// A tensor to write, and what the file calls it.
struct Named {
    entry: Entry,
    original: String,
}

/// Writes the checkpoint directory of `options.input`.
pub fn import(
    options: &Options,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Report, super::Error> {
    let path =
        options.config.as_deref().ok_or_else(|| Error::NoConfig { path: options.input.clone() })?;
    let config = config(path, options.dtype)?;
    let archive = Archive::open(&options.input).map_err(Error::from)?;
    let Contents { base, routers, adapters } = contents(&archive, options)?;

    let bytes: u64 = base.iter().chain(&routers).map(|named| named.entry.bytes()).sum();
    let mut done = 0;
    let mut progress = |written| {
        done += written;
        progress(done, bytes)
    };

    let staging = directory::begin(options, bytes)?;
    staging.write(CONFIG, format!("{config:#}\n").as_bytes())?;
    let mut files = vec![CONFIG.to_owned()];
    files.extend(companions(path, &staging)?);
    for (name, tensors) in [(MODEL, &base), (ROUTER, &routers)] {
        if !tensors.is_empty() {
            let mut out = staging.create(name)?;
            write(&archive, tensors, options, &mut out, &mut progress)?;
            out.finish().map_err(|error| staging.explain(name, error))?;
            files.push(name.to_owned());
        }
    }
    finish(staging, options, (!routers.is_empty()).then_some(ROUTER))?;

    Ok(Report {
        output: options.output.clone(),
        architecture: config["model_type"].as_str().unwrap_or_default().to_owned(),
        tensors: base.len(),
        parameters: base.iter().map(|n| n.entry.bytes() / n.entry.dtype.size() as u64).sum(),
        bytes,
        router_tensors: routers.len(),
        adapter_tensors: adapters,
        files,
    })
}

/// The configuration, with the dtype that is written.
fn config(path: &Path, dtype: DType) -> Result<Value, Error> {
    let read = |source| Error::Read { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(read)?.len();
    if size > CONFIG_LIMIT {
        return Err(Error::LargeConfig { path: path.to_owned(), size });
    }
    let text = fs::read(path).map_err(read)?;
    let json = |reason| Error::Json { path: path.to_owned(), reason };
    let mut config: Value =
        serde_json::from_slice(&text).map_err(|source| json(source.to_string()))?;
    let Value::Object(fields) = &mut config else {
        return Err(json("expected { … }".into()));
    };
    // Later versions of transformers call it `dtype`; one key is enough for both.
    fields.shift_remove("dtype");
    fields.insert("torch_dtype".into(), dtype_name(dtype).into());
    Ok(config)
}

/// Copies the files that lie beside the configuration.
fn companions(config: &Path, staging: &Staging) -> Result<Vec<String>, super::Error> {
    let mut copied = Vec::new();
    for name in COMPANIONS {
        let path = config.with_file_name(name);
        match fs::read(&path) {
            Ok(contents) => {
                staging.write(name, &contents)?;
                copied.push((*name).to_owned());
            }
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::Read { path, source }.into()),
        }
    }
    Ok(copied)
}

fn contents(archive: &Archive, options: &Options) -> Result<Contents, Error> {
    let path = || options.input.clone();
    let (mut base, mut routers, mut adapters) = (BTreeMap::new(), BTreeMap::new(), 0);
    for found in archive.entries() {
        let original = found.name.clone();
        if !matches!(found.dtype, candle::DType::F32 | candle::DType::F16 | candle::DType::BF16) {
            let found = found.dtype.as_str();
            return Err(Error::Dtype { path: path(), name: original, found });
        }
        let names::Name { canonical, kind } = names::parse(&original);
        let (list, dtype) = match kind {
            Kind::Base if names::is_derived(&canonical) => continue,
            Kind::Base => (&mut base, options.dtype),
            Kind::Router { part: Some(_), .. } => (&mut routers, DType::F32),
            Kind::Router { part: None, .. } => {
                let form = "a router of an unknown form".into();
                return Err(Error::Name { path: path(), name: original, form });
            }
            Kind::Unsupported(form) => {
                return Err(Error::Name { path: path(), name: original, form: form.into() });
            }
            Kind::Lora { .. } => {
                adapters += 1;
                continue;
            }
        };
        let entry = Entry { name: canonical.clone(), shape: found.shape.clone(), dtype };
        let named = Named { entry, original: original.clone() };
        if let Some(first) = list.insert(canonical.clone(), named) {
            let (first, second) = (first.original, original);
            return Err(Error::Duplicate { path: path(), first, second, canonical });
        }
    }
    if base.is_empty() {
        return Err(Error::NoBase { path: path() });
    }
    let sorted = |list: BTreeMap<String, Named>| list.into_values().collect();
    Ok(Contents { base: sorted(base), routers: sorted(routers), adapters })
}

fn write(
    archive: &Archive,
    tensors: &[Named],
    options: &Options,
    out: &mut impl Write,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), super::Error> {
    let wrap = |source| super::Error::Weights { path: options.input.clone(), source };
    let entries: Vec<Entry> = tensors.iter().map(|named| named.entry.clone()).collect();
    weights::write_header(&entries, out).map_err(wrap)?;
    for Named { entry, original } in tensors {
        let tensor = archive.tensor(original).map_err(Error::from)?;
        let values: Vec<f32> = tensor
            .to_dtype(candle::DType::F32)
            .and_then(|tensor| tensor.flatten_all()?.to_vec1())
            .map_err(|source| Error::Convert {
                path: options.input.clone(),
                name: original.clone(),
                source: Box::new(source),
            })?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let (path, name, value) = (options.input.clone(), original.clone(), values[at]);
            return Err(Error::NotFinite { path, name, at, value }.into());
        }
        weights::put(&values, original, entry.dtype, out, progress).map_err(wrap)?;
    }
    Ok(())
}
