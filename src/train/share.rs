//! What of a step's forward passes each rank computes.
//!
//! A step has `accumulate` forward passes of `batch` windows. With `g` the greatest common divisor
//! of `accumulate` and the number of ranks, `g` passes run at the same time, each by as many ranks,
//! which divide its windows. What a pass means does not change: its loss is the mean over all its
//! windows, its keep rate that of all of them, and the ranks exchange both before the backward.

use std::ops::Range;

use super::Error;
use super::batch::Totals;
use crate::world::{Stopped, World};

/// One rank's share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Share {
    /// Passes that run at the same time.
    groups: u64,
    /// Which of them is this rank's.
    group: u64,
    /// Which windows of it are.
    pub(super) windows: Range<usize>,
    /// How often so many passes run.
    pub(super) turns: u64,
}

impl Share {
    /// This rank's share of `accumulate` passes of `batch` windows.
    pub(super) fn new(world: &dyn World, batch: usize, accumulate: usize) -> Result<Self, Error> {
        let (rank, size) = (world.rank(), world.size());
        let groups = greatest_common_divisor(accumulate, size);
        let parts = size / groups;
        if batch < parts {
            return Err(Error::Share { processes: size, batch, accumulate });
        }
        let part = rank % parts;
        Ok(Self {
            groups: groups as u64,
            group: (rank / parts) as u64,
            windows: part * batch / parts..(part + 1) * batch / parts,
            turns: (accumulate / groups) as u64,
        })
    }

    /// The passes of a step that run in turn `turn`, in order.
    pub(super) fn passes(&self, turn: u64) -> Range<u64> {
        turn * self.groups..(turn + 1) * self.groups
    }

    /// Which pass of a step is this rank's in turn `turn`.
    pub(super) fn pass(&self, turn: u64) -> u64 {
        turn * self.groups + self.group
    }

    /// Each pass' totals in this turn, from this rank's part of its own.
    pub(super) fn totals(&self, world: &dyn World, own: Totals) -> Result<Vec<Totals>, Stopped> {
        let mut all = vec![0.0; self.groups as usize * Totals::COUNT];
        let place = self.group as usize * Totals::COUNT;
        all[place..place + Totals::COUNT].copy_from_slice(&own.0);
        world.sum(&mut all)?;
        Ok(all.as_chunks().0.iter().copied().map(Totals).collect())
    }

    /// Which of [`Share::totals`] is this rank's pass.
    pub(super) fn own<'a>(&self, totals: &'a [Totals]) -> &'a Totals {
        &totals[self.group as usize]
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests;
