//! An address space under management, with all the memory that takes: the parts that the library's
//! [`Space`](crate::Space) and the agent of `uhmm run` have in common.
//!
//! What    [`Plan`] says what is wanted, [`Managed::build`] reserves the memory, opens userfaultfd and puts
//!         core's [`Mm`] together.
//! Owns    every mapping: the page table (flat over all user addresses, backed where it is used), the arenas.
//!         All of it is uhmm's own memory: never registered for faults of the program, never moved.
//! Locks   `ranges`, taken by threads that change or walk the managed ranges, never by a fault handler. `changing`,
//!         outside everything: the program's own calls read, whoever replaces mappings writes. `replacing`, inside the
//!         layout lock, around the frames of mappings that are being replaced.
//! Fails   [`BuildError`]: no userfaultfd for this user, or no address space.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use uhmm_addr::{ByteSize, Geometry, PageCount, VaRange, Vpn};
use uhmm_core::fault::Scratch;
use uhmm_core::fault::window::Windows;
use uhmm_core::frame::Arena;
use uhmm_core::host::Host;
use uhmm_core::mm::{Epoch, Mm, Parts};
use uhmm_core::pagemap::{Pagemap, PagemapSet};
use uhmm_core::pagetable::{PageTable, State};
use uhmm_core::stats::Stats;
use uhmm_core::sync::{Gate, ReadGuard, WriteGuard};
use uhmm_sys::futex::{self, Lock};
use uhmm_sys::host::{Chute, HostOptions, LinuxHost};
use uhmm_sys::mapping::Mapping;
use uhmm_sys::uffd::{Features, Mode, OpenError, RegisterError, Uffd};

use crate::space::Replacing;

/// User addresses have 47 bits; so many pages.
pub const USER_PAGES: PageCount = PageCount::new(1 << 35);
/// Bytes of a page table that covers them all, and of the bits for its used chunks behind it. Reserved, not
/// used.
pub const TABLE_BYTES: usize = TABLE_WORDS * size_of::<u64>();
const TABLE_WORDS: usize = USER_PAGES.get() + PageTable::used_words(USER_PAGES);
/// Threads that may touch managed memory under claims of their own at a time.
const OURS: usize = 16;
/// Ranges of one space that the signal handler can look after.
const PUBLISHED: usize = 128;

/// The managed ranges.
#[derive(Debug, Default)]
struct Ranges {
    /// By address, disjoint; each with a moment since when it is registered, where the program may unmap it at any
    /// time. The others are always registered: they leave the list before they are unmapped.
    list: Vec<(VaRange, Option<Epoch>)>,
}

impl Ranges {
    /// Puts `range` in, in the place of whatever of the list lies in it.
    fn put(&mut self, range: VaRange, since: Option<Epoch>) {
        let mut rest = Vec::with_capacity(2);
        self.list.retain(|(other, known)| {
            let parts =
                if other.intersect(range).is_some() { around(*other, range) } else { [Some(*other), None] };
            let keep = parts[0] == Some(*other);
            if !keep {
                rest.extend(parts.into_iter().flatten().map(|part| (part, *known)));
            }
            keep
        });
        self.list.extend(rest);
        self.list.push((range, since));
        self.list.sort_unstable_by_key(|(range, _)| range.first());
    }
}

/// What of `whole` lies before `part` and behind it.
fn around(whole: VaRange, part: VaRange) -> [Option<VaRange>; 2] {
    let between =
        |start: Vpn, end: Vpn| if start < end { VaRange::of_pages(start, end.since(start)) } else { None };
    [between(whole.first(), part.first()), between(part.end_page(), whole.end_page())]
}

/// How faults reach us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reports {
    /// As messages that handler threads read, with the events of a program that changes its own mappings.
    Messages,
    /// As SIGBUS in the thread that touched.
    Sigbus,
}

