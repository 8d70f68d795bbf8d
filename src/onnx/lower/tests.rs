//! How a graph ends, by the logits it gives.
#![allow(clippy::needless_raw_string_hashes, reason = "blessing writes them")]

use expect_test::{Expect, expect};

use super::*;
use crate::decoder::Sequences;
use crate::onnx::testing::lowered;

/// The nodes after the last layer of `llama-gqa`, and the first output.
#[track_caller]
fn ends(routed: bool, dtype: DType, logits: Logits, expected: &Expect) {
    let text = lowered("llama-gqa", routed, dtype, (logits, Sequences::Any));
    let text = text.map_or_else(|error| error.to_string(), |graph| graph.to_string());
    let (output, end) = (text.lines().filter(|line| line.contains("output logits")), text.lines());
    let end = end.skip_while(|line| !line.starts_with("  last") && !line.starts_with("  norm"));
    let text: Vec<&str> = output.chain(end).map(str::trim).collect();
    expected.assert_eq(&format!("{}\n", text.join("\n")));
}

#[test]
fn every_row_goes_through_the_head() {
    ends(
        false,
        DType::F32,
        Logits::All,
        &expect![[r#"
            output logits: f32[batch, sequence, 320]
            norm, , , layers.3.mlp.output = com.microsoft::SkipSimplifiedLayerNormalization(layers.3.attention.output, layers.3.mlp.down, norm.weight) epsilon=1e-5
            logits = com.microsoft::FusedMatMul(norm, embedding.weight) transB=1
        "#]],
    );
}

#[test]
fn the_last_rows_are_gathered_before_what_is_pending_is_added() {
    ends(
        false,
        DType::F32,
        Logits::Last,
        &expect![[r#"
            output logits: f32[batch, 1, 320]
            last.real = Slice(attention_mask, mask.past.vector, constants.end, constants.sequence_axis)
            last.columns = Range(constants.zero, mask.sequence, constants.one)
            last.real_columns = Mul(last.real, last.columns)
            last.column = ReduceMax(last.real_columns, constants.sequence_axis)
            last.columns_apart = Unsqueeze(last.column, constants.sequence_axis)
            last = GatherND(layers.3.attention.output, last.columns_apart) batch_dims=1
            last.change = GatherND(layers.3.mlp.down, last.columns_apart) batch_dims=1
            norm, , , layers.3.mlp.output = com.microsoft::SkipSimplifiedLayerNormalization(last, last.change, norm.weight) epsilon=1e-5
            logits = com.microsoft::FusedMatMul(norm, embedding.weight) transB=1
        "#]],
    );
    ends(
        false,
        DType::F16,
        Logits::Last,
        &expect![[r#"
            output logits: f32[batch, 1, 320]
            last.real = Slice(attention_mask, mask.past.vector, constants.end, constants.sequence_axis)
            last.columns = Range(constants.zero, mask.sequence, constants.one)
            last.real_columns = Mul(last.real, last.columns)
            last.column = ReduceMax(last.real_columns, constants.sequence_axis)
            last.columns_apart = Unsqueeze(last.column, constants.sequence_axis)
            last = GatherND(layers.3.attention.output, last.columns_apart) batch_dims=1
            last.change = GatherND(layers.3.mlp.down, last.columns_apart) batch_dims=1
            layers.3.mlp.output = Add(last, last.change)
            norm.input = Cast(layers.3.mlp.output) to=f32
            norm.square = Pow(norm.input, constants.two)
            norm.mean = ReduceMean(norm.square, constants.last_axis)
            norm.shifted = Add(norm.mean, constants.rms_norm_eps)
            norm.root = Sqrt(norm.shifted)
            norm.unit = Div(norm.input, norm.root)
            norm.rounded = Cast(norm.unit) to=f16
            norm = Mul(norm.rounded, norm.weight)
            head = com.microsoft::FusedMatMul(norm, embedding.weight) transB=1
            logits = Cast(head) to=f32
        "#]],
    );
}

#[test]
fn the_last_rows_of_a_routed_model_are_gathered_from_the_stream() {
    ends(
        true,
        DType::F32,
        Logits::Last,
        &expect![[r#"
            output logits: f32[batch, 1, 320]
            last.real = Slice(attention_mask, mask.past.vector, constants.end, constants.sequence_axis)
            last.columns = Range(constants.zero, mask.sequence, constants.one)
            last.real_columns = Mul(last.real, last.columns)
            last.column = ReduceMax(last.real_columns, constants.sequence_axis)
            last.columns_apart = Unsqueeze(last.column, constants.sequence_axis)
            last = GatherND(layers.3.mlp.output, last.columns_apart) batch_dims=1
            norm.square = Pow(last, constants.two)
            norm.mean = ReduceMean(norm.square, constants.last_axis)
            norm.shifted = Add(norm.mean, constants.rms_norm_eps)
            norm.root = Sqrt(norm.shifted)
            norm.unit = Div(last, norm.root)
            norm = Mul(norm.unit, norm.weight)
            logits = com.microsoft::FusedMatMul(norm, embedding.weight) transB=1
        "#]],
    );
}
