//! Threads of our own, which may touch managed memory under claims of their own.
//!
//! Why     a handler that finds one of them waiting for a page that it has claimed itself must not wait for it.

use std::sync::atomic::{AtomicU32, Ordering};

use uhmm_addr::VaRange;
use uhmm_core::host::Host;

use super::{Managed, this_thread};

/// So many at a time.
pub(super) const OURS: usize = 16;

/// A thread that is one of ours for a while; see [`Managed::lend_thread`].
#[derive(Debug)]
#[must_use = "the thread is taken off again when this is dropped"]
pub struct Lent<'a> {
    slot: &'a AtomicU32,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.slot.store(0, Ordering::Release);
    }
}

/// In the place of a thread of ours: it is not one for the moment. Thread numbers are smaller.
const AWAY: u32 = 1 << 31;

/// A thread of ours that is none for a while; its place is kept.
struct Withdrawn<'a> {
    slot: Option<&'a AtomicU32>,
    tid: u32,
}

impl Drop for Withdrawn<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            slot.store(self.tid, Ordering::Release);
        }
    }
}

impl Managed {
    /// Notes that the calling thread is one of ours for good, and may touch managed memory under its own claims.
    pub fn note_ours(&self) {
        let tid = this_thread();
        let free =
            |slot: &&AtomicU32| slot.compare_exchange(0, tid, Ordering::AcqRel, Ordering::Acquire).is_ok();
        let noted = self.ours.iter().find(free).is_some();
        debug_assert!(noted, "more threads of our own than there is room for");
    }

    /// Notes the calling thread as one of ours until the guard is dropped: it is about to migrate.
    pub fn lend_thread(&self) -> Lent<'_> {
        let tid = this_thread();
        loop {
            let free = |slot: &&AtomicU32| {
                slot.compare_exchange(0, tid, Ordering::AcqRel, Ordering::Acquire).is_ok()
            };
            if let Some(slot) = self.ours.iter().find(free) {
                return Lent { slot };
            }
            rustix::thread::sched_yield();
        }
    }

    /// Makes the calling thread nobody of ours until the guard is dropped.
    fn withdraw_thread(&self) -> Withdrawn<'_> {
        let tid = this_thread();
        let slot = self.ours.iter().find(|slot| slot.load(Ordering::Relaxed) == tid);
        if let Some(slot) = slot {
            slot.store(tid | AWAY, Ordering::Release);
        }
        Withdrawn { slot, tid }
    }

    /// Whether the thread is one of ours.
    pub fn is_ours(&self, tid: u32) -> bool {
        self.ours.iter().any(|ours| ours.load(Ordering::Acquire) == tid)
    }

    /// Gives the process frames of its own for pages of `range` that it shares with a child or a parent since a
    /// fork: such a page is busy until somebody writes to it. To be called with no lock held.
    pub fn unshare(&self, range: VaRange) {
        // A page may be under another thread's claim, and is waited for like anybody's: filled past that claim,
        // it would be zeros, and its contents be lost.
        let _away = self.withdraw_thread();
        let mut found = [VaRange::page(range.first()); 32];
        let mut rest = Some(range);
        while let Some(part) = rest {
            let (count, end) = self.mm.host().present(part, &mut found);
            // Present ones only: the others would come home for this.
            for present in &found[..count] {
                self.mm.host().unshare(*present);
            }
            rest = VaRange::of_pages(end, part.end_page().since(end));
        }
    }
}
