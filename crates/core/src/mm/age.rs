//! The age of evicted pages: how much was evicted since.
//!
//! What    a clock that the evictor advances ([`Mm::grow_older`]), eight bits of which are noted in the word of
//!         each page that leaves RAM.
//! Why     what is evicted between a page's leaving and its next touch is its reuse distance
//!         ([`reuse`](crate::pagetable::reuse)), by which the evictor chooses.
//! Races   a relaxed atomic; the clock is a hint. It goes round after 256 steps, eight budgets: a page that stayed away
//!         for so long is taken for a recent one, now and then.
//! Fails   nothing here fails.

use super::Mm;
use crate::host::Host;
use crate::sync::Ordering;

impl<H: Host> Mm<H> {
    /// Another part of the budget has been evicted, of which it has [`STEPS`](crate::pagetable::reuse::STEPS).
    pub fn grow_older(&self) {
        self.age.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn age(&self) -> u8 {
        self.age.load(Ordering::Relaxed) as u8
    }
}
