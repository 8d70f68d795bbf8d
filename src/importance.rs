//! How much each input of a projection weighs: the mean of its square over a text.
//!
//! A rounded weight `v + e` changes its row's result by `e · x`. Over many tokens the square of that
//! grows with the mean square of `x`, so an error is worth avoiding where inputs are large. `measure` runs
//! the reference over a text and keeps that mean for every input of every projection; the search for scales
//! ([`crate::weights`]) then weighs errors by it.
//!
//! The file is safetensors: for every projection a vector `[in]`, `f32`, under the name of its weight in the checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Tensor};
use safetensors::{Dtype, SafeTensors};
use skipgpt_passes::ir::{self, Model, Weight};

use crate::checkpoint::Checkpoint;
use crate::decoder::{Decoder, Logits};
use crate::eval::{self, Options, Windows};
use crate::model::Reference;
use crate::model::router::Rows;
use crate::sources;

/// What the file's metadata says it is.
const FORMAT: &str = "skipgpt-importance";

/// The least an input weighs, in means of its projection: inputs that the text never reached count a little.
const LEAST: f32 = 1e-3;

/// Hears the inputs of projections, by the name of their weight.
#[derive(Debug, Default)]
pub struct Ears {
    heard: Mutex<BTreeMap<String, Moments>>,
}

/// Sums over the tokens heard.
#[derive(Debug, Default)]
struct Moments {
    squares: Vec<f64>,
    tokens: usize,
}

impl Ears {
    /// Adds the rows of `x` `[rows, in]`, inputs of the projection whose weight is called `name`, which have those
    /// of `rows` that are computed; of tokens that skip it nothing.
    pub(crate) fn hear(&self, name: &str, x: &Tensor, rows: &Rows) -> candle_core::Result<()> {
        let squares = x.to_dtype(DType::F32)?.sqr()?;
        let (squares, tokens) = match rows {
            Rows::Masked(keep) => {
                let kept = keep.sum_all()?.to_scalar::<f32>()?;
                (squares.broadcast_mul(keep)?, kept as usize)
            }
            _ => (squares, x.dim(0)?),
        };
        let squares = squares.sum(0)?.to_vec1::<f32>()?;
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let moments = heard.entry(name.to_owned()).or_default();
        moments.squares.resize(squares.len(), 0.0);
        moments.squares.iter_mut().zip(squares).for_each(|(sum, new)| *sum += f64::from(new));
        moments.tokens += tokens;
        Ok(())
    }
}

/// The name that a projection goes by, whose row `row` of `weight` is: that of the tensor that an adapter is merged
/// into. Rows of several projections may be one weight.
pub(crate) fn name_at(weight: &Weight, mut row: usize) -> Option<&str> {
    match weight {
        Weight::Stored(stored) => Some(&stored.name),
        Weight::Merged { base, .. } => name_at(base, row),
        Weight::Concat(parts) => parts.iter().find_map(|part| {
            if row < part.rows() {
                return Some(name_at(part, row));
            }
            row -= part.rows();
            None
        })?,
        Weight::Slice { of, rows } => name_at(of, rows.start + row),
        Weight::Cast { of, .. } | Weight::Quantized { of, .. } => name_at(of, row),
        Weight::BlockDiagonal(_) | Weight::Difference { .. } | Weight::Transpose(_) => None,
    }
}

/// The mean square of every input, by the name of its projection's weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Importance {
    means: BTreeMap<String, Vec<f32>>,
    tokens: usize,
}

/// Why a file of importances is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// It is no safetensors file.
    #[error("{}: not the file that calibrate writes: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Safetensors' word.
        source: safetensors::SafeTensorError,
    },
    /// It is a safetensors file of something else.
    #[error("{}: not the file that calibrate writes: its metadata lacks format {FORMAT}", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// A projection of the model is not in it.
    #[error("{}: {name} is missing; it was measured on another model: run calibrate on this one", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The weight.
        name: String,
    },
    /// A vector is not of the projection's inputs.
    #[error("{}: {name} is {dtype:?} {found:?}; expected F32 [{expected}]: run calibrate on this model", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The weight.
        name: String,
        /// What its numbers are.
        dtype: Dtype,
        /// Its shape.
        found: Vec<usize>,
        /// How many inputs the projection has.
        expected: usize,
    },
    /// A number is negative, infinite or none.
    #[error("{}: {name} holds {value} at {index}; expected a mean of squares: run calibrate again", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The weight.
        name: String,
        /// Its place.
        index: usize,
        /// What is there.
        value: f32,
    },
}

