//! A directory that appears whole or not at all.
//!
//! Everything is written into a hidden sibling, `.NAME.partial-PID-N`, then synced and renamed.
//! Whoever is interrupted by an error removes the sibling on the way out. A killed process cannot:
//! its sibling stays until the next directory is made at the same path, which knows by the lock each living
//! writer holds on its directory that nobody works there any more.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::output::Output;
use super::{Error, manifest};

/// An unlocked sibling younger than this may belong to a process about to lock it.
const SETTLED: Duration = Duration::from_mins(1);

/// How output files are created; tests put a full disk here.
pub type Open = fn(&Path) -> io::Result<File>;

/// Refuses what must not be replaced.
pub type Replaceable = fn(&Path) -> Result<(), Error>;

/// A directory in the making. Dropped before [`Staging::commit`], it leaves nothing.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    partial: PathBuf,
    parent: PathBuf,
    replace: Option<Replaceable>,
    needed: u64,
    open: Open,
    /// Keeps the lock that tells this directory from a dead process's.
    _lock: File,
}

impl Staging {
    /// Prepares to create `target`.
    ///
    /// # Errors
    ///
    /// [`Error::Exists`] without `force`; with it, [`Error::NotReplaceable`] for anything but an
    /// empty directory or one that holds an earlier export and nothing else.
    pub fn begin(target: &Path, force: bool) -> Result<Self, Error> {
        let replace: Option<Replaceable> = force.then_some(manifest::replaceable);
        Self::begin_with(target, replace, |path| File::create_new(path))
    }

    /// [`Staging::begin`] for directories of other kinds, which say what they may replace, and with
    /// another way to create files.
    pub fn begin_with(
        target: &Path,
        replace: Option<Replaceable>,
        open: Open,
    ) -> Result<Self, Error> {
        let target = free(target, replace)?;
        let name = target.file_name().ok_or_else(|| Error::NoName(target.clone()))?.to_owned();
        let parent = match target.parent() {
            Some(parent) if parent != Path::new("") => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        remove_abandoned(&parent, &name);
        let (partial, lock) = create_partial(&parent, &name)?;
        Ok(Self { target, partial, parent, replace, needed: 0, open, _lock: lock })
    }

    /// Where it is being filled.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Checks that the disk has room for `bytes`, and remembers them for later messages.
    ///
    /// # Errors
    ///
    /// [`Error::NoSpace`] with both numbers.
    pub fn require(&mut self, bytes: u64) -> Result<(), Error> {
        self.needed = bytes;
        match available(&self.parent) {
            Some(available) if available < bytes => Err(self.no_space()),
            _ => Ok(()),
        }
    }

    /// Starts the file `name`, which may lie in a directory of the directory.
    pub fn create(&self, name: &str) -> Result<Output, Error> {
        let path = self.partial.join(name);
        if let Some(parent) = path.parent().filter(|parent| *parent != self.partial) {
            fs::create_dir_all(parent).map_err(|e| self.explain(name, e))?;
        }
        let file = (self.open)(&path).map_err(|e| self.explain(name, e))?;
        Ok(Output::new(name, file))
    }

    /// Writes a small file, whole.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let mut output = self.create(name)?;
        let written = output.write_all(bytes).and_then(|()| output.finish().map(drop));
        written.map_err(|error| self.explain(name, error))
    }

    /// Makes `name` another name of the file at `source`, if the file system can; false if not.
    pub fn link(&self, source: &Path, name: &str) -> Result<bool, Error> {
        // A link to a symbolic link would lead out of the directory, and runtimes refuse those.
        let source = source.canonicalize().map_err(|e| Error::io("resolve", source, e))?;
        match fs::hard_link(&source, self.partial.join(name)) {
            Ok(()) => Ok(true),
            Err(error) => match error.kind() {
                // Another file system, one without links, too many, or a file of someone else.
                io::ErrorKind::CrossesDevices
                | io::ErrorKind::Unsupported
                | io::ErrorKind::TooManyLinks
                | io::ErrorKind::PermissionDenied => Ok(false),
                _ => Err(self.explain(name, error)),
            },
        }
    }

