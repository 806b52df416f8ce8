//! The managed part of one process's address space (the kernel's `mm`): the table, the arena, the
//! pagemaps and the host, tied together.
//!
//! What    [`Mm`], on which [`migrate`](crate::migrate) and [`fault`](crate::fault) are methods; here is the
//!         construction.
//! Owns    everything but the threads. Page words own device pages and arena slots; what a word gave up is
//!         freed here.
//! Locks   `layout` is the outermost: held for reading while pages are taken out or put in, for writing
//!         while the events of the program's own munmap, mremap, madvise and fork are read and applied.
//!         Reading events under the write lock is what makes the two safe against each other: from before
//!         the kernel changes a mapping until the event is read, it refuses every call of ours on any range
//!         ([`Stop::Pending`](crate::host::Stop::Pending)), and from then on the write lock does.
//! Fails   nothing here fails.
//! Rooms   `events` is what follows changes of the program's mappings, `discard` tells ours from them, `epoch` is their
//!         history; `frames` are the arenas; `age` is how long ago pages left; `allowance`, `tracking` and `waiters`
//!         are what faults ask before and after.

mod age;
mod allowance;
mod discard;
mod epoch;
mod events;
mod frames;
mod tracking;
mod waiters;

use alloc::boxed::Box;
use core::sync::atomic::AtomicBool;

use uhmm_addr::{Geometry, VaRange, Vpn};

pub use epoch::Epoch;

use discard::OwnDiscard;

use crate::fault::window::Windows;
use crate::frame::Arena;
use crate::host::Host;
use crate::notifier::{Change, Event, Invalidation, Notifiers, Owner};
use crate::pagemap::PagemapSet;
use crate::pagetable::PageTable;
use crate::pin::Pins;
use crate::stats::Stats;
use crate::sync::{AtomicU32, AtomicUsize, Gate, WriteGuard};
use epoch::CHANGES;
use tracking::PRONE;
use waiters::WAITERS;

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
    notifiers: Notifiers,
    pub(crate) pins: Pins,
    track: AtomicBool,
    // Pages that may still be taken from the system for faults; not limited where it is half of usize.
    allowance: AtomicUsize,
    // How often tracked pages of a chunk were written soon after, by hash of the chunk.
    prone: [AtomicU32; PRONE],
    // What threads sleep on that wait for a page in flight, by hash of the page.
    waiters: [AtomicU32; WAITERS],
    // What the fallback is taking away itself, set under the gate.
    own_discard: OwnDiscard,
    fallback: Gate,
    // One copying out at a time: a thread of ours that is filled past a claim is then filled past its own.
    pub(crate) copying: Gate,
    // Ranges that ceased to be what they were, as first page and length: number n at n % CHANGES.
    changes: [[AtomicUsize; 2]; CHANGES],
    epoch: AtomicUsize,
    // Parts of the budget that were evicted.
    age: AtomicU32,
    /// The device is full: fresh memory has to wait, pages that come home have not.
    growth_stopped: AtomicBool,
    // Some page was lent to a device, once.
    pub(crate) lends: AtomicBool,
    // The pages that a look ended with were huge: so are those that the next one begins with, as a rule.
    pub(crate) looks_huge: AtomicBool,
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
            notifiers: Notifiers::new(),
            pins: Pins::new(),
            track: AtomicBool::new(track),
            allowance: AtomicUsize::new(usize::MAX / 2),
            prone: core::array::from_fn(|_| AtomicU32::new(0)),
            waiters: core::array::from_fn(|_| AtomicU32::new(0)),
            own_discard: OwnDiscard::new(),
            fallback: Gate::new(),
            copying: Gate::new(),
            changes: core::array::from_fn(|_| core::array::from_fn(|_| AtomicUsize::new(0))),
            epoch: AtomicUsize::new(0),
            age: AtomicU32::new(0),
            growth_stopped: AtomicBool::new(false),
            lends: AtomicBool::new(false),
            looks_huge: AtomicBool::new(false),
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
        self.count_change(self.table.range());
        core::mem::forget(self.lock_layout());
    }

    /// Ends what [`Mm::freeze`] began, in the parent as in the child. To be called once for each freeze.
    pub fn thaw(&self) {
        self.layout.release_forgotten(&self.host);
    }

    pub(crate) fn is_present(&self, page: Vpn) -> bool {
        let mut found = [VaRange::page(page)];
        self.host.present(VaRange::page(page), &mut found).0 > 0
    }

    /// Who is told before pages change.
    pub const fn notifiers(&self) -> &Notifiers {
        &self.notifiers
    }

    /// Tells whoever subscribed that `range` changes, until the guard is dropped. Pages that move are claimed before
    /// this and settled before its end: who collects meanwhile finds them moving, or waits.
    pub(crate) fn tell(&self, range: VaRange, event: Event) -> Option<Invalidation<'_, H>> {
        self.tell_change(&Change::new(range, event))
    }

    /// As [`Mm::tell`], of a migration that is the doing of `owner`, if it is somebody's: a subscriber of that
    /// owner may pass over it.
    pub(crate) fn tell_migration(&self, range: VaRange, owner: Option<Owner>) -> Option<Invalidation<'_, H>> {
        self.tell_by(range, Event::Migrate, owner)
    }

    /// As [`Mm::tell`], of what is the doing of `owner`, if it is somebody's.
    pub(crate) fn tell_by(
        &self,
        range: VaRange,
        event: Event,
        owner: Option<Owner>,
    ) -> Option<Invalidation<'_, H>> {
        self.tell_change(&Change { owner, ..Change::new(range, event) })
    }

    fn tell_change(&self, change: &Change) -> Option<Invalidation<'_, H>> {
        let told = self.notifiers.begin(&self.host, change);
        debug_assert!(told.is_ok(), "a change that may block was refused");
        told.ok()
    }

    /// Marks the space as closing, and tells whoever subscribed; see [`Mm::is_closed`].
    pub fn close(&self) {
        self.closed.store(true, core::sync::atomic::Ordering::Release);
        self.notifiers.release(&self.host);
    }

    /// Whether the space is closing: threads that serve it come to an end.
    pub fn is_closed(&self) -> bool {
        self.closed.load(core::sync::atomic::Ordering::Acquire)
    }
}
