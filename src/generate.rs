//! Text out of a [`Decoder`]: greedy or sampled, one token at a time.

use std::ops::ControlFlow;
use std::time::Instant;

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling as Candle};
use ndarray::ArrayView1;
use serde::Serialize;
use skipgpt_passes::ir::ModuleKind;

use crate::decoder::{Decoder, Input, Logits, Output, Routing};
use crate::text::{self, Tokenizer};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Sampling {
    /// The token with the highest logit; the first of equal ones.
    #[default]
    Greedy,
    /// By probability.
    Random {
        /// Logits are divided by it; above 0.
        temperature: f64,
        /// Only the so many most probable tokens.
        top_k: Option<usize>,
        /// Only the most probable tokens that together reach this probability; above 0, at most 1.
        top_p: Option<f64>,
        /// The same seed gives the same tokens from the same logits.
        seed: u64,
    },
}

/// What to generate.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Options {
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// At most so many tokens.
    pub max_new_tokens: usize,
    /// Most tokens, prompt included, that the model takes; `None` for no bound.
    pub context_length: Option<usize>,
    /// Tokens that end the text; the one that ends it is part of the result.
    pub eos: Vec<i64>,
}

/// Why generation stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// An end-of-text token came.
    EndOfText,
    /// As many tokens as were asked for.
    MaxNewTokens,
    /// The model takes no more.
    ContextLength,
    /// Whoever got the text wanted no more.
    Asked,
}

/// Share of routed modules, over tokens, that were skipped; `None` without such modules or tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Skipped {
    /// Of attention modules, 0 to 1.
    pub attention: Option<f64>,
    /// Of MLP modules, 0 to 1.
    pub mlp: Option<f64>,
}

/// What was generated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The text, without the prompt and special tokens.
    pub text: String,
    /// The tokens, without the prompt's.
    pub tokens: Vec<i64>,
    /// Number of tokens in the prompt.
    pub prompt_tokens: usize,
    /// Why it stopped.
    pub stop: Stop,
    /// Seconds from the prompt to the first logits.
    pub prefill_seconds: f64,
    /// Tokens per second after the first; `None` where there was none.
    pub decode_tokens_per_second: Option<f64>,
    /// Skipped in the prompt; `None` where the decoder does not report its decisions.
    pub prefill_skipped: Option<Skipped>,
    /// Skipped after the prompt; likewise.
    pub decode_skipped: Option<Skipped>,
}

/// Why nothing was generated. `E` is the decoder's error.
#[derive(Debug, thiserror::Error)]
pub enum Error<E: std::error::Error + Send + Sync + 'static> {
    /// The prompt has no tokens.
    #[error("the prompt is empty; generation needs at least one token")]
    EmptyPrompt,
    /// The prompt fills the context.
    #[error("the prompt has {tokens} tokens, which leaves none of the model's {context_length}")]
    PromptTooLong {
        /// Tokens in the prompt.
        tokens: usize,
        /// What the model takes.
        context_length: usize,
    },
    /// A sampling option makes no sense.
    #[error("{name} is {value}; expected {expected}")]
    Option {
        /// The option.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it should be.
        expected: &'static str,
    },
    /// The logits hold NaN or infinity.
    #[error("token {position} of the text: the model's logits are not finite")]
    NotFinite {
        /// Place of the token that was to be chosen, prompt included, from 0.
        position: usize,
    },
    /// The decoder failed.
    #[error(transparent)]
    Decoder(E),
    /// The sampler failed.
    #[error("sampling fails: {0}")]
    Sampling(#[source] candle_core::Error),
    /// Tokens did not become text.
    #[error(transparent)]
    Text(text::Error),
}

