//! Who is looking at what might be taken away.
//!
//! What    [`Readers`]: a reader says that it begins and ends, by one atomic operation each in a shard of its own;
//!         whoever has taken something away waits with [`Readers::synchronize`] until nobody can still be looking at
//!         it (the kernel's SRCU).
//! Why     a look-up must cost no more than the table, and must not hand out what is being freed.
//! Order   a reader is counted before it looks, and a writer takes away before it counts, with a fence between on both
//!         sides: either the writer counts the reader, or the reader finds nothing.
//! Fails   nothing here fails. A reader that never ends lets a writer wait for ever; readers do not block.

use crate::sync::{AtomicU32, Ordering, Park, fence};

const SHARDS: usize = if cfg!(loom) { 1 } else { 16 };
/// Looks before the writer sleeps.
const SPINS: u32 = if cfg!(loom) { 1 } else { 512 };

/// Readers of the even and of the odd periods.
#[derive(Default)]
#[repr(align(64))]
struct Shard {
    active: [AtomicU32; 2],
}

/// Counts of readers.
#[derive(Default)]
pub(super) struct Readers {
    shards: [Shard; SHARDS],
    // Its lowest bit says where new readers are counted, so that a writer does not wait for those who come later.
    period: AtomicU32,
}

/// A reader, until dropped.
pub(super) struct Reading<'r> {
    active: &'r AtomicU32,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.active.fetch_sub(1, Ordering::Release);
    }
}

impl Readers {
    pub(super) fn begin(&self) -> Reading<'_> {
        // Threads have stacks of their own: whose this is tells them apart well enough.
        let here = 0_u8;
        let shard = (core::ptr::from_ref(&here).addr() >> 16) % SHARDS;
        let period = self.period.load(Ordering::Relaxed) as usize & 1;
        let active = &self.shards[shard].active[period];
        active.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        Reading { active }
    }

    /// Waits until everybody has ended who began before the call.
    pub(super) fn synchronize(&self, park: &dyn Park) {
        fence(Ordering::SeqCst);
        // A reader may have read the period long ago and be counted just now: both counts are waited for, whoever else
        // changes the period meanwhile. That is changed so that those who come later are counted elsewhere.
        let old = self.period.fetch_add(1, Ordering::AcqRel) as usize & 1;
        self.shards.iter().for_each(|shard| Self::wait(&shard.active[old], park));
        self.period.fetch_add(1, Ordering::AcqRel);
        self.shards.iter().for_each(|shard| Self::wait(&shard.active[old ^ 1], park));
    }

    fn wait(active: &AtomicU32, park: &dyn Park) {
        let mut spins = 0;
        loop {
            let readers = active.load(Ordering::Acquire);
            if readers == 0 {
                return;
            }
            if spins < SPINS {
                spins += 1;
                crate::sync::relax();
            } else {
                // Readers wake nobody; they end soon, and sleeping ends by itself.
                park.park(active, readers);
            }
        }
    }
}
