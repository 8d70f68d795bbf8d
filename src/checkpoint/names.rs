//! Checkpoint tensor names: the one place that knows them.
//!
//! The same tensor has several names in the wild. All are read as one *canonical* name, the one a
//! plain Hugging Face checkpoint uses:
//!
//! ```text
//! base_model.model.model.layers.0.block.self_attn.q_proj.base_layer.weight
//! model.layers.0.self_attn.q_proj.weight
//! ```
//!
//! `base_model.model.` and `base_layer` are PEFT's wrapping, `block` is that of `SkipGPT`'s training
//! code, and an adapter's own name (`lora_A.default.weight`) is PEFT's again.

use skipgpt_passes::ir::ModuleKind;

/// Token embedding.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Scale of the final `RMSNorm`.
pub(crate) const NORM: &str = "model.norm.weight";
/// Language-model head, without `.weight`.
pub(crate) const HEAD: &str = "lm_head";
/// What PEFT puts before every name of the model it wraps.
pub(crate) const PEFT_PREFIX: &str = "base_model.model.";

/// What a tensor is, by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Part of the base model.
    Base,
    /// Part of a router.
    Router {
        /// Which layer's.
        layer: usize,
        /// Which module's; `None` if the name is of no form that is known.
        part: Option<ModuleKind>,
    },
    /// A or B of a low-rank adapter.
    Lora {
        /// What it adapts, such as `model.layers.0.self_attn.q_proj`.
        target: String,
    },
    /// Part of an adapter of a form that is not read, by what its name shows.
    Unsupported(&'static str),
}

/// A tensor name, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    /// The name a plain checkpoint uses.
    pub(crate) canonical: String,
    /// What it is.
    pub(crate) kind: Kind,
}

/// The name of part `part` of layer `layer`: `model.layers.3.self_attn.q_proj`.
pub(crate) fn layer(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}")
}

/// The name of a router's tensor, `part` being `weight_predictor.weight` and the like.
pub(crate) fn router(layer: usize, kind: ModuleKind, part: &str) -> String {
    format!("model.layers.{layer}.router_{kind}.{part}")
}

/// The name of A (`lora_A`) or B (`lora_B`) of the adapter on `target`.
pub(crate) fn lora(target: &str, side: &str) -> String {
    format!("{target}.{side}.weight")
}

/// The layer a canonical name belongs to.
pub(crate) fn layer_index(canonical: &str) -> Option<usize> {
    index(canonical.strip_prefix("model.layers.")?.split('.').next()?)
}

/// Whether transformers computes the tensor itself and only old checkpoints still hold it.
pub(crate) fn is_derived(canonical: &str) -> bool {
    canonical.ends_with(".rotary_emb.inv_freq")
}

/// Reads a name as it stands in a file.
pub(crate) fn parse(raw: &str) -> Name {
    let mut segments: Vec<&str> = raw.strip_prefix(PEFT_PREFIX).unwrap_or(raw).split('.').collect();
    if let ["model", "layers", number, "block", ..] = segments[..]
        && index(number).is_some()
    {
        segments.remove(3);
    }
    if segments.len() >= 2 && segments[segments.len() - 2] == "base_layer" {
        segments.remove(segments.len() - 2);
    }
    if let Some(unsupported) = unsupported(&segments) {
        return Name { canonical: segments.join("."), kind: Kind::Unsupported(unsupported) };
    }
    if let Some((target, side)) = adapter(&segments) {
        let target = target.join(".");
        return Name { canonical: lora(&target, side), kind: Kind::Lora { target } };
    }
    let canonical = segments.join(".");
    match segments[..] {
        ["model", "layers", number, module, ref rest @ ..] if module.starts_with("router") => {
            match index(number) {
                Some(layer) => {
                    Name { canonical, kind: Kind::Router { layer, part: routed(module, rest) } }
                }
                None => Name { canonical, kind: Kind::Base },
            }
        }
        _ => Name { canonical, kind: Kind::Base },
    }
}

/// The module a router decides for, if the rest of its name is of a known form.
fn routed(module: &str, rest: &[&str]) -> Option<ModuleKind> {
    let (["weight_predictor" | "hidden_layer", "weight" | "bias"], kind) = (rest, module) else {
        return None;
    };
    match kind {
        "router_attention" => Some(ModuleKind::Attention),
        "router_mlp" => Some(ModuleKind::Mlp),
        _ => None,
    }
}

