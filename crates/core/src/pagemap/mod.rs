//! Pagemaps: ranges of pfns that belong to a device, and who uses which of them.
//!
//! What    [`Pagemap`] (the kernel's `struct dev_pagemap`): a type, an owner, ranges in the machine-wide pfn space,
//!         and a descriptor for every compound page; [`Registry`], which finds the pagemap of a pfn and unregisters it
//!         when its pages are back; [`resource`], who has which pfns; handles of pages ([`PageRef`] and others);
//!         [`PagemapSet`], the pagemaps of one address space.
//! Why     whoever holds a device page must be able to share it (fork), keep it as the clean copy of a page in RAM,
//!         and free it, without asking anybody else.
//! Counts  a free page has count 0, the first reference sets 1, [`Pagemap::put_counted`] of the last one, or the end
//!         of its handle, frees it (rule R3). A live page is one reference to its pagemap; get and put of a page that
//!         stays live never touch the pagemap. The pages of a compound page (2M, 1G) have one descriptor: a reference
//!         to any is one to the head, and nothing steps through the others. Descriptors live in memory that is zero
//!         where nothing was stored, so that registering a pagemap costs nothing per page; the memory may be shared
//!         between processes.
//! Owners  a pagemap has an [`Owner`], which says whose pages these are (rule R6): its own, or one that it shares.
//! Space   the device gets its space back in groups of 512 pages: a group that fell empty is discarded by
//!         [`Pagemap::trim`], behind a guard that keeps allocation out meanwhile. A coherent device's memory is its
//!         own, and stays with it.
//! Locks   none for pages: one atomic per page, one per group, one per shard of groups when a page becomes live or
//!         free. A registry has one, for those who register; it is not held while anybody is called or waited for. The
//!         list of what is bad, and the ledger, each have one, innermost.
//! Fails   a full device gives no page. A count that would fall below zero is a bug and panics in debug builds;
//!         release builds leave the page allocated, which loses space and never data.

mod builder;
mod descriptors;
mod ledger;
#[cfg(all(test, loom))]
mod loom;
mod ops;
mod page;
mod poison;
mod ranges;
mod readers;
mod registry;
pub mod resource;
mod set;
mod shape;
mod table;
#[cfg(all(test, not(loom)))]
mod tests;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::AtomicBool;

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, Pfn, PfnRange, VaRange};

pub use builder::{PagemapBuilder, RegisterError};
pub use ops::PagemapOps;
pub use page::{PageError, PageRange, PageRef, UniquePages, release_pages};
pub use poison::{Failure, FailureError, Mapper, Poisoned, Told};
pub use registry::{Holder, Reader, Registry, UnregisterError};
pub use set::{AddError, MOST_ADDED, PagemapSet};
pub use shape::{DescriptorMemory, GROUP_PAGES};

use crate::device::{Device, DevicePage, MemoryType};
use crate::notifier::Owner;
use crate::sync::{AtomicU32, AtomicU64, AtomicUsize, Ordering, Park, fence};
use descriptors::{Descriptors, Left};
use ledger::{Entry, Ledger};
use poison::Bad;
use ranges::Ranges;
use shape::Shape;

/// Ranges of pfns, the device behind them, and their descriptors.
pub struct Pagemap {
    name: Box<str>,
    memory_type: MemoryType,
    ranges: Ranges,
    device: Arc<dyn Device>,
    owner: Owner,
    // Where a coherent device's pages lie while they are not mapped in place.
    memory: Option<VaRange>,
    ops: Option<Arc<dyn PagemapOps>>,
    descriptors: Descriptors,
    // Whether this process gives no page out.
    stopped: AtomicU32,
    // Whether a registry keeps it, so that there can be handles.
    registered: AtomicBool,
    // Whether it is being unregistered, so that no page is found by its number any more.
    closing: AtomicBool,
    // Where this process's last search ended; only a hint.
    cursor: AtomicUsize,
    bad: Bad,
    ledger: Ledger,
    park: Arc<dyn Park>,
}

impl fmt::Debug for Pagemap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pagemap")
            .field("name", &self.name)
            .field("type", &self.memory_type)
            .field("range", &self.range())
            .field("geometry", &self.geometry())
            .field("owner", &self.owner)
            .finish_non_exhaustive()
    }
}

impl Pagemap {
    /// The device's pages at `start`, in 4K pages with descriptors of their own. It is in no registry: its pages are
    /// counted by number.
    pub fn new(start: Pfn, device: Arc<dyn Device>) -> Self {
        let shape = Shape { units: device.capacity().get(), data: false };
        Self::with(start, device, Descriptors::owned(shape))
    }

