//! The files of an artifact in the making, each hashed as it is written.

use std::io::{self, Write};
use std::path::Path;

use super::Error;
use super::clients;
use super::hash::Digest;
use super::manifest::FileRecord;
use super::output::Output;
use super::staging::Staging;

/// The files of the artifact in the making.
pub(crate) struct Files<'a> {
    staging: &'a Staging,
    records: Vec<FileRecord>,
}

impl<'a> Files<'a> {
    /// None yet.
    pub(crate) const fn new(staging: &'a Staging) -> Self {
        Self { staging, records: Vec::new() }
    }

    /// Starts a file that [`Files::close`] ends.
    pub(crate) fn create(&self, name: &str) -> Result<Output, Error> {
        self.staging.create(name)
    }

    /// What a failed write of file `name` means.
    pub(crate) fn explain(&self, name: &str, error: io::Error) -> Error {
        self.staging.explain(name, error)
    }

    /// Writes a JSON file.
    pub(crate) fn json(&mut self, name: &str, value: &impl serde::Serialize) -> Result<(), Error> {
        self.write(name, &clients::json(name, value)?)
    }

    /// Writes a small file.
    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let mut output = self.staging.create(name)?;
        output.write_all(bytes).map_err(|error| self.staging.explain(name, error))?;
        self.close(output)
    }

    /// Copies a file under its own name.
    pub(crate) fn copy(&mut self, path: &Path) -> Result<(), Error> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.copy_as(path, &name)
    }

    pub(super) fn copy_as(&mut self, path: &Path, name: &str) -> Result<(), Error> {
        const BUFFER: usize = 4 << 20;
        let read = |error| Error::io("read", path, error);
        let mut file = std::fs::File::open(path).map_err(read)?;
        let mut output = self.staging.create(name)?;
        let size = file.metadata().map_err(read)?.len();
        let mut buffer = vec![0; BUFFER.min(size as usize + 1)];
        loop {
            match io::Read::read(&mut file, &mut buffer) {
                Ok(0) => return self.close(output),
                Ok(count) => output
                    .write_all(&buffer[..count])
                    .map_err(|error| self.staging.explain(name, error))?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(read(error)),
            }
        }
    }

    pub(crate) fn close(&mut self, output: Output) -> Result<(), Error> {
        let name = output.name().to_owned();
        let digest = output.finish().map_err(|error| self.staging.explain(&name, error))?;
        self.record(&name, digest);
        Ok(())
    }

    pub(super) fn record(&mut self, name: &str, digest: Digest) {
        self.records.push(record(name.to_owned(), digest));
    }

    /// Whether a file of this name was written.
    pub(super) fn has(&self, name: &str) -> bool {
        self.records.iter().any(|record| record.name == name)
    }

    /// The records, by name.
    pub(crate) fn finish(mut self) -> Vec<FileRecord> {
        self.records.sort_by(|a, b| a.name.cmp(&b.name));
        self.records
    }
}

/// What the manifest says of a file.
pub(super) fn record(name: String, Digest { size, sha256 }: Digest) -> FileRecord {
    FileRecord { name, size, sha256 }
}
