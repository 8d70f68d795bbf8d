//! Timing: the order of sessions in a round, and the steps of a script in a session.

use std::time::{Duration, Instant};

use super::subject::{Opened, rows};
use super::workload::Script;
use crate::decoder::{CacheEntry, Input, Routing};
use crate::runtime::decoder::Error;

/// The order of `count` things in round `round`: there and back, so that none is always the first,
/// and drift of the machine weighs on all alike.
pub(super) fn order(round: usize, count: usize) -> Vec<usize> {
    if round.is_multiple_of(2) { (0..count).collect() } else { (0..count).rev().collect() }
}

/// How caches are held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Caches {
    /// Past and present in one buffer as long as a workload needs, where a graph allows it.
    #[default]
    Reserved,
    /// Every step gives a longer one, as for a client that binds nothing.
    Growing,
}

/// Seconds of every sample of `script`. `decide` gives the decisions of a step, for a graph that takes
/// them; making and handing them over is not timed.
pub(super) fn run(
    opened: &mut Opened,
    script: &Script,
    prefix: &[CacheEntry],
    caches: Caches,
    decide: &dyn Fn(&Input) -> Option<Routing>,
) -> Result<Vec<f64>, Error> {
    use crate::decoder::Decoder;
    let step = |opened: &mut Opened, input: &Input| {
        if let Some(routing) = decide(input) {
            opened.force(&routing)?;
        }
        let start = Instant::now();
        opened.decoder.advance(input)?;
        Ok::<Duration, Error>(start.elapsed())
    };
    opened.decoder.reset();
    opened.decoder.reserve(if caches == Caches::Reserved { script.longest() } else { 0 });
    if script.start > 0 {
        opened.decoder.restore(rows(prefix, script.batch(), script.start))?;
    }
    for input in &script.warmup {
        step(opened, input)?;
    }
    let mut seconds = Vec::with_capacity(script.samples.len());
    for sample in &script.samples {
        if script.resets {
            opened.decoder.reset();
        }
        let mut sum = Duration::ZERO;
        for input in sample {
            sum += step(opened, input)?;
        }
        seconds.push(sum.as_secs_f64());
    }
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_alternate() {
        assert_eq!(order(0, 3), [0, 1, 2]);
        assert_eq!(order(1, 3), [2, 1, 0]);
        assert_eq!(order(2, 3), [0, 1, 2]);
    }

    #[test]
    fn everyone_has_its_turn_in_every_round() {
        for round in 0..4 {
            let mut turns = order(round, 5);
            turns.sort_unstable();
            assert_eq!(turns, [0, 1, 2, 3, 4]);
        }
        // Over two rounds, the mean place of each is the same.
        let place = |round, who| order(round, 5).iter().position(|w| *w == who).unwrap_or_default();
        assert!((0..5).all(|who| place(0, who) + place(1, who) == 4));
    }
}
