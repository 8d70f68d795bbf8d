//! The front end: a checkpoint directory, routers and an adapter become an [`ir::Model`] and its
//! [`Sources`].

use std::path::{Path, PathBuf};

use skipgpt_passes::ir;

use crate::sources::Sources;

/// What is to be read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request<'a> {
    /// Hugging Face directory: `config.json` and safetensors, single or sharded.
    pub model: Option<&'a Path>,
    /// Routers: `.safetensors` or `.pth`.
    pub router: Option<&'a Path>,
    /// LoRA: a PEFT directory or a `.pth`.
    pub adapter: Option<&'a Path>,
    /// `alpha / rank` for adapters whose file does not state it (`.pth`).
    pub lora_alpha: Option<f64>,
}

/// A model as imported, and where its tensors lie.
#[derive(Debug)]
pub struct Checkpoint {
    /// In [`ir::Phase::Imported`], validated.
    pub model: ir::Model,
    /// Its tensors.
    pub sources: Sources,
    /// The checkpoint's directory.
    pub directory: PathBuf,
    /// Every file that was read, in a fixed order: what the manifest hashes.
    pub files: Vec<PathBuf>,
}
