//! Peak memory, of a process that loads one artifact and runs one workload.
//!
//! A process's peak never falls, so that every measurement takes a process of its own; the command
//! line starts them.

use ndarray::Array4;

use super::subject::{Form, Source};
use super::workload::{Script, Steps, Tokens, Workload};
use super::{Caches, Error, measure};
use crate::decoder::CacheEntry;
use crate::runtime::{OnnxDecoder, Runtime, session};

/// Loads `source`, runs two steps of `workload` (a prefill once, a mixed one to the end) and gives the
/// process's peak in bytes: its most resident memory, as Linux counts it. `None` on other systems.
///
/// A decode starts from a cache of zeros, so that filling it adds nothing.
///
/// # Errors
///
/// [`Error`] if the artifact does not load or run.
pub fn peak(
    source: &Source,
    workload: Workload,
    tokens: &Tokens,
    caches: Caches,
    runtime: &Runtime,
    options: &session::Options,
) -> Result<Option<u64>, Error> {
    let steps = Steps { decode: 2, prefill: 1, warmup: 0 };
    let script = Script { warmup: Vec::new(), ..Script::new(workload, tokens, steps)? };
    let mut opened = source.load(&Form::AsItIs, runtime, &script.session(options))?;
    let zeros = if script.start > 0 { zeros(&opened.decoder) } else { Vec::new() };
    measure::run(&mut opened, &script, &zeros, caches, &|_| None)
        .map_err(|error| source.failed("measuring memory", error))?;
    Ok(of_process())
}

/// A cache of one token, of zeros, that stands for any length.
fn zeros(decoder: &OnnxDecoder) -> Vec<CacheEntry> {
    let half = |(heads, width)| Array4::zeros((1, heads, 1, width));
    let layers = decoder.cache_heads();
    layers.map(|(layer, [k, v])| CacheEntry { layer, key: half(k), value: half(v) }).collect()
}

/// The most resident memory this process has had, in bytes.
fn of_process() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    peak_in(&status)
}

fn peak_in(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kilobytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read_in_bytes() {
        let status = "Name:\tx\nVmPeak:\t   99 kB\nVmHWM:\t   2048 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(peak_in(status), Some(2048 * 1024));
        assert_eq!(peak_in("VmRSS:\t 1 kB\n"), None);
        assert_eq!(peak_in("VmHWM:\t many\n"), None);
    }
}
