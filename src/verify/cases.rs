//! Which tokens are given, in which steps.
//!
//! | case | rows | the prompt enters | then |
//! |---|---|---|---|
//! | `prefill` | 1 | in one step | – |
//! | `single-token` | 1 | one token, empty cache | 4 steps |
//! | `decode` | 1 | in one step | 32 steps on each decoder's own cache |
//! | `batch` | 2 to 4, padded | in one step | 8 steps |
//! | `chunked` | 1 | in up to three chunks | 4 steps |
//! | `chunked-batch` | 2 to 4, padded | in up to three chunks | 4 steps |
//! | `greedy-N` | 1 | in one step, last logits only | 64 steps on the artifact's own tokens |
//! | `one-token` | 1 | as `greedy-1` | as `greedy-1`, in the session for steps of one token |
//!
//! There is a `greedy-N` for each prompt, but for the first one alone where the prompts are drawn.
//! An artifact that takes one sequence at a time has no `batch` and no `chunked-batch`. Every step asks for all logits, or for the last ones where the artifact gives no others. The steps
//! after the prompt feed both decoders the reference's most likely tokens, in `greedy-N`
//! the artifact's.

use ndarray::s;

use super::Options;
use crate::decoder::{Input, Logits, Sequences};
use crate::random::draw;

/// Lengths of the prompts that are drawn where none are given.
const DRAWN: [usize; 3] = [24, 17, 9];
/// Most rows in a batch.
const ROWS: usize = 4;

/// One sequence of steps from an empty cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) name: String,
    /// The prompt, in chunks.
    pub(super) prompt: Vec<Input>,
    pub(super) then: Then,
    /// Whether steps of one token go the way the artifact has for them alone.
    pub(super) one_token_apart: bool,
}

/// What an artifact is asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    /// Number of tokens in the vocabulary.
    pub(super) vocab: usize,
    /// Of which positions it gives logits.
    pub(super) logits: Logits,
    /// Which sequences it takes.
    pub(super) sequences: Sequences,
    /// Whether it may take steps of one token another way.
    pub(super) apart: bool,
}

/// What follows the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// That many steps, both decoders fed the reference's most likely tokens.
    Fed(usize),
    /// That many tokens chosen by the artifact; the reference follows, then writes its own text.
    Greedy(usize),
}

/// The prompts that stand in where none are given.
pub fn drawn(vocab: usize, seed: u64) -> Vec<Vec<i64>> {
    DRAWN.iter().zip(seed..).map(|(length, seed)| draw(vocab, seed, *length)).collect()
}

/// Every case, in the order they run.
pub(super) fn cases(
    prompts: &[Vec<i64>],
    Asked { vocab, logits, sequences, apart }: Asked,
    options: &Options,
) -> Vec<Case> {
    let drawn = drawn(vocab, options.seed);
    // Drawn tokens are no text: what follows one sequence of them shows as much as all do.
    let texts = if prompts.is_empty() { &drawn[..1] } else { prompts };
    let prompts = if prompts.is_empty() { &drawn } else { prompts };
    let first = &prompts[0];
    let long = if first.len() < 2 { &drawn[0] } else { first };
    let batch = batch(prompts, &drawn);

    let one = |prompt: &Vec<i64>| Input::prompts(std::slice::from_ref(prompt), logits);
    let case = |name: &str, prompt, then| Case {
        name: name.to_owned(),
        prompt,
        then,
        one_token_apart: false,
    };
    let mut cases = vec![
        case("prefill", vec![one(first)], Then::Fed(0)),
        case("single-token", vec![one(&vec![first[0]])], Then::Fed(4)),
        case("decode", vec![one(first)], Then::Fed(options.decode_steps)),
        case("batch", vec![Input::prompts(&batch, logits)], Then::Fed(8)),
        case("chunked", chunks(&one(long)), Then::Fed(4)),
        case("chunked-batch", chunks(&Input::prompts(&batch, logits)), Then::Fed(4)),
    ];
    let greedy = |name: &str, prompt: &Vec<i64>| {
        let prompt = Input::prompts(std::slice::from_ref(prompt), Logits::Last);
        case(name, vec![prompt], Then::Greedy(options.greedy_tokens))
    };
    let texts = texts.iter().enumerate();
    cases.extend(texts.map(|(index, prompt)| greedy(&format!("greedy-{}", index + 1), prompt)));
    if sequences == Sequences::One {
        cases.retain(|case| case.prompt[0].batch() == 1);
    }
    if apart {
        cases.push(Case { one_token_apart: true, ..greedy("one-token", first) });
    }
    cases
}

/// Rows of unequal length, each of two tokens at least: the first few prompts where they are that,
/// else beginnings of the longest, else what was drawn.
fn batch(prompts: &[Vec<i64>], drawn: &[Vec<i64>]) -> Vec<Vec<i64>> {
    let rows: Vec<_> = prompts.iter().filter(|p| p.len() > 1).take(ROWS).cloned().collect();
    if rows.iter().any(|row| row.len() != rows[0].len()) {
        return rows;
    }
    match rows.first() {
        Some(row) if row.len() > 2 => {
            let part = |thirds: usize| row[..(row.len() * thirds).div_ceil(3).max(2)].to_vec();
            vec![part(3), part(1), part(2)]
        }
        _ => drawn.to_vec(),
    }
}

