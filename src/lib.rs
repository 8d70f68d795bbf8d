//! Trains SkipGPT routers and compiles routed language models to ONNX artifacts that run faster.
pub mod artifact;
pub mod checkpoint;
pub mod decoder;
pub mod inspect;
pub mod onnx;
pub mod sources;
pub mod weights;
