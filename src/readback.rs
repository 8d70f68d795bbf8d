//! What an artifact in few bits is verified against: the checkpoint with the values that the
//! artifact's own bytes stand for.
//!
//! A quantised model is another model than its checkpoint, so its reference has to be quantised too.
//! Were it quantised by the same code from the same passes' result, a wrong pass or a wrong code
//! would cancel itself out. Instead the codes are read back from the artifact, and each matrix must
//! be what the *imported* checkpoint has in its place, up to what the bits can hold.
//!
//! Which codes belong to which projection is known by lowering the checkpoint again and asking each
//! quantised expression what it is made of; where they lie, by the artifact's model file.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use skipgpt_passes::ir::{DType, Linear, Model, Stored, Weight};
use skipgpt_passes::plan::Plan;
use skipgpt_passes::quantization::Bits;
use skipgpt_passes::{PASSES, Violations, pass, prune_modules, validate};

use crate::artifact::{self, Artifact, names};
use crate::checkpoint::Checkpoint;
use crate::onnx::graph::{Data, Graph, Part, Placement, Quantized};
use crate::onnx::{self, proto};
use crate::packed;
use crate::sources;
use crate::weights;

/// Why an artifact's weights could not be read back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The artifact is damaged.
    #[error(transparent)]
    Artifact(#[from] artifact::Error),
    /// Its model file cannot be read.
    #[error(transparent)]
    Proto(#[from] proto::Error),
    /// The plan does not fit the checkpoint.
    #[error("the artifact's plan does not fit this checkpoint: {0}")]
    Plan(#[source] pass::Unsupported),
    /// The checkpoint could not be lowered as the artifact was.
    #[error("the checkpoint cannot be lowered by the artifact's plan: {0}")]
    Lower(#[from] pass::Error),
    /// A pass left an invalid model: our bug.
    #[error("the lowered checkpoint is not valid: {0}")]
    Invalid(#[from] Violations),
    /// The model of an artifact has no graph: our bug.
    #[error(transparent)]
    Graph(#[from] onnx::Error),
    /// The artifact's graph names its weights differently.
    #[error(
        "{}: has no initializer {name}; was it exported by another version, or from another checkpoint?",
        path.display()
    )]
    NoInitializer {
        /// The model file.
        path: PathBuf,
        /// What was looked for.
        name: String,
    },
    /// The data file cannot be opened.
    #[error("{}: cannot be opened: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A weight that should be in few bits is part of no such matrix: our bug.
    #[error("{0}: is quantised, and no matrix of the graph holds it")]
    NotFound(String),
    /// A tensor is there twice: our bug.
    #[error(transparent)]
    Source(#[from] sources::Error),
    /// A weight of the checkpoint could not be evaluated.
    #[error("{path}: {source}")]
    Weight {
        /// Where it stands.
        path: String,
        /// Why.
        source: weights::Error,
    },
}

/// How near the artifact's matrices are to the checkpoint's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Nearness {
    /// Whether every row is within the bound.
    pub passed: bool,
    /// Matrices compared.
    pub matrices: usize,
    /// The largest distance of a row, as a share of its length.
    pub max_row_error: f64,
    /// The largest allowed.
    pub bound: f64,
    /// Where the largest is.
    pub worst: Option<String>,
}

/// The largest distance of a row from the checkpoint's, as a share of its length. A block errs most
/// where one outlier sets its scale: by a third of its length in 4 bits. A wrong row errs by about
/// its whole length.
const fn bound(bits: Bits) -> f64 {
    match bits {
        Bits::Four => 0.4,
        Bits::Eight => 0.03,
    }
}

/// The checkpoint with the artifact's values, as the reference runs it: adapters are in them, the
/// plan's removals are made, and everything that is not quantised is the checkpoint's own. Beside
/// it how near those values are to the checkpoint's; `None` where none are quantised.
///
/// # Errors
///
/// [`Error`] if the artifact and the checkpoint do not belong together, or cannot be read. Values
/// that are not near the checkpoint's are no error, but what [`Nearness`] says.
pub fn read(
    artifact: &Artifact,
    checkpoint: &Checkpoint,
) -> Result<(Checkpoint, Option<Nearness>), Error> {
    let plan = &artifact.manifest.plan;
    let mut imported = checkpoint.model.clone();
    prune_modules::prune(&mut imported, plan).map_err(Error::Plan)?;
    let mut read = checkpoint.clone();
    let Some(scheme) = plan.quantization.map(|quantization| quantization.scheme) else {
        read.model = imported;
        return Ok((read, None));
    };
    let found = matrices(artifact, checkpoint, plan)?;
    let path = Arc::new(artifact.path(names::DATA));
    let file = File::open(path.as_path())
        .map_err(|source| Error::Open { path: path.as_ref().clone(), source })?;
    let file = Arc::new(file);
    let mut nearness = Nearness {
        passed: true,
        matrices: 0,
        max_row_error: 0.0,
        bound: bound(scheme.bits),
        worst: None,
    };
    let mut replaced = BTreeMap::new();
    for (at, weight) in quantised(&imported, plan) {
        let (whole, place) = found
            .iter()
            .find(|(whole, _)| *whole == weight)
            .ok_or_else(|| Error::NotFound(at.clone()))?;
        let stored =
            Stored { name: format!("artifact: {at}"), shape: whole.shape(), dtype: DType::F32 };
        let (file, path) = (Arc::clone(&file), Arc::clone(&path));
        read.sources.insert_packed(stored.clone(), file, path, *place)?;
        let values = Weight::Stored(stored);
        nearness.compare(&at, &values, &weight, &read.sources)?;
        replaced.insert(at, values);
    }
    replace(&mut imported, &replaced);
    if let Some(plan) = plan.quantization
        && plan.embedding
        && plan.head
        && checkpoint.model.head.weight == checkpoint.model.embedding
        && imported.head.lora.is_none()
    {
        // Both read the same bytes; equal expressions are one tensor.
        imported.head.weight = imported.embedding.clone();
    }
    read.model = imported;
    Ok((read, Some(nearness)))
}

/// Where a weight of the imported model is in few bits: its path, and what it is once merged.
fn quantised(model: &Model, plan: &Plan) -> Vec<(String, Weight)> {
    let Some(quantization) = plan.quantization else { return Vec::new() };
    let mut all = Vec::new();
    if quantization.embedding {
        all.push(("embedding".to_owned(), model.embedding.clone()));
    }
    for (path, linear) in model.linears() {
        let planned = if path == "head" { quantization.head } else { !path.contains(".router.") };
        if planned {
            all.push((path, merged(linear)));
        }
    }
    all
}

fn merged(linear: &Linear) -> Weight {
    let weight = linear.weight.clone();
    match &linear.lora {
        None => weight,
        Some(lora) => Weight::Merged { base: Box::new(weight), lora: lora.clone() },
    }
}

/// Puts the values read back where they belong; their adapters are in them.
fn replace(model: &mut Model, values: &BTreeMap<String, Weight>) {
    if let Some(embedding) = values.get("embedding") {
        model.embedding = embedding.clone();
    }
    let paths: Vec<_> = model.linears().into_iter().map(|(path, _)| path).collect();
    for (path, linear) in paths.iter().zip(model.linears_mut()) {
        if let Some(weight) = values.get(path) {
            linear.weight = weight.clone();
            linear.lora = None;
        }
    }
}

/// Every weight of the merged model that is in few bits, and where its rows lie.
fn matrices(
    artifact: &Artifact,
    checkpoint: &Checkpoint,
    plan: &Plan,
) -> Result<Vec<(Weight, packed::Place)>, Error> {
    let mut model = checkpoint.model.clone();
    pass::run(PASSES, &mut model, plan, |_, _| {})?;
    let options = &artifact.manifest.options;
    let options = onnx::Options {
        dtype: options.dtype,
        emit_routing: options.emit_routing,
        attention: options.attention,
        logits: options.logits,
        sequences: options.sequences,
    };
    let graph = onnx::lower(validate(&model)?, options)?;
    let placements = proto::placements(&artifact.read(names::MODEL)?)?;
    let mut all = Vec::new();
    for initializer in graph.all_initializers() {
        let Data::Quantized(quantized) = &initializer.data else { continue };
        if quantized.part == Part::Codes {
            let place = place(&graph, quantized, &placements, artifact)?;
            rows(&quantized.weight, 0, place, &mut all);
        }
    }
    Ok(all)
}

/// Where the artifact has the three parts of a matrix.
fn place(
    graph: &Graph,
    matrix: &Quantized,
    placements: &BTreeMap<String, Placement>,
    artifact: &Artifact,
) -> Result<packed::Place, Error> {
    let offset = |part: Part| {
        let wanted = Data::Quantized(Quantized { part, ..matrix.clone() });
        let initializer = graph.all_initializers().into_iter().find(|tensor| tensor.data == wanted);
        let name = initializer.map(|tensor| tensor.name.clone()).unwrap_or_default();
        match placements.get(&name) {
            Some(placement) => Ok(placement.offset),
            None => Err(Error::NoInitializer { path: artifact.path(names::MODEL), name }),
        }
    };
    let Quantized { scheme, scales: dtype, .. } = *matrix;
    Ok(packed::Place {
        scheme,
        dtype,
        codes: offset(Part::Codes)?,
        scales: offset(Part::Scales)?,
        zeros: if scheme.symmetric { 0 } else { offset(Part::Zeros)? },
    })
}

/// The parts of a stack of matrices, from row `first` of it on.
fn rows(
    weight: &Weight,
    mut first: usize,
    place: packed::Place,
    all: &mut Vec<(Weight, packed::Place)>,
) {
    if let Weight::Concat(parts) = weight {
        for part in parts {
            rows(part, first, place, all);
            first += part.rows();
        }
    } else {
        all.push((weight.clone(), place.from_row(first, weight.columns())));
    }
}

impl Nearness {
    /// Compares a matrix read back with what the checkpoint has.
    fn compare(
        &mut self,
        path: &str,
        found: &Weight,
        expected: &Weight,
        sources: &sources::Sources,
    ) -> Result<(), Error> {
        let failed = |source| Error::Weight { path: path.to_owned(), source };
        self.matrices += 1;
        let (total, columns) = (expected.rows(), expected.columns());
        let step = (weights::BLOCK / 4 / columns.max(1)).max(1);
        for start in (0..total).step_by(step) {
            let rows = start..(start + step).min(total);
            let part = |of: &Weight| {
                weights::values(
                    &Weight::Slice { of: Box::new(of.clone()), rows: rows.clone() },
                    sources,
                )
            };
            let (found, expected) = (part(found).map_err(failed)?, part(expected).map_err(failed)?);
            let pairs = found.chunks_exact(columns).zip(expected.chunks_exact(columns));
            for (row, (found, expected)) in pairs.enumerate() {
                let error = distance(found, expected);
                // NaN is within no bound.
                self.passed &= error <= self.bound;
                if error > self.max_row_error || error.is_nan() {
                    self.max_row_error = error;
                    self.worst = Some(format!("{path}, row {}", start + row));
                }
            }
        }
        Ok(())
    }
}

/// `|a − b| / |b|`; 0 where both are zero.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let length: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    if difference == 0.0 { 0.0 } else { (difference / length).sqrt() }
}

impl std::fmt::Display for Nearness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { passed, matrices, max_row_error, bound, worst } = self;
        let verdict = if *passed { "ok" } else { "MISMATCH" };
        write!(f, "weights       {verdict:<8}  {matrices} matrices read back, rows within ")?;
        write!(f, "{max_row_error:.3} of the checkpoint's (at most {bound})")?;
        worst.as_ref().map_or(Ok(()), |worst| write!(f, "; farthest: {worst}"))
    }
}
