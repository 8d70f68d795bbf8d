//! Matrix products on slices, for operations that bring their own backward.
//!
//! Through candle a product makes a tensor, and its backward the gradients of both sides. Here the
//! result goes where the caller says, and is one side's alone. Only training multiplies here: what
//! verifies an artifact computes with candle.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;

use candle_core::{Result, bail};

/// A matrix in a slice: element `(i, j)` at `i · row + j · column`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    strides: (usize, usize),
}

impl<'a> Matrix<'a> {
    /// `values` as `[rows, columns]`, row-major.
    pub(crate) fn new(values: &'a [f32], rows: usize, columns: usize) -> Result<Self> {
        Self::within(values, rows, columns, columns)
    }

    /// The first `columns` elements of every `width` elements.
    pub(crate) fn within(
        values: &'a [f32],
        rows: usize,
        columns: usize,
        width: usize,
    ) -> Result<Self> {
        let needed = if rows == 0 { 0 } else { (rows - 1) * width + columns };
        if columns > width || values.len() < needed {
            bail!("{} values are not a matrix of {rows} rows, {columns} of {width}", values.len());
        }
        Ok(Self { values, rows, columns, strides: (width, 1) })
    }

    /// The transpose, in place.
    pub(crate) const fn t(self) -> Self {
        let (row, column) = self.strides;
        Self { rows: self.columns, columns: self.rows, strides: (column, row), ..self }
    }
}

/// Whether a product may use every core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// This one alone: the caller has spread its work already.
    One,
    /// As many as candle uses.
    All,
}

/// `out = a · b`, or `out += a · b`; `out` is row-major and exactly of the product's size.
pub(crate) fn multiply(
    out: &mut [f32],
    accumulate: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
    threads: Threads,
) -> Result<()> {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    if b.rows != k || out.len() != m * n {
        bail!("[{m}, {k}] times [{}, {n}] does not fill {} values", b.rows, out.len());
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    if k == 0 {
        if !accumulate {
            out.fill(0.0);
        }
        return Ok(());
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if amx::worthwhile(m, n, k) && amx::available() {
        // SAFETY: the unit is there, and the sizes were compared above.
        unsafe { amx::multiply(out, accumulate, a, b, threads == Threads::All) };
        return Ok(());
    }
    multiply_plain(out, accumulate, a, b, threads);
    Ok(())
}

/// As [`multiply`], of sizes that agree and are not 0, with the instructions every processor has.
fn multiply_plain(
    out: &mut [f32],
    accumulate: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
    threads: Threads,
) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    let threads = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(candle_core::utils::get_num_threads()),
    };
    // SAFETY: `Matrix` covers its rows and columns at its strides, `out` was measured by the caller
    // and is borrowed alone.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            a.values.as_ptr(),
            a.strides.1 as isize,
            a.strides.0 as isize,
            b.values.as_ptr(),
            b.strides.1 as isize,
            b.strides.0 as isize,
            if accumulate { 1.0 } else { 0.0 },
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    #![allow(clippy::float_cmp, reason = "these values are exact")]

    use super::*;

    #[test]
    fn products_of_windows_and_transposes() {
        let a: Vec<f32> = (0_u8..6).map(f32::from).collect();
        // The left two columns of [[0, 1, 2], [3, 4, 5]], times its own transpose.
        let left = Matrix::within(&a, 2, 2, 3).unwrap();
        let mut out = [1.0; 4];
        multiply(&mut out, false, left, left.t(), Threads::One).unwrap();
        assert_eq!(out, [1.0, 4.0, 4.0, 25.0]);
        multiply(&mut out, true, left.t(), left, Threads::All).unwrap();
        assert_eq!(out, [10.0, 16.0, 16.0, 42.0]);
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() {
        assert!(Matrix::new(&[0.0; 5], 2, 3).is_err());
        assert!(Matrix::within(&[0.0; 6], 2, 3, 2).is_err());
        let a = Matrix::new(&[0.0; 6], 2, 3).unwrap();
        assert!(multiply(&mut [0.0; 4], false, a, a, Threads::One).is_err());
        assert!(multiply(&mut [0.0; 3], false, a, a.t(), Threads::One).is_err());
    }

    #[test]
    fn no_inner_dimension_gives_zeros_and_no_row_nothing() {
        let empty = Matrix::new(&[], 2, 0).unwrap();
        let mut out = [7.0; 4];
        multiply(&mut out, true, empty, empty.t(), Threads::One).unwrap();
        assert_eq!(out, [7.0; 4]);
        multiply(&mut out, false, empty, empty.t(), Threads::One).unwrap();
        assert_eq!(out, [0.0; 4]);
        multiply(&mut [], false, empty.t(), empty, Threads::One).unwrap();
    }
}
