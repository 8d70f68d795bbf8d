//! What `inspect` says about an artifact or a checkpoint.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use skipgpt_passes::ir::{Model, Phase};
use skipgpt_passes::plan::Plan;

use super::Work;
use crate::artifact::Artifact;
use crate::artifact::manifest::{
    FileRecord, GraphFacts, Manifest, ModelFacts, Options, Routing, Tool,
};

/// Everything `inspect` tells, in the order in which it tells it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// `artifact` or `checkpoint`.
    pub kind: &'static str,
    /// Who wrote the artifact.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool: Option<Tool>,
    /// What an artifact's weights are stored in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// The options of the export.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<Options>,
    /// How far the model is lowered; for a checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// The passes that ran.
    pub passes: Vec<String>,
    /// The model's numbers.
    pub model: ModelFacts,
    /// Parameters and multiply-adds.
    pub work: Work,
    /// The whole model's.
    pub totals: Totals,
    /// Routed, removed and always-run modules.
    pub routing: Routing,
    /// Layers with a cache.
    pub cache_layers: Vec<usize>,
    /// The graph's interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub graph: Option<GraphFacts>,
    /// Files with their sizes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileRecord>,
}

/// Sums over the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Weights, biases included.
    pub parameters: u64,
    /// Multiply-adds for one token of which no module is skipped, the attention core apart.
    pub multiply_adds: u64,
    /// Modules that are routed.
    pub routed_modules: usize,
    /// Modules that run for every token.
    pub dense_modules: usize,
    /// Bytes of the artifact's files; 0 for a checkpoint.
    pub file_bytes: u64,
}

impl Report {
    /// What an artifact's manifest says.
    pub fn of_artifact(artifact: &Artifact) -> Self {
        let precision = Some(artifact.manifest.precision());
        let Manifest {
            tool,
            options,
            passes,
            model,
            routing,
            cache_layers,
            work,
            graph,
            outputs,
            ..
        } = artifact.manifest.clone();
        let modules = 2 * model.num_hidden_layers;
        let totals = Totals {
            parameters: work.total().parameters,
            multiply_adds: work.total().multiply_adds,
            routed_modules: routing.routed.len(),
            dense_modules: modules.saturating_sub(routing.routed.len() + routing.removed.len()),
            file_bytes: outputs.iter().map(|file| file.size).sum(),
        };
        Self {
            kind: "artifact",
            tool: Some(tool),
            precision,
            options: Some(options),
            phase: None,
            passes,
            model,
            work,
            totals,
            routing,
            cache_layers,
            graph,
            files: outputs,
        }
    }

    /// What a model costs, in any phase; `plan` says what was removed on the way.
    pub fn of_model(model: &Model, plan: Option<&Plan>, passes: &[&str]) -> Self {
        let work = Work::of(model);
        let mut routing = match plan {
            Some(plan) => Routing::of(model, plan),
            None => Routing::of_model(model),
        };
        let present = model
            .layers
            .iter()
            .map(|l| usize::from(l.attention.is_some()) + usize::from(l.mlp.is_some()))
            .sum::<usize>();
        if model.phase < Phase::Frozen {
            // Nothing is removed yet, whatever the plan says.
            routing.removed.clear();
            routing.always.clear();
        }
        let totals = Totals {
            parameters: work.total().parameters,
            multiply_adds: work.total().multiply_adds,
            routed_modules: routing.routed.len(),
            dense_modules: present - routing.routed.len(),
            file_bytes: 0,
        };
        Self {
            kind: "checkpoint",
            tool: None,
            precision: None,
            options: None,
            phase: Some(model.phase.to_string()),
            passes: passes.iter().map(ToString::to_string).collect(),
            model: ModelFacts::of(&model.config),
            work,
            totals,
            routing,
            cache_layers: model.cached_layers().collect(),
            graph: None,
            files: Vec::new(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = &self.model;
        writeln!(
            f,
            "{} of a {} model: {} layers, hidden size {}, {}/{} heads of {}, {} tokens",
            self.kind,
            m.architecture,
            m.num_hidden_layers,
            m.hidden_size,
            m.num_attention_heads,
            m.num_key_value_heads,
            m.head_dim,
            m.vocab_size
        )?;
        if let (Some(tool), Some(options)) = (&self.tool, &self.options) {
            let (format, weights) = (name(&options.format), name(&options.weights));
            writeln!(
                f,
                "written by {} {}: {format}, {}, weights: {weights}",
                tool.name,
                tool.version,
                self.precision.as_deref().unwrap_or_default()
            )?;
        }
        if let Some(phase) = &self.phase {
            writeln!(f, "phase: {phase}")?;
        }
        if !self.passes.is_empty() {
            writeln!(f, "passes: {}", self.passes.join(", "))?;
        }
        let t = &self.totals;
        write!(f, "modules: {} routed, {} dense", t.routed_modules, t.dense_modules)?;
        writeln!(f, ", {} removed", self.routing.removed.len())?;
        list(f, "removed", &self.routing.removed)?;
        list(f, "always", &self.routing.always)?;
        for (kind, dispatch) in
            [("attention", self.routing.attention_dispatch), ("mlp", self.routing.mlp_dispatch)]
        {
            if let Some(dispatch) = dispatch {
                writeln!(f, "{kind} dispatch: {dispatch}")?;
            }
        }
        writeln!(f, "layers with a cache: {}", self.cache_layers.len())?;
        writeln!(f, "\n{}", self.work)?;
        if let Some(graph) = &self.graph {
            writeln!(
                f,
                "\nONNX opset {}, needs ONNX Runtime {} or later",
                graph.opset, graph.min_onnxruntime
            )?;
            writeln!(f, "inputs: {}", summary(&graph.inputs))?;
            writeln!(f, "outputs: {}", summary(&graph.outputs))?;
            writeln!(f, "nodes: {}", graph.operators.values().sum::<usize>())?;
            for (operator, count) in by_count(&graph.operators) {
                writeln!(f, "{count:>8}  {operator}")?;
            }
        }
        if !self.files.is_empty() {
            writeln!(f, "\nfiles: {} bytes", t.file_bytes)?;
            for file in &self.files {
                writeln!(f, "{:>14}  {}", file.size, file.name)?;
            }
        }
        Ok(())
    }
}

/// The name JSON gives a unit variant.
fn name(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

fn list(
    f: &mut fmt::Formatter<'_>,
    what: &str,
    modules: &[skipgpt_passes::ir::ModuleId],
) -> fmt::Result {
    if modules.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = modules.iter().map(ToString::to_string).collect();
    writeln!(f, "{what}: {}", names.join(", "))
}

/// The names, those of the caches counted instead of listed.
fn summary(names: &[String]) -> String {
    let is_cache =
        |name: &&String| name.starts_with("past_key_values.") || name.starts_with("present.");
    let caches = names.iter().filter(is_cache).count();
    let mut all: Vec<_> = names.iter().filter(|name| !is_cache(name)).cloned().collect();
    if caches > 0 {
        all.push(format!("{caches} cache tensors"));
    }
    all.join(", ")
}

/// The most frequent first.
fn by_count(operators: &BTreeMap<String, usize>) -> Vec<(&String, usize)> {
    let mut counts: Vec<_> = operators.iter().map(|(name, count)| (name, *count)).collect();
    counts.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    counts
}
