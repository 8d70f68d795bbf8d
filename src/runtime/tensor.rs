//! Between ONNX Runtime's values and arrays.

use ndarray::{Array, Array4, ArrayD, Dimension, IxDyn};
use ort::memory::AllocationDevice;
use ort::value::{DynTensor, DynTensorValueType, DynValue, Tensor, TensorElementType};

use super::decoder::Error;

/// A value as an `f32` array on the host, whatever its float type and device.
pub(super) fn to_array(name: &str, value: &DynValue) -> Result<ArrayD<f32>, Error> {
    let failed = |source| Error::Read { name: name.to_owned(), source };
    let tensor = value.view().downcast::<DynTensorValueType>().map_err(failed)?;
    of_tensor(name, &tensor)
}

/// As [`to_array`].
pub(super) fn of_tensor(name: &str, tensor: &DynTensor) -> Result<ArrayD<f32>, Error> {
    let failed = |source| Error::Read { name: name.to_owned(), source };
    if tensor.memory_info().is_cpu_accessible() {
        return read(name, tensor);
    }
    read(name, &tensor.to(AllocationDevice::CPU, 0).map_err(failed)?)
}

fn read(name: &str, tensor: &DynTensor) -> Result<ArrayD<f32>, Error> {
    let failed = |source| Error::Read { name: name.to_owned(), source };
    let shape: Vec<usize> = tensor.shape().iter().map(|dim| *dim as usize).collect();
    let data = match tensor.data_type() {
        TensorElementType::Float16 => {
            let (_, data) = tensor.try_extract_tensor::<half::f16>().map_err(failed)?;
            data.iter().map(|x| x.to_f32()).collect()
        }
        TensorElementType::Bfloat16 => {
            let (_, data) = tensor.try_extract_tensor::<half::bf16>().map_err(failed)?;
            data.iter().map(|x| x.to_f32()).collect()
        }
        _ => tensor.try_extract_tensor::<f32>().map_err(failed)?.1.to_vec(),
    };
    let elements = data.len();
    ArrayD::from_shape_vec(IxDyn(&shape), data).map_err(|_| Error::Shape {
        name: name.to_owned(),
        expected: shape,
        found: vec![elements],
    })
}

/// An `f32` array of rank `D`.
pub(super) fn to_ranked<D: Dimension>(
    name: &str,
    value: &DynValue,
) -> Result<Array<f32, D>, Error> {
    ranked(name, to_array(name, value)?)
}

/// `array`, of rank `D`.
pub(super) fn ranked<D: Dimension>(name: &str, array: ArrayD<f32>) -> Result<Array<f32, D>, Error> {
    let found = array.shape().to_vec();
    array.into_dimensionality().map_err(|_| Error::Rank {
        name: name.to_owned(),
        expected: D::NDIM.unwrap_or_default(),
        found,
    })
}

/// An int64 value that owns a copy of `array`.
pub(super) fn from_integers<D: Dimension + 'static>(
    name: &str,
    array: &Array<i64, D>,
) -> Result<Tensor<i64>, Error> {
    let data: Vec<i64> = array.iter().copied().collect();
    Tensor::from_array((array.shape().to_vec(), data))
        .map_err(|source| Error::Feed { name: name.to_owned(), source })
}

/// A value of a float type that owns a copy of `array`.
pub(super) fn from_floats(
    name: &str,
    element: TensorElementType,
    array: &Array4<f32>,
) -> Result<DynValue, Error> {
    let shape = array.shape().to_vec();
    let floats = array.iter();
    let value = match element {
        TensorElementType::Float16 => {
            let data: Vec<_> = floats.map(|x| half::f16::from_f32(*x)).collect();
            Tensor::from_array((shape, data)).map(Tensor::into_dyn)
        }
        TensorElementType::Bfloat16 => {
            let data: Vec<_> = floats.map(|x| half::bf16::from_f32(*x)).collect();
            Tensor::from_array((shape, data)).map(Tensor::into_dyn)
        }
        _ => {
            let data: Vec<f32> = floats.copied().collect();
            Tensor::from_array((shape, data)).map(Tensor::into_dyn)
        }
    };
    value.map_err(|source| Error::Feed { name: name.to_owned(), source })
}

/// Writes `array` over the beginning of `value`, which is as wide and at least as long.
pub(super) fn fill(name: &str, value: &mut DynValue, array: &Array4<f32>) -> Result<(), Error> {
    fn copy<T: Copy>(to: &mut [T], length: usize, array: &Array4<f32>, round: impl Fn(f32) -> T) {
        let (_, heads, _, width) = array.dim();
        for ((b, h, t, d), x) in array.indexed_iter() {
            to[((b * heads + h) * length + t) * width + d] = round(*x);
        }
    }
    let failed = |source| Error::Feed { name: name.to_owned(), source };
    let mut tensor = value.view_mut().downcast::<DynTensorValueType>().map_err(failed)?;
    let length = tensor.shape().get(2).map_or(0, |length| *length as usize);
    match tensor.data_type() {
        TensorElementType::Float16 => {
            let (_, to) = tensor.try_extract_tensor_mut::<half::f16>().map_err(failed)?;
            copy(to, length, array, half::f16::from_f32);
        }
        TensorElementType::Bfloat16 => {
            let (_, to) = tensor.try_extract_tensor_mut::<half::bf16>().map_err(failed)?;
            copy(to, length, array, half::bf16::from_f32);
        }
        _ => {
            let (_, to) = tensor.try_extract_tensor_mut::<f32>().map_err(failed)?;
            copy(to, length, array, |x| x);
        }
    }
    Ok(())
}
