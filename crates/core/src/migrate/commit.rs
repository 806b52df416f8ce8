//! Last phase: say in the page words that the pages are on the device, and free the frames.

use uhmm_addr::{Geometry, PageCount, Pfn};

use super::copy::Copied;
use crate::frame::Slot;
use crate::host::Host;
use crate::mm::Mm;
use crate::pagetable::PageWord;
use crate::stats::{Skip, Skipped};

impl<H: Host> Copied<'_, H> {
    /// Commits. Pages that were touched meanwhile are home again and count as raced. Returns how many are on
    /// the device now.
    pub fn commit(mut self, skipped: &mut Skipped) -> PageCount {
        let pages = core::mem::take(&mut self.pages);
        let moved = self.mm.commit_slots(&pages, skipped);
        let slots: alloc::vec::Vec<Slot> = pages.iter().map(|(slot, _)| *slot).collect();
        self.mm.free_slots(&slots);
        moved
    }
}

impl<H: Host> Drop for Copied<'_, H> {
    fn drop(&mut self) {
        for (slot, pfn) in core::mem::take(&mut self.pages) {
            self.mm.pagemaps().of(pfn).put(pfn);
            self.mm.abandon(slot);
        }
    }
}

impl<H: Host> Mm<H> {
    /// The contents of owned slots are on these pages: makes the words say so. Pages that went home meanwhile,
    /// or were given up, count as raced, and their device pages are freed. The slots stay the caller's. Returns
    /// how many are on the device now.
    pub(super) fn commit_slots(&self, pages: &[(Slot, Pfn)], skipped: &mut Skipped) -> PageCount {
        let _layout = self.layout.read(&self.host);
        let mut moved = 0;
        for (slot, pfn) in pages {
            if self.commit_word(*slot, *pfn) {
                moved += 1;
            } else {
                skipped.add(Skip::Raced, 1);
                self.pagemaps.of(*pfn).put(*pfn);
            }
        }
        PageCount::new(moved)
    }

    fn commit_word(&self, slot: Slot, pfn: Pfn) -> bool {
        loop {
            let (page, word) = self.settled_word(slot);
            if word.slot() != Some(slot) {
                return false;
            }
            let next = PageWord::device(pfn).with_pinned(word.is_pinned()).reused_like(word).aged(self.age());
            if self.table.entry(page).exchange(word, next).is_ok() {
                return true;
            }
        }
    }

    /// Frees owned slots with frames in them, and the copies noted with them; slots of 4 KiB frames that lie
    /// side by side in one step.
    pub(super) fn free_slots(&self, slots: &[Slot]) {
        let mut rest = slots;
        while let Some(first) = rest.first() {
            let (arena, index) = self.arena_of(*first);
            let len = 1 + rest.windows(2).take_while(|pair| pair[1].get() == pair[0].get() + 1).count();
            let (run, others) = rest.split_at(len);
            for slot in run {
                if let Some(copy) = arena.take_copy(self.arena_of(*slot).1) {
                    self.pagemaps.of(copy).put(copy);
                }
            }
            if arena.unit() == Geometry::K4 {
                drop(arena.adopt_run(&self.host, index, PageCount::new(len)));
            }
            rest = others;
        }
    }
}