/// Continues the tokens `prompt` on `decoder`, whose cache is forgotten first. `on_text` gets the
/// text as it comes, never with a torn character, and may end it.
pub fn generate<D: Decoder>(
    decoder: &mut D,
    tokenizer: &Tokenizer,
    prompt: &[i64],
    options: &Options,
    mut on_text: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Report, Error<D::Error>> {
    let mut stream = tokenizer.stream();
    let mut torn = None;
    let mut text = String::new();
    let mut give = |piece: String| {
        if piece.is_empty() {
            return ControlFlow::Continue(());
        }
        text.push_str(&piece);
        on_text(&piece)
    };
    let run = tokens(decoder, prompt, options, |id| match stream.push(id) {
        Ok(piece) => give(piece),
        Err(error) => {
            torn = Some(error);
            ControlFlow::Break(())
        }
    })?;
    if let Some(error) = torn {
        return Err(Error::Text(error));
    }
    let _ = give(stream.finish().map_err(Error::Text)?);
    Ok(Report { text, ..run })
}

/// As [`generate`], without a tokenizer: `on_token` gets the ids and may end it, and the
/// report's text is empty.
pub fn tokens<D: Decoder>(
    decoder: &mut D,
    prompt: &[i64],
    options: &Options,
    mut on_token: impl FnMut(i64) -> ControlFlow<()>,
) -> Result<Report, Error<D::Error>> {
    let mut sampler = Sampler::new(options.sampling)?;
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    let context_length = options.context_length.unwrap_or(usize::MAX);
    if prompt.len() >= context_length {
        return Err(Error::PromptTooLong { tokens: prompt.len(), context_length });
    }

    decoder.reset();
    decoder.reserve(context_length.min(prompt.len() + options.max_new_tokens));
    let mut input = Input::prompts(&[prompt.to_vec()], Logits::Last);
    let start = Instant::now();
    let mut output = decoder.step(&input).map_err(Error::Decoder)?;
    let prefill_seconds = start.elapsed().as_secs_f64();
    let prefill_skipped = Tally::of(&output);

    let decoding = Instant::now();
    let mut decode_skipped = Tally::default();
    let mut tokens = Vec::new();
    let stop = loop {
        if tokens.len() == options.max_new_tokens {
            break Stop::MaxNewTokens;
        }
        let position = prompt.len() + tokens.len();
        if position == context_length {
            break Stop::ContextLength;
        }
        let last = output.logits.slice(ndarray::s![0, -1, ..]);
        let token = sampler.choose(&last, position)?;
        tokens.push(token);
        let go_on = on_token(token);
        if options.eos.contains(&token) {
            break Stop::EndOfText;
        }
        if go_on.is_break() {
            break Stop::Asked;
        }
        // The last token's own step would compute logits nobody asked for.
        if tokens.len() < options.max_new_tokens && position + 1 < context_length {
            input = input.then(&[token]);
            output = decoder.step(&input).map_err(Error::Decoder)?;
            decode_skipped.add(&output);
        }
    };
    let steps = tokens.len().saturating_sub(1);
    Ok(Report {
        text: String::new(),
        prompt_tokens: prompt.len(),
        stop,
        prefill_seconds,
        decode_tokens_per_second: (steps > 0)
            .then(|| steps as f64 / decoding.elapsed().as_secs_f64()),
        prefill_skipped: prefill_skipped.shares(),
        decode_skipped: decode_skipped.shares(),
        tokens,
    })
}

/// Decisions, counted.
#[derive(Debug, Default)]
struct Tally {
    reported: bool,
    attention: Count,
    mlp: Count,
}

#[derive(Debug, Default)]
struct Count {
    skipped: usize,
    all: usize,
}

impl Tally {
    fn of(output: &Output) -> Self {
        let mut tally = Self::default();
        tally.add(output);
        tally
    }

    /// Counts a step of one row without padding.
    fn add(&mut self, output: &Output) {
        let Some(routing @ Routing { modules, margins }) = &output.routing else { return };
        self.reported = true;
        let (_, rows, sequence) = margins.dim();
        for (m, module) in modules.iter().enumerate() {
            let count = match module.kind {
                ModuleKind::Attention => &mut self.attention,
                ModuleKind::Mlp => &mut self.mlp,
            };
            for (row, token) in (0..rows).flat_map(|row| (0..sequence).map(move |s| (row, s))) {
                count.all += 1;
                count.skipped += usize::from(!routing.keeps(m, row, token));
            }
        }
    }

    fn shares(&self) -> Option<Skipped> {
        let share =
            |count: &Count| (count.all > 0).then(|| count.skipped as f64 / count.all as f64);
        self.reported.then(|| Skipped { attention: share(&self.attention), mlp: share(&self.mlp) })
    }
}

enum Sampler {
    Greedy,
    Random(Box<LogitsProcessor>),
}

impl Sampler {
    fn new<E: std::error::Error + Send + Sync + 'static>(
        sampling: Sampling,
    ) -> Result<Self, Error<E>> {
        let Sampling::Random { temperature, top_k, top_p, seed } = sampling else {
            return Ok(Self::Greedy);
        };
        let refuse = |name, value, expected| Err(Error::Option { name, value, expected });
        if !(temperature > 0.0 && temperature.is_finite()) {
            return refuse("temperature", temperature, "a number above 0");
        }
        if top_k == Some(0) {
            return refuse("top-k", 0.0, "at least 1");
        }
        if let Some(p) = top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return refuse("top-p", p, "a number above 0 and at most 1");
        }
        let sampling = match (top_k, top_p) {
            (None, None) => Candle::All { temperature },
            (Some(k), None) => Candle::TopK { k, temperature },
            (None, Some(p)) => Candle::TopP { p, temperature },
            (Some(k), Some(p)) => Candle::TopKThenTopP { k, p, temperature },
        };
        Ok(Self::Random(Box::new(LogitsProcessor::from_sampling(seed, sampling))))
    }

    fn choose<E: std::error::Error + Send + Sync + 'static>(
        &mut self,
        logits: &ArrayView1<'_, f32>,
        position: usize,
    ) -> Result<i64, Error<E>> {
        let best = argmax(logits).ok_or(Error::NotFinite { position })?;
        match self {
            Self::Greedy => Ok(best as i64),
            Self::Random(processor) => Tensor::from_iter(logits.iter().copied(), &Device::Cpu)
                .and_then(|logits| processor.sample(&logits))
                .map(i64::from)
                .map_err(Error::Sampling),
        }
    }
}

/// Index of the highest logit, the first of equal ones; `None` if any is not finite, or if there
/// are none.
pub fn argmax(logits: &ArrayView1<'_, f32>) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (index, logit) in logits.iter().enumerate() {
        if !logit.is_finite() {
            return None;
        }
        if best.is_none_or(|(_, highest)| *logit > highest) {
            best = Some((index, *logit));
        }
    }
    best.map(|(index, _)| index)
}

#[cfg(test)]
mod tests;
