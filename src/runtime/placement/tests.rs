#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use expect_test::expect;

use super::*;

fn recorded(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/profiles").join(name)
}

fn read(name: &str, asked: Provider) -> Placement {
    Placement::read(&recorded(name), asked).unwrap()
}

#[test]
fn a_session_on_the_processor_ran_there() {
    let placement = read("cpu.json", Provider::Cpu);
    placement.check().unwrap();
    expect!["93 of 93 nodes on CPUExecutionProvider, 0 of shape arithmetic on the processor; copies inserted: 0 from the device (0 bytes), 0 to it (0 bytes)"]
        .assert_eq(&placement.to_string());
}

/// The same profile, had a GPU been asked for: a session that fell back as a whole.
#[test]
fn a_whole_session_left_to_the_processor_is_a_fallback() {
    let error = read("cpu.json", Provider::Cuda).check().unwrap_err().to_string();
    expect![""].assert_eq(&error);
}

#[test]
fn shapes_may_stay_on_the_processor() {
    let placement = read("cuda-shapes.json", Provider::Cuda);
    placement.check().unwrap();
    expect![""].assert_eq(&placement.to_string());
    let operators: Vec<&str> = placement.shapes.iter().map(|node| &*node.operator).collect();
    expect![""].assert_eq(&operators.join(" "));
}

#[test]
fn one_kernel_that_is_missing_is_a_fallback() {
    let placement = read("cuda-fallback.json", Provider::Cuda);
    expect![""].assert_eq(&placement.to_string());
    expect![""].assert_eq(&placement.check().unwrap_err().to_string());
}

#[test]
fn what_is_arithmetic_on_shapes() {
    let args = |op: &str, inputs: &str, outputs: &str| -> Args {
        let text = format!(
            r#"{{"op_name": "{op}", "provider": "CPUExecutionProvider",
                 "input_type_shape": {inputs}, "output_type_shape": {outputs}}}"#
        );
        serde_json::from_str(&text).unwrap()
    };
    let whole = |op, inputs, outputs| args(op, inputs, outputs).is_shape_arithmetic();
    assert!(whole("Gather", r#"[{"int64": [2]}, {"int64": []}]"#, r#"[{"int64": []}]"#));
    assert!(whole("Cast", r#"[{"int64": []}]"#, r#"[{"bool": []}]"#));
    assert!(whole("Shape", r#"[{"float16": [4, 2048, 64]}]"#, r#"[{"int64": [3]}]"#));
    assert!(!whole("Cast", r#"[{"int64": [65]}]"#, r#"[{"int32": [65]}]"#));
    assert!(!whole("Cast", r#"[{"int64": [4]}]"#, r#"[{"float": [4]}]"#));
    assert!(!whole("Greater", r#"[{"float": [4]}, {"float": []}]"#, r#"[{"bool": [4]}]"#));
    assert!(!whole("NonZero", r#"[{"bool": [2048]}]"#, r#"[{"int64": [1, 12]}]"#));
    assert!(!whole("Unknown", "[]", "[]"));
    let copied = args("MemcpyToHost", "[]", r#"[{"float16": [3, 5]}, {"bool": [1]}]"#);
    assert_eq!(copied.bytes(), 31);
}

#[test]
fn what_is_no_profile_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("profile.json");
    let error = |text: &str| {
        fs::write(&path, text).unwrap();
        Placement::read(&path, Provider::Cpu).unwrap_err()
    };
    assert!(matches!(error("[]"), Error::Empty(_)));
    assert!(matches!(error(r#"[{"cat": "Session", "name": "load"}]"#), Error::Empty(_)));
    assert!(matches!(error("[{"), Error::Parse { .. }));
    fs::remove_file(&path).unwrap();
    let missing = Placement::read(&path, Provider::Cpu).unwrap_err();
    assert!(matches!(missing, Error::Read { .. }));
}
