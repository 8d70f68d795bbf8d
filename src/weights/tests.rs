//! Each expression against the arithmetic written out.

use std::sync::Arc;

use super::*;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A checkpoint of one tensor `w` `[3, 2]` = 0..6, `a` `[1, 2]` and `b` `[3, 1]`.
fn sources() -> Result<Sources> {
    let mut sources = Sources::new();
    for (name, shape, values) in [
        ("w", vec![3, 2], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        ("a", vec![1, 2], vec![1.0, -1.0]),
        ("b", vec![3, 1], vec![1.0, 2.0, 3.0]),
        ("nan", vec![2, 2], vec![0.0, 1.0, f32::NAN, 2.0]),
        ("big", vec![1, 1], vec![1e30]),
    ] {
        let mut bytes = Vec::new();
        sources::encode(&values, DType::F32, &mut bytes);
        sources.insert_memory(stored(name, &shape), bytes.into())?;
    }
    Ok(sources)
}

fn stored(name: &str, shape: &[usize]) -> Stored {
    Stored { name: name.into(), shape: shape.to_vec(), dtype: DType::F32 }
}

fn w() -> Weight {
    Weight::Stored(stored("w", &[3, 2]))
}

fn check(weight: &Weight, shape: &[usize], expected: &[f32]) -> Result {
    assert_eq!(weight.shape(), shape);
    assert_eq!(values(weight, &sources()?)?, expected);
    Ok(())
}

#[test]
fn merged_adds_the_scaled_product() -> Result {
    let lora = Lora { down: stored("a", &[1, 2]), up: stored("b", &[3, 1]), scale: 2.0 };
    let merged = Weight::Merged { base: Box::new(w()), lora };
    check(&merged, &[3, 2], &[2.0, -1.0, 6.0, -1.0, 10.0, -1.0])
}

#[test]
fn concat_slice_and_transpose() -> Result {
    let slice = Weight::Slice { of: Box::new(w()), rows: 1..3 };
    check(&slice, &[2, 2], &[2.0, 3.0, 4.0, 5.0])?;
    check(&Weight::Transpose(Box::new(w())), &[2, 3], &[0.0, 2.0, 4.0, 1.0, 3.0, 5.0])?;
    let both = Weight::Concat(vec![slice, w()]);
    check(&both, &[5, 2], &[2.0, 3.0, 4.0, 5.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0])?;
    check(&Weight::Slice { of: Box::new(both), rows: 1..3 }, &[2, 2], &[4.0, 5.0, 0.0, 1.0])
}

#[test]
fn block_diagonal_pads_with_zeros() -> Result {
    let part = |rows| Weight::Slice { of: Box::new(w()), rows };
    let both = Weight::BlockDiagonal(vec![part(0..1), part(1..3)]);
    check(&both, &[3, 4], &[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 3.0, 0.0, 0.0, 4.0, 5.0])
}

#[test]
fn casting_rounds_to_nearest_even() -> Result {
    let mut sources = Sources::new();
    let mut bytes = Vec::new();
    sources::encode(&[1.001_953_1, 1.005_859_4], DType::F32, &mut bytes);
    sources.insert_memory(stored("x", &[2]), Arc::from(bytes))?;
    let x = Weight::Stored(stored("x", &[2]));
    let cast = Weight::Cast { of: Box::new(x.clone()), dtype: DType::BF16 };
    assert_eq!(values(&cast, &sources)?, [1.0, 1.007_812_5]);
    let mut written = Vec::new();
    write(&x, DType::BF16, &sources, &mut written)?;
    assert_eq!(written, [0x80, 0x3f, 0x81, 0x3f]);
    Ok(())
}

#[test]
fn a_nan_is_named_with_its_place() -> Result {
    let nan = Weight::Stored(stored("nan", &[2, 2]));
    let error = write(&nan, DType::F32, &sources()?, &mut Vec::new()).err().map(|e| e.to_string());
    assert_eq!(
        error.as_deref(),
        Some(
            "nan: element 2 is NaN; every weight must be finite (is the file damaged, or the range of f32 too small?)"
        )
    );
    Ok(())
}

#[test]
fn what_overflows_the_target_is_named() -> Result {
    let big = Weight::Stored(stored("big", &[1, 1]));
    let error = write(&big, DType::F16, &sources()?, &mut Vec::new()).err().map(|e| e.to_string());
    assert!(error.is_some_and(|e| e.starts_with("big: element 0 is inf")));
    Ok(())
}

#[test]
fn blocks_do_not_change_the_bytes() -> Result {
    let rows = 3 * BLOCK / 4 / 1000 + 7;
    let values: Vec<f32> = (0..rows * 1000).map(|i| (i as f32).sin()).collect();
    let mut bytes = Vec::new();
    sources::encode(&values, DType::F32, &mut bytes);
    let mut sources = Sources::new();
    sources.insert_memory(stored("long", &[rows, 1000]), bytes.clone().into())?;
    let mut written = Vec::new();
    write(&Weight::Stored(stored("long", &[rows, 1000])), DType::F32, &sources, &mut written)?;
    assert!(written == bytes);
    Ok(())
}

/// Every window of every kind of expression is cut from the whole.
#[test]
fn a_window_is_cut_from_the_whole() -> Result {
    let lora = Lora { down: stored("a", &[1, 2]), up: stored("b", &[3, 1]), scale: 2.0 };
    let merged = Weight::Merged { base: Box::new(w()), lora };
    let turned = Weight::Transpose(Box::new(merged.clone()));
    let diagonal = Weight::BlockDiagonal(vec![w(), turned.clone(), w()]);
    let cast = Weight::Cast { of: Box::new(diagonal.clone()), dtype: DType::BF16 };
    let back = Weight::Transpose(Box::new(Weight::Concat(vec![turned.clone(), turned.clone()])));
    let sources = sources()?;
    for weight in [w(), merged, turned, diagonal, cast, back] {
        let all = values(&weight, &sources)?;
        let (height, width) = (weight.rows(), weight.columns());
        for rows in ranges(height) {
            for columns in ranges(width) {
                let mut found = Vec::new();
                window(&weight, rows.clone(), columns.clone(), &sources, &mut found)?;
                let expected: Vec<f32> = rows
                    .clone()
                    .flat_map(|row| &all[row * width + columns.start..row * width + columns.end])
                    .copied()
                    .collect();
                assert_eq!(found, expected, "{weight:?} {rows:?} {columns:?}");
            }
        }
    }
    Ok(())
}

fn ranges(length: usize) -> Vec<Range<usize>> {
    (0..length).flat_map(|start| (start + 1..=length).map(move |end| start..end)).collect()
}

#[test]
fn a_large_transpose_is_right() -> Result {
    let (height, width) = (3 * BLOCK / 4 / 1000 + 7, 1000);
    let values: Vec<f32> = (0..height * width).map(|i| (i % 65_537) as f32).collect();
    let mut bytes = Vec::new();
    sources::encode(&values, DType::F32, &mut bytes);
    let mut sources = Sources::new();
    sources.insert_memory(stored("tall", &[height, width]), bytes.into())?;
    let tall = Weight::Transpose(Box::new(Weight::Stored(stored("tall", &[height, width]))));
    let mut written = Vec::new();
    write(&tall, DType::F32, &sources, &mut written)?;
    let mut turned = Vec::new();
    sources::decode(&written, DType::F32, &mut turned);
    for (c, column) in turned.chunks_exact(height).enumerate() {
        assert!(
            column
                .iter()
                .enumerate()
                .all(|(r, value)| value.to_bits() == values[r * width + c].to_bits())
        );
    }
    Ok(())
}

/// The fast path and the general one give the same bytes, in every dtype.
#[test]
fn unchanged_bytes_are_those_of_the_arithmetic() -> Result {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut sources = Sources::new();
        let mut bytes = Vec::new();
        sources::encode(&[1.5, -2.25, 1e-7, 0.1, 3.0, -0.0], dtype, &mut bytes);
        let part = Stored { dtype, ..stored("part", &[3, 2]) };
        sources.insert_memory(part.clone(), bytes.into())?;
        let part = Weight::Stored(part);
        let slice = Weight::Slice { of: Box::new(part.clone()), rows: 1..3 };
        let both = Weight::Concat(vec![slice, part.clone(), part]);
        let both = Weight::Cast { of: Box::new(both), dtype };
        assert!(raw::segments(&both, dtype).is_some());
        let (mut fast, mut general) = (Vec::new(), Vec::new());
        write(&both, dtype, &sources, &mut fast)?;
        sources::encode(&values(&both, &sources)?, dtype, &mut general);
        assert_eq!(fast, general);
    }
    Ok(())
}

#[test]
fn the_fast_path_names_infinities_in_every_dtype() -> Result {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut sources = Sources::new();
        let mut bytes = Vec::new();
        sources::encode(&[1.0, 2.0, 3.0, f32::NEG_INFINITY], dtype, &mut bytes);
        let bad = Stored { dtype, ..stored("bad", &[2, 2]) };
        sources.insert_memory(bad.clone(), bytes.into())?;
        let error = write(&Weight::Stored(bad), dtype, &sources, &mut Vec::new());
        let error = error.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.starts_with("bad: element 3 is -inf"), "{error}");
    }
    Ok(())
}
