//! A golden check as `JUnit` XML: one test case per prompt, and one more where the whole fails.

use std::io;

use quick_xml::Writer;
use quick_xml::events::{BytesDecl, BytesText, Event};

use super::report::{PromptReport, Report};

/// Most characters of a prompt in a test case's name.
const NAME: usize = 60;

/// Writes `report` as `JUnit` XML.
pub fn junit(report: &Report, sink: &mut impl io::Write) -> io::Result<()> {
    let mut writer = Writer::new_with_indent(&mut *sink, b' ', 2);
    writer.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
    let wrong = report.prompts.iter().filter(|prompt| !prompt.passed).count();
    let whole = usize::from(!report.failures.is_empty());
    let counts = [
        ("name", "golden".to_owned()),
        ("tests", (report.prompts.len() + whole).to_string()),
        ("failures", (wrong + whole).to_string()),
        ("errors", "0".to_owned()),
        ("time", seconds(report.seconds)),
    ];
    let counts = || counts.iter().map(|(key, value)| (*key, value.as_str()));
    writer.create_element("testsuites").with_attributes(counts()).write_inner_content(
        |writer| {
            writer.create_element("testsuite").with_attributes(counts()).write_inner_content(
                |writer| {
                    for prompt in &report.prompts {
                        let name = format!("prompt {}: {}", prompt.prompt, shortened(&prompt.text));
                        let failures = failures(prompt);
                        case(writer, report, &name, prompt.seconds, &failures, &prompt.notes)?;
                    }
                    if report.failures.is_empty() {
                        return Ok(());
                    }
                    case(writer, report, "all prompts", report.seconds, &report.failures, &[])
                },
            )?;
            Ok(())
        },
    )?;
    sink.write_all(b"\n")
}

fn case<W: io::Write>(
    writer: &mut Writer<W>,
    report: &Report,
    name: &str,
    time: f64,
    failures: &[String],
    notes: &[String],
) -> io::Result<()> {
    let (name, class, time) = (text(name), text(&report.artifact), seconds(time));
    let element = writer.create_element("testcase").with_attributes([
        ("name", name.as_str()),
        ("classname", class.as_str()),
        ("time", time.as_str()),
    ]);
    if failures.is_empty() && notes.is_empty() {
        element.write_empty()?;
        return Ok(());
    }
    element.write_inner_content(|writer| {
        if let Some(first) = failures.first() {
            writer
                .create_element("failure")
                .with_attributes([("message", text(first).as_str()), ("type", "mismatch")])
                .write_text_content(BytesText::new(&text(&failures.join("\n"))))?;
        }
        if !notes.is_empty() {
            writer
                .create_element("system-out")
                .write_text_content(BytesText::new(&text(&notes.join("\n"))))?;
        }
        Ok(())
    })?;
    Ok(())
}

fn failures(prompt: &PromptReport) -> Vec<String> {
    let mut failures = prompt.failures.clone();
    if prompt.more_failures > 0 {
        failures.push(format!("and {} more", prompt.more_failures));
    }
    failures
}

fn seconds(seconds: f64) -> String {
    format!("{seconds:.3}")
}

fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(NAME).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// The text without the characters that XML 1.0 cannot hold, even escaped.
fn text(text: &str) -> String {
    let allowed =
        |c: &char| matches!(c, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'..='\u{10ffff}');
    text.chars().map(|c| if allowed(&c) { c } else { char::REPLACEMENT_CHARACTER }).collect()
}
