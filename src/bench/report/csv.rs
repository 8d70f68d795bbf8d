//! The report as comma-separated values: the same fields as in JSON, flat.

use super::{Line, Report};

/// Names and values of the columns, in order. Shares are 0 to 1; what is not known is empty.
fn columns(line: &Line) -> Vec<(&'static str, String)> {
    let number = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    let (skips, speedup, ideal) = (&line.skips, &line.speedup, &line.ideal);
    let decisions = serde_json::to_value(line.decisions).unwrap_or_default();
    vec![
        ("workload", line.workload.to_string()),
        ("artifact", line.artifact.clone()),
        ("decisions", decisions.as_str().unwrap_or_default().to_owned()),
        ("force_skip", number(line.force_skip)),
        ("ms_median", line.ms.median.to_string()),
        ("ms_min", line.ms.min.to_string()),
        ("ms_lower_quartile", line.ms.lower_quartile.to_string()),
        ("ms_upper_quartile", line.ms.upper_quartile.to_string()),
        ("ms_per_token", line.ms_per_token.to_string()),
        ("samples", line.samples.to_string()),
        ("speedup", number(speedup.map(|ratio| ratio.median))),
        ("speedup_lowest", number(speedup.map(|ratio| ratio.lowest))),
        ("speedup_highest", number(speedup.map(|ratio| ratio.highest))),
        ("skipped_attention", number(skips.and_then(|skips| skips.skipped.attention))),
        ("skipped_mlp", number(skips.and_then(|skips| skips.skipped.mlp))),
        ("skipped_all", number(skips.and_then(|skips| skips.skipped.all))),
        ("skipped_multiply_adds", number(skips.map(|skips| skips.multiply_adds))),
        ("skipped_weight_bytes", number(skips.map(|skips| skips.weight_bytes))),
        ("ideal_graphs", ideal.map(|ideal| ideal.graphs.to_string()).unwrap_or_default()),
        ("ideal_ms", number(ideal.map(|ideal| ideal.ms))),
        ("ideal_reached", number(ideal.map(|ideal| ideal.reached.median))),
        ("ideal_reached_lowest", number(ideal.map(|ideal| ideal.reached.lowest))),
        ("ideal_reached_highest", number(ideal.map(|ideal| ideal.reached.highest))),
        ("ideal_multiply_adds", number(ideal.map(|ideal| ideal.multiply_adds))),
        ("load_seconds", line.load_seconds.to_string()),
        ("peak_memory", line.peak_memory.map(|bytes| bytes.to_string()).unwrap_or_default()),
    ]
}

pub(super) fn table(report: &Report) -> String {
    let mut text = String::new();
    for (at, line) in report.lines.iter().enumerate() {
        let columns = columns(line);
        if at == 0 {
            row(&mut text, columns.iter().map(|(name, _)| *name));
        }
        row(&mut text, columns.iter().map(|(_, value)| value.as_str()));
    }
    text
}

fn row<'a>(text: &mut String, fields: impl Iterator<Item = &'a str>) {
    let fields: Vec<String> = fields.map(quoted).collect();
    text.push_str(&fields.join(","));
    text.push('\n');
}

/// As RFC 4180 has it: in quotes where a comma, a quote or a line's end would be misread.
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_that_would_be_misread_are_quoted() {
        assert_eq!(quoted("a b"), "a b");
        assert_eq!(quoted("a, \"b\""), "\"a, \"\"b\"\"\"");
    }
}
