//! Every folder of `fixtures/bad` holds one defect and the exact message it must end in.

use std::fs;
use std::path::{Path, PathBuf};

use skipgpt_export::checkpoint::{self, Request};
use skipgpt_export::eval::choices::task;
use skipgpt_export::weights;
use skipgpt_passes::ir::{DType, Weight};

/// What a failure tells to type.
const BLESS: &str = "UPDATE_EXPECT=1 cargo test --test root errors";

/// The cases in `fixtures/bad/<group>`, by name.
fn cases(group: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/bad").join(group);
    let mut cases: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.is_dir())
        .collect();
    cases.sort();
    cases
}

/// Runs `message` on every case of `group` and compares what it gives with `expected.txt`.
fn check(group: &str, message: impl Fn(&Path) -> Option<String>) {
    let bless = std::env::var_os("UPDATE_EXPECT").is_some_and(|value| value == "1");
    let cases = cases(group);
    assert!(!cases.is_empty(), "fixtures/bad/{group} holds no case");
    let mut failures = Vec::new();
    for case in cases {
        let expected = case.join("expected.txt");
        let found = message(&case).map(|message| relative(&message, &case) + "\n");
        match (found, fs::read_to_string(&expected)) {
            (None, _) => failures.push(format!("{}: no error", case.display())),
            (Some(found), Ok(text)) if found == text => {}
            (Some(found), _) if bless => {
                if let Err(error) = fs::write(&expected, found) {
                    failures.push(format!("{}: {error}", expected.display()));
                }
            }
            (Some(found), text) => failures.push(format!(
                "{}:\nexpected: {}found:    {found}",
                case.display(),
                text.unwrap_or_else(|error| format!("{error}\n"))
            )),
        }
    }
    assert!(
        failures.is_empty(),
        "{}\n\nIf the new messages are right: {BLESS}",
        failures.join("\n")
    );
}

/// The message with paths as seen from the case's folder.
fn relative(message: &str, case: &Path) -> String {
    let case = case.display().to_string();
    message.replace(&format!("{case}/"), "").replace(&case, ".")
}

/// The first of `names` that is in `case`.
fn present(case: &Path, names: [&str; 2]) -> Option<PathBuf> {
    names.into_iter().map(|name| case.join(name)).find(|path| path.exists())
}

/// Reads the checkpoint and every one of its values.
fn read(case: &Path) -> Option<String> {
    let router = present(case, ["router.safetensors", "router.pth"]);
    let adapter = present(case, ["adapter", "lora.pth"]);
    let checkpoint = match checkpoint::read(&Request {
        model: Some(case),
        router: router.as_deref(),
        adapter: adapter.as_deref(),
        lora_alpha: None,
    }) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return Some(error.to_string()),
    };
    checkpoint.sources.iter().find_map(|stored| {
        let weight = Weight::Stored(stored.clone());
        let written =
            weights::write(&weight, DType::F32, &checkpoint.sources, &mut std::io::sink());
        written.err().map(|error| error.to_string())
    })
}

#[test]
fn bad_tasks_are_refused_by_line() {
    check("choices", |case| {
        let tasks = ["task.jsonl", "other/task.jsonl"].map(|name| case.join(name));
        let tasks: Vec<_> = tasks.into_iter().filter(|path| path.exists()).collect();
        task::read_all(&tasks).err().map(|error| error.to_string())
    });
}

#[test]
fn bad_checkpoints_are_refused_by_name() {
    check("checkpoint", read);
}
