//! The logits a step was asked for, and no others, off the device they were computed on.

use std::fmt::Debug;

use ndarray::{Array3, Axis, concatenate};
use ort::memory::MemoryInfo;
use ort::value::{
    DynTensor, DynTensorValueType, DynValue, PrimitiveTensorElementType, Shape, TensorElementType,
    TensorRefMut,
};

use super::decoder::Error;
use super::interface::LOGITS;
use super::tensor::{of_tensor, ranked, to_ranked};
use crate::decoder::Logits;

/// `value` `[batch, sequence, vocab]` as it was asked for: all of it, or the last token of each row.
///
/// A graph may give the last token's alone, `[batch, 1, vocab]`.
pub(super) fn read(value: &DynValue, wanted: Logits) -> Result<Array3<f32>, Error> {
    let failed = |source| Error::Read { name: LOGITS.to_owned(), source };
    let tensor = value.view().downcast::<DynTensorValueType>().map_err(failed)?;
    let shape: Vec<usize> = tensor.shape().iter().map(|dim| *dim as usize).collect();
    let (&[batch, sequence, vocab], Logits::Last) = (shape.as_slice(), wanted) else {
        return to_ranked(LOGITS, value);
    };
    if sequence <= 1 {
        return to_ranked(LOGITS, value);
    }
    let rows = (0..batch).map(|row| {
        let first = ((row + 1) * sequence - 1) * vocab;
        match tensor.data_type() {
            TensorElementType::Float16 => part::<half::f16>(&tensor, first, vocab),
            TensorElementType::Bfloat16 => part::<half::bf16>(&tensor, first, vocab),
            // Anything but a float is refused as it is read.
            _ => part::<f32>(&tensor, first, vocab),
        }
    });
    let rows = rows.collect::<Result<Vec<Array3<f32>>, Error>>()?;
    let views: Vec<_> = rows.iter().map(|row| row.view()).collect();
    concatenate(Axis(0), &views).map_err(|_| Error::Shape {
        name: LOGITS.to_owned(),
        expected: vec![batch, 1, vocab],
        found: shape.clone(),
    })
}

/// The `length` elements from `first` on, `[1, 1, length]`.
fn part<T>(tensor: &DynTensor, first: usize, length: usize) -> Result<Array3<f32>, Error>
where
    T: PrimitiveTensorElementType + Debug + Clone + 'static,
{
    let failed = |source| Error::Read { name: LOGITS.to_owned(), source };
    let info = tensor.memory_info();
    let own = MemoryInfo::new(
        info.allocation_device(),
        info.device_id(),
        info.allocator_type(),
        info.memory_type(),
    )
    .map_err(failed)?;
    let begin = tensor.data_ptr().cast::<T>().wrapping_add(first).cast_mut().cast();
    // SAFETY: the elements lie inside `tensor`, whose shape was read from itself and whose type is
    // `T`, on the device that its own description names; the view is only read, and gone before
    // `tensor` is.
    let view =
        unsafe { TensorRefMut::<T>::from_raw(own, begin, Shape::new([1, 1, length as i64])) }
            .map_err(failed)?;
    ranked(LOGITS, of_tensor(LOGITS, &view.upcast_ref())?)
}
