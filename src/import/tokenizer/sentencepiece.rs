//! `SentencePiece` BPE (`tokenizer.ggml.model` = `llama`).
//!
//! The vocabulary has a score per piece and no merges: `SentencePiece` joins, at every step, the
//! neighbours whose union has the highest score. `tokenizer.json` knows merges only, so every way
//! to cut a piece into two others becomes one, the highest score first. What cannot be spelled in
//! pieces is spelled in bytes, `<0x00>` to `<0xFF>`.

use std::cmp::Reverse;

use serde_json::{Value, json};

use super::vocabulary::Vocabulary;
use super::{Error, Pipeline, vocab_json};
use crate::import::metadata::{self, Metadata};

/// What stands for a blank.
const BLANK: &str = "\u{2581}";

/// The pipeline of the file's pieces and scores.
pub fn pipeline(metadata: Metadata<'_>, vocabulary: &Vocabulary) -> Result<Pipeline, Error> {
    let key = "tokenizer.ggml.scores";
    let scores = metadata
        .floats(key)?
        .ok_or(metadata::Error::Missing { key: key.into(), expected: "an array of f32" })?;
    let tokens = vocabulary.tokens.len();
    if scores.len() != tokens {
        return Err(Error::Length { key, found: scores.len(), tokens });
    }
    for byte in 0..=255_u8 {
        let text = format!("<0x{byte:02X}>");
        if !vocabulary.ids.contains_key(&text) {
            return Err(Error::ByteToken { text });
        }
    }
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    // Byte fallback spells everything, so this is never produced; the reader wants a name.
    let unknown = vocabulary.unknown.map(|id| &vocabulary.tokens[id]);
    Ok(Pipeline {
        normalizer: normalizer(prefix),
        pre_tokenizer: Value::Null,
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocab_json(vocabulary),
            "merges": merges(vocabulary, scores),
        }),
        post_processor: Value::Null,
        decoder: decoder(prefix),
        add_bos: metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(true),
        add_eos: metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
    })
}

fn normalizer(prefix: bool) -> Value {
    let mut steps = Vec::new();
    if prefix {
        steps.push(json!({ "type": "Prepend", "prepend": BLANK }));
    }
    steps.push(json!({ "type": "Replace", "pattern": { "String": " " }, "content": BLANK }));
    json!({ "type": "Sequence", "normalizers": steps })
}

fn decoder(prefix: bool) -> Value {
    let mut steps = vec![
        json!({ "type": "Replace", "pattern": { "String": BLANK }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        steps.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    json!({ "type": "Sequence", "decoders": steps })
}

/// A merge and what it is ordered by.
struct Merge<'a> {
    score: f32,
    left: &'a str,
    right: &'a str,
}

/// All merges, the highest score first; among equal scores the longer left part, then the longer
/// right part, then the order of the pieces, then of their parts.
fn merges<'a>(vocabulary: &'a Vocabulary, scores: &[f32]) -> Vec<(&'a str, &'a str)> {
    let mut merges = Vec::new();
    for (piece, &score) in vocabulary.tokens.iter().zip(scores) {
        let mut cuts: Vec<_> = piece
            .char_indices()
            .skip(1)
            .map(|(at, _)| piece.split_at(at))
            .filter_map(|(left, right)| {
                let ids = (*vocabulary.ids.get(left)?, *vocabulary.ids.get(right)?);
                Some((ids, Merge { score, left, right }))
            })
            .collect();
        cuts.sort_by_key(|(ids, _)| *ids);
        merges.extend(cuts.into_iter().map(|(_, merge)| merge));
    }
    let length = |text: &str| text.chars().count();
    let order = |merge: &Merge<'_>| (Reverse(length(merge.left)), Reverse(length(merge.right)));
    // Adding zero makes -0 and 0 the same score, which they are.
    merges.sort_by(|a, b| {
        (b.score + 0.0).total_cmp(&(a.score + 0.0)).then_with(|| order(a).cmp(&order(b)))
    });
    merges.into_iter().map(|merge| (merge.left, merge.right)).collect()
}
