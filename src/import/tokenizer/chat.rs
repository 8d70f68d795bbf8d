//! Chat templates.

use super::Error;
use crate::import::metadata::Metadata;

const KEY: &str = "tokenizer.chat_template";

/// The templates of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Templates<'a> {
    /// The one without a name.
    pub default: Option<&'a str>,
    /// The others, by name.
    pub named: Vec<(&'a str, &'a str)>,
}

impl<'a> Templates<'a> {
    /// Reads `tokenizer.chat_template` and `tokenizer.chat_template.NAME`.
    pub fn read(metadata: Metadata<'a>) -> Result<Self, Error> {
        let mut named = Vec::new();
        for key in metadata.keys() {
            let Some(name) = key.strip_prefix(KEY).and_then(|rest| rest.strip_prefix('.')) else {
                continue;
            };
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if name.is_empty() || !name.chars().all(plain) {
                return Err(Error::TemplateName { name: name.into() });
            }
            named.push((name, metadata.text(key)?));
        }
        Ok(Self { default: metadata.string(KEY)?, named })
    }

    /// The templates as Hugging Face keeps several, `(path, contents)`; none where one suffices.
    ///
    /// Once there is a folder of named ones, the default is looked for in a file, too.
    pub fn files(&self) -> Vec<(String, String)> {
        if self.named.is_empty() {
            return Vec::new();
        }
        let default = self.default.map(|text| ("chat_template.jinja".to_owned(), text.to_owned()));
        let named = self.named.iter().map(|(name, template)| {
            (format!("additional_chat_templates/{name}.jinja"), (*template).to_owned())
        });
        default.into_iter().chain(named).collect()
    }
}
