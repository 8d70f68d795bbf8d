//! What the configuration beside another exporter's graph says of it.

use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;

use crate::artifact::{Error, names};
use crate::runtime::CacheFacts;

/// The part of `genai_config.json` that is about caches.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct GenaiConfig {
    model: Model,
    search: Search,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Model {
    decoder: Decoder,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Decoder {
    num_key_value_heads: Option<usize>,
    head_size: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Search {
    past_present_share_buffer: bool,
}

/// What `genai_config.json` in `directory` says of the graph's cache; nothing where there is none.
///
/// # Errors
///
/// [`Error::Json`] if it is not as onnxruntime-genai writes it, [`Error::Io`] if it cannot be read.
pub(super) fn cache_facts(directory: &Path) -> Result<CacheFacts, Error> {
    let path = directory.join(names::GENAI_CONFIG);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(CacheFacts::default()),
        Err(error) => return Err(Error::io("read", &path, error)),
    };
    let config: GenaiConfig =
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { path, source })?;
    Ok(CacheFacts {
        kv_heads: config.model.decoder.num_key_value_heads,
        head_dim: config.model.decoder.head_size,
        shared_buffer: config.search.past_present_share_buffer,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    fn read(text: Option<&str>) -> Result<CacheFacts, Error> {
        let directory = tempfile::tempdir().unwrap();
        if let Some(text) = text {
            fs::write(directory.path().join(names::GENAI_CONFIG), text).unwrap();
        }
        cache_facts(directory.path())
    }

    #[test]
    fn a_builder_s_configuration_gives_heads_and_buffer() {
        let text = r#"{ "model": { "type": "llama", "decoder": { "head_size": 64,
            "num_key_value_heads": 3 } }, "search": { "past_present_share_buffer": true } }"#;
        let expected = CacheFacts { kv_heads: Some(3), head_dim: Some(64), shared_buffer: true };
        assert_eq!(read(Some(text)).unwrap(), expected);
    }

    #[test]
    fn where_nothing_is_said_nothing_is_known() {
        assert_eq!(read(None).unwrap(), CacheFacts::default());
        assert_eq!(read(Some("{}")).unwrap(), CacheFacts::default());
        let error = read(Some("{ \"model\": 1 }")).unwrap_err().to_string();
        assert!(error.contains(names::GENAI_CONFIG), "{error}");
    }
}
