//! The report as a person reads it.

use std::fmt::{Formatter, Result};

use super::{Line, Ratio, Report, Workload};

const COLUMNS: [&str; 11] = [
    "artifact",
    "decisions",
    "ms",
    "min [quartiles]",
    "ms/token",
    "speed-up [rounds]",
    "skipped: attention, MLP",
    "multiply-adds, bytes",
    "of ideal [rounds]",
    "load s",
    "peak MB",
];

pub(super) fn write(report: &Report, f: &mut Formatter<'_>) -> Result {
    let threads = report.threads.map_or("one per core".to_owned(), |threads| threads.to_string());
    let tokens = if report.text { "a text's tokens" } else { "drawn tokens" };
    write!(
        f,
        "ONNX Runtime {}, {}, threads: {threads}; {} rounds, {tokens}",
        report.onnxruntime, report.provider, report.rounds
    )?;
    for lines in report.lines.chunk_by(|a, b| a.workload == b.workload) {
        if let Some(first) = lines.first() {
            write!(f, "\n\n{}\n", title(first.workload))?;
            table(lines, f)?;
        }
    }
    Ok(())
}

fn title(workload: Workload) -> String {
    match workload {
        Workload::Decode { sequences, cached } => {
            format!("decode, sequences: {sequences}, {cached} cached; a step")
        }
        Workload::Prefill { tokens } => format!("prefill of {tokens}"),
        Workload::Mixed { prompt, new } => {
            format!("generation: a prompt of {prompt} and {new} tokens after it")
        }
    }
}

/// Columns as wide as they need to be; those that are empty for every line are left out.
fn table(lines: &[Line], f: &mut Formatter<'_>) -> Result {
    let rows: Vec<[String; 11]> = lines.iter().map(row).collect();
    let width = |column: usize| {
        let used = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
        (used > 0).then(|| used.max(COLUMNS[column].chars().count()))
    };
    let widths: Vec<Option<usize>> = (0..COLUMNS.len()).map(width).collect();
    print(&COLUMNS.map(str::to_owned), &widths, f)?;
    for row in &rows {
        writeln!(f)?;
        print(row, &widths, f)?;
    }
    Ok(())
}

/// Names to the left, numbers to the right.
fn print(row: &[String; 11], widths: &[Option<usize>], f: &mut Formatter<'_>) -> Result {
    for (column, (field, width)) in row.iter().zip(widths).enumerate() {
        match width {
            Some(width) if column == 0 => write!(f, "  {field:<width$}")?,
            Some(width) if column == 1 => write!(f, "  {field:<width$}")?,
            Some(width) => write!(f, "  {field:>width$}")?,
            None => {}
        }
    }
    Ok(())
}

fn row(line: &Line) -> [String; 11] {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let maybe = |share: Option<f64>| share.map_or("-".to_owned(), percent);
    let ratio = |Ratio { median, lowest, highest }: Ratio| {
        format!("{median:.3} [{lowest:.3}, {highest:.3}]")
    };
    let ms = line.ms;
    let digits = if ms.median < 100.0 { 2 } else { 1 };
    [
        line.name().to_owned(),
        line.decided(),
        format!("{:.digits$}", ms.median),
        format!(
            "{:.digits$} [{:.digits$}, {:.digits$}]",
            ms.min, ms.lower_quartile, ms.upper_quartile
        ),
        format!("{:.3}", line.ms_per_token),
        line.speedup.map(ratio).unwrap_or_default(),
        line.skips.map_or(String::new(), |skips| {
            format!("{}, {}", maybe(skips.skipped.attention), maybe(skips.skipped.mlp))
        }),
        line.skips.map_or(String::new(), |skips| {
            format!("{}, {}", percent(skips.multiply_adds), percent(skips.weight_bytes))
        }),
        line.ideal.map(|ideal| ratio(ideal.reached)).unwrap_or_default(),
        format!("{:.2}", line.load_seconds),
        line.peak_memory.map(|bytes| format!("{:.0}", bytes as f64 / 1e6)).unwrap_or_default(),
    ]
}
