//! The allocator of the whole process, ONNX Runtime's part included.
//!
//! A step of one token asks for memory several hundred times, and frees it; training frees and asks for
//! the same few hundred megabytes at every step. jemalloc serves both faster than the C library
//! (`docs/performance.md` has the figures). It is built without a prefix, so that its `malloc` takes
//! the C library's place for every library that is loaded.

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// What jemalloc reads when the process starts; `MALLOC_CONF` in the environment has the last word.
///
/// - `thp:always`: weights and activations lie in huge pages, where the system leaves that to the
///   process (`madvise`).
/// - `oversize_threshold:0`, `dirty_decay_ms:-1`: what is freed is kept for what is asked for next, large
///   blocks too. Given back to the system, its pages would have to be cleared again.
/// - `lg_extent_max_active_fit:12`: a kept block may serve a request of a 4,096th of its size, not of a
///   64th at least; training holds a quarter less for it.
/// - `narenas:1`: what one thread frees serves the others. Large blocks come from one thread at a time,
///   and small ones from each thread's own cache.
// SAFETY: jemalloc declares the name as `const char *`: a pointer to text that ends in NUL and stays.
#[unsafe(export_name = "malloc_conf")]
static CONFIGURATION: &u8 =
    &b"thp:always,oversize_threshold:0,dirty_decay_ms:-1,lg_extent_max_active_fit:12,narenas:1\0"
        [0];
