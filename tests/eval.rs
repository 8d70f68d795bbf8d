//! `eval` all the way: tiny checkpoints in candle and their artifacts under ONNX Runtime.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ndarray::s;
use serde_json::Value;
use skipgpt_export::checkpoint::{self, Request};
use skipgpt_export::decoder::{Decoder, Input, Logits};
use skipgpt_export::eval::choices::{self, Choices, Options, task};
use skipgpt_export::logits::log_sum_exp;
use skipgpt_export::model::Reference;
use skipgpt_export::text::Tokenizer;
use skipgpt_export::world::Alone;
use skipgpt_passes::validate;
use tempfile::TempDir;

use crate::oracle::fixture;

fn own(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/choices").join(name)
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Runs the binary and gives its exit code, standard output and standard error.
fn run(arguments: &[&str]) -> (i32, String, String) {
    let binary = Path::new(env!("CARGO_BIN_EXE_skipgpt-export"));
    // ONNX Runtime is found from the project's root.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let command = Command::new(binary).args(arguments).current_dir(root).output().unwrap();
    let Output { status, stdout, stderr } = command;
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// Runs `eval` and gives its report.
fn eval(arguments: &[&str]) -> Value {
    let all = [&["eval"], arguments, &["--json", "-"]].concat();
    let (code, stdout, stderr) = run(&all);
    assert_eq!(code, 0, "{arguments:?}\n{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

/// A fixture with a tokenizer.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new(case: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let model = directory.path().join("model");
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(fixture(case).join(name), model.join(name)).unwrap();
        }
        fs::copy(own("byte-tokenizer.json"), model.join("tokenizer.json")).unwrap();
        let router = "router.safetensors";
        fs::copy(fixture(case).join(router), directory.path().join(router)).unwrap();
        let calibration = "The quick brown fox jumps over the lazy dog. ".repeat(20);
        fs::write(directory.path().join("text.txt"), calibration).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> String {
        text(&self.directory.path().join(name))
    }

    /// Runs `eval`, which must refuse.
    fn refused(&self, arguments: &[&str]) -> String {
        let (code, stdout, stderr) = run(&[&["eval"], arguments].concat());
        assert_eq!((code, stdout.as_str()), (2, ""), "{arguments:?}\n{stderr}");
        stderr.replace(&text(self.directory.path()), "DIR").replace(&text(&own("")), "")
    }
}

fn scores(report: &Value, model: usize) -> Choices {
    serde_json::from_value(report["measured"][model]["choices"].clone()).unwrap()
}

/// Every score of both within rounding, and the same answers.
#[track_caller]
fn same(one: &Choices, other: &Choices) {
    for (one, other) in one.tasks.iter().zip(&other.tasks) {
        assert_eq!(one.items.len(), other.items.len());
        for (one, other) in one.items.iter().zip(&other.items) {
            assert_eq!((one.line, one.acc, one.acc_norm), (other.line, other.acc, other.acc_norm));
            for (a, b) in one.log_likelihoods.iter().zip(&other.log_likelihoods) {
                assert!((a - b).abs() < 1e-3, "line {}: {a} and {b}", one.line);
            }
        }
    }
    assert_eq!((one.acc, one.acc_norm), (other.acc, other.acc_norm));
    let [one, other] = [one, other].map(|choices| choices.skipped.unwrap().all);
    assert_eq!(one, other);
}

#[test]
fn candle_and_onnx_runtime_choose_alike() {
    for case in ["llama-gqa", "qwen2-bias", "llama-mha-llama3rope"] {
        let place = Place::new(case);
        let source =
            ["--model", &place.path("model"), "--router", &place.path("router.safetensors")];
        let artifact = place.path("artifact");
        let (code, _, message) = run(&[&["export"], &source[..], &["-o", &artifact]].concat());
        assert_eq!(code, 0, "{message}");
        let tasks = [text(&own("sentences.jsonl")), text(&own("pronouns.jsonl"))];
        let choices = ["--choices", &tasks[0], &tasks[1]];
        let report = eval(&[&[artifact.as_str()], &source[..], &choices[..]].concat());
        let names = [0, 1].map(|model| report["measured"][model]["name"].as_str().unwrap());
        assert_eq!(names, ["artifact", "checkpoint"]);
        let engines = [0, 1].map(|model| report["measured"][model]["engine"].as_str().unwrap());
        assert_eq!(engines, ["onnxruntime", "candle"]);
        let [artifact, candle] = [0, 1].map(|model| scores(&report, model));
        same(&artifact, &candle);
        assert_eq!([artifact.tasks[0].items.len(), artifact.tasks[1].items.len()], [8, 4]);
        let comparison = &report["measured"][1]["comparison"];
        assert_eq!(comparison["against"], "artifact");
        assert_eq!(comparison["acc"]["mean"], 0.0);
        assert_eq!(report["measured"][0]["comparison"], Value::Null);
    }
}

/// The scores again, each choice by itself and from an empty cache.
#[test]
fn sharing_a_prefix_changes_nothing() {
    let place = Place::new("llama-gqa");
    let checkpoint = checkpoint::read(&Request {
        model: Some(Path::new(&place.path("model"))),
        router: Some(Path::new(&place.path("router.safetensors"))),
        ..Request::default()
    })
    .unwrap();
    let tokenizer = Tokenizer::open(&checkpoint.directory).unwrap();
    let encode = |text: &str| tokenizer.encode(text, false);
    let model = validate(&checkpoint.model).unwrap();
    let mut reference = Reference::load(model, &checkpoint.sources).unwrap();
    let tasks = task::read_all(&[own("sentences.jsonl"), own("pronouns.jsonl")]).unwrap();
    let found =
        choices::measure(&mut reference, &tasks, &Options::default(), &encode, &Alone, |_| {})
            .unwrap();
    for (task, scores) in tasks.iter().zip(&found.tasks) {
        for (item, scores) in task.items.iter().zip(&scores.items) {
            assert_eq!(item.line, scores.line);
            for (choice, found) in item.choices.iter().zip(&scores.log_likelihoods) {
                let space = if choice.context.ends_with([' ', '\n']) { "" } else { " " };
                let whole = encode(&format!("{}{space}{}", choice.context, choice.continuation));
                let whole = whole.unwrap();
                let start = encode(choice.context.trim_end()).unwrap().len();
                reference.reset();
                let output = reference.step(&Input::row(0, &whole, Logits::All)).unwrap();
                let expected: f64 = (start..whole.len())
                    .map(|place| {
                        let row = output.logits.slice(s![0, place - 1, ..]);
                        f64::from(row[whole[place] as usize]) - log_sum_exp(&row)
                    })
                    .sum();
                assert!((found - expected).abs() < 1e-3, "{}: {found}, {expected}", item.line);
            }
        }
    }
}

#[test]
fn dense_pruned_and_routed_stand_in_one_report() {
    let place = Place::new("llama-gqa");
    let (model, router, calibration) =
        (place.path("model"), place.path("router.safetensors"), place.path("text.txt"));
    let sentences = text(&own("sentences.jsonl"));
    let measure = [
        "--perplexity",
        &calibration,
        "--window",
        "32",
        "--windows",
        "4",
        "--choices",
        &sentences,
        "--limit",
        "6",
        "--seed",
        "3",
    ];
    let source = ["--model", &model, "--router", &router];
    let baseline = [
        "--baseline",
        "dense,blocks,modules",
        "--skip",
        "0.34",
        "--calibration",
        &calibration,
        "--calibration-windows",
        "2",
    ];
    let report = eval(&[&source[..], &measure[..], &baseline[..]].concat());
    let models = report["measured"].as_array().unwrap();
    let names: Vec<_> = models.iter().map(|model| model["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["checkpoint", "dense", "blocks", "modules"]);
    let removed: Vec<_> =
        models.iter().map(|model| model["removed"].as_array().unwrap().len()).collect();
    let modules = models[0]["modules"].as_u64().unwrap() as usize;
    let rounded = |share: f64| share.round() as usize;
    let blocks = rounded(0.34 * modules as f64 / 2.0);
    assert_eq!(removed, [0, 0, 2 * blocks, rounded(0.34 * modules as f64)]);
    let routed: Vec<_> = models.iter().map(|model| model["routed"].as_u64().unwrap()).collect();
    assert_eq!(routed, [modules as u64, 0, 0, 0]);
    let perplexities: Vec<_> = models
        .iter()
        .map(|model| {
            assert_eq!(model["texts"][0]["windows"], 4);
            model["texts"][0]["perplexity"].as_f64().unwrap()
        })
        .collect();
    assert!(perplexities.windows(2).all(|two| (two[0] - two[1]).abs() > 1e-6), "{perplexities:?}");
    assert!(
        models
            .iter()
            .all(|model| { model["choices"]["tasks"][0]["items"].as_array().unwrap().len() == 6 })
    );

    // The dense model by itself is the dense row, and an earlier report can be held against it.
    let earlier = place.path("earlier.json");
    let alone = [&["--model", model.as_str()], &measure[..]].concat();
    let (code, table, message) = run(&[&["eval"], &alone[..], &["--json", &earlier]].concat());
    assert_eq!(code, 0, "{message}");
    assert!(table.contains("acc, %") && table.contains("text.txt (4 x 32)"), "{table}");
    let dense: Value = serde_json::from_slice(&fs::read(&earlier).unwrap()).unwrap();
    assert_eq!(dense["measured"][0]["texts"], report["measured"][1]["texts"]);
    let again = eval(&[&source[..], &measure[..], &["--against", &earlier]].concat());
    let comparison = &again["measured"][0]["comparison"];
    assert_eq!(comparison["against"], "checkpoint");
    let [acc, gained, lost] = [
        &comparison["acc"]["mean"],
        &comparison["tasks"][0]["gained"],
        &comparison["tasks"][0]["lost"],
    ]
    .map(|value| value.as_f64().unwrap());
    assert!((acc - (gained - lost) / 6.0).abs() < 1e-9, "{comparison}");

    let other = [&source[..], &measure[..10], &["--seed", "4", "--against", &earlier]].concat();
    assert_eq!(
        place.refused(&other),
        "error: DIR/earlier.json: cannot be compared with: sentences: the items are not the same (6 here, 6 there); use --limit and --seed as there: limit 6, seed 3\n"
    );
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let place = Place::new("llama-gqa");
    let model = ["--model", &place.path("model")];
    let sentences = text(&own("sentences.jsonl"));
    let text = place.path("text.txt");
    let refused = |more: &[&str], expected: &str| {
        let message = place.refused(&[&model[..], more].concat());
        assert_eq!(message, format!("error: {expected}\n"), "{more:?}");
    };
    let missing = place.path("missing.jsonl");
    refused(
        &["--choices", &missing],
        "DIR/missing.jsonl: cannot be read as UTF-8 text: No such file or directory (os error 2)",
    );
    refused(
        &["--choices", &sentences, "--limit", "0"],
        "a limit of 0 items leaves nothing to measure; it must be 1 or more",
    );
    // Nothing is loaded for what makes no sense.
    for more in [["--choices", &sentences], ["--perplexity", &text]] {
        let none = ["--model", &place.path("none"), "--limit", "0"];
        let message = place.refused(&[&none[..], &more[..]].concat());
        assert!(message.starts_with("error: a limit of 0 "), "{message}");
    }
    refused(
        &["--choices", &sentences, "--task-separator", "sentence= "],
        "a separator is given for task sentence; the tasks are sentences",
    );
    refused(
        &["--choices", &sentences, "--against", &text],
        "DIR/text.txt: not a report that `eval --json` wrote: expected value at line 1 column 1",
    );
    refused(
        &["--perplexity", &text, "--baseline", "blocks", "--calibration", &text],
        "--baseline blocks or modules needs --skip SHARE",
    );
    refused(
        &["--perplexity", &text, "--baseline", "modules", "--skip", "0.3"],
        "--baseline blocks or modules needs --calibration FILE, a plain text",
    );
    refused(
        &["--perplexity", &text, "--baseline", "dense", "--skip", "0.3"],
        "--skip and --calibration are for --baseline blocks or modules",
    );
}
