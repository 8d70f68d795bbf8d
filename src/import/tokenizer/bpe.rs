//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`).
//!
//! Text is split into words, each byte of a word becomes one printable character, and the merges
//! join those. Only the splitting differs between models, and a GGUF file names it instead of
//! stating it; [`PRE`] states it.

use serde_json::{Value, json};

use super::vocabulary::Vocabulary;
use super::{Error, Pipeline, vocab_json};
use crate::import::metadata::{self, Metadata};

/// How one pre-tokenizer splits text.
#[derive(Debug, Clone, Copy)]
struct Pre {
    /// Its names in `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// Whether text is composed (NFC) first.
    compose: bool,
    /// Expressions whose matches are cut out, one after the other.
    splits: &'static [&'static str],
    /// Whether a word that is a token is taken whole, without its merges.
    whole_words: bool,
    /// Whether a text begins with the beginning-of-text token, where the file does not say.
    add_bos: bool,
}

const PLAIN: Pre =
    Pre { names: &[], compose: false, splits: &[], whole_words: false, add_bos: false };

/// Letters with case, as `DeepSeek`'s first models list them. The six that Unicode composes to others
/// are escaped, so that no editor composes them.
const CASED_LETTERS: &str = concat!(
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ",
    "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u{1F7D}ᾀ-ᾴᾶ-ᾼ\u{1FBE}ῂ-ῄῆ-ῌῐ-\u{1FD3}ῖ-\u{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u{2126}ℨ\u{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄ",
    "Ⰰ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
);
/// Chinese characters, the letters from Samaritan on, and Hangul.
const CJK: &str = "[一-龥ࠀ-一가-퟿]+";

const DIGIT: &str = r"\p{N}";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Every pre-tokenizer that is known.
const PRE: &[Pre] = &[
    Pre { names: &["gpt-2"], splits: &[GPT2], ..PLAIN },
    Pre { names: &["smollm", "starcoder", "refact"], splits: &[DIGIT, GPT2], ..PLAIN },
    Pre { names: &["command-r"], compose: true, splits: &[DIGIT, GPT2], ..PLAIN },
    Pre {
        names: &["llama-bpe", "llama-v3", "llama3"],
        splits: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        whole_words: true,
        add_bos: true,
        ..PLAIN
    },
    Pre {
        names: &["qwen2"],
        compose: true,
        splits: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-llm"],
        splits: &[r"[\r\n]", CASED_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK, DIGIT],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-coder"],
        splits: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGIT],
        ..PLAIN
    },
];

/// The pipeline of the file's vocabulary, merges and pre-tokenizer.
pub fn pipeline(metadata: Metadata<'_>, vocabulary: &Vocabulary) -> Result<Pipeline, Error> {
    let named = metadata.string("tokenizer.ggml.pre")?.unwrap_or("");
    let Some(pre) = PRE.iter().find(|pre| pre.names.contains(&named)) else {
        let known: Vec<_> = PRE.iter().flat_map(|pre| pre.names).copied().collect();
        return Err(Error::Pre { found: named.into(), known: known.join(", ") });
    };
    if metadata.flag("tokenizer.ggml.add_space_prefix")? == Some(true) {
        return Err(Error::Setting { key: "tokenizer.ggml.add_space_prefix" });
    }
    let add_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(pre.add_bos);
    Ok(Pipeline {
        normalizer: if pre.compose { json!({ "type": "NFC" }) } else { Value::Null },
        pre_tokenizer: pre_tokenizer(pre),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.whole_words,
            "vocab": vocab_json(vocabulary),
            "merges": merges(metadata, vocabulary)?,
        }),
        post_processor: byte_level(false, false),
        decoder: byte_level(true, true),
        add_bos,
        add_eos: metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
    })
}

fn byte_level(trim_offsets: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    })
}

/// Cuts by one expression after the other, then spells each word in bytes.
///
/// Hugging Face has a step of its own for digits, and its byte step can cut as GPT-2 does; both cut
/// the same. But onnxruntime-genai's version of the one knows decimal digits only, and its version
/// of the other changes what the steps before it cut. Plain expressions work alike everywhere.
fn pre_tokenizer(pre: &Pre) -> Value {
    let mut steps: Vec<Value> = pre
        .splits
        .iter()
        .map(|regex| {
            json!({
                "type": "Split",
                "pattern": { "Regex": regex },
                "behavior": "Isolated",
                "invert": false,
            })
        })
        .collect();
    steps.push(byte_level(true, false));
    json!({ "type": "Sequence", "pretokenizers": steps })
}

/// The merges as pairs, each checked: two tokens whose texts together are a third.
fn merges<'a>(
    metadata: Metadata<'a>,
    vocabulary: &Vocabulary,
) -> Result<Vec<(&'a str, &'a str)>, Error> {
    let key = "tokenizer.ggml.merges";
    let merges = metadata
        .strings(key)?
        .ok_or(metadata::Error::Missing { key: key.into(), expected: "an array of strings" })?;
    let known = |text: &str| vocabulary.ids.contains_key(text);
    merges
        .iter()
        .enumerate()
        .map(|(index, merge)| {
            merge
                .split_once(' ')
                .filter(|(left, right)| {
                    known(left) && known(right) && known(&[*left, *right].concat())
                })
                .ok_or_else(|| Error::Merge { index, merge: merge.clone() })
        })
        .collect()
}
