//! Pages with nothing in them: they get a page on the device without a copy.
//!
//! How     device pages are allocated and made to read as zeros ([`Device::zero`](crate::device::Device::zero)),
//!         with no lock held. Then the words are claimed, and under the claims it is looked once more whether there
//!         is nothing: with the words claimed, every touch of the pages waits.
//! Races   a page that was filled between the two looks stays what it is.
//! Locks   the layout lock for reading, from the claims to the end of them. Nothing is allocated under it.
//! Fails   page by page: the device is full, refuses to forget what its pages held, or the page was filled.
//!
//! The zero page, which a read brings, is a page here: it goes as one, moved or copied.

use alloc::sync::Arc;
use alloc::vec::Vec;

use uhmm_addr::{CHUNK_PAGES, PageCount, PfnRange, VaRange};

use super::Migrated;
use crate::host::Host;
use crate::mm::{Epoch, Mm};
use crate::notifier::Owner;
use crate::pagemap::Pagemap;
use crate::pagetable::PageWord;
use crate::stats::Skip;

/// Regions that one look finds.
const REGIONS: usize = 16;

/// What became of a page that was a hole at the first look.
#[derive(Clone, Copy)]
enum Fate {
    /// Its word refused the claim.
    Refused,
    /// Claimed; it was this, and there is something there now.
    Filled(PageWord),
    /// Claimed, and there is nothing.
    Hole,
}

impl<H: Host> Mm<H> {
    /// Gives the holes of `range`, at most a chunk, pages of `to`. Returns what is left of it.
    pub(super) fn migrate_holes(
        &self,
        range: VaRange,
        since: Epoch,
        to: &Arc<Pagemap>,
        by: Option<Owner>,
        result: &mut Migrated,
    ) -> Vec<VaRange> {
        let mut left = Vec::new();
        self.each_hole(range, |hole, before| {
            left.extend(before);
            if let Some(hole) = hole {
                self.place_holes(hole, since, to, by, result, &mut left);
            }
        });
        left
    }

    /// Calls `found` for each hole of `range`, in order, with what lies between it and the one before; at last
    /// with what lies behind the last one.
    fn each_hole(&self, range: VaRange, mut found: impl FnMut(Option<VaRange>, Option<VaRange>)) {
        let mut regions = [range; REGIONS];
        let mut behind = range.first();
        let mut rest = Some(range);
        while let Some(part) = rest {
            let (count, end) = self.host.holes(part, &mut regions);
            for hole in &regions[..count] {
                found(Some(*hole), VaRange::of_pages(behind, hole.first().since(behind)));
                behind = hole.end_page();
            }
            rest = VaRange::of_pages(end, part.end_page().since(end));
        }
        found(None, VaRange::of_pages(behind, range.end_page().since(behind)));
    }

    fn place_holes(
        &self,
        hole: VaRange,
        since: Epoch,
        to: &Arc<Pagemap>,
        by: Option<Owner>,
        result: &mut Migrated,
        left: &mut Vec<VaRange>,
    ) {
        let mut rest = Some(hole);
        while let Some(part) = rest {
            let pages = match self.allocate_backed(to, part.pages()) {
                Ok(pages) => pages,
                Err(why) => {
                    result.skipped.add(why, part.pages().get());
                    return;
                }
            };
            let here = part.take(pages.pages);
            rest = part.skip(pages.pages);
            match to.device().zero(to.device_page(pages.start), pages.pages) {
                Ok(()) => self.commit_holes(here, pages, since, to, by, result, left),
                Err(error) => {
                    to.put_range(pages);
                    result.skipped.add(Skip::from(error), here.pages().get());
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the second half of place_holes")]
    fn commit_holes(
        &self,
        range: VaRange,
        pages: PfnRange,
        since: Epoch,
        to: &Arc<Pagemap>,
        by: Option<Owner>,
        result: &mut Migrated,
        left: &mut Vec<VaRange>,
    ) {
        let mut fates = [Fate::Refused; CHUNK_PAGES];
        let layout = self.layout.read(&self.host);
        if self.changed_since(since, range) {
            to.put_range(pages);
            result.skipped.add(Skip::Changed, range.pages().get());
            return;
        }
        for (page, fate) in range.iter().zip(&mut fates) {
            let entry = self.table.entry(page);
            let word = entry.load();
            let claim = PageWord::filling().with_pinned(word.is_pinned());
            if word.may_leave() && !word.is_tracked() && entry.exchange(word, claim).is_ok() {
                *fate = Fate::Filled(word);
            }
        }
        let told = self.tell_migration(range, by);
        self.each_hole(range, |hole, _| {
            for page in hole.into_iter().flat_map(VaRange::iter) {
                let fate = &mut fates[page.since(range.first()).get()];
                if matches!(fate, Fate::Filled(_)) {
                    *fate = Fate::Hole;
                }
            }
        });
        for (n, (page, fate)) in range.iter().zip(fates).enumerate() {
            let pfn = pages.start.forward(PageCount::new(n));
            let next = match fate {
                Fate::Refused => None,
                Fate::Filled(word) => Some(word),
                Fate::Hole => Some(PageWord::device(pfn)),
            };
            if let Some(next) = next {
                let left = self.table.entry(page).leave(next);
                debug_assert!(!left.discarded, "the layout lock keeps discards out");
                self.after_leave(page, left.wake);
            }
            if matches!(fate, Fate::Hole) {
                result.moved = result.moved.plus(PageCount::ONE);
                result.holes = result.holes.plus(PageCount::ONE);
            } else {
                to.put(pfn);
            }
        }
        drop(told);
        drop(layout);
        // What has become a page is one to the next way of moving, which counts it.
        let others = range.iter().zip(fates).filter(|(_, fate)| !matches!(fate, Fate::Hole));
        left.extend(others.map(|(page, _)| VaRange::page(page)));
    }
}
