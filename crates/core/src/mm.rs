//! The managed part of one process's address space (the kernel's `mm`): the table, the arena, the
//! pagemaps and the host, tied together.
//!
//! What    [`Mm`], on which [`migrate`](crate::migrate) and [`fault`](crate::fault) are methods; here are the
//!         construction and what follows changes of the program's mappings.
//! Owns    everything but the threads. Page words own device pages and arena slots; what a word gave up is
//!         freed here.
//! Locks   `layout` is the outermost: held for reading while pages are taken out or put in, for writing
//!         while the events of the program's own munmap, mremap, madvise and fork are read and applied.
//!         Reading events under the write lock is what makes the two safe against each other: from before
//!         the kernel changes a mapping until the event is read, it refuses every call of ours on any range
//!         ([`Stop::Pending`](crate::host::Stop::Pending)), and from then on the write lock does.
//! Fails   nothing here fails.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::AtomicBool;

use uhmm_addr::{Geometry, PageCount, VaRange, VirtAddr, Vpn};

use crate::fault::window::Windows;
use crate::frame::{Arena, Slot};
use crate::host::Host;
use crate::pagemap::{Pagemap, PagemapSet};
use crate::pagetable::{Discard, Kind, PageTable, PageWord, State};
use crate::stats::Stats;
use crate::sync::{AtomicU32, AtomicUsize, Gate, Ordering, WriteGuard};

/// Slots of the 2 MiB arena are numbered from here on.
const HUGE_SLOTS: u32 = 1 << 31;
const PRONE: usize = 1024;
const WAITERS: usize = 16;
/// Unmapped ranges that are remembered.
const CHANGES: usize = 128;

/// A moment in the history of the program's mappings; see [`Mm::epoch`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Epoch(usize);

/// An address space under management.
#[derive(Debug)]
pub struct Mm<H: Host> {
    pub(crate) host: H,
    pub(crate) table: PageTable,
    pub(crate) pagemaps: PagemapSet,
    pub(crate) arena: Arena,
    pub(crate) huge: Option<Arena>,
    pub(crate) windows: Windows,
    pub(crate) layout: Gate,
    pub(crate) stats: StatsHome,
    track: AtomicBool,
    // Pages that may still be taken from the system for faults; not limited where it is half of usize.
    allowance: AtomicUsize,
    // How often tracked pages of a chunk were written soon after, by hash of the chunk.
    prone: [AtomicU32; PRONE],
    // What threads sleep on that wait for a page in flight, by hash of the page.
    waiters: [AtomicU32; WAITERS],
    // The range that the fallback is taking away itself, as first page and length; length 0 for none.
    own_discard: [AtomicUsize; 2],
    fallback: Gate,
    // One copying out at a time: a thread of ours that is filled past a claim is then filled past its own.
    pub(crate) copying: Gate,
    // Ranges that ceased to be what they were, as first page and length: number n at n % CHANGES.
    changes: [[AtomicUsize; 2]; CHANGES],
    epoch: AtomicUsize,
    /// The device is full: fresh memory has to wait, pages that come home have not.
    growth_stopped: AtomicBool,
    closed: AtomicBool,
}

/// What an [`Mm`] is made of.
#[derive(Debug)]
pub struct Parts<H> {
    /// The operating system.
    pub host: H,
    /// Words for every address that may be managed.
    pub table: PageTable,
    /// The devices.
    pub pagemaps: PagemapSet,
    /// Slots for 4 KiB frames.
    pub arena: Arena,
    /// Slots for 2 MiB frames, if huge pages are to stay huge.
    pub huge: Option<Arena>,
    /// Fault-around.
    pub windows: Windows,
    /// Whether pages read from a device are write-protected, so that their device copy stays useful until
    /// they are written. Needs an engine that resolves write-protection faults.
    pub track: bool,
    /// Where to count; `None` for counters of the space's own.
    pub stats: Option<&'static Stats>,
}

/// Where the counters lie.
#[derive(Debug)]
pub(crate) enum StatsHome {
    Own(Box<Stats>),
    Lent(&'static Stats),
}

impl core::ops::Deref for StatsHome {
    type Target = Stats;

