//! Trains SkipGPT routers and compiles routed language models to ONNX artifacts that run faster.
pub mod checkpoint;
pub mod decoder;
pub mod doctor;
pub mod generate;
pub mod onnx;
pub mod runtime;
pub mod sources;
pub mod text;
pub mod weights;
