//! The shape of what is reported.

use std::collections::BTreeSet;

use super::*;
use crate::eval::Skipped;

fn line(artifact: &str, decisions: Decisions) -> Line {
    let ms = Spread { min: 10.0, lower_quartile: 11.0, median: 12.5, upper_quartile: 13.0 };
    Line {
        workload: Workload::Decode { sequences: 4, cached: 128 },
        artifact: artifact.to_owned(),
        decisions,
        force_skip: None,
        ms,
        ms_per_token: 3.125,
        samples: 48,
        speedup: None,
        skips: None,
        ideal: None,
        load_seconds: 0.5,
        peak_memory: None,
    }
}

fn report() -> Report {
    let skipped = Skipped { attention: Some(0.25), mlp: None, all: Some(0.25) };
    let ratio = Ratio { median: 1.25, lowest: 1.1, highest: 1.5 };
    let drawn = Line {
        force_skip: Some(25.0),
        speedup: Some(ratio),
        skips: Some(Shares { skipped, multiply_adds: 0.125, weight_bytes: 0.0625 }),
        ideal: Some(Ideal { graphs: 3, ms: 11.25, reached: ratio, multiply_adds: 0.125 }),
        ..line("a/routed, 1", Decisions::Drawn)
    };
    Report {
        onnxruntime: "1.31.1".into(),
        provider: "cpu".into(),
        threads: Some(2),
        rounds: 3,
        warmup: 4,
        seed: 0,
        growing_cache: false,
        one_session: false,
        text: false,
        lines: vec![line("a/dense", Decisions::None), drawn],
    }
}

#[test]
fn json_has_every_field_of_every_line() -> Result<(), serde_json::Error> {
    let json = serde_json::to_value(report())?;
    assert_eq!(json["lines"][0]["workload"], "decode:4:128");
    let names = |at: usize| -> BTreeSet<String> {
        json["lines"][at].as_object().into_iter().flat_map(|line| line.keys().cloned()).collect()
    };
    assert_eq!(names(0), names(1));
    let drawn = &json["lines"][1];
    assert_eq!((&drawn["decisions"], &drawn["force_skip"]), (&"drawn".into(), &25.0.into()));
    assert_eq!(drawn["skips"]["skipped"]["attention"], 0.25);
    assert_eq!(drawn["ideal"]["reached"]["lowest"], 1.1);
    assert!(json["lines"][0]["speedup"].is_null());
    Ok(())
}

#[test]
fn csv_has_one_row_per_line_and_as_many_fields_as_names() {
    let csv = report().to_csv();
    let rows: Vec<&str> = csv.lines().collect();
    assert_eq!(rows.len(), 3);
    let names: Vec<&str> = rows[0].split(',').collect();
    assert_eq!(names[..5], ["workload", "artifact", "decisions", "force_skip", "ms_median"]);
    assert_eq!(rows[1].split(',').count(), names.len());
    let start =
        "decode:4:128,\"a/routed, 1\",drawn,25,12.5,10,11,13,3.125,48,1.25,1.1,1.5,0.25,,0.25,";
    assert!(rows[2].starts_with(start), "{}", rows[2]);
}

#[test]
fn memory_is_noted_on_the_lines_of_its_artifact() {
    let mut report = report();
    let workload = report.lines[0].workload;
    report.note_memory(Path::new("a/dense"), workload, 7);
    report.note_memory(Path::new("a/routed, 1"), Workload::Prefill { tokens: 2 }, 9);
    let noted: Vec<_> = report.lines.iter().map(|line| line.peak_memory).collect();
    assert_eq!(noted, [Some(7), None]);
}

#[test]
fn the_table_says_what_was_timed() {
    let text = report().to_string();
    for part in [
        "ONNX Runtime 1.31.1, cpu, threads: 2; 3 rounds, drawn tokens\n",
        "decode, sequences: 4, 128 cached; a step\n",
        "drawn 25 %",
        "12.50",
        "10.00 [11.00, 13.00]",
        "1.250 [1.100, 1.500]",
        "25.0 %, -",
        "12.5 %, 6.2 %",
    ] {
        assert!(text.contains(part), "{part:?} is missing:\n{text}");
    }
    let widths: BTreeSet<usize> = text.lines().skip(3).map(|line| line.chars().count()).collect();
    assert_eq!(widths.len(), 1, "{text}");
    assert!(!text.contains("peak MB"), "a column without a value:\n{text}");
}
