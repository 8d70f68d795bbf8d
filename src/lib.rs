//! Trains SkipGPT routers and compiles routed language models to ONNX artifacts that run faster.
pub mod checkpoint;
pub mod decoder;
pub mod golden;
pub mod logits;
pub mod onnx;
pub mod sources;
pub mod tolerance;
pub mod verify;
pub mod weights;
