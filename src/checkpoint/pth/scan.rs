//! A symbolic walk over a pickle: what would be built, without building it.
//!
//! The walk knows the instructions `torch.save` writes for a state dict of tensors and the few
//! globals those need; anything else ends it. It also bounds what candle's reader, which runs the
//! same program by copying values, would copy and how deep its values nest.

mod machine;
mod objects;
mod value;

use candle_core as candle;

use machine::Machine;
use value::{Global, Value};

/// What is in a pickle that a state dict of tensors does not need.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The pickle ends inside an instruction, or never stops.
    #[error("the pickle is truncated at byte {at}")]
    Truncated {
        /// Where.
        at: usize,
    },
    /// An instruction `torch.save` does not write for tensors.
    #[error(
        "the pickle has instruction {code:#04x} at byte {at}, which torch.save does not write for a state dict of tensors"
    )]
    Instruction {
        /// Its code.
        code: u8,
        /// Where.
        at: usize,
    },
    /// A class or function of some library.
    #[error(
        "the pickle holds an object of {module}.{name}; only tensors are read. Save the tensors alone: torch.save({{name: tensor, …}}, file)"
    )]
    Object {
        /// Where Python would import it from.
        module: String,
        /// What it is called there.
        name: String,
    },
    /// Instructions that do not fit together.
    #[error("the pickle is malformed at byte {at}: {what}")]
    Malformed {
        /// Where.
        at: usize,
        /// How.
        what: &'static str,
    },
    /// The pickle would make its reader copy or nest without bound.
    #[error("the pickle repeats or nests its values beyond what a state dict needs (byte {at})")]
    Bomb {
        /// Where.
        at: usize,
    },
    /// The whole is not a state dict.
    #[error("holds {found}; expected a state dict, that is a dict from names to tensors")]
    NotAStateDict {
        /// What it is.
        found: &'static str,
    },
    /// An entry of the state dict is not a tensor.
    #[error(
        "entry {name} is {found}; expected a tensor. Save the state dict itself, without other entries"
    )]
    NotATensor {
        /// The entry.
        name: String,
        /// What it is.
        found: &'static str,
    },
    /// A key stands twice.
    #[error("entry {name} stands in the state dict twice")]
    Duplicate {
        /// The entry.
        name: String,
    },
    /// A tensor of a type candle's reader does not have.
    #[error(
        "tensor {name} is stored as torch.{storage}; FloatStorage, HalfStorage, BFloat16Storage, DoubleStorage, LongStorage and ByteStorage are read"
    )]
    Storage {
        /// The entry.
        name: String,
        /// The class of its storage.
        storage: String,
    },
    /// A tensor that is a view with gaps or swapped dimensions.
    #[error(
        "tensor {name} of shape {shape:?} has strides {strides:?}, which are not contiguous; save {name}.contiguous()"
    )]
    Strided {
        /// The entry.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        strides: Vec<usize>,
    },
    /// A tensor whose size in bytes is no number.
    #[error("tensor {name} of shape {shape:?} is larger than any file")]
    Overflow {
        /// The entry.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
}

/// A tensor a pickle refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tensor {
    /// Its key in the state dict.
    pub(super) name: String,
    /// Row-major.
    pub(super) shape: Vec<usize>,
    /// How its elements are stored.
    pub(super) dtype: candle::DType,
    /// The name of its storage in the archive's `data` folder.
    pub(super) storage: String,
    /// Where it ends in that storage, in bytes.
    pub(super) end: u64,
}

/// The tensors of the state dict that `pickle` would build.
pub(super) fn scan(pickle: &[u8]) -> Result<Vec<Tensor>, Error> {
    let mut machine = Machine::new(pickle);
    let root = machine.run()?;
    let Value::Dict(entries) = machine.value(root) else {
        return Err(Error::NotAStateDict { found: machine.describe(root) });
    };
    let mut names = std::collections::BTreeSet::new();
    let mut tensors = Vec::with_capacity(entries.len());
    for &(key, value) in entries {
        let Value::Text(name) = machine.value(key) else {
            return Err(Error::NotAStateDict { found: "a dict whose keys are not all names" });
        };
        // What `Module.state_dict` attaches: the versions of its modules, as plain numbers.
        if name == "_metadata" && matches!(machine.value(value), Value::Dict(_)) {
            continue;
        }
        if !names.insert(name) {
            return Err(Error::Duplicate { name: name.clone() });
        }
        tensors.push(tensor(&machine, name, value)?);
    }
    Ok(tensors)
}

/// Reads entry `name` as a tensor.
fn tensor(machine: &Machine<'_>, name: &str, value: usize) -> Result<Tensor, Error> {
    let Value::Tensor(value::Tensor { storage, offset, shape, strides, .. }) = machine.value(value)
    else {
        return Err(Error::NotATensor { name: name.to_owned(), found: machine.describe(value) });
    };
    let dtype = match storage.class.as_str() {
        "FloatStorage" => candle::DType::F32,
        "DoubleStorage" => candle::DType::F64,
        "HalfStorage" => candle::DType::F16,
        "BFloat16Storage" => candle::DType::BF16,
        "ByteStorage" => candle::DType::U8,
        "LongStorage" => candle::DType::I64,
        other => {
            return Err(Error::Storage { name: name.to_owned(), storage: other.to_owned() });
        }
    };
    let overflow = || Error::Overflow { name: name.to_owned(), shape: shape.clone() };
    let elements =
        shape.iter().try_fold(1usize, |product, d| product.checked_mul(*d)).ok_or_else(overflow)?;
    let end = offset
        .checked_add(elements as u64)
        .and_then(|end| end.checked_mul(dtype.size_in_bytes() as u64))
        .filter(|end| i64::try_from(*end).is_ok())
        .ok_or_else(overflow)?;
    if elements > 0 {
        let dims = candle::Shape::from(shape.clone());
        if !dims.is_contiguous(strides) && !dims.is_fortran_contiguous(strides) {
            let (shape, strides) = (shape.clone(), strides.clone());
            return Err(Error::Strided { name: name.to_owned(), shape, strides });
        }
    }
    let (name, shape, storage) = (name.to_owned(), shape.clone(), storage.key.clone());
    Ok(Tensor { name, shape, dtype, storage, end })
}

/// Whether a class or function is needed for tensors.
fn global(module: &str, name: &str) -> Option<Global> {
    match (module, name) {
        ("collections", "OrderedDict") => Some(Global::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2") => Some(Global::RebuildTensor),
        ("torch._utils", "_rebuild_parameter") => Some(Global::RebuildParameter),
        ("torch", class) if class.ends_with("Storage") => Some(Global::Storage(class.to_owned())),
        _ => None,
    }
}
