//! The frames of a space: from the slot that a page word names to its arena, and back to the pool.
//!
//! What    one row of numbers over both arenas; `free` and `free_slot`, for what a word owned;
//!         [`Mm::release_frames`], for frames that nobody needs.
//! Owns    whoever took a payload out of a word owns it, and gives it up here. A slot of 2 MiB stays with the
//!         migration that took it, which gives it back.
//! Locks   the pool's gate, inside the arena.
//! Fails   nothing here fails.

use uhmm_addr::{Geometry, PageCount, VaRange, VirtAddr, Vpn};

use super::Mm;
use crate::frame::{Arena, Holder, Slot};
use crate::host::Host;
use crate::pagetable::{PageWord, State};

/// Slots of the 2 MiB arena are numbered from here on.
const HUGE_SLOTS: u32 = 1 << 31;
/// Runs of frames that are released together.
const RUNS: usize = 32;

impl<H: Host> Mm<H> {
    pub(crate) fn arena_of(&self, slot: Slot) -> (&Arena, Slot) {
        match &self.huge {
            Some(huge) if slot.get() >= HUGE_SLOTS => (huge, Slot::new(slot.get() - HUGE_SLOTS)),
            _ => (&self.arena, slot),
        }
    }

    pub(crate) const fn huge_slot(slot: Slot) -> Slot {
        Slot::new(slot.get() + HUGE_SLOTS)
    }

    /// The address of the slot that a page word names.
    pub fn slot_address(&self, slot: Slot) -> VirtAddr {
        let (arena, slot) = self.arena_of(slot);
        arena.address(slot)
    }

    /// Who has the frame of the slot that a page word names as lent.
    pub(crate) fn holder_of(&self, slot: Slot) -> Holder {
        let (arena, slot) = self.arena_of(slot);
        arena.holder_of(slot)
    }

    /// Lets up to `most` free frames of the arena go back to the system. Returns how many went.
    pub fn release_frames(&self, most: PageCount) -> PageCount {
        let mut released = PageCount::ZERO;
        loop {
            let mut runs: [_; RUNS] = [const { None }; RUNS];
            let mut ranges = [VaRange::page(Vpn::new(0)); RUNS];
            let mut taken = 0;
            while taken < RUNS && released < most {
                let Some(run) = self.arena.take_framed(&self.host, most.minus(released)) else { break };
                released = released.plus(run.pages());
                ranges[taken] = run.range();
                runs[taken] = Some(run);
                taken += 1;
            }
            if taken == 0 {
                return released;
            }
            // SAFETY: the runs are ours, and become empty ones.
            unsafe { self.host.release(&ranges[..taken]) };
            runs.into_iter().flatten().for_each(|run| drop(run.emptied()));
        }
    }

    /// Frees what a word owned that has just become something else.
    pub(crate) fn free(&self, word: PageWord) {
        if let Some(pfn) = word.pfn() {
            self.pagemaps.of(pfn).put(pfn);
        }
        if let (State::Staged | State::Exclusive, Some(slot)) = (word.state(), word.slot())
            && !word.is_writing()
        {
            self.free_slot(slot);
        }
    }

    /// Frees an owned slot with a frame in it, and the copy noted with it.
    pub(crate) fn free_slot(&self, slot: Slot) {
        let (arena, slot) = self.arena_of(slot);
        if let Some(copy) = arena.take_copy(slot) {
            self.pagemaps.of(copy).put(copy);
        }
        if arena.unit() == Geometry::K4 {
            drop(arena.adopt(&self.host, slot));
        }
    }
}
