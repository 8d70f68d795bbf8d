//! Graphs of fixtures.

use std::path::Path;

use skipgpt_passes::ir::DType;
use skipgpt_passes::{PASSES, validate};

use super::graph::Graph;
use super::{Attention, Options};
use crate::checkpoint::{self, Request};
use crate::decoder::{Logits, Sequences};
use crate::plan::{self, Choices};

/// The graph of the fixture `case`, dense, or routed by its routers.
pub(super) fn lowered(
    case: &str,
    routed: bool,
    dtype: DType,
    (logits, sequences): (Logits, Sequences),
) -> Result<Graph, Box<dyn std::error::Error>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle").join(case);
    let router = directory.join("router.safetensors");
    let checkpoint = checkpoint::read(&Request {
        model: Some(&directory),
        router: routed.then_some(router.as_path()),
        ..Request::default()
    })?;
    let choices = Choices { rearrange: true, ..Choices::default() };
    let plan = plan::build(&checkpoint.model, choices, None)?;
    let mut model = checkpoint.model;
    skipgpt_passes::run(PASSES, &mut model, &plan, |_, _| ())?;
    let attention = Attention::for_config(&model.config);
    let options = Options { dtype, emit_routing: false, attention, logits, sequences };
    Ok(super::lower(validate(&model)?, options)?)
}
