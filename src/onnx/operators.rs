//! What layers are made of, in more than one node: products, norms, casts.

use skipgpt_passes::ir::{DType, Linear, Weight};

use super::builder::{Builder, Name};
use super::graph::{Attribute, Element};
use super::quantized::quantized;

impl Builder {
    /// `x · Wᵀ + bias` for `x` `[…, in]`: `[…, out]`.
    pub(super) fn linear(&mut self, name: &str, x: &str, linear: &Linear, dtype: DType) -> Name {
        let Linear { weight, bias, .. } = linear;
        let Some(bias) = bias else { return self.product(name, name, x, weight, dtype) };
        let product = self.product(&format!("{name}.product"), name, x, weight, dtype);
        let bias = self.weight_as(&format!("{name}.bias"), bias, dtype);
        self.op(name, "Add", &[&product, &bias])
    }

    /// `x · Wᵀ` for `x` `[…, in]`, called `output`; `name` is that of the weight. A weight in few bits
    /// has an operator of its own.
    pub(super) fn product(
        &mut self,
        output: &str,
        name: &str,
        x: &str,
        weight: &Weight,
        dtype: DType,
    ) -> Name {
        if let Some(weight) = quantized(weight) {
            return self.matmul_bits(output, name, x, weight, dtype);
        }
        let weight = self.weight_as(&format!("{name}.weight"), weight, dtype);
        self.matmul(output, x, &weight)
    }

    /// `x · Wᵀ` for `x` `[…, in]` and a weight that is already in the graph. It keeps the checkpoint's
    /// `[out, in]`.
    pub(super) fn matmul(&mut self, name: &str, x: &str, weight: &str) -> Name {
        self.microsoft(name, "FusedMatMul", &[x, weight], vec![("transB", Attribute::Int(1))])
    }

    /// `x / √(mean(x²) + eps) · scale` over the last dimension, in `f32` whatever the model's dtype.
    ///
    /// Written out, because the fused operator's only standard form needs opset 23; ONNX Runtime
    /// fuses this one when it loads the model.
    pub(super) fn rms_norm(&mut self, name: &str, x: &str, scale: &Weight, eps: f64) -> Name {
        let scale = self.weight(&format!("{name}.weight"), scale);
        let two = self.floats("constants.two", &[], &[2.0]);
        let eps = self.floats("constants.rms_norm_eps", &[], &[eps as f32]);
        let last = self.ints("constants.last_axis", &[-1]);
        let x = self.as_f32(&format!("{name}.input"), x);
        let square = self.op(&format!("{name}.square"), "Pow", &[&x, &two]);
        let mean = self.op(&format!("{name}.mean"), "ReduceMean", &[&square, &last]);
        let shifted = self.op(&format!("{name}.shifted"), "Add", &[&mean, &eps]);
        let root = self.op(&format!("{name}.root"), "Sqrt", &[&shifted]);
        let unit = self.op(&format!("{name}.unit"), "Div", &[&x, &root]);
        let unit = self.rounded(&format!("{name}.rounded"), &unit);
        self.op(name, "Mul", &[&unit, &scale])
    }

    /// `x` as `f32`.
    pub(super) fn as_f32(&mut self, name: &str, x: &str) -> Name {
        if self.dtype == DType::F32 { x.to_owned() } else { self.cast(name, x, DType::F32) }
    }

    /// An `f32` value in the model's dtype.
    pub(super) fn rounded(&mut self, name: &str, x: &str) -> Name {
        if self.dtype == DType::F32 { x.to_owned() } else { self.cast(name, x, self.dtype) }
    }

    pub(super) fn cast(&mut self, name: &str, x: &str, dtype: DType) -> Name {
        self.cast_to(name, x, Element::Float(dtype))
    }

    pub(super) fn cast_to(&mut self, name: &str, x: &str, element: Element) -> Name {
        self.op_with(name, "Cast", &[x], vec![("to", Attribute::Type(element))])
    }
}