    /// The same, with descriptors in memory that the caller provides: see
    /// [`DescriptorMemory`] for how much. Processes that map the same memory share the pages.
    ///
    /// # Safety
    /// The memory must hold at least [`DescriptorMemory::bytes_for`] the device's capacity, be aligned to
    /// 8, zero where nobody stored anything, valid as long as the pagemap lives, and be used as the
    /// descriptors of this one device only.
    pub unsafe fn over(start: Pfn, device: Arc<dyn Device>, memory: DescriptorMemory) -> Self {
        let shape = Shape { units: device.capacity().get(), data: false };
        // SAFETY: the caller's promise is the constructor's; without a registry there are no handles that could
        // outlive us.
        let descriptors = unsafe { Descriptors::over(memory, shape) };
        Self::with(start, device, descriptors)
    }

    fn with(start: Pfn, device: Arc<dyn Device>, descriptors: Descriptors) -> Self {
        let range = PfnRange::new(start, device.capacity());
        let map = Self::builder(device.name(), device.memory_type()).range(range).device(device);
        map.with(descriptors, PageCount::ZERO, Arc::new(Spin))
    }

    /// A pagemap for a [`Registry`]. `name` is what the ranges are called in the resource tree.
    pub fn builder(name: impl Into<Box<str>>, memory_type: MemoryType) -> PagemapBuilder {
        PagemapBuilder::new(name.into(), memory_type)
    }

    /// This pagemap as `owner`'s: its pages are that owner's own, like those of its other pagemaps.
    #[must_use]
    pub fn owned_by(self, owner: Owner) -> Self {
        Self { owner, ..self }
    }

    /// What it is called: the device's name, or what the builder was given.
    pub const fn name(&self) -> &str {
        &self.name
    }

    /// How the CPU sees its pages.
    pub const fn memory_type(&self) -> MemoryType {
        self.memory_type
    }

    /// Whose pages these are (the kernel's `pgmap->owner`).
    pub const fn owner(&self) -> Owner {
        self.owner
    }

    /// The size of its compound pages.
    pub const fn geometry(&self) -> Geometry {
        self.ranges.geometry()
    }

    /// The first range of pfns that belong to it; the only one, unless it was built with more.
    pub const fn range(&self) -> PfnRange {
        self.ranges.foremost()
    }

    /// Every range, in the order of the device's pages.
    pub fn ranges(&self) -> impl Iterator<Item = PfnRange> {
        self.ranges.iter()
    }

    /// Whether `pfn` belongs to it.
    pub fn contains(&self, pfn: Pfn) -> bool {
        self.ranges.page_of(pfn).is_some()
    }

    /// Pages at the start of the first range that hold the descriptors, and nothing else.
    pub const fn reserved(&self) -> PageCount {
        self.ranges.reserved()
    }

    /// The device behind it; one that does nothing, if it was built without.
    pub fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// The device's own number for `pfn`.
    pub fn device_page(&self, pfn: Pfn) -> DevicePage {
        DevicePage(self.page_index(pfn) as u64)
    }

    /// Whether 512 pages from `first` on, which need not be the pagemap's, lie side by side on the device, where a
    /// huge page does.
    pub(crate) fn is_chunk(&self, first: Pfn) -> bool {
        let chunk = PfnRange::new(first, PageCount::new(CHUNK_PAGES));
        let page = self.ranges.page_of(first);
        page.is_some_and(|page| page.is_multiple_of(CHUNK_PAGES)) && self.ranges.units_of(chunk).is_some()
    }

    /// The pfn of a page of the device (`dax_pgoff_to_phys`); `None` behind its end.
    pub fn pfn_of(&self, page: DevicePage) -> Option<Pfn> {
        ((page.0 as usize) < self.ranges.pages().get()).then(|| self.ranges.pfn_of(page.0 as usize))
    }

    /// The memory of a device whose pages are mapped in place.
    pub const fn memory(&self) -> Option<VaRange> {
        self.memory
    }

    /// Where these pages lie while they are not mapped in place, on a device whose pages can be.
    pub(crate) fn place(&self, pages: PfnRange) -> Option<VaRange> {
        let memory = self.memory?;
        Some(memory.skip(PageCount::new(self.page_index(pages.start)))?.take(pages.pages))
    }