/// What a [`Managed`] is to be.
#[derive(Debug)]
pub struct Plan {
    /// How faults are reported.
    pub reports: Reports,
    /// Memory for the page table, [`TABLE_BYTES`] long and zero where unused; `None` for private memory.
    pub table: Option<Mapping>,
    /// Addresses for 4 KiB frames. Frames count as used memory only while they are there.
    pub arena: ByteSize,
    /// Addresses for 2 MiB frames; `None` if huge pages need not stay huge.
    pub huge: Option<ByteSize>,
    /// The devices.
    pub pagemaps: Vec<Arc<Pagemap>>,
    /// Pages that a fault brings home.
    pub windows: Windows,
    /// Keep the device copy of pages that are only read.
    pub track: bool,
    /// Behave as a kernel without `UFFDIO_MOVE`.
    pub forced_fallback: bool,
    /// Where to count.
    pub stats: Option<&'static Stats>,
}

/// Why an address space cannot be managed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No userfaultfd for this user; the message says what would grant it.
    #[error(transparent)]
    Uffd(#[from] OpenError),
    /// The kernel lacks a feature without which contents could be lost.
    #[error(
        "the kernel's userfaultfd lacks {0}; Linux 5.7 or later and the right to trace processes are needed"
    )]
    Feature(&'static str),
    /// No address space for the tables: a limit such as `ulimit -v` is too low.
    #[error("cannot reserve {size} of address space for {what}; is there a limit (ulimit -v)?")]
    AddressSpace {
        /// How much.
        size: ByteSize,
        /// What for.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Pages of a coherent device are mapped in place by moving their frames.
    #[error(
        "{0} is coherent: its pages are mapped in place, for which the kernel must be able to move frames \
         (UFFDIO_MOVE, Linux 6.8 or later)"
    )]
    Coherent(String),
    /// A coherent device's memory could not be registered: another space has the device.
    #[error("the memory of {device} cannot be watched; a coherent device can be in one space at a time")]
    DeviceMemory {
        /// The device.
        device: String,
        /// What the kernel said.
        source: RegisterError,
    },
    /// A mapping of our own could not be registered.
    #[error("cannot register uhmm's own arena")]
    Register(#[from] RegisterError),
    /// Something else of this process could not be opened.
    #[error("cannot open what tells about this process's memory")]
    Process(#[from] io::Error),
}

/// An address space under management.
#[derive(Debug)]
pub struct Managed {
    mm: Mm<LinuxHost>,
    ranges: Lock<Ranges>,
    /// Bumped when there is room again for faults that found none.
    room: AtomicU32,
    /// Bumped when the evictor should look.
    kick: AtomicU32,
    ours: [AtomicU32; OURS],
    /// The managed ranges once more, as first page and length, for the signal handler.
    published: Box<[[AtomicUsize; 2]; PUBLISHED]>,
    /// The evictor is asked to look when fewer pages than this may be taken.
    low: AtomicUsize,
    /// The processor of a handler that must not be held up, plus one; 0 if there is none.
    busy: AtomicU32,
    changing: Gate,
    /// The thread that keeps mappings as they are.
    keeper: AtomicU32,
    replacing: Lock<Replacing>,
    // The tables lie in these; dropped after `mm`.
    memory: Vec<Mapping>,
}

/// A thread that is one of ours for a while; see [`Managed::lend_thread`].
#[derive(Debug)]
#[must_use = "the thread is taken off again when this is dropped"]
pub struct Lent<'a> {
    slot: &'a AtomicU32,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.slot.store(0, Ordering::Release);
    }
}

/// The number of the calling thread.
fn this_thread() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
}

/// In the place of a thread of ours: it is not one for the moment. Thread numbers are smaller.
const AWAY: u32 = 1 << 31;

/// The program's mappings stay as they are; see [`Managed::keep_mappings`].
#[derive(Debug)]
#[must_use = "mappings may change again when this is dropped"]
pub struct Kept<'a> {
    keeper: &'a AtomicU32,
    _alone: WriteGuard<'a, LinuxHost>,
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        self.keeper.store(0, Ordering::Relaxed);
    }
}

/// A thread of ours that is none for a while; its place is kept.
struct Withdrawn<'a> {
    slot: Option<&'a AtomicU32>,
    tid: u32,
}

impl Drop for Withdrawn<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            slot.store(self.tid, Ordering::Release);
        }
    }
}

fn reserve(size: usize, align: usize, what: &'static str) -> Result<Mapping, BuildError> {
    Mapping::reserve_aligned(size, align, what).map_err(|source| BuildError::AddressSpace {
        size: ByteSize::new(size as u64),
        what,
        source,
    })
}

