//! SHA-256 of files: of the inputs by a reader beside the work, of the outputs while written.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use sha2::{Digest as _, Sha256};

use super::Error;

/// Bytes per read: large enough that the reads cost nothing beside the hash.
const BUFFER: usize = 4 << 20;
/// Writes of at least this many bytes are hashed on a second thread while they are written.
const PARALLEL: usize = 256 << 10;

/// Size and SHA-256 of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    /// Bytes.
    pub size: u64,
    /// In lower-case hexadecimal.
    pub sha256: String,
}

/// Hashes what passes through it.
#[derive(Debug)]
pub struct HashingWriter<W> {
    inner: W,
    hasher: Sha256,
    size: u64,
}

impl<W: Write> HashingWriter<W> {
    /// Hashes everything written to `inner` from here on.
    pub fn new(inner: W) -> Self {
        Self { inner, hasher: Sha256::new(), size: 0 }
    }

    /// What everything is written to.
    pub const fn inner(&self) -> &W {
        &self.inner
    }

    /// Bytes written so far.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The digest of everything written.
    pub fn finish(self) -> (W, Digest) {
        let digest = Digest { size: self.size, sha256: hex(self.hasher) };
        (self.inner, digest)
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.write_all(buffer)?;
        Ok(buffer.len())
    }

    /// A failed write leaves hash and destination apart: the file must be dropped.
    fn write_all(&mut self, buffer: &[u8]) -> io::Result<()> {
        self.size += buffer.len() as u64;
        let Self { inner, hasher, .. } = self;
        if buffer.len() < PARALLEL {
            hasher.update(buffer);
            return inner.write_all(buffer);
        }
        thread::scope(|scope| {
            let hashing = thread::Builder::new().spawn_scoped(scope, || hasher.update(buffer))?;
            let written = inner.write_all(buffer);
            hashing.join().map_err(|_| io::Error::other("the hashing thread failed"))?;
            written
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn hex(hasher: Sha256) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| char::from(DIGITS[usize::from(value)]);
    hasher.finalize().iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// The digest of `bytes`.
pub fn of_bytes(bytes: &[u8]) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(bytes);
    Digest { size: bytes.len() as u64, sha256: hex(hasher) }
}

/// The digest of a file, read once from first byte to last; `None` if `go_on` says no.
///
/// `go_on` is told the bytes read since its last call.
pub fn of_file(path: &Path, go_on: &mut dyn FnMut(u64) -> bool) -> Result<Option<Digest>, Error> {
    let failed = |source| Error::io("read", path, source);
    let mut file = File::open(path).map_err(failed)?;
    // Advice only: a file system that ignores it is read all the same.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
    let (mut hasher, mut size) = (Sha256::new(), 0);
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = match file.read(&mut buffer) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error)),
        };
        if read == 0 {
            return Ok(Some(Digest { size, sha256: hex(hasher) }));
        }
        hasher.update(&buffer[..read]);
        size += read as u64;
        if !go_on(read as u64) {
            return Ok(None);
        }
    }
}

/// Digests of files, being taken on a thread of their own.
///
/// Dropping it stops the thread at its next buffer.
#[derive(Debug)]
pub struct InputHashes {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Vec<Digest>, Error>>>,
}

impl InputHashes {
    /// Starts hashing `paths`, one after the other.
    pub fn start(paths: Vec<PathBuf>) -> Result<Self, Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("hash-inputs".to_owned())
            .spawn(move || {
                let mut go_on = |_| !told.load(Ordering::Relaxed);
                let mut digests = Vec::with_capacity(paths.len());
                for path in &paths {
                    match of_file(path, &mut go_on)? {
                        Some(digest) => digests.push(digest),
                        None => return Err(Error::Interrupted),
                    }
                }
                Ok(digests)
            })
            .map_err(Error::Thread)?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Waits for the digests, in the order of the paths.
    pub fn finish(mut self) -> Result<Vec<Digest>, Error> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(digests)) => digests,
            Some(Err(_)) | None => {
                Err(Error::Thread(io::Error::other("the thread that hashes the inputs failed")))
            }
        }
    }
}

impl Drop for InputHashes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its result is of no use to whoever gave up waiting for it.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn known_digest() {
        assert_eq!(of_bytes(b"abc"), Digest { size: 3, sha256: ABC.into() });
    }

    #[test]
    fn small_and_large_writes_hash_alike() {
        let bytes: Vec<u8> = (0..3 * PARALLEL as u32).map(|i| (i * 7 % 251) as u8).collect();
        let mut writer = HashingWriter::new(Vec::new());
        writer.write_all(&bytes[..10]).unwrap();
        writer.write_all(&bytes[10..10 + 2 * PARALLEL]).unwrap();
        writer.write_all(&bytes[10 + 2 * PARALLEL..]).unwrap();
        let (written, digest) = writer.finish();
        assert_eq!(written, bytes);
        assert_eq!(digest, of_bytes(&bytes));
    }

    #[test]
    fn files_are_hashed_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| directory.path().join(name));
        std::fs::write(&paths[0], "abc").unwrap();
        std::fs::write(&paths[1], "").unwrap();
        let digests = InputHashes::start(paths.to_vec()).unwrap().finish().unwrap();
        assert_eq!(digests, [of_bytes(b"abc"), of_bytes(b"")]);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = InputHashes::start(vec!["no/such/file".into()]).unwrap().finish();
        assert!(error.unwrap_err().to_string().starts_with("no/such/file: cannot read: "));
    }
}
