//! `model.onnx.data`: weights evaluated while they are written.

use std::io::{self, Write};
use std::ops::ControlFlow;

use skipgpt_passes::ir;

use super::files::Files;
use super::layout::{Layout, Written};
use super::output::Output;
use super::{Error, OnProgress, Progress, Step, names};
use crate::onnx::graph::{Element, Initializer};
use crate::packed;
use crate::sources::Sources;
use crate::weights;

/// Writes `model.onnx.data` among `files`, if any weight goes there.
pub(super) fn write(
    files: &mut Files<'_>,
    layout: &Layout<'_>,
    sources: &Sources,
    tracker: &mut Tracker<'_>,
) -> Result<(), Error> {
    if layout.written.is_empty() {
        return Ok(());
    }
    let mut output = files.create(names::DATA)?;
    let failed = |error| files.explain(names::DATA, error);
    for written in &layout.written {
        let (Written::Plain { initializer, .. } | Written::Quantized { initializer, .. }) = written;
        let result = match *written {
            Written::Plain { offset, weight, .. } => {
                output.pad_to(offset).map_err(failed)?;
                let mut sink = Tracked::new(&mut output, tracker);
                let result = evaluate(initializer, weight, sources, &mut sink);
                sink.failure().map_or(result, |error| Err(failed(error)))
            }
            Written::Quantized { weight, place, .. } => {
                quantise(initializer, weight, &place, sources, &mut output, tracker, &failed)
            }
        };
        result?;
    }
    files.close(output)
}

/// Weights that stay where they are must be finite too.
pub(super) fn check_linked(
    layout: &Layout<'_>,
    sources: &Sources,
    tracker: &mut Tracker<'_>,
) -> Result<(), Error> {
    for (initializer, weight) in &layout.linked {
        evaluate(initializer, weight, sources, &mut Tracked::new(&mut io::sink(), tracker))?;
    }
    Ok(())
}

fn evaluate<W: Write>(
    initializer: &Initializer,
    weight: &ir::Weight,
    sources: &Sources,
    sink: &mut Tracked<'_, '_, W>,
) -> Result<(), Error> {
    let name = || initializer.name.clone();
    let before = sink.tracker.done;
    // A weight in an integer initializer is a bug whose bytes then do not fit either.
    let dtype = match initializer.element {
        Element::Float(dtype) => dtype,
        Element::Int64 | Element::Int32 | Element::Uint8 | Element::Bool => ir::DType::F32,
    };
    let expected = initializer.size();
    let planned = weight.len() as u64 * dtype.size() as u64;
    if planned != expected {
        return Err(Error::WrongSize { name: name(), expected, found: planned });
    }
    let result = weights::write(weight, dtype, sources, sink);
    if sink.tracker.stopped {
        return Err(Error::Interrupted);
    }
    result.map_err(|source| Error::Weight { name: name(), source })?;
    let found = sink.tracker.done - before;
    if found == expected { Ok(()) } else { Err(Error::WrongSize { name: name(), expected, found }) }
}

/// Writes the parts of a matrix in few bits.
fn quantise(
    initializer: &Initializer,
    weight: &ir::Weight,
    place: &packed::Place,
    sources: &Sources,
    output: &mut Output,
    tracker: &mut Tracker<'_>,
    failed: &impl Fn(io::Error) -> Error,
) -> Result<(), Error> {
    let packed::Place { scheme, dtype, codes, scales, zeros } = place;
    output.pad_to(*codes).map_err(failed)?;
    let mut sink = Tracked::new(output, tracker);
    let result = weights::quantized::write(weight, scheme, *dtype, sources, &mut sink);
    if let Some(error) = sink.failure() {
        return Err(failed(error));
    }
    if tracker.stopped() {
        return Err(Error::Interrupted);
    }
    let name = || initializer.name.clone();
    let sides = result.map_err(|source| Error::Weight { name: name(), source })?;
    for (offset, bytes) in [(scales, &sides.scales), (zeros, &sides.zeros)] {
        if bytes.is_empty() {
            continue;
        }
        output.pad_to(*offset).map_err(failed)?;
        let mut sink = Tracked::new(output, tracker);
        let result = sink.write_all(bytes);
        if let Some(error) = sink.failure() {
            return Err(failed(error));
        }
        result.map_err(|_| Error::Interrupted)?;
    }
    let (rows, columns) = (weight.rows(), weight.columns());
    let bytes = |each: usize| (rows * each) as u64;
    let (expected, found) = if scheme.symmetric {
        (scales + bytes(scheme.blocks(columns) * dtype.size()), output.size())
    } else {
        (zeros + bytes(scheme.zero_bytes(columns)), output.size())
    };
    if found == expected { Ok(()) } else { Err(Error::WrongSize { name: name(), expected, found }) }
}

/// Counts the bytes of the weights and asks whether to go on.
pub(crate) struct Tracker<'a> {
    progress: OnProgress<'a>,
    done: u64,
    total: u64,
    stopped: bool,
}

impl<'a> Tracker<'a> {
    /// Nothing done of `total` bytes.
    pub(crate) fn new(progress: OnProgress<'a>, total: u64) -> Self {
        Self { progress, done: 0, total, stopped: false }
    }

    /// Whether the caller said stop.
    pub(crate) const fn stopped(&self) -> bool {
        self.stopped
    }
}

/// A destination that reports to a [`Tracker`].
pub(crate) struct Tracked<'a, 'b, W> {
    inner: &'a mut W,
    tracker: &'a mut Tracker<'b>,
    /// Why the destination refused; the evaluator only says that it did.
    failure: Option<io::Error>,
}

impl<'a, 'b, W> Tracked<'a, 'b, W> {
    /// Everything goes on to `inner`.
    pub(crate) const fn new(inner: &'a mut W, tracker: &'a mut Tracker<'b>) -> Self {
        Self { inner, tracker, failure: None }
    }

    /// Why the destination refused, if it did.
    pub(crate) fn failure(self) -> Option<io::Error> {
        self.failure
    }
}

impl<W: Write> Write for Tracked<'_, '_, W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.inner.write_all(buffer) {
            let kind = error.kind();
            self.failure = Some(error);
            return Err(kind.into());
        }
        let Tracker { progress, done, total, stopped } = &mut *self.tracker;
        *done += buffer.len() as u64;
        match progress(Progress { step: Step::Weights, done: *done, total: *total }) {
            ControlFlow::Continue(()) => Ok(buffer.len()),
            ControlFlow::Break(()) => {
                *stopped = true;
                Err(io::ErrorKind::Other.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
