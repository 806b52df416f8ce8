//! A chunk that left as one huge page comes home as one.
//!
//! Locks: as for single pages: none across the transfer, the layout lock for reading over the installing.

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, Pfn, PfnRange, VaRange, Vpn};

use super::install::Arrival;
use super::resolve::{Resolution, Step};
use crate::device::Transfer;
use crate::host::{Host, Stop};
use crate::mm::Mm;
use crate::notifier::Event;
use crate::pagetable::PageWord;
use crate::stats::Counter;

impl<H: Host> Mm<H> {
    /// Brings a whole chunk home as one huge page, if it left as one and a huge frame is free.
    pub(super) fn fetch_huge(&self, page: Vpn, word: PageWord) -> Option<Step> {
        let huge = self.huge.as_ref()?;
        let chunk = page.chunk_base();
        let first = Pfn::new(word.pfn()?.get().checked_sub(page.in_chunk() as u64)?);
        let expected = |n: usize| PageWord::device(first.forward(PageCount::new(n)));
        let aligned = self.pagemaps.of(word.pfn()?).is_chunk(first);
        let ends = [0, CHUNK_PAGES - 1].map(|n| {
            let entry = self.table.get(chunk.forward(PageCount::new(n)));
            entry.is_some_and(|entry| entry.load().without_past() == expected(n))
        });
        if word.is_tracked() || !aligned || ends != [true, true] {
            return None;
        }
        let run = huge.take_framed(&self.host, Geometry::M2.pages())?;
        let claimed = (0..CHUNK_PAGES)
            .take_while(|n| {
                let pfn = first.forward(PageCount::new(*n));
                let entry = self.table.entry(chunk.forward(PageCount::new(*n)));
                let word = entry.load();
                word.without_past() == expected(*n)
                    && entry.exchange(word, PageWord::moving_in(pfn).claimed_from(word)).is_ok()
            })
            .count();
        let put_back = |range: core::ops::Range<usize>| {
            for n in range {
                let n = PageCount::new(n);
                self.leave_on_device(chunk.forward(n), first.forward(n));
            }
        };
        if claimed < CHUNK_PAGES {
            put_back(0..claimed);
            return None;
        }
        let map = self.pagemaps.of(first);
        let range = VaRange::page(chunk).grow(Geometry::M2.pages());
        let _told = self.tell(range, Event::Migrate);
        // SAFETY: the frame is the run's, which nobody else touches.
        let mut batch = [unsafe { Transfer::new(map.device_page(first), run.as_ptr(), run.pages()) }];
        map.device().read(&mut batch);
        let layout = self.layout.read(&self.host);
        let whole = self.wanted(chunk, PageCount::ZERO, Geometry::M2.pages()).get() == CHUNK_PAGES;
        if batch[0].outcome().is_err() || !whole {
            drop(layout);
            put_back(0..CHUNK_PAGES);
            return None;
        }
        // SAFETY: as above.
        let progress = unsafe { self.host.install(run.address(), range) };
        if !progress.is_complete() {
            // What arrived stays; the rest is still on the device, and its frames are let go.
            for n in 0..progress.done.get() {
                let n = PageCount::new(n);
                self.settle_home(chunk.forward(n), &[first.forward(n)], Arrival::There);
            }
            drop(layout);
            put_back(progress.done.get()..CHUNK_PAGES);
            // SAFETY: the run is ours.
            unsafe { self.host.release(&[run.range()]) };
            drop(run.emptied());
            return Some(Step::Done(match progress.stop {
                _ if progress.done.get() > page.in_chunk() => Resolution::Resolved(progress.done),
                Stop::Pending => Resolution::Pending,
                _ => return None,
            }));
        }
        for n in 0..CHUNK_PAGES {
            let page = chunk.forward(PageCount::new(n));
            let left = self.table.entry(page).leave(PageWord::RESIDENT);
            self.after_leave(page, left.wake);
        }
        map.put_range(PfnRange::new(first, Geometry::M2.pages()));
        drop(layout);
        drop(run.emptied());
        self.stats.add(Counter::MovedIn, CHUNK_PAGES);
        Some(Step::Done(Resolution::Resolved(Geometry::M2.pages())))
    }
}
