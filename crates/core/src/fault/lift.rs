//! A store to a page that is write-protected: it is being copied out, or the device still has a copy of it.
//!
//! Locks: the layout lock for reading, over the claim and the call.

use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, Vpn};

use super::resolve::{Resolution, Step};
use crate::host::{Host, Stop};
use crate::mm::Mm;
use crate::pagetable::{PageWord, State};
use crate::stats::Counter;

/// The most pages that one store opens for writing.
const LIFT_WINDOW: usize = 16;

impl<H: Host> Mm<H> {
    /// Lifts the protection of a page under a claim of its own: were the page to leave and come back protected
    /// between the look at its word and the call, a store would go unnoticed, and the store be lost with it.
    pub(super) fn lift(&self, page: Vpn, word: PageWord) -> Step {
        let _layout = self.layout.read(&self.host);
        let claim = |page: Vpn, word: PageWord| {
            let claim = match (word.state(), word.pfn()) {
                (State::Coherent, Some(pfn)) => PageWord::moving_in(pfn).claimed_from(word),
                _ => PageWord::filling().with_pinned(word.is_pinned()),
            };
            self.table.entry(page).exchange(word, claim).is_ok()
        };
        if !claim(page, word) {
            return Step::Again;
        }
        let mut was = [word; LIFT_WINDOW];
        let mut claimed = 1;
        if word.is_tracked() {
            self.note_written(page);
            // Where pages are written in order, the neighbours' faults are spared.
            while claimed < LIFT_WINDOW.min(CHUNK_PAGES - page.in_chunk()) {
                let next = page.forward(PageCount::new(claimed));
                let word = self.table.entry(next).load();
                if !word.is_tracked() || self.tracks(page) || !claim(next, word) {
                    break;
                }
                was[claimed] = word;
                claimed += 1;
            }
        }
        let pages = PageCount::new(claimed);
        let range = VaRange::page(page).grow(pages);
        let progress = self.host.write_protect(range, false);
        let lifted = progress.stop != Stop::Pending;
        for (page, word) in range.iter().zip(was) {
            // What is mapped in place has no copy.
            let parted = lifted && word.state() != State::Coherent;
            let left = self.table.entry(page).leave(if parted { word.without_copy() } else { word });
            if parted {
                self.free(word);
            }
            self.after_leave(page, left.wake);
        }
        if !lifted {
            return Step::Done(Resolution::Pending);
        }
        if !progress.is_complete() {
            self.host.wake(range);
        }
        self.stats.add(Counter::Lifted, 1);
        Step::Done(Resolution::Resolved(pages))
    }

    /// Parts a page in RAM from its copy on a device: it stays, writable. `false` if that cannot be done now, or the
    /// word had changed.
    pub(crate) fn drop_copy(&self, page: Vpn, word: PageWord) -> bool {
        let _layout = self.layout.read(&self.host);
        let entry = self.table.entry(page);
        if entry.exchange(word, PageWord::filling().with_pinned(word.is_pinned())).is_err() {
            return false;
        }
        // Until the word says that the copy is gone, whoever wants to write waits.
        let lifted = self.host.write_protect(VaRange::page(page), false).stop != Stop::Pending;
        let left = entry.leave(if lifted { word.without_copy() } else { word });
        if lifted {
            self.free(word);
        }
        self.after_leave(page, left.wake);
        lifted
    }
}
