//! The age of evicted pages: how much was evicted since.
//!
//! What    a clock that the evictor advances ([`Mm::grow_older`]), eight bits of which are noted in the word of
//!         each page that leaves RAM.
//! Why     a page that is touched again soon after it left belongs to what the program works with, though nobody saw
//!         it touched while it was here: it comes home hot. The kernel judges a refault by the same distance
//!         (`mm/workingset.c`).
//! Races   a relaxed atomic; the clock is a hint. It goes round after 256 steps: a page that stayed away for so long is
//!         taken for a recent one, now and then.
//! Fails   nothing here fails.

use super::Mm;
use crate::host::Host;
use crate::sync::Ordering;

impl<H: Host> Mm<H> {
    /// Another part of the budget has been evicted. [`PageWord::SOON`](crate::pagetable::PageWord::SOON) such parts are
    /// a while.
    pub fn grow_older(&self) {
        self.age.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn age(&self) -> u8 {
        self.age.load(Ordering::Relaxed) as u8
    }
}
