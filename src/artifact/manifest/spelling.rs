//! How the IR's small types are spelt in JSON.

use serde::{Deserialize, Serialize};
use skipgpt_passes::ir::{Architecture, DType, Dispatch};

/// `f32`, `f16`, `bf16`.
#[derive(Serialize, Deserialize)]
#[serde(remote = "DType", rename_all = "lowercase")]
pub(super) enum DTypeDef {
    F32,
    F16,
    BF16,
}

/// `masked`, `gathered`, `conditional`.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Dispatch", rename_all = "lowercase")]
pub(super) enum DispatchDef {
    Masked,
    Gathered,
    Conditional,
}

/// The checkpoint's `model_type`.
pub(super) const fn architecture(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Llama => "llama",
        Architecture::Mistral => "mistral",
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
    }
}

/// Modules as `["layers.3.mlp", …]`.
pub(super) mod modules {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};
    use skipgpt_passes::ir::ModuleId;

    pub(in super::super) fn serialize<S: Serializer>(
        modules: &[ModuleId],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(modules.iter().map(ToString::to_string))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<ModuleId>, D::Error> {
        let expected = "expected a module such as layers.3.attention or layers.0.mlp";
        Vec::<String>::deserialize(deserializer)?
            .iter()
            .map(|text| {
                ModuleId::parse(text)
                    .ok_or_else(|| D::Error::custom(format!("{expected}, found {text:?}")))
            })
            .collect()
    }
}

/// A dispatch that may be absent.
pub(super) mod dispatch {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use skipgpt_passes::ir::Dispatch;

    #[derive(Serialize, Deserialize)]
    struct Wrapped(#[serde(with = "super::DispatchDef")] Dispatch);

    #[allow(
        clippy::ref_option,
        clippy::trivially_copy_pass_by_ref,
        reason = "the signature serde's `with` calls"
    )]
    pub(in super::super) fn serialize<S: Serializer>(
        dispatch: &Option<Dispatch>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        dispatch.map(Wrapped).serialize(serializer)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Dispatch>, D::Error> {
        Ok(Option::<Wrapped>::deserialize(deserializer)?.map(|Wrapped(dispatch)| dispatch))
    }
}

/// The dispatch asked for, where `None` is `auto`.
pub(super) mod auto_dispatch {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use skipgpt_passes::ir::Dispatch;

    #[derive(Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Asked {
        Auto,
        Masked,
        Gathered,
        Conditional,
    }

    #[allow(
        clippy::ref_option,
        clippy::trivially_copy_pass_by_ref,
        reason = "the signature serde's `with` calls"
    )]
    pub(in super::super) fn serialize<S: Serializer>(
        dispatch: &Option<Dispatch>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match dispatch {
            None => Asked::Auto,
            Some(Dispatch::Masked) => Asked::Masked,
            Some(Dispatch::Gathered) => Asked::Gathered,
            Some(Dispatch::Conditional) => Asked::Conditional,
        }
        .serialize(serializer)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Dispatch>, D::Error> {
        Ok(match Asked::deserialize(deserializer)? {
            Asked::Auto => None,
            Asked::Masked => Some(Dispatch::Masked),
            Asked::Gathered => Some(Dispatch::Gathered),
            Asked::Conditional => Some(Dispatch::Conditional),
        })
    }
}
