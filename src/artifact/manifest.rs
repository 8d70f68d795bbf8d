//! `manifest.json`: how an artifact was made, and what its files must be.
//!
//! Fields are written in one order and hold no time, no machine and no path outside the artifact
//! and the checkpoint: two exports of the same inputs have the same bytes.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::{self, DType, Dispatch, ModuleId};
use skipgpt_passes::plan::{Plan, Quantization};

use super::{Error, names};
use crate::decoder::{Logits, Sequences};
use crate::inspect::Work;
use crate::onnx::graph::Graph;
use crate::onnx::{Attention, proto};

mod plan;
mod quantization;
mod spelling;

use plan::PlanDef;
pub use plan::{plan_to_json, read_plan};
use spelling::{DTypeDef, auto_dispatch, dispatch, modules};

/// The version of the manifest this build writes and reads.
pub const VERSION: u32 = 3;

/// Everything known about an artifact without reading its graph or weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`VERSION`] of the writer.
    pub manifest_version: u32,
    /// Who wrote it.
    pub tool: Tool,
    /// What was asked for.
    pub options: Options,
    /// What was decided; `--plan` takes it back.
    #[serde(with = "PlanDef")]
    pub plan: Plan,
    /// The passes that ran, in order.
    pub passes: Vec<String>,
    /// The model's numbers.
    pub model: ModelFacts,
    /// Which modules are routed, and how.
    pub routing: Routing,
    /// Layers with a cache, in the order of the cache inputs and outputs.
    pub cache_layers: Vec<usize>,
    /// Parameters and multiply-adds.
    pub work: Work,
    /// The graph's interface; absent for `--format safetensors`.
    pub graph: Option<GraphFacts>,
    /// Every file that was read, relative to the checkpoint's directory where it lies there.
    pub inputs: Vec<FileRecord>,
    /// Every file of the artifact but this one.
    pub outputs: Vec<FileRecord>,
}

/// The program that wrote a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// The options of an export.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// What was written.
    pub format: Format,
    /// Element type of the weights and of the cache.
    #[serde(with = "DTypeDef")]
    pub dtype: DType,
    /// Whether the weights were copied or shared.
    pub weights: Weights,
    /// The dispatch asked for; `None` is `auto`.
    #[serde(with = "auto_dispatch")]
    pub dispatch: Option<Dispatch>,
    /// Whether the graph also gives its routing.
    pub emit_routing: bool,
    /// How attention was lowered.
    pub attention: Attention,
    /// Of which positions the graph gives logits; every one where an earlier build did not say.
    #[serde(default)]
    pub logits: Logits,
    /// Which sequences the graph takes; any where an earlier build did not say.
    #[serde(default)]
    pub sequences: Sequences,
    /// Modules kept for at most this share of tokens were removed.
    pub prune_below: Option<f64>,
    /// Modules kept for at least this share of tokens lost their router.
    pub always_above: Option<f64>,
}

/// The two back ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// An ONNX graph with external weights.
    Onnx,
    /// A Hugging Face checkpoint.
    Safetensors,
}

/// Where an ONNX artifact's weights lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    /// In `model.onnx.data`.
    Copy,
    /// In the checkpoint's own files, hard-linked into the artifact.
    Link,
}

/// The numbers of [`ir::Config`] that a client needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// The checkpoint's `model_type`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Longest sequence the checkpoint was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Layers of the checkpoint, before any removal.
    pub num_hidden_layers: usize,
}

/// Which modules are routed, and how.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Routing {
    /// The routed modules, in the order of the routing output: layer by layer, attention first.
    #[serde(with = "modules")]
    pub routed: Vec<ModuleId>,
    /// The graph's values that hold the routers' margins; empty before lowering.
    pub routers: Vec<Router>,
    /// How routed attention modules skip; absent where there is none, or before lowering.
    #[serde(with = "dispatch")]
    pub attention_dispatch: Option<Dispatch>,
    /// How routed MLP modules skip; absent where there is none, or before lowering.
    #[serde(with = "dispatch")]
    pub mlp_dispatch: Option<Dispatch>,
    /// Modules that were removed.
    #[serde(with = "modules")]
    pub removed: Vec<ModuleId>,
    /// Modules that lost their router and run for every token.
    #[serde(with = "modules")]
    pub always: Vec<ModuleId>,
}

/// A value of the graph: `f32` `[batch, sequence, columns]`; a token is kept at 0 or more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Router {
    /// Its name.
    pub margins: String,
    /// Whose margins they are, column by column.
    #[serde(with = "modules")]
    pub modules: Vec<ModuleId>,
    /// Whether as many columns more hold the negatives, for the graph's own use.
    #[serde(default)]
    pub negatives: bool,
}

impl From<&Router> for crate::onnx::RouterMargins {
    fn from(Router { margins, modules, negatives }: &Router) -> Self {
        Self { value: margins.clone(), modules: modules.clone(), negatives: *negatives }
    }
}

/// What the graph takes, gives and is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GraphFacts {
    /// Version of the standard operators.
    pub opset: i64,
    /// IR version of the file.
    pub ir_version: i64,
    /// The oldest ONNX Runtime that runs it.
    pub min_onnxruntime: String,
    /// Names of the inputs, in order.
    pub inputs: Vec<String>,
    /// Names of the outputs, in order.
    pub outputs: Vec<String>,
    /// How many nodes there are of each operator, branches included.
    pub operators: BTreeMap<String, usize>,
}

/// A file, by what it must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Relative, with `/` between folders.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// In lower-case hexadecimal.
    pub sha256: String,
}

