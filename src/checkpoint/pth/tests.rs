//! The walk against candle's own machine, under random damage, and against what it must refuse.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::path::Path;

use candle_core::pickle::{Object, Stack};

use super::scan::scan;
use super::*;
use crate::checkpoint::testing::Damage;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// The pickle in a fixture.
fn pickle(name: &str) -> Vec<u8> {
    let path = fixture(name);
    let (file, _) = files::open(&path).unwrap();
    Container::open(&path, file).unwrap().pickle().unwrap().1
}

/// What candle's machine makes of a pickle that the walk let through.
fn candle_tensors(pickle: &[u8]) -> Vec<(String, Vec<usize>, candle::DType)> {
    let mut stack = Stack::empty();
    stack.read_loop(&mut &*pickle).unwrap();
    let Object::Dict(entries) = stack.finalize().unwrap() else { panic!("no dict") };
    entries
        .into_iter()
        .filter(|(name, _)| *name != Object::Unicode("_metadata".into()))
        .map(|(name, value)| {
            let tensor = value.into_tensor_info(name, Path::new("")).unwrap();
            let tensor = tensor.expect("candle drops what the walk let through");
            (tensor.name, tensor.layout.shape().dims().to_vec(), tensor.dtype)
        })
        .collect()
}

/// The same, as the walk sees it, in the order of names.
#[track_caller]
fn assert_candle_agrees(pickle: &[u8], found: &[scan::Tensor]) {
    let mut ours: Vec<_> =
        found.iter().map(|t| (t.name.clone(), t.shape.clone(), t.dtype)).collect();
    let mut theirs = candle_tensors(pickle);
    ours.sort_by(|a, b| a.0.cmp(&b.0));
    theirs.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(ours, theirs);
}

#[test]
fn real_files_hold_what_candle_sees() {
    for name in [
        "oracle/llama-gqa/router.pth",
        "oracle/llama-gqa/lora.pth",
        "oracle/llama-mha-llama3rope/model.pth",
        "smollm2-135m/router.pth",
    ] {
        let pickle = pickle(name);
        let found = scan(&pickle).unwrap();
        assert!(found.len() >= 16, "{name}");
        assert_candle_agrees(&pickle, &found);
    }
}

/// Nothing panics; and whatever still passes, candle's machine reads whole: it drops nothing.
#[test]
fn damage_never_reaches_candle() {
    let (pickle, mut damage) = (pickle("oracle/llama-gqa/router.pth"), Damage::new(2));
    let mut accepted = 0;
    for _ in 0..10_000 {
        let damaged = damage.apply(&pickle);
        if let Ok(found) = scan(&damaged) {
            accepted += 1;
            assert_candle_agrees(&damaged, &found);
        }
    }
    assert!((100..9_000).contains(&accepted), "{accepted}");
}

#[test]
fn every_tensor_is_read_by_name() {
    let tensors = read(&fixture("oracle/llama-gqa/router.pth")).unwrap();
    assert_eq!(tensors.len(), 16);
    let weight = &tensors["model.layers.0.router_attention.weight_predictor.weight"];
    assert_eq!(weight.dims(), [2, 64]);
}

/// A text of the pickle's.
fn text(value: &str) -> Vec<u8> {
    [b"X", &(value.len() as u32).to_le_bytes()[..], value.as_bytes()].concat()
}

/// A whole pickle that leaves `{"a": <value>}`.
fn entry(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02}(", &text("a")[..], value, b"u."].concat()
}

/// `_rebuild_tensor_v2` of a vector of two floats.
fn tensor() -> Vec<u8> {
    let storage = [text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text("0"), text("cpu")];
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        storage.concat(),
        b"K\x02tQK\0K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR".to_vec(),
    ]
    .concat()
}

/// `_rebuild_parameter` of `value`.
fn parameter(value: &[u8]) -> Vec<u8> {
    let hooks = b"\x88ccollections\nOrderedDict\n)RtR";
    [b"ctorch._utils\n_rebuild_parameter\n(", value, hooks].concat()
}

#[track_caller]
fn refused(pickle: &[u8]) -> scan::Error {
    scan(pickle).unwrap_err()
}

