#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::process::Command;

use tempfile::TempDir;

use super::*;

fn folder(files: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in files {
        let path = folder.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    folder
}

fn chosen(files: &[&str]) -> Option<String> {
    let folder = folder(files);
    let path = library_at(folder.path()).ok()?;
    Some(path.strip_prefix(folder.path()).unwrap().to_str().unwrap().to_owned())
}

#[test]
fn the_newest_library_of_a_directory_is_chosen() {
    let wheel = ["onnxruntime/capi/libonnxruntime.so.1.9.1", "onnxruntime/capi/_ld_preload.py"];
    assert_eq!(chosen(&wheel).as_deref(), Some(wheel[0]));
    let two = ["lib/libonnxruntime.so.1.9.1", "lib/libonnxruntime.so.1.31.1"];
    assert_eq!(chosen(&two).as_deref(), Some(two[1]));
    let plain = ["libonnxruntime.so.1.31.1", "libonnxruntime.so"];
    assert_eq!(chosen(&plain).as_deref(), Some(plain[1]));
    let others = ["libonnxruntime_providers_shared.so", "libonnxruntime.so.bak", "readme.txt"];
    assert_eq!(chosen(&others), None);
}

/// A library that exports `OrtGetApiBase` and states `version`, as an old ONNX Runtime would.
fn fake(folder: &Path, version: &str) -> PathBuf {
    let source = format!(
        r#"#[repr(C)] pub struct Base {{ api: extern "C" fn(u32) -> *const u8, version: extern "C" fn() -> *const u8 }}
           extern "C" fn api(_: u32) -> *const u8 {{ std::ptr::null() }}
           extern "C" fn version() -> *const u8 {{ c"{version}".as_ptr().cast() }}
           static BASE: Base = Base {{ api, version }};
           #[unsafe(no_mangle)] pub extern "C" fn OrtGetApiBase() -> *const Base {{ &BASE }}"#
    );
    let library = folder.join(LIBRARY_NAME);
    fs::write(folder.join("fake.rs"), source).unwrap();
    let compiler = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let status = Command::new(compiler)
        .args(["--edition=2024", "--crate-type=cdylib", "-o"])
        .args([library.as_path(), &folder.join("fake.rs")])
        .status()
        .unwrap();
    assert!(status.success());
    library
}

/// The C library of this process.
fn libc() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line =
        maps.lines().find(|line| line.contains("libc.so") || line.contains("libc-")).unwrap();
    PathBuf::from(line.split_whitespace().last().unwrap())
}

fn rejection(path: &Path) -> String {
    let search = Search { flag: Some(path.to_owned()), ..Search::default() };
    let error = search.find(Version::OLDEST).unwrap_err();
    assert_eq!(error.tried.len(), 1, "{error}");
    assert_eq!(error.tried[0].place.as_deref(), Some(path));
    assert!(error.to_string().contains("pip install onnxruntime==1.31.1"), "{error}");
    error.tried[0].rejection.to_string()
}

#[test]
fn what_is_no_onnx_runtime_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lib.so");
    assert_eq!(rejection(&file), "there is no such file or directory");
    assert_eq!(rejection(folder.path()), "the directory holds no libonnxruntime.so");
    fs::write(&file, "not a library").unwrap();
    assert_eq!(rejection(&file), "it is not a shared library");
    assert_eq!(rejection(&libc()), "it is not ONNX Runtime: it does not export OrtGetApiBase");
    let bytes = fs::read(libc()).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let message = rejection(&file);
    assert!(message.starts_with("the file is truncated: "), "{message}");
    let mut other = bytes;
    other[18] = if cfg!(target_arch = "x86_64") { 183 } else { 62 };
    fs::write(&file, other).unwrap();
    let message = rejection(&file);
    assert!(message.starts_with("it is built for "), "{message}");
}

#[test]
fn a_library_of_a_wrong_version_is_refused_by_its_version() {
    let folder = tempfile::tempdir().unwrap();
    let old = fake(folder.path(), "1.14.1");
    assert_eq!(rejection(&old), "it is ONNX Runtime 1.14.1; 1.22.0 or later is needed");
    let folder = tempfile::tempdir().unwrap();
    let message = rejection(&fake(folder.path(), "next"));
    assert_eq!(
        message,
        "it is ONNX Runtime of an unknown version: \"next\" is not a version such as 1.31.1"
    );
    let folder = tempfile::tempdir().unwrap();
    let message = rejection(&fake(folder.path(), "1.31.1"));
    assert_eq!(message, "it exports OrtGetApiBase, which gives no C interface of this version");
}

#[test]
fn places_are_looked_at_in_order_and_all_are_told() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("target/runtime")).unwrap();
    fake(&root.path().join("target/runtime"), "1.2.3");
    let search = Search {
        roots: vec![root.path().to_owned()],
        pythons: vec![root.path().join("no-python")],
        system: vec![root.path().join("lib")],
        ..Search::default()
    };
    let outcome = search.run(Version::OLDEST);
    assert_eq!(outcome.found, None);
    let told: Vec<How> = outcome.tried.iter().map(|attempt| attempt.how).collect();
    assert_eq!(told, [How::Flag, How::Environment, How::Project, How::Python, How::System]);
    assert!(matches!(outcome.tried[2].rejection, Rejection::TooOld { .. }));
    assert!(matches!(outcome.tried[3].rejection, Rejection::NoPython(_)));
    assert!(matches!(outcome.tried[4].rejection, Rejection::Missing));
}

#[test]
fn what_the_environment_names_is_not_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let search = Search {
        environment: Some(folder.path().join("gone.so")),
        roots: vec![folder.path().to_owned()],
        ..Search::default()
    };
    let tried = search.find(Version::OLDEST).unwrap_err().tried;
    assert_eq!(tried.len(), 2);
    assert_eq!(tried[1].how, How::Environment);
}

/// A stand-in for a Python interpreter that prints `answer`. Another process writes it: what this one
/// has open for writing, a test on another thread may hand to a child, and Linux starts no such file.
fn python(folder: &Path, answer: &str) -> PathBuf {
    let path = folder.join("python");
    let text = format!("#!/bin/sh\necho '{answer}'\n");
    let write = r#"printf %s "$1" > "$0" && chmod +x "$0""#;
    let status = Command::new("sh").args(["-c", write]).arg(&path).arg(text).status();
    assert!(status.unwrap().success());
    path
}

#[test]
fn a_python_package_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let package = folder.path().join("site-packages/onnxruntime");
    let interpreter = python(folder.path(), package.to_str().unwrap());
    assert_eq!(ask_python(&interpreter).unwrap(), package);
    let interpreter = python(folder.path(), "");
    assert!(matches!(ask_python(&interpreter), Err(Rejection::NoPackage)));
}