/// `input` in up to three chunks. The first is half of it, or more where a row's padding is longer,
/// so that every row has a real token in it; the others halve the rest.
fn chunks(input: &Input) -> Vec<Input> {
    let sequence = input.sequence();
    let padding = (0..input.batch())
        .map(|b| (0..sequence).take_while(|&s| !input.is_real(b, s)).count())
        .max()
        .unwrap_or_default();
    let first = sequence.div_ceil(2).max(padding + 1).min(sequence);
    let second = first + (sequence - first).div_ceil(2);
    let mut start = 0;
    let mut chunks = Vec::new();
    for end in [first, second, sequence] {
        if start < end {
            chunks.push(Input {
                ids: input.ids.slice(s![.., start..end]).to_owned(),
                mask: input.mask.slice(s![.., ..end]).to_owned(),
                positions: input.positions.slice(s![.., start..end]).to_owned(),
                logits: input.logits,
            });
            start = end;
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on must stop")]
    use skipgpt_passes::ir::DType;

    use super::*;

    fn options() -> Options {
        Options::new("cpu", "1.0", DType::F32)
    }

    fn asked(vocab: usize, sequences: Sequences, apart: bool) -> Asked {
        Asked { vocab, logits: Logits::All, sequences, apart }
    }

    fn named<'a>(cases: &'a [Case], name: &str) -> &'a Case {
        cases.iter().find(|case| case.name == name).unwrap()
    }

    /// Every row has a real token in the first chunk, and the chunks are the whole.
    fn check_chunks(case: &Case, whole: &Input) {
        assert!(case.prompt.len() >= 2, "{case:?}");
        let first = &case.prompt[0];
        for b in 0..first.batch() {
            assert!(first.is_real(b, first.sequence() - 1), "{case:?}");
        }
        let views = |part: fn(&Input) -> &ndarray::Array2<i64>| {
            let parts: Vec<_> = case.prompt.iter().map(|input| part(input).view()).collect();
            ndarray::concatenate(ndarray::Axis(1), &parts).unwrap()
        };
        assert_eq!(views(|input| &input.ids), whole.ids);
        assert_eq!(views(|input| &input.positions), whole.positions);
        assert_eq!(case.prompt.last().unwrap().mask, whole.mask);
        let mut past = 0;
        for chunk in &case.prompt {
            assert_eq!(chunk.past(), past);
            past += chunk.sequence();
        }
    }

    #[test]
    fn drawn_cases_cover_padding_and_chunks() {
        let cases = cases(&[], asked(1000, Sequences::Any, true), &options());
        let names: Vec<_> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "prefill",
                "single-token",
                "decode",
                "batch",
                "chunked",
                "chunked-batch",
                "greedy-1",
                "one-token"
            ]
        );
        assert_eq!(named(&cases, "decode").then, Then::Fed(32));
        let batch = &named(&cases, "batch").prompt[0];
        assert_eq!(batch.ids.dim(), (3, 24));
        assert!(!batch.is_real(1, 0) && batch.is_real(1, 23));
        check_chunks(named(&cases, "chunked"), &named(&cases, "prefill").prompt[0]);
        check_chunks(named(&cases, "chunked-batch"), batch);
    }

    #[test]
    fn one_sequence_alone_has_no_batches() {
        let cases = cases(&[], asked(1000, Sequences::One, false), &options());
        let names: Vec<_> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names, ["prefill", "single-token", "decode", "chunked", "greedy-1"]);
        assert!(
            cases
                .iter()
                .flat_map(|case| &case.prompt)
                .all(|input| input.mask.iter().all(|&m| m == 1))
        );
    }

    #[test]
    fn any_prompts_give_unequal_rows_and_chunks() {
        let tokens = |n: i64| (0..n).collect::<Vec<_>>();
        for prompts in [
            vec![tokens(1)],
            vec![tokens(2)],
            vec![tokens(3)],
            vec![tokens(7), tokens(7)],
            vec![tokens(1), tokens(5), tokens(2)],
            vec![tokens(3), tokens(1), tokens(40)],
        ] {
            let cases = cases(&prompts, asked(100, Sequences::Any, false), &options());
            let batch = &named(&cases, "batch").prompt[0];
            assert!(batch.mask.iter().any(|&real| real == 0), "{prompts:?}");
            check_chunks(named(&cases, "chunked-batch"), batch);
            assert!(named(&cases, "chunked").prompt.len() >= 2, "{prompts:?}");
            assert_eq!(named(&cases, "single-token").prompt[0].ids.dim(), (1, 1));
            let greedy = cases.iter().filter(|case| case.name.starts_with("greedy"));
            assert_eq!(greedy.count(), prompts.len());
        }
    }
}
