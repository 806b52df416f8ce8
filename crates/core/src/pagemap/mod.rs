//! Pagemaps: ranges of pfns that belong to a device, and who uses which of them.
//!
//! What    [`Pagemap`] (the kernel's `struct dev_pagemap`): a device, its range in the machine-wide pfn space
//!         and a descriptor for every page; [`PagemapSet`], which finds the pagemap of a pfn.
//! Why     whoever holds a device page must be able to share it (fork), keep it as the clean copy of a
//!         page in RAM, and free it, without asking anybody else.
//! Counts  a free page has count 0, allocation sets 1, [`Pagemap::put`] of the last reference frees it
//!         (rule R3). Descriptors live in memory that is zero where nothing was stored, so that registering
//!         a pagemap costs nothing per page; the memory may be shared between processes.
//! Owners  a pagemap has an [`Owner`], which says whose pages these are (rule R6): its own, or one that it shares.
//! Space   the device gets its space back in groups of 512 pages: a group that fell empty is discarded by
//!         [`Pagemap::trim`], behind a guard that keeps allocation out meanwhile.
//!         A coherent device's memory is its own, and stays with it.
//! Locks   none: one atomic per page and one per group.
//! Fails   a full device gives no page. A count that would fall below zero is a bug and panics in debug
//!         builds; release builds leave the page allocated, which loses space and never data.

mod descriptors;
#[cfg(all(test, loom))]
mod loom;
#[cfg(all(test, not(loom)))]
mod tests;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::AtomicBool;

use uhmm_addr::{CHUNK_PAGES, PageCount, Pfn, PfnRange, VaRange};

pub use descriptors::{DescriptorMemory, GROUP_PAGES};

use crate::device::{Device, DevicePage, MemoryType};
use crate::notifier::Owner;
use crate::sync::{AtomicUsize, Ordering};
use descriptors::Descriptors;

/// A range of pfns, the device behind them, and their descriptors.
pub struct Pagemap {
    start: Pfn,
    device: Arc<dyn Device>,
    owner: Owner,
    // Where a coherent device's pages lie while they are not mapped in place.
    memory: Option<VaRange>,
    descriptors: Descriptors,
    // Whether this process gives no page out.
    stopped: AtomicBool,
    // Where this process's last search ended; only a hint.
    cursor: AtomicUsize,
}

impl fmt::Debug for Pagemap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pagemap")
            .field("range", &self.range())
            .field("device", &self.device.name())
            .field("owner", &self.owner)
            .finish_non_exhaustive()
    }
}

impl Pagemap {
    /// Registers `device` at `start`, with descriptors of its own.
    pub fn new(start: Pfn, device: Arc<dyn Device>) -> Self {
        let pages = device.capacity();
        Self::with(start, device, Descriptors::owned(pages))
    }

    /// Registers `device` at `start`, with descriptors in memory that the caller provides: see
    /// [`DescriptorMemory`] for how much. Processes that map the same memory share the pages.
    ///
    /// # Safety
    /// The memory must hold at least [`DescriptorMemory::bytes_for`] the device's capacity, be aligned to
    /// 8, zero where nobody stored anything, valid as long as the pagemap lives, and be used as the
    /// descriptors of this one device only.
    pub unsafe fn over(start: Pfn, device: Arc<dyn Device>, memory: DescriptorMemory) -> Self {
        // SAFETY: the caller's promise is the constructor's.
        let descriptors = unsafe { Descriptors::over(memory, device.capacity()) };
        Self::with(start, device, descriptors)
    }

    fn with(start: Pfn, device: Arc<dyn Device>, descriptors: Descriptors) -> Self {
        // No two ranges of a space begin at one pfn, and every process that has the pagemap has the same one.
        let owner = Owner(Owner::FIRST_OWN | start.get());
        let (stopped, cursor) = (AtomicBool::new(false), AtomicUsize::new(0));
        let coherent = device.memory_type() == MemoryType::Coherent;
        let memory = device.memory().filter(|_| coherent).map(|memory| memory.range());
        debug_assert!(memory.is_none_or(|memory| memory.pages() == device.capacity()));
        Self { start, device, owner, memory, descriptors, stopped, cursor }
    }

    /// The same, as `owner`'s: its pages are that owner's own, like those of its other pagemaps.
    #[must_use]
    pub fn owned_by(self, owner: Owner) -> Self {
        Self { owner, ..self }
    }

    /// Whose pages these are (the kernel's `pgmap->owner`).
    pub const fn owner(&self) -> Owner {
        self.owner
    }

    /// The pfns that belong to it.
    pub fn range(&self) -> PfnRange {
        PfnRange::new(self.start, self.device.capacity())
    }

    /// The device behind it.
    pub fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// The device's own number for `pfn`.
    pub fn device_page(&self, pfn: Pfn) -> DevicePage {
        DevicePage(pfn.since(self.start).get() as u64)
    }

    /// The memory of a device whose pages are mapped in place.
    pub const fn memory(&self) -> Option<VaRange> {
        self.memory
    }

