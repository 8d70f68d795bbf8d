//! A quantisation as JSON:
//! `{"bits": 4, "block": 32, "symmetric": true, "method": "search", "accuracy_level": 4,
//! "embedding": true, "head": true}`.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use skipgpt_passes::plan::Quantization;
use skipgpt_passes::quantization::{AccuracyLevel, Bits, Method, Scheme};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spelt {
    bits: u8,
    block: usize,
    symmetric: bool,
    #[serde(with = "MethodDef")]
    method: Method,
    accuracy_level: u8,
    embedding: bool,
    head: bool,
}

/// `nearest`, `search`.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Method", rename_all = "lowercase")]
enum MethodDef {
    Nearest,
    Search,
}

#[allow(
    clippy::ref_option,
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature serde's `with` calls"
)]
pub(super) fn serialize<S: Serializer>(
    quantization: &Option<Quantization>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    quantization
        .map(|Quantization { scheme, embedding, head }| Spelt {
            bits: scheme.bits.count() as u8,
            block: scheme.block,
            symmetric: scheme.symmetric,
            method: scheme.method,
            accuracy_level: scheme.accuracy.number(),
            embedding,
            head,
        })
        .serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Quantization>, D::Error> {
    let Some(spelt) = Option::<Spelt>::deserialize(deserializer)? else { return Ok(None) };
    let bits = match spelt.bits {
        4 => Bits::Four,
        8 => Bits::Eight,
        other => return Err(D::Error::custom(format!("expected 4 or 8 bits, found {other}"))),
    };
    let level = usize::from(spelt.accuracy_level);
    let accuracy = AccuracyLevel::ALL.get(level).copied().ok_or_else(|| {
        D::Error::custom(format!("expected an accuracy level from 0 to 4, found {level}"))
    })?;
    let Spelt { block, symmetric, method, embedding, head, .. } = spelt;
    let scheme = Scheme { bits, block, symmetric, method, accuracy };
    Ok(Some(Quantization { scheme, embedding, head }))
}