/// Target and side of `<target>.lora_A.weight` and `<target>.lora_A.<adapter's name>.weight`.
fn adapter<'a>(segments: &'a [&'a str]) -> Option<(&'a [&'a str], &'a str)> {
    match segments {
        [target @ .., side @ ("lora_A" | "lora_B"), "weight"]
        | [target @ .., side @ ("lora_A" | "lora_B"), _, "weight"] => Some((target, side)),
        _ => None,
    }
}

/// What an adapter's tensor shows that is not read.
fn unsupported(segments: &[&str]) -> Option<&'static str> {
    let has = |name: &str| segments.contains(&name);
    let last_is_bias = segments.last() == Some(&"bias");
    if has("lora_magnitude_vector") {
        Some("DoRA (lora_magnitude_vector)")
    } else if has("modules_to_save") {
        Some("modules_to_save")
    } else if has("lora_embedding_A") || has("lora_embedding_B") {
        Some("an adapter on an embedding")
    } else if (has("lora_A") || has("lora_B")) && last_is_bias {
        Some("lora_bias")
    } else if (has("lora_A") || has("lora_B")) && adapter(segments).is_none() {
        Some("an adapter whose tensors are not called lora_A.weight and lora_B.weight")
    } else {
        None
    }
}

/// A decimal index without leading zeros.
fn index(text: &str) -> Option<usize> {
    text.parse().ok().filter(|number: &usize| number.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(raw: &str, canonical: &str, kind: Kind) {
        assert_eq!(parse(raw), Name { canonical: canonical.into(), kind });
    }

    #[test]
    fn every_spelling_of_a_base_tensor_is_one_name() {
        let plain = "model.layers.10.self_attn.q_proj.weight";
        for raw in [
            plain,
            "base_model.model.model.layers.10.self_attn.q_proj.weight",
            "model.layers.10.block.self_attn.q_proj.weight",
            "base_model.model.model.layers.10.block.self_attn.q_proj.base_layer.weight",
        ] {
            check(raw, plain, Kind::Base);
        }
        check("lm_head.weight", "lm_head.weight", Kind::Base);
        check("", "", Kind::Base);
        check("model.layers.x.router_mlp.w", "model.layers.x.router_mlp.w", Kind::Base);
    }

    #[test]
    fn routers_are_told_by_layer_and_module() {
        let router = |layer, part| Kind::Router { layer, part };
        let name = "model.layers.3.router_mlp.hidden_layer.bias";
        check(name, name, router(3, Some(ModuleKind::Mlp)));
        check(&format!("base_model.model.{name}"), name, router(3, Some(ModuleKind::Mlp)));
        let name = "model.layers.0.router_attention.weight_predictor.weight";
        check(name, name, router(0, Some(ModuleKind::Attention)));
        let name = "model.layers.0.router_attention.fc.weight";
        check(name, name, router(0, None));
        let name = "model.layers.0.router.weight";
        check(name, name, router(0, None));
    }

    #[test]
    fn adapters_lose_their_own_name() {
        let target = "model.layers.0.self_attn.q_proj";
        let canonical = "model.layers.0.self_attn.q_proj.lora_A.weight";
        for raw in [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.block.self_attn.q_proj.lora_A.default.weight",
            "model.layers.0.block.self_attn.q_proj.lora_A.stage2.weight",
        ] {
            check(raw, canonical, Kind::Lora { target: target.into() });
        }
        check(
            "base_model.model.lm_head.lora_B.weight",
            "lm_head.lora_B.weight",
            Kind::Lora { target: "lm_head".into() },
        );
    }

    #[test]
    fn adapters_of_other_forms_are_named() {
        for (name, what) in [
            ("a.q_proj.lora_magnitude_vector.default.weight", "DoRA (lora_magnitude_vector)"),
            ("lm_head.modules_to_save.default.weight", "modules_to_save"),
            ("model.embed_tokens.lora_embedding_A", "an adapter on an embedding"),
            ("a.q_proj.lora_B.bias", "lora_bias"),
            (
                "a.q_proj.lora_A",
                "an adapter whose tensors are not called lora_A.weight and lora_B.weight",
            ),
        ] {
            check(name, name, Kind::Unsupported(what));
        }
    }

    #[test]
    fn layer_indices_are_plain_decimals() {
        assert_eq!(layer_index("model.layers.12.mlp.up_proj.weight"), Some(12));
        assert_eq!(layer_index("model.layers.012.mlp.up_proj.weight"), None);
        assert_eq!(layer_index("model.norm.weight"), None);
    }
}
