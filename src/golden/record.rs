//! Runs the prompts and writes down what comes out. The checks on shapes and tokens are shared with
//! checking.

use skipgpt_passes::ir::DType;

use super::file::{MAX_TOKENS, MAX_TOP};
use super::{Artifact, Environment, Error, Golden, ModuleDecisions, Prompt, VERSION, rounded};
use crate::decoder::{Decoder, Input, Logits, Output, Routing};
use crate::logits::{last, top};
use crate::tolerance::Tolerances;

/// Decisions within this many tie margins are listed with their margins, so that a file can be
/// checked within wider bounds than it was recorded with.
const NEAR: f32 = 10.0;

/// What to record.
#[derive(Debug, Clone, PartialEq)]
pub struct RecordOptions {
    /// Which artifact it is.
    pub artifact: Artifact,
    /// What runs it.
    pub environment: Environment,
    /// What it computes in.
    pub dtype: DType,
    /// Its bounds, of which the one for ties decides what is listed.
    pub tolerances: Tolerances,
    /// Tokens to write after each prompt.
    pub tokens: usize,
    /// How many of the likeliest tokens to record in each place.
    pub top: usize,
}

impl RecordOptions {
    /// 32 tokens, the 5 likeliest in each place.
    pub fn new(artifact: Artifact, environment: Environment, dtype: DType) -> Self {
        let tolerances = Tolerances::of(dtype);
        Self { artifact, environment, dtype, tolerances, tokens: 32, top: 5 }
    }
}

/// Runs `prompts`, each a text (which may be empty) and its tokens, and records what comes out.
/// `progress` is told how many prompts are done.
///
/// # Errors
///
/// The artifact fails, gives NaN, or reports its decisions in some steps only; a prompt is empty or
/// has a token outside the vocabulary.
pub fn record<D: Decoder>(
    artifact: &mut D,
    prompts: &[(String, Vec<i64>)],
    options: &RecordOptions,
    progress: &mut dyn FnMut(usize),
) -> Result<Golden, Error<D::Error>> {
    for (option, found, most) in
        [("tokens", options.tokens, MAX_TOKENS), ("top", options.top, MAX_TOP)]
    {
        if !(1..=most).contains(&found) {
            return Err(Error::Count { option, found, most });
        }
    }
    if prompts.is_empty() {
        return Err(Error::NoPrompts);
    }
    let mut recorded = Vec::with_capacity(prompts.len());
    for (index, (text, ids)) in prompts.iter().enumerate() {
        tokens_exist(index + 1, ids, artifact.vocab_size())?;
        recorded.push(prompt(artifact, index + 1, text, ids, options)?);
        progress(index + 1);
    }
    Ok(Golden {
        version: VERSION,
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        artifact: options.artifact.clone(),
        environment: options.environment.clone(),
        dtype: options.dtype.to_string(),
        prompts: recorded,
    })
}

fn prompt<D: Decoder>(
    artifact: &mut D,
    number: usize,
    text: &str,
    ids: &[i64],
    options: &RecordOptions,
) -> Result<Prompt, Error<D::Error>> {
    let near = NEAR * options.tolerances.tie_margin;
    let (mut greedy, mut tops) = (Vec::new(), Vec::new());
    let mut routing: Option<Vec<ModuleDecisions>> = None;
    artifact.reset();
    let mut input = Input::prompts(&[ids.to_vec()], Logits::Last);
    for step in 0..options.tokens {
        let output = run(artifact, number, step, &input)?;
        if output.logits.iter().any(|logit| !logit.is_finite()) {
            return Err(Error::NotFinite { prompt: number, step, what: "a logit" });
        }
        match &output.routing {
            Some(found) if found.margins.iter().any(|margin| !margin.is_finite()) => {
                return Err(Error::NotFinite { prompt: number, step, what: "a margin" });
            }
            Some(found) if step == 0 => {
                append(routing.insert(modules(found)), found, near);
            }
            Some(found) if routing.as_ref().is_some_and(|modules| same(modules, found)) => {
                append(routing.as_deref_mut().unwrap_or_default(), found, near);
            }
            None if routing.is_none() => {}
            _ => return Err(Error::NoRouting { prompt: number, step }),
        }
        for logits in last(&output) {
            let best = top(&logits, options.top);
            greedy.extend(best.first().map(|(token, _)| *token));
            tops.push(best.iter().map(|(t, log_prob)| (*t, rounded(*log_prob).min(0.0))).collect());
        }
        input = input.then(&greedy[greedy.len() - 1..]);
    }
    if let Some(modules) = &mut routing {
        for decisions in modules {
            decisions.min_margin = rounded(decisions.min_margin.into()) as f32;
        }
    }
    Ok(Prompt { text: text.to_owned(), ids: ids.to_vec(), greedy, top: tops, routing })
}

