//! `--dtype` and what goes with it.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use skipgpt_passes::ir::DType;
use skipgpt_passes::plan::Quantization;
use skipgpt_passes::quantization::{AccuracyLevel, Bits, Method, Scheme};

#[derive(Debug, Args)]
pub(crate) struct PrecisionArguments {
    /// What weights are stored in; hidden states and caches too, but for int8 and int4, where they
    /// are f32
    #[arg(long, value_enum, default_value_t = PrecisionArgument::F32)]
    pub(crate) dtype: PrecisionArgument,
    /// Weights that share a scale (int8, int4): 16, 32, 64, 128 or 256 [default: 32]
    #[arg(long, value_name = "WEIGHTS")]
    block_size: Option<usize>,
    /// Whether blocks have a zero point (int8, int4) [default: asymmetric]
    #[arg(long, value_enum, value_name = "SYMMETRY")]
    quant_symmetry: Option<SymmetryArgument>,
    /// How scales are found (int8, int4) [default: search]
    #[arg(long, value_enum, value_name = "METHOD")]
    quant_method: Option<MethodArgument>,
    /// How products may round hidden states (int8, int4): 0 and 1 not at all, 2 to f16, 3 to bf16,
    /// 4 to 8 bits [default: 4]
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(u8).range(0..=4))]
    accuracy_level: Option<u8>,
    /// Leave the embedding in floats (int8, int4)
    #[arg(long)]
    float_embedding: bool,
    /// Leave the language-model head in floats (int8, int4)
    #[arg(long)]
    float_head: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrecisionArgument {
    F32,
    F16,
    /// For GPUs: ONNX Runtime's CPU provider does not run it
    Bf16,
    /// Weights in 8 bits
    Int8,
    /// Weights in 4 bits
    Int4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SymmetryArgument {
    /// No zero points
    Symmetric,
    /// A zero point per block
    Asymmetric,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodArgument {
    /// From the block's extremes
    Nearest,
    /// The best of several scales
    Search,
}

impl PrecisionArguments {
    /// What is not quantised: hidden states, caches, norms.
    pub(crate) const fn float(&self) -> DType {
        match self.dtype {
            PrecisionArgument::F16 => DType::F16,
            PrecisionArgument::Bf16 => DType::BF16,
            PrecisionArgument::F32 | PrecisionArgument::Int8 | PrecisionArgument::Int4 => {
                DType::F32
            }
        }
    }

    /// What is quantised, and how.
    pub(crate) fn quantization(&self) -> Result<Option<Quantization>> {
        let bits = match self.dtype {
            PrecisionArgument::Int4 => Bits::Four,
            PrecisionArgument::Int8 => Bits::Eight,
            PrecisionArgument::F32 | PrecisionArgument::F16 | PrecisionArgument::Bf16 => {
                if let Some(option) = self.first_option() {
                    bail!("--{option} needs --dtype int8 or int4");
                }
                return Ok(None);
            }
        };
        let level = usize::from(self.accuracy_level.unwrap_or(4));
        let scheme = Scheme {
            bits,
            block: self.block_size.unwrap_or(32),
            symmetric: self.quant_symmetry == Some(SymmetryArgument::Symmetric),
            method: match self.quant_method {
                Some(MethodArgument::Nearest) => Method::Nearest,
                Some(MethodArgument::Search) | None => Method::Search,
            },
            accuracy: AccuracyLevel::ALL.get(level).copied().unwrap_or(AccuracyLevel::Int8),
        };
        Ok(Some(Quantization { scheme, embedding: !self.float_embedding, head: !self.float_head }))
    }

    /// Refuses a plan with weights in `bits`, or in floats, where another precision was asked for.
    pub(crate) fn agrees(&self, bits: Option<Bits>) -> Result<()> {
        let asked = match self.dtype {
            PrecisionArgument::F32 => return Ok(()),
            PrecisionArgument::F16 | PrecisionArgument::Bf16 => None,
            PrecisionArgument::Int8 => Some(Bits::Eight),
            PrecisionArgument::Int4 => Some(Bits::Four),
        };
        if asked == bits {
            return Ok(());
        }
        let held = match bits {
            None => "in floats",
            Some(Bits::Four) => "in 4 bits",
            Some(Bits::Eight) => "in 8 bits",
        };
        let value = self.dtype.to_possible_value();
        let name = value.as_ref().map_or("", clap::builder::PossibleValue::get_name);
        bail!("--dtype {name}: the plan of --plan has weights {held}; leave one of them out")
    }

    /// An option that only quantised weights have, if one was given.
    pub(crate) fn first_option(&self) -> Option<&'static str> {
        let given = [
            (self.block_size.is_some(), "block-size"),
            (self.quant_symmetry.is_some(), "quant-symmetry"),
            (self.quant_method.is_some(), "quant-method"),
            (self.accuracy_level.is_some(), "accuracy-level"),
            (self.float_embedding, "float-embedding"),
            (self.float_head, "float-head"),
        ];
        given.into_iter().find_map(|(given, name)| given.then_some(name))
    }
}
