//! `--logits last`: one position's logits, the same numbers, and a refusal where every one is needed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ndarray::s;
use skipgpt_export::artifact;
use skipgpt_export::decoder::{Decoder, Input, Logits, Output};
use skipgpt_export::runtime::{Runtime, Version, session};
use skipgpt_export::watch::Watched;
use tempfile::TempDir;

use crate::cli::{refused, run, succeeds, text};
use crate::oracle::{ATOL, fixture};

/// A checkpoint exported with all logits and with the last ones.
struct Pair {
    directory: TempDir,
    case: &'static str,
}

impl Pair {
    fn of(case: &'static str) -> Self {
        Self { directory: TempDir::new().unwrap(), case }
    }

    fn path(&self, name: &str) -> String {
        text(&self.directory.path().join(name))
    }

    fn export(&self, logits: &str, routed: bool, more: &[&str]) -> String {
        let (model, output) = (text(&fixture(self.case)), self.path(logits));
        let router = text(&fixture(self.case).join("router.safetensors"));
        let router: &[&str] = if routed { &["--router", &router] } else { &[] };
        let fixed =
            ["export", "--model", &model, "--output", &output, "--logits", logits, "--force"];
        succeeds(&[&fixed, router, more].concat());
        output
    }
}

pub(crate) fn open(path: &str) -> Watched {
    let runtime = Runtime::find(None, Version::OLDEST).unwrap();
    let options = session::Options { threads: Some(1), ..session::Options::default() };
    Watched::open(&artifact::open(path.as_ref()).unwrap(), &runtime, &options).unwrap()
}

/// Rows of a batch padded on the left in a step, in a chunk on top of their cache, then one token each;
/// one row likewise; one token into an empty cache; rows padded on the right, as onnxruntime-genai does.
fn scripts() -> Vec<Vec<Input>> {
    let prompts = [vec![5, 17, 120, 3, 77, 9, 31], vec![1, 90, 44, 8]];
    let script = |prompts: &[Vec<i64>]| {
        let whole = Input::prompts(prompts, Logits::Last);
        let part = |columns: std::ops::Range<usize>| Input {
            ids: whole.ids.slice(s![.., columns.clone()]).to_owned(),
            mask: whole.mask.slice(s![.., ..columns.end]).to_owned(),
            positions: whole.positions.slice(s![.., columns]).to_owned(),
            logits: Logits::Last,
        };
        let next = whole.then(&vec![12; prompts.len()]);
        vec![part(0..4), part(4..7), next]
    };
    let token = vec![Input::row(0, &[7], Logits::Last)];
    let mut right = Input::prompts(&prompts, Logits::Last);
    for (column, id) in [1, 90, 44, 8, 2, 2, 2].into_iter().enumerate() {
        right.ids[[1, column]] = id;
        right.mask[[1, column]] = i64::from(column < 4);
        right.positions[[1, column]] = column.min(3) as i64;
    }
    vec![script(&prompts), script(&prompts[..1]), token, vec![right]]
}

/// Every step's last logits and every decision are those of an artifact that gives all logits.
#[track_caller]
fn same(place: &str, all: &mut Watched, last: &mut Watched, tolerance: f32) {
    assert_eq!((all.gives(), last.gives()), (Logits::All, Logits::Last), "{place}");
    for input in scripts().iter().flatten() {
        if input.past() == 0 {
            all.reset();
            last.reset();
        }
        let place = format!("{place}, {:?} after {}", input.ids.dim(), input.past());
        let asked = Input { logits: Logits::All, ..input.clone() };
        let (a, b) = (all.step(&asked).unwrap(), last.step(input).unwrap());
        let vocab = all.vocab_size();
        assert_eq!(b.logits.dim(), (input.batch(), 1, vocab), "{place}");
        for row in 0..input.batch() {
            let end = (0..input.sequence()).rfind(|&column| input.is_real(row, column)).unwrap();
            let expected = a.logits.slice(s![row, end, ..]);
            let scale = expected.iter().fold(1.0_f32, |scale, logit| scale.max(logit.abs()));
            for (found, expected) in b.logits.slice(s![row, 0, ..]).iter().zip(expected) {
                let difference = (found - expected).abs();
                assert!(difference <= tolerance * scale, "{place}: {difference} of {scale}");
            }
        }
        decisions(&place, &a, &b);
    }
    assert!(
        all.cache().unwrap().iter().map(|entry| entry.layer).eq(last
            .cache()
            .unwrap()
            .iter()
            .map(|entry| entry.layer))
    );
}

fn decisions(place: &str, a: &Output, b: &Output) {
    let [a, b] = [a, b].map(|output| output.routing.as_ref().unwrap());
    assert_eq!(a.modules, b.modules, "{place}");
    for (one, other) in a.margins.iter().zip(&b.margins) {
        assert_eq!(*one >= 0.0, *other >= 0.0, "{place}");
    }
}

