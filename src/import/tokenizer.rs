//! The tokenizer of a GGUF file as the three files Hugging Face's tools read.
//!
//! A GGUF file holds the vocabulary and the name of the program that used it; `tokenizer.json`
//! holds the program itself. So the pipeline is chosen by name ([`bpe`] by `tokenizer.ggml.pre`,
//! [`sentencepiece`] for `llama`), and a name without a known pipeline is refused: a nearly right
//! tokenizer gives nearly right text, and nobody notices.

pub mod bpe;
pub mod chat;
pub mod sentencepiece;
pub mod vocabulary;

use serde_json::{Map, Value, json};

use super::config::TokenIds;
use super::metadata::{self, Metadata};
use vocabulary::{Kind, Vocabulary};

/// Why the tokenizer cannot be rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key is missing or ill-typed.
    #[error(transparent)]
    Metadata(#[from] metadata::Error),
    /// Another kind of tokenizer.
    #[error(
        "tokenizer.ggml.model is {found:?}; \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece) \
         are rebuilt"
    )]
    Model {
        /// What the file states.
        found: String,
    },
    /// A pre-tokenizer without a known pipeline, or none named.
    #[error(
        "tokenizer.ggml.pre is {found:?}, whose way of splitting text is not known here; \
         known: {known}"
    )]
    Pre {
        /// What the file states.
        found: String,
        /// The names that are known.
        known: String,
    },
    /// An array that does not have one entry per token.
    #[error("{key} has {found} entries for {tokens} tokens")]
    Length {
        /// The key.
        key: &'static str,
        /// Its number of entries.
        found: usize,
        /// Number of tokens.
        tokens: usize,
    },
    /// More tokens than the embedding has rows.
    #[error("the vocabulary has {tokens} tokens, the embedding {rows} rows")]
    TooManyTokens {
        /// Number of tokens.
        tokens: usize,
        /// Rows of the embedding.
        rows: usize,
    },
    /// Two tokens of one text.
    #[error("the tokens {first} and {second} are both {text:?}")]
    Duplicate {
        /// The lower id.
        first: usize,
        /// The higher id.
        second: usize,
        /// Their text.
        text: String,
    },
    /// A token type GGUF does not define.
    #[error("tokenizer.ggml.token_type of token {id} is {found}; expected 1 to 6")]
    TokenType {
        /// The token.
        id: usize,
        /// Its type's number.
        found: i64,
    },
    /// An id outside the vocabulary.
    #[error("{key} is {id}; the vocabulary has {tokens} tokens")]
    Id {
        /// The key.
        key: String,
        /// The id.
        id: usize,
        /// Number of tokens.
        tokens: usize,
    },
    /// A token that is to be added to every text, but no id says which.
    #[error("{flag} is true, but there is no {id}")]
    NoId {
        /// The flag.
        flag: &'static str,
        /// The missing key.
        id: &'static str,
    },
    /// A merge of tokens that are not in the vocabulary.
    #[error("merge {index}, {merge:?}, does not join two tokens into a third")]
    Merge {
        /// Its place in `tokenizer.ggml.merges`.
        index: usize,
        /// The merge.
        merge: String,
    },
    /// A `SentencePiece` vocabulary that cannot spell every text.
    #[error("the SentencePiece vocabulary has no token {text:?}, which byte fallback needs")]
    ByteToken {
        /// The token's text.
        text: String,
    },
    /// A setting that is not reproduced.
    #[error("{key} is set, which is not reproduced in tokenizer.json")]
    Setting {
        /// The key.
        key: &'static str,
    },
    /// A name that cannot be a file's.
    #[error("the chat template {name:?} has a name that is not plain letters, digits, - and _")]
    TemplateName {
        /// The name.
        name: String,
    },
    /// Hugging Face's library refuses the result: a bug here, or a vocabulary beyond repair.
    #[error("the rebuilt tokenizer.json is not valid: {reason}")]
    Rejected {
        /// What the library said.
        reason: String,
    },
}

/// The tokenizer's files, and the ids other files name.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    /// `(name, contents)`, in the order they are written.
    pub files: Vec<(String, String)>,
    /// Begins, ends and fills texts.
    pub ids: TokenIds,
}

/// Rebuilds the tokenizer of a model with `rows` rows of embedding and `context` tokens of context.
pub fn build(metadata: Metadata<'_>, rows: usize, context: usize) -> Result<Tokenizer, Error> {
    let vocabulary = Vocabulary::read(metadata)?;
    let tokens = vocabulary.tokens.len();
    if tokens > rows {
        return Err(Error::TooManyTokens { tokens, rows });
    }
    for key in ["tokenizer.ggml.add_sep_token", "tokenizer.ggml.remove_extra_whitespaces"] {
        if metadata.flag(key)? == Some(true) {
            return Err(Error::Setting { key });
        }
    }
    let charsmap = "tokenizer.ggml.precompiled_charsmap";
    if metadata.keys().any(|key| key == charsmap) {
        return Err(Error::Setting { key: charsmap });
    }
    let pipeline = match metadata.text("tokenizer.ggml.model")? {
        "gpt2" => bpe::pipeline(metadata, &vocabulary)?,
        "llama" => sentencepiece::pipeline(metadata, &vocabulary)?,
        found => return Err(Error::Model { found: found.into() }),
    };
    let json = tokenizer_json(&vocabulary, pipeline)?;
    let json = format!("{json:#}\n");
    tokenizers::Tokenizer::from_bytes(json.as_bytes())
        .map_err(|source| Error::Rejected { reason: source.to_string() })?;

    let specials = special_tokens(&vocabulary);
    let templates = chat::Templates::read(metadata)?;
    let config = config_json(&vocabulary, &specials, context, templates.default);
    let mut files = vec![
        ("tokenizer.json".into(), json),
        ("tokenizer_config.json".into(), format!("{config:#}\n")),
        ("special_tokens_map.json".into(), format!("{:#}\n", Value::Object(specials))),
    ];
    files.extend(templates.files());
    Ok(Tokenizer { files, ids: vocabulary.token_ids() })
}

