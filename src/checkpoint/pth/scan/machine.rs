//! The stack machine of pickles, restricted to what builds tensors.

use std::collections::BTreeMap;

use super::value::Value;
use super::{Error, global};

/// Most bytes of values a reader would copy into and out of its memo.
const COPY_LIMIT: u64 = 512 << 20;
/// Most instructions that are run: those of some twenty thousand tensors.
const STEP_LIMIT: usize = 1 << 20;
/// How deep values may nest; a tensor's are four deep.
const DEPTH_LIMIT: u32 = 16;
/// What a value costs beside its text.
const VALUE_COST: u64 = 64;

/// What bounds a value.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Extent {
    /// Bytes of a copy of it.
    cost: u64,
    /// How deep it nests.
    depth: u32,
}

/// The machine.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    code: &'a [u8],
    at: usize,
    values: Vec<(Value, Extent)>,
    /// Indices of values, and marks.
    stack: Vec<Option<usize>>,
    memo: BTreeMap<u32, usize>,
    copied: u64,
}

impl<'a> Machine<'a> {
    pub(super) fn new(code: &'a [u8]) -> Self {
        let (values, stack, memo) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { code, at: 0, values, stack, memo, copied: 0 }
    }

    /// The value at `index`, which the machine gave.
    pub(super) fn value(&self, index: usize) -> &Value {
        &self.values[index].0
    }

    /// What a value is, for messages.
    pub(super) fn describe(&self, index: usize) -> &'static str {
        match self.value(index) {
            Value::Plain(what) => what,
            Value::Int(_) | Value::Long(_) => "a number",
            Value::Text(_) => "a text",
            Value::Tuple(_) => "a tuple",
            Value::List => "a list",
            Value::Dict(_) => "a dict",
            Value::Global(_) => "a class",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }

    /// Runs the whole program; gives the one value it leaves.
    pub(super) fn run(&mut self) -> Result<usize, Error> {
        let mut steps = 0;
        while self.step()? {
            steps += 1;
            if steps > STEP_LIMIT {
                return Err(Error::Bomb { at: self.at });
            }
        }
        match (&self.stack[..], self.at == self.code.len()) {
            ([Some(root)], true) => Ok(*root),
            ([Some(_)], false) => Err(self.malformed("bytes after its end")),
            _ => Err(self.malformed("it does not leave one value")),
        }
    }

