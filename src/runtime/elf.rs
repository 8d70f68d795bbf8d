//! Whether a file is a shared library this process can map, told from its ELF headers.
//!
//! The dynamic loader refuses what is no library, but it maps a truncated one, and the first touch
//! of a missing page then kills the process. So the headers are read before anything is loaded.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::library::Rejection;

/// Size of a 64-bit ELF header.
const HEADER: usize = 64;
/// Size of a 64-bit program header.
const PROGRAM_HEADER: usize = 56;
/// Segment type of what is mapped.
const PT_LOAD: u32 = 1;
/// Segment type of what the dynamic loader reads.
const PT_DYNAMIC: u32 = 2;
/// Entries of that: a library that is needed, and where its name and the others are.
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_STRSZ: u64 = 10;
/// Most bytes of either.
const MOST: u64 = 64 << 20;
/// File type of shared objects.
const ET_DYN: u16 = 3;

/// Checks that `path` is a complete 64-bit little-endian shared library for this processor.
pub(super) fn check(path: &Path) -> Result<(), Rejection> {
    let file = File::open(path).map_err(Rejection::Unreadable)?;
    let size = file.metadata().map_err(Rejection::Unreadable)?.len();
    examine(file, size).map(drop)
}

/// The libraries that the one in `path` names as needed, in its order.
pub(super) fn needed(path: &Path) -> Result<Vec<String>, Rejection> {
    let mut file = File::open(path).map_err(Rejection::Unreadable)?;
    let size = file.metadata().map_err(Rejection::Unreadable)?.len();
    let segments = examine(&mut file, size)?;
    let segments = || segments.chunks_exact(PROGRAM_HEADER);
    let part = |file: &mut File, start: u64, length: u64| {
        let end = start.saturating_add(length);
        if end > size || length > MOST {
            return Err(Rejection::Truncated { size, needed: end });
        }
        file.seek(SeekFrom::Start(start)).map_err(Rejection::Unreadable)?;
        read(file, length as usize)
    };
    let Some(dynamic) = segments().find(|segment| u32_at(segment, 0) == PT_DYNAMIC) else {
        return Ok(Vec::new());
    };
    let entries = part(&mut file, u64_at(dynamic, 8), u64_at(dynamic, 32))?;
    let entries = || entries.chunks_exact(16).map(|entry| (u64_at(entry, 0), u64_at(entry, 8)));
    let value = |tag| entries().find(|(own, _)| *own == tag).map(|(_, value)| value);
    let (Some(address), Some(length)) = (value(DT_STRTAB), value(DT_STRSZ)) else {
        return Ok(Vec::new());
    };
    // The table's place is an address in memory; the segment around it says where in the file.
    let place = segments().find_map(|segment| {
        let (offset, begin) = (u64_at(segment, 8), u64_at(segment, 16));
        let inside = address.checked_sub(begin).filter(|at| *at < u64_at(segment, 32))?;
        (u32_at(segment, 0) == PT_LOAD).then(|| offset.saturating_add(inside))
    });
    let Some(place) = place else { return Ok(Vec::new()) };
    let names = part(&mut file, place, length)?;
    let name = |at: u64| {
        let rest = names.get(usize::try_from(at).ok()?..)?;
        Some(String::from_utf8_lossy(rest.split(|byte| *byte == 0).next()?).into_owned())
    };
    Ok(entries().filter(|(tag, _)| *tag == DT_NEEDED).filter_map(|(_, at)| name(at)).collect())
}

/// The program headers of a complete library.
fn examine(mut file: impl Read + Seek, size: u64) -> Result<Vec<u8>, Rejection> {
    let header = read(&mut file, HEADER)?;
    if header.len() < HEADER || !header.starts_with(b"\x7fELF") {
        return Err(Rejection::NotALibrary);
    }
    let (class, order, machine) = (header[4], header[5], u16_at(&header, 18));
    if (class, order, machine) != (2, 1, MACHINE) {
        return Err(Rejection::Architecture { found: machine_name(class, machine) });
    }
    if u16_at(&header, 16) != ET_DYN {
        return Err(Rejection::NotALibrary);
    }
    let start = u64_at(&header, 32);
    let length = usize::from(u16_at(&header, 56)) * PROGRAM_HEADER;
    let end = start.saturating_add(length as u64);
    if end > size {
        return Err(Rejection::Truncated { size, needed: end });
    }
    file.seek(SeekFrom::Start(start)).map_err(Rejection::Unreadable)?;
    let segments = read(&mut file, length)?;
    for segment in segments.chunks_exact(PROGRAM_HEADER) {
        let needed = u64_at(segment, 8).saturating_add(u64_at(segment, 32));
        if u32_at(segment, 0) == PT_LOAD && needed > size {
            return Err(Rejection::Truncated { size, needed });
        }
    }
    Ok(segments)
}