    fn deref(&self) -> &Stats {
        match self {
            Self::Own(stats) => stats,
            Self::Lent(stats) => stats,
        }
    }
}

impl<H: Host> Mm<H> {
    /// Puts the parts together.
    pub fn new(parts: Parts<H>) -> Self {
        let Parts { host, table, pagemaps, arena, huge, windows, track, stats } = parts;
        debug_assert_eq!(arena.unit(), Geometry::K4);
        debug_assert!(huge.as_ref().is_none_or(|huge| huge.unit() == Geometry::M2));
        Self {
            host,
            table,
            pagemaps,
            arena,
            huge,
            windows,
            layout: Gate::new(),
            stats: stats.map_or_else(|| StatsHome::Own(Box::default()), StatsHome::Lent),
            track: AtomicBool::new(track),
            allowance: AtomicUsize::new(usize::MAX / 2),
            prone: core::array::from_fn(|_| AtomicU32::new(0)),
            waiters: core::array::from_fn(|_| AtomicU32::new(0)),
            own_discard: core::array::from_fn(|_| AtomicUsize::new(0)),
            fallback: Gate::new(),
            copying: Gate::new(),
            changes: core::array::from_fn(|_| core::array::from_fn(|_| AtomicUsize::new(0))),
            epoch: AtomicUsize::new(0),
            growth_stopped: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        }
    }

    /// The operating system's port.
    pub const fn host(&self) -> &H {
        &self.host
    }

    /// The page table.
    pub const fn table(&self) -> &PageTable {
        &self.table
    }

    /// The devices.
    pub const fn pagemaps(&self) -> &PagemapSet {
        &self.pagemaps
    }

    /// The arena of 4 KiB frames.
    pub const fn arena(&self) -> &Arena {
        &self.arena
    }

    /// The arena of 2 MiB frames, if there is one.
    pub const fn huge_arena(&self) -> Option<&Arena> {
        self.huge.as_ref()
    }

    /// The counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The layout lock, held for writing: to be taken before events are read.
    pub fn lock_layout(&self) -> WriteGuard<'_, H> {
        self.layout.write(&self.host)
    }

    /// Returns when the events that were read before this call have been applied.
    pub fn wait_for_events(&self) {
        self.layout.pass(&self.host);
    }

    /// Keeps every page where it is until [`Mm::thaw`]: for a fork of which no event will tell.
    pub fn freeze(&self) {
        core::mem::forget(self.lock_layout());
    }

    /// Ends what [`Mm::freeze`] began, in the parent as in the child. To be called once for each freeze.
    pub fn thaw(&self) {
        self.layout.release_forgotten(&self.host);
    }

    // --- frames ---------------------------------------------------------------------------------------

    pub(crate) fn arena_of(&self, slot: Slot) -> (&Arena, Slot) {
        match &self.huge {
            Some(huge) if slot.get() >= HUGE_SLOTS => (huge, Slot::new(slot.get() - HUGE_SLOTS)),
            _ => (&self.arena, slot),
        }
    }

    pub(crate) const fn huge_slot(slot: Slot) -> Slot {
        Slot::new(slot.get() + HUGE_SLOTS)
    }

    /// The address of the slot that a page word names.
    pub fn slot_address(&self, slot: Slot) -> VirtAddr {
        let (arena, slot) = self.arena_of(slot);
        arena.address(slot)
    }

    /// Lets faults take `pages` more pages from the system.
    pub fn grant(&self, pages: PageCount) {
        self.allowance.fetch_add(pages.get(), Ordering::Relaxed);
    }

    /// Sets how many pages faults may take from the system until the next grant.
    pub fn set_allowance(&self, pages: PageCount) {
        self.allowance.store(pages.get(), Ordering::Relaxed);
    }

    /// Lets fresh memory wait ([`Resolution::Starved`](crate::fault::Resolution::Starved)), or not, whatever the
    /// allowance: for a device that is full, on which only pages that come home make room.
    pub fn stop_growth(&self, stop: bool) {
        self.growth_stopped.store(stop, core::sync::atomic::Ordering::Relaxed);
    }

    pub(crate) fn may_grow(&self) -> bool {
        !self.growth_stopped.load(core::sync::atomic::Ordering::Relaxed)
    }

    /// Pages that faults may still take.
    pub fn allowance(&self) -> PageCount {
        PageCount::new(self.allowance.load(Ordering::Relaxed))
    }

    /// Takes up to `most` pages of the allowance; `None` if there is none left.
    pub(crate) fn take_allowance(&self, most: PageCount) -> Option<PageCount> {
        let mut seen = self.allowance.load(Ordering::Relaxed);
        loop {
            let take = seen.min(most.get());
            if take == 0 {
                return None;
            }
            match self.allowance.compare_exchange_weak(
                seen,
                seen - take,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(PageCount::new(take)),
                Err(now) => seen = now,
            }
        }
    }

