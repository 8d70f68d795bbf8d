//! The header of a safetensors file: eight bytes of length, then JSON that says where each tensor
//! lies. Larger elements first, then by name, so that every tensor is aligned to its elements.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use skipgpt_passes::ir::DType;

use super::contents::Tensor;

/// The tensors in the order of the file.
pub(super) fn order<'a, 'b>(
    tensors: &'b BTreeMap<String, Tensor<'a>>,
) -> Vec<(&'b String, &'b Tensor<'a>)> {
    let mut all: Vec<_> = tensors.iter().collect();
    all.sort_by_key(|(_, tensor)| Reverse(tensor.dtype.size()));
    all
}

/// Length and JSON, padded so that the first tensor is aligned.
pub(super) fn bytes(tensors: &BTreeMap<String, Tensor<'_>>) -> Vec<u8> {
    let mut header = Map::new();
    // transformers refuses a file that does not say which framework's names it has.
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut end = 0;
    for (name, tensor) in order(tensors) {
        let start = end;
        end += tensor.size();
        header.insert(
            name.clone(),
            json!({
                "dtype": dtype(tensor.dtype),
                "shape": tensor.weight.shape(),
                "data_offsets": [start, end],
            }),
        );
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}

/// Bytes of the tensors, header apart.
pub(super) fn size(tensors: &BTreeMap<String, Tensor<'_>>) -> u64 {
    tensors.values().map(Tensor::size).sum()
}

const fn dtype(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
    }
}