/// The features without which the way of reporting does not work.
const fn needed(reports: Reports) -> Features {
    match reports {
        Reports::Messages => Features::WP
            .union(Features::EVENT_REMAP)
            .union(Features::EVENT_REMOVE)
            .union(Features::EVENT_UNMAP)
            .union(Features::THREAD_ID),
        Reports::Sigbus => Features::SIGBUS,
    }
}

impl Managed {
    /// Opens userfaultfd and builds what `plan` says.
    pub fn build(plan: Plan) -> Result<Self, BuildError> {
        let useful = Features::MOVE.union(Features::POISON).union(Features::WP).union(match plan.reports {
            Reports::Messages => Features::EVENT_FORK,
            Reports::Sigbus => Features::NONE,
        });
        let uffd = Uffd::open(needed(plan.reports).union(useful))?;
        Self::on(uffd, plan)
    }

    /// Builds what `plan` says on a descriptor that exists, as a child does after fork.
    pub fn on(uffd: Uffd, plan: Plan) -> Result<Self, BuildError> {
        let missing = needed(plan.reports).without(uffd.features());
        if let Some((name, _)) = Features::NAMED.iter().find(|(_, bit)| missing.contains(*bit)) {
            return Err(BuildError::Feature(name));
        }
        // Before any mapping of ours is registered, whose end would be an event that nobody reads.
        for map in &plan.pagemaps {
            let Some(memory) = map.memory() else { continue };
            let device = || map.device().name().to_owned();
            if plan.forced_fallback || !uffd.features().contains(Features::MOVE) {
                return Err(BuildError::Coherent(device()));
            }
            // SAFETY: the device's memory, of which an absent page is touched by nobody before it has a frame.
            unsafe { uffd.register(memory, Mode::MISSING) }
                .map_err(|source| BuildError::DeviceMemory { device: device(), source })?;
        }
        let chute = match plan.reports {
            Reports::Messages => Some(Chute::new()?),
            Reports::Sigbus => None,
        };
        let mut memory = Vec::new();
        let (words, fresh) = match plan.table {
            Some(words) => (words, false),
            None => (reserve(TABLE_BYTES, 4096, "uhmm-table")?, true),
        };
        words.advise_no_huge()?;
        // SAFETY: the mapping has room for the bits behind the words.
        let used = unsafe { words.as_ptr().cast::<u64>().add(USER_PAGES.get()) };
        let over = if fresh { PageTable::over_zeros } else { PageTable::over };
        // SAFETY: the mapping is as long as the table needs and zero where unused, all of it if it was just reserved; it
        // is kept in `memory`, which outlives the table, and nobody else uses it.
        let table = unsafe { over(words.as_ptr().cast(), used, Vpn::new(0), USER_PAGES) };
        let arena = reserve(plan.arena.pages().bytes(), Geometry::M2.bytes(), "uhmm-arena")?;
        arena.advise_no_huge()?;
        let huge = match plan.huge {
            Some(size) => Some(reserve(size.pages().bytes(), Geometry::M2.bytes(), "uhmm-huge")?),
            None => None,
        };
        for mapping in [Some(&arena), huge.as_ref()].into_iter().flatten() {
            mapping.dont_fork()?;
            // SAFETY: the arenas are ours, and empty slots are never touched, so that nobody waits for a
            // handler.
            unsafe { uffd.register(mapping.range(), Mode::MISSING) }?;
        }
        if let Some(huge) = &huge {
            huge.advise_huge()?;
        }
        let options = HostOptions { forced_fallback: plan.forced_fallback, forced_pagemap: false };
        let mm = Mm::new(Parts {
            host: LinuxHost::new(uffd, chute, options)?,
            table,
            pagemaps: PagemapSet::new(plan.pagemaps),
            arena: Arena::new(arena.range(), Geometry::K4),
            huge: huge.as_ref().map(|huge| Arena::new(huge.range(), Geometry::M2)),
            windows: plan.windows,
            track: plan.track && plan.reports == Reports::Messages,
            stats: plan.stats,
        });
        memory.extend([words, arena]);
        memory.extend(huge);
        Ok(Self {
            mm,
            ranges: Lock::new(Ranges::default()),
            room: AtomicU32::new(0),
            kick: AtomicU32::new(0),
            ours: [const { AtomicU32::new(0) }; OURS],
            published: Box::new([const { [const { AtomicUsize::new(0) }; 2] }; PUBLISHED]),
            low: AtomicUsize::new(0),
            busy: AtomicU32::new(0),
            changing: Gate::new(),
            keeper: AtomicU32::new(0),
            replacing: Lock::new(None),
            memory,
        })
    }