/// The next `length` bytes, or as many as there are.
fn read(file: &mut impl Read, length: usize) -> Result<Vec<u8>, Rejection> {
    let mut bytes = Vec::new();
    file.take(length as u64).read_to_end(&mut bytes).map_err(Rejection::Unreadable)?;
    Ok(bytes)
}

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;
#[cfg(target_arch = "riscv64")]
const MACHINE: u16 = 243;

fn machine_name(class: u8, machine: u16) -> String {
    match (class, machine) {
        (_, 3) => "32-bit x86".to_owned(),
        (_, 40) => "32-bit ARM".to_owned(),
        (_, 62) => "x86_64".to_owned(),
        (_, 183) => "aarch64".to_owned(),
        (_, 243) => "riscv".to_owned(),
        (1, other) => format!("32-bit, ELF machine {other}"),
        (_, other) => format!("ELF machine {other}"),
    }
}

/// The little-endian field at `at`, which lies inside a header that was read whole.
fn field<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| header.get(at + i).copied().unwrap_or_default())
}

fn u16_at(header: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(header, at))
}

fn u32_at(header: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(header, at))
}

fn u64_at(header: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(header, at))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn examine(bytes: &[u8], size: u64) -> Result<(), Rejection> {
        super::examine(Cursor::new(bytes), size).map(drop)
    }

    #[test]
    fn what_a_program_needs_is_read() {
        let names = needed(&std::env::current_exe().unwrap()).unwrap();
        assert!(names.iter().any(|name| name.starts_with("libc.so.")), "{names:?}");
    }

    /// A header and one mapped segment of 4,096 bytes at offset 0.
    fn library() -> Vec<u8> {
        let mut bytes = vec![0; HEADER + PROGRAM_HEADER];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16] = 3;
        bytes[18..20].copy_from_slice(&MACHINE.to_le_bytes());
        bytes[32] = HEADER as u8;
        bytes[56] = 1;
        bytes[HEADER] = PT_LOAD as u8;
        bytes[HEADER + 32..HEADER + 40].copy_from_slice(&4096_u64.to_le_bytes());
        bytes
    }

    #[test]
    fn a_whole_library_passes() {
        assert!(examine(&library(), 4096).is_ok());
    }

    #[test]
    fn a_truncated_one_is_refused() {
        let error = examine(&library(), 4095).unwrap_err();
        assert!(matches!(error, Rejection::Truncated { size: 4095, needed: 4096 }), "{error}");
    }

    #[test]
    fn program_headers_outside_the_file_are_refused() {
        let mut bytes = library();
        bytes[56] = 9;
        assert!(matches!(examine(&bytes, 200), Err(Rejection::Truncated { .. })));
        bytes[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(examine(&bytes, 4096), Err(Rejection::Truncated { .. })));
    }

    #[test]
    fn another_processors_is_named() {
        let mut bytes = library();
        bytes[18] = if MACHINE == 183 { 62 } else { 183 };
        let error = examine(&bytes, 4096).unwrap_err().to_string();
        let other = if MACHINE == 183 { "x86_64" } else { "aarch64" };
        assert!(error.contains(other) && error.contains(std::env::consts::ARCH), "{error}");
    }

    #[test]
    fn text_and_executables_are_no_library() {
        assert!(matches!(examine(b"#!/bin/sh", 9), Err(Rejection::NotALibrary)));
        let mut bytes = library();
        bytes[16] = 2;
        assert!(matches!(examine(&bytes, 4096), Err(Rejection::NotALibrary)));
    }
}
