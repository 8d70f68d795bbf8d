#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ndarray::Array3;
use skipgpt_passes::ir::{ModuleId, ModuleKind};

use super::encode::Sequence;
use super::pairs::{self, compare};
use super::score;
use super::task::{Choice, Item};
use super::*;
use crate::decoder::{CacheEntry, Decoder, Input, Logits, Output, Routing};
use crate::world::{Alone, threads};

const VOCAB: usize = 128;

/// What it predicts depends on every token before, and on their order. Its one module skips even
/// tokens.
#[derive(Default)]
struct History {
    tokens: Vec<i64>,
    /// New tokens of each step, and whether it was a peek.
    runs: Vec<(usize, bool)>,
    /// A logit of token 65, where it is not its own.
    logit: Option<f32>,
    narrow: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("it was told to fail")]
struct Failed;

/// The logit of `token` after `history`.
fn logit(history: &[i64], token: usize) -> f32 {
    let mix = |sum: usize, token: &i64| (31 * sum + *token as usize + 1) % 1009;
    ((history.iter().fold(7, mix) + 13 * token) % 17) as f32 * 0.25
}

/// The log-likelihood of the tokens from `start` on, each predicted from the whole text before it.
fn naive(tokens: &[i64], start: usize) -> f64 {
    (start..tokens.len())
        .map(|place| {
            let logits = (0..VOCAB).map(|token| f64::from(logit(&tokens[..place], token)));
            let sum: f64 = logits.map(f64::exp).sum();
            f64::from(logit(&tokens[..place], tokens[place] as usize)) - sum.ln()
        })
        .sum()
}

impl History {
    fn run(&mut self, input: &Input, peek: bool) -> Result<Output, Failed> {
        assert_eq!((input.batch(), input.past()), (1, self.tokens.len()));
        let sequence = input.sequence();
        self.runs.push((sequence, peek));
        if input.ids.iter().any(|id| *id == 33) {
            return Err(Failed);
        }
        let rows = if input.logits == Logits::All { sequence } else { 1 };
        let mut tokens = self.tokens.clone();
        let mut logits = Vec::new();
        for (place, token) in input.ids.iter().enumerate() {
            tokens.push(*token);
            if place + rows >= sequence {
                logits.extend((0..VOCAB).map(|token| match self.logit {
                    Some(value) if token == 65 => value,
                    _ => logit(&tokens, token),
                }));
            }
        }
        if !peek {
            self.tokens = tokens;
        }
        let rows = if self.narrow { rows + 1 } else { rows };
        logits.resize(rows * VOCAB, 0.0);
        let margins = Array3::from_shape_fn((1, 1, sequence), |(_, _, s)| {
            if input.ids[[0, s]] % 2 == 0 { -1.0 } else { 1.0 }
        });
        let modules = vec![ModuleId { layer: 0, kind: ModuleKind::Mlp }];
        let logits = Array3::from_shape_vec((1, rows, VOCAB), logits).unwrap();
        Ok(Output { logits, routing: Some(Routing { modules, margins }) })
    }
}

impl Decoder for History {
    type Error = Failed;

    fn reset(&mut self) {
        self.tokens.clear();
    }

    fn step(&mut self, input: &Input) -> Result<Output, Failed> {
        self.run(input, false)
    }

    fn cache(&self) -> Result<Vec<CacheEntry>, Failed> {
        Ok(Vec::new())
    }

    fn vocab_size(&self) -> usize {
        VOCAB
    }
}

impl Peek for History {
    fn peek(&mut self, input: &Input) -> Result<Output, Failed> {
        self.run(input, true)
    }
}

/// A byte is a token, except that a space and the letter after it are one: 100 + the letter's place
/// in the alphabet.
#[allow(clippy::unnecessary_wraps, reason = "a tokenizer may fail")]
fn encode(text: &str) -> Result<Vec<i64>, text::Error> {
    let mut tokens = Vec::new();
    let mut bytes = text.bytes().peekable();
    while let Some(byte) = bytes.next() {
        match bytes.peek() {
            Some(letter @ b'a'..=b'z') if byte == b' ' => {
                tokens.push(100 + i64::from(letter - b'a'));
                bytes.next();
            }
            _ => tokens.push(i64::from(byte)),
        }
    }
    Ok(tokens)
}

fn item(line: usize, pairs: &[(&str, &str)], gold: usize) -> Item {
    let choice = |(context, continuation): &(&str, &str)| Choice {
        context: (*context).to_owned(),
        continuation: (*continuation).to_owned(),
    };
    Item { line, choices: pairs.iter().map(choice).collect(), gold }
}