    /// Where these pages lie while they are not mapped in place, on a device whose pages can be.
    pub(crate) fn place(&self, pages: PfnRange) -> Option<VaRange> {
        let memory = self.memory?;
        Some(memory.skip(PageCount::new(self.index(pages.start)))?.take(pages.pages))
    }

    /// Pages in use, by every process that shares the descriptors.
    pub fn live(&self) -> PageCount {
        self.descriptors.live()
    }

    fn index(&self, pfn: Pfn) -> usize {
        debug_assert!(self.range().contains(pfn), "{pfn:?} belongs to another pagemap");
        pfn.since(self.start).get()
    }

    /// Lets this process take no more pages, or lets it again: for a device that is being emptied (rule R4).
    pub fn stop_allocation(&self, stop: bool) {
        self.stopped.store(stop, core::sync::atomic::Ordering::Release);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(core::sync::atomic::Ordering::Acquire)
    }

    /// Allocates up to `most` consecutive pages, each with one reference. `None` if the device is full, or its
    /// allocation stopped.
    #[must_use = "the pages stay allocated until each is put"]
    pub fn allocate(&self, most: PageCount) -> Option<PfnRange> {
        if self.is_stopped() {
            return None;
        }
        let from = self.cursor.load(Ordering::Relaxed);
        let (first, len) = self.descriptors.allocate(from, most.get())?;
        self.cursor.store(first + len, Ordering::Relaxed);
        Some(PfnRange::new(self.start.forward(PageCount::new(first)), PageCount::new(len)))
    }

    /// Allocates 512 consecutive pages that start at a multiple of 512. `None` if no such group is free.
    #[must_use = "the pages stay allocated until each is put"]
    pub fn allocate_huge(&self) -> Option<PfnRange> {
        if self.is_stopped() {
            return None;
        }
        let first = self.descriptors.allocate_group()?;
        Some(PfnRange::new(self.start.forward(PageCount::new(first)), PageCount::new(CHUNK_PAGES)))
    }

    /// One more reference to a page that is in use.
    pub fn get(&self, pfn: Pfn) {
        self.descriptors.get(self.index(pfn));
    }

    /// One reference less; the last one frees the page.
    pub fn put(&self, pfn: Pfn) {
        self.descriptors.put(self.index(pfn));
    }

    /// One reference less to each page of `pages`; those that were the last ones free their pages.
    pub fn put_range(&self, pages: PfnRange) {
        let (mut first, end) = (self.index(pages.start), self.index(pages.start) + pages.pages.get());
        while first < end {
            let len = (GROUP_PAGES - first % GROUP_PAGES).min(end - first);
            self.descriptors.put_range(first, len);
            first += len;
        }
    }

    /// References to `pfn`; 0 for a free page. A snapshot.
    pub fn count(&self, pfn: Pfn) -> u32 {
        self.descriptors.count(self.index(pfn))
    }

    /// Frees every page, whatever its count: for whoever knows that no reference is left, as when every process
    /// that held some is gone and some were killed while they held them. Returns the pages freed.
    pub fn free_all(&self) -> PageCount {
        self.descriptors.free_all()
    }

    /// Gives the space of up to `most` groups that fell empty back to whoever lent it to the device.
    /// Returns the pages given back. Not for fault handlers: it waits for the medium.
    pub fn trim(&self, most: usize) -> PageCount {
        let mut pages = PageCount::ZERO;
        // A coherent device's memory was lent by nobody.
        let most = if self.memory.is_some() { 0 } else { most };
        for _ in 0..most {
            let Some(group) = self.descriptors.guard_idle_group() else { break };
            let first = group * GROUP_PAGES;
            let len = PageCount::new(GROUP_PAGES.min(self.device.capacity().get() - first));
            // A device that refuses keeps the space, and the pages can be used again all the same.
            if self.device.discard(DevicePage(first as u64), len).is_ok() {
                pages = pages.plus(len);
            }
            self.descriptors.unguard(group);
        }
        pages
    }
}

/// The pagemaps of one address space.
#[derive(Debug, Default)]
pub struct PagemapSet {
    maps: Box<[Arc<Pagemap>]>,
}

impl PagemapSet {
    /// These pagemaps, whose ranges are disjoint.
    ///
    /// # Panics
    /// If two ranges overlap.
    pub fn new(maps: impl IntoIterator<Item = Arc<Pagemap>>) -> Self {
        let maps: Box<[_]> = maps.into_iter().collect();
        for (n, map) in maps.iter().enumerate() {
            for other in &maps[..n] {
                let (a, b) = (map.range(), other.range());
                assert!(a.end() <= b.start || b.end() <= a.start, "{a:?} overlaps {b:?}");
            }
        }
        Self { maps }
    }

    /// The pagemap to which `pfn` belongs.
    ///
    /// # Panics
    /// If there is none: pfns come from page words, which hold pfns of registered pagemaps only.
    pub fn of(&self, pfn: Pfn) -> &Arc<Pagemap> {
        self.maps.iter().find(|map| map.range().contains(pfn)).expect("a pfn without a pagemap")
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Pagemap>> {
        self.maps.iter()
    }
}
