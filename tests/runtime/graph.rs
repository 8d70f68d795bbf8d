//! A decoder small enough to compute by hand, as an ONNX file.
//!
//! Vocabulary 8, one cached layer (index 3) of one head of width 2. With `E` the embedding of the
//! new tokens: keys and values are `E` and `2·E`, and `logits = (E + Σ keys of real tokens) · head`.

use half::f16;
use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::tensor_proto::{DataLocation, DataType};
use onnx_protobuf::tensor_shape_proto::{Dimension, dimension};
use onnx_protobuf::{
    AttributeProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use protobuf::MessageField;

/// Embedding of token `t`: `[t, t² / 8]`.
pub(crate) fn embedding(token: i64) -> [f32; 2] {
    let token = token as f32;
    [token, token * token / 8.0]
}

/// Column `v` of the head: `[v, -1]`.
pub(crate) fn head(v: usize) -> [f32; 2] {
    [v as f32, -1.0]
}

pub(crate) const VOCAB: usize = 8;
/// The file that [`Tiny::External`] puts the embedding in.
pub(crate) const WEIGHTS: &str = "weights.bin";

/// The graph, or the one thing about it that is different.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tiny {
    /// As above.
    Plain,
    /// An output of two modules' margins: the position minus 1.5, and its negative.
    Routing,
    /// Half precision for weights, cache and logits.
    Half,
    /// The embedding lies in [`WEIGHTS`].
    External,
    /// The cache forgets the past.
    Forgetful,
    /// How wide the cache's heads are is not said.
    Open,
    /// An input no decoder has.
    Strange,
    /// No output for the values' cache.
    NoPresentValue,
}

impl Tiny {
    /// The file's bytes, and those of [`WEIGHTS`].
    pub(crate) fn bytes(self) -> (Vec<u8>, Vec<u8>) {
        let float = if self == Self::Half { DataType::FLOAT16 } else { DataType::FLOAT };
        let width = if self == Self::Open { "head_dim" } else { "2" };
        let cache = |name: &str, length| value(name, float, &["batch", "1", length, width]);
        let mut nodes = vec![
            node("Gather", &["embedding", "input_ids"], "hidden", None),
            node("Unsqueeze", &["hidden", "one"], "key", None),
            node("Add", &["key", "key"], "value", None),
            node("Cast", &["attention_mask"], "mask", Some(int("to", float as i64))),
            node("Unsqueeze", &["mask", "one_and_three"], "mask_column", None),
            node("Mul", &["present.3.key", "mask_column"], "real_keys", None),
            node("ReduceSum", &["real_keys", "two"], "history", Some(int("keepdims", 0))),
            node("Add", &["hidden", "history"], "layers.3.output", None),
            node("MatMul", &["layers.3.output", "head"], "logits", None),
        ];
        for (part, new) in [("key", "key"), ("value", "value")] {
            let past = format!("past_key_values.3.{part}");
            let present = format!("present.3.{part}");
            let concat = if self == Self::Forgetful {
                node("Identity", &[new], &present, None)
            } else {
                node("Concat", &[&past, new], &present, Some(int("axis", 2)))
            };
            nodes.insert(3, concat);
        }
        let mut inputs = vec![
            value("input_ids", DataType::INT64, &["batch", "sequence"]),
            value("attention_mask", DataType::INT64, &["batch", "total_sequence"]),
            cache("past_key_values.3.key", "past_sequence"),
            cache("past_key_values.3.value", "past_sequence"),
        ];
        let mut outputs = vec![
            value("logits", float, &["batch", "sequence", "8"]),
            cache("present.3.key", "total_sequence"),
            value("layers.3.output", float, &["batch", "sequence", "2"]),
        ];
        if self != Self::NoPresentValue {
            outputs.push(cache("present.3.value", "total_sequence"));
        }
        if self == Self::Routing {
            inputs.push(value("position_ids", DataType::INT64, &["batch", "sequence"]));
            outputs.push(value("routing_margins", DataType::FLOAT, &["2", "batch", "sequence"]));
            let float = Some(int("to", DataType::FLOAT as i64));
            nodes.extend([
                node("Cast", &["position_ids"], "positions", float),
                node("Sub", &["positions", "threshold"], "margin", None),
                node("Neg", &["margin"], "opposite", None),
                node("Unsqueeze", &["margin", "zero"], "margin_row", None),
                node("Unsqueeze", &["opposite", "zero"], "opposite_row", None),
                node(
                    "Concat",
                    &["margin_row", "opposite_row"],
                    "routing_margins",
                    Some(int("axis", 0)),
                ),
            ]);
        }
        if self == Self::Strange {
            inputs.push(value("pixel_values", DataType::FLOAT, &["batch"]));
        }
        let rows: Vec<f32> = (0..VOCAB as i64).flat_map(embedding).collect();
        let columns: Vec<f32> =
            (0..2).flat_map(|row| (0..VOCAB).map(move |v| head(v)[row])).collect();
        let mut embedding = self.weight("embedding", &[VOCAB, 2], &rows);
        let weights = embedding.raw_data.clone();
        if self == Self::External {
            embedding.raw_data.clear();
            embedding.data_location = DataLocation::EXTERNAL.into();
            embedding.external_data = [("location", WEIGHTS), ("offset", "0")]
                .map(|(key, value)| StringStringEntryProto {
                    key: key.into(),
                    value: value.into(),
                    ..Default::default()
                })
                .into();
        }
        let threshold = tensor("threshold", DataType::FLOAT, &[], 1.5_f32.to_le_bytes().into());
        let graph = GraphProto {
            name: "tiny".into(),
            node: nodes,
            input: inputs,
            output: outputs,
            initializer: vec![
                embedding,
                self.weight("head", &[2, VOCAB], &columns),
                threshold,
                axes("zero", &[0]),
                axes("one", &[1]),
                axes("two", &[2]),
                axes("one_and_three", &[1, 3]),
            ],
            ..Default::default()
        };
        let opset = OperatorSetIdProto { version: 18, ..Default::default() };
        let model = ModelProto {
            ir_version: 8,
            opset_import: vec![opset],
            graph: MessageField::some(graph),
            ..Default::default()
        };
        (model.write_to_bytes().unwrap(), weights)
    }

