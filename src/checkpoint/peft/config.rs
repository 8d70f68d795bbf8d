//! `adapter_config.json`: rank, alpha and what is not read.
//!
//! PEFT gives every variant of `LoRA` its own key, so the keys that are harmless are listed and any
//! other must say "not in use" (`null`, `false` or empty).

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::checkpoint::files::{self, is_unused, show};

/// Most bytes the settings may have.
const LIMIT: u64 = 4 << 20;

/// Keys that do not change what a trained adapter computes.
const HARMLESS: [&str; 25] = [
    "alora_invocation_string",
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "loftq_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
    "eva_config",
];

/// What is wrong with an `adapter_config.json`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be opened or is not JSON.
    #[error(transparent)]
    File(#[from] files::Error),
    /// Not a JSON object.
    #[error("{}: expected a JSON object", path.display())]
    NotAnObject {
        /// The file.
        path: PathBuf,
    },
    /// A value is absent, of the wrong type or out of range.
    #[error("{}: {key} is {found}; expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What stands there.
        found: String,
        /// What should.
        expected: &'static str,
    },
    /// A setting that changes what the adapter computes and is not implemented.
    #[error("{}: {key} is {found}, which is not supported; {advice}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What stands there.
        found: String,
        /// What can be done.
        advice: &'static str,
    },
}

const MERGE: &str = "merge the adapter with PEFT's merge_and_unload and export the merged model";

/// Rank and scale of every projection.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Config {
    rank: usize,
    alpha: f64,
    rslora: bool,
    /// Ranks of the projections whose name ends so; the first that fits counts.
    ranks: Vec<(String, usize)>,
    alphas: Vec<(String, f64)>,
}

/// What the settings state of one projection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Stated {
    pub(super) rank: usize,
    pub(super) scale: f64,
}

impl Config {
    /// What is stated of `target`, whose A the file calls `raw`.
    pub(super) fn of(&self, target: &str, raw: &str) -> Stated {
        // A pattern is written for the model as it was trained, wrapped layers included.
        let raw = raw.split(".lora_A").next().unwrap_or(raw);
        let fits = |pattern: &str| [target, raw].iter().any(|name| ends_with(name, pattern));
        let rank = self.ranks.iter().find(|(pattern, _)| fits(pattern));
        let alpha = self.alphas.iter().find(|(pattern, _)| fits(pattern));
        let rank = rank.map_or(self.rank, |(_, rank)| *rank);
        let alpha = alpha.map_or(self.alpha, |(_, alpha)| *alpha);
        let divisor = if self.rslora { (rank as f64).sqrt() } else { rank as f64 };
        Stated { rank, scale: alpha / divisor }
    }
}

/// Whether `name` is `pattern`, or ends with it after a dot.
fn ends_with(name: &str, pattern: &str) -> bool {
    name.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Reads the settings at `path`.
pub(super) fn read(path: &Path) -> Result<Config, Error> {
    match files::json(path, LIMIT)? {
        Value::Object(map) => parse(&Keys { path, map: &map }),
        _ => Err(Error::NotAnObject { path: path.to_owned() }),
    }
}

fn parse(keys: &Keys<'_>) -> Result<Config, Error> {
    keys.refuse_unsupported()?;
    Ok(Config {
        rank: keys.rank("r", keys.map.get("r"))?,
        alpha: keys.alpha("lora_alpha", keys.map.get("lora_alpha"))?,
        rslora: match keys.map.get("use_rslora") {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Bool(true)) => true,
            found => return Err(keys.value("use_rslora", found, "true or false")),
        },
        ranks: keys.pattern("rank_pattern", Keys::rank)?,
        alphas: keys.pattern("alpha_pattern", Keys::alpha)?,
    })
}

#[derive(Debug, Clone, Copy)]
struct Keys<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl Keys<'_> {
    fn refuse_unsupported(&self) -> Result<(), Error> {
        let text = |key| self.map.get(key).and_then(Value::as_str);
        if text("peft_type") != Some("LORA") {
            return Err(self.value("peft_type", self.map.get("peft_type"), "\"LORA\""));
        }
        for (key, found) in self.map {
            let advice = match (key.as_str(), found) {
                ("bias", Value::String(bias)) if bias == "none" => continue,
                ("bias", Value::Null) => continue,
                ("bias", _) => "only adapters that leave the biases alone (\"none\") are read",
                ("init_lora_weights", found) => match found.as_str() {
                    None | Some("gaussian" | "orthogonal" | "eva") => continue,
                    // These start from a base whose weights they changed.
                    Some(_) => {
                        "the adapter belongs to a changed base; convert it to plain LoRA with save_pretrained(…, path_initial_model_for_weight_conversion=…)"
                    }
                },
                ("fan_in_fan_out", Value::Bool(true)) => {
                    "the adapter was trained on transposed weights; train it on linear layers"
                }
                (key, _) if HARMLESS.contains(&key) => continue,
                (_, found) if is_unused(found, None) => continue,
                _ => MERGE,
            };
            return Err(Error::Unsupported {
                path: self.path.to_owned(),
                key: key.clone(),
                found: show(found),
                advice,
            });
        }
        Ok(())
    }

    fn rank(&self, key: &str, found: Option<&Value>) -> Result<usize, Error> {
        let rank = found.and_then(Value::as_u64).filter(|rank| (1..=1 << 20).contains(rank));
        let rank = rank.ok_or_else(|| self.value(key, found, "a whole number from 1"))?;
        Ok(rank as usize)
    }

    fn alpha(&self, key: &str, found: Option<&Value>) -> Result<f64, Error> {
        found
            .and_then(Value::as_f64)
            .filter(|alpha| alpha.is_finite())
            .ok_or_else(|| self.value(key, found, "a number"))
    }

    /// Values for projections by the end of their names, in the order the file has them.
    fn pattern<T>(
        &self,
        key: &str,
        read: impl Fn(&Self, &str, Option<&Value>) -> Result<T, Error>,
    ) -> Result<Vec<(String, T)>, Error> {
        let patterns = match self.map.get(key) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Object(patterns)) => patterns,
            found => return Err(self.value(key, found, "an object")),
        };
        patterns
            .iter()
            .map(|(pattern, value)| {
                let name = format!("{key}.{pattern}");
                // PEFT takes regular expressions; a plain name is the end of a module's name.
                let plain = |c: char| c.is_ascii_alphanumeric() || "._".contains(c);
                if !pattern.chars().all(plain) {
                    return Err(Error::Unsupported {
                        path: self.path.to_owned(),
                        key: name,
                        found: value.to_string(),
                        advice: "only plain names are read; write the modules out",
                    });
                }
                Ok((pattern.clone(), read(self, &name, Some(value))?))
            })
            .collect()
    }

    fn value(&self, key: &str, found: Option<&Value>, expected: &'static str) -> Error {
        let found = found.map_or_else(|| "missing".to_owned(), show);
        Error::Value { path: self.path.to_owned(), key: key.to_owned(), found, expected }
    }
}