/// Runs `reference`, which hears with `ears`, over the windows of `tokens` (a text without special
/// tokens); `progress` hears of every window: (done, in all).
///
/// # Errors
///
/// As [`eval::perplexity`].
pub fn measure(
    reference: &mut Reference,
    ears: &Ears,
    tokens: &[u32],
    options: Options,
    mut progress: impl FnMut(usize, usize),
) -> Result<Importance, eval::Error<crate::model::Error>> {
    let windows = Windows::new(tokens.len(), options)?;
    for index in 0..windows.count {
        reference.reset();
        let input = windows.input(tokens, index, Logits::All);
        let failed = |source| eval::Error::Decoder { window: index, source };
        reference.step(&input).map_err(failed)?;
        progress(index + 1, windows.count);
    }
    reference.reset();
    let heard = ears.heard.lock().unwrap_or_else(PoisonError::into_inner);
    let mean = |moments: &Moments| {
        let tokens = moments.tokens.max(1) as f64;
        moments.squares.iter().map(|sum| (sum / tokens) as f32).collect()
    };
    let means = heard.iter().map(|(name, moments)| (name.clone(), mean(moments))).collect();
    Ok(Importance { means, tokens: windows.count * windows.window })
}

impl Importance {
    /// How many projections it has.
    pub fn projections(&self) -> usize {
        self.means.len()
    }

    /// How many tokens were run.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The file's bytes.
    ///
    /// # Errors
    ///
    /// Safetensors' own, of vectors that it cannot hold.
    pub fn to_bytes(&self) -> Result<Vec<u8>, safetensors::SafeTensorError> {
        let tensors = self.means.iter().map(|(name, mean)| {
            let mut bytes = Vec::new();
            sources::encode(mean, ir::DType::F32, &mut bytes);
            (name.clone(), vec![mean.len()], bytes)
        });
        sources::file(&tensors.collect::<Vec<_>>(), FORMAT)
    }
}

/// Makes the importances of the file at `path` known to the checkpoint's sources, and the file one of those the
/// checkpoint is read from.
///
/// # Errors
///
/// [`Error`] if the file is damaged, or another model's.
pub fn attach(checkpoint: &mut Checkpoint, path: &Path) -> Result<(), Error> {
    let at = || path.to_owned();
    let bytes = std::fs::read(path).map_err(|source| Error::File { path: at(), source })?;
    let format = |source| Error::Format { path: at(), source };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(format)?;
    let kind = header.metadata().as_ref().and_then(|metadata| metadata.get("format"));
    if kind.is_none_or(|kind| kind != FORMAT) {
        return Err(Error::Kind { path: at() });
    }
    let file = SafeTensors::deserialize(&bytes).map_err(format)?;
    for (name, expected) in projections(&checkpoint.model) {
        let missing = |_| Error::Missing { path: at(), name: name.clone() };
        let view = file.tensor(&name).map_err(missing)?;
        if view.dtype() != Dtype::F32 || view.shape() != [expected] {
            let (dtype, found) = (view.dtype(), view.shape().to_vec());
            return Err(Error::Shape { path: at(), name, dtype, found, expected });
        }
        let mut means = Vec::with_capacity(expected);
        sources::decode(view.data(), ir::DType::F32, &mut means);
        let wrong = means.iter().position(|mean| !(mean.is_finite() && *mean >= 0.0));
        if let Some(index) = wrong {
            let value = means[index];
            return Err(Error::Value { path: at(), name, index, value });
        }
        checkpoint.sources.weigh(name, relative(means).into());
    }
    checkpoint.files.push(at());
    Ok(())
}

/// The projections of `model` by name, and how many inputs they have.
fn projections(model: &Model) -> Vec<(String, usize)> {
    let all = model.linears().into_iter().filter(|(path, _)| !path.contains("router"));
    all.filter_map(|(_, linear)| {
        Some((name_at(&linear.weight, 0)?.to_owned(), linear.weight.columns()))
    })
    .collect()
}

/// Around 1 and never 0; all 1 where nothing was heard.
fn relative(means: Vec<f32>) -> Vec<f32> {
    let mean = means.iter().sum::<f32>() / means.len().max(1) as f32;
    if mean > 0.0 {
        means.into_iter().map(|own| (own / mean).max(LEAST)).collect()
    } else {
        vec![1.0; means.len()]
    }
}
