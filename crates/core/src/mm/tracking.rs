//! Clean copies: whether a page that comes home keeps its page on the device.
//!
//! What    [`Mm::set_tracking`], for all; `tracks`, by chunk, from what became of its pages before.
//! Why     a clean copy saves a transfer on the way out, and costs a fault at the first write.
//! Policy  a write counts four, a page that left while its copy was good takes one back; from eight on a chunk's
//!         pages are not tracked.
//! Races   hints in relaxed atomics, by hash. A lost update, or two chunks on one hint, cost a fault or a
//!         transfer.

use uhmm_addr::Vpn;

use super::Mm;
use crate::host::Host;
use crate::sync::{AtomicU32, Ordering};

pub(super) const PRONE: usize = 1024;

impl<H: Host> Mm<H> {
    /// Switches the keeping of clean copies on or off, for instance when a device runs full of them.
    pub fn set_tracking(&self, track: bool) {
        self.track.store(track, core::sync::atomic::Ordering::Relaxed);
    }

    /// Whether a page read now should be write-protected to keep its device copy: not where pages have
    /// been written soon after they were read.
    pub(crate) fn tracks(&self, page: Vpn) -> bool {
        self.track.load(core::sync::atomic::Ordering::Relaxed) && self.prone(page).load(Ordering::Relaxed) < 8
    }

    pub(crate) fn note_written(&self, page: Vpn) {
        let prone = self.prone(page);
        let seen = prone.load(Ordering::Relaxed);
        prone.store((seen + 4).min(32), Ordering::Relaxed);
    }

    pub(crate) fn note_clean(&self, page: Vpn) {
        let prone = self.prone(page);
        let seen = prone.load(Ordering::Relaxed);
        prone.store(seen.saturating_sub(1), Ordering::Relaxed);
    }

    fn prone(&self, page: Vpn) -> &AtomicU32 {
        &self.prone[page.chunk().wrapping_mul(0x9e37_79b9) % PRONE]
    }
}
