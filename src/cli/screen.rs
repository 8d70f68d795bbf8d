//! The terminal: progress bars where there is one, reports as text or JSON, interruption.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use skipgpt_export::file;

use super::ReportArguments;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether the reader of standard output has gone away.
static UNREAD: AtomicBool = AtomicBool::new(false);

/// Whether another process shows what goes on.
static SILENT: AtomicBool = AtomicBool::new(false);

/// The exit code of a process ended by Ctrl-C.
const INTERRUPT_EXIT_CODE: i32 = 130;

/// From now on the first Ctrl-C asks the operation to clean up and stop, and the second ends the process at
/// once: for commands that ask [`go_on`]. Others have nothing to clean up, and end as any process does.
pub(crate) fn catch_interrupts() -> Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            #[allow(clippy::exit, reason = "the user asked twice")]
            std::process::exit(INTERRUPT_EXIT_CODE);
        }
    })
    .context("cannot catch Ctrl-C")
}

/// Whether to go on.
pub(crate) fn go_on() -> ControlFlow<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        ControlFlow::Break(())
    } else {
        ControlFlow::Continue(())
    }
}

/// From now on no bars, lines or notes: another process shows them.
pub(crate) fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

fn silent() -> bool {
    SILENT.load(Ordering::Relaxed)
}

/// A bar over bytes; invisible where standard error is no terminal.
pub(crate) fn bytes(label: &'static str) -> ProgressBar {
    bar(label, "{prefix:>10} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
}

/// A bar over things counted.
pub(crate) fn count(label: &'static str) -> ProgressBar {
    bar(label, "{prefix:>10} [{wide_bar}] {pos}/{len} {msg} {eta}")
}

fn bar(label: &'static str, template: &str) -> ProgressBar {
    if silent() {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_prefix(label)
}

/// Writes one line to standard output. A reader that has gone away is no error.
pub(crate) fn line(text: impl Display) -> Result<()> {
    print(&format!("{text}\n"))
}

/// Writes text to standard output and shows it at once.
pub(crate) fn print(text: &str) -> Result<()> {
    if silent() {
        return Ok(());
    }
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            UNREAD.store(true, Ordering::Relaxed);
            Ok(())
        }
        written => written.context("cannot write to standard output"),
    }
}

/// Whether standard output is read, as far as is known.
pub(crate) fn is_read() -> ControlFlow<()> {
    if UNREAD.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// Tells a person what goes on, where a person is likely to read it.
pub(crate) fn note(text: impl Display) {
    if silent() {
        return;
    }
    if io::stderr().is_terminal() {
        let _ = writeln!(io::stderr().lock(), "{text}");
    } else {
        tracing::info!("{text}");
    }
}

/// Shows a report, as text and as JSON, as asked; as text first, so that it is seen even if its file
/// cannot be written.
pub(crate) fn report(report: &(impl Serialize + Display), to: &ReportArguments) -> Result<()> {
    if silent() {
        return Ok(());
    }
    match to.json.as_deref() {
        None => line(report),
        Some(path) if path == Path::new("-") => line(serde_json::to_string_pretty(report)?),
        Some(path) => {
            line(report)?;
            write_json(path, report)
        }
    }
}

/// That nothing is overwritten unless asked for.
pub(crate) fn replaceable(path: &Path, force: bool) -> Result<()> {
    if path.exists() && !force {
        bail!("{}: already exists; --force replaces it", path.display());
    }
    Ok(())
}

/// Writes a value as an indented JSON file.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    write_file(path, |file| file.write_all(text.as_bytes()))
}

/// Writes a file, whole or not at all.
pub(crate) fn write_file(
    path: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<()> {
    file::write(path, fill).with_context(|| format!("{}: cannot be written", path.display()))
}
