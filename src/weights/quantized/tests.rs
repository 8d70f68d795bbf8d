//! Codes against the layout written out by hand; fits against each other and against brute force.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use skipgpt_passes::ir::Stored;
use skipgpt_passes::quantization::{AccuracyLevel, Method};

use super::*;

const SCHEME: Scheme = Scheme {
    bits: Bits::Four,
    block: 16,
    symmetric: true,
    method: Method::Nearest,
    accuracy: AccuracyLevel::Unset,
};

fn every_scheme() -> Vec<Scheme> {
    let mut all = Vec::new();
    for bits in [Bits::Four, Bits::Eight] {
        for block in [16, 32, 128] {
            for symmetric in [true, false] {
                for method in [Method::Nearest, Method::Search] {
                    all.push(Scheme { bits, block, symmetric, method, ..SCHEME });
                }
            }
        }
    }
    all
}

/// Numbers with a few far from the others, as trained weights have them.
fn random(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    (0..count)
        .map(|_| {
            let bell = uniform() + uniform() + uniform();
            if uniform() > 0.47 { 3.0 * bell } else { bell }
        })
        .collect()
}

/// `values` as a matrix of `columns` columns.
fn matrix(values: &[f32], columns: usize) -> (Weight, Sources) {
    let stored = Stored {
        name: "w".into(),
        shape: vec![values.len() / columns, columns],
        dtype: DType::F32,
    };
    let mut bytes = Vec::new();
    sources::encode(values, DType::F32, &mut bytes);
    let mut sources = Sources::new();
    sources.insert_memory(stored.clone(), bytes.into()).unwrap();
    (Weight::Stored(stored), sources)
}

fn packed(values: &[f32], columns: usize, scheme: &Scheme, dtype: DType) -> (Vec<u8>, Sides) {
    let (weight, sources) = matrix(values, columns);
    let mut codes = Vec::new();
    let sides = write_on(2, &weight, scheme, dtype, &sources, &mut codes).unwrap();
    (codes, sides)
}

/// What the bytes stand for, read one element at a time as the operator's documentation has it.
fn by_hand(
    (codes, sides): &(Vec<u8>, Sides),
    columns: usize,
    rows: usize,
    scheme: &Scheme,
) -> Vec<f32> {
    let mut scales = Vec::new();
    sources::decode(&sides.scales, DType::F32, &mut scales);
    let (blocks, bits) = (columns.div_ceil(scheme.block), scheme.bits.count());
    let number = |bytes: &[u8], index: usize| match scheme.bits {
        Bits::Eight => bytes[index],
        Bits::Four if index.is_multiple_of(2) => bytes[index / 2] & 0x0f,
        Bits::Four => bytes[index / 2] >> 4,
    };
    let mut all = Vec::new();
    for row in 0..rows {
        for column in 0..columns {
            let block = column / scheme.block;
            let width = blocks * scheme.block * bits / 8;
            let code = number(&codes[row * width..], column);
            let zero = if scheme.symmetric {
                1 << (bits - 1)
            } else {
                number(&sides.zeros[row * (blocks * bits).div_ceil(8)..], block)
            };
            all.push((f32::from(code) - f32::from(zero)) * scales[row * blocks + block]);
        }
    }
    all
}

#[test]
fn a_row_of_each_layout_is_as_written_out() {
    // 16 numbers a block; the extreme, -8, is the lowest code.
    let row: Vec<f32> = (0..20).map(|i| [-8.0, 0.0, 3.0, 7.0][i % 4]).collect();
    let (codes, sides) = packed(&row, 20, &SCHEME, DType::F32);
    let half: [u8; 8] = [0x80, 0xfb, 0x80, 0xfb, 0x80, 0xfb, 0x80, 0xfb];
    let rest: [u8; 8] = [0x80, 0xfb, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88];
    assert_eq!(codes, [half, rest].concat());
    assert_eq!(sides.scales, [1.0_f32.to_le_bytes(), 1.0_f32.to_le_bytes()].concat());
    assert!(sides.zeros.is_empty());
    // -8..=7 on 0..=15: zero is at 8, in both halves of one byte.
    let asymmetric = Scheme { symmetric: false, ..SCHEME };
    let (same, sides) = packed(&row, 20, &asymmetric, DType::F32);
    assert_eq!((same, sides.zeros), (codes, vec![0x88]));
    let eight = Scheme { bits: Bits::Eight, ..SCHEME };
    let (codes, _) = packed(&[1.0, -1.0, 0.5, 0.0], 4, &eight, DType::F32);
    assert_eq!(codes[..5], [0, 255, 64, 128, 128]);
}

