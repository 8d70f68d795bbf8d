//! What comes from outside, or goes there: files that are none, `JUnit`.

use serde_json::{Value, json};

use super::*;

/// A valid file with one value replaced, and what reading it says.
fn broken(pointer: &str, value: Value) -> String {
    let mut json: Value = serde_json::from_str(&text(&recorded(&[]))).unwrap();
    *json.pointer_mut(pointer).unwrap() = value;
    Golden::parse(json.to_string().as_bytes()).unwrap_err().to_string()
}

#[test]
fn a_file_that_is_none_is_refused() {
    says(
        &broken("/version", json!(2)),
        &expect![[r#"
        the golden file has version 2, this tool reads 1; record it again
    "#]],
    );
    says(
        &broken("/version", json!("1")),
        &expect![[r#"
        not a golden file: invalid type: string "1", expected u64 at line 1 column 14
    "#]],
    );
    says(
        &broken("/dtype", json!("int4")),
        &expect![[r#"
        dtype: found `int4`, expected f32, f16 or bf16
    "#]],
    );
    says(
        &broken("/prompts", json!([])),
        &expect![[r#"
        prompts: found 0 entries, expected 1 to 1048576
    "#]],
    );
    says(
        &broken("/prompts/1/ids", json!([])),
        &expect![[r#"
        prompts[1].ids: found 0 entries, expected 1 to 1048576
    "#]],
    );
    says(
        &broken("/prompts/1/ids/0", json!(-3)),
        &expect![[r#"
        prompts[1].ids: found token -3, expected 0 or more
    "#]],
    );
    says(
        &broken("/prompts/0/greedy/0", json!(31)),
        &expect![[r#"
        prompts[0].top[0]: the first token is 30, expected the greedy one, 31
    "#]],
    );
    says(
        &broken("/prompts/0/greedy", json!([1, 2])),
        &expect![[r#"
        prompts[0].top: found 6 entries, expected 2
    "#]],
    );
    says(
        &broken("/prompts/0/top/1", json!([])),
        &expect![[r#"
        prompts[0].top[1]: found 0 entries, expected 1 to 100
    "#]],
    );
    says(
        &broken("/prompts/0/top/1/2/1", json!(0.5)),
        &expect![[r#"
        prompts[0].top[1]: found a log-probability of 0.5, expected 0 or less
    "#]],
    );
    says(
        &broken("/environment", json!({"gpu": 1})),
        &expect![[r#"
        not a golden file: unknown field `gpu`, expected one of `onnxruntime`, `provider`, `threads` at line 1 column 105
    "#]],
    );
    let cut = &text(&recorded(&[]))[..200];
    says(
        &Golden::parse(cut.as_bytes()).unwrap_err().to_string(),
        &expect![[r#"
        not a golden file: EOF while parsing a string at line 12 column 26
    "#]],
    );
    let missing = Golden::read(std::path::Path::new("no-such-golden.json")).unwrap_err();
    says(
        &missing.to_string(),
        &expect![[r#"
        cannot read no-such-golden.json
    "#]],
    );
}

#[test]
fn decisions_that_are_none_are_refused() {
    says(
        &broken("/prompts/0/routing/1/module", json!("layers.0.router")),
        &expect![[r#"
        prompts[0].routing[1]: found module `layers.0.router`, expected names like `layers.3.mlp`, each once, in layer order
    "#]],
    );
    says(
        &broken("/prompts/0/routing/1/module", json!("layers.0.attention")),
        &expect![[r#"
        prompts[0].routing[1]: found module `layers.0.attention`, expected names like `layers.3.mlp`, each once, in layer order
    "#]],
    );
    says(
        &broken("/prompts/0/routing/0/keep", json!("101")),
        &expect![[r#"
        prompts[0].routing[0].keep: found 3 entries, expected 14
    "#]],
    );
    says(
        &broken("/prompts/1/routing/0/keep", json!("1é1")),
        &expect![[r#"
        prompts[1].routing[0].keep: found `é`, expected only 0 and 1
    "#]],
    );
    says(
        &broken("/prompts/1/routing/0/near", json!([[6, 0.001]])),
        &expect![[r#"
        prompts[1].routing[0].near: found token 6, expected less than 6
    "#]],
    );
}

#[test]
fn junit_has_a_case_per_prompt() {
    let mut report = checked(
        &recorded(&[]),
        &[Fault::Flip { module: MLP_1, column: 7 }],
        &options(Mode::Tolerant),
    );
    report.seconds = 1.25;
    for prompt in &mut report.prompts {
        prompt.seconds = 0.5;
        prompt.failures.truncate(2);
        prompt.more_failures = 0;
    }
    report.prompts[1].notes.push("a tie & more".to_owned());
    report.failures.push("too many <ties>".to_owned());
    let mut bytes = Vec::new();
    junit(&report, &mut bytes).unwrap();
    let xml = String::from_utf8(bytes).unwrap();
    expect![[r#"
        <?xml version="1.0" encoding="UTF-8"?>
        <testsuites name="golden" tests="3" failures="2" errors="0" time="1.250">
          <testsuite name="golden" tests="3" failures="2" errors="0" time="1.250">
            <testcase name="prompt 1: It is a truth &lt;universally&gt; &amp; &quot;acknowledged&quot;" classname="toy" time="0.500">
              <failure message="token 7 is kept in layers.1.mlp (margin 0.094261095), recorded was skipped" type="mismatch">token 7 is kept in layers.1.mlp (margin 0.094261095), recorded was skipped</failure>
            </testcase>
            <testcase name="prompt 2: �&#10;" classname="toy" time="0.500">
              <system-out>a tie &amp; more</system-out>
            </testcase>
            <testcase name="all prompts" classname="toy" time="1.250">
              <failure message="too many &lt;ties&gt;" type="mismatch">too many &lt;ties&gt;</failure>
            </testcase>
          </testsuite>
        </testsuites>
    "#]].assert_eq(&xml);

    // It is XML, and what was escaped comes back.
    let mut reader = quick_xml::Reader::from_str(&xml);
    let mut names = Vec::new();
    loop {
        use quick_xml::events::Event;
        match reader.read_event().unwrap() {
            Event::Eof => break,
            Event::Start(e) | Event::Empty(e) if e.name().as_ref() == "testcase" => {
                let name = e.try_get_attribute("name").unwrap().unwrap();
                names.push(
                    name.normalized_value(quick_xml::XmlVersion::Implicit1_0).unwrap().into_owned(),
                );
            }
            _ => {}
        }
    }
    assert_eq!(names.len(), 3);
    assert_eq!(names[0], "prompt 1: It is a truth <universally> & \"acknowledged\"");
    assert_eq!(names[1], "prompt 2: \u{fffd}\n");
}