    /// The mechanisms.
    pub const fn mm(&self) -> &Mm<LinuxHost> {
        &self.mm
    }

    /// Puts the whole mapping `range` under management.
    ///
    /// # Safety
    /// From now on a touch of an absent page of `range` waits for the engine, which must run; and the memory
    /// must not be uhmm's own.
    pub unsafe fn adopt(&self, range: VaRange) -> Result<(), RegisterError> {
        let features = self.mm.host().program().features();
        let mode = if features.contains(Features::WP) { Mode::MISSING_AND_WP } else { Mode::MISSING };
        // SAFETY: the caller's promise.
        unsafe { self.mm.host().program().register(range, mode) }?;
        if !features.contains(Features::EVENT_REMOVE) {
            self.publish(range)?;
        }
        self.ranges.lock().put(range, None);
        Ok(())
    }

    /// The same for memory that the program may unmap at any time. It counts as registered until then: to be called
    /// again before pages of it are taken out.
    ///
    /// # Safety
    /// As [`Managed::adopt`].
    pub unsafe fn watch(&self, range: VaRange) -> Result<(), RegisterError> {
        let known =
            self.ranges.lock().list.iter().any(|(known, since)| since.is_none() && known.encloses(range));
        if known {
            return Ok(());
        }
        // What this thread did to its mappings: it went on as soon as the event was read.
        self.mm.wait_for_events();
        let since = self.mm.epoch();
        // SAFETY: the caller's promise.
        unsafe { self.mm.host().program().register(range, Mode::MISSING_AND_WP) }?;
        let mut ranges = self.ranges.lock();
        // What the program has unmapped meanwhile.
        ranges.list.retain(|(range, since)| since.is_none_or(|since| !self.mm.changed_since(since, *range)));
        // Neighbours become one: whoever asks about all of it finds it watched, however many watch parts of it. None of
        // them has changed up to now, so that the moment is right for all.
        let mut whole = range;
        for (known, _) in ranges.list.iter().filter(|(_, since)| since.is_some()) {
            if known.first() <= whole.end_page() && whole.first() <= known.end_page() {
                let (first, end) = (known.first().min(whole.first()), known.end_page().max(whole.end_page()));
                whole = VaRange::page(first).grow(end.since(first));
            }
        }
        ranges.put(whole, Some(since));
        Ok(())
    }