impl Tool {
    /// This build.
    pub fn this() -> Self {
        Self {
            name: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

impl ModelFacts {
    /// The numbers of `config`.
    pub fn of(config: &ir::Config) -> Self {
        Self {
            architecture: spelling::architecture(config.architecture).to_owned(),
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            max_position_embeddings: config.max_position_embeddings,
            num_hidden_layers: config.num_hidden_layers,
        }
    }
}

impl Routing {
    /// The routing of `model`, after the removals of `plan`.
    pub fn of(model: &ir::Model, plan: &Plan) -> Self {
        let (removed, always) = (plan.removed.clone(), plan.always.clone());
        Self { removed, always, ..Self::of_model(model) }
    }

    /// The routed modules of `model`.
    pub fn of_model(model: &ir::Model) -> Self {
        let mut routing = Self::default();
        for module in model.routed_modules() {
            routing.routed.push(module);
            if let Some(ir::Routing::Routed { dispatch, .. }) = model.routing(module) {
                match module.kind {
                    ir::ModuleKind::Attention => routing.attention_dispatch = *dispatch,
                    ir::ModuleKind::Mlp => routing.mlp_dispatch = *dispatch,
                }
            }
        }
        if model.phase == ir::Phase::Lowered {
            let routers = crate::onnx::router_margins(model).into_iter();
            routing.routers = routers
                .map(|crate::onnx::RouterMargins { value, modules, negatives }| Router {
                    margins: value,
                    modules,
                    negatives,
                })
                .collect();
        }
        routing
    }
}

impl GraphFacts {
    /// The interface of `graph`.
    pub fn of(graph: &Graph, min_onnxruntime: &str) -> Self {
        let mut operators = BTreeMap::new();
        for node in graph.all_nodes() {
            let name = match node.domain {
                "" => node.op.to_owned(),
                domain => format!("{domain}.{}", node.op),
            };
            *operators.entry(name).or_default() += 1;
        }
        Self {
            opset: proto::OPSET,
            ir_version: proto::IR_VERSION,
            min_onnxruntime: min_onnxruntime.to_owned(),
            inputs: graph.inputs.iter().map(|value| value.name.clone()).collect(),
            outputs: graph.outputs.iter().map(|value| value.name.clone()).collect(),
            operators,
        }
    }
}

impl Manifest {
    /// What the weights are stored in, in words.
    pub fn precision(&self) -> String {
        let dtype = self.options.dtype;
        let Some(Quantization { scheme, embedding, head }) = self.plan.quantization else {
            return dtype.to_string();
        };
        let beside = match (embedding, head) {
            (true, true) => "",
            (true, false) => "head and ",
            (false, true) => "embedding and ",
            (false, false) => "embedding, head and ",
        };
        format!("{scheme}; {beside}norms, biases, hidden states and cache in {dtype}")
    }

    /// The file's text.
    pub fn to_json(&self) -> Result<Vec<u8>, Error> {
        super::clients::json(names::MANIFEST, self)
    }

    /// Reads the manifest of the artifact at `directory`.
    ///
    /// # Errors
    ///
    /// [`Error::NotAnArtifact`] if there is none, [`Error::Version`] if a later build wrote it,
    /// [`Error::Json`] if it does not read as one, [`Error::UnsafeName`] if it lists a file outside
    /// the directory.
    pub fn read(directory: &Path) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Head {
            manifest_version: u32,
            tool: Tool,
        }
        let path = directory.join(names::MANIFEST);
        let bytes = fs::read(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory if directory.exists() => {
                Error::NotAnArtifact(directory.to_path_buf())
            }
            _ => Error::io("read", &path, error),
        })?;
        let json = |source| Error::Json { path: path.clone(), source };
        let head: Head = serde_json::from_slice(&bytes).map_err(json)?;
        if head.tool.name != env!("CARGO_PKG_NAME") {
            return Err(Error::NotAnArtifact(directory.to_path_buf()));
        }
        if head.manifest_version != VERSION {
            return Err(Error::Version {
                path: path.clone(),
                found: head.manifest_version,
                writer: head.tool.version,
            });
        }
        let manifest: Self = serde_json::from_slice(&bytes).map_err(json)?;
        for record in &manifest.outputs {
            if !is_plain(&record.name) {
                return Err(Error::UnsafeName { path, name: record.name.clone() });
            }
        }
        Ok(manifest)
    }
}

/// Whether `name` is a file of the directory itself.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(
        (components.next(), components.next()),
        (Some(std::path::Component::Normal(only)), None) if only == name
    )
}

/// Checks that `directory` may be replaced: it is empty, or an artifact and nothing else.
///
/// # Errors
///
/// [`Error::NotReplaceable`] names what would be lost.
pub fn replaceable(directory: &Path) -> Result<(), Error> {
    let refuse = |found| Error::NotReplaceable { path: directory.to_path_buf(), found };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(refuse("it is not a directory".to_owned()));
        }
        Err(error) => return Err(Error::io("list", directory, error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::io("list", directory, error))?;
        found.push(entry.file_name().to_string_lossy().into_owned());
    }
    found.sort();
    if found.is_empty() {
        return Ok(());
    }
    let manifest = match Manifest::read(directory) {
        Ok(manifest) => manifest,
        Err(Error::NotAnArtifact(_)) => {
            return Err(refuse(format!("it holds {} and no artifact's manifest", found[0])));
        }
        Err(error) => return Err(error),
    };
    let ours = |name: &String| {
        name == names::MANIFEST || manifest.outputs.iter().any(|record| record.name == *name)
    };
    match found.iter().find(|name| !ours(name)) {
        Some(other) => Err(refuse(format!("it also holds {other}, which no export wrote"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
