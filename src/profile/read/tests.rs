#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::{Value, json};

use super::super::tests::profile;
use super::*;

#[test]
fn what_is_written_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("profile.json");
    fs::write(&path, serde_json::to_vec_pretty(&profile()).unwrap()).unwrap();
    assert_eq!(read(&path).unwrap(), profile());
    let missing = read(&directory.path().join("none.json")).unwrap_err();
    assert!(matches!(missing, Error::Read { .. }), "{missing}");
    fs::File::create(&path).unwrap().set_len(LARGEST + 1).unwrap();
    assert!(matches!(read(&path).unwrap_err(), Error::Large { .. }));
}

/// The message for a profile in which `pointer` became `value`.
fn refused(pointer: &str, value: Value) -> String {
    let mut json = serde_json::to_value(profile()).unwrap();
    *json.pointer_mut(pointer).unwrap() = value;
    parse(Path::new("p.json"), json.to_string().as_bytes()).unwrap_err().to_string()
}

#[test]
fn numbers_no_measurement_gives_are_refused() {
    for (pointer, value, expected) in [
        ("/modules/1/keep", json!(1.2), "modules[1].keep is 1.2; a share is 0 to 1"),
        (
            "/modules/0/by_position/2",
            json!(-0.5),
            "modules[0].by_position[2] is -0.5; a share is 0 to 1",
        ),
        (
            "/modules/0/by_position",
            json!([1.0]),
            "modules[0].by_position is 1 rates; there are 4 ranges of positions",
        ),
        (
            "/modules/0/module",
            json!("layers.3.attention"),
            "modules[0].module is layers.3.attention; the model has 3 layers",
        ),
        (
            "/modules/1/module",
            json!("layers.0.attention"),
            "modules[1].module is layers.0.attention; modules stand in order, each once",
        ),
        ("/positions/1/from", json!(0), "positions[1] is 0..2; ranges follow each other from 0"),
        ("/skipped/mlp", json!(7), "skipped.mlp is 7; a share is 0 to 1"),
        ("/window", json!(0), "window is 0; a window has at least 1 token"),
    ] {
        assert_eq!(refused(pointer, value), format!("p.json: {expected}"));
    }
}

#[test]
fn other_files_are_refused() {
    assert_eq!(
        refused("/version", json!(2)),
        "p.json: profile version 2; this tool reads version 1: measure it again"
    );
    for (pointer, value, part) in [
        (
            "/modules/0/module",
            json!("layers.00.attention"),
            "expected a module such as layers.3.mlp",
        ),
        ("/modules/0/module", json!("layers.0.router"), "expected a module such as layers.3.mlp"),
        ("/modules/0/keep", json!("often"), "invalid type: string \"often\""),
        (
            "/skipped",
            json!({"attention": 0.0, "mlp": 0.0, "all": 0.0, "x": 1}),
            "unknown field `x`",
        ),
        ("/tokens", json!(-1), "invalid value: integer `-1`"),
    ] {
        let message = refused(pointer, value);
        assert!(
            message.starts_with("p.json: not a profile: ") && message.contains(part),
            "{message}"
        );
    }
    let error = parse(Path::new("p.json"), b"[]").unwrap_err();
    assert!(matches!(error, Error::Json { .. }), "{error}");
}