    /// Lets up to `most` free frames of the arena go back to the system. Returns how many went.
    pub fn release_frames(&self, most: PageCount) -> PageCount {
        let mut released = PageCount::ZERO;
        while released < most {
            let Some(run) = self.arena.take_framed(&self.host, most.minus(released)) else { break };
            // SAFETY: the run is ours, and becomes an empty one.
            unsafe { self.host.release(run.range()) };
            released = released.plus(run.pages());
            drop(run.emptied());
        }
        released
    }

    // --- clean copies ---------------------------------------------------------------------------------

    /// Switches the keeping of clean copies on or off, for instance when a device runs full of them.
    pub fn set_tracking(&self, track: bool) {
        self.track.store(track, core::sync::atomic::Ordering::Relaxed);
    }

    /// Whether a page read now should be write-protected to keep its device copy: not where pages have
    /// been written soon after they were read.
    pub(crate) fn tracks(&self, page: Vpn) -> bool {
        self.track.load(core::sync::atomic::Ordering::Relaxed) && self.prone(page).load(Ordering::Relaxed) < 8
    }

    pub(crate) fn note_written(&self, page: Vpn) {
        let prone = self.prone(page);
        let seen = prone.load(Ordering::Relaxed);
        prone.store((seen + 4).min(32), Ordering::Relaxed);
    }

    pub(crate) fn note_clean(&self, page: Vpn) {
        let prone = self.prone(page);
        let seen = prone.load(Ordering::Relaxed);
        prone.store(seen.saturating_sub(1), Ordering::Relaxed);
    }

    fn prone(&self, page: Vpn) -> &AtomicU32 {
        &self.prone[page.chunk().wrapping_mul(0x9e37_79b9) % PRONE]
    }

    // --- waiting --------------------------------------------------------------------------------------

    fn waiter(&self, page: Vpn) -> &AtomicU32 {
        &self.waiters[page.get() % WAITERS]
    }

    /// Sleeps until whoever moves `page` is done with it. For engines in which the faulting thread itself
    /// waits; may return early.
    pub fn wait_in_flight(&self, page: Vpn) {
        let waiter = self.waiter(page);
        let seen = waiter.load(Ordering::Acquire);
        if self.table.entry(page).wait().is_ok() {
            self.host.park(waiter, seen);
        }
    }

    /// Wakes whoever waits for `range`, in the kernel or parked here.
    pub(crate) fn wake(&self, range: VaRange) {
        self.host.wake(range);
        for page in range.iter().take(WAITERS) {
            let waiter = self.waiter(page);
            waiter.fetch_add(1, Ordering::Release);
            self.host.unpark(waiter);
        }
    }

    // --- changes of the program's mappings, under the layout lock held for writing -----------------------

    /// Frees what a word owned that has just become something else.
    pub(crate) fn free(&self, word: PageWord) {
        if let Some(pfn) = word.pfn() {
            self.pagemaps.of(pfn).put(pfn);
        }
        if word.state() == State::Staged && !word.is_writing() {
            let slot = word.slot().expect("a staged word names its slot");
            self.free_slot(slot);
        }
    }

    /// Frees an owned slot with a frame in it, and the copy noted with it.
    pub(crate) fn free_slot(&self, slot: Slot) {
        let (arena, slot) = self.arena_of(slot);
        if let Some(copy) = arena.take_copy(slot) {
            self.pagemaps.of(copy).put(copy);
        }
        if arena.unit() == Geometry::K4 {
            drop(arena.adopt(&self.host, slot));
        }
    }

    /// The program gives up the contents of `range`, and the kernel takes the pages away a moment later
    /// (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`): the pages come back as zeros and may not be moved out
    /// until they were filled again.
    pub fn removed(&self, layout: &WriteGuard<'_, H>, range: VaRange) {
        let first = self.own_discard[0].load(Ordering::Acquire);
        let pages = self.own_discard[1].load(Ordering::Acquire);
        if first == range.first().get() && range.pages().get() <= pages {
            // Our own, or the part of it that lies in one mapping: the next part begins where this one ends. A
            // second one of the same range is the program's.
            self.own_discard[0].store(range.end_page().get(), Ordering::Release);
            self.own_discard[1].store(pages - range.pages().get(), Ordering::Release);
            return;
        }
        self.forget(layout, range, true);
        // Pages without a word may be there as well, and are not to leave before the kernel has taken them.
        let mut found = [VaRange::page(Vpn::new(0)); 16];
        let mut rest = Some(range);
        while let Some(part) = rest {
            let (count, end) = self.host.present(part, &mut found);
            for page in found[..count].iter().flat_map(|range| range.iter()) {
                if let Some(entry) = self.table.get(page) {
                    entry.annotate(PageWord::with_discarded);
                }
            }
            rest = VaRange::of_pages(end, part.end_page().since(end));
        }
    }

