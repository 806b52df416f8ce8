//! Fresh memory: an absent page that was never written, or was discarded, is filled with zeros.
//!
//! Locks: the layout lock for reading, over the claim and the filling.

use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, Vpn};

use super::decide::Access;
use super::resolve::{Resolution, Step};
use super::scratch::Scratch;
use super::window::FILL_WINDOW;
use crate::host::{Host, Install, Stop};
use crate::mm::Mm;
use crate::pagetable::{PageWord, State};
use crate::stats::Counter;

impl<H: Host> Mm<H> {
    /// Fills absent pages with zeros. They are claimed for that: between a look at the word and the filling, a
    /// page may be filled by another handler, written by the program and taken out by the evictor, and zeros
    /// must not take the place of what is in its slot then.
    pub(super) fn fill(&self, page: Vpn, word: PageWord, access: Access, scratch: &Scratch) -> Step {
        let _layout = self.layout.read(&self.host);
        let write = access == Access::Write;
        if word.state() == State::Moving {
            // A thread of our own, past its own claim, which stays. With the zero page, which takes nothing of the
            // allowance: the thread may be the very one that would make room.
            let (_, step) = self.fill_claimed(page, PageCount::ONE, false, scratch);
            return Step::Done(step);
        }
        let mut was = [PageWord::EMPTY; FILL_WINDOW];
        let claim = |n: usize, word: PageWord| {
            let entry = self.table.entry(page.forward(PageCount::new(n)));
            entry.exchange(word, PageWord::filling().with_pinned(word.is_pinned())).is_ok()
        };
        if !claim(0, word) {
            return Step::Again;
        }
        was[0] = word;
        let room = self.windows.fill().min(CHUNK_PAGES - page.in_chunk());
        let claimed = 1 + (1..room).take_while(|n| claim(*n, PageWord::EMPTY)).count();
        let mut most = PageCount::new(claimed);
        let (done, resolution) = loop {
            let (done, resolution) = self.fill_claimed(page, most, write, scratch);
            // The window may reach past the mapping; a page by itself cannot.
            if done.is_zero() && resolution == Resolution::Unmanaged && most > PageCount::ONE {
                most = PageCount::ONE;
                continue;
            }
            break (done, resolution);
        };
        for (n, was) in was[..claimed].iter().enumerate() {
            let page = page.forward(PageCount::new(n));
            let filled = n < done.get();
            let left = self.table.entry(page).leave(if filled { PageWord::EMPTY } else { *was });
            self.after_leave(page, left.wake);
            if filled {
                // A page that was mapped in place, and given up without a word to us.
                self.free(*was);
            }
        }
        Step::Done(match resolution {
            // Already there, or not ours: the thread's next attempt tells.
            Resolution::Unmanaged => {
                self.host.wake(VaRange::page(page));
                Resolution::Resolved(PageCount::ZERO)
            }
            resolution => resolution,
        })
    }

    /// Fills up to `most` pages. Returns how many, and what that means; `Unmanaged` where nothing could be.
    fn fill_claimed(
        &self,
        page: Vpn,
        most: PageCount,
        write: bool,
        scratch: &Scratch,
    ) -> (PageCount, Resolution) {
        let taken = match write {
            true if self.may_grow() => self.take_allowance(most),
            true => None,
            false => Some(most),
        };
        let Some(pages) = taken else { return (PageCount::ZERO, Resolution::Starved) };
        let range = VaRange::page(page).grow(pages);
        let progress = if write {
            // SAFETY: the scratch keeps a window of zeros.
            unsafe { self.host.install_copy(scratch.zeros, range, Install::Writable) }
        } else {
            self.host.install_zero(range)
        };
        if write {
            self.grant(pages.minus(progress.done));
        }
        self.stats.add(Counter::Filled, progress.done.get());
        let resolution = match progress.stop {
            _ if !progress.done.is_zero() => Resolution::Resolved(progress.done),
            Stop::Pending => Resolution::Pending,
            Stop::NoMemory => Resolution::Starved,
            _ => Resolution::Unmanaged,
        };
        (progress.done, resolution)
    }
}
