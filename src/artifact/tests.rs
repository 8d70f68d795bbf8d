//! Whole artifacts: what is in them, and what is left when something fails.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use skipgpt_passes::ir::Weight;

use super::manifest::{self, Weights};
use super::testing::{Bench, go_on, initializer, list, stored};
use super::*;
use crate::onnx::graph::{Data, Placement};
use crate::onnx::proto;

const FILES: [&str; 8] = [
    "README.md",
    "config.json",
    "genai_config.json",
    "generation_config.json",
    "manifest.json",
    "model.onnx",
    "model.onnx.data",
    "tokenizer.json",
];

#[test]
fn an_artifact_opens_and_its_hashes_hold() {
    let bench = Bench::new();
    let written = bench.export("out", Weights::Copy).unwrap();
    assert_eq!(list(&bench.output("out")), FILES);
    assert_eq!(bench.listing(), ["checkpoint", "out"]);
    let artifact = open(&bench.output("out")).unwrap();
    assert_eq!(artifact.manifest, written);
    artifact.verify_hashes(&mut go_on).unwrap();
    assert_eq!(artifact.read("tokenizer.json").unwrap(), b"{}");
    let inputs: Vec<_> = written.inputs.iter().map(|input| input.name.as_str()).collect();
    assert_eq!(inputs, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(written.cache_layers, [0]);
    let routed: Vec<_> = written.routing.routed.iter().map(ToString::to_string).collect();
    assert_eq!(routed, ["layers.0.mlp", "layers.1.mlp"]);
}

#[test]
fn weights_lie_page_aligned_and_equal_ones_once() {
    let bench = Bench::new();
    bench.export("out", Weights::Copy).unwrap();
    let data = fs::read(bench.output("out").join("model.onnx.data")).unwrap();
    // Ten tensors, each on a page; the eleventh initializer shares the first's.
    assert_eq!(data.len(), 9 * 4096 + 16 * 4);
    let layout = layout::Layout::copy(&bench.graph);
    assert_eq!(layout.placements["head"], layout.placements["embedding"]);
    let place = &layout.placements["q"];
    assert_eq!((place.offset, place.length), (4096, 128));
    let values: Vec<f32> = data[4096..4096 + 128]
        .chunks(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    assert_eq!(values, (24..56).map(|i| i as f32).collect::<Vec<_>>());
}

#[test]
fn two_exports_have_the_same_bytes() {
    let bench = Bench::new();
    for weights in [Weights::Copy, Weights::Link] {
        for name in ["one", "two"] {
            bench.export(name, weights).unwrap();
        }
        let (one, two) = (bench.output("one"), bench.output("two"));
        assert_eq!(list(&one), list(&two));
        for file in list(&one) {
            assert!(
                fs::read(one.join(&file)).unwrap() == fs::read(two.join(&file)).unwrap(),
                "{file}"
            );
        }
        fs::remove_dir_all(one).unwrap();
        fs::remove_dir_all(two).unwrap();
    }
}

#[test]
fn an_existing_path_is_refused_and_unchanged() {
    let bench = Bench::new();
    fs::create_dir(bench.output("out")).unwrap();
    fs::write(bench.output("out").join("mine"), "x").unwrap();
    let error = bench.export("out", Weights::Copy).unwrap_err();
    assert!(matches!(error, Error::Exists(_)), "{error}");
    assert_eq!(list(&bench.output("out")), ["mine"]);
    assert_eq!(bench.listing(), ["checkpoint", "out"]);
}

fn forced(bench: &Bench, weights: Weights) -> Result<manifest::Manifest, Error> {
    let output = bench.output("out");
    write(&Request { force: true, ..bench.request(&output, weights) }, &mut go_on)
}

#[test]
fn force_replaces_an_export_and_nothing_else() {
    let bench = Bench::new();
    bench.export("out", Weights::Link).unwrap();
    forced(&bench, Weights::Copy).unwrap();
    assert_eq!(list(&bench.output("out")), FILES);
    assert_eq!(bench.listing(), ["checkpoint", "out"]);
    fs::write(bench.output("out").join("notes"), "mine").unwrap();
    let error = forced(&bench, Weights::Copy).unwrap_err().to_string();
    assert!(error.contains("it also holds notes, which no export wrote"), "{error}");
    assert_eq!(fs::read(bench.output("out").join("notes")).unwrap(), b"mine");
    fs::remove_dir_all(bench.output("out")).unwrap();
    fs::write(bench.output("out"), "a file").unwrap();
    let error = forced(&bench, Weights::Copy).unwrap_err().to_string();
    assert!(error.contains("it is not a directory"), "{error}");
    assert_eq!(bench.listing(), ["checkpoint", "out"]);
}

#[test]
fn force_does_not_replace_the_checkpoint() {
    let bench = Bench::new();
    let output = bench.checkpoint.directory.clone();
    let request = Request { force: true, ..bench.request(&output, Weights::Copy) };
    let error = write(&request, &mut go_on).unwrap_err();
    assert!(matches!(error, Error::OnCheckpoint { .. }), "{error}");
}

#[test]
fn a_failed_replacement_keeps_the_old_one() {
    let bench = Bench::new();
    bench.export("out", Weights::Copy).unwrap();
    let before = fs::read(bench.output("out").join("manifest.json")).unwrap();
    let output = bench.output("out");
    let request = Request { force: true, ..bench.request(&output, Weights::Copy) };
    let error = write(&request, &mut |_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
    assert_eq!(fs::read(output.join("manifest.json")).unwrap(), before);
    assert_eq!(bench.listing(), ["checkpoint", "out"]);
}

#[test]
fn a_full_disk_is_named_and_leaves_nothing() {
    let bench = Bench::new();
    let output = bench.output("out");
    let full: staging::Open = |path| {
        let full = path.extension().is_some_and(|extension| extension == "data");
        if full { File::options().write(true).open("/dev/full") } else { File::create_new(path) }
    };
    let request = bench.request(&output, Weights::Copy);
    let error = write::write_with(&request, full, &mut go_on).unwrap_err();
    let Error::NoSpace { path, needed, .. } = &error else { panic!("{error}") };
    assert_eq!((path, *needed), (&output, 9 * 4096 + 16 * 4));
    assert_eq!(bench.listing(), ["checkpoint"]);
}

#[test]
fn too_little_space_is_known_before_anything_is_written() {
    let bench = Bench::new();
    let mut staging = staging::Staging::begin(&bench.output("out"), false).unwrap();
    let error = staging.require(u64::MAX).unwrap_err().to_string();
    assert!(error.contains(&format!("{} bytes are needed", u64::MAX)), "{error}");
    drop(staging);
    assert_eq!(bench.listing(), ["checkpoint"]);
}

#[test]
fn a_weight_that_is_not_finite_leaves_nothing() {
    // Element 30 of the file is element 6 of `q`.
    let bench = Bench::with(|i| if i == 30 { f32::NAN } else { 0.5 });
    for weights in [Weights::Copy, Weights::Link] {
        let error = bench.export("out", weights).unwrap_err().to_string();
        assert!(error.starts_with("initializer q: q: element 6 is NaN"), "{error}");
        assert_eq!(bench.listing(), ["checkpoint"]);
    }
}

#[test]
fn linked_weights_are_the_checkpoints_own_file() {
    let bench = Bench::new();
    bench.export("out", Weights::Link).unwrap();
    let (linked, own) = (bench.output("out").join("model.safetensors"), &bench.checkpoint.files[1]);
    assert_eq!(linked.metadata().unwrap().ino(), own.metadata().unwrap().ino());
    assert!(!bench.output("out").join("model.onnx.data").exists());
    open(&bench.output("out")).unwrap().verify_hashes(&mut go_on).unwrap();
    let layout = layout::Layout::link(&bench.graph, &bench.checkpoint.sources).unwrap();
    let place = &layout.placements["q"];
    let bytes = fs::read(linked).unwrap();
    let first = &bytes[place.offset as usize..][..4];
    assert_eq!((place.location.as_str(), first), ("model.safetensors", &24_f32.to_le_bytes()[..]));
}

#[test]
fn a_link_to_a_symbolic_link_is_to_the_file() {
    let bench = Bench::new();
    let own = &bench.checkpoint.files[1];
    let blob = bench.output("blob");
    fs::rename(own, &blob).unwrap();
    std::os::unix::fs::symlink(&blob, own).unwrap();
    bench.export("out", Weights::Link).unwrap();
    let linked = bench.output("out").join("model.safetensors").symlink_metadata().unwrap();
    assert!(linked.is_file());
    assert_eq!(linked.ino(), blob.metadata().unwrap().ino());
}

#[test]
fn across_file_systems_a_linked_file_is_copied() {
    let bench = Bench::new();
    // A file that cannot be linked from here: another file system's.
    let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else { return };
    let output = elsewhere.path().join("out");
    let here = bench.folder.path().metadata().unwrap().dev();
    if elsewhere.path().metadata().unwrap().dev() == here {
        return;
    }
    write(&bench.request(&output, Weights::Link), &mut go_on).unwrap();
    let copy = output.join("model.safetensors");
    assert_eq!(fs::read(&copy).unwrap(), fs::read(&bench.checkpoint.files[1]).unwrap());
    open(&output).unwrap().verify_hashes(&mut go_on).unwrap();
}

#[test]
fn rows_of_a_larger_weight_are_part_of_it() {
    let mut bench = Bench::new();
    bench.export("apart", Weights::Copy).unwrap();
    let both = Weight::Concat(vec![stored("k"), stored("v")]);
    bench.graph.initializers.push(initializer("kv", both));
    bench.export("together", Weights::Copy).unwrap();
    let placements = |name: &str| {
        let bytes = fs::read(bench.output(name).join("model.onnx")).unwrap();
        proto::placements(&bytes).unwrap()
    };
    let (apart, together) = (placements("apart"), placements("together"));
    assert_ne!(apart["v"].offset, apart["k"].offset + apart["k"].length);
    assert_eq!(together["k"].offset, together["kv"].offset);
    assert_eq!(together["v"].offset, together["kv"].offset + together["k"].length);
    let data = |name: &str| fs::read(bench.output(name).join("model.onnx.data")).unwrap();
    let bytes = |data: &[u8], place: &Placement| {
        data[place.offset as usize..(place.offset + place.length) as usize].to_vec()
    };
    for part in ["k", "v"] {
        let (one, other) = (data("apart"), data("together"));
        assert_eq!(bytes(&one, &apart[part]), bytes(&other, &together[part]), "{part}");
    }
}

#[test]
fn small_changed_weights_are_written_and_large_ones_refused() {
    let mut bench = Bench::new();
    let both = Weight::Concat(vec![stored("k"), stored("v")]);
    bench.graph.initializers.push(initializer("kv", both));
    bench.export("out", Weights::Link).unwrap();
    assert_eq!(fs::read(bench.output("out").join("model.onnx.data")).unwrap().len(), 8 * 4 * 4);
    let many = Weight::Concat(vec![stored("k"); (1 << 14) + 1]);
    bench.graph.initializers.push(initializer("many", many));
    let error = bench.export("large", Weights::Link).unwrap_err().to_string();
    assert_eq!(
        error,
        "initializer many cannot be linked: it is computed (merged, fused or transposed), not \
         stored; use --weights copy"
    );
    bench.graph.initializers.retain(|i| i.name == "kv");
    let error = bench.export("none", Weights::Link).unwrap_err();
    assert!(matches!(error, Error::Unlinkable { .. }), "{error}");
}

#[test]
fn a_weight_of_the_wrong_size_is_a_named_bug() {
    let mut bench = Bench::new();
    bench.graph.initializers[0].data = Data::Weight(stored("norm"));
    let error = bench.export("out", Weights::Copy).unwrap_err().to_string();
    assert_eq!(error, "initializer embedding takes 96 bytes; its weight gave 16");
}

#[test]
fn a_changed_byte_is_found_and_named() {
    let bench = Bench::new();
    bench.export("out", Weights::Copy).unwrap();
    let path = bench.output("out").join("model.onnx.data");
    let mut bytes = fs::read(&path).unwrap();
    bytes[4097] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let error = open(&bench.output("out")).unwrap().verify_hashes(&mut go_on).unwrap_err();
    let Error::Changed { path: named, expected, found } = &error else { panic!("{error}") };
    assert!(named == &path && expected != found && found.len() == 64);
    bytes.pop();
    fs::write(&path, &bytes).unwrap();
    let error = open(&bench.output("out")).unwrap_err().to_string();
    assert!(error.contains("expected 36928 bytes, found 36927"), "{error}");
    fs::remove_file(&path).unwrap();
    let error = open(&bench.output("out")).unwrap_err().to_string();
    assert!(error.contains("model.onnx.data: cannot read"), "{error}");
}

#[test]
fn what_a_dead_process_left_is_removed() {
    let bench = Bench::new();
    let old = bench.output(".out.partial-1-0");
    let young = bench.output(".out.partial-1-1");
    let held = bench.output(".out.partial-1-2");
    let long_ago = SystemTime::now() - Duration::from_hours(1);
    for directory in [&old, &young, &held] {
        fs::create_dir(directory).unwrap();
    }
    let lock = File::open(&held).unwrap();
    lock.try_lock().unwrap();
    for directory in [&old, &held] {
        File::open(directory).unwrap().set_modified(long_ago).unwrap();
    }
    bench.export("out", Weights::Copy).unwrap();
    assert_eq!(bench.listing(), [".out.partial-1-1", ".out.partial-1-2", "checkpoint", "out"]);
}

#[test]
fn inputs_outside_the_checkpoint_are_named_without_their_folders() {
    let paths = ["/models/a/config.json", "/b/router.pth", "/c/adapter/x", "/d/adapter/x"];
    let paths = paths.map(PathBuf::from);
    let names = inputs::relative_names(&paths, Path::new("/models/a"));
    assert_eq!(names, ["config.json", "router.pth", "x", "adapter/x"]);
}

#[test]
fn the_card_names_what_was_decided() {
    let bench = Bench::new();
    bench.export("out", Weights::Copy).unwrap();
    let card = fs::read_to_string(bench.output("out").join("README.md")).unwrap();
    assert!(card.contains("- removed: `layers.1.attention`"), "{card}");
    assert!(card.contains("- MLP modules skip by `conditional` dispatch"), "{card}");
    assert!(!card.contains(bench.folder.path().to_str().unwrap()), "{card}");
}
