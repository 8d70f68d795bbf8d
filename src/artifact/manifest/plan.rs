//! A [`Plan`] as JSON: part of a manifest, or a file of its own.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::{Dispatch, ModuleId};
use skipgpt_passes::plan::{Plan, Quantization};

use super::quantization;
use super::spelling::{DispatchDef, modules};
use crate::artifact::{Error, clients};

/// Mirrors [`Plan`]: a field that one of them lacks does not compile.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Plan", deny_unknown_fields)]
pub(super) struct PlanDef {
    #[serde(with = "modules")]
    removed: Vec<ModuleId>,
    #[serde(with = "modules")]
    always: Vec<ModuleId>,
    fuse_key_value: bool,
    fuse_gate_up: bool,
    #[serde(default, with = "quantization")]
    quantization: Option<Quantization>,
    #[serde(with = "DispatchDef")]
    attention_dispatch: Dispatch,
    #[serde(with = "DispatchDef")]
    mlp_dispatch: Dispatch,
}

#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct Bare(#[serde(with = "PlanDef")] Plan);

/// The plan's text.
pub fn plan_to_json(plan: &Plan) -> Result<Vec<u8>, Error> {
    clients::json("plan.json", &Bare(plan.clone()))
}

/// Reads a plan from its own file or out of a manifest.
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be read, [`Error::Json`] names the field that is wrong.
pub fn read_plan(path: &Path) -> Result<Plan, Error> {
    #[derive(Deserialize)]
    struct Manifest {
        plan: Bare,
    }
    let bytes = fs::read(path).map_err(|error| Error::io("read", path, error))?;
    let json = |source| Error::Json { path: path.to_path_buf(), source };
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(json)?;
    // Read from the text again, not from `value`, so that messages give line and column.
    let Bare(mut plan) = if value.get("plan").is_some() {
        serde_json::from_slice::<Manifest>(&bytes).map_err(json)?.plan
    } else {
        serde_json::from_slice(&bytes).map_err(json)?
    };
    for modules in [&mut plan.removed, &mut plan.always] {
        modules.sort();
        modules.dedup();
    }
    Ok(plan)
}