#[test]
fn the_last_logits_alone_are_the_last_of_all() {
    let pair = Pair::of("llama-gqa");
    let conditional = ["--dispatch", "conditional"];
    let gathered = ["--dispatch", "gathered", "--attention", "decomposed"];
    for (name, routed, more) in [
        ("dense", false, &[][..]),
        ("dense, decomposed", false, &["--attention", "decomposed"]),
        ("conditional", true, &conditional),
        ("gathered, decomposed", true, &gathered),
        ("dense f16", false, &["--dtype", "f16"]),
        ("dense int4", false, &["--dtype", "int4"]),
        ("conditional int4", true, &["--dtype", "int4", "--dispatch", "conditional"]),
    ] {
        let [mut all, mut last] =
            ["all", "last"].map(|logits| open(&pair.export(logits, routed, more)));
        let tolerance = if name.ends_with("f16") { 5e-3 } else { ATOL };
        same(name, &mut all, &mut last, tolerance);
    }
}

#[test]
fn what_needs_every_position_is_refused_before_it_is_computed() {
    let pair = Pair::of("llama-gqa");
    let last = pair.export("last", false, &[]);
    let mut decoder = open(&last);
    let input = Input::prompts(&[vec![5, 1, 2]], Logits::All);
    let message = decoder.step(&input).unwrap_err().to_string();
    assert_eq!(
        message,
        "the logits of all 3 new tokens are asked for, and the graph gives those of the last one \
         alone: export it with --logits all, or ask for the last"
    );
    // Nothing was run; one new token has no other position than the last.
    let first = Input { logits: Logits::Last, ..input };
    decoder.step(&first).unwrap();
    let one = Input { logits: Logits::All, ..first.then(&[4]) };
    assert_eq!(decoder.step(&one).unwrap().logits.dim(), (1, 1, 320));

    let tokenizer = fixture("../choices/byte-tokenizer.json");
    std::fs::copy(tokenizer, format!("{last}/tokenizer.json")).unwrap();
    let prose = pair.path("text.txt");
    std::fs::write(&prose, "It was a bright cold day in April.".repeat(4)).unwrap();
    let sentences = text(&fixture("../choices/sentences.jsonl"));
    for (what, option, file) in
        [("perplexity", "--perplexity", &prose), ("multiple choice", "--choices", &sentences)]
    {
        let message = refused(&["eval", &last, option, file, "--window", "16"]);
        let expected = format!(
            "{what} needs the logits of every position, and the artifact gives those of the last one \
             alone: export it with --logits all"
        );
        assert!(message.contains(&expected), "{message}");
    }
    let (model, output) = (text(&fixture("llama-gqa")), pair.path("checkpoint"));
    let fixed = ["export", "--model", &model, "--output", &output, "--logits", "last"];
    let message = refused(&[&fixed[..], &["--format", "safetensors"]].concat());
    assert!(message.contains("--logits last: --format safetensors holds no graph"), "{message}");
}

#[test]
fn every_other_command_takes_such_an_artifact() {
    let pair = Pair::of("llama-gqa");
    let model = text(&fixture("llama-gqa"));
    let router = text(&fixture("llama-gqa").join("router.safetensors"));
    let dense = pair.export("all", false, &[]);
    let last = pair.export("last", true, &["--dtype", "int4"]);
    let manifest = artifact::open(last.as_ref()).unwrap().manifest;
    assert_eq!(manifest.options.logits, Logits::Last);
    let card = std::fs::read_to_string(format!("{last}/README.md")).unwrap();
    assert!(card.contains("`[batch, 1, vocab]`"), "{card}");

    // Activations are rounded, so that logits of every token are compared too, step by step.
    let few = ["--decode-steps", "4", "--greedy-tokens", "4"];
    let verify = ["verify", &last, "--model", &model, "--router", &router];
    let report = succeeds(&[&verify[..], &few].concat());
    assert!(report.contains("each step's last logits within"), "{report}");
    assert!(report.contains("of 192 places"), "{report}");

    let bench = ["bench", &last, "--baseline", &dense, "--workload", "prefill:8", "--no-memory"];
    let few = ["--ideal", "--rounds", "1", "--prefills", "1", "--threads", "1"];
    let (code, _, warnings) = run(&[&bench[..], &few].concat());
    assert_eq!(code, 0, "{warnings}");
    let expected = format!("{last} was exported with --logits last, the baseline {dense} with");
    assert!(warnings.contains(&expected), "{warnings}");
    let (_, _, silent) =
        run(&[&bench[..2], &["--baseline", &last], &bench[4..], &few[1..]].concat());
    assert!(!silent.contains("--logits"), "{silent}");
}
