//! The tile unit itself: permission, configuration, the kernel.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Of a tile: 16 rows of 64.
pub(super) const BYTES: usize = 1024;

/// 16 × 32 `bf16`, row by row.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile(pub(super) [u8; BYTES]);

/// Whether processor and kernel let this process use tiles of `bf16`.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| processor() && permitted())
}

fn processor() -> bool {
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    let vectors = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16");
    // With AVX-512 there is a leaf 7.
    vectors && __cpuid_count(7, 0).edx & (BF16 | TILES) == BF16 | TILES
}

/// Asks the kernel for the eight kilobytes of state, for all threads. An older kernel refuses.
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call reads its two numbers and no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// Eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// # Safety
///
/// [`available`] has said yes.
pub(super) unsafe fn configure() {
    // SAFETY: the configuration is a valid one; nothing else uses tiles.
    unsafe {
        asm!(
            "ldtilecfg [{}]",
            in(reg) &raw const CONFIGURATION,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// Ends the use of tiles, so that the kernel need not save them.
///
/// # Safety
///
/// [`available`] has said yes.
pub(super) unsafe fn release() {
    // SAFETY: nothing else uses tiles.
    unsafe {
        asm!(
            "tilerelease",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nomem, nostack, preserves_flags),
        );
    }
}

/// `c = a · b`, or that added, for a panel of 32 rows and one of 32 columns: `c` is 32 × 32 with
/// `columns` elements from row to row.
///
/// A step of `a` and of `b` is four tiles: high halves of the first 16 rows (or columns) and of the
/// others, then the low halves. Of `b` a tile's row holds pairs, one of each column.
///
/// # Safety
///
/// The tiles are configured; `a` and `b` have whole steps, as many as each other; `c` can be written.
pub(super) unsafe fn multiply(
    a: &[Tile],
    b: &[Tile],
    c: *mut f32,
    columns: usize,
    accumulate: bool,
) {
    debug_assert!(a.len() == b.len() && a.len().is_multiple_of(super::TILES) && !a.is_empty());
    let stride = columns * size_of::<f32>();
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "test {load:e}, {load:e}",
            "jz 2f",
            "tileloadd tmm0, [{c} + {stride}*1]",
            "tileloadd tmm1, [{c} + {stride}*1 + 64]",
            "tileloadd tmm2, [{lower} + {stride}*1]",
            "tileloadd tmm3, [{lower} + {stride}*1 + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            // high(a) · high(b)
            "tileloadd tmm4, [{a} + {row}*1]",
            "tileloadd tmm6, [{b} + {row}*1]",
            "tileloadd tmm5, [{a} + {row}*1 + 1024]",
            "tileloadd tmm7, [{b} + {row}*1 + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // high(a) · low(b)
            "tileloadd tmm6, [{b} + {row}*1 + 2048]",
            "tileloadd tmm7, [{b} + {row}*1 + 3072]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // low(a) · high(b)
            "tileloadd tmm4, [{a} + {row}*1 + 2048]",
            "tileloadd tmm6, [{b} + {row}*1]",
            "tileloadd tmm5, [{a} + {row}*1 + 3072]",
            "tileloadd tmm7, [{b} + {row}*1 + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 4096",
            "add {b}, 4096",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c} + {stride}*1], tmm0",
            "tilestored [{c} + {stride}*1 + 64], tmm1",
            "tilestored [{lower} + {stride}*1], tmm2",
            "tilestored [{lower} + {stride}*1 + 64], tmm3",
            load = in(reg) u32::from(accumulate),
            a = inout(reg) a.as_ptr() => _,
            b = inout(reg) b.as_ptr() => _,
            c = in(reg) c,
            lower = in(reg) c.byte_add(16 * stride),
            stride = in(reg) stride,
            row = in(reg) 64_usize,
            steps = inout(reg) a.len() / super::TILES => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
