//! How freed memory is kept.

/// Keeps what is freed for what is asked for next.
///
/// Training frees and asks for the same few hundred megabytes at every step. Left alone, the C library
/// gives them back to the system, which has to clear each page again: a twentieth of the time.
#[cfg(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu"))]
pub(super) fn keep_freed() {
    /// The most that may be set: what is larger is asked of the system each time.
    const LARGEST: libc::c_int = 32 << 20;
    // SAFETY: both calls set a number; what they do not accept they leave.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu")))]
pub(super) const fn keep_freed() {}
