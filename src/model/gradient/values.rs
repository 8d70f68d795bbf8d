//! Tensors as slices.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};

/// A tensor's values, borrowed from its storage.
pub(crate) struct Held<'a> {
    /// Candle's lock, whose type it does not export.
    storage: Box<dyn Deref<Target = Storage> + Sync + 'a>,
    range: Range<usize>,
}

/// The values of a contiguous `f32` tensor on the CPU, row-major.
pub(crate) fn hold(tensor: &Tensor) -> Result<Held<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(cpu) = &*storage else {
        bail!("a tensor of {:?} is not in the host's memory", tensor.shape());
    };
    let range = range(layout)?;
    // Checked once, so that dereferencing cannot fail.
    if cpu.as_slice::<f32>()?.get(range.clone()).is_none() {
        bail!("a tensor of {:?} reaches past its storage", tensor.shape());
    }
    Ok(Held { storage: Box::new(storage), range })
}

impl Deref for Held<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => &[],
        }
    }
}

/// A frozen matrix as products take it: itself, or a copy in `f32` of one that is kept in half precision.
pub(crate) fn widened(matrix: &Tensor) -> Result<Tensor> {
    matrix.to_dtype(DType::F32)
}

/// The values an operation's forward is given.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let range = range(layout)?;
    Ok(&storage.as_slice::<f32>()?[range])
}

fn range(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("a tensor of {:?} is not contiguous", layout.shape()),
    }
}

/// Rows and width of a tensor seen as a matrix over its last dimension.
pub(super) fn matrix(shape: &Shape) -> (usize, usize) {
    let width = shape.dims().last().copied().unwrap_or(1);
    (shape.elem_count() / width.max(1), width)
}

/// Values as a tensor of `shape`; they are moved, not copied.
pub(super) fn tensor(values: Vec<f32>, shape: &Shape) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Whether any value of the row is not zero.
pub(super) fn live(row: &[f32]) -> bool {
    row.iter().any(|value| *value != 0.0)
}

/// Runs `work` on one of the threads that parallel loops use.
///
/// From another thread each loop hands over and waits, with two switches between threads; from one of
/// theirs it begins at once, and an operation has a dozen loops.
pub(super) fn among_workers<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
