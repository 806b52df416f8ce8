//! A staged page that was touched again, or one that was lent to a device: it moves back from its slot in the arena.
//!
//! Locks: the layout lock for reading, from the claim to the end of it. Inside it the mirrors', where the page was
//! lent: the device has its hands off the frame before anything happens to that.

use core::ptr::NonNull;

use uhmm_addr::{Geometry, PageCount, VaRange, Vpn};

use super::decide::Access;
use super::resolve::{Resolution, Step};
use crate::host::{Host, Install, Stop};
use crate::mm::Mm;
use crate::notifier::Event;
use crate::pagetable::{PageWord, State};
use crate::stats::Counter;

impl<H: Host> Mm<H> {
    pub(super) fn take_back(&self, page: Vpn, word: PageWord, access: Access) -> Step {
        let Some(slot) = word.slot() else { return Step::Again };
        let layout = self.layout.read(&self.host);
        let entry = self.table.entry(page);
        if entry.exchange(word, PageWord::moving_back(slot).claimed_from(word)).is_err() {
            return Step::Again;
        }
        let range = VaRange::page(page);
        let _told = (word.state() == State::Exclusive).then(|| self.tell(range, Event::Exclusive));
        let (arena, index) = self.arena_of(slot);
        let source = NonNull::new(arena.address(index).get() as *mut u8).expect("slots have addresses");
        let copy = arena.copy_of(index);
        let keep_copy = !word.is_writing() && copy.is_some() && access == Access::Read && self.tracks(page);
        let home = if let (true, Some(pfn)) = (keep_copy, copy) {
            PageWord::tracked(pfn)
        } else {
            PageWord::INSTALLED
        };
        let how = if keep_copy { Install::Tracked } else { Install::Writable };
        let mut moved = false;
        let mut stop = Stop::Refused;
        // One page is copied sooner than every processor is made to forget where its frame was; but a copy takes
        // a frame from the system.
        let takes_move = !word.is_writing() && !keep_copy;
        let copying = takes_move && self.take_allowance(PageCount::ONE).is_some();
        if takes_move && !copying {
            // SAFETY: the slot came out of the word by the exchange above: it is ours.
            let progress = unsafe { self.host.install(arena.address(index), range) };
            moved = progress.is_complete();
            stop = progress.stop;
        }
        if stop == Stop::Refused {
            // SAFETY: as above; while a device reads the slot, it holds the contents all the same.
            stop = unsafe { self.host.install_copy(source, range, how) }.stop;
            if copying && stop != Stop::Complete {
                self.grant(PageCount::ONE);
            }
        }
        if !matches!(stop, Stop::Complete | Stop::Present | Stop::Unmapped | Stop::Exiting) {
            let left = entry.leave(word);
            self.after_leave(page, left.wake);
            return Step::Done(match stop {
                Stop::NoMemory => Resolution::Starved,
                Stop::Pending | Stop::Busy => Resolution::Pending,
                _ => {
                    // The contents are safe where they are; the thread tries again.
                    self.host.wake(range);
                    Resolution::Resolved(PageCount::ZERO)
                }
            });
        }
        // Installed, or present already, or the mapping is not ours any more: home as far as we are
        // concerned. Nothing was discarded meanwhile, because the layout lock was held all the time.
        if keep_copy && stop == Stop::Complete {
            arena.take_copy(index);
        }
        let home = if stop == Stop::Complete { home } else { PageWord::RESIDENT };
        let left = entry.leave(home.reused_like(word).hotter());
        drop(layout);
        if !word.is_writing() {
            if let Some(copy) = arena.take_copy(index) {
                self.pagemaps.of(copy).put(copy);
            }
            if arena.unit() == Geometry::K4 {
                let run = arena.adopt(&self.host, index);
                if moved { drop(run.emptied()) } else { drop(run) }
            }
        }
        if stop != Stop::Complete {
            // Nothing was installed, which would have woken the threads that wait in the kernel.
            self.host.wake(range);
        }
        self.after_leave(page, left.wake);
        self.stats.add(Counter::TakenBack, 1);
        Step::Done(Resolution::Resolved(PageCount::ONE))
    }

    /// Takes a staged or lent page back outside of a fault. `None` if the word had changed.
    pub(crate) fn take_back_now(&self, page: Vpn, word: PageWord) -> Option<Resolution> {
        match self.take_back(page, word, Access::Write) {
            Step::Done(resolution) => Some(resolution),
            Step::Again => None,
        }
    }

    /// Wakes whoever left the waited flag on a word that has come to rest.
    pub(crate) fn after_leave(&self, page: Vpn, wake: bool) {
        if wake {
            self.wake(VaRange::page(page));
        }
    }
}