    /// The mapping of `range` is gone.
    pub fn unmapped(&self, layout: &WriteGuard<'_, H>, range: VaRange) {
        self.note_change(layout, range);
        self.forget(layout, range, false);
    }

    fn note_change(&self, _layout: &WriteGuard<'_, H>, range: VaRange) {
        let number = self.epoch.load(Ordering::Relaxed);
        let [first, pages] = &self.changes[number % CHANGES];
        first.store(range.first().get(), Ordering::Relaxed);
        pages.store(range.pages().get(), Ordering::Relaxed);
        self.epoch.store(number + 1, Ordering::Release);
    }

    /// The present moment in the history of the program's mappings.
    ///
    /// Who keeps a list of managed ranges takes the moment *before* the list is made, and hands it to
    /// [`Mm::collect`](crate::migrate): a page may be taken out only while its mapping is registered, for a
    /// touch of it would otherwise be filled with zeros behind our back.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// Whether some of `range` ceased to be what it was since `since`. May say so wrongly when much has
    /// changed since then. The answer stays true while the caller holds the layout lock.
    pub fn changed_since(&self, since: Epoch, range: VaRange) -> bool {
        let now = self.epoch.load(Ordering::Acquire);
        let missed = now - since.0;
        missed > CHANGES
            || (since.0..now).any(|number| {
                let [first, pages] = &self.changes[number % CHANGES];
                let changed = VaRange::of_pages(
                    Vpn::new(first.load(Ordering::Relaxed)),
                    PageCount::new(pages.load(Ordering::Relaxed)),
                );
                changed.is_some_and(|changed| changed.intersect(range).is_some())
            })
    }

    fn forget(&self, _layout: &WriteGuard<'_, H>, range: VaRange, hold: bool) {
        for part in self.table.used(range) {
            for page in part.iter() {
                if let Discard::Took(old) = self.table.entry(page).discard(hold) {
                    self.free(old);
                }
            }
        }
    }

    /// The program knows that the kernel has taken away what [`Mm::removed`] announced for `range`: pages
    /// that are there now are new and may be moved out.
    pub fn removal_done(&self, range: VaRange) {
        for part in self.table.used(range) {
            for page in part.iter() {
                self.table.entry(page).annotate(PageWord::without_discarded);
            }
        }
    }

    /// The mapping at `from` was moved to `to` (`mremap`): words, and slots' notes, go along.
    ///
    /// A page in flight cannot be waited for under this lock. Its claim is told to give up, and the new
    /// address gets a word of its own: the contents of a page on its way in are still on the device; one on
    /// its way out is at the new address, unless the fallback has taken it away, and then its slot is
    /// complete.
    pub fn remapped(&self, layout: &WriteGuard<'_, H>, from: VaRange, to: VirtAddr) {
        self.note_change(layout, from);
        for part in self.table.used(from) {
            for page in part.iter() {
                let target = to.page().forward(page.since(from.first()));
                let entry = self.table.entry(page);
                let old = entry.load();
                if old == PageWord::EMPTY {
                    continue;
                }
                let word = match entry.discard(false) {
                    Discard::Took(word) => word,
                    Discard::Flagged => match (old.pfn(), old.slot()) {
                        (Some(pfn), _) => {
                            self.pagemaps.of(pfn).get(pfn);
                            if old.is_tracked() { PageWord::tracked(pfn) } else { PageWord::device(pfn) }
                        }
                        (None, Some(_)) if self.is_present(target) => PageWord::RESIDENT,
                        // Whoever has the claim has the slot, and finds this word by its note. The contents
                        // cannot be put in place here: the event of the unmapping that belongs to this one is
                        // yet to be read, by this thread.
                        (None, Some(slot)) => PageWord::staged(slot).with_writing(true),
                        (None, None) => PageWord::EMPTY,
                    },
                };
                if let (State::Staged, Some(slot)) = (word.state(), word.slot()) {
                    let (arena, slot) = self.arena_of(slot);
                    arena.renote(slot, target);
                }
                match self.table.get(target) {
                    Some(target) => {
                        if let Discard::Took(stale) = target.discard(false) {
                            self.free(stale);
                        }
                        target.store(word);
                    }
                    None => self.free(word),
                }
            }
        }
    }

