//! A page that is on a device: a window of claimed pages is read into frames of the arena, or into the bounce
//! buffer where frames cannot take the page's place.
//!
//! Locks: none across the transfer; the claim keeps everybody else off the page.

use uhmm_addr::{CHUNK_PAGES, PAGE_SIZE, PageCount, Pfn, VaRange, Vpn};

use super::resolve::{Resolution, Step};
use super::scratch::{MAX_WINDOW, Scratch};
use super::window::{Direction, Window};
use crate::device::{Transfer, TransferError};
use crate::frame::{Framed, Run};
use crate::host::{Host, Stop};
use crate::mm::Mm;
use crate::notifier::Event;
use crate::pagetable::{PageWord, State};

/// The most runs of frames that one window is put together from.
pub(super) const RUNS: usize = 8;

impl<H: Host> Mm<H> {
    pub(super) fn fetch(
        &self,
        page: Vpn,
        word: PageWord,
        asked: Window,
        tracked: bool,
        scratch: &mut Scratch,
    ) -> Step {
        if let Some(step) = self.fetch_huge(page, word) {
            return step;
        }
        let Some((mut first, claimed)) = self.claim_window(page, word, asked, scratch) else {
            return Step::Again;
        };
        let _told = self.tell(VaRange::page(first).grow(claimed), Event::Migrate);
        // Frames: a tracked page must be copied in; otherwise free frames of the arena take its place. A copy
        // takes a page from the system, whatever it is made from, and that is what the allowance is for. One page
        // by itself is copied as well: to copy it is faster than to have every processor forget where its frame was.
        let mut runs: [Option<Run<'_, Framed, H>>; RUNS] = [const { None }; RUNS];
        let mut framed = PageCount::ZERO;
        if !tracked && self.host.can_move() && claimed > PageCount::ONE {
            for run in &mut runs {
                let missing = claimed.minus(framed);
                if missing.is_zero() {
                    break;
                }
                *run = self.arena.take_framed(&self.host, missing);
                let Some(run) = run else { break };
                framed = framed.plus(run.pages());
            }
        }
        let (window, copying) = if framed.is_zero() {
            match self.take_allowance(claimed) {
                Some(pages) => (pages, true),
                None => {
                    self.give_up(first, PageCount::ZERO, claimed, scratch);
                    return Step::Done(Resolution::Starved);
                }
            }
        } else {
            (framed, false)
        };
        if window < claimed {
            // The touched page is at one end of the window; the other end gives.
            let over = claimed.minus(window);
            if first == page {
                self.give_up(first, window, over, scratch);
            } else {
                self.give_up(first, PageCount::ZERO, over, scratch);
                scratch.pfns.copy_within(over.get()..claimed.get(), 0);
                first = first.forward(over);
            }
        }
        if window < asked.pages {
            self.windows.clipped(page, asked, window);
        }
        let touched = page.since(first);
        if let Err(error) = self.read_window(window, &runs, scratch) {
            // Only the page that was touched is worth a second attempt by itself.
            self.give_up(first, PageCount::ZERO, touched, scratch);
            let behind = touched.plus(PageCount::ONE);
            self.give_up(first, behind, window.minus(behind), scratch);
            scratch.pfns[0] = scratch.pfns[touched.get()];
            if self.read_window(PageCount::ONE, &runs, scratch).is_err() {
                if copying {
                    self.grant(window);
                }
                if scratch.sparing {
                    // Nobody asked for it: where it is, a touch may find it yet.
                    self.leave_on_device(page, scratch.pfns[0]);
                    return Step::Done(Resolution::Resolved(PageCount::ZERO));
                }
                return self.lose(page, scratch.pfns[0], error);
            }
            let touched = PageCount::ZERO;
            let step = self.install_window(page, touched, PageCount::ONE, runs, copying, tracked, scratch);
            if copying {
                self.grant(window.minus(PageCount::ONE));
            }
            return step;
        }
        self.install_window(first, touched, window, runs, copying, tracked, scratch)
    }

    /// Claims `page`, and the pages of its chunk that follow it in the window's direction on the same device.
    /// Returns the first page of the claimed ones and their number; `page` is the first or the last of them.
    fn claim_window(
        &self,
        page: Vpn,
        word: PageWord,
        window: Window,
        scratch: &mut Scratch,
    ) -> Option<(Vpn, PageCount)> {
        let pfn = word.pfn()?;
        // Those that come with the page that was touched are about to be: they are used alike.
        let now = self.age();
        let claim = |page: Vpn, word: PageWord, pfn: Pfn| {
            let moving = PageWord::moving_in(pfn).claimed_from(word).refaulted(now);
            self.table.entry(page).exchange(word, moving).is_ok()
        };
        if !claim(page, word, pfn) {
            return None;
        }
        scratch.pfns[0] = pfn;
        let device = self.pagemaps.of(pfn);
        let room = match window.direction {
            Direction::Up => CHUNK_PAGES - page.in_chunk(),
            Direction::Down => page.in_chunk() + 1,
        };
        let most = room.min(MAX_WINDOW.get()).min(window.pages.get());
        let mut claimed = 1;
        while claimed < most {
            let next = match window.direction {
                Direction::Up => page.forward(PageCount::new(claimed)),
                Direction::Down => page.back(PageCount::new(claimed)),
            };
            let word = self.table.entry(next).load();
            let on_device = word.pfn().filter(|pfn| word.state() == State::Device && device.contains(*pfn));
            let Some(pfn) = on_device.filter(|pfn| claim(next, word, *pfn)) else { break };
            scratch.pfns[claimed] = pfn;
            claimed += 1;
        }
        let first = match window.direction {
            Direction::Up => page,
            Direction::Down => {
                scratch.pfns[..claimed].reverse();
                page.back(PageCount::new(claimed - 1))
            }
        };
        Some((first, PageCount::new(claimed)))
    }

    /// Gives the claims on `pages` pages from the `skip`th on back: the contents stay on the device.
    pub(super) fn give_up(&self, page: Vpn, skip: PageCount, pages: PageCount, scratch: &Scratch) {
        for n in skip.get()..skip.get() + pages.get() {
            self.leave_on_device(page.forward(PageCount::new(n)), scratch.pfns[n]);
        }
    }

    pub(super) fn leave_on_device(&self, page: Vpn, pfn: Pfn) {
        let entry = self.table.entry(page);
        let claim = entry.load();
        let stays = if claim.is_tracked() { PageWord::tracked(pfn) } else { PageWord::device(pfn) };
        let left = entry.leave(stays.with_past_of(claim));
        if left.discarded {
            self.pagemaps.of(pfn).put(pfn);
        }
        self.after_leave(page, left.wake);
    }

    /// Reads the first `window` claimed pages into the runs' frames, or into the bounce buffer.
    fn read_window(
        &self,
        window: PageCount,
        runs: &[Option<Run<'_, Framed, H>>; RUNS],
        scratch: &mut Scratch,
    ) -> Result<(), TransferError> {
        let map = self.pagemaps.of(scratch.pfns[0]);
        scratch.transfers.clear();
        let mut from_runs = runs.iter().flatten().flat_map(|run| {
            let base = run.as_ptr();
            (0..run.pages().get()).map(move |n| {
                // SAFETY: inside the run, which is that long.
                unsafe { base.add(n * PAGE_SIZE) }
            })
        });
        for n in 0..window.get() {
            let ram = from_runs.next().unwrap_or_else(|| {
                // SAFETY: the bounce buffer has room for a whole window.
                unsafe { scratch.bounce.add(n * PAGE_SIZE) }
            });
            // SAFETY: the frames belong to the runs, the buffer to the scratch; nobody else reads or writes
            // them before the call of the device below has returned.
            unsafe { scratch.transfers.push(map.device_page(scratch.pfns[n]), ram) };
        }
        let batch = scratch.transfers.as_mut_slice();
        if scratch.ahead {
            map.device().read_ahead(batch);
        } else {
            map.device().read(batch);
        }
        batch.iter().try_for_each(Transfer::outcome)
    }

    /// The contents of a claimed page are lost.
    fn lose(&self, page: Vpn, pfn: Pfn, why: TransferError) -> Step {
        let entry = self.table.entry(page);
        // First, as the program may end by any of the next steps.
        self.stats.lose(page);
        if entry.load().is_tracked() {
            // The fault may have been an old one, and the page be there: only its copy is lost then.
            match self.host.poison(VaRange::page(page)).stop {
                Stop::Pending => {
                    self.stats.find_again(page);
                    self.leave_on_device(page, pfn);
                    return Step::Done(Resolution::Pending);
                }
                Stop::Present => {
                    self.stats.find_again(page);
                    let _ = entry.leave(PageWord::RESIDENT);
                    self.pagemaps.of(pfn).put(pfn);
                    self.wake(VaRange::page(page));
                    return Step::Done(Resolution::Resolved(PageCount::ZERO));
                }
                _ => {}
            }
        }
        let left = entry.leave(PageWord::POISONED);
        self.pagemaps.of(pfn).put(pfn);
        if left.discarded {
            self.stats.find_again(page);
            self.after_leave(page, true);
            return Step::Again;
        }
        self.poison(page, Some(why))
    }
}
