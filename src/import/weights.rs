//! Writes safetensors files, from a GGUF file a few rows at a time.
//!
//! ```text
//! length of the header, u64 | header, JSON padded with blanks to 8 bytes | tensors by name
//! ```
//!
//! # Un-permuting q and k
//!
//! `RoPE` turns pairs. Hugging Face pairs row `j` of a head with row `j + d/2`; ggml's llama pairs
//! neighbours, so its files store the two halves of a head interleaved:
//! stored row `2j + t` of a head is row `t·d/2 + j` of the checkpoint.

use std::fs::File;
use std::io::Write;
use std::ops::ControlFlow;

use half::{bf16, f16};
use serde_json::{Map, json};
use skipgpt_passes::ir::DType;

use super::names::Job;
use super::quantized::{self, read_rows};

/// Most values held at once, unless one head of one matrix is larger.
const BLOCK_VALUES: usize = 1 << 20;

/// Why the weights could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor could not be read.
    #[error(transparent)]
    Tensor(#[from] quantized::Error),
    /// Writing failed.
    #[error("cannot write the weights: {0}")]
    Write(#[from] std::io::Error),
    /// Whoever watches the progress asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A value that the asked dtype cannot hold.
    #[error("tensor {name:?} holds {value}, which {dtype} cannot hold; import it as f32")]
    OutOfRange {
        /// Its name in the file.
        name: String,
        /// The value.
        value: f32,
        /// The asked dtype.
        dtype: DType,
    },
}

/// One tensor of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// How its values are written.
    pub dtype: DType,
}

impl Entry {
    /// Bytes of its values.
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size()) as u64
    }
}

/// The tensors of `jobs` as they are written.
pub fn entries(jobs: &[Job], dtype: DType) -> Vec<Entry> {
    jobs.iter()
        .map(|job| Entry { name: job.name.clone(), shape: job.source.shape.clone(), dtype })
        .collect()
}

/// Writes the file; `progress` gets the bytes of tensors written since it was last called.
pub fn write(
    source: &mut File,
    jobs: &[Job],
    dtype: DType,
    out: &mut impl Write,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), Error> {
    write_header(&entries(jobs, dtype), out)?;
    for job in jobs {
        write_tensor(source, job, dtype, out, progress)?;
    }
    Ok(())
}

/// Writes the length and the header of a file with `entries`, whose values must follow in order.
pub fn write_header(entries: &[Entry], out: &mut impl Write) -> Result<(), Error> {
    let mut fields = Map::new();
    fields.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut start = 0;
    for entry in entries {
        let end = start + entry.bytes();
        let dtype = match entry.dtype {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
        };
        fields.insert(
            entry.name.clone(),
            json!({ "dtype": dtype, "shape": entry.shape, "data_offsets": [start, end] }),
        );
        start = end;
    }
    let mut header = serde_json::Value::Object(fields).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    Ok(())
}

fn write_tensor(
    source: &mut File,
    job: &Job,
    dtype: DType,
    out: &mut impl Write,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), Error> {
    // A bias is one row in the file, and as many rows as it has values where rows change places.
    let mut tensor = job.source.clone();
    if tensor.shape.len() == 1 && job.interleaved.is_some() {
        let values = read_rows(source, &tensor, 0..1)?;
        return put(&deinterleave(values, 1, job.interleaved), &tensor.name, dtype, out, progress);
    }
    if tensor.shape.len() == 1 {
        tensor.shape.insert(0, 1);
    }
    let (rows, columns) = (tensor.rows(), tensor.columns());
    let unit = job.interleaved.unwrap_or(1);
    let step = (BLOCK_VALUES / columns / unit).max(1) * unit;
    for first in (0..rows).step_by(step) {
        let values = read_rows(source, &tensor, first..rows.min(first + step))?;
        put(&deinterleave(values, columns, job.interleaved), &tensor.name, dtype, out, progress)?;
    }
    Ok(())
}

/// Whole heads of rows in the checkpoint's order.
fn deinterleave(values: Vec<f32>, columns: usize, head_dim: Option<usize>) -> Vec<f32> {
    let Some(head_dim) = head_dim else { return values };
    let half = head_dim / 2;
    let mut ordered = Vec::with_capacity(values.len());
    for head in values.chunks(head_dim * columns) {
        for row in 0..head_dim {
            let stored = 2 * (row % half) + row / half;
            ordered.extend_from_slice(&head[stored * columns..(stored + 1) * columns]);
        }
    }
    ordered
}

/// Writes the values of the tensor `name`, rounded to `dtype` once.
pub fn put(
    values: &[f32],
    name: &str,
    dtype: DType,
    out: &mut impl Write,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), Error> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.size());
    for &value in values {
        let finite = match dtype {
            DType::F32 => {
                bytes.extend(value.to_le_bytes());
                true
            }
            DType::BF16 => {
                let rounded = bf16::from_f32(value);
                bytes.extend(rounded.to_le_bytes());
                rounded.is_finite()
            }
            DType::F16 => {
                let rounded = f16::from_f32(value);
                bytes.extend(rounded.to_le_bytes());
                rounded.is_finite()
            }
        };
        if !finite {
            return Err(Error::OutOfRange { name: name.into(), value, dtype });
        }
    }
    out.write_all(&bytes)?;
    match progress(bytes.len() as u64) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Interrupted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The inverse of what the format's writer does: `[2, d/2]` becomes `[d/2, 2]`.
    #[test]
    fn a_stored_head_comes_out_in_halves() {
        // Two heads of four rows of one column; stored a0 b0 a1 b1, halves a and b.
        let stored = vec![0.0, 10.0, 1.0, 11.0, 2.0, 12.0, 3.0, 13.0];
        let ordered = [0.0, 1.0, 10.0, 11.0, 2.0, 3.0, 12.0, 13.0];
        assert_eq!(deinterleave(stored, 1, Some(4)), ordered);
    }

    #[test]
    fn columns_stay_together() {
        let stored = (0..8).map(|i| i as f32).collect();
        assert_eq!(deinterleave(stored, 2, Some(4)), [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]);
    }

    #[test]
    fn other_tensors_are_left_alone() {
        assert_eq!(deinterleave(vec![3.0, 1.0, 2.0], 1, None), [3.0, 1.0, 2.0]);
    }
}