    /// Keeps the program's mappings as they are, as far as it changes them by way of [`Managed::change_mappings`]. Not to
    /// be called by a thread that does already.
    pub fn keep_mappings(&self) -> Kept<'_> {
        let alone = self.changing.write(self.mm.host());
        self.keeper.store(this_thread(), Ordering::Relaxed);
        Kept { keeper: &self.keeper, _alone: alone }
    }

    /// The calling thread is about to change mappings, until the guard is dropped. `None` for the thread that keeps them,
    /// whose own memory may come and go.
    pub fn change_mappings(&self) -> Option<ReadGuard<'_, LinuxHost>> {
        (self.keeper.load(Ordering::Relaxed) != this_thread()).then(|| self.changing.read(self.mm.host()))
    }

    /// The frames of mappings that are being replaced.
    pub(crate) const fn replacing(&self) -> &Lock<Replacing> {
        &self.replacing
    }

    /// Whether events tell what the program does to its mappings.
    pub fn hears_events(&self) -> bool {
        self.mm.host().program().features().contains(Features::EVENT_REMOVE)
    }

    fn publish(&self, range: VaRange) -> Result<(), RegisterError> {
        for [first, pages] in self.published.iter() {
            if pages.compare_exchange(0, usize::MAX, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                first.store(range.first().get(), Ordering::Relaxed);
                pages.store(range.pages().get(), Ordering::Release);
                return Ok(());
            }
        }
        Err(RegisterError::NoMemory)
    }

    /// Whether the signal handler looks after `page`.
    pub fn covers(&self, page: Vpn) -> bool {
        self.published.iter().any(|[first, pages]| {
            let pages = pages.load(Ordering::Acquire);
            // usize::MAX marks an entry that is being written.
            pages != 0
                && pages != usize::MAX
                && page.get().wrapping_sub(first.load(Ordering::Relaxed)) < pages
        })
    }

    /// Chooses no more pages of `range` for eviction.
    pub fn retire(&self, range: VaRange) {
        self.ranges.lock().list.retain(|(other, _)| other.intersect(range).is_none());
    }

    /// Forgets `range`, which is not registered any more.
    pub fn forget(&self, range: VaRange) {
        for [first, pages] in self.published.iter() {
            if first.load(Ordering::Relaxed) == range.first().get()
                && pages.load(Ordering::Acquire) == range.pages().get()
            {
                pages.store(0, Ordering::Release);
            }
        }
        self.retire(range);
    }

    /// Replaces the list of managed ranges (sorted) by what a scan of the mappings found, all of it
    /// registered since before `since`.
    pub fn set_ranges(&self, found: &[VaRange], since: Epoch) {
        let mut ranges = self.ranges.lock();
        ranges.list.clear();
        ranges.list.extend(found.iter().map(|range| (*range, Some(since))));
    }

    /// The first managed pages at or behind `page`, if any, and since when they are known to be registered.
    pub fn range_from(&self, page: Vpn) -> Option<(VaRange, Epoch)> {
        let ranges = self.ranges.lock();
        let at = ranges.list.partition_point(|(range, _)| range.end_page() <= page);
        let (range, since) = *ranges.list.get(at)?;
        let since = since.unwrap_or_else(|| self.mm.epoch());
        Some((range.skip(page.since(range.first())).unwrap_or(range), since))
    }

    /// Gives the process frames of its own for pages of `range` that it shares with a child or a parent since a
    /// fork: such a page is busy until somebody writes to it. To be called with no lock held.
    pub fn unshare(&self, range: VaRange) {
        // A page may be under another thread's claim, and is waited for like anybody's: filled past that claim,
        // it would be zeros, and its contents be lost.
        let _away = self.withdraw_thread();
        let mut found = [VaRange::page(range.first()); 32];
        let mut rest = Some(range);
        while let Some(part) = rest {
            let (count, end) = self.mm.host().present(part, &mut found);
            // Present ones only: the others would come home for this.
            for present in &found[..count] {
                self.mm.host().unshare(*present);
            }
            rest = VaRange::of_pages(end, part.end_page().since(end));
        }
    }

    /// Brings every page of the managed ranges home.
    pub fn bring_home(&self, scratch: &mut Scratch) {
        let mut at = Vpn::new(0);
        while let Some((range, _)) = self.range_from(at) {
            self.bring_range_home(range, scratch);
            at = range.end_page();
        }
    }

    /// Brings every page of `range` home, those of coherent devices as well.
    pub fn bring_range_home(&self, range: VaRange, scratch: &mut Scratch) {
        while self.is_away(range) {
            self.mm.leave_coherent(range, scratch);
            // Whoever moves a page now is done with it soon.
            if self.mm.prefetch(range, scratch).is_zero() {
                std::thread::yield_now();
            }
        }
    }

    /// Whether some page of the managed ranges is neither at home nor lost.
    pub fn is_any_away(&self) -> bool {
        let mut at = Vpn::new(0);
        while let Some((range, _)) = self.range_from(at) {
            if self.is_away(range) {
                return true;
            }
            at = range.end_page();
        }
        false
    }

    /// Whether some page of `range` is neither at home nor lost.
    pub fn is_away(&self, range: VaRange) -> bool {
        let mut pages = self.mm.table().used(range).flat_map(VaRange::iter);
        pages.any(|page| {
            let state = self.mm.table().entry(page).load().state();
            !matches!(state, State::Empty | State::Resident | State::Poisoned)
        })
    }

    /// Notes that the calling thread is one of ours for good, and may touch managed memory under its own claims.
    pub fn note_ours(&self) {
        let tid = this_thread();
        let free =
            |slot: &&AtomicU32| slot.compare_exchange(0, tid, Ordering::AcqRel, Ordering::Acquire).is_ok();
        let noted = self.ours.iter().find(free).is_some();
        debug_assert!(noted, "more threads of our own than there is room for");
    }

    /// Notes the calling thread as one of ours until the guard is dropped: it is about to migrate.
    pub fn lend_thread(&self) -> Lent<'_> {
        let tid = this_thread();
        loop {
            let free = |slot: &&AtomicU32| {
                slot.compare_exchange(0, tid, Ordering::AcqRel, Ordering::Acquire).is_ok()
            };
            if let Some(slot) = self.ours.iter().find(free) {
                return Lent { slot };
            }
            rustix::thread::sched_yield();
        }
    }

    /// Makes the calling thread nobody of ours until the guard is dropped.
    fn withdraw_thread(&self) -> Withdrawn<'_> {
        let tid = this_thread();
        let slot = self.ours.iter().find(|slot| slot.load(Ordering::Relaxed) == tid);
        if let Some(slot) = slot {
            slot.store(tid | AWAY, Ordering::Release);
        }
        Withdrawn { slot, tid }
    }

    /// Whether the thread is one of ours.
    pub fn is_ours(&self, tid: u32) -> bool {
        self.ours.iter().any(|ours| ours.load(Ordering::Acquire) == tid)
    }

    /// Working memory for one more fault handler. The mapping belongs to it.
    pub fn scratch() -> io::Result<(Scratch, Mapping)> {
        let buffer = Mapping::reserve(Scratch::BUFFER_BYTES, "uhmm-scratch")?;
        // Not present yet: who meets single pages only uses a hundredth of it.
        buffer.advise_no_huge()?;
        // SAFETY: a fresh mapping of that size, all zero, used for nothing else; whoever gets the pair keeps
        // them together.
        Ok((unsafe { Scratch::new(buffer.as_ptr()) }, buffer))
    }

    /// Says that faults that found no room may try again.
    pub fn announce_room(&self) {
        self.room.fetch_add(1, Ordering::Release);
        futex::wake(&self.room, u32::MAX);
    }

    /// Asks the evictor to look, and sleeps until it says that there is room, at most so long.
    pub fn wait_for_room(&self, most: Duration) {
        let seen = self.room.load(Ordering::Acquire);
        self.kick();
        let _ = futex::wait(&self.room, seen, Some(most));
    }

    /// Has the evictor asked to look when faults may take fewer than `pages` more.
    pub fn set_low_water(&self, pages: PageCount) {
        self.low.store(pages.get(), Ordering::Relaxed);
    }

    /// A handler on the processor `cpu` waits for a device again and again; or none does any more.
    pub fn note_busy(&self, cpu: Option<u32>) {
        let busy = cpu.map_or(0, |cpu| cpu + 1);
        if self.busy.load(Ordering::Relaxed) != busy {
            self.busy.store(busy, Ordering::Relaxed);
        }
    }

    /// The processor on which who works in the background would delay the answer to every fault.
    pub fn busy_cpu(&self) -> Option<u32> {
        self.busy.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Asks the evictor to look, if faults have taken most of what they may.
    pub fn kick_if_low(&self) {
        if self.mm.allowance().get() < self.low.load(Ordering::Relaxed) {
            self.kick();
        }
    }

    /// Asks the evictor to look.
    pub fn kick(&self) {
        self.kick.fetch_add(1, Ordering::Release);
        futex::wake(&self.kick, 1);
    }

    /// Sleeps until somebody asks the evictor to look, at most so long. `seen` is the number of requests
    /// that the evictor knows of.
    pub fn wait_for_kick(&self, seen: u32, most: Duration) {
        let _ = futex::wait(&self.kick, seen, Some(most));
    }

    /// The number of requests so far.
    pub fn kicks(&self) -> u32 {
        self.kick.load(Ordering::Acquire)
    }

    /// Lets go of it in the child of a fork, where its descriptors are not: the numbers may name files of the
    /// program. The memory is unmapped.
    ///
    /// # Safety
    /// The process must be a fresh child, in which no thread of the parent runs that uses this space.
    pub unsafe fn abandon(self: Arc<Self>) {
        for mapping in &self.memory {
            // SAFETY: no thread uses the space (the caller's promise), and it is never dropped (below).
            unsafe { mapping.unmap_in_child() };
        }
        std::mem::forget(self);
    }
}
