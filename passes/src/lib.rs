//! The compiler's middle: the IR of a routed language model and the passes over it.
//!
//! A [`ir::Model`] describes a decoder-only transformer whose attention and MLP modules a router may
//! skip per token. Its weights are expressions over tensors that stay in the checkpoint, so nothing
//! here does IO, holds tensor data or knows a tensor library.
//!
//! | module | what it holds |
//! |---|---|
//! | [`ir`] | the data types |
//! | `access` | methods that walk a [`ir::Model`]: modules, linears, weights, tensors, with paths |
//! | `print` | `Display` for the types of [`ir`]: the text IR |
//! | [`cost`] | multiply-adds per token |
//! | [`validate`](mod@validate) | the rules per phase, and the proof that a model obeys them |
//! | [`plan`] | what the passes are told |
//! | [`quantization`] | how a matrix is stored in few bits |
//! | [`pass`] | what a pass is, and the driver |
//! | [`registry`] | the one table of passes |
//! | [`merge_lora`], [`freeze_routers`], [`prune_modules`], [`fuse_projections`], [`quantize`], [`lower_routers`] | the passes, in order |
//!
//! From a model as read to one a back end takes:
//!
//! ```
//! use skipgpt_passes::{PASSES, ir::Model, pass, plan::Plan, validate};
//!
//! fn lower(mut model: Model, plan: &Plan) -> Result<Model, pass::Error> {
//!     pass::run(PASSES, &mut model, plan, |pass, model| {
//!         assert!(validate(model).is_ok(), "{} left {model}", pass.name());
//!     })?;
//!     Ok(model)
//! }
//! ```

#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::needless_raw_string_hashes,
        reason = "a test may stop at the first surprise; expect-test writes the hashes"
    )
)]

mod access;
pub mod cost;
pub mod freeze_routers;
pub mod fuse_projections;
#[allow(
    clippy::large_enum_variant,
    reason = "a model has a few dozen layers, and boxes would stand in every match"
)]
pub mod ir;
pub mod lower_routers;
pub mod merge_lora;
pub mod pass;
pub mod plan;
mod print;
pub mod prune_modules;
pub mod quantization;
pub mod quantize;
pub mod registry;
#[cfg(test)]
mod testing;
pub mod validate;

pub use pass::{Changed, Pass, Unsupported, run};
pub use registry::PASSES;
pub use validate::{Validated, Violations, validate};
