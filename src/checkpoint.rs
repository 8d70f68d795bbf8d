//! The front end: a checkpoint directory, routers and an adapter become an [`ir::Model`] and its
//! [`Sources`].
//!
//! Files are believed only after they are checked, and what would change the model's numbers
//! without being understood is refused by name: a config key, a tensor nobody asked for, an object
//! in a pickle. No tensor of a safetensors file is read here; the model only says where it lies.

mod build;
pub mod catalog;
pub mod config;
pub mod directory;
pub mod files;
pub(crate) mod names;
pub mod peft;
pub mod pth;
pub mod router;
pub mod safetensors;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use skipgpt_passes::ir;

use crate::sources::{self, Sources};

/// What is to be read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request<'a> {
    /// Hugging Face directory: `config.json` and safetensors, single or sharded.
    pub model: Option<&'a Path>,
    /// Routers: `.safetensors` or `.pth`. Without it, those among the checkpoint's own tensors.
    pub router: Option<&'a Path>,
    /// `LoRA`: a PEFT directory or a `.pth`.
    pub adapter: Option<&'a Path>,
    /// Alpha of an adapter whose file does not state it (`.pth`): its scale is `alpha / rank`.
    pub lora_alpha: Option<f64>,
}

/// A model as imported, and where its tensors lie.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// In [`ir::Phase::Imported`], validated.
    pub model: ir::Model,
    /// Its tensors, by canonical name, and no others.
    pub sources: Sources,
    /// The checkpoint's directory.
    pub directory: PathBuf,
    /// Every file that was read, in a fixed order: what the manifest hashes.
    pub files: Vec<PathBuf>,
}

/// Why a checkpoint could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing was named.
    #[error("no checkpoint is named; give a Hugging Face directory with --model")]
    NoModel,
    /// What was named is no directory.
    #[error("{}: not a directory; expected a Hugging Face checkpoint with config.json", path.display())]
    NotADirectory {
        /// What was named.
        path: PathBuf,
    },
    /// `config.json` is not what it should be.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The weight files are not what they should be.
    #[error(transparent)]
    Directory(#[from] directory::Error),
    /// A tensor is not what it should be.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    /// The routers are not what they should be.
    #[error(transparent)]
    Router(#[from] router::Error),
    /// The adapter is not what it should be.
    #[error(transparent)]
    Adapter(#[from] peft::Error),
    /// A tensor could not be read.
    #[error(transparent)]
    Source(#[from] sources::Error),
    /// The files lack a tensor.
    #[error("{}: tensor {name} of shape {shape:?} is missing; fetch the checkpoint again, or correct config.json (num_hidden_layers, tie_word_embeddings, attention_bias, mlp_bias, model_type)", directory.display())]
    Missing {
        /// The checkpoint.
        directory: PathBuf,
        /// Its canonical name.
        name: String,
        /// The shape it would have.
        shape: Vec<usize>,
    },
    /// The files hold more layers than `config.json` states.
    #[error("{}: tensor {name} is of layer {layer}; config.json states num_hidden_layers {layers}", path.display())]
    ExtraLayer {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
        /// Its layer.
        layer: usize,
        /// How many `config.json` states.
        layers: usize,
    },
    /// The files hold a tensor the model has no place for.
    #[error("{}: tensor {name} has no place in the model that config.json describes; remove it, or correct the config (attention_bias, mlp_bias, tie_word_embeddings, model_type)", path.display())]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        name: String,
    },
    /// The head is tied to the embedding, and another head is there.
    #[error("{}: config.json states tie_word_embeddings, and lm_head.weight is there with other values than model.embed_tokens.weight; set tie_word_embeddings to false or remove lm_head.weight", directory.display())]
    TiedHead {
        /// The checkpoint.
        directory: PathBuf,
    },
    /// The model breaks a rule of the IR.
    #[error("the checkpoint is not a valid model:\n{}", violations.join("\n"))]
    Invalid {
        /// Every rule it breaks, with its place.
        violations: Vec<String>,
    },
}

type Result<T, E = Error> = std::result::Result<T, E>;

/// Reads a checkpoint, its routers and its adapter.
///
/// # Errors
///
/// [`Error`] names the file and what is wrong in it: damage, a config key or an adapter setting
/// that is not supported, a tensor that is missing, superfluous or of the wrong shape or dtype.
pub fn read(request: &Request<'_>) -> Result<Checkpoint> {
    let directory = request.model.ok_or(Error::NoModel)?;
    if !directory.is_dir() {
        return Err(Error::NotADirectory { path: directory.to_owned() });
    }
    let config_path = directory.join("config.json");
    let config = config::read(&config_path)?;
    let (mut base, weights) = directory::read(directory)?;
    let mut files = vec![config_path];
    files.extend(weights);

    let own_routers = router::Routers::pick(&mut base)?;
    let routers = match request.router {
        None => own_routers,
        Some(path) => {
            files.push(path.to_owned());
            Some(router::Routers::open(path)?)
        }
    };
    let adapter = match request.adapter {
        None => None,
        Some(path) => {
            let (adapter, read) = peft::Adapter::open(path, request.lora_alpha)?;
            files.extend(read);
            Some(adapter)
        }
    };
    let mut seen = BTreeSet::new();
    files.retain(|path| seen.insert(path.clone()));
    let parts = build::Parts { config, base, routers, adapter, sources: Sources::new() };
    let (model, sources) = parts.build()?;
    Ok(Checkpoint { model, sources, directory: directory.to_owned(), files })
}
