#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use expect_test::expect;
use skipgpt_passes::ir::ModuleKind;

use super::*;
use crate::eval::choices::{ItemScores, Score, TaskScores};

fn score(right: usize, all: usize) -> Score {
    let mean = right as f64 / all as f64;
    let standard_error = (all > 1).then(|| (mean * (1.0 - mean) / (all - 1) as f64).sqrt());
    Score { mean, standard_error }
}

/// Results on two tasks of four items, of which the first few are right.
fn choices(right: [usize; 2], skipped: Option<f64>) -> Choices {
    let tasks = ["colours", "animals"].into_iter().zip(right).map(|(task, right)| TaskScores {
        task: task.to_owned(),
        sha256: "00".to_owned(),
        separator: None,
        acc: score(right, 4),
        acc_norm: score(2, 4),
        items: (0..4)
            .map(|place| ItemScores {
                line: place + 1,
                gold: 0,
                log_likelihoods: vec![-1.0, -2.0],
                bytes: vec![3, 4],
                acc: place < right,
                acc_norm: place < 2,
            })
            .collect(),
    });
    let skipped =
        skipped.map(|all| Skipped { attention: Some(all), mlp: Some(all), all: Some(all) });
    let mean = score(right[0] + right[1], 8);
    Choices { limit: None, seed: 0, acc: mean, acc_norm: mean, skipped, tasks: tasks.collect() }
}

fn measured(name: &str, routed: usize, removed: &[usize], perplexity: f64) -> Measured {
    let modules = removed.iter().flat_map(|&layer| {
        [ModuleKind::Attention, ModuleKind::Mlp].map(|kind| ModuleId { layer, kind })
    });
    let skipped = (routed > 0).then_some(0.25);
    let perplexity = Perplexity {
        perplexity,
        nll: perplexity.ln(),
        nll_standard_error: None,
        tokens: 1022,
        windows: 2,
        window: 512,
        stride: 512,
        skipped: skipped.map(|all| Skipped { attention: None, mlp: Some(all), all: Some(all) }),
    };
    Measured {
        name: name.to_owned(),
        engine: Engine::Candle,
        modules: 8,
        routed,
        removed: modules.collect(),
        texts: vec![Text { text: "books/austen.txt".to_owned(), perplexity }],
        choices: Some(choices([3, if routed > 0 { 4 } else { 2 }], skipped)),
        comparison: None,
    }
}

#[test]
fn models_stand_side_by_side() {
    let mut report = Report {
        measured: vec![
            measured("dense", 0, &[], 34.712),
            measured("blocks", 0, &[1], 103.6),
            measured("routed", 8, &[], 66.41),
        ],
    };
    report.compare(None).unwrap();
    expect![[r"
        blocks: 2 of 8 modules removed: layers.1.attention, layers.1.mlp
                                                    dense             blocks                routed
        perplexity
          austen.txt (2 x 512)                      34.71             103.60                 66.41
            modules skipped                         0.0 %             25.0 %                25.0 %
        acc, %
          colours (4)                         75.0 ± 25.0        75.0 ± 25.0           75.0 ± 25.0
          animals (4)                         50.0 ± 28.9        50.0 ± 28.9           100.0 ± 0.0
          mean                                62.5 ± 18.3        62.5 ± 18.3           87.5 ± 12.5
        acc_norm, %
          colours (4)                         50.0 ± 28.9        50.0 ± 28.9           50.0 ± 28.9
          animals (4)                         50.0 ± 28.9        50.0 ± 28.9           50.0 ± 28.9
          mean                                62.5 ± 18.3        62.5 ± 18.3           87.5 ± 12.5
        modules skipped                             0.0 %             25.0 %                25.0 %
        acc less dense's, points [95 %]
          colours                                          +0.0 [+0.0, +0.0]     +0.0 [+0.0, +0.0]
          animals                                          +0.0 [+0.0, +0.0]  +50.0 [-6.6, +106.6]
          mean                                             +0.0 [+0.0, +0.0]   +25.0 [-3.3, +53.3]
        acc_norm less dense's, points [95 %]
          colours                                          +0.0 [+0.0, +0.0]     +0.0 [+0.0, +0.0]
          animals                                          +0.0 [+0.0, +0.0]     +0.0 [+0.0, +0.0]
          mean                                             +0.0 [+0.0, +0.0]     +0.0 [+0.0, +0.0]
    "]]
    .assert_eq(&format!("{report}\n"));
}

#[test]
fn one_model_and_one_text_are_four_lines() {
    let model = Measured { choices: None, ..measured("dense", 0, &[], 34.712) };
    expect![[r"
                                dense
        perplexity
          austen.txt (2 x 512)  34.71
            modules skipped     0.0 %
    "]]
    .assert_eq(&format!("{}\n", Report { measured: vec![model] }));
}

#[test]
fn routers_that_do_not_report_leave_the_share_open() {
    let mut model = measured("routed", 4, &[1], 50.0);
    assert_eq!(
        model.skipped(Some(Skipped { attention: None, mlp: None, all: Some(0.5) })),
        Some(0.5)
    );
    assert_eq!(model.skipped(None), None);
    model.routed = 0;
    assert_eq!(model.skipped(None), Some(0.25));
}

#[test]
fn an_earlier_report_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    let with = measured("routed", 8, &[], 66.41);
    let without = Measured { choices: None, ..with.clone() };
    let write = |measured: Vec<Measured>| {
        let text = serde_json::to_string_pretty(&Report { measured }).unwrap();
        std::fs::write(&path, text).unwrap();
    };
    write(vec![without.clone(), with.clone()]);
    let earlier = read(&path).unwrap();
    assert_eq!((earlier.name.as_str(), Some(&earlier.choices)), ("routed", with.choices.as_ref()));

    let mut report = Report { measured: vec![with] };
    report.compare(Some(&earlier)).unwrap();
    let comparison = report.measured[0].comparison.as_ref().unwrap();
    assert_eq!(comparison.acc.interval, Some([0.0, 0.0]));

    let place = path.display().to_string();
    let refused = |expected: String| assert_eq!(read(&path).unwrap_err().to_string(), expected);
    write(vec![without]);
    refused(format!(
        "{place}: holds no multiple-choice results; write it with `eval --choices … --json`"
    ));
    std::fs::write(&path, "{\"perplexity\": 3}").unwrap();
    refused(format!(
        "{place}: not a report that `eval --json` wrote: missing field `measured` at line 1 column 17"
    ));
    std::fs::remove_file(&path).unwrap();
    refused(format!("{place}: cannot be read: No such file or directory (os error 2)"));
}
