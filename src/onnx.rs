//! The ONNX back end.

pub mod graph;
