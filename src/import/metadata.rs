//! Typed access to GGUF metadata: each key is asked for once, and named when it is wrong.

use std::collections::BTreeMap;

use super::gguf::Value;

/// A metadata key that is missing or holds something else.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The key is not there.
    #[error("the metadata key {key:?} is missing; expected {expected}")]
    Missing {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// The key holds a value of another type or range.
    #[error("the metadata key {key:?} should hold {expected}, found {found}")]
    Type {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        found: String,
    },
}

/// The metadata of one file.
#[derive(Debug, Clone, Copy)]
pub struct Metadata<'a>(pub &'a BTreeMap<String, Value>);

impl<'a> Metadata<'a> {
    /// All keys, sorted.
    pub fn keys(self) -> impl Iterator<Item = &'a str> {
        self.0.keys().map(String::as_str)
    }

    /// `read` of the value at `key`, `None` where the key is absent.
    fn get<T>(
        self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(Error::Type { key: key.into(), expected, found: describe(value) }),
        }
    }

    /// An integer from 0 up.
    pub fn count(self, key: &str) -> Result<Option<usize>, Error> {
        self.get(key, "a whole number from 0 up", |value| match value {
            Value::Unsigned(n) => usize::try_from(*n).ok(),
            Value::Signed(n) => usize::try_from(*n).ok(),
            _ => None,
        })
    }

    /// An integer from 1 up that must be there.
    pub fn size(self, key: &str) -> Result<usize, Error> {
        let expected = "a whole number from 1 up";
        match self.count(key)? {
            Some(0) => Err(Error::Type { key: key.into(), expected, found: "0".into() }),
            Some(n) => Ok(n),
            None => Err(Error::Missing { key: key.into(), expected }),
        }
    }

    /// A finite number; an `f32` becomes the `f64` with the same shortest decimal form, so that
    /// `1e-5` is written as `1e-5`.
    pub fn number(self, key: &str) -> Result<Option<f64>, Error> {
        self.get(key, "a finite number", |value| {
            let number = match value {
                Value::Float(x) => decimal(*x),
                Value::Double(x) => *x,
                Value::Unsigned(n) => *n as f64,
                Value::Signed(n) => *n as f64,
                _ => return None,
            };
            number.is_finite().then_some(number)
        })
    }

    /// True or false.
    pub fn flag(self, key: &str) -> Result<Option<bool>, Error> {
        self.get(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A string.
    pub fn string(self, key: &str) -> Result<Option<&'a str>, Error> {
        self.get(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A string that must be there.
    pub fn text(self, key: &str) -> Result<&'a str, Error> {
        self.string(key)?.ok_or_else(|| Error::Missing { key: key.into(), expected: "a string" })
    }

    /// An array of strings.
    pub fn strings(self, key: &str) -> Result<Option<&'a [String]>, Error> {
        self.get(key, "an array of strings", |value| match value {
            Value::Strings(all) => Some(all.as_slice()),
            _ => None,
        })
    }

    /// An array of `f32`.
    pub fn floats(self, key: &str) -> Result<Option<&'a [f32]>, Error> {
        self.get(key, "an array of f32", |value| match value {
            Value::Floats(all) => Some(all.as_slice()),
            _ => None,
        })
    }

    /// An array of 32-bit integers.
    pub fn integers(self, key: &str) -> Result<Option<&'a [i64]>, Error> {
        self.get(key, "an array of 32-bit integers", |value| match value {
            Value::Integers(all) => Some(all.as_slice()),
            _ => None,
        })
    }
}

/// The `f64` whose shortest decimal form is that of `x`.
pub(super) fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::NAN)
}

/// A value, short enough for a message.
fn describe(value: &Value) -> String {
    match value {
        Value::Unsigned(n) => n.to_string(),
        Value::Signed(n) => n.to_string(),
        Value::Float(x) => x.to_string(),
        Value::Double(x) => x.to_string(),
        Value::Bool(flag) => flag.to_string(),
        Value::String(text) => format!("{:?}", text.chars().take(60).collect::<String>()),
        Value::Strings(all) => format!("an array of {} strings", all.len()),
        Value::Floats(all) => format!("an array of {} f32", all.len()),
        Value::Integers(all) => format!("an array of {} integers", all.len()),
        Value::Skipped { length } => format!("an array of {length} other values"),
    }
}
