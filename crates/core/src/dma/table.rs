//! What is mapped for a device, page by page.

use alloc::boxed::Box;
use alloc::vec;

use uhmm_addr::{DmaAddr, PAGE_SIZE, PageCount, VaRange, VirtAddr, Vpn};

use super::{DmaError, Iommu};
use crate::mirror::{MirrorTable, PageView, Pages, Segment};
use crate::notifier::Event;

const MAPPED: u64 = 1;
const WRITE: u64 = 2;
const FIRST: u64 = 4;
const LAST: u64 = 8;
const FLAGS: u64 = PAGE_SIZE as u64 - 1;

/// A page's address for the device, with flags in the bits that a page's address leaves free. Zero: not mapped.
#[derive(Clone, Copy)]
struct Entry(u64);

impl Entry {
    const fn has(self, flag: u64) -> bool {
        self.0 & flag != 0
    }

    const fn addr(self) -> DmaAddr {
        DmaAddr::new(self.0 & !FLAGS)
    }
}

/// The pages of a mirror that a device reaches, and where it finds them.
#[derive(Debug)]
pub struct DmaTable<I: Iommu> {
    iommu: I,
    range: VaRange,
    // Made beforehand: invalidation neither allocates nor frees.
    entries: Box<[Entry]>,
    mapped: PageCount,
}

impl core::fmt::Debug for Entry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.has(MAPPED) { self.addr().fmt(f) } else { f.write_str("-") }
    }
}

impl<I: Iommu> DmaTable<I> {
    /// A table for the mirror of `range`, with nothing mapped.
    pub(super) fn new(range: VaRange, iommu: I) -> Self {
        let entries = vec![Entry(0); range.pages().get()].into_boxed_slice();
        Self { iommu, range, entries, mapped: PageCount::ZERO }
    }

    /// Where the device finds `addr`; `None` if it does not reach it, or for writing where `write` and it may only read.
    pub fn address(&self, addr: VirtAddr, write: bool) -> Option<DmaAddr> {
        let entry = self.entries.get(self.index(addr.page())?)?;
        let reached = entry.has(MAPPED) && (!write || entry.has(WRITE));
        reached.then(|| entry.addr().offset(addr.page_offset()))
    }

    /// How many pages are mapped.
    pub const fn mapped(&self) -> PageCount {
        self.mapped
    }

    fn index(&self, page: Vpn) -> Option<usize> {
        VaRange::page(page).intersect(self.range).map(|page| page.first().since(self.range.first()).get())
    }

    /// The pages with these indices.
    fn run(&self, first: usize, pages: usize) -> VaRange {
        let first = self.range.first().forward(PageCount::new(first));
        VaRange::page(first).grow(PageCount::new(pages))
    }

    pub(super) fn map(&mut self, pages: Pages<'_>, write: bool) -> Result<(), DmaError> {
        let first = pages.range().first().since(self.range.first()).get();
        let end = first + pages.range().pages().get();
        for at in first..end {
            if write && self.entries[at].has(MAPPED) && !self.entries[at].has(WRITE) {
                self.unmap_run(at);
            }
        }
        // Whoever pins the page of zeros for long is given a page in its place, as one that is shared.
        let in_ram = |segment: &Segment| matches!(segment.view(), PageView::Ram { .. } | PageView::Zeros);
        for alike in pages.segments().chunk_by(|one, next| in_ram(one) == in_ram(next)) {
            let range = Pages::new(alike).range();
            let mut at = range.first().since(self.range.first()).get();
            let end = at + range.pages().get();
            while at < end {
                let count = (at..end).take_while(|n| !self.entries[*n].has(MAPPED)).count();
                if count > 0 && !in_ram(&alike[0]) {
                    return Err(DmaError::OnDevice(self.run(at, count).start()));
                }
                if count > 0 {
                    self.map_run(at, count, write)?;
                }
                at += count.max(1);
            }
        }
        Ok(())
    }

    /// Maps so many pages from this index on, none of which is mapped.
    fn map_run(&mut self, at: usize, count: usize, write: bool) -> Result<(), DmaError> {
        let run = self.run(at, count);
        let addr = self.iommu.map(run, write).map_err(|why| DmaError::Iommu(run.start(), why))?;
        debug_assert_eq!(addr.get() & FLAGS, 0, "on a page boundary");
        let access = if write { MAPPED | WRITE } else { MAPPED };
        for n in 0..count {
            self.entries[at + n] = Entry(addr.forward(PageCount::new(n)).get() | access);
        }
        self.entries[at].0 |= FIRST;
        self.entries[at + count - 1].0 |= LAST;
        self.mapped = self.mapped.plus(PageCount::new(count));
        Ok(())
    }

    /// Unmaps every run that has a page of `range`. Returns how many pages that were.
    pub(super) fn unmap(&mut self, range: VaRange) -> PageCount {
        let before = self.mapped;
        if let Some(part) = range.intersect(self.range).filter(|_| !before.is_zero()) {
            let first = part.first().since(self.range.first()).get();
            for at in first..first + part.pages().get() {
                if self.entries[at].has(MAPPED) {
                    self.unmap_run(at);
                }
            }
        }
        before.minus(self.mapped)
    }

    /// Unmaps the run that has the page with this index.
    fn unmap_run(&mut self, at: usize) {
        let before = self.entries[..=at].iter().rev().take_while(|entry| !entry.has(FIRST)).count();
        let behind = self.entries[at..].iter().take_while(|entry| !entry.has(LAST)).count();
        let (first, pages) = (at - before, before + behind + 1);
        self.iommu.unmap(self.run(first, pages));
        self.entries[first..first + pages].fill(Entry(0));
        self.mapped = self.mapped.minus(PageCount::new(pages));
    }
}

impl<I: Iommu> MirrorTable for DmaTable<I> {
    fn invalidate(&mut self, range: VaRange, _event: Event) {
        let _ = self.unmap(range);
    }
}

impl<I: Iommu> Drop for DmaTable<I> {
    fn drop(&mut self) {
        let _ = self.unmap(self.range);
    }
}