    /// Runs one instruction; `false` after the last.
    fn step(&mut self) -> Result<bool, Error> {
        let at = self.at;
        let code = self.bytes::<1>()?[0];
        match code {
            0x80 => {
                self.bytes::<1>()?;
            }
            b'.' => return Ok(false),
            b'(' => self.stack.push(None),
            b'N' => self.push(Value::Plain("None"), 1)?,
            0x88 | 0x89 => self.push(Value::Plain("a truth value"), 1)?,
            b'G' => {
                self.bytes::<8>()?;
                self.push(Value::Plain("a float"), 1)?;
            }
            b'K' => {
                let [byte] = self.bytes()?;
                self.push(Value::Int(byte.into()), 1)?;
            }
            b'M' => {
                let number = u16::from_le_bytes(self.bytes()?);
                self.push(Value::Int(number.into()), 1)?;
            }
            b'J' => {
                let number = i32::from_le_bytes(self.bytes()?);
                self.push(Value::Int(number.into()), 1)?;
            }
            0x8a => self.long()?,
            b'X' => self.text()?,
            b'c' => self.global()?,
            b'q' => {
                let [slot] = self.bytes()?;
                self.put(slot.into())?;
            }
            b'r' => {
                let slot = u32::from_le_bytes(self.bytes()?);
                self.put(slot)?;
            }
            b'h' => {
                let [slot] = self.bytes()?;
                self.get(slot.into())?;
            }
            b'j' => {
                let slot = u32::from_le_bytes(self.bytes()?);
                self.get(slot)?;
            }
            b')' => self.tuple(Vec::new())?,
            0x85..=0x87 => {
                let mut parts = Vec::new();
                for _ in 0x84..code {
                    parts.push(self.pop()?);
                }
                parts.reverse();
                self.tuple(parts)?;
            }
            b't' => {
                let parts = self.pop_to_mark()?;
                self.tuple(parts)?;
            }
            b']' => self.push(Value::List, 1)?,
            b'a' => {
                let part = self.pop()?;
                self.append(&[part])?;
            }
            b'e' => {
                let parts = self.pop_to_mark()?;
                self.append(&parts)?;
            }
            b'}' => self.push(Value::Dict(Vec::new()), 1)?,
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(&[key, value])?;
            }
            b'u' => {
                let parts = self.pop_to_mark()?;
                self.set(&parts)?;
            }
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            b'Q' => self.persistent()?,
            code => return Err(Error::Instruction { code, at }),
        }
        Ok(true)
    }

    pub(super) fn malformed(&self, what: &'static str) -> Error {
        Error::Malformed { at: self.at, what }
    }

    /// The next `N` bytes.
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let bytes = self.code.get(self.at..).and_then(<[u8]>::first_chunk);
        let bytes = *bytes.ok_or(Error::Truncated { at: self.code.len() })?;
        self.at += N;
        Ok(bytes)
    }

    /// The next `length` bytes.
    fn slice(&mut self, length: usize) -> Result<&'a [u8], Error> {
        let end = self.at.checked_add(length);
        let bytes = end.and_then(|end| self.code.get(self.at..end));
        let bytes = bytes.ok_or(Error::Truncated { at: self.code.len() })?;
        self.at += length;
        Ok(bytes)
    }

    /// The bytes up to a line's end, as text.
    fn line(&mut self) -> Result<String, Error> {
        let rest = &self.code[self.at..];
        let length = rest.iter().position(|byte| *byte == b'\n');
        let length = length.ok_or(Error::Truncated { at: self.code.len() })?;
        let line = String::from_utf8_lossy(self.slice(length)?).into_owned();
        self.at += 1;
        Ok(line)
    }

    /// Pushes a value whose own text has `length` bytes, or whose parts are counted already.
    fn push(&mut self, value: Value, length: usize) -> Result<(), Error> {
        self.push_with(value, Extent { cost: VALUE_COST + length as u64, depth: 1 })
    }

    pub(super) fn push_with(&mut self, value: Value, extent: Extent) -> Result<(), Error> {
        if extent.depth > DEPTH_LIMIT {
            return Err(Error::Bomb { at: self.at });
        }
        self.stack.push(Some(self.values.len()));
        self.values.push((value, extent));
        Ok(())
    }

    pub(super) fn pop(&mut self) -> Result<usize, Error> {
        self.stack.pop().flatten().ok_or_else(|| self.malformed("a value is missing"))
    }

    pub(super) fn top(&self) -> Result<usize, Error> {
        self.stack.last().copied().flatten().ok_or_else(|| self.malformed("a value is missing"))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<usize>, Error> {
        let Some(mark) = self.stack.iter().rposition(Option::is_none) else {
            return Err(self.malformed("a mark is missing"));
        };
        let parts = self.stack.split_off(mark + 1).into_iter().flatten().collect();
        self.stack.pop();
        Ok(parts)
    }

    /// What a value made of `parts` is bounded by.
    pub(super) fn extent(&self, parts: &[usize]) -> Extent {
        parts.iter().map(|part| self.values[*part].1).fold(
            Extent { cost: VALUE_COST, depth: 1 },
            |whole, part| Extent {
                cost: whole.cost.saturating_add(part.cost),
                depth: whole.depth.max(part.depth + 1),
            },
        )
    }

    /// Counts a copy of the value.
    fn copy(&mut self, index: usize) -> Result<(), Error> {
        self.copied = self.copied.saturating_add(self.values[index].1.cost);
        if self.copied > COPY_LIMIT { Err(Error::Bomb { at: self.at }) } else { Ok(()) }
    }

    fn put(&mut self, slot: u32) -> Result<(), Error> {
        let top = self.top()?;
        self.copy(top)?;
        self.memo.insert(slot, top);
        Ok(())
    }

    /// Values that can still grow are not shared: a reader that copies would see another program.
    fn get(&mut self, slot: u32) -> Result<(), Error> {
        let value = self.memo.get(&slot).copied();
        let value = value.ok_or_else(|| self.malformed("nothing is remembered under a number"))?;
        if matches!(self.value(value), Value::Dict(_) | Value::List) {
            return Err(self.malformed("a dict or list is used twice"));
        }
        self.copy(value)?;
        self.stack.push(Some(value));
        Ok(())
    }

    fn long(&mut self) -> Result<(), Error> {
        let [length] = self.bytes()?;
        let bytes = self.slice(length.into())?;
        // The sign is the highest bit of the last byte; no size or offset is negative.
        if bytes.len() > 8 || bytes.last().is_some_and(|byte| *byte >= 0x80) {
            return Err(self.malformed("a number is negative or longer than 8 bytes"));
        }
        let number = bytes.iter().rev().fold(0, |number, byte| number << 8 | i64::from(*byte));
        self.push(Value::Long(number), 1)
    }

    fn text(&mut self) -> Result<(), Error> {
        let length = u32::from_le_bytes(self.bytes()?) as usize;
        let bytes = self.slice(length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| self.malformed("a text is not UTF-8"))?;
        self.push(Value::Text(text.to_owned()), length)
    }

    fn global(&mut self) -> Result<(), Error> {
        let (module, name) = (self.line()?, self.line()?);
        match global(&module, &name) {
            Some(global) => self.push(Value::Global(global), module.len() + name.len()),
            None => Err(Error::Object { module, name }),
        }
    }

    fn tuple(&mut self, parts: Vec<usize>) -> Result<(), Error> {
        let extent = self.extent(&parts);
        self.push_with(Value::Tuple(parts), extent)
    }

    /// Appends to the list on top. Its parts are forgotten: no tensor has a list in it.
    fn append(&mut self, parts: &[usize]) -> Result<(), Error> {
        let list = self.top()?;
        if !matches!(self.value(list), Value::List) {
            return Err(self.malformed("a value is appended to what is no list"));
        }
        self.grow(list, parts)
    }

    fn set(&mut self, parts: &[usize]) -> Result<(), Error> {
        let dict = self.top()?;
        let (pairs, rest) = parts.as_chunks::<2>();
        match &mut self.values[dict].0 {
            Value::Dict(entries) if rest.is_empty() => {
                entries.extend(pairs.iter().map(|[key, value]| (*key, *value)));
                self.grow(dict, parts)
            }
            _ => Err(self.malformed("entries are set that are no pairs, or in what is no dict")),
        }
    }

    /// Counts `parts` into the container that took them.
    pub(super) fn grow(&mut self, container: usize, parts: &[usize]) -> Result<(), Error> {
        let (added, own) = (self.extent(parts), self.values[container].1);
        let cost = own.cost.saturating_add(added.cost);
        let depth = own.depth.max(added.depth);
        self.values[container].1 = Extent { cost, depth };
        if depth > DEPTH_LIMIT { Err(Error::Bomb { at: self.at }) } else { Ok(()) }
    }
}
