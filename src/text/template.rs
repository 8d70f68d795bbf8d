//! Chat templates: messages to the prompt a model was trained on.
//!
//! A template is Jinja source beside the tokenizer. It is rendered as Hugging Face's libraries do:
//! blocks trimmed, Python's methods on strings and maps, their `tojson`, `raise_exception` and
//! `strftime_now`, and the special tokens as variables.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use minijinja::value::{Kwargs, Value as Jinja};
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::Value;

use super::clock::strftime;
use super::{Error, json};

const NAME: &str = "chat";

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    path: PathBuf,
    environment: Environment<'static>,
    tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The template of `directory`: `chat_template.jinja`, or else `chat_template` in
    /// `tokenizer_config.json`; `None` where there is neither.
    pub(super) fn open(directory: &Path) -> Result<Option<Self>, Error> {
        let config_path = directory.join("tokenizer_config.json");
        let config = json(&config_path)?.unwrap_or_default();
        let tokens = special_tokens(&config);
        let path = directory.join("chat_template.jinja");
        match std::fs::read_to_string(&path) {
            Ok(source) => Self::new(path, &source, tokens).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let source = in_config(&config_path, &config)?;
                source.map(|source| Self::new(config_path, source, tokens)).transpose()
            }
            Err(source) => Err(Error::Read { path, source }),
        }
    }

    fn new(path: PathBuf, source: &str, tokens: BTreeMap<String, String>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", |value: &Jinja, options: Kwargs| to_json(value, &options));
        environment.add_function("raise_exception", |message: String| {
            Err::<Jinja, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| {
            strftime(&format, SystemTime::now()).map_err(|error| {
                minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string())
            })
        });
        match environment.add_template_owned(NAME, without_generation_tags(source)) {
            Ok(()) => Ok(Self { path, environment, tokens }),
            Err(source) => Err(Error::Template { path, source }),
        }
    }

    /// The prompt of `messages`; with `ask`, ending where the model's answer begins.
    pub fn render(&self, messages: &[Message], ask: bool) -> Result<String, Error> {
        let variables = context! {
            messages => messages,
            add_generation_prompt => ask,
            tools => (),
            documents => (),
            ..Jinja::from_serialize(&self.tokens)
        };
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(variables))
            .map_err(|source| Error::Template { path: self.path.clone(), source })
    }
}

/// The template in `tokenizer_config.json`: a text, or a list of named ones.
fn in_config<'a>(path: &Path, config: &'a Value) -> Result<Option<&'a str>, Error> {
    let wrong = |found: &Value| Error::Key {
        path: path.to_owned(),
        key: "chat_template",
        expected: "a text, or a list of {name, template} with one named default",
        found: found.to_string(),
    };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source)),
        Some(named @ Value::Array(templates)) => templates
            .iter()
            .find(|template| template.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|template| template.get("template")?.as_str())
            .map(Some)
            .ok_or_else(|| wrong(named)),
        Some(other) => Err(wrong(other)),
    }
}

/// `bos_token` and the like, which are texts or objects with a `content`.
fn special_tokens(config: &Value) -> BTreeMap<String, String> {
    let entries = config.as_object().into_iter().flatten();
    entries
        .filter(|(key, _)| key.ends_with("_token"))
        .filter_map(|(key, value)| {
            let text = value.get("content").unwrap_or(value).as_str()?;
            Some((key.clone(), text.to_owned()))
        })
        .collect()
}

/// `{% generation %}` marks what a model is trained on and does nothing to the text; it becomes a
/// block that does nothing either.
fn without_generation_tags(source: &str) -> String {
    let mut pieces = source.split("{%");
    let mut out = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        out.push_str("{%");
        let Some((tag, rest)) = piece.split_once("%}") else {
            out.push_str(piece);
            continue;
        };
        match tag.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        out.push_str("%}");
        out.push_str(rest);
    }
    out
}

/// JSON as Python's `json.dumps` writes it, which models were trained on: a space after commas and
/// colons, nothing escaped for HTML.
fn to_json(value: &Jinja, options: &Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Characters outside ASCII are never escaped, and keys keep their order.
    for (key, default) in [("ensure_ascii", false), ("sort_keys", false)] {
        if options.get::<Option<bool>>(key)?.is_some_and(|given| given != default) {
            let message = format!("tojson({key}={}) is not supported", !default);
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
        }
    }
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Python)),
        Some(width) => {
            let indent = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))
        }
    };
    let failed = |error: String| minijinja::Error::new(ErrorKind::BadSerialization, error);
    written.map_err(|error| failed(error.to_string()))?;
    String::from_utf8(bytes).map_err(|error| failed(error.to_string()))
}

/// Python's separators.
struct Python;

impl serde_json::ser::Formatter for Python {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
