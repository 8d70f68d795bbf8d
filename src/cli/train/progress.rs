//! How a run shows.

use skipgpt_export::train::{Event, metrics};

use crate::cli::screen;

/// The progress of both parts of a run.
pub(super) struct Bars {
    pub(super) tokenising: indicatif::ProgressBar,
    pub(super) training: indicatif::ProgressBar,
}

impl Bars {
    pub(super) fn show(&self, event: &Event<'_>) {
        match event {
            Event::Tokenising(progress) => {
                self.tokenising.set_length(progress.total);
                self.tokenising.set_position(progress.done);
            }
            Event::Begins { step, steps, windows, parameters } => {
                self.tokenising.finish_and_clear();
                self.training.set_length(*steps);
                self.training.set_position(*step);
                self.training.reset_eta();
                let from = if *step > 0 { format!(", from step {step}") } else { String::new() };
                self.note(format!("{windows} windows, {parameters} values to train{from}"));
            }
            Event::Dense(found) => self.note(format!("dense: perplexity {:.2}", found.perplexity)),
            Event::Step(step) => {
                let keep = step.keep.map(|keep| format!(", keep {keep:.3}")).unwrap_or_default();
                self.training.set_message(format!(
                    "loss {:.3}{keep}, {:.0} tokens/s",
                    step.prediction, step.tokens_per_second
                ));
                self.training.set_position(step.step);
            }
            Event::Evaluation(found) => {
                self.note(format!("step {}: {}", found.step, described(found)));
            }
            Event::Saved(path) => tracing::info!("{}: written", path.display()),
        }
    }

    /// A line above the bar.
    fn note(&self, text: String) {
        self.training.suspend(|| screen::note(text));
    }
}

pub(super) fn described(evaluation: &metrics::Evaluation) -> String {
    let skipped = evaluation
        .skipped
        .zip(evaluation.skipped_weights)
        .map(|(modules, weights)| {
            let [modules, weights] = [modules, weights].map(|share| 100.0 * share);
            format!(", {modules:.1} % of modules and {weights:.1} % of their weights skipped")
        })
        .unwrap_or_default();
    format!(
        "perplexity {:.2}{skipped} ({} held-out windows)",
        evaluation.perplexity, evaluation.windows
    )
}