/// A module's decisions before the first step.
fn modules(routing: &Routing) -> Vec<ModuleDecisions> {
    let empty = |index: usize| ModuleDecisions {
        module: routing.modules[index].to_string(),
        keep: String::new(),
        min_margin: f32::MAX,
        near: Vec::new(),
    };
    in_layer_order(routing).into_iter().map(empty).collect()
}

/// Whether `routing` is of the same modules.
pub(super) fn same(modules: &[ModuleDecisions], routing: &Routing) -> bool {
    let order = in_layer_order(routing);
    order.len() == modules.len()
        && order.iter().zip(modules).all(|(&i, m)| routing.modules[i].to_string() == m.module)
}

/// Adds the decisions of one step, whose single row has no padding.
fn append(modules: &mut [ModuleDecisions], routing: &Routing, near: f32) {
    for (decisions, index) in modules.iter_mut().zip(in_layer_order(routing)) {
        for s in 0..routing.margins.dim().2 {
            let margin = routing.margins[[index, 0, s]];
            if margin.abs() <= near {
                decisions.near.push((decisions.keep.len(), rounded(margin.into()) as f32));
            }
            decisions.keep.push(if routing.keeps(index, 0, s) { '1' } else { '0' });
            decisions.min_margin = decisions.min_margin.min(margin.abs());
        }
    }
}

/// Indices of the modules, in the order of their layers.
pub(super) fn in_layer_order(routing: &Routing) -> Vec<usize> {
    let mut order: Vec<_> = (0..routing.modules.len()).collect();
    order.sort_by_key(|&index| routing.modules[index]);
    order
}

/// Refuses prompts that cannot be fed.
pub(super) fn tokens_exist<E: std::error::Error + 'static>(
    prompt: usize,
    ids: &[i64],
    vocab: usize,
) -> Result<(), Error<E>> {
    if ids.is_empty() {
        return Err(Error::EmptyPrompt { prompt });
    }
    let outside = |token: &&i64| usize::try_from(**token).map_or(true, |token| token >= vocab);
    match ids.iter().find(outside) {
        Some(&token) => Err(Error::Token { prompt, token, vocab }),
        None => Ok(()),
    }
}

/// One step, its shapes checked.
pub(super) fn run<D: Decoder>(
    artifact: &mut D,
    prompt: usize,
    step: usize,
    input: &Input,
) -> Result<Output, Error<D::Error>> {
    let output = artifact.step(input).map_err(|source| Error::Artifact { prompt, step, source })?;
    let shape = |what, expected: &[usize], found: &[usize]| {
        if expected == found {
            return Ok(());
        }
        Err(Error::Shape { prompt, step, what, expected: expected.to_vec(), found: found.to_vec() })
    };
    shape("logits", &[1, 1, artifact.vocab_size()], output.logits.shape())?;
    if let Some(routing) = &output.routing {
        let margins = [routing.modules.len(), 1, input.sequence()];
        shape("margins", &margins, routing.margins.shape())?;
    }
    Ok(output)
}
