//! Products with, and rows of, matrices in few bits: ONNX Runtime's own operators read the codes.

use skipgpt_passes::ir::{DType, Weight};
use skipgpt_passes::quantization::Scheme;

use super::builder::{Builder, Name};
use super::graph::{Attribute, Data, Element, Initializer, Part, Quantized};

/// The matrix behind the codes, if the whole weight is in few bits. The rows of several such
/// matrices are one: blocks are cut from rows.
pub(super) fn quantized(weight: &Weight) -> Option<(Weight, Scheme)> {
    match weight {
        Weight::Quantized { of, scheme } => Some((of.as_ref().clone(), *scheme)),
        Weight::Concat(parts) => {
            let mut all = Vec::with_capacity(parts.len());
            let mut schemes = Vec::with_capacity(parts.len());
            for part in parts {
                let (of, scheme) = quantized(part)?;
                all.push(of);
                schemes.push(scheme);
            }
            let first = *schemes.first()?;
            schemes.iter().all(|scheme| *scheme == first).then_some((Weight::Concat(all), first))
        }
        _ => None,
    }
}

impl Builder {
    /// `x · Wᵀ` for `x` `[…, in]` and a matrix `[out, in]` in few bits: `[…, out]`, called `output`;
    /// `name` is that of the weight.
    pub(super) fn matmul_bits(
        &mut self,
        output: &str,
        name: &str,
        x: &str,
        (weight, scheme): (Weight, Scheme),
        dtype: DType,
    ) -> Name {
        let (rows, columns) = (weight.rows(), weight.columns());
        let shape = [rows, scheme.blocks(columns), scheme.block_bytes()];
        let parts = self.parts(name, &weight, scheme, dtype, &shape);
        let inputs: Vec<&str> = [x].into_iter().chain(parts.iter().map(String::as_str)).collect();
        let attributes = vec![
            ("K", Attribute::Int(columns as i64)),
            ("N", Attribute::Int(rows as i64)),
            ("accuracy_level", Attribute::Int(scheme.accuracy.number().into())),
            ("bits", Attribute::Int(scheme.bits.count() as i64)),
            ("block_size", Attribute::Int(scheme.block as i64)),
        ];
        self.microsoft(output, "MatMulNBits", &inputs, attributes)
    }

    /// Rows of a matrix `[rows, width]` in few bits: `[batch, sequence, width]` for indices
    /// `[batch, sequence]`.
    pub(super) fn gather_bits(
        &mut self,
        name: &str,
        indices: &str,
        (weight, scheme): (Weight, Scheme),
    ) -> Name {
        let (rows, columns) = (weight.rows(), weight.columns());
        let shape = [rows, scheme.code_bytes(columns)];
        let mut parts = self.parts(name, &weight, scheme, self.dtype, &shape).into_iter();
        let codes = parts.next().unwrap_or_default();
        let inputs: Vec<Name> = [codes, indices.to_owned()].into_iter().chain(parts).collect();
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let attributes = vec![
            ("bits", Attribute::Int(scheme.bits.count() as i64)),
            ("block_size", Attribute::Int(scheme.block as i64)),
            ("gather_axis", Attribute::Int(0)),
            ("quantize_axis", Attribute::Int(1)),
        ];
        let padded = scheme.blocks(columns) * scheme.block;
        if padded == columns {
            return self.microsoft(name, "GatherBlockQuantized", &inputs, attributes);
        }
        // Rows are stored in whole blocks, and come so.
        let whole = format!("{name}.blocks");
        self.microsoft(&whole, "GatherBlockQuantized", &inputs, attributes);
        let bound = |b: &mut Self, at: usize| b.ints(&format!("constants.{at}"), &[at as i64]);
        let (start, end) = (bound(self, 0), bound(self, columns));
        let axis = self.ints("constants.last_axis", &[-1]);
        self.op(name, "Slice", &[&whole, &start, &end, &axis])
    }

    /// The initializers: codes in the shape given, scales in `dtype`, zero points unless symmetric.
    fn parts(
        &mut self,
        name: &str,
        weight: &Weight,
        scheme: Scheme,
        dtype: DType,
        codes: &[usize],
    ) -> Vec<Name> {
        let (rows, columns) = (weight.rows(), weight.columns());
        let blocks = [rows, scheme.blocks(columns)];
        let mut parts = vec![
            ("weight", Part::Codes, Element::Uint8, codes.to_vec()),
            ("scales", Part::Scales, Element::Float(dtype), blocks.to_vec()),
        ];
        if !scheme.symmetric {
            let shape = vec![rows, scheme.zero_bytes(columns)];
            parts.push(("zeros", Part::Zeros, Element::Uint8, shape));
        }
        parts
            .into_iter()
            .map(|(suffix, part, element, shape)| {
                let name = format!("{name}.{suffix}");
                let weight = weight.clone();
                let data = Data::Quantized(Quantized { weight, scheme, scales: dtype, part });
                self.initializer(Initializer { name: name.clone(), element, shape, data });
                name
            })
            .collect()
    }
}
