//! `config.json` for the layers that are left.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use skipgpt_passes::ir::{DType, Layer, Model};

use super::Error;
use super::contents::Contents;
use crate::artifact;

/// `nemotron-nas` runtimes round an MLP's width up to a multiple of this.
const WIDTH_STEP: usize = 256;

/// The checkpoint's configuration, changed where the model is.
pub(super) fn rewrite(
    path: &Path,
    model: &Model,
    contents: &Contents<'_>,
) -> Result<Map<String, Value>, Error> {
    let bytes = fs::read(path).map_err(|source| artifact::Error::Io {
        path: path.to_path_buf(),
        action: "read",
        source,
    })?;
    let mut config: Map<String, Value> = serde_json::from_slice(&bytes)
        .map_err(|source| Error::Config { path: path.to_path_buf(), source })?;
    config.insert("num_hidden_layers".to_owned(), json!(contents.layers.len()));
    // Lists with an entry per layer keep those of the layers that are left.
    for key in ["layer_types"] {
        if let Some(Value::Array(entries)) = config.get_mut(key) {
            let kept = contents.layers.iter().filter_map(|layer| entries.get(layer.index));
            *entries = kept.cloned().collect();
        }
    }
    config.insert("tie_word_embeddings".to_owned(), json!(contents.tied));
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(key.to_owned(), json!(torch_name(contents.dtype)));
    if !contents.plain {
        config.insert("architectures".to_owned(), json!(["DeciLMForCausalLM"]));
        config.insert("model_type".to_owned(), json!("nemotron-nas"));
        let blocks: Vec<_> = contents.layers.iter().map(|layer| block(model, layer)).collect();
        config.insert("block_configs".to_owned(), json!(blocks));
    }
    Ok(config)
}

/// What a layer consists of, as `nemotron-nas` says it.
fn block(model: &Model, layer: &Layer) -> Value {
    let group = model.config.num_attention_heads / model.config.num_key_value_heads.max(1);
    let attention = match layer.attention {
        Some(_) => {
            json!({ "n_heads_in_group": group, "no_op": false, "replace_with_linear": false })
        }
        None => json!({ "n_heads_in_group": null, "no_op": true, "replace_with_linear": false }),
    };
    let mut ffn = json!({ "no_op": layer.mlp.is_none(), "replace_with_linear": false });
    match &layer.mlp {
        None => ffn["ffn_mult"] = Value::Null,
        Some(mlp) => {
            let width = mlp.down.weight.columns();
            match ffn_mult(width, model.config.hidden_size) {
                Some(factor) => ffn["ffn_mult"] = json!(factor),
                // Read instead of `ffn_mult`, and only where that is absent.
                None => ffn["intermediate_size"] = json!(width),
            }
        }
    }
    json!({ "attention": attention, "ffn": ffn })
}

/// The factor from which readers compute `width` as `2 · factor · hidden / 3` rounded up.
///
/// It aims at the middle of the step, so that neither float error nor a reader that rounds the
/// factor to some digits reaches another step. `None` for a width that is no multiple of the step.
fn ffn_mult(width: usize, hidden: usize) -> Option<f64> {
    let aim = width.checked_sub(WIDTH_STEP / 2)?;
    width.is_multiple_of(WIDTH_STEP).then(|| 1.5 * aim as f64 / hidden as f64)
}

const fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As every reader of the form computes it.
    fn width(factor: f64, hidden: usize) -> usize {
        ((2.0 * factor * hidden as f64 / 3.0) as usize).next_multiple_of(WIDTH_STEP)
    }

    #[test]
    fn a_factor_survives_readers_that_round_it() {
        for (expected, hidden) in [(1536, 576), (14336, 4096), (28672, 8192), (256, 64)] {
            let factor = ffn_mult(expected, hidden).unwrap_or_default();
            assert_eq!(width(factor, hidden), expected);
            let rounded = (factor * 1e6).round() / 1e6;
            assert_eq!(width(rounded, hidden), expected);
        }
        assert_eq!(ffn_mult(11008 + 1, 4096), None);
        assert_eq!(ffn_mult(160, 64), None);
    }
}