/// The steps of `tokenizer.json` that differ between tokenizers.
#[derive(Debug, Clone)]
pub struct Pipeline {
    /// Rewrites text.
    normalizer: Value,
    /// Splits it into words.
    pre_tokenizer: Value,
    /// Splits words into tokens.
    model: Value,
    /// What runs before special tokens are put around the ids; null for nothing.
    post_processor: Value,
    /// Turns tokens back into text.
    decoder: Value,
    /// Whether a text begins with the beginning-of-text token.
    add_bos: bool,
    /// Whether a text ends with the end-of-text token.
    add_eos: bool,
}

fn tokenizer_json(vocabulary: &Vocabulary, pipeline: Pipeline) -> Result<Value, Error> {
    let added: Vec<Value> = vocabulary
        .added()
        .map(|(id, text, special)| {
            let mut token = added_token(text, special);
            if let Value::Object(fields) = &mut token {
                fields.shift_insert(0, "id".into(), id.into());
            }
            token
        })
        .collect();
    let around = around(vocabulary, &pipeline)?;
    let post_processor = match (pipeline.post_processor, around) {
        (first, None) => first,
        (Value::Null, Some(around)) => around,
        (first, Some(around)) => json!({ "type": "Sequence", "processors": [first, around] }),
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": pipeline.normalizer,
        "pre_tokenizer": pipeline.pre_tokenizer,
        "post_processor": post_processor,
        "decoder": pipeline.decoder,
        "model": pipeline.model,
    }))
}

fn added_token(text: &str, special: bool) -> Value {
    json!({
        "content": text,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": special,
    })
}

/// The template that puts the beginning- and end-of-text tokens around a text.
fn around(vocabulary: &Vocabulary, pipeline: &Pipeline) -> Result<Option<Value>, Error> {
    let bos = wanted(
        pipeline.add_bos,
        vocabulary.bos,
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.bos_token_id",
    )?;
    let eos = wanted(
        pipeline.add_eos,
        vocabulary.eos,
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.eos_token_id",
    )?;
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let special = |id: usize, part: usize| json!({ "SpecialToken": { "id": vocabulary.tokens[id], "type_id": part } });
    let part = |sequence: &str, part: usize| {
        let mut steps = Vec::new();
        steps.extend(bos.map(|id| special(id, part)));
        steps.push(json!({ "Sequence": { "id": sequence, "type_id": part } }));
        steps.extend(eos.map(|id| special(id, part)));
        steps
    };
    let single = part("A", 0);
    let pair: Vec<Value> = single.iter().cloned().chain(part("B", 1)).collect();
    let tokens: Map<String, Value> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|id| {
            let text = &vocabulary.tokens[id];
            (text.clone(), json!({ "id": text, "ids": [id], "tokens": [text] }))
        })
        .collect();
    Ok(Some(json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": tokens,
    })))
}

fn wanted(
    flag: bool,
    id: Option<usize>,
    flag_key: &'static str,
    id_key: &'static str,
) -> Result<Option<usize>, Error> {
    match (flag, id) {
        (false, _) => Ok(None),
        (true, Some(id)) => Ok(Some(id)),
        (true, None) => Err(Error::NoId { flag: flag_key, id: id_key }),
    }
}

/// `special_tokens_map.json`: the tokens with a role.
fn special_tokens(vocabulary: &Vocabulary) -> Map<String, Value> {
    vocabulary
        .roles()
        .map(|(role, id)| (role.into(), added_token_without_kind(&vocabulary.tokens[id])))
        .collect()
}

fn added_token_without_kind(text: &str) -> Value {
    json!({
        "content": text,
        "lstrip": false,
        "normalized": false,
        "rstrip": false,
        "single_word": false,
    })
}

/// `tokenizer_config.json`.
///
/// The class is the one that runs `tokenizer.json` as it stands: classes named after a model
/// replace parts of it by what that model's first release did.
fn config_json(
    vocabulary: &Vocabulary,
    specials: &Map<String, Value>,
    context: usize,
    chat_template: Option<&str>,
) -> Value {
    let added: Map<String, Value> = vocabulary
        .added()
        .map(|(id, text, special)| (id.to_string(), added_token(text, special)))
        .collect();
    let mut config = json!({
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": false,
        // Without them transformers adds token_type_ids, which these models refuse.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    if let Value::Object(fields) = &mut config {
        for (role, token) in specials {
            fields.insert(role.clone(), token["content"].clone());
        }
        if let Some(template) = chat_template {
            fields.insert("chat_template".into(), template.into());
        }
    }
    config
}

/// The vocabulary of a model section: every token but those that only fill up the embedding.
fn vocab_json(vocabulary: &Vocabulary) -> Map<String, Value> {
    vocabulary
        .tokens
        .iter()
        .enumerate()
        .filter(|(id, text)| !(vocabulary.kinds[*id] == Kind::Unused && **text == filler(*id)))
        .map(|(id, text)| (text.clone(), id.into()))
        .collect()
}

/// What writers of GGUF files call the rows of an embedding that no token has.
fn filler(id: usize) -> String {
    format!("[PAD{id}]")
}
