//! Ranks that are threads of a test.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::{Agreement, Stopped, World};

/// How long a rank waits for the others before the test fails.
const PATIENCE: Duration = Duration::from_mins(1);

/// What the ranks of one test share.
#[derive(Debug, Default)]
struct Table {
    /// Rounds that every rank has taken part in.
    rounds: u64,
    /// This round's, by rank.
    given: Vec<Option<Vec<f64>>>,
    /// The last round's.
    taken: Vec<Vec<f64>>,
}

#[derive(Debug, Default)]
struct Room {
    table: Mutex<Table>,
    changed: Condvar,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct Thread<'a> {
    room: &'a Room,
    rank: usize,
    size: usize,
    agreement: Agreement,
}

/// Runs `rank` once for each of `size` ranks, all at once; gives what they gave.
pub(crate) fn run<T: Send>(size: usize, rank: impl Fn(&Thread<'_>) -> T + Sync) -> Vec<T> {
    let room = Room::default();
    room.table.lock().unwrap().given = vec![None; size];
    let (room, each) = (&room, &rank);
    std::thread::scope(|scope| {
        let start = |rank| {
            let work = move || each(&Thread { room, rank, size, agreement: Agreement::default() });
            scope.spawn(work)
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

impl Thread<'_> {
    /// What every rank gives, by rank.
    fn round(&self, values: Vec<f64>) -> Vec<Vec<f64>> {
        let mut table = self.room.table.lock().unwrap();
        let own = table.rounds;
        table.given[self.rank] = Some(values);
        if table.given.iter().all(Option::is_some) {
            table.taken = table.given.iter_mut().map(|given| given.take().unwrap()).collect();
            table.rounds += 1;
            self.room.changed.notify_all();
        }
        let waits = |table: &mut Table| table.rounds == own;
        let (table, timeout) =
            self.room.changed.wait_timeout_while(table, PATIENCE, waits).unwrap();
        assert!(!timeout.timed_out(), "rank {} waits for the others", self.rank);
        table.taken.clone()
    }

    /// The lowest rank that fails, if one does.
    fn failing(&self, own: bool) -> Option<usize> {
        let flags = self.round(vec![f64::from(u8::from(own))]);
        flags.iter().position(|flag| flag[0] > 0.0)
    }

    /// Every rank's values.
    fn all(&self, values: Vec<f64>) -> Result<Vec<Vec<f64>>, Stopped> {
        self.agreement.go_on(|own| self.failing(own))?;
        Ok(self.round(values))
    }
}

impl World for Thread<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, values: &mut [f64]) -> Result<(), Stopped> {
        let all = self.all(values.to_vec())?;
        for (at, value) in values.iter_mut().enumerate() {
            *value = all.iter().map(|given| given[at]).sum();
        }
        Ok(())
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<(), Stopped> {
        let all = self.all(values.iter().map(|value| f64::from(*value)).collect())?;
        for (at, value) in values.iter_mut().enumerate() {
            *value = all.iter().map(|given| given[at] as f32).sum();
        }
        Ok(())
    }

    fn stop(&self) -> bool {
        self.agreement.stop(self.rank, |own| self.failing(own))
    }
}
