//! The text IR: `Display` for a [`Model`] and what it is made of.
//!
//! Everything that the numbers depend on is printed, one fact a line, so that a line diff of two
//! texts is what a pass did. `docs/ir.md` explains the notation. Floats print in the shortest form
//! that reads back as the same value.

use std::fmt::{Display, Formatter, Result};

use crate::access::Part;
use crate::ir::{
    Architecture, DType, Layer, Linear, Lora, Model, Policy, Rope, RopeScaling, Routing,
    SharedRouter, Source, Stored, Tap, Weight,
};

impl Display for Model {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let config = &self.config;
        writeln!(f, "model {} @{}", config.architecture, self.phase)?;
        writeln!(
            f,
            "config hidden_size={} vocab_size={} layers={} positions={} rms_norm_eps={:?}",
            config.hidden_size,
            config.vocab_size,
            config.num_hidden_layers,
            config.max_position_embeddings,
            config.rms_norm_eps
        )?;
        writeln!(
            f,
            "heads query={} key_value={} head_dim={}",
            config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )?;
        writeln!(f, "rope {}", config.rope)?;
        writeln!(f, "embedding = {}", self.embedding)?;
        for layer in &self.layers {
            write!(f, "{layer}")?;
        }
        writeln!(f, "norm = {}", self.norm)?;
        writeln!(f, "head = {}", self.head)
    }
}

impl Display for Layer {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let index = self.index;
        if let Some(router) = &self.router {
            write!(f, "layers.{index}.router: {router}")?;
        }
        match &self.attention {
            Some(attention) => {
                writeln!(f, "layers.{index}.attention: {}", attention.routing)?;
                parts(f, attention.parts())?;
            }
            None => writeln!(f, "layers.{index}.attention: removed")?,
        }
        match &self.mlp {
            Some(mlp) => {
                writeln!(f, "layers.{index}.mlp: {}", mlp.routing)?;
                parts(f, mlp.parts())
            }
            None => writeln!(f, "layers.{index}.mlp: removed"),
        }
    }
}

/// One indented line each. What ends in `hidden` is the first layer of a two-layer router.
fn parts(f: &mut Formatter<'_>, parts: Vec<(&str, Part<'_>)>) -> Result {
    for (name, part) in parts {
        match part {
            Part::Weight(weight) => writeln!(f, "  {name} = {weight}")?,
            Part::Linear(linear) if name.ends_with("hidden") => {
                writeln!(f, "  {name} = relu {linear}")?;
            }
            Part::Linear(linear) => writeln!(f, "  {name} = {linear}")?,
        }
    }
    Ok(())
}

impl Display for SharedRouter {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let plural = if self.decisions == 1 { "" } else { "s" };
        writeln!(f, "{} decision{plural} on layer-input, argmax", self.decisions)?;
        parts(f, self.parts())
    }
}

impl Display for Routing {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self::Routed { source, dispatch } = self else { return f.write_str("always") };
        match source {
            Source::Own(router) => {
                write!(f, "routed by own router on {}, {}", router.tap, router.policy)?;
            }
            Source::Shared { slot } => write!(f, "routed by decision {slot}")?,
        }
        dispatch.map_or(Ok(()), |dispatch| write!(f, ", {dispatch}"))
    }
}

impl Display for Tap {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self {
            Self::LayerInput => "layer-input",
            Self::ModuleInput => "module-input",
        })
    }
}

impl Display for Policy {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self {
            Self::Sampled => "sampled",
            Self::Argmax => "argmax",
        })
    }
}

impl Display for Architecture {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        })
    }
}

impl Display for Rope {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "theta={}", self.theta)?;
        match self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => write!(f, " linear(factor={factor})"),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => write!(
                f,
                " llama3(factor={factor} low={low_freq_factor} high={high_freq_factor} \
                 original={original_max_position_embeddings})"
            ),
        }
    }
}

impl Display for Linear {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "linear {}", self.weight)?;
        if let Some(lora) = &self.lora {
            write!(f, " lora({lora})")?;
        }
        if let Some(bias) = &self.bias {
            write!(f, " bias {bias}")?;
        }
        Ok(())
    }
}

impl Display for Lora {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "{} * {} @ {}", self.scale, self.up, self.down)
    }
}

impl Display for Stored {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        // A name comes from a file: what would break the line is escaped.
        write!(f, "%{}[{}", self.name.escape_debug(), Shape(&self.shape))?;
        if self.dtype != DType::F32 {
            write!(f, " {}", self.dtype)?;
        }
        f.write_str("]")
    }
}

impl Display for Weight {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::Stored(stored) => stored.fmt(f),
            Self::Merged { base, lora } => write!(f, "{base} + {lora}"),
            Self::Concat(parts) => list(f, "concat", parts),
            Self::Slice { of, rows } if matches!(**of, Self::Merged { .. }) => {
                write!(f, "({of})[{}..{}]", rows.start, rows.end)
            }
            Self::Slice { of, rows } => write!(f, "{of}[{}..{}]", rows.start, rows.end),
            Self::BlockDiagonal(parts) => list(f, "blockdiag", parts),
            Self::Difference { of, minus } => write!(f, "({of} - {minus})"),
            Self::Transpose(of) => write!(f, "transpose({of})"),
            Self::Cast { of, dtype } => write!(f, "{dtype}({of})"),
            Self::Quantized { of, scheme } => write!(f, "quantized({scheme}, {of})"),
        }
    }
}

fn list(f: &mut Formatter<'_>, function: &str, parts: &[Weight]) -> Result {
    write!(f, "{function}(")?;
    for (i, part) in parts.iter().enumerate() {
        write!(f, "{}{part}", if i == 0 { "" } else { ", " })?;
    }
    f.write_str(")")
}

