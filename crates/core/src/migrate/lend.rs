//! Pages that a device alone may touch (the kernel's `make_device_exclusive_range`).
//!
//! What    [`Mm::lend`] takes pages out as for a device, and leaves them in their slots on loan: their words say
//!         exclusive, the slots who the holder is. [`Mm::end_loans`] has loans end without bringing the pages home.
//! Why     write-protecting a page shuts out stores only. Its frame is taken from the program's addresses, so that a
//!         load traps as well; the device works on the frame where it lies.
//! Owns    the word owns the slot, as that of a staged page does. The holder owns nothing: what it knows of the frame
//!         lies in its mirror's table, and goes when it is told.
//! Locks   the layout lock for reading, over the change of a word; inside it the mirrors', where a loan ends.
//! Races   *a touch between isolation and loan*: the page went home, and counts as raced. *two holders*: the second one
//!         brings the page home, of which the first is told; the slot's note tells whose loan a word speaks of.
//! Fails   page by page, with a reason.

use uhmm_addr::{PageCount, VaRange};

use super::collect::Select;
use super::isolate::Isolated;
use crate::frame::{Holder, Slot};
use crate::host::Host;
use crate::mm::{Epoch, Mm};
use crate::notifier::{Event, Owner};
use crate::pagetable::{PageWord, State};
use crate::stats::{Skip, Skipped};

impl<H: Host> Mm<H> {
    /// Lends the present pages of `range`, registered since before `since`, to `holder`, as the doing of `by`. Those
    /// that were not are counted.
    pub(crate) fn lend(
        &self,
        range: VaRange,
        since: Epoch,
        by: Option<Owner>,
        holder: Holder,
        skipped: &mut Skipped,
    ) {
        let mut rest = Some(range);
        while let Some(part) = rest {
            let (collected, looked_at) = self.collect(part, since, Select::All, skipped);
            rest = part.skip(looked_at);
            let isolated = collected.and_then(|collected| collected.by(by).for_loan().isolate(skipped));
            if let Some(isolated) = isolated {
                isolated.lend(holder, skipped);
            }
        }
    }

    /// The same for an owned slot whose word says staged and writing. `false` if the page went home meanwhile: the slot
    /// is then the caller's.
    fn lend_slot(&self, slot: Slot, holder: Holder) -> bool {
        let (arena, index) = self.arena_of(slot);
        // The holder is going to write.
        if let Some(copy) = arena.take_copy(index) {
            self.pagemaps.of(copy).put(copy);
        }
        arena.lend(index, holder);
        self.lends.store(true, core::sync::atomic::Ordering::Relaxed);
        let _layout = self.layout.read(&self.host);
        loop {
            let (page, word) = self.settled_word(slot);
            if word.slot() != Some(slot) {
                return false;
            }
            let lent = PageWord::exclusive(slot).with_pinned(word.is_pinned()).reused_like(word);
            if self.table.entry(page).exchange(word, lent).is_ok() {
                return true;
            }
        }
    }

    /// Whether a page was ever lent.
    pub fn has_lent(&self) -> bool {
        self.lends.load(core::sync::atomic::Ordering::Relaxed)
    }

    /// Ends loans of pages of `range` that `select` takes, up to `most`, for whoever is short of memory: the holders are
    /// told, and the pages are staged from then on. Hands out every slot.
    pub fn end_loans(
        &self,
        range: VaRange,
        select: Select,
        most: PageCount,
        mut queue: impl FnMut(Slot),
    ) -> PageCount {
        let mut ended = PageCount::ZERO;
        for page in self.table.used(range).flat_map(VaRange::iter) {
            if ended >= most {
                break;
            }
            let entry = self.table.entry(page);
            let word = entry.load();
            let (State::Exclusive, Some(slot)) = (word.state(), word.slot()) else { continue };
            if !self.takes(select, page) {
                continue;
            }
            let layout = self.layout.read(&self.host);
            if entry.exchange(word, PageWord::moving_back(slot).claimed_from(word)).is_err() {
                continue;
            }
            let told = self.tell(VaRange::page(page), Event::Exclusive);
            let left = entry.leave(PageWord::staged(slot).reused_like(word));
            debug_assert!(!left.discarded, "the layout lock keeps discards out");
            self.after_leave(page, left.wake);
            drop(told);
            // Before anything is allocated.
            drop(layout);
            queue(slot);
            ended = ended.plus(PageCount::ONE);
        }
        ended
    }
}

impl<H: Host> Isolated<'_, H> {
    /// Leaves the pages in their slots, on loan to `holder`. Those that went home meanwhile are counted.
    fn lend(mut self, holder: Holder, skipped: &mut Skipped) {
        for run in core::mem::take(&mut self.runs) {
            for slot in run.slots() {
                if !self.mm.lend_slot(slot, holder) {
                    skipped.add(Skip::Raced, 1);
                    self.mm.free_slot(slot);
                }
            }
            run.dissolve();
        }
    }
}
