//! Headers against the format's own crate, and against random damage.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::path::Path;

use ::safetensors::SafeTensors;
use ::safetensors::tensor::{TensorView, serialize};

use super::*;
use crate::checkpoint::testing::Damage;

const PATH: &str = "model.safetensors";

/// Two tensors and metadata, as the format's crate writes them.
fn file() -> Vec<u8> {
    let bytes = [0; 24];
    let a = TensorView::new(Dtype::F32, vec![2, 3], &bytes).unwrap();
    let b = TensorView::new(Dtype::BF16, vec![4], &bytes[..8]).unwrap();
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    serialize([("a", a), ("b", b)], Some(metadata)).unwrap()
}

/// Reads a file's bytes as [`read`] does.
fn parse_file(bytes: &[u8]) -> Option<Vec<Tensor>> {
    let header = u64::from_le_bytes(*bytes.first_chunk()?);
    let end = header.checked_add(PREFIX).filter(|end| *end <= bytes.len() as u64)?;
    let text = &bytes[PREFIX as usize..end as usize];
    parse(Path::new(PATH), text, end, bytes.len() as u64 - end).ok()
}

#[test]
fn agrees_with_the_formats_own_crate() {
    let bytes = file();
    let ours = parse_file(&bytes).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(ours.len(), theirs.len());
    for tensor in ours {
        let view = theirs.tensor(&tensor.name).unwrap();
        assert_eq!((tensor.dtype, &tensor.shape[..]), (view.dtype(), view.shape()));
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(tensor.offset, start as u64);
    }
}

/// What is accepted after damage is what the format's own crate accepts, and nothing panics.
#[test]
fn damage_is_refused_wherever_the_formats_own_crate_refuses_it() {
    let (bytes, mut damage) = (file(), Damage::new(1));
    let mut accepted = 0;
    for _ in 0..10_000 {
        let damaged = damage.apply(&bytes);
        if let Some(tensors) = parse_file(&damaged) {
            accepted += 1;
            let theirs = SafeTensors::deserialize(&damaged);
            let theirs = theirs.unwrap_or_else(|error| panic!("{error}: {damaged:?}"));
            assert_eq!(tensors.len(), theirs.len());
        }
    }
    // Damage in the values, in names and in white space leaves a valid file.
    assert!((100..9_000).contains(&accepted), "{accepted}");
}

#[test]
fn empty_tensors_and_files_are_valid() {
    assert_eq!(parse(Path::new(PATH), b"{}", 10, 0).unwrap(), []);
    let text = br#"{"a":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]}}"#;
    assert_eq!(parse(Path::new(PATH), text, 10, 0).unwrap()[0].shape, [0, 7]);
}

#[test]
fn a_range_that_ends_before_it_begins_is_refused() {
    let text = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}"#;
    let error = parse(Path::new(PATH), text, 10, 8).unwrap_err();
    assert!(matches!(error, Error::Length { .. }), "{error}");
}

#[test]
fn numbers_past_64_bits_are_refused() {
    let text = br#"{"a":{"dtype":"F32","shape":[36893488147419103232],"data_offsets":[0,4]}}"#;
    let error = parse(Path::new(PATH), text, 10, 4).unwrap_err();
    assert!(matches!(error, Error::Header { .. }), "{error}");
}