fn task(name: &str, items: Vec<Item>) -> Task {
    Task { name: name.to_owned(), sha256: format!("hash of {name}"), items }
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-5
}

/// Scores as if nothing were shared; gives the steps that were run.
#[track_caller]
fn scores(pairs: &[(&str, &str)]) -> Vec<(usize, bool)> {
    let sequences = item(1, pairs, 0).sequences(None, &encode).ok().unwrap();
    let mut decoder = History { tokens: vec![9, 9], ..History::default() };
    let mut decisions = None;
    let found = score::item(&mut decoder, &sequences, &mut decisions).unwrap();
    for (found, Sequence { tokens, start }) in found.iter().zip(&sequences) {
        assert!(near(*found, naive(tokens, *start)), "{found} for {tokens:?} from {start}");
    }
    let run: usize = decoder.runs.iter().map(|(tokens, _)| tokens).sum();
    let skipped = decisions.unwrap().skipped();
    assert!(run > 0 && skipped.mlp.is_some() && skipped.attention.is_none());
    decoder.runs
}

#[test]
fn a_shared_query_is_run_once() {
    // `Q:` and ` a`, ` b` are 2 tokens and 1; `x` follows.
    assert_eq!(scores(&[("Q:", "ax"), ("Q:", "bxx")]), [(2, false), (1, true), (2, true)]);
}

#[test]
fn choices_of_one_token_cost_no_step() {
    assert_eq!(scores(&[("Q:", "a"), ("Q:", "b"), ("Q:", "c")]), [(2, false)]);
}

#[test]
fn what_choices_begin_with_is_scored_for_each() {
    // Both begin with ` a`, which is scored and so is not part of what is shared.
    assert_eq!(scores(&[("Q:", "ax"), ("Q:", "axy")]), [(2, false), (1, true), (2, true)]);
}

#[test]
fn contexts_share_their_beginning() {
    // Two contexts of unequal length, one continuation: `ZZ` is shared.
    let runs = scores(&[("ZZ b", "cx"), ("ZZ d e", "cx")]);
    assert_eq!(runs, [(2, false), (2, true), (3, true)]);
}

#[test]
fn contexts_may_share_nothing() {
    assert_eq!(scores(&[("A", "x"), ("BB", "x")]), [(1, true), (2, true)]);
}

#[test]
fn the_continuation_s_first_word_is_joined_with_its_space() {
    let sequences = |context: &str, continuation: &str, asked: Option<&str>| {
        let item = item(1, &[(context, continuation), (context, "b")], 0);
        let sequence = item.sequences(asked, &encode).ok().unwrap().swap_remove(0);
        (sequence.tokens, sequence.start)
    };
    let (q, nl, a, space_a) = (81, 10, 97, 100);
    // A space is put between, or was there, or is the context's.
    assert_eq!(sequences("Q", "a", None), (vec![q, space_a], 1));
    assert_eq!(sequences("Q ", "a", None), (vec![q, space_a], 1));
    assert_eq!(sequences("Q", " a", Some("")), (vec![q, space_a], 1));
    // Other white space stays, and is scored.
    assert_eq!(sequences("Q\n", "a", None), (vec![q, nl, a], 1));
    assert_eq!(sequences("Q\n", "a", Some(" ")), (vec![q, nl, space_a], 1));
    assert_eq!(sequences("Q", "a", Some("\nQ: ")), (vec![q, nl, q, 58, space_a], 4));
}

#[test]
fn accuracy_is_by_log_likelihood_and_by_bytes() {
    let scored = |log_likelihoods: &[f64], gold| {
        let item = item(3, &[("q", "é"), ("q", "four"), ("q", "four")], gold);
        let scores = ItemScores::new(&item, log_likelihoods.to_vec());
        assert_eq!((scores.line, scores.gold, &scores.bytes[..]), (3, gold, &[2, 4, 4][..]));
        (scores.acc, scores.acc_norm)
    };
    assert_eq!(scored(&[-3.0, -4.0, -9.0], 0), (true, false));
    assert_eq!(scored(&[-3.0, -4.0, -9.0], 1), (false, true));
    // Of equals the first wins.
    assert_eq!(scored(&[-3.0, -2.0, -2.0], 1), (true, true));
    assert_eq!(scored(&[-3.0, -2.0, -2.0], 2), (false, false));
}

