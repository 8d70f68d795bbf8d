//! The ONNX back end.

pub mod graph;
pub mod proto;
