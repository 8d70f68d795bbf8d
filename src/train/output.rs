//! What a finished run leaves: routers as they are released, or a PEFT directory.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::Error;
use super::parameters::Parameter;
use super::pth;
use super::settings::Lora;
use super::state::{self, entry};
use crate::artifact;
use crate::artifact::staging::Staging;
use crate::checkpoint::names::PEFT_PREFIX;
use crate::file;

/// The routers.
pub const ROUTERS: &str = "router.safetensors";
/// The routers, as PyTorch saves them.
const ROUTERS_PTH: &str = "router.pth";
/// The adapter's directory.
const ADAPTER: &str = "adapter";

/// Writes the routers to `directory`, and as `.pth` if asked for.
pub(super) fn routers(
    directory: &Path,
    parameters: &[Parameter],
    with_pth: bool,
) -> Result<Vec<PathBuf>, Error> {
    let tensors = parameters
        .iter()
        .map(|one| entry(one, one.name.clone()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(Error::values)?;
    let mut written = vec![directory.join(ROUTERS)];
    replace(&written[0], &state::file(&tensors).map_err(state::Error::from)?)?;
    if with_pth {
        let path = directory.join(ROUTERS_PTH);
        let bytes =
            pth::file(&tensors).map_err(|source| artifact::Error::io("write", &path, source))?;
        replace(&path, &bytes)?;
        written.push(path);
    }
    Ok(written)
}

/// Writes the adapter as a PEFT directory in `directory`, in place of an earlier one of the same run.
pub(super) fn adapter(
    directory: &Path,
    parameters: &[Parameter],
    settings: &Lora,
    base: &Path,
) -> Result<Vec<PathBuf>, Error> {
    let tensors = parameters
        .iter()
        .map(|one| entry(one, format!("{PEFT_PREFIX}{}", one.name)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(Error::values)?;
    let targets: Vec<_> = settings.targets.iter().map(|target| target.module()).collect();
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.display().to_string(),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "use_rslora": false,
        "use_dora": false,
        "modules_to_save": null,
        "rank_pattern": {},
        "alpha_pattern": {},
    });
    let path = directory.join(ADAPTER);
    let config = serde_json::to_vec_pretty(&config)
        .map_err(|error| artifact::Error::io("write", &path, error.into()))?;
    let tensors = state::file(&tensors).map_err(state::Error::from)?;
    if path.exists() {
        // Of a run that was stopped between writing it and saying so; the same bytes again.
        fs::remove_dir_all(&path).map_err(|e| artifact::Error::io("replace", &path, e))?;
    }
    let mut staging = Staging::begin(&path, false)?;
    staging.require(tensors.len() as u64)?;
    for (name, bytes) in [("adapter_model.safetensors", &tensors), ("adapter_config.json", &config)]
    {
        staging.write(name, bytes)?;
    }
    staging.commit()?;
    Ok(vec![path])
}

/// Puts a file of these bytes at `path`, whole or not at all.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    file::write(path, |file| file.write_all(bytes))
        .map_err(|source| artifact::Error::io("write", path, source).into())
}
