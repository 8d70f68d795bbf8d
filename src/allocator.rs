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
// SAFETY: jemalloc declares the name as `const char *`: a pointer to text that ends in NUL and stays.
#[unsafe(export_name = "malloc_conf")]
static CONFIGURATION: &u8 = &b"thp:always,oversize_threshold:0,dirty_decay_ms:-1\0"[0];
