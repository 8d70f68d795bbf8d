//! What the values of a pickle are, as far as tensors need them.

/// A class or function that tensors need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Global {
    /// `collections.OrderedDict`.
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`.
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`.
    RebuildParameter,
    /// `torch.FloatStorage` and the like.
    Storage(String),
}

/// Where a tensor's bytes lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Storage {
    /// Its class in `torch`.
    pub(super) class: String,
    /// Its name in the archive.
    pub(super) key: String,
}

/// A tensor, by reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tensor {
    pub(super) storage: Storage,
    /// Its first element in the storage.
    pub(super) offset: u64,
    pub(super) shape: Vec<usize>,
    /// In elements.
    pub(super) strides: Vec<usize>,
    /// Whether `_rebuild_parameter` wraps it.
    pub(super) parameter: bool,
}

/// A value of the machine. Parts of composite values are indices into `Machine::values`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// `None`, `True`, `False` or a float: nothing a tensor needs.
    Plain(&'static str),
    /// A 32-bit integer.
    Int(i64),
    /// A longer one.
    Long(i64),
    Text(String),
    Tuple(Vec<usize>),
    List,
    /// Of either class.
    Dict(Vec<(usize, usize)>),
    Global(Global),
    Storage(Storage),
    Tensor(Tensor),
}
