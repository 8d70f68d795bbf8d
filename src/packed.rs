//! Matrices in few bits, read back: codes, scales and zero points to `f32`.
//!
//! The layout is [`skipgpt_passes::quantization`]'s, which is what `MatMulNBits` reads.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use skipgpt_passes::ir::DType;
use skipgpt_passes::quantization::{Bits, Scheme};

use crate::sources;

/// One row's bytes.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// [`Scheme::code_bytes`] bytes.
    pub codes: &'a [u8],
    /// One scale per block, little-endian.
    pub scales: &'a [u8],
    /// [`Scheme::zero_bytes`] bytes.
    pub zeros: &'a [u8],
}

/// Appends the values of a row of `columns` elements, whose scales are of `dtype`, to `out`.
pub fn unpack(row: Row<'_>, columns: usize, scheme: &Scheme, dtype: DType, out: &mut Vec<f32>) {
    let mut scales = Vec::with_capacity(scheme.blocks(columns));
    sources::decode(row.scales, dtype, &mut scales);
    let end = out.len() + columns;
    let blocks = row.codes.chunks_exact(scheme.block_bytes()).zip(scales);
    for (index, (codes, scale)) in blocks.enumerate() {
        let zero = match (scheme.symmetric, scheme.bits) {
            (true, bits) => bits.middle(),
            (false, Bits::Eight) => row.zeros[index],
            (false, Bits::Four) => row.zeros[index / 2] >> (4 * (index % 2)) & 15,
        };
        let value = |code: u8| (f32::from(code) - f32::from(zero)) * scale;
        match scheme.bits {
            Bits::Eight => out.extend(codes.iter().map(|&code| value(code))),
            Bits::Four => {
                out.extend(codes.iter().flat_map(|&pair| [value(pair & 15), value(pair >> 4)]));
            }
        }
    }
    out.truncate(end);
}

/// Where a packed matrix's parts lie in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// How it is stored.
    pub scheme: Scheme,
    /// Dtype of the scales.
    pub dtype: DType,
    /// First byte of the codes.
    pub codes: u64,
    /// First byte of the scales.
    pub scales: u64,
    /// First byte of the zero points; of no meaning if the scheme is symmetric.
    pub zeros: u64,
}

impl Place {
    /// Fills `buffer` with the matrix's values as little-endian `f32`, from byte `start` of them on.
    ///
    /// # Errors
    ///
    /// What the file says.
    pub fn read(
        &self,
        file: &File,
        columns: usize,
        start: u64,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let Self { scheme, dtype, .. } = self;
        let width = 4 * columns as u64;
        let end = start + buffer.len() as u64;
        let mut codes = vec![0; scheme.code_bytes(columns)];
        let mut scales = vec![0; scheme.blocks(columns) * dtype.size()];
        let mut zeros = vec![0; scheme.zero_bytes(columns)];
        let (mut values, mut bytes) = (Vec::with_capacity(columns), Vec::new());
        for row in start / width.max(1)..end.div_ceil(width.max(1)) {
            let place = self.from_row(row as usize, columns);
            file.read_exact_at(&mut codes, place.codes)?;
            file.read_exact_at(&mut scales, place.scales)?;
            file.read_exact_at(&mut zeros, place.zeros)?;
            values.clear();
            bytes.clear();
            let packed = Row { codes: &codes, scales: &scales, zeros: &zeros };
            unpack(packed, columns, scheme, *dtype, &mut values);
            sources::encode(&values, DType::F32, &mut bytes);
            let (first, last) = (start.max(row * width), end.min((row + 1) * width));
            let from = &bytes[(first - row * width) as usize..(last - row * width) as usize];
            buffer[(first - start) as usize..(last - start) as usize].copy_from_slice(from);
        }
        Ok(())
    }

    /// The place of the rows from `first` on, of a matrix of `columns` columns.
    #[must_use]
    pub fn from_row(self, first: usize, columns: usize) -> Self {
        let Self { scheme, dtype, .. } = self;
        let after = |start: u64, bytes: usize| start + (first * bytes) as u64;
        Self {
            codes: after(self.codes, scheme.code_bytes(columns)),
            scales: after(self.scales, scheme.blocks(columns) * dtype.size()),
            zeros: after(self.zeros, scheme.zero_bytes(columns)),
            ..self
        }
    }
}
