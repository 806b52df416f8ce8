//! Whole chunks that leave as one huge page.

use alloc::vec::Vec;

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, VaRange};

use super::Job;
use crate::device::Transfer;
use crate::frame::Slot;
use crate::host::Host;
use crate::mm::Mm;
use crate::pagetable::PageWord;
use crate::stats::{Counter, Skip, Skipped};

impl<H: Host> Mm<H> {
    /// Moves `chunk` to `to` as one huge page. `None` if it is not one, if some page of it may not leave, or
    /// if a huge slot or 512 device pages side by side are wanting: it then goes page by page.
    pub(super) fn migrate_huge(
        &self,
        chunk: VaRange,
        job: &Job<'_>,
        skipped: &mut Skipped,
    ) -> Option<PageCount> {
        let Job { since, to, select, by, .. } = *job;
        // The memory of a coherent device is in small pages.
        let huge = self.huge.as_ref().filter(|_| to.memory().is_none())?;
        if chunk.pages().get() < CHUNK_PAGES || !self.host.is_huge(chunk) {
            return None;
        }
        let run = huge.take_empty(&self.host, Geometry::M2.pages())?;
        let pages = to.allocate_huge()?;
        let layout = self.layout.read(&self.host);
        if self.changed_since(since, chunk) {
            to.put_range(pages);
            return None;
        }
        let willing =
            |page, word: PageWord| word.may_leave() && !word.is_tracked() && self.takes(select, page);
        let claimed = chunk
            .iter()
            .zip(run.slots())
            .take_while(|(page, slot)| {
                let entry = self.table.entry(*page);
                let word = entry.load();
                huge.note(*slot, *page, None);
                willing(*page, word)
                    && entry.exchange(word, PageWord::moving_out(Self::huge_slot(*slot))).is_ok()
            })
            .count();
        let _told = self.tell_migration(chunk, by);
        let mut taken = PageCount::ZERO;
        if claimed == CHUNK_PAGES {
            // SAFETY: the words are claimed, the slots are the run's.
            taken = unsafe { self.host.isolate(chunk, run.address()) }.done;
        }
        if taken.get() < CHUNK_PAGES {
            // The huge page was split under us and perhaps came in part: that part goes back by copying, for
            // which an event may have to be read first.
            for (n, (page, slot)) in chunk.iter().zip(run.slots()).take(claimed).enumerate() {
                let staged = PageWord::staged(Self::huge_slot(slot)).with_writing(true);
                let left =
                    self.table.entry(page).leave(if n < taken.get() { staged } else { PageWord::EMPTY });
                self.after_leave(page, left.wake);
            }
            drop(layout);
            for slot in run.slots().take(taken.get()) {
                self.return_huge_slot(Self::huge_slot(slot));
            }
            if !taken.is_zero() {
                // SAFETY: the slots are the run's, and nobody needs what they hold.
                unsafe { self.host.release(&[run.range()]) };
            }
            to.put_range(pages);
            return None;
        }
        for (page, slot) in chunk.iter().zip(run.slots()) {
            let staged = PageWord::staged(Self::huge_slot(slot)).with_writing(true);
            let left = self.table.entry(page).leave(staged);
            self.after_leave(page, left.wake);
        }
        drop(layout);
        self.stats.add(Counter::MovedOut, CHUNK_PAGES);
        let run = run.filled();
        // SAFETY: the frame is the run's; faulters only read it.
        let mut batch = [unsafe { Transfer::new(to.device_page(pages.start), run.as_ptr(), run.pages()) }];
        to.device().write(&mut batch);
        let failed = batch[0].outcome().err().map(Skip::from);
        let mut moved = PageCount::ZERO;
        if let Some(why) = failed {
            skipped.add(why, CHUNK_PAGES);
            to.put_range(pages);
            for slot in run.slots() {
                self.return_huge_slot(Self::huge_slot(slot));
            }
        } else {
            let pfn = |n| pages.start.forward(PageCount::new(n));
            let slots = run.slots().enumerate();
            let written: Vec<_> = slots.map(|(n, slot)| (Self::huge_slot(slot), pfn(n))).collect();
            moved = self.commit_slots(&written, skipped);
        }
        self.stats.add(Counter::Written, moved.get());
        Some(moved)
    }

    /// Copies a page of a huge frame back to the program, whose frame the run keeps.
    fn return_huge_slot(&self, slot: Slot) {
        loop {
            let (page, word) = self.settled_word(slot);
            if word.slot() != Some(slot) {
                return;
            }
            // The frame goes back to the pool when this returns, so that there is no giving up: events that
            // are pending will be read by somebody else.
            let _ = self.take_back_now(page, word);
            crate::sync::relax();
        }
    }
}
