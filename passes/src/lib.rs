//! The compiler's middle.
pub mod ir;
pub mod plan;
pub mod validate;