#[test]
fn standard_errors_are_those_of_the_sample() {
    let share = |right: &[bool]| stats::share(right.iter().copied());
    let score = share(&[true, true, true, false]);
    // p (1 − p) / (n − 1).
    assert!(near(score.mean, 0.75) && near(score.standard_error.unwrap(), 0.25));
    assert_eq!(share(&[true]), Score { mean: 1.0, standard_error: None });
    let other = share(&[true, false]);
    let mean = stats::mean_of([score, other].into_iter());
    assert!(near(mean.mean, 0.625));
    assert!(near(mean.standard_error.unwrap(), (0.0625_f64 + 0.25).sqrt() / 2.0));
    let mean = stats::mean_of([score, share(&[true])].into_iter());
    assert_eq!(mean.standard_error, None);
}

fn tasks() -> Vec<Task> {
    let items = |count: usize| {
        (1..=count)
            .map(|line| {
                let query = format!("Query {line}:");
                item(line, &[(&query, "yes"), (&query, "no way"), (&query, "maybe")], line % 3)
            })
            .collect()
    };
    vec![task("small", items(5)), task("large", items(40))]
}

fn run(options: &Options) -> Choices {
    measure(&mut History::default(), &tasks(), options, &encode, &Alone, |_| {}).unwrap()
}

#[test]
fn tasks_are_measured_and_averaged() {
    let mut seen = Vec::new();
    let found = measure(
        &mut History::default(),
        &tasks(),
        &Options::default(),
        &encode,
        &Alone,
        |progress| {
            seen.push((progress.task.to_owned(), progress.done, progress.items));
        },
    )
    .unwrap();
    assert_eq!((seen.len(), &seen[0]), (45, &("small".to_owned(), 1, 45)));
    assert_eq!(seen[44], ("large".to_owned(), 45, 45));
    assert_eq!(found.tasks.iter().map(|task| task.items.len()).collect::<Vec<_>>(), [5, 40]);
    for task in &found.tasks {
        let right = task.items.iter().filter(|item| item.acc).count();
        assert!(near(task.acc.mean, right as f64 / task.items.len() as f64));
        assert!(right > 0 && right < task.items.len(), "{}: all alike", task.task);
    }
    let mean = f64::midpoint(found.tasks[0].acc.mean, found.tasks[1].acc.mean);
    assert!(near(found.acc.mean, mean));
    let skipped = found.skipped.unwrap().mlp.unwrap();
    assert!(skipped > 0.0 && skipped < 1.0);
}

#[test]
fn a_sample_depends_on_the_seed_alone() {
    let lines = |limit, seed| -> Vec<usize> {
        tasks()[1].sample(limit, seed).iter().map(|item| item.line).collect()
    };
    let all: Vec<_> = (1..=40).collect();
    assert_eq!(lines(None, 7), all);
    assert_eq!(lines(Some(40), 7), all);
    let drawn = lines(Some(10), 7);
    assert_eq!(drawn, lines(Some(10), 7));
    assert_eq!(drawn.len(), 10);
    assert!(drawn.is_sorted_by(|a, b| a < b), "{drawn:?}");
    assert_ne!(drawn, lines(Some(10), 8));
    // A larger sample holds the smaller one.
    assert!(drawn.iter().all(|line| lines(Some(20), 7).contains(line)));
}

#[test]
fn models_are_compared_item_by_item() {
    let before = run(&Options::default());
    let mut now = before.clone();
    // Of the five items of `small`, two change.
    let old = [true, false, false, true, true];
    let new = [true, true, false, false, true];
    let mut before = before;
    for (place, (old, new)) in old.into_iter().zip(new).enumerate() {
        (before.tasks[0].items[place].acc, now.tasks[0].items[place].acc) = (old, new);
        (before.tasks[0].items[place].acc_norm, now.tasks[0].items[place].acc_norm) = (old, true);
    }
    let found = compare(&now, &before, "dense").unwrap();
    assert_eq!(found.against, "dense");
    let small = &found.tasks[0];
    assert_eq!((small.gained, small.lost), (1, 1));
    // Differences 0, 1, 0, −1, 0: their variance is 2/4, that of the mean a fifth of it.
    assert!(near(small.acc.mean, 0.0));
    assert!(near(small.acc.standard_error.unwrap(), 0.1_f64.sqrt()));
    let [low, high] = small.acc.interval.unwrap();
    assert!(near(low, -1.959_964 * 0.1_f64.sqrt()) && near(high, -low));
    // 0, 1, 1, 0, 0.
    assert!(near(small.acc_norm.mean, 0.4));
    let error = 0.06_f64.sqrt();
    assert!(near(small.acc_norm.standard_error.unwrap(), error));
    // The other task does not change, and each counts half.
    assert_eq!(found.tasks[1].acc.interval, Some([0.0, 0.0]));
    assert!(near(found.acc_norm.mean, 0.2));
    assert!(near(found.acc_norm.standard_error.unwrap(), error / 2.0));
}