    fn weight(self, name: &str, shape: &[usize], values: &[f32]) -> TensorProto {
        if self == Self::Half {
            let bytes = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
            tensor(name, DataType::FLOAT16, shape, bytes)
        } else {
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            tensor(name, DataType::FLOAT, shape, bytes)
        }
    }
}

fn node(op: &str, inputs: &[&str], output: &str, attribute: Option<AttributeProto>) -> NodeProto {
    NodeProto {
        name: format!("{op}_{output}"),
        op_type: op.into(),
        input: inputs.iter().map(|name| (*name).to_owned()).collect(),
        output: vec![output.to_owned()],
        attribute: attribute.into_iter().collect(),
        ..Default::default()
    }
}

fn int(name: &str, i: i64) -> AttributeProto {
    AttributeProto { name: name.into(), type_: AttributeType::INT.into(), i, ..Default::default() }
}

fn tensor(name: &str, ty: DataType, shape: &[usize], raw_data: Vec<u8>) -> TensorProto {
    TensorProto {
        name: name.into(),
        data_type: ty as i32,
        dims: shape.iter().map(|dim| *dim as i64).collect(),
        raw_data,
        ..Default::default()
    }
}

fn axes(name: &str, values: &[i64]) -> TensorProto {
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    tensor(name, DataType::INT64, &[values.len()], bytes)
}

/// A dimension that is a number is fixed.
fn value(name: &str, ty: DataType, shape: &[&str]) -> ValueInfoProto {
    let dim = shape.iter().map(|dim| Dimension {
        value: Some(match dim.parse() {
            Ok(fixed) => dimension::Value::DimValue(fixed),
            Err(_) => dimension::Value::DimParam((*dim).to_owned()),
        }),
        ..Default::default()
    });
    let shape = TensorShapeProto { dim: dim.collect(), ..Default::default() };
    let tensor = type_proto::Tensor {
        elem_type: ty as i32,
        shape: MessageField::some(shape),
        ..Default::default()
    };
    let ty = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
    ValueInfoProto { name: name.into(), type_: MessageField::some(ty), ..Default::default() }
}