    /// What a failed write of file `name` means, with the final path and the sizes.
    pub fn explain(&self, name: &str, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => self.no_space(),
            _ => Error::io("write", &self.target.join(name), error),
        }
    }

    fn no_space(&self) -> Error {
        Error::NoSpace {
            path: self.target.clone(),
            needed: self.needed,
            available: available(&self.parent).unwrap_or_default(),
        }
    }

    /// Makes the directory appear under its name.
    ///
    /// # Errors
    ///
    /// [`Error::Exists`] if something took the name meanwhile.
    pub fn commit(self) -> Result<(), Error> {
        sync_directory(&self.partial)?;
        match self.replace {
            Some(replaceable) if self.target.symlink_metadata().is_ok() => {
                replaceable(&self.target)?;
                self.exchange()?;
            }
            _ => self.rename()?,
        }
        sync_directory(&self.parent)
        // Dropping `self` removes what now lies under the partial name: the replaced artifact,
        // or nothing.
    }

    fn rename(&self) -> Result<(), Error> {
        match renameat_with(CWD, &self.partial, CWD, &self.target, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => Err(Error::Exists(self.target.clone())),
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                if self.target.symlink_metadata().is_ok() {
                    return Err(Error::Exists(self.target.clone()));
                }
                self.move_to(&self.partial, &self.target)
            }
            Err(errno) => Err(Error::io("create", &self.target, errno.into())),
        }
    }

    /// Swaps the new directory with the one that has its name.
    fn exchange(&self) -> Result<(), Error> {
        match renameat_with(CWD, &self.partial, CWD, &self.target, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(()),
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                let mut aside = self.partial.clone().into_os_string();
                aside.push("-old");
                let aside = PathBuf::from(aside);
                self.move_to(&self.target, &aside)?;
                if let Err(error) = self.move_to(&self.partial, &self.target) {
                    self.move_to(&aside, &self.target)?;
                    return Err(error);
                }
                self.move_to(&aside, &self.partial)
            }
            Err(errno) => Err(Error::io("replace", &self.target, errno.into())),
        }
    }

    fn move_to(&self, from: &Path, to: &Path) -> Result<(), Error> {
        fs::rename(from, to).map_err(|e| Error::io("create", &self.target, e))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Nothing useful can be done if this fails too; the next export tries again.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

/// Where `target` is to stand, if it may.
pub(super) fn free(target: &Path, replace: Option<Replaceable>) -> Result<PathBuf, Error> {
    if target.symlink_metadata().is_err() {
        return Ok(target.to_path_buf());
    }
    let Some(replaceable) = replace else { return Err(Error::Exists(target.to_path_buf())) };
    let target = target.canonicalize().map_err(|e| Error::io("resolve", target, e))?;
    replaceable(&target)?;
    Ok(target)
}

fn partial_prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".partial-");
    prefix
}

fn create_partial(parent: &Path, name: &OsStr) -> Result<(PathBuf, File), Error> {
    /// Tells the exports of one process apart.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let mut partial = partial_prefix(name);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        partial.push(format!("{}-{number}", std::process::id()));
        let partial = parent.join(partial);
        match fs::create_dir(&partial) {
            Ok(()) => {
                let lock = File::open(&partial).map_err(|e| Error::io("open", &partial, e))?;
                // Without locks (some network file systems) abandoned siblings are never removed.
                let _ = lock.try_lock();
                return Ok((partial, lock));
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io("create a directory in", parent, error)),
        }
    }
}

/// Removes the siblings that dead processes left.
fn remove_abandoned(parent: &Path, name: &OsStr) {
    let prefix = partial_prefix(name);
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let entry_name = entry.file_name();
        let ours = entry_name.as_encoded_bytes().starts_with(prefix.as_encoded_bytes());
        if ours && entry.file_type().is_ok_and(|kind| kind.is_dir()) && abandoned(&entry.path()) {
            // Best effort: an abandoned directory costs disk space and nothing else.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn abandoned(directory: &Path) -> bool {
    let settled = |file: &File| {
        let modified = file.metadata().and_then(|metadata| metadata.modified()).ok()?;
        Some(SystemTime::now().duration_since(modified).ok()? > SETTLED)
    };
    File::open(directory)
        .is_ok_and(|file| settled(&file).unwrap_or(false) && file.try_lock().is_ok())
}

/// Bytes an unprivileged process may still write beside `path`.
fn available(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn sync_directory(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| Error::io("sync", path, e))
}
