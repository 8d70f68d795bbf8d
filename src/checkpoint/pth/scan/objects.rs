//! The calls and references that make tensors.

use super::Error;
use super::machine::Machine;
use super::value::{Global, Storage, Tensor, Value};

impl Machine<'_> {
    /// `callable(*arguments)`.
    pub(super) fn reduce(&mut self) -> Result<(), Error> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        // A reader keeps both.
        let extent = self.extent(&[arguments, callable]);
        let Value::Tuple(parts) = self.value(arguments) else {
            return Err(self.malformed("a function is called without arguments"));
        };
        let value = match (self.value(callable), &parts[..]) {
            (Value::Global(Global::OrderedDict), []) => Value::Dict(Vec::new()),
            (Value::Global(Global::RebuildTensor), [storage, offset, shape, strides, ..])
                if parts.len() <= 7 =>
            {
                self.tensor([*storage, *offset, *shape, *strides])?
            }
            (Value::Global(Global::RebuildParameter), [data, _, _]) => match self.value(*data) {
                Value::Tensor(tensor) if !tensor.parameter => {
                    Value::Tensor(Tensor { parameter: true, ..tensor.clone() })
                }
                _ => return Err(self.malformed("a parameter holds no tensor")),
            },
            _ => return Err(self.malformed("a function is called with unexpected arguments")),
        };
        self.push_with(value, extent)
    }

    /// The tensor `_rebuild_tensor_v2` makes of its first four arguments.
    fn tensor(&self, [storage, offset, shape, strides]: [usize; 4]) -> Result<Value, Error> {
        let Value::Storage(storage) = self.value(storage) else {
            return Err(self.malformed("a tensor has no storage"));
        };
        let (Value::Int(offset) | Value::Long(offset)) = self.value(offset) else {
            return Err(self.malformed("a tensor's offset is no number"));
        };
        let offset =
            u64::try_from(*offset).map_err(|_| self.malformed("a tensor's offset is negative"))?;
        let (Some(shape), Some(strides)) = (self.sizes(shape), self.sizes(strides)) else {
            return Err(self.malformed("a tensor's shape or strides are not 31-bit numbers"));
        };
        if shape.len() != strides.len() {
            return Err(self.malformed("a tensor has not as many strides as dimensions"));
        }
        let storage = storage.clone();
        Ok(Value::Tensor(Tensor { storage, offset, shape, strides, parameter: false }))
    }

    fn sizes(&self, tuple: usize) -> Option<Vec<usize>> {
        let Value::Tuple(parts) = self.value(tuple) else { return None };
        parts
            .iter()
            .map(|part| match self.value(*part) {
                Value::Int(size) => usize::try_from(*size).ok(),
                _ => None,
            })
            .collect()
    }

    /// State for the object below: only `_metadata`, which `Module.state_dict` attaches.
    pub(super) fn build(&mut self) -> Result<(), Error> {
        let state = self.pop()?;
        let object = self.top()?;
        let (Value::Dict(entries), Value::Dict(_)) = (self.value(state), self.value(object)) else {
            return Err(self.malformed("an object is given state"));
        };
        let plain = |&(key, value): &(usize, usize)| {
            matches!(self.value(key), Value::Text(name) if name == "_metadata")
                && matches!(self.value(value), Value::Dict(_))
        };
        if !entries.iter().all(plain) {
            return Err(self.malformed("a dict is given state other than _metadata"));
        }
        self.grow(object, &[state])
    }

    /// `('storage', class, key, device, elements)`.
    pub(super) fn persistent(&mut self) -> Result<(), Error> {
        let id = self.pop()?;
        let Value::Tuple(parts) = self.value(id) else {
            return Err(self.malformed("a reference is no tuple"));
        };
        let parts: Vec<_> = parts.iter().map(|part| self.value(*part)).collect();
        let storage = match parts[..] {
            [
                Value::Text(kind),
                Value::Global(Global::Storage(class)),
                Value::Text(key),
                Value::Text(_),
                Value::Int(_) | Value::Long(_),
            ] if kind == "storage" => Storage { class: class.clone(), key: key.clone() },
            _ => return Err(self.malformed("a reference is not to a tensor's storage")),
        };
        let extent = self.extent(&[id]);
        self.push_with(Value::Storage(storage), extent)
    }
}
