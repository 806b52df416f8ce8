//! How many pages are away, by chunk: what saves a look at 512 words that all say the same.
//!
//! What    [`Away`], counters of pages whose words do not say that they are in RAM ([`PageWord::is_at_home`]). Where one is
//!         zero, every word of its chunks says so.
//! Why     most chunks have all their pages in RAM, and a look at their words takes longer than the system takes to say how
//!         a huge page is mapped.
//! How     counted by the transitions themselves ([`Entry`](super::Entry)): before a word says that its page is away, and
//!         after it says that it is back. So a counter never says less than there are.
//! Races   *look against a move*: the count is read after the page map. A page that the map says is there, and that leaves
//!         then, was there; one that had left by then was counted before it did.
//! Bounds  chunks share counters, [`COUNTERS`] of them: 8 GiB have one for each chunk. Pages that are away elsewhere make a
//!         look slower, and no more.
//! Fails   nothing here fails.
//!
//! [`PageWord::is_at_home`]: super::PageWord::is_at_home

use alloc::boxed::Box;

use crate::sync::{AtomicU32, zeroed};

const COUNTERS: usize = if cfg!(loom) { 1 } else { 4096 };
/// Counters of chunks that follow each other lie in different cache lines.
const APART: usize = if cfg!(loom) { 1 } else { 16 };

/// The counters.
pub(super) struct Away(Box<[AtomicU32]>);

impl Away {
    /// No page is away.
    pub(super) fn new() -> Self {
        // SAFETY: an atomic zero is all bytes zero, and the default.
        Self(unsafe { zeroed(COUNTERS) })
    }

    /// That of chunk number `chunk`.
    pub(super) fn of(&self, chunk: usize) -> &AtomicU32 {
        let n = chunk % COUNTERS;
        &self.0[n % APART * (COUNTERS / APART) + n / APART]
    }
}
