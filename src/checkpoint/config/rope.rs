//! Rotary embedding: `rope_theta` beside `rope_scaling`, or both in `rope_parameters`.

use serde_json::Value;
use skipgpt_passes::ir::{Rope, RopeScaling};

use super::keys::Keys;
use super::{Conflict, Error};

/// The base of the frequencies where none is stated.
const DEFAULT_THETA: f64 = 10000.0;

/// Reads the rotary embedding of either form.
pub(super) fn read(keys: &Keys<'_>) -> Result<Rope, Error> {
    let present = |key: &'static str| keys.map.get(key).filter(|v| !v.is_null()).map(|v| (key, v));
    let (key, settings) = match (present("rope_scaling"), present("rope_parameters")) {
        (Some(_), Some(_)) => return Err(keys.conflict(Conflict::RopeTwice)),
        (Some(found), None) | (None, Some(found)) => found,
        (None, None) => {
            let theta = keys.optional_positive("rope_theta")?.unwrap_or(DEFAULT_THETA);
            return Ok(Rope { theta, scaling: RopeScaling::None });
        }
    };
    let Value::Object(map) = settings else {
        return Err(keys.value(key, settings, "null or an object"));
    };
    let inner = Inner { key, keys: Keys { path: keys.path, map } };
    let theta = match (keys.optional_positive("rope_theta")?, inner.optional("rope_theta")?) {
        (Some(outer), Some(inner)) if outer.to_bits() != inner.to_bits() => {
            return Err(keys.conflict(Conflict::Theta(outer, inner)));
        }
        (outer, inner) => outer.or(inner).unwrap_or(DEFAULT_THETA),
    };
    Ok(Rope { theta, scaling: inner.scaling()? })
}

/// The object of `RoPE` settings; messages name its keys `rope_scaling.factor`.
struct Inner<'a> {
    key: &'static str,
    keys: Keys<'a>,
}

impl Inner<'_> {
    fn scaling(&self) -> Result<RopeScaling, Error> {
        const PLAIN: [&str; 4] = ["rope_theta", "partial_rotary_factor", "rope_type", "type"];
        const KNOWN: &str = "default, linear and llama3 are read";
        if let Some((name, nested)) = self.keys.map.iter().find(|(_, v)| v.is_object()) {
            let advice = "only one setting for all layers is read";
            return Err(self.keys.unsupported(&self.name(name), nested, advice));
        }
        if let Some(found) = self.keys.map.get("partial_rotary_factor")
            && found.as_f64() != Some(1.0)
            && !found.is_null()
        {
            let advice = "rotary embedding must turn the whole head";
            return Err(self.keys.unsupported(&self.name("partial_rotary_factor"), found, advice));
        }
        // `type` is the older name; transformers prefers the newer.
        let kind = ["rope_type", "type"]
            .into_iter()
            .find_map(|name| Some((name, self.keys.map.get(name).filter(|v| !v.is_null())?)));
        let Some((name, kind)) = kind else {
            // Without a type, an object that states no scaling is the default.
            let plain = self.keys.map.keys().all(|key| PLAIN.contains(&key.as_str()));
            let missing =
                || self.keys.missing(&self.name("rope_type"), "default, linear or llama3");
            return if plain { Ok(RopeScaling::None) } else { Err(missing()) };
        };
        match kind.as_str() {
            Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: self.number("factor")? }),
            Some("llama3") => self.llama3(),
            _ => Err(self.keys.unsupported(&self.name(name), kind, KNOWN)),
        }
    }

    fn llama3(&self) -> Result<RopeScaling, Error> {
        let original = "original_max_position_embeddings";
        let (low, high) = (self.number("low_freq_factor")?, self.number("high_freq_factor")?);
        if high <= low {
            return Err(self.keys.conflict(Conflict::RopeRamp { key: self.key, low, high }));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.number("factor")?,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: self.named(original, |keys| keys.size(original))?,
        })
    }

    fn number(&self, key: &str) -> Result<f64, Error> {
        self.named(key, |keys| keys.positive(key))
    }

    fn optional(&self, key: &str) -> Result<Option<f64>, Error> {
        self.named(key, |keys| keys.optional_positive(key))
    }

    /// Reads a key; an error names it with the object it stands in.
    fn named<T>(
        &self,
        name: &str,
        read: impl FnOnce(&Keys<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        read(&self.keys).map_err(|mut error| {
            if let Error::Missing { key, .. } | Error::Value { key, .. } = &mut error {
                *key = self.name(name);
            }
            error
        })
    }

    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.key)
    }
}
