//! Ranks that `mpirun` started.
//!
//! Before every sum the ranks agree that none has failed: a rank that has takes part in that and in
//! nothing after it.

use std::fmt;

use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Equivalence};

use super::{Agreement, Error, Stopped, World};

/// Values of one reduction at most: MPI counts in 32 bits.
const CHUNK: usize = 1 << 24;

/// What the other ranks' launcher sees when this one goes down in a panic.
const PANIC_EXIT_CODE: i32 = 101;

/// This process among those of `MPI_COMM_WORLD`.
pub(super) struct Mpi {
    // Before the universe, whose end is that of MPI.
    communicator: SimpleCommunicator,
    _universe: Universe,
    rank: usize,
    size: usize,
    agreement: Agreement,
}

impl Mpi {
    pub(super) fn open() -> Result<Self, Error> {
        let universe = mpi::initialize().ok_or(Error::Initialised)?;
        let communicator = universe.world();
        let (rank, size) = (communicator.rank() as usize, communicator.size() as usize);
        Ok(Self { communicator, _universe: universe, rank, size, agreement: Agreement::default() })
    }

    /// The lowest rank that fails, if one does; `own` says whether this one does.
    fn failing(&self, own: bool) -> Option<usize> {
        let given = if own { self.rank } else { self.size } as u64;
        let mut lowest = given;
        self.communicator.all_reduce_into(&given, &mut lowest, SystemOperation::min());
        Some(lowest as usize).filter(|lowest| *lowest < self.size)
    }

    fn add<T: Equivalence + Copy>(&self, values: &mut [T]) -> Result<(), Stopped> {
        self.agreement.go_on(|own| self.failing(own))?;
        for values in values.chunks_mut(CHUNK) {
            let given = values.to_vec();
            self.communicator.all_reduce_into(&given[..], values, SystemOperation::sum());
        }
        Ok(())
    }
}

impl World for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, values: &mut [f64]) -> Result<(), Stopped> {
        self.add(values)
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<(), Stopped> {
        self.add(values)
    }

    fn stop(&self) -> bool {
        self.agreement.stop(self.rank, |own| self.failing(own))
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank, self.size)
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // The end of MPI waits for every rank, and the others wait for this one's sums.
        if std::thread::panicking() {
            self.communicator.abort(PANIC_EXIT_CODE);
        }
    }
}
