//! Sending staged pages on to their device, and taking pages back that were not sent.

use alloc::sync::Arc;
use alloc::vec::Vec;

use uhmm_addr::{PageCount, Vpn};

use super::copy::Written;
use crate::fault::Resolution;
use crate::frame::Slot;
use crate::host::Host;
use crate::mm::Mm;
use crate::pagemap::Pagemap;
use crate::pagetable::{PageWord, State};
use crate::stats::{Skip, Skipped};

/// What became of a batch of staged pages.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WriteBack {
    /// Pages that are on the device now, their frames free.
    pub moved: PageCount,
    /// Slots that had been taken back before, or were while the device wrote.
    pub raced: PageCount,
    /// Pages that are still staged because the device had no room.
    pub full: PageCount,
    /// Pages that are still staged because the device failed.
    pub failed: PageCount,
}

impl<H: Host> Mm<H> {
    /// Writes staged slots to `to` and frees their frames. Slots that are no longer staged are passed over;
    /// those that could not be written are handed to `again`.
    pub fn write_back(&self, slots: &[Slot], to: &Arc<Pagemap>, mut again: impl FnMut(Slot)) -> WriteBack {
        let mut result = WriteBack::default();
        let mut claimed = Vec::with_capacity(slots.len());
        let layout = self.layout.read(&self.host);
        for slot in slots {
            let (arena, index) = self.arena_of(*slot);
            // The note may be old if the slot was taken back: the word decides.
            let entry = self.table.get(arena.page_of(index));
            let word = entry.map_or(PageWord::EMPTY, crate::pagetable::Entry::load);
            let ours = word.state() == State::Staged && word.slot() == Some(*slot) && !word.is_writing();
            match entry {
                Some(entry) if ours && entry.exchange(word, word.with_writing(true)).is_ok() => {
                    claimed.push(*slot);
                }
                _ => result.raced = result.raced.plus(PageCount::ONE),
            }
        }
        drop(layout);
        let Written { done, failed } = self.write_slots(&claimed, to);
        result.moved = self.commit_slots(&done, &mut Skipped::default());
        result.raced = result.raced.plus(PageCount::new(done.len()).minus(result.moved));
        let slots: Vec<Slot> = done.iter().map(|(slot, _)| *slot).collect();
        self.free_slots(&slots);
        for (slot, why) in failed {
            let count = if why == Skip::Full { &mut result.full } else { &mut result.failed };
            *count = count.plus(PageCount::ONE);
            if self.unclaim_slot(slot) { again(slot) } else { self.free_slot(slot) }
        }
        result
    }

    /// Gives an owned slot up that was not written: the page goes back to the program.
    pub(super) fn abandon(&self, slot: Slot) {
        if !self.put_back(slot) {
            self.free_slot(slot);
        }
    }

    /// Takes the staged page `page` back; if that cannot be done now it stays staged, where it is safe.
    pub(super) fn bring_back(&self, page: Vpn, word: PageWord) {
        let resolution = self.take_back_now(page, word);
        debug_assert!(!matches!(resolution, Some(Resolution::Poisoned(_))));
    }
}
