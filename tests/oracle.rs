//! The oracle's cases: checkpoints with routers and adapters, and what an independent implementation
//! computes for them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use ndarray::{Array2, IxDyn};
use skipgpt_export::decoder::{Input, Logits};

/// Every case.
pub(crate) const CASES: [&str; 9] = [
    "llama-bf16-rslora",
    "llama-bf16-sharded",
    "llama-biases-linear-rope",
    "llama-f16",
    "llama-gqa",
    "llama-mha-llama3rope",
    "mistral-wide-heads",
    "qwen2-bias",
    "qwen3-head-norm",
];

/// Largest difference from the oracle's logits and layer inputs.
pub(crate) const ATOL: f32 = 1e-4;

pub(crate) fn fixture(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle").join(case)
}

/// What the oracle computed for a case.
pub(crate) struct Expected(pub(crate) HashMap<String, Tensor>);

impl Expected {
    pub(crate) fn of(case: &str) -> Self {
        let path = fixture(case).join("expected.safetensors");
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    }

    pub(crate) fn floats(&self, name: &str) -> ndarray::ArrayD<f32> {
        let tensor = &self.0[name];
        let values = tensor.flatten_all().unwrap().to_vec1().unwrap();
        ndarray::ArrayD::from_shape_vec(IxDyn(tensor.dims()), values).unwrap()
    }

    pub(crate) fn integers(&self, name: &str) -> Array2<i64> {
        let tensor = &self.0[name];
        let values = tensor.to_dtype(candle_core::DType::I64).unwrap().flatten_all().unwrap();
        let rows = tensor.dims()[0];
        let values: Vec<i64> = values.to_vec1().unwrap();
        Array2::from_shape_vec((rows, values.len() / rows), values).unwrap()
    }

    pub(crate) fn input(&self) -> Input {
        Input {
            ids: self.integers("input_ids"),
            mask: self.integers("attention_mask"),
            positions: self.integers("position_ids"),
            logits: Logits::All,
        }
    }
}
