//! The allowance: how many pages faults may take from the system.
//!
//! What    the governor of a budget gives, faults take; [`Mm::stop_growth`] is for a device that is full.
//! Why     a fault that finds nothing left waits for the evictor: that is what makes a budget real.
//! Races   relaxed atomics. Taking is exact; setting may overwrite what was granted or taken a moment ago.
//! Fails   nothing here fails; a fault without allowance is
//!         [`Starved`](crate::fault::Resolution::Starved).

use uhmm_addr::PageCount;

use super::Mm;
use crate::host::Host;
use crate::sync::Ordering;

impl<H: Host> Mm<H> {
    /// Lets faults take `pages` more pages from the system.
    pub fn grant(&self, pages: PageCount) {
        self.allowance.fetch_add(pages.get(), Ordering::Relaxed);
    }

    /// Sets how many pages faults may take from the system until the next grant.
    pub fn set_allowance(&self, pages: PageCount) {
        self.allowance.store(pages.get(), Ordering::Relaxed);
    }

    /// Lets fresh memory wait ([`Resolution::Starved`](crate::fault::Resolution::Starved)), or not, whatever the
    /// allowance: for a device that is full, on which only pages that come home make room.
    pub fn stop_growth(&self, stop: bool) {
        self.growth_stopped.store(stop, core::sync::atomic::Ordering::Relaxed);
    }

    pub(crate) fn may_grow(&self) -> bool {
        !self.growth_stopped.load(core::sync::atomic::Ordering::Relaxed)
    }

    /// Pages that faults may still take.
    pub fn allowance(&self) -> PageCount {
        PageCount::new(self.allowance.load(Ordering::Relaxed))
    }

    /// Takes up to `most` pages of the allowance; `None` if there is none left.
    pub(crate) fn take_allowance(&self, most: PageCount) -> Option<PageCount> {
        let mut seen = self.allowance.load(Ordering::Relaxed);
        loop {
            let take = seen.min(most.get());
            if take == 0 {
                return None;
            }
            match self.allowance.compare_exchange_weak(
                seen,
                seen - take,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(PageCount::new(take)),
                Err(now) => seen = now,
            }
        }
    }
}