    pub(crate) fn is_present(&self, page: Vpn) -> bool {
        let mut found = [VaRange::page(page)];
        self.host.present(VaRange::page(page), &mut found).0 > 0
    }

    /// Pins `range` in RAM, or lifts that: pinned pages are never moved out. Pages that are away stay away
    /// until they are touched.
    pub fn set_pinned(&self, range: VaRange, pinned: bool) {
        for page in range.iter() {
            let entry = self.table.entry(page);
            while !entry.annotate(|word| word.with_pinned(pinned)) {
                self.wait_in_flight(page);
            }
        }
    }

    // --- the fallback's own discards --------------------------------------------------------------------

    /// Waits until no discard of our own is under way. Whoever unmaps memory of ours calls this between
    /// [`Mm::unmapped`] and the unmapping, without the layout lock, so that no discard falls on what is mapped
    /// there next.
    pub fn pass_discards(&self) {
        drop(self.fallback.write(&self.host));
    }

    /// Takes the pages of `range` away and tells their REMOVE event apart from the program's.
    ///
    /// # Safety
    /// As [`Host::discard`].
    pub(crate) unsafe fn discard_own(&self, range: VaRange) -> crate::host::Progress {
        let _one = self.fallback.write(&self.host);
        // Looked at once more under the gate, through which an unmapping of ours passes after it has set the
        // flags: what is mapped there now may be somebody else's.
        if range.iter().any(|page| self.table.entry(page).load().is_discarded()) {
            return crate::host::Progress::stopped(PageCount::ZERO, crate::host::Stop::Pending);
        }
        self.own_discard[0].store(range.first().get(), Ordering::Release);
        self.own_discard[1].store(range.pages().get(), Ordering::Release);
        // SAFETY: the caller's promise.
        let progress = unsafe { self.host.discard(range) };
        // The discard goes on as soon as its event is *read*, which is under the layout lock held for writing:
        // whoever gets the lock finds it applied. Until then it must be known as ours.
        drop(self.layout.read(&self.host));
        self.own_discard[1].store(0, Ordering::Release);
        progress
    }

    /// The words of a page in the child of a fork, made from the parent's under the layout lock: `copy` is
    /// called for a page whose contents lie in the arena and must be copied to the child now.
    pub fn word_for_child(
        &self,
        _layout: &WriteGuard<'_, H>,
        page: Vpn,
        mut copy: impl FnMut(Vpn, VirtAddr),
    ) -> PageWord {
        let word = self.table.entry(page).load();
        let pinned = word.is_pinned();
        let child = match (word.state(), word.kind()) {
            (State::Staged, _) | (State::Moving, Some(Kind::Back | Kind::Out)) => {
                let slot = word.slot().expect("these words name their slot");
                if !word.is_discarded() {
                    copy(page, self.slot_address(slot));
                }
                PageWord::RESIDENT
            }
            (State::Moving, _) if word.is_tracked() => word.pfn().map_or(PageWord::EMPTY, PageWord::tracked),
            (State::Moving, _) => word.pfn().map_or(PageWord::EMPTY, PageWord::device),
            (State::Empty, _) if word.is_discarded() => PageWord::EMPTY.with_discarded(),
            (State::Empty, _) => PageWord::EMPTY,
            (State::Resident, _) => word.pfn().map_or(PageWord::RESIDENT, PageWord::tracked),
            (State::Poisoned, _) => PageWord::POISONED,
            _ => word.pfn().map_or(PageWord::EMPTY, PageWord::device),
        };
        if let Some(pfn) = child.pfn() {
            self.pagemaps.of(pfn).get(pfn);
        }
        child.with_pinned(pinned)
    }

    /// The pagemap to which pages are moved out by default: the first.
    pub fn default_pagemap(&self) -> Option<&Arc<Pagemap>> {
        self.pagemaps.iter().next()
    }

    /// Marks the space as closing; see [`Mm::is_closed`].
    pub fn close(&self) {
        self.closed.store(true, core::sync::atomic::Ordering::Release);
    }

    /// Whether the space is closing: threads that serve it come to an end.
    pub fn is_closed(&self) -> bool {
        self.closed.load(core::sync::atomic::Ordering::Acquire)
    }
}
