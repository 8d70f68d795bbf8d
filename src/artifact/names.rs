//! The names of an artifact's files.

/// The ONNX graph.
pub const MODEL: &str = "model.onnx";
/// The weights.
pub const DATA: &str = "model.onnx.data";
/// The checkpoint's configuration, unchanged.
pub const CONFIG: &str = "config.json";
/// Defaults for generation.
pub const GENERATION_CONFIG: &str = "generation_config.json";
/// What onnxruntime-genai reads.
pub const GENAI_CONFIG: &str = "genai_config.json";
/// What was done, with the hashes of everything.
pub const MANIFEST: &str = "manifest.json";
/// The model card.
pub const CARD: &str = "README.md";

/// Files that travel with a model unchanged, where the checkpoint has them.
pub const COPIED: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "merges.txt",
    "NOTICE",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "USE_POLICY.md",
    "vocab.json",
];
