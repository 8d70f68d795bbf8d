//! A file that appears whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Fills a hidden sibling of `path` and moves it there, over what may stand there. A device or a pipe is
/// written as it is, and of a link the file it leads to.
///
/// # Errors
///
/// What the system or `fill` say; the file is then as it was, and the sibling is gone.
pub fn write(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    /// Tells the files of one process apart.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    if path.metadata().is_ok_and(|found| !found.is_file()) {
        return File::create(path).and_then(|mut file| fill(&mut file));
    }
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    hidden.push(format!(".partial-{}-{number}", std::process::id()));
    let partial = path.with_file_name(hidden);
    let written = File::create(&partial).and_then(|mut file| {
        fill(&mut file)?;
        file.sync_all()?;
        fs::rename(&partial, &path)
    });
    if written.is_err() {
        // Nothing useful can be done if this fails too.
        let _ = fs::remove_file(&partial);
    }
    written
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::io::Write;

    use super::*;

    #[test]
    fn what_fails_leaves_what_was_there_and_nothing_else() {
        let place = tempfile::TempDir::new().unwrap();
        let path = place.path().join("report.json");
        write(&path, |file| file.write_all(b"old")).unwrap();
        let failed = write(&path, |file| {
            file.write_all(b"new")?;
            Err(io::Error::other("no"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }

    /// Names that differ by their end alone, and one of the form that was once used beside them all.
    #[test]
    fn files_side_by_side_do_not_meet() {
        let place = tempfile::TempDir::new().unwrap();
        let paths = ["a.json", "a.csv", "a.partial"].map(|name| place.path().join(name));
        write(&paths[0], |first| {
            first.write_all(b"json")?;
            write(&paths[1], |second| second.write_all(b"csv"))?;
            write(&paths[2], |third| third.write_all(b"partial"))
        })
        .unwrap();
        let found = paths.map(|path| fs::read_to_string(path).unwrap());
        assert_eq!(found, ["json", "csv", "partial"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_stays_one() {
        let place = tempfile::TempDir::new().unwrap();
        let [file, link] = ["file", "link"].map(|name| place.path().join(name));
        fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write(&link, |file| file.write_all(b"new")).unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"new");
    }
}
