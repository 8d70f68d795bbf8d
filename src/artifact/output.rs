//! One file of the artifact while it is written: hashed, and sent to the disk early.

use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use super::hash::{Digest, HashingWriter};

/// How many bytes may be written before the disk is told to store them.
///
/// Left to itself the kernel keeps most of a file in memory until the final sync, which then
/// waits for all of it; told early, the disk works while the next weights are computed.
const SYNC_EVERY: u64 = 64 << 20;

/// A file being written. Finish it, or its bytes may be lost.
#[derive(Debug)]
pub struct Output {
    name: String,
    writer: HashingWriter<File>,
    synced: u64,
    syncer: Option<Syncer>,
}

#[derive(Debug)]
struct Syncer {
    requests: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Output {
    pub(super) fn new(name: &str, file: File) -> Self {
        let writer = HashingWriter::new(file);
        Self { name: name.to_owned(), writer, synced: 0, syncer: None }
    }

    /// The file's name in the artifact.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes written so far.
    pub const fn size(&self) -> u64 {
        self.writer.size()
    }

    /// Writes zeros up to byte `offset`.
    pub fn pad_to(&mut self, offset: u64) -> io::Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while self.size() < offset {
            let length = (offset - self.size()).min(ZEROS.len() as u64);
            self.write_all(&ZEROS[..length as usize])?;
        }
        Ok(())
    }

    /// Waits until the disk has everything.
    pub fn finish(self) -> io::Result<Digest> {
        let early = match self.syncer {
            Some(Syncer { requests, thread }) => {
                drop(requests);
                thread.join().map_err(|_| io::Error::other("the syncing thread failed"))?
            }
            None => Ok(()),
        };
        let (file, digest) = self.writer.finish();
        // A failed sync is reported once: the early one's error must not be lost.
        early.and(file.sync_all()).map(|()| digest)
    }

    fn sync_early(&mut self) -> io::Result<()> {
        self.synced = self.size();
        if self.syncer.is_none() {
            self.syncer = Some(Syncer::start(self.writer.inner().try_clone()?)?);
        }
        if let Some(syncer) = &self.syncer {
            // One request in the queue is enough; a syncer that has gone reports in `finish`.
            let _ = syncer.requests.try_send(());
        }
        Ok(())
    }
}

impl Syncer {
    fn start(file: File) -> io::Result<Self> {
        let (requests, received) = sync_channel(1);
        let work = move || received.iter().try_for_each(|()| file.sync_data());
        let thread = thread::Builder::new().name("sync".to_owned()).spawn(work)?;
        Ok(Self { requests, thread })
    }
}

impl Write for Output {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.write_all(buffer)?;
        Ok(buffer.len())
    }

    fn write_all(&mut self, buffer: &[u8]) -> io::Result<()> {
        self.writer.write_all(buffer)?;
        if self.size() - self.synced >= SYNC_EVERY { self.sync_early() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}
