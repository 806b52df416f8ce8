//! Space for what is going to be written, taken ahead of it.
//!
//! What     [`Ahead::reach`] has the file system find blocks for the next [`STEP`] of a file when the first byte of
//!          them is written.
//! Why      a write into a hole has ext4 lock the file against everybody while it lasts, reads included: half a
//!          millisecond for a fault that happens to come then. Into blocks that it has, it writes beside the reads.
//! Races    each step is claimed by one writer. Another one may write into it before it is done, as if into a hole.
//! Fails    in silence, once: where there is not so much space, or no such call, writes go into holes.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FallocateFlags;
use uhmm_addr::ByteSize;

/// How much is taken at a time.
const STEP: u64 = ByteSize::mib(64).bytes();
/// Nothing is taken any more.
const OFF: u64 = u64::MAX;

/// Up to where a file has blocks for what is going to be written.
#[derive(Debug)]
pub(super) struct Ahead {
    end: AtomicU64,
}

impl Ahead {
    /// From the beginning of a file on; or never.
    pub(super) const fn new(wanted: bool) -> Self {
        Self { end: AtomicU64::new(if wanted { 0 } else { OFF }) }
    }

    /// Bytes up to `end` of a file of `size` bytes are about to be written.
    pub(super) fn reach(&self, fd: BorrowedFd<'_>, end: u64, size: u64) {
        let mut from = self.end.load(Ordering::Relaxed);
        while end > from {
            let to = end.next_multiple_of(STEP).min(size);
            match self.end.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed) {
                Err(now) => from = now,
                Ok(_) => {
                    let taken = rustix::io::retry_on_intr(|| {
                        rustix::fs::fallocate(fd, FallocateFlags::KEEP_SIZE, from, to - from)
                    });
                    if taken.is_err() {
                        self.end.store(OFF, Ordering::Relaxed);
                    }
                    return;
                }
            }
        }
    }
}
