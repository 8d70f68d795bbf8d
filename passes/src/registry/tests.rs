//! Lints of the table, and the pages of `docs/` that are made from it.

use super::*;
use crate::ir::{Dispatch, Phase};
use crate::testing::{adapt, attention, model, plan};
use expect_test::{expect, expect_file};
use std::fmt::Write as _;

/// The source file of each pass, whose header is its documentation.
const SOURCES: &[(&str, &str)] = &[
    ("merge_lora", include_str!("../merge_lora.rs")),
    ("freeze_routers", include_str!("../freeze_routers.rs")),
    ("prune_modules", include_str!("../prune_modules.rs")),
    ("fuse_projections", include_str!("../fuse_projections.rs")),
    ("quantize", include_str!("../quantize.rs")),
    ("lower_routers", include_str!("../lower_routers.rs")),
];

/// The text of a file's `//!` header.
fn header(source: &str) -> String {
    let lines = source.lines().map_while(|line| line.strip_prefix("//!"));
    lines
        .flat_map(|line| {
            [
                line.strip_prefix(' ').unwrap_or(line),
                "
",
            ]
        })
        .collect()
}

/// `docs/passes.md`: the table, then each pass's header.
fn page() -> String {
    let mut page = String::from(
        "# Passes\n\n\
         Made from the headers in `passes/src/` by `UPDATE_EXPECT=1 cargo test -p skipgpt-passes`.\n\
         `docs/ir.md` explains the notation. Each pass runs once, in this order; the model is\n\
         validated before the first and after each.\n\n\
         | pass | takes | leaves | what it does |\n|---|---|---|---|\n",
    );
    for pass in PASSES {
        let (name, (takes, leaves)) = (pass.name(), pass.phases());
        let summary = pass.summary();
        writeln!(page, "| [`{name}`](#{name}) | {takes} | {leaves} | {summary} |").unwrap();
    }
    for (pass, (_, source)) in PASSES.iter().zip(SOURCES) {
        // The example is a diff, and reads better coloured as one.
        let header = header(source).replace("```text", "```diff");
        write!(page, "\n## {}\n\n{header}", pass.name()).unwrap();
    }
    page
}

#[test]
fn the_page_is_made_from_the_headers() {
    expect_file!["../../../docs/passes.md"].assert_eq(&page());
}

#[test]
fn the_example_of_the_ir_page_is_printed() {
    let mut model = model(1);
    adapt(&mut attention(&mut model, 0).q, "0.q", 2, 2.0);
    let page = include_str!("../../../docs/ir.md");
    let before = with_block(page, "imported", &model.to_string());
    let plan =
        crate::plan::Plan { attention_dispatch: Dispatch::Gathered, fuse_gate_up: false, ..plan() };
    crate::pass::run(PASSES, &mut model, &plan, |_, _| {}).unwrap();
    let both = with_block(&before, "lowered", &model.to_string());
    expect_file!["../../../docs/ir.md"].assert_eq(&both);
}

/// `page` with the text between its markers `<!-- name -->` and `<!-- end -->` replaced.
fn with_block(page: &str, name: &str, text: &str) -> String {
    let (head, rest) = page.split_once(&format!("<!-- {name} -->\n")).unwrap();
    let (_, tail) = rest.split_once("<!-- end -->").unwrap();
    format!("{head}<!-- {name} -->\n```text\n{text}```\n<!-- end -->{tail}")
}

#[test]
fn names_are_unique_kebab_case_and_those_of_the_files() {
    let mut sorted = names();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), PASSES.len());
    for name in names() {
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{name}");
    }
    let files: Vec<_> = SOURCES.iter().map(|(file, _)| file.replace('_', "-")).collect();
    assert_eq!(names(), files);
}

#[test]
fn summaries_are_one_line_without_a_full_stop() {
    for pass in PASSES {
        let summary = pass.summary();
        assert!(!summary.is_empty() && summary.len() < 100, "{summary}");
        assert!(!summary.contains('\n') && !summary.ends_with('.'), "{summary}");
    }
}

#[test]
fn phases_chain_from_imported_to_lowered() {
    let mut phase = Phase::Imported;
    for pass in PASSES {
        let (takes, leaves) = pass.phases();
        assert_eq!(takes, phase, "{}", pass.name());
        assert!(leaves >= takes, "{}", pass.name());
        phase = leaves;
    }
    assert_eq!(phase, Phase::Lowered);
}

#[test]
fn passes_are_found_by_name() {
    for (i, pass) in PASSES.iter().enumerate() {
        assert_eq!(find(pass.name()).unwrap().name(), pass.name());
        assert_eq!(through(pass.name()).unwrap().len(), i + 1);
    }
    expect!["no pass is named `fuse`; the passes are merge-lora, freeze-routers, prune-modules, fuse-projections, quantize, lower-routers"]
        .assert_eq(&find("fuse").err().unwrap().to_string());
    assert_eq!(through("").err().unwrap(), UnknownPass { name: String::new() });
}