/// `8x8`; nothing for a scalar.
pub(crate) struct Shape<'a>(pub(crate) &'a [usize]);

impl Display for Shape<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        for (i, size) in self.0.iter().enumerate() {
            write!(f, "{}{size}", if i == 0 { "" } else { "x" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{Dispatch, Phase};
    use crate::testing::{adapt, attention, biased, linear, lora, mlp, model, stored, weight};
    use expect_test::expect;

    #[test]
    fn every_field_of_a_model_is_in_the_text() {
        let mut model = model(2);
        model.config.architecture = Architecture::Qwen3;
        model.config.rope = Rope {
            theta: 500_000.0,
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 64,
            },
        };
        let attention = attention(&mut model, 0);
        adapt(&mut attention.q, "0.q", 2, 1.5);
        attention.q.bias = Some(weight("0.q.bias", &[8]));
        attention.q_norm = Some(weight("0.q_norm", &[4]));
        attention.k_norm = Some(weight("0.k_norm", &[4]));
        mlp(&mut model, 0).routing = Routing::Always;
        model.layers[1].mlp = None;
        expect![[r"
            model qwen3 @Imported
            config hidden_size=8 vocab_size=32 layers=2 positions=64 rms_norm_eps=1e-5
            heads query=2 key_value=1 head_dim=4
            rope theta=500000 llama3(factor=8 low=1 high=4 original=64)
            embedding = %embed[32x8]
            layers.0.attention: routed by own router on layer-input, sampled
              router.output = linear %0.router_attention[2x8] bias %0.router_attention.bias[2]
              norm = %0.attention_norm[8]
              q = linear %0.q[8x8] lora(1.5 * %0.q.b[8x2] @ %0.q.a[2x8]) bias %0.q.bias[8]
              k = linear %0.k[4x8]
              v = linear %0.v[4x8]
              q_norm = %0.q_norm[4]
              k_norm = %0.k_norm[4]
              o = linear %0.o[8x8]
            layers.0.mlp: always
              norm = %0.mlp_norm[8]
              gate = linear %0.gate[12x8]
              up = linear %0.up[12x8]
              down = linear %0.down[8x12]
            layers.1.attention: routed by own router on layer-input, sampled
              router.output = linear %1.router_attention[2x8] bias %1.router_attention.bias[2]
              norm = %1.attention_norm[8]
              q = linear %1.q[8x8]
              k = linear %1.k[4x8]
              v = linear %1.v[4x8]
              o = linear %1.o[8x8]
            layers.1.mlp: removed
            norm = %norm[8]
            head = linear %head[32x8]
        "]]
        .assert_eq(&model.to_string());
    }

    #[test]
    fn fused_modules_and_shared_routers_print_what_they_are() {
        let mut model = crate::testing::lowered(Dispatch::Conditional);
        model.layers[0].router.as_mut().unwrap().hidden = Some(linear("0.hidden", [16, 8]));
        expect![[r"
            layers.0.router: 2 decisions on layer-input, argmax
              hidden = relu linear %0.hidden[16x8]
              output = linear concat(%0.router_attention[2x8][0..1], %0.router_mlp[2x8][0..1], %0.router_attention[2x8][1..2], %0.router_mlp[2x8][1..2]) bias concat(%0.router_attention.bias[2][0..1], %0.router_mlp.bias[2][0..1], %0.router_attention.bias[2][1..2], %0.router_mlp.bias[2][1..2])
            layers.0.attention: routed by decision 0, conditional
              norm = %0.attention_norm[8]
              q = linear %0.q[8x8]
              kv = linear concat(%0.k[4x8], %0.v[4x8])
              o = linear %0.o[8x8]
            layers.0.mlp: routed by decision 1, conditional
              norm = %0.mlp_norm[8]
              gate_up = linear concat(%0.gate[12x8], %0.up[12x8])
              down = linear %0.down[8x12]
        "]]
        .assert_eq(&model.layers[0].to_string());
        assert_eq!(model.phase, Phase::Lowered);
    }

    #[test]
    fn every_weight_expression_has_a_notation() {
        let merged = Weight::Merged {
            base: Box::new(weight("w", &[4, 8])),
            lora: lora("w", [4, 8], 2, 0.5),
        };
        let slice = |of: Weight| Weight::Slice { of: Box::new(of), rows: 1..3 };
        let half = Weight::Stored(Stored { dtype: DType::BF16, ..stored("h", &[2, 2]) });
        let cases = [
            (slice(merged.clone()), "(%w[4x8] + 0.5 * %w.b[4x2] @ %w.a[2x8])[1..3]"),
            (slice(weight("w", &[4, 8])), "%w[4x8][1..3]"),
            (Weight::Transpose(Box::new(half.clone())), "transpose(%h[2x2 bf16])"),
            (
                Weight::Cast { of: Box::new(merged), dtype: DType::F16 },
                "f16(%w[4x8] + 0.5 * %w.b[4x2] @ %w.a[2x8])",
            ),
            (
                Weight::BlockDiagonal(vec![half, weight("i", &[1, 3])]),
                "blockdiag(%h[2x2 bf16], %i[1x3])",
            ),
            (weight("scalar\nname", &[]), "%scalar\\nname[]"),
        ];
        for (weight, text) in cases {
            assert_eq!(weight.to_string(), text);
        }
        assert_eq!(biased("w", [2, 3]).to_string(), "linear %w[2x3] bias %w.bias[2]");
        let rope = Rope { theta: 1e4, scaling: RopeScaling::Linear { factor: 2.5 } };
        assert_eq!(rope.to_string(), "theta=10000 linear(factor=2.5)");
    }
}
