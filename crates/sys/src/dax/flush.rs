//! Cache lines written back by the processor itself.
//!
//! What     [`lines`]: what was stored to them has left the processor's caches when it returns.
//! Why      memory that is mapped in place has no page cache, and nobody whom one could ask to sync. `clwb` keeps the
//!          line in the cache; older processors have `clflushopt`, and all have `clflush`.
//! Fails    never. On memory that is not persistent it costs time and means nothing.
//! Source   `arch_wb_cache_pmem`, and libpmem's `pmem_flush`.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count, _mm_sfence};
use core::sync::atomic::{AtomicU8, Ordering};

/// The way to flush a line that this processor has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// Written back; the line stays.
    Clwb,
    /// Written back and thrown out, in any order.
    ClflushOpt,
    /// The same in order, one after the other.
    Clflush,
}

/// The best one.
pub fn way() -> Way {
    static KNOWN: AtomicU8 = AtomicU8::new(0);
    let ways = [Way::Clwb, Way::ClflushOpt, Way::Clflush];
    if let Some(way) = ways.get(usize::from(KNOWN.load(Ordering::Relaxed).wrapping_sub(1))) {
        return *way;
    }
    let features = if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).ebx } else { 0 };
    let found = match (features >> 24 & 1, features >> 23 & 1) {
        (1, _) => 0,
        (_, 1) => 1,
        _ => 2,
    };
    KNOWN.store(found + 1, Ordering::Relaxed);
    ways[usize::from(found)]
}

/// Bytes that one instruction flushes.
const LINE: usize = 64;

/// Writes the cache lines of `len` bytes from `start` on back, and orders everything behind that.
///
/// # Safety
/// The bytes must be mapped. (A flush of a page that is not there faults like a load.)
pub unsafe fn lines(start: *const u8, len: usize) {
    let way = way();
    let first = start as usize / LINE * LINE;
    let end = start as usize + len;
    for at in (first..end).step_by(LINE) {
        let line = start.wrapping_offset(at as isize - start as isize);
        // SAFETY: the caller says that the line is mapped, and `way` that the processor has the instruction. None of
        // them changes a byte.
        unsafe {
            match way {
                Way::Clwb => asm!("clwb [{}]", in(reg) line, options(nostack, preserves_flags)),
                Way::ClflushOpt => asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags)),
                Way::Clflush => asm!("clflush [{}]", in(reg) line, options(nostack, preserves_flags)),
            }
        }
    }
    // SAFETY: every x86-64 processor has it.
    unsafe { _mm_sfence() };
}