    /// Pages in use, by every process that shares the descriptors; compound pages count whole.
    pub fn live(&self) -> PageCount {
        PageCount::new(self.descriptors.live() << self.geometry().order())
    }

    /// Bytes that its descriptors take when every page is in use.
    pub const fn descriptor_bytes(&self) -> usize {
        self.descriptors.bytes()
    }

    fn page_index(&self, pfn: Pfn) -> usize {
        self.ranges.page_of(pfn).unwrap_or_else(|| panic!("{pfn:?} belongs to another pagemap"))
    }

    fn index(&self, pfn: Pfn) -> usize {
        self.ranges.unit_of(pfn).unwrap_or_else(|| panic!("{pfn:?} belongs to another pagemap"))
    }

    fn is_registered(&self) -> bool {
        self.registered.load(core::sync::atomic::Ordering::Acquire)
    }

    fn is_closing(&self) -> bool {
        self.closing.load(core::sync::atomic::Ordering::Acquire)
    }

    /// No page is found or becomes live any more, or again.
    fn close(&self, close: bool) {
        self.closing.store(close, core::sync::atomic::Ordering::Release);
        if close { self.descriptors.refuse() } else { self.descriptors.accept() }
    }

    /// Lets this process take no more pages, or lets it again: for a device that is being emptied (rule R4). Whoever finds
    /// no page [`live`](Pagemap::live) from then on knows that none is taken, by a call that had begun before either.
    pub fn stop_allocation(&self, stop: bool) {
        self.stopped.store(u32::from(stop), Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// Whether this process takes no more pages of it.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire) != 0
    }

    /// Gives pages that were just taken back if allocation was stopped meanwhile. They were counted live before the flag is
    /// looked at here, and who stops sets the flag before he counts, with a fence between on both sides: one of the two
    /// sees the other.
    fn unless_stopped(&self, first: usize, units: usize) -> Option<(usize, usize)> {
        fence(Ordering::SeqCst);
        if self.is_stopped() {
            self.put_indices(first, units);
            return None;
        }
        Some((first, units))
    }

    fn allocate_units(&self, most: PageCount, sole: bool) -> Option<(usize, usize)> {
        if self.is_stopped() {
            return None;
        }
        let from = self.cursor.load(Ordering::Relaxed);
        let most = (most.get() >> self.geometry().order()).max(1);
        let border = |unit| self.ranges.border(unit);
        let (first, len) = self.descriptors.allocate(from, most, sole, border)?;
        self.cursor.store(first + len, Ordering::Relaxed);
        self.unless_stopped(first, len)
    }

    /// Allocates up to `most` consecutive pages, at least one compound page, each compound page with one reference.
    /// `None` if the device is full, or its allocation stopped.
    #[must_use = "the pages stay allocated until each is put"]
    pub fn allocate(&self, most: PageCount) -> Option<PfnRange> {
        self.allocate_units(most, false).map(|(first, len)| self.ranges.pfns(first, len))
    }

    /// Allocates a whole group, 512 consecutive compound pages, each with one reference: of 4K pages, the place of a huge
    /// page. `None` if no group is free, or allocation stopped.
    #[must_use = "the pages stay allocated until each is put"]
    pub fn allocate_huge(&self) -> Option<PfnRange> {
        if self.is_stopped() {
            return None;
        }
        let first = self.descriptors.allocate_group(|unit| self.ranges.border(unit))?;
        self.unless_stopped(first, GROUP_PAGES).map(|(first, units)| self.ranges.pfns(first, units))
    }

    /// One more reference to a page that is in use: to its compound page.
    pub fn get(&self, pfn: Pfn) {
        Descriptors::get_counted(self.descriptors.unit(self.index(pfn)));
    }

    /// One reference less to each compound page of which there are pages in `pages`, which lie in one range; the last
    /// one frees the page.
    ///
    /// # Safety
    /// These references must be counted by number ([`Pagemap::get`], [`Pagemap::allocate`]), and be the caller's to
    /// give up: one that a handle has keeps the pagemap that the handle points to. It is so in any case where there
    /// are no handles: for a pagemap in no registry.
    pub unsafe fn put_counted(&self, pages: PfnRange) {
        self.put_range(pages);
    }

    /// One reference less, which a page word had, or whoever allocated the page for one.
    pub(crate) fn put(&self, pfn: Pfn) {
        self.put_indices(self.index(pfn), 1);
    }

    /// One reference less to each compound page of which there are pages in `pages`, which lie in one range; those that
    /// were the last ones free their pages.
    pub(crate) fn put_range(&self, pages: PfnRange) {
        let units = self.ranges.units_of(pages);
        let (first, units) = units.unwrap_or_else(|| panic!("{pages:?} belongs to another pagemap"));
        self.put_indices(first, units);
    }

    fn put_indices(&self, first: usize, units: usize) {
        // SAFETY: the references are given up by the caller, and `self` is borrowed.
        unsafe { Self::put_units(NonNull::from(self), first, units) };
    }

    /// One reference less to each of these units, in steps of a group.
    ///
    /// # Safety
    /// `this` must be valid, and the caller must have those references: the last one may be all that keeps it.
    unsafe fn put_units(this: NonNull<Self>, mut first: usize, units: usize) {
        let end = first + units;
        while first < end {
            let len = (GROUP_PAGES - first % GROUP_PAGES).min(end - first);
            // SAFETY: the references from `first` on keep it.
            let map = unsafe { this.as_ref() };
            let tell = |unit: usize, units: usize| map.tell_freed(unit, units);
            let freed: Option<&dyn Fn(usize, usize)> = if map.ops.is_some() { Some(&tell) } else { None };
            let descriptors = NonNull::from(&map.descriptors);
            // SAFETY: the caller's promise. Of `map` nothing is looked at afterwards.
            if let Some(left) = unsafe { Descriptors::put(descriptors, first, len, freed) } {
                left.count_out();
            }
            first += len;
        }
    }

    /// Tells the driver of units that are free when he returns.
    fn tell_freed(&self, mut unit: usize, units: usize) {
        let end = unit + units;
        while unit < end {
            let len = self.ranges.border(unit).min(end) - unit;
            if let Some(ops) = &self.ops {
                ops.page_free(self, self.ranges.pfns(unit, len));
            }
            unit += len;
        }
    }

    /// A handle's line leaves the ledger. Whether a unit that is freed is to be held until the driver was told.
    fn forget_handle(&self, entry: &Entry) -> bool {
        self.ledger.leave(&*self.park, entry);
        self.ops.is_some()
    }

    fn freed(&self, unit: usize) -> Left {
        let tell = |unit: usize, units: usize| self.tell_freed(unit, units);
        self.descriptors.freed(unit, if self.ops.is_some() { Some(&tell) } else { None })
    }

    /// References to the compound page of `pfn`; 0 for a free page. A snapshot.
    pub fn count(&self, pfn: Pfn) -> u32 {
        self.descriptors.count(self.index(pfn))
    }

    /// A word of the compound page's own, for whoever maps it: which file it is of and where, for instance
    /// (`page->mapping` and `page->index`, set on the head alone). Zero until something is stored; the pagemap never
    /// does. `None` for private and coherent pages, whose page words say whose they are.
    pub fn page_data(&self, pfn: Pfn) -> Option<&AtomicU64> {
        self.descriptors.data(self.ranges.unit_of(pfn)?)
    }

    /// Frees every page, whatever its count: for whoever knows that no reference is left, as when every process
    /// that held some is gone and some were killed while they held them, took some, or gave space back
    /// ([`Pagemap::trim`]). Returns the pages freed.
    ///
    /// # Safety
    /// There must be no handle of any page, which is so for a pagemap in no registry, and nobody may use the descriptors
    /// meanwhile.
    pub unsafe fn free_all(&self) -> PageCount {
        PageCount::new(self.descriptors.free_all() << self.geometry().order())
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
            let len = GROUP_PAGES.min(self.ranges.units() - first) << self.geometry().order();
            let len = PageCount::new(len);
            // A device that refuses keeps the space, and the pages can be used again all the same.
            if self.device.discard(DevicePage(self.ranges.head(first) as u64), len).is_ok() {
                pages = pages.plus(len);
            }
            self.descriptors.unguard(group);
        }
        pages
    }
}

/// Where a coherent device's pages lie.
fn place_of(device: &dyn Device) -> Option<VaRange> {
    let coherent = device.memory_type() == MemoryType::Coherent;
    let memory = device.memory().filter(|_| coherent).map(|memory| memory.range());
    debug_assert!(memory.is_none_or(|memory| memory.pages() == device.capacity()));
    memory
}

/// Waits by looking again, where locks are held for a few instructions.
struct Spin;

impl Park for Spin {
    fn park(&self, _word: &crate::sync::AtomicU32, _expected: u32) {
        crate::sync::relax();
    }

    fn unpark(&self, _word: &crate::sync::AtomicU32) {}
}
