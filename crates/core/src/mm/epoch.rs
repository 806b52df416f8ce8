//! The history of the program's mappings, as far back as anybody needs it.
//!
//! What    [`Epoch`], a moment in it, and a ring of the ranges that ceased to be what they were.
//! Why     a list of managed ranges is older than the last change: whoever takes a page out asks whether its
//!         mapping is still the one that was registered.
//! Locks   changes are noted under the layout lock held for writing; an answer holds for as long as whoever
//!         asked holds the lock.
//! Fails   on the safe side: what lies further back than the ring counts as changed.

use uhmm_addr::{PageCount, VaRange, Vpn};

use super::Mm;
use crate::host::Host;
use crate::sync::{Ordering, WriteGuard};

/// Unmapped ranges that are remembered.
pub(super) const CHANGES: usize = 128;

/// A moment in the history of the program's mappings; see [`Mm::epoch`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Epoch(usize);

impl<H: Host> Mm<H> {
    pub(super) fn note_change(&self, _layout: &WriteGuard<'_, H>, range: VaRange) {
        let number = self.epoch.load(Ordering::Relaxed);
        let [first, pages] = &self.changes[number % CHANGES];
        first.store(range.first().get(), Ordering::Relaxed);
        pages.store(range.pages().get(), Ordering::Relaxed);
        self.epoch.store(number + 1, Ordering::Release);
    }

    /// The present moment in the history of the program's mappings.
    ///
    /// Who keeps a list of managed ranges takes the moment *before* the list is made, and hands it to
    /// [`Mm::collect`](crate::migrate): a page may be taken out only while its mapping is registered, for a
    /// touch of it would otherwise be filled with zeros behind our back.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// Whether some of `range` ceased to be what it was since `since`. May say so wrongly when much has
    /// changed since then. The answer stays true while the caller holds the layout lock.
    pub fn changed_since(&self, since: Epoch, range: VaRange) -> bool {
        let now = self.epoch.load(Ordering::Acquire);
        let missed = now - since.0;
        missed > CHANGES
            || (since.0..now).any(|number| {
                let [first, pages] = &self.changes[number % CHANGES];
                let changed = VaRange::of_pages(
                    Vpn::new(first.load(Ordering::Relaxed)),
                    PageCount::new(pages.load(Ordering::Relaxed)),
                );
                changed.is_some_and(|changed| changed.intersect(range).is_some())
            })
    }
}
