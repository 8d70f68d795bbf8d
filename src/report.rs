//! Reports as a person reads them.

use std::fmt::{Display, Formatter, Result};

use skipgpt_passes::ir::{ModuleId, ModuleKind};

use crate::eval::{self, Perplexity};
use crate::generate;
use crate::profile::Profile;

impl Display for Perplexity {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { perplexity, tokens, windows, window, .. } = self;
        write!(f, "perplexity {perplexity:.2} on {tokens} tokens ({windows} windows of {window})")?;
        match self.skipped {
            Some(skipped) => write!(f, "; modules skipped: {skipped}"),
            None => Ok(()),
        }
    }
}

impl Display for eval::Skipped {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let kinds = [("attention", self.attention), ("MLP", self.mlp), ("all", self.all)];
        shares(f, &kinds)
    }
}

impl Display for generate::Skipped {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        shares(f, &[("attention", self.attention), ("MLP", self.mlp)])
    }
}

fn shares(f: &mut Formatter<'_>, kinds: &[(&str, Option<f64>)]) -> Result {
    let mut known = kinds.iter().filter_map(|(kind, share)| Some((kind, (*share)?)));
    let Some((kind, share)) = known.next() else { return f.write_str("none is routed") };
    write!(f, "{kind} {:.1} %", 100.0 * share)?;
    known.try_for_each(|(kind, share)| write!(f, ", {kind} {:.1} %", 100.0 * share))
}

impl Display for Profile {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        writeln!(f, "layer  attention kept  MLP kept")?;
        for layer in 0..self.model.num_hidden_layers {
            let share = |kind| {
                let module = ModuleId { layer, kind };
                let found = self.modules.iter().find(|m| m.module == module);
                found.map_or("-".to_owned(), |m| format!("{:.1} %", 100.0 * m.keep))
            };
            let (attention, mlp) = (share(ModuleKind::Attention), share(ModuleKind::Mlp));
            writeln!(f, "{layer:>5}  {attention:>14}  {mlp:>8}")?;
        }
        write!(f, "{} tokens; modules skipped: {}", self.tokens, self.skipped)
    }
}

impl Display for generate::Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { prompt_tokens, prefill_seconds, tokens, .. } = self;
        write!(f, "{prompt_tokens} prompt tokens in {:.0} ms", 1e3 * prefill_seconds)?;
        if let Some(speed) = self.decode_tokens_per_second {
            write!(f, "; {} new ones at {speed:.1} tokens/s", tokens.len())?;
        }
        match self.decode_skipped {
            Some(skipped) => write!(f, "; modules skipped: {skipped}"),
            None => Ok(()),
        }
    }
}