#[test]
fn results_on_other_items_are_not_compared() {
    let limited = Options { limit: Some(3), seed: 4, ..Options::default() };
    let before = run(&limited);
    assert_eq!(pairs::check(&tasks(), &limited, &before), Ok(()));
    let refused = |tasks: &[Task], options: &Options, expected: &str| {
        let error = pairs::check(tasks, options, &before).unwrap_err();
        assert_eq!(error.to_string(), expected);
    };
    refused(
        &tasks()[..1],
        &limited,
        r#"the tasks are ["small"] here and ["small", "large"] there; measure the same ones in the same order"#,
    );
    let mut changed = tasks();
    changed[1].sha256 = "another".to_owned();
    refused(
        &changed,
        &limited,
        "large: the file has SHA-256 another here and hash of large there; measure the same file",
    );
    let other = Options { seed: 5, ..limited.clone() };
    refused(
        &tasks(),
        &other,
        "small: the items are not the same (3 here, 3 there); use --limit and --seed as there: limit 3, seed 4",
    );
    let separators = [("small".to_owned(), "\n".to_owned())].into();
    refused(
        &tasks(),
        &Options { separators, ..limited.clone() },
        r#"small: between context and continuation stands "\n" here and a space where there is none there; use the same separator"#,
    );
    let all = run(&Options::default());
    let error = compare(&before, &all, "all").unwrap_err();
    assert_eq!(
        error.to_string(),
        "small: the items are not the same (3 here, 5 there); use --limit and --seed as there: no limit, seed 0"
    );
}

#[track_caller]
fn refused(decoder: &mut History, tasks: &[Task], options: &Options, expected: &str) {
    let error = measure(decoder, tasks, options, &encode, &Alone, |_| {}).unwrap_err();
    assert_eq!(error.to_string(), expected);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let decoder = &mut History::default();
    let options = Options::default();
    refused(
        decoder,
        &tasks(),
        &Options { limit: Some(0), ..Options::default() },
        "a limit of 0 items leaves nothing to measure; it must be 1 or more",
    );
    refused(decoder, &[], &options, "there is no task to measure; give at least one file");
    refused(
        decoder,
        &tasks(),
        &Options { separators: [("larg".to_owned(), String::new())].into(), ..Options::default() },
        "a separator is given for task larg; the tasks are small, large",
    );
    let one = |pairs: &[(&str, &str)]| [task("t", vec![item(8, pairs, 0)])];
    refused(
        decoder,
        &one(&[("q", "yes"), (" \n", "yes")]),
        &options,
        "t, line 8, choice 1: the context has no token of its own",
    );
    // `!` is the token it fails on.
    refused(decoder, &one(&[("q!", "y"), ("q!", "n")]), &options, "t, line 8: it was told to fail");
    let strange = |logit| History { logit, ..History::default() };
    refused(
        &mut strange(Some(f32::NAN)),
        &one(&[("q", "yes"), ("q", "no")]),
        &options,
        "t, line 8: choice 0, token 1: the log-likelihood is NaN; are the weights damaged, or their range too small?",
    );
    refused(
        &mut strange(Some(f32::NEG_INFINITY)),
        &one(&[("q", "yes"), ("q", "nA")]),
        &options,
        "t, line 8: choice 1, token 2: the log-likelihood is -inf; are the weights damaged, or their range too small?",
    );
    refused(
        &mut History { narrow: true, ..History::default() },
        &one(&[("q", "yes"), ("q", "no")]),
        &options,
        "t, line 8: the logits are (1, 2, 128); (1, 1, 128) was asked for",
    );
}

#[test]
fn a_continuation_needs_a_token_of_its_own() {
    // `q` by itself is a token, and all of `qq` is one too.
    let encode = |text: &str| Ok(vec![1; text.len().div_ceil(2)]);
    let tasks = [task("t", vec![item(2, &[("qqq", "ab"), ("qqq", "a")], 0)])];
    let options =
        Options { separators: [("t".to_owned(), String::new())].into(), ..Options::default() };
    let error =
        measure(&mut History::default(), &tasks, &options, &encode, &Alone, |_| {}).unwrap_err();
    assert_eq!(error.to_string(), "t, line 2, choice 1: the continuation has no token of its own");
}

#[test]
fn ranks_that_share_the_items_find_what_one_finds() {
    let run = |world: &dyn World| {
        let options = Options { limit: Some(20), seed: 3, ..Options::default() };
        measure(&mut History::default(), &tasks(), &options, &encode, world, |_| {}).unwrap()
    };
    let alone = run(&Alone);
    assert_eq!(threads::run(3, |world| run(world)), vec![alone; 3]);
}