#[test]
fn tensors_and_parameters_are_read() {
    for value in [tensor(), parameter(&tensor())] {
        let pickle = entry(&value);
        let found = scan(&pickle).unwrap();
        assert_eq!((found[0].name.as_str(), &found[0].shape[..], found[0].end), ("a", &[2][..], 8));
        assert_candle_agrees(&pickle, &found);
    }
}

#[test]
fn the_versions_a_module_attaches_are_skipped() {
    let versions = b"}(X\0\0\0\0}(X\x07\0\0\0versionK\x01uu";
    let state = [b"}", &text("_metadata")[..], versions, b"sb."].concat();
    let ordered =
        [b"\x80\x02ccollections\nOrderedDict\n)R(", &text("a")[..], &tensor(), b"u", &state]
            .concat();
    let found = scan(&ordered).unwrap();
    assert_eq!(found.len(), 1);
    assert_candle_agrees(&ordered, &found);
}

#[test]
fn a_parameter_of_a_parameter_is_refused() {
    let error = refused(&entry(&parameter(&parameter(&tensor()))));
    assert!(matches!(error, scan::Error::Malformed { .. }), "{error}");
}

#[test]
fn every_other_global_is_refused_by_its_name() {
    for (code, module, name) in [
        (&b"cbuiltins\neval\n"[..], "builtins", "eval"),
        (b"ctorch._utils\n_rebuild_tensor_v3\n", "torch._utils", "_rebuild_tensor_v3"),
        (b"ctorch.storage\nUntypedStorage\n", "torch.storage", "UntypedStorage"),
        (b"ccollections\ndefaultdict\n", "collections", "defaultdict"),
        (b"c__torch__\nModule\n", "__torch__", "Module"),
    ] {
        let expected = scan::Error::Object { module: module.into(), name: name.into() };
        assert_eq!(refused(&entry(code)), expected);
    }
}

#[test]
fn instructions_that_import_or_call_in_other_ways_are_refused() {
    // STACK_GLOBAL, INST, OBJ, NEWOBJ, EXT1, BINSTRING, DICT, LONG4, FRAME.
    for code in [0x93, b'i', b'o', 0x81, 0x82, b'T', b'd', 0x8b, 0x95] {
        let error = refused(&entry(&[code]));
        assert!(matches!(error, scan::Error::Instruction { code: found, .. } if found == code));
    }
}

#[test]
fn an_ordered_dict_of_pairs_is_not_taken_for_an_empty_one() {
    let error = refused(&entry(b"ccollections\nOrderedDict\n]\x85R"));
    assert!(matches!(error, scan::Error::Malformed { .. }), "{error}");
}

#[test]
fn what_would_be_copied_without_bound_is_refused() {
    // Each line makes a pair of the last value: 2^40 copies, or as deep a nest.
    let doubled: Vec<u8> = (0..40).flat_map(|_| *b"q\0h\0\x86").collect();
    assert!(matches!(refused(&entry(&[b")", &doubled[..]].concat())), scan::Error::Bomb { .. }));
    let wide: Vec<u8> = (0..1 << 16).flat_map(|_| *b"h\0").collect();
    let wide = [b"(", &text(&"x".repeat(1 << 14))[..], b"q\0", &wide, b"t"].concat();
    assert!(matches!(refused(&entry(&wide)), scan::Error::Bomb { .. }));
    let long = vec![b'N'; (1 << 20) + 8];
    assert!(matches!(refused(&entry(&long)), scan::Error::Bomb { .. }));
}

#[test]
fn a_dict_that_is_used_twice_is_refused() {
    let error = refused(b"\x80\x02}q\0h\0.");
    assert!(matches!(error, scan::Error::Malformed { .. }), "{error}");
}

/// Damage to the archive around the pickle: opened or refused, and read or refused, never a panic.
#[test]
fn damaged_archives_are_opened_or_refused() {
    let whole = std::fs::read(fixture("oracle/llama-gqa/router.pth")).unwrap();
    let (folder, mut damage) = (tempfile::tempdir().unwrap(), Damage::new(3));
    let path = folder.path().join("router.pth");
    let (mut opened, mut refused) = (0, 0);
    for _ in 0..400 {
        std::fs::write(&path, damage.apply(&whole)).unwrap();
        match read(&path) {
            Ok(_) => opened += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(opened > 10 && refused > 100, "{opened} {refused}");
}
