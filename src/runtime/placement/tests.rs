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
    expect!["174 of 174 nodes on CPUExecutionProvider; copies inserted: 0 from the device (0 bytes), 0 to it (0 bytes)"].assert_eq(&placement.to_string());
}

/// The same profile, had a GPU been asked for: a session that fell back as a whole.
#[test]
fn a_whole_session_left_to_the_processor_is_a_fallback() {
    let error = read("cpu.json", Provider::Cuda).check().unwrap_err().to_string();
    expect!["174 of 174 nodes were left to the CPU provider by CUDAExecutionProvider: /embedding (Gather), /layers.input (Reshape), /layers.0.router.scores (Gemm), /layers.0.router.scores.split (Split), /layers.0.router.kept (GreaterOrEqual), /layers.0.attention.norm/SimplifiedLayerNormFusion/ (SimplifiedLayerNormalization), …; export for this provider (docs/gpu.md says which operators it has), or run with --provider cpu"].assert_eq(&error);
}

#[test]
fn shapes_may_stay_on_the_processor() {
    let placement = read("cuda-shapes.json", Provider::Cuda);
    placement.check().unwrap();
    expect!["142 of 174 nodes on CUDAExecutionProvider, 30 of shape arithmetic on the processor, 2 of whole numbers per token on the processor; copies inserted: 0 from the device (0 bytes), 1 to it (8 bytes)"].assert_eq(&placement.to_string());
    let operators = |nodes: &[Node]| -> String {
        let each: Vec<&str> = nodes.iter().map(|node| &*node.operator).collect();
        each.join(" ")
    };
    expect!["Range Reshape Size Cast Squeeze Size Cast Shape Concat Reshape Reshape Concat Cast Unsqueeze Gather Shape Gather Sub Range Reshape Range Size Cast Size Cast Size Cast Size Cast Concat"].assert_eq(&operators(&placement.shapes));
    expect!["LessOrEqual And"].assert_eq(&operators(&placement.indices));
}

#[test]
fn one_kernel_that_is_missing_is_a_fallback() {
    let placement = read("cuda-fallback.json", Provider::Cuda);
    expect!["141 of 174 nodes on CUDAExecutionProvider, 30 of shape arithmetic on the processor, 2 of whole numbers per token on the processor, 1 that it left on the processor; copies inserted: 1 from the device (400 bytes), 2 to it (408 bytes)"].assert_eq(&placement.to_string());
    expect!["1 of 174 nodes were left to the CPU provider by CUDAExecutionProvider: /layers.0.attention.shares (Softmax); export for this provider (docs/gpu.md says which operators it has), or run with --provider cpu"].assert_eq(&placement.check().unwrap_err().to_string());
}

#[test]
fn what_may_stay_on_the_processor() {
    let args = |op: &str, inputs: &str, outputs: &str| -> Args {
        let text = format!(
            r#"{{"op_name": "{op}", "provider": "CPUExecutionProvider",
                 "input_type_shape": {inputs}, "output_type_shape": {outputs}}}"#
        );
        serde_json::from_str(&text).unwrap()
    };
    for (op, inputs, outputs, expected) in [
        ("Gather", r#"[{"int64": [2]}, {"int64": []}]"#, r#"[{"int64": []}]"#, Kind::Shape),
        ("Cast", r#"[{"int64": []}]"#, r#"[{"bool": []}]"#, Kind::Shape),
        ("Shape", r#"[{"float16": [4, 2048, 64]}]"#, r#"[{"int64": [3]}]"#, Kind::Shape),
        ("Size", r#"[{"bool": [4096]}]"#, r#"[{"int64": []}]"#, Kind::Shape),
        ("Range", r#"[{"int64": []}]"#, r#"[{"int64": [9]}]"#, Kind::Index),
        ("Compress", r#"[{"int64": [9]}, {"bool": [9]}]"#, r#"[{"int64": [3]}]"#, Kind::Index),
        ("Cast", r#"[{"int64": [4]}]"#, r#"[{"float": [4]}]"#, Kind::Stray),
        ("Greater", r#"[{"float": [4]}, {"float": []}]"#, r#"[{"bool": [4]}]"#, Kind::Stray),
        ("MatMul", r#"[{"bfloat16": [1, 1]}]"#, r#"[{"bfloat16": [1, 1]}]"#, Kind::Stray),
        ("Unknown", "[]", "[]", Kind::Stray),
    ] {
        assert_eq!(args(op, inputs, outputs).kind(), expected, "{op}");
    }
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
