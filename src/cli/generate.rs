//! `generate`: text out of an artifact.

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use skipgpt_export::generate::{self, Sampling};
use skipgpt_export::runtime::session;
use skipgpt_export::text::{Message, Tokenizer};

use super::{RuntimeArguments, Verdict, screen, sources};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The artifact to run
    artifact: PathBuf,
    /// What to continue
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Treat the prompt as a message, in the model's chat template
    #[arg(long)]
    chat: bool,
    /// A system message before it (with --chat)
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// At most so many tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_new_tokens: usize,
    /// Sample at this temperature; greedy without
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Sample from the K most probable tokens
    #[arg(long, value_name = "K", requires = "temperature")]
    top_k: Option<usize>,
    /// Sample from the most probable tokens that reach this probability together
    #[arg(long, value_name = "P", requires = "temperature")]
    top_p: Option<f64>,
    /// Seed of the samples
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Run steps of one token in a session of their own: faster steps, nearly twice the memory and loading time
    #[arg(long)]
    step_session: bool,
    #[command(flatten)]
    runtime: RuntimeArguments,
    /// Write the report as JSON; `-` for standard output, in place of the text
    #[arg(long, value_name = "FILE", value_parser = super::destination())]
    json: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Verdict> {
    let artifact = sources::artifact(&arguments.artifact)?;
    let tokenizer = Tokenizer::open(&arguments.artifact)?;
    let prompt = if arguments.chat {
        let system = arguments.system.as_deref().map(|text| message("system", text));
        let messages: Vec<Message> =
            system.into_iter().chain([message("user", &arguments.prompt)]).collect();
        tokenizer.encode(&tokenizer.chat(&messages)?, false)?
    } else {
        tokenizer.encode(&arguments.prompt, true)?
    };
    let session = session::Options {
        one_token_apart: arguments.step_session,
        ..sources::session_options(&arguments.runtime)
    };
    let mut decoder = sources::watched_in(&artifact, &arguments.runtime, &session)?;
    let options = generate::Options {
        sampling: match arguments.temperature {
            None => Sampling::Greedy,
            Some(temperature) => Sampling::Random {
                temperature,
                top_k: arguments.top_k,
                top_p: arguments.top_p,
                seed: arguments.seed,
            },
        },
        max_new_tokens: arguments.max_new_tokens,
        context_length: Some(artifact.manifest.model.max_position_embeddings),
        eos: tokenizer.eos().to_vec(),
    };
    let quiet = arguments.json.as_deref().is_some_and(|path| path.as_os_str() == "-");
    let mut shown = Ok(());
    let report = generate::generate(&mut decoder, &tokenizer, &prompt, &options, |text| {
        if !quiet && shown.is_ok() {
            shown = screen::print(text);
        }
        // A file of the whole text is still wanted when nobody reads it here.
        if arguments.json.is_none() { screen::is_read() } else { ControlFlow::Continue(()) }
    })?;
    shown?;
    match &arguments.json {
        Some(_) if quiet => screen::line(serde_json::to_string_pretty(&report)?)?,
        Some(path) => {
            screen::line("")?;
            screen::write_json(path, &report)?;
        }
        None => screen::line("")?,
    }
    screen::note(&report);
    Ok(Verdict::Holds)
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}
