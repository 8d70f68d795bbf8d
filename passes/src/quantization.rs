//! How a matrix is stored in few bits: data types, and the sizes that follow from them.
//!
//! A row of the matrix is cut into blocks. Each block has a scale `s`, a zero point `z` and one code
//! `c` per element, an unsigned number of [`Bits`]: the element's value is `(c − z) · s`. Where the
//! scheme is symmetric, `z` is the middle code and not stored.
//!
//! In memory, codes fill bytes from the low bits up, and every block fills whole bytes; a row whose
//! length is no multiple of the block ends in codes that stand for zero. Zero points are packed
//! likewise, a row filling whole bytes.

use std::fmt::{Display, Formatter, Result};

/// How wide a code is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bits {
    /// 16 codes.
    Four,
    /// 256 codes.
    Eight,
}

impl Bits {
    /// The width.
    pub const fn count(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// The highest code.
    pub const fn highest(self) -> u8 {
        match self {
            Self::Four => 15,
            Self::Eight => 255,
        }
    }

    /// The code that stands for zero in a symmetric scheme.
    pub const fn middle(self) -> u8 {
        match self {
            Self::Four => 8,
            Self::Eight => 128,
        }
    }
}

/// How scale and zero point of a block are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// From the block's extremes.
    Nearest,
    /// The best of several scales, by squared error weighted with the elements' magnitudes, each
    /// fitted to its codes by least squares.
    Search,
}

/// How a product with the matrix may round its other operand: `MatMulNBits`' `accuracy_level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AccuracyLevel {
    /// 0: not at all.
    Unset,
    /// 1: to `f32`.
    F32,
    /// 2: to `f16`.
    F16,
    /// 3: to `bf16`.
    BF16,
    /// 4: to 8 bits, in blocks of the matrix's own length.
    Int8,
}

impl AccuracyLevel {
    /// Every level, by number.
    pub const ALL: [Self; 5] = [Self::Unset, Self::F32, Self::F16, Self::BF16, Self::Int8];

    /// Whether a product may round below `f32`.
    pub const fn rounds(self) -> bool {
        !matches!(self, Self::Unset | Self::F32)
    }

    /// The number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Unset => 0,
            Self::F32 => 1,
            Self::F16 => 2,
            Self::BF16 => 3,
            Self::Int8 => 4,
        }
    }
}

/// How a matrix is quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scheme {
    /// Width of a code.
    pub bits: Bits,
    /// Elements of a row that share a scale: one of [`BLOCKS`].
    pub block: usize,
    /// Whether every zero point is the middle code.
    pub symmetric: bool,
    /// How scales and zero points are found.
    pub method: Method,
    /// How a product with the matrix may round its other operand.
    pub accuracy: AccuracyLevel,
}

/// The lengths a block may have.
pub const BLOCKS: [usize; 5] = [16, 32, 64, 128, 256];

impl Scheme {
    /// Blocks in a row of `columns` elements.
    pub const fn blocks(&self, columns: usize) -> usize {
        columns.div_ceil(self.block)
    }

    /// Bytes of one block's codes.
    pub const fn block_bytes(&self) -> usize {
        self.block * self.bits.count() / 8
    }

    /// Bytes of a row's codes.
    pub const fn code_bytes(&self, columns: usize) -> usize {
        self.blocks(columns) * self.block_bytes()
    }

    /// Bytes of a row's zero points; 0 if the scheme is symmetric.
    pub const fn zero_bytes(&self, columns: usize) -> usize {
        if self.symmetric { 0 } else { (self.blocks(columns) * self.bits.count()).div_ceil(8) }
    }
}

impl Display for Scheme {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { bits, block, symmetric, method, accuracy } = self;
        let symmetry = if *symmetric { "symmetric" } else { "asymmetric" };
        write!(f, "int{} block={block} {symmetry} {method}", bits.count())?;
        write!(f, " accuracy={}", accuracy.number())
    }
}

impl Display for Method {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self {
            Self::Nearest => "nearest",
            Self::Search => "search",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEME: Scheme = Scheme {
        bits: Bits::Four,
        block: 32,
        symmetric: false,
        method: Method::Nearest,
        accuracy: AccuracyLevel::Int8,
    };

    #[test]
    fn blocks_and_rows_fill_whole_bytes() {
        assert_eq!((SCHEME.blocks(96), SCHEME.code_bytes(96), SCHEME.zero_bytes(96)), (3, 48, 2));
        assert_eq!((SCHEME.blocks(97), SCHEME.code_bytes(97), SCHEME.zero_bytes(97)), (4, 64, 2));
        let eight = Scheme { bits: Bits::Eight, ..SCHEME };
        assert_eq!((eight.blocks(1), eight.code_bytes(1), eight.zero_bytes(1)), (1, 32, 1));
        assert_eq!(Scheme { symmetric: true, ..SCHEME }.zero_bytes(96), 0);
    }

    #[test]
    fn the_text_has_every_field() {
        assert_eq!(SCHEME.to_string(), "int4 block=32 asymmetric nearest accuracy=4");
        let other = Scheme {
            bits: Bits::Eight,
            block: 128,
            symmetric: true,
            method: Method::Search,
            accuracy: AccuracyLevel::Unset,
        };
        assert_eq!(other.to_string(), "int8 block=128 symmetric search accuracy=0");
    }

    #[test]
    fn levels_are_listed_by_number() {
        for (number, level) in AccuracyLevel::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(level.number()), number);
        }
    }
}
