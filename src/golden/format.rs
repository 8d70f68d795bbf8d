//! JSON that people can read and diff: one line per record, not per number.

use std::io;

use serde_json::ser::Formatter;

/// Containers down to this depth put every field, and every array or object within an array, on a
/// line of its own. Numbers and strings in arrays, and all that lies deeper, stay on one line.
const DEPTH: usize = 4;

/// See [`DEPTH`].
#[derive(Debug, Default)]
pub(super) struct Lines {
    depth: usize,
    /// Between the beginning of an array's element and its first character.
    element: bool,
    /// By open container: whether it has put anything on a line of its own.
    broken: Vec<bool>,
}

impl Lines {
    fn line<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        if let Some(broken) = self.broken.last_mut() {
            *broken = true;
        }
        writer.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| writer.write_all(b"  "))
    }

    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        if std::mem::take(&mut self.element) && self.depth <= DEPTH {
            self.line(writer)?;
        }
        self.depth += 1;
        self.broken.push(false);
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.broken.pop() == Some(true) {
            writer.write_all(b"\n")?;
            (0..self.depth).try_for_each(|_| writer.write_all(b"  "))?;
        }
        writer.write_all(bracket)
    }
}

impl Formatter for Lines {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.element = true;
        if first { Ok(()) } else { writer.write_all(b",") }
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.element = false;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if !first {
            writer.write_all(b",")?;
        }
        if self.depth <= DEPTH {
            return self.line(writer);
        }
        if first { Ok(()) } else { writer.write_all(b" ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.element = false;
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on must stop")]
    use expect_test::expect;
    use serde::Serialize;
    use serde_json::{Serializer, Value, json};

    use super::*;

    fn lines(value: &Value) -> String {
        let mut out = Vec::new();
        value.serialize(&mut Serializer::with_formatter(&mut out, Lines::default())).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn numbers_stay_together_and_records_do_not() {
        let value = json!({
            "a": 1,
            "empty": [],
            "none": {},
            "prompts": [
                { "ids": [1, 2, 3], "top": [[[1, -0.5], [2, -1.0]], [[3, -0.1]]],
                  "routing": [{ "keep": "101", "near": [[2, 0.5]] }, { "keep": "000", "near": [] }] },
                { "ids": [] },
            ],
        });
        let text = lines(&value);
        expect![[r#"
            {
              "a": 1,
              "empty": [],
              "none": {},
              "prompts": [
                {
                  "ids": [1,2,3],
                  "top": [
                    [[1,-0.5],[2,-1.0]],
                    [[3,-0.1]]
                  ],
                  "routing": [
                    {"keep": "101", "near": [[2,0.5]]},
                    {"keep": "000", "near": []}
                  ]
                },
                {
                  "ids": []
                }
              ]
            }"#]]
        .assert_eq(&text);
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }
}