#[test]
fn bytes_stand_for_the_values_whatever_the_scheme() {
    for scheme in every_scheme() {
        for columns in [16, 33, 96, 100] {
            let (rows, values) = (7, random(7 * columns, columns as u32));
            let bytes = packed(&values, columns, &scheme, DType::F32);
            let expected = by_hand(&bytes, columns, rows, &scheme);
            let (weight, sources) = matrix(&values, columns);
            let mut found = Vec::new();
            super::values(&weight, 0..rows, &scheme, &sources, &mut found).unwrap();
            assert_eq!(found, expected, "{scheme}, {columns} columns");
            let (mut error, mut length) = (0.0, 0.0);
            for (found, value) in found.iter().zip(&values) {
                error += (found - value).powi(2);
                length += value.powi(2);
            }
            let allowed = if scheme.bits == Bits::Four { 0.2 } else { 0.012 };
            assert!((error / length).sqrt() < allowed, "{scheme}: {}", (error / length).sqrt());
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let columns = 512;
    // Several shares for each thread, the last one short.
    let values = random(columns * (SHARE / 4 / columns * 5 + 3), 3);
    let (weight, sources) = matrix(&values, columns);
    let scheme = Scheme { symmetric: false, method: Method::Search, block: 32, ..SCHEME };
    let run = |threads| {
        let mut codes = Vec::new();
        let sides = write_on(threads, &weight, &scheme, DType::F32, &sources, &mut codes).unwrap();
        (codes, sides)
    };
    let one = run(1);
    assert_eq!(one.0.len(), values.len() / 2);
    for threads in [2, 3, 8] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

#[test]
fn blocks_without_range_are_exact() {
    for scheme in every_scheme() {
        for value in [0.0_f32, 1.5, -0.25, 1e-30, -1e30] {
            let bytes = packed(&[value; 40], 40, &scheme, DType::F32);
            for found in by_hand(&bytes, 40, 1, &scheme) {
                let near = (found - value).abs() <= value.abs() * 1e-6;
                assert!(near, "{scheme}: {value} became {found}");
            }
        }
    }
}

#[test]
fn scales_are_rounded_before_the_codes_are_chosen() {
    for scheme in every_scheme() {
        let values = random(256, 9);
        let (codes, sides) = packed(&values, 256, &scheme, DType::F16);
        let mut scales = Vec::new();
        sources::decode(&sides.scales, DType::F16, &mut scales);
        assert_eq!(sides.scales.len(), 2 * 256 / scheme.block);
        let mut wide = Sides { scales: Vec::new(), zeros: sides.zeros.clone() };
        sources::encode(&scales, DType::F32, &mut wide.scales);
        let found = by_hand(&(codes, wide), 256, 1, &scheme);
        // No neighbouring code is nearer: no element errs by more than half a step, unless its
        // code is the last one.
        for (block, (found, values)) in
            found.chunks(scheme.block).zip(values.chunks(scheme.block)).enumerate()
        {
            let step = scales[block].abs();
            let (low, high) =
                found.iter().fold((0.0_f32, 0.0_f32), |(l, h), v| (l.min(*v), h.max(*v)));
            for (found, value) in found.iter().zip(values) {
                let cut = *found <= low || *found >= high;
                assert!(cut || (found - value).abs() <= step * 0.501, "{scheme}");
            }
        }
    }
}

/// Weighted squared error, as `fit::search` counts it.
fn error(values: &[f32], found: &[f32]) -> f64 {
    let mean = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
    let each = values.iter().zip(found);
    each.map(|(v, f)| f64::from((mean + v.abs()) * (v - f).powi(2))).sum()
}

#[test]
fn searching_errs_less_than_rounding_and_little_more_than_the_best() {
    for symmetric in [true, false] {
        let (mut nearest, mut searched, mut best) = (0.0, 0.0, 0.0);
        for seed in 0..64 {
            let values = random(32, seed);
            let of = |method| {
                let scheme = Scheme { block: 32, symmetric, method, ..SCHEME };
                let bytes = packed(&values, 32, &scheme, DType::F32);
                error(&values, &by_hand(&bytes, 32, 1, &scheme))
            };
            nearest += of(Method::Nearest);
            let own = of(Method::Search);
            searched += own;
            best += exhaustive(&values, symmetric).min(own);
        }
        assert!(searched < 0.92 * nearest, "{searched} against {nearest}");
        assert!(searched < 1.06 * best, "{searched} against {best}");
    }
}

/// Where some inputs weigh more, their errors are avoided.
#[test]
fn errors_weigh_what_their_inputs_do() {
    let weighs: Vec<f32> = (0..32).map(|i| if i % 8 == 3 { 50.0 } else { 0.5 }).collect();
    for symmetric in [true, false] {
        let scheme = Scheme { block: 32, symmetric, method: Method::Search, ..SCHEME };
        let (mut plain, mut weighed) = (0.0, 0.0);
        for seed in 0..64 {
            let values = random(32, seed);
            let (weight, mut sources) = matrix(&values, 32);
            let mut of = |importance: Option<&[f32]>| {
                if let Some(importance) = importance {
                    sources.weigh("w".to_owned(), importance.into());
                }
                let mut found = Vec::new();
                super::values(&weight, 0..1, &scheme, &sources, &mut found).unwrap();
                let each = values.iter().zip(&found).zip(&weighs);
                each.map(|((v, f), w)| f64::from(w * (v - f).powi(2))).sum::<f64>()
            };
            plain += of(None);
            weighed += of(Some(&weighs));
        }
        assert!(weighed < 0.7 * plain, "{weighed} against {plain}");
    }
}

/// As one weight or apart, each row has the importance of its own projection.
#[test]
fn rows_of_several_projections_keep_their_importance() {
    let scheme = Scheme { block: 32, method: Method::Search, ..SCHEME };
    let mut sources = Sources::new();
    let parts = ["a", "b"].map(|name| {
        let stored = Stored { name: name.into(), shape: vec![2, 32], dtype: DType::F32 };
        let mut bytes = Vec::new();
        let seed = u32::from(name.as_bytes()[0]);
        crate::sources::encode(&random(64, seed), DType::F32, &mut bytes);
        sources.insert_memory(stored.clone(), bytes.into()).unwrap();
        let weighs: Vec<f32> = random(32, seed + 7).into_iter().map(|v| 0.01 + v * v).collect();
        sources.weigh(name.to_owned(), weighs.into());
        Weight::Stored(stored)
    });
    let values = |weight: &Weight| {
        let mut out = Vec::new();
        super::values(weight, 0..weight.rows(), &scheme, &sources, &mut out).unwrap();
        out
    };
    let apart = parts.iter().flat_map(values).collect::<Vec<_>>();
    assert_eq!(values(&Weight::Concat(parts.to_vec())), apart);
}

/// The least error over a fine grid of scales, for every zero point.
fn exhaustive(values: &[f32], symmetric: bool) -> f64 {
    let widest = values.iter().fold(0.0_f32, |widest, v| widest.max(v.abs()));
    let zeros = if symmetric { 8..=8 } else { 0..=15 };
    let mut least = f64::INFINITY;
    for zero in zeros {
        let zero = zero as f32;
        for at in 1..=600 {
            for sign in [-1.0, 1.0] {
                let scale = sign * widest * at as f32 / 1200.0;
                let found: Vec<f32> = values
                    .iter()
                    .map(|v| ((v / scale + zero).round_ties_even().clamp(0.0, 15.0) - zero) * scale)
                    .collect();
                least = least.min(error(values, &found));
            }
        }
    }
    least
}

#[test]
fn numbers_that_are_none_are_named() {
    let mut values = random(128, 1);
    values[70] = f32::NAN;
    let (weight, sources) = matrix(&values, 32);
    let error = write(&weight, &SCHEME, DType::F32, &sources, &mut Vec::new()).unwrap_err();
    assert!(error.to_string().starts_with("w: element 70 is NaN"), "{error}");
    let (weight, sources) = matrix(&[1e9; 32], 32);
    let error = write(&weight, &SCHEME, DType::F16, &sources, &mut Vec::new()).unwrap_err();
    assert!(error.to_string().starts_with("the scales of w: element 0 is -inf"), "{error}");
}
