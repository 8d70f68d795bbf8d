//! Processes that work on one thing together.
//!
//! Every process (*rank*) runs the same command and takes its share of the windows or items; what
//! they found is summed over all of them, and every rank goes on with the same sums. The first one
//! leads: it alone writes files and reports.
//!
//! A rank that fails says so with [`World::stop`] in place of its next sum; the others' next sum then
//! gives [`Stopped`], so that nobody waits for a rank that is gone.

use std::fmt;

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(test)]
pub(crate) mod threads;

/// The ranks of a command, as one of them sees them.
pub trait World: fmt::Debug {
    /// This process' number, from 0.
    fn rank(&self) -> usize;

    /// How many processes there are, 1 or more.
    fn size(&self) -> usize;

    /// Replaces every value by its sum over all ranks, the same on each; every rank gives as many.
    ///
    /// # Errors
    ///
    /// [`Stopped`] if another rank has failed.
    fn sum(&self, values: &mut [f64]) -> Result<(), Stopped>;

    /// As [`World::sum`], in the precision of gradients.
    ///
    /// # Errors
    ///
    /// [`Stopped`] if another rank has failed.
    fn sum_f32(&self, values: &mut [f32]) -> Result<(), Stopped>;

    /// Says that this rank has failed. Of the ranks that fail at once, one is to say why: gives
    /// whether that is this one. No sum may follow.
    fn stop(&self) -> bool;

    /// Whether this is the rank that writes and reports.
    fn leads(&self) -> bool {
        self.rank() == 0
    }

    /// Whether item `index` is this rank's.
    fn takes(&self, index: usize) -> bool {
        index % self.size() == self.rank()
    }

    /// Waits for the others.
    ///
    /// # Errors
    ///
    /// [`Stopped`] if another rank has failed.
    fn meet(&self) -> Result<(), Stopped> {
        self.sum(&mut [])
    }
}

/// Another rank has failed, and says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("process {0} stopped")]
pub struct Stopped(
    /// Which.
    pub usize,
);

/// Whether a rank has failed, as far as one of them knows. In `go_on` and `stop` all ranks take part, and
/// `failing` tells each the lowest that fails, given whether it does itself.
#[cfg(any(test, feature = "mpi"))]
#[derive(Debug, Default)]
struct Agreement(std::cell::Cell<Option<Stopped>>);

#[cfg(any(test, feature = "mpi"))]
impl Agreement {
    /// That none has, which is to be agreed on before every sum.
    fn go_on(&self, failing: impl FnOnce(bool) -> Option<usize>) -> Result<(), Stopped> {
        if self.0.get().is_none() {
            self.0.set(failing(false).map(Stopped));
        }
        self.0.get().map_or(Ok(()), Err)
    }

    /// As [`World::stop`], of `rank`.
    fn stop(&self, rank: usize, failing: impl FnOnce(bool) -> Option<usize>) -> bool {
        if self.0.get().is_some() {
            return false;
        }
        let lowest = failing(true).unwrap_or(rank);
        self.0.set(Some(Stopped(lowest)));
        lowest == rank
    }
}

/// Why the ranks could not be brought together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The program was not built for this.
    #[error(
        "{0} processes were started, and this build cannot share work among them; build it with --features mpi, or start one process"
    )]
    NotBuilt(
        /// How many.
        usize,
    ),
    /// MPI is in use already.
    #[error("MPI was initialised before; it can be only once in a process")]
    Initialised,
}

/// One process, which does everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Alone;

impl World for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&self, _: &mut [f64]) -> Result<(), Stopped> {
        Ok(())
    }

    fn sum_f32(&self, _: &mut [f32]) -> Result<(), Stopped> {
        Ok(())
    }

    fn stop(&self) -> bool {
        true
    }
}

/// What launchers (Open MPI's `mpirun`, those that speak PMI) tell a process they start of the number
/// of its peers.
const SIZES: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

/// How many processes were launched together, as far as the launcher says.
pub fn launched() -> Option<usize> {
    SIZES.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}

/// The ranks this process was launched with; itself alone where no launcher started it.
///
/// # Errors
///
/// Every variant of [`Error`].
pub fn open() -> Result<Box<dyn World>, Error> {
    match launched() {
        #[cfg(feature = "mpi")]
        Some(_) => Ok(Box::new(mpi::Mpi::open()?)),
        #[cfg(not(feature = "mpi"))]
        Some(size) if size > 1 => Err(Error::NotBuilt(size)),
        _ => Ok(Box::new(Alone)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn sums_are_the_same_on_every_rank() {
        let found = threads::run(3, |world| {
            let rank = world.rank() as f64;
            let (mut values, mut small) = ([rank, 10.0 * rank], [0.5_f32]);
            world.sum(&mut values).unwrap();
            world.sum_f32(&mut small).unwrap();
            world.meet().unwrap();
            let taken: Vec<_> = (0..7).filter(|index| world.takes(*index)).collect();
            (values, small, taken.len(), world.leads())
        });
        let values = ([3.0, 30.0], [1.5]);
        let expected = [(3, true), (2, false), (2, false)];
        assert_eq!(found, expected.map(|(taken, leads)| (values.0, values.1, taken, leads)));
        let mut values = [2.0];
        Alone.sum(&mut values).unwrap();
        assert_eq!((values, Alone.size(), Alone.takes(5)), ([2.0], 1, true));
    }

    #[test]
    fn of_ranks_that_fail_one_says_why_and_the_others_stop() {
        let found = threads::run(4, |world| {
            world.meet().unwrap();
            if world.rank() % 2 == 1 {
                return (world.stop(), None);
            }
            let stopped = world.sum(&mut [1.0, 2.0]).unwrap_err();
            // Whoever knows of it waits for nobody any more.
            assert_eq!(world.sum_f32(&mut [1.0]), Err(stopped));
            (world.stop(), Some(stopped))
        });
        let elsewhere = (false, Some(Stopped(1)));
        assert_eq!(found, [elsewhere, (true, None), elsewhere, (false, None)]);
    }
}
