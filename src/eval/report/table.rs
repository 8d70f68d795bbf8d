//! A report as a person reads it.

use std::fmt::{self, Write as _};
use std::path::Path;

use super::{Measured, Report, Text};
use crate::eval::choices::pairs::{Comparison, Difference};
use crate::eval::choices::{Choices, Score, TaskScores};

/// Spaces between two columns.
const GAP: usize = 2;

/// What was removed, then a table: a column for each model.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for model in self.measured.iter().filter(|model| !model.removed.is_empty()) {
            let names: Vec<_> = model.removed.iter().map(ToString::to_string).collect();
            let (removed, modules) = (names.len(), model.modules);
            let names = names.join(", ");
            writeln!(f, "{}: {removed} of {modules} modules removed: {names}", model.name)?;
        }
        let rows = self.rows();
        let columns = 1 + self.measured.len();
        let width = |column: usize| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        for (place, row) in rows.iter().enumerate() {
            let mut line = format!("{:<1$}", row[0], widths[0]);
            for (cell, width) in row.iter().zip(&widths).skip(1) {
                write!(line, "{cell:>0$}", width + GAP)?;
            }
            let end = if place + 1 < rows.len() { "\n" } else { "" };
            write!(f, "{}{end}", line.trim_end())?;
        }
        Ok(())
    }
}

impl Report {
    /// The table's rows, each with a cell for every column; headings have but one.
    fn rows(&self) -> Vec<Vec<String>> {
        let mut rows = vec![self.row(String::new(), |model| model.name.clone())];
        let texts = self.measured.first().map_or(&[][..], |model| &model.texts);
        if !texts.is_empty() {
            rows.push(vec!["perplexity".to_owned()]);
        }
        for (place, Text { text, perplexity }) in texts.iter().enumerate() {
            let name =
                Path::new(text).file_name().map_or(text.into(), |name| name.to_string_lossy());
            let label = format!("  {name} ({} x {})", perplexity.windows, perplexity.window);
            let of = |model: &Measured| model.texts.get(place).map(|text| text.perplexity.clone());
            rows.push(self.row(label, |m| {
                of(m).map_or_else(String::new, |found| format!("{:.2}", found.perplexity))
            }));
            rows.push(self.row("    modules skipped".to_owned(), |m| {
                of(m).map_or_else(String::new, |found| percent(m.skipped(found.skipped)))
            }));
        }
        let choices = self.measured.iter().find_map(|model| model.choices.as_ref());
        if let Some(choices) = choices {
            self.scores(choices, &mut rows);
            self.differences(choices, &mut rows);
        }
        rows
    }

    fn row(&self, label: String, cell: impl Fn(&Measured) -> String) -> Vec<String> {
        std::iter::once(label).chain(self.measured.iter().map(cell)).collect()
    }

    fn scores(&self, choices: &Choices, rows: &mut Vec<Vec<String>>) {
        type Of = (&'static str, fn(&Choices) -> Score, fn(&TaskScores) -> Score);
        let kinds: [Of; 2] = [
            ("acc, %", |all| all.acc, |task| task.acc),
            ("acc_norm, %", |all| all.acc_norm, |task| task.acc_norm),
        ];
        for (heading, mean, of) in kinds {
            rows.push(vec![heading.to_owned()]);
            for (place, task) in choices.tasks.iter().enumerate() {
                let label = format!("  {} ({})", task.task, task.items.len());
                rows.push(self.row(label, |model| {
                    let task = model.choices.as_ref().and_then(|all| all.tasks.get(place));
                    task.map_or_else(String::new, |task| score(of(task)))
                }));
            }
            if choices.tasks.len() > 1 {
                let of =
                    |m: &Measured| m.choices.as_ref().map(mean).map_or_else(String::new, score);
                rows.push(self.row("  mean".to_owned(), of));
            }
        }
        rows.push(self.row("modules skipped".to_owned(), |model| {
            let skipped = model.choices.as_ref().map(|choices| model.skipped(choices.skipped));
            skipped.map_or_else(String::new, percent)
        }));
    }

    fn differences(&self, choices: &Choices, rows: &mut Vec<Vec<String>>) {
        let Some(first) = self.measured.iter().find_map(|model| model.comparison.as_ref()) else {
            return;
        };
        // Past the last task stands the mean.
        let kinds: [Differences; 2] = [
            ("acc", |all, place| all.tasks.get(place).map(|task| task.acc).or(Some(all.acc))),
            ("acc_norm", |all, place| {
                all.tasks.get(place).map(|task| task.acc_norm).or(Some(all.acc_norm))
            }),
        ];
        let labels = choices.tasks.iter().map(|task| format!("  {}", task.task));
        let mean = (choices.tasks.len() > 1).then(|| "  mean".to_owned());
        let labels: Vec<_> = labels.chain(mean).collect();
        for (kind, of) in kinds {
            rows.push(vec![format!("{kind} less {}'s, points [95 %]", first.against)]);
            for (place, label) in labels.iter().enumerate() {
                rows.push(self.row(label.clone(), |model| {
                    let found = model.comparison.as_ref().and_then(|all| of(all, place));
                    found.map_or_else(String::new, difference)
                }));
            }
        }
    }
}

/// What a difference is of, and where a comparison has it for the task at a place.
type Differences = (&'static str, fn(&Comparison, usize) -> Option<Difference>);

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "not reported".to_owned(), |share| format!("{:.1} %", 100.0 * share))
}

fn score(Score { mean, standard_error }: Score) -> String {
    let error = standard_error.map(|error| format!(" ± {:.1}", 100.0 * error));
    format!("{:.1}{}", 100.0 * mean, error.unwrap_or_default())
}

fn difference(Difference { mean, interval, .. }: Difference) -> String {
    let interval =
        interval.map(|[low, high]| format!(" [{:+.1}, {:+.1}]", 100.0 * low, 100.0 * high));
    format!("{:+.1}{}", 100.0 * mean, interval.unwrap_or_default())
}
