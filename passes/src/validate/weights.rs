//! Rules on linears, adapters and weight expressions.

use super::{Checker, Pattern, Rule};
use crate::ir::{Linear, Lora, Phase, Stored, Weight};
use crate::quantization::BLOCKS;

impl<'a> Checker<'a> {
    /// A linear of shape `[out, in]`, with its bias and adapter.
    pub(super) fn linear(&mut self, path: &str, linear: &'a Linear, shape: [Option<usize>; 2]) {
        self.quantizable(path, &linear.weight, shape);
        self.around(path, linear);
    }

    /// As [`Self::linear`], for one whose weight is never quantised.
    pub(super) fn plain_linear(
        &mut self,
        path: &str,
        linear: &'a Linear,
        shape: [Option<usize>; 2],
    ) {
        self.weight(path, &linear.weight, shape);
        self.around(path, linear);
    }

    /// A linear's bias and adapter.
    fn around(&mut self, path: &str, linear: &'a Linear) {
        let (rows, columns) = (linear.out_features(), linear.in_features());
        if let Some(lora) = &linear.lora {
            self.not_from(Phase::Merged, path, Rule::AdapterOutlived);
            self.lora(path, lora, [rows, columns]);
        }
        if let Some(bias) = &linear.bias {
            self.weight(&format!("{path}.bias"), bias, [rows]);
        }
    }

    /// A matrix of a shape that may be quantised.
    pub(super) fn quantizable(
        &mut self,
        path: &str,
        weight: &'a Weight,
        shape: [Option<usize>; 2],
    ) {
        let Weight::Quantized { of, scheme } = weight else {
            return self.weight(path, weight, shape);
        };
        self.not_before(Phase::Fused, path, "a quantised weight");
        if !BLOCKS.contains(&scheme.block) {
            self.report(path, Rule::Block { block: scheme.block });
        }
        self.weight(path, of, shape);
    }

    /// A weight of a shape.
    pub(super) fn weight(&mut self, path: &str, weight: &'a Weight, shape: impl Into<Pattern>) {
        self.expression(path, weight);
        self.shape(path, weight.shape(), shape.into());
    }

    fn shape(&mut self, path: &str, found: Vec<usize>, expected: Pattern) {
        if found.contains(&0) {
            self.report(path, Rule::Empty { found });
        } else if !expected.matches(&found) {
            self.report(path, Rule::Shape { expected, found });
        }
    }

    /// An adapter of an `[out, in]` matrix.
    fn lora(&mut self, path: &str, lora: &'a Lora, [rows, columns]: [usize; 2]) {
        if !lora.scale.is_finite() {
            self.report(path, Rule::Scale { scale: lora.scale });
        }
        for (name, tensor, shape) in [
            ("down", &lora.down, [None, Some(columns)]),
            ("up", &lora.up, [Some(rows), Some(lora.rank())]),
        ] {
            let path = format!("{path}.lora.{name}");
            self.tensor(&path, tensor);
            self.shape(&path, tensor.shape.clone(), shape.into());
        }
    }

    fn matrix(&mut self, path: &str, weight: &Weight) {
        self.shape(path, weight.shape(), [None, None].into());
    }

    fn expression(&mut self, path: &str, weight: &'a Weight) {
        match weight {
            Weight::Stored(stored) => self.tensor(path, stored),
            Weight::Merged { base, lora } => {
                self.not_before(Phase::Merged, path, "a merged weight");
                self.expression(path, base);
                self.matrix(path, base);
                self.lora(path, lora, [base.rows(), base.columns()]);
            }
            Weight::Concat(parts) => {
                self.not_before(Phase::Fused, path, "concat");
                self.parts(path, "concat", parts);
                let Some(first) = parts.first().map(Weight::shape) else { return };
                let mut expected = Pattern(first.into_iter().map(Some).collect());
                if let Some(rows) = expected.0.first_mut() {
                    *rows = None;
                }
                for (i, part) in parts.iter().enumerate() {
                    self.shape(&format!("{path}.concat.{i}"), part.shape(), expected.clone());
                }
            }
            Weight::BlockDiagonal(parts) => {
                self.not_before(Phase::Fused, path, "blockdiag");
                self.parts(path, "blockdiag", parts);
                for (i, part) in parts.iter().enumerate() {
                    self.matrix(&format!("{path}.blockdiag.{i}"), part);
                }
            }
            Weight::Difference { of, minus } => {
                self.not_before(Phase::Fused, path, "a difference");
                self.expression(path, of);
                self.expression(path, minus);
                let expected = Pattern(of.shape().into_iter().map(Some).collect());
                self.shape(&format!("{path}.minus"), minus.shape(), expected);
            }
            Weight::Slice { of, rows } => {
                self.expression(path, of);
                let (start, end) = (rows.start, rows.end);
                if start >= end || end > of.rows() || of.shape().is_empty() {
                    self.report(path, Rule::SliceOutOfRange { start, end, rows: of.rows() });
                }
            }
            Weight::Transpose(of) => {
                self.expression(path, of);
                self.matrix(path, of);
            }
            Weight::Cast { of, .. } => self.expression(path, of),
            Weight::Quantized { .. } => self.report(path, Rule::MisplacedQuantized),
        }
    }

    fn parts(&mut self, path: &str, function: &'static str, parts: &'a [Weight]) {
        if parts.is_empty() {
            self.report(path, Rule::NoParts { function });
        }
        for (i, part) in parts.iter().enumerate() {
            self.expression(&format!("{path}.{function}.{i}"), part);
        }
    }

    /// A name means one tensor.
    fn tensor(&mut self, path: &str, stored: &'a Stored) {
        let first = *self.tensors.entry(&stored.name).or_insert(stored);
        if (&first.shape, first.dtype) != (&stored.shape, stored.dtype) {
            let rule = Rule::NameConflict {
                name: stored.name.clone(),
                shape: stored.shape.clone(),
                dtype: stored.dtype,
                before: (first.shape.clone(), first.dtype),
            };
            self.report(path, rule);
        }
    }
}
