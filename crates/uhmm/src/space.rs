//! [`Space`]: managed memory for a program that knows about it.
//!
//! What    memory that can be moved to a device and comes home when it is touched, from any thread; with
//!         prefetch, eviction, and an answer to "where is this page".
//! Owns    every thread that serves it, and the memory that it mapped. Memory that was adopted stays its
//!         owner's and is brought home when the adoption ends.
//! Locks   none of its own beyond those of [`Managed`]; methods may be called from any thread.
//! Fails   each operation has its own small error; pages that did not move are counted by reason.
//!
//! ```
//! use std::sync::Arc;
//! use uhmm::{ByteSize, MemDevice, Space};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # if uhmm::Space::builder().build().is_err() { return Ok(()) } // no userfaultfd for this user
//! let vram = Arc::new(MemDevice::private(ByteSize::mib(64))?);
//! let space = Space::builder().device(vram).build()?;
//! let mut numbers = space.map::<u64>(1 << 20)?;
//! numbers[12345] = 42;
//! let done = space.migrate(numbers.range())?;       // its pages are on the device now
//! assert!(done.moved.get() > 0);
//! assert_eq!(numbers[12345], 42);                   // a touch brings the page home
//! # Ok(())
//! # }
//! ```

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::Duration;

use uhmm_addr::{ByteSize, Geometry, PageCount, Pfn, RangeError, VaRange, VirtAddr, Vpn};
use uhmm_core::device::Device;
use uhmm_core::migrate::{Migrated, Select};
use uhmm_core::pagemap::Pagemap;
use uhmm_core::pagetable::State;
use uhmm_core::stats::{Counter, Skip, Skipped};
use uhmm_core::sync::WriteGuard;
use uhmm_sys::host::LinuxHost;
use uhmm_sys::mapping::Mapping;
use uhmm_sys::placement::{self, ThreadCpu};
use uhmm_sys::signals::Blocked;
use uhmm_sys::uffd::{RegisterError, Uffd};

use crate::buffer::{Buffer, Plain};
use crate::engine::Engine;
use crate::engine::signal::{self, EnlistError, Membership};
use crate::engine::threads::{self, Crew, Hooks, Role};
use crate::managed::{BuildError, Managed, Plan, Reports};
use crate::reclaim::{Gauge, Governor, Outcome, Reclaimer};

static THREADS: ThreadCpu = ThreadCpu::new();

/// Why a space could not be built.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// Userfaultfd or address space is missing; the message says what would help.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The signal handler could not be installed.
    #[error(transparent)]
    Signal(#[from] EnlistError),
    /// A thread could not be started, or a file of this process not opened.
    #[error("the space's threads cannot be started")]
    Threads(#[from] io::Error),
    /// A budget needs a device to evict to.
    #[error("a limit of {0} needs a device to which pages can be moved; add one with `device`")]
    NoDevice(ByteSize),
    /// The budget is too small to work with.
    #[error("a limit of {given} is too small; at least {least} are needed")]
    Budget {
        /// What was asked for.
        given: ByteSize,
        /// The least that works.
        least: ByteSize,
    },
}

/// Why memory could not be mapped or adopted.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The address or the length is no range of whole pages.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// More elements than there are addresses.
    #[error("{0} elements do not fit into the address space")]
    TooLarge(usize),
    /// The system refused the memory.
    #[error("the memory cannot be mapped")]
    Map(#[from] io::Error),
    /// The kernel does not let this memory be watched.
    #[error("the memory cannot be watched: it must be private and anonymous")]
    Register(#[from] RegisterError),
}

/// Why a migration could not be tried. What happened to single pages is in the result.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MigrateError {
    /// The space has no such device.
    #[error("the space has no device number {0}")]
    NoDevice(usize),
    /// Not this space's memory.
    #[error("{0} is not managed by this space")]
    Unmanaged(VaRange),
}

/// Where pages are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Residency {
    /// In RAM, where the program can touch them at once.
    pub resident: PageCount,
    /// In RAM, on their way out: a touch takes them back.
    pub staged: PageCount,
    /// On a device.
    pub device: PageCount,
    /// Nowhere yet: never touched, or given up. They read as zeros.
    pub absent: PageCount,
    /// Lost by a device.
    pub poisoned: PageCount,
}

/// What to build a [`Space`] from.
#[must_use]
pub struct Builder {
    ram: Option<ByteSize>,
    engine: Engine,
    devices: Vec<Arc<dyn Device>>,
    huge: bool,
    forced_fallback: bool,
    window: PageCount,
    arena: ByteSize,
}

/// The least budget that a space works with.
pub const LEAST_BUDGET: ByteSize = ByteSize::mib(1);

impl Builder {
    /// Keeps resident memory at `limit` at most, evicting cold pages to the first device in the background.
    pub fn ram(mut self, limit: ByteSize) -> Self {
        self.ram = Some(limit);
        self
    }

    /// How faults are served.
    pub fn engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }

    /// Adds a device; the first is number 0.
    pub fn device(mut self, device: Arc<dyn Device>) -> Self {
        self.devices.push(device);
        self
    }

    /// Moves huge pages (2 MiB) whole, out and back. Off by default: a touch then brings 2 MiB.
    pub fn huge_pages(mut self, keep: bool) -> Self {
        self.huge = keep;
        self
    }

    /// Pages that a touch at random brings home; sequences grow from there. 1 by default.
    pub fn window(mut self, pages: PageCount) -> Self {
        self.window = pages;
        self
    }

    /// Addresses for frames on their way; 256 MiB by default.
    pub fn arena(mut self, size: ByteSize) -> Self {
        self.arena = size;
        self
    }

    /// Behaves as on a kernel without `UFFDIO_MOVE`: pages are copied out behind a write protection.
    pub fn forced_fallback(mut self, forced: bool) -> Self {
        self.forced_fallback = forced;
        self
    }

    /// Builds the space and starts its threads.
    pub fn build(self) -> Result<Space, SpaceError> {
        if let Some(given) = self.ram {
            if self.devices.is_empty() {
                return Err(SpaceError::NoDevice(given));
            }
            if given < LEAST_BUDGET {
                return Err(SpaceError::Budget { given, least: LEAST_BUDGET });
            }
        }
        let mut start = Pfn::new(1 << 20);
        let mut pagemaps = Vec::new();
        for device in self.devices {
            let map = Pagemap::new(start, device);
            start = Pfn::new(map.range().end().get().next_multiple_of(uhmm_addr::CHUNK_PAGES as u64));
            pagemaps.push(Arc::new(map));
        }
        let reports = match self.engine {
            Engine::Signal => Reports::Sigbus,
            Engine::Threads => Reports::Messages,
        };
        let managed = Arc::new(Managed::build(Plan {
            reports,
            table: None,
            arena: self.arena,
            huge: self.huge.then_some(self.arena),
            pagemaps: pagemaps.clone(),
            random_window: self.window,
            most_window: uhmm_core::fault::MAX_WINDOW,
            track: true,
            forced_fallback: self.forced_fallback,
            stats: None,
        })?);
        let mut inner = Inner { managed, pagemaps, membership: None, crew: None, threads: Vec::new() };
        match self.engine {
            Engine::Signal => inner.membership = Some(signal::enlist(inner.managed.clone())?),
            Engine::Threads => inner.start_handlers()?,
        }
        if let Some(limit) = self.ram {
            inner.start_evictor(limit)?;
        }
        Ok(Space { inner: Arc::new(inner) })
    }
}

/// An address space's managed part. Cheap to clone; memory mapped from it keeps it alive.
#[derive(Clone, Debug)]
pub struct Space {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) managed: Arc<Managed>,
    pagemaps: Vec<Arc<Pagemap>>,
    membership: Option<Membership>,
    crew: Option<Arc<Crew>>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space").field("pagemaps", &self.pagemaps).finish_non_exhaustive()
    }
}

impl Space {
    /// A space with the signal engine, no limit and no device, to be changed from there.
    pub fn builder() -> Builder {
        Builder {
            ram: None,
            engine: Engine::default(),
            devices: Vec::new(),
            huge: false,
            forced_fallback: false,
            window: PageCount::ONE,
            arena: ByteSize::mib(256),
        }
    }

    /// Fresh managed memory for `len` elements, all zero.
    pub fn map<T: Plain>(&self, len: usize) -> Result<Buffer<T>, MapError> {
        self.map_with(len, |_| Ok(()))
    }

    /// As [`Space::map`], all of it there from the start, in huge pages as far as the system has them. Memory
    /// that is touched bit by bit under management grows by small pages.
    pub fn map_huge<T: Plain>(&self, len: usize) -> Result<Buffer<T>, MapError> {
        self.map_with(len, |mapping| {
            mapping.advise_huge()?;
            mapping.populate()
        })
    }

    fn map_with<T: Plain>(
        &self,
        len: usize,
        prepare: impl FnOnce(&Mapping) -> io::Result<()>,
    ) -> Result<Buffer<T>, MapError> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|bytes| *bytes < 1 << 46);
        let bytes = bytes.ok_or(MapError::TooLarge(len))?.max(1).next_multiple_of(4096);
        let mapping = Mapping::reserve_aligned(bytes, Geometry::M2.bytes(), "uhmm-space")?;
        let blocked = Blocked::all();
        prepare(&mapping)?;
        // SAFETY: fresh memory, reached through the buffer only; the engine runs as long as the space, which
        // the buffer keeps alive.
        unsafe { self.inner.managed.adopt(mapping.range()) }?;
        drop(blocked);
        Ok(Buffer::new(self.inner.clone(), mapping, len))
    }

    /// Puts memory that exists under management: private, anonymous, whole pages.
    ///
    /// # Safety
    /// The memory must stay mapped until the adoption is dropped, must not be uhmm's own, and with
    /// [`Engine::Signal`] no system call may be given addresses in it that are not resident.
    pub unsafe fn adopt(&self, start: *mut u8, len: usize) -> Result<Adoption, MapError> {
        let range = VaRange::new(VirtAddr::of(start), len)?;
        let _blocked = Blocked::all();
        // SAFETY: the caller's promise.
        unsafe { self.inner.managed.adopt(range) }?;
        Ok(Adoption { inner: self.inner.clone(), range })
    }

    /// Moves the resident pages of `range` to the first device.
    pub fn migrate(&self, range: VaRange) -> Result<Migrated, MigrateError> {
        self.migrate_to(range, 0)
    }

    /// Moves the resident pages of `range` to device number `device`.
    pub fn migrate_to(&self, range: VaRange, device: usize) -> Result<Migrated, MigrateError> {
        let map = self.inner.pagemaps.get(device).ok_or(MigrateError::NoDevice(device))?;
        let managed = &self.inner.managed;
        // A signal handler that touched a page under our claim would wait for ourselves.
        let _blocked = Blocked::all();
        let _lent = managed.lend_thread();
        let since = match managed.range_from(range.first()) {
            Some((known, since)) if known.encloses(range) => since,
            _ => return Err(MigrateError::Unmanaged(range)),
        };
        let first = managed.mm().migrate(range, since, map, Select::All);
        if first.skipped.get(Skip::Busy) == 0 {
            return Ok(first);
        }
        // Shared with a child since a fork, or pinned; pages that are shared can be had for a copy.
        managed.unshare(range);
        let second = managed.mm().migrate(range, since, map, Select::All);
        Ok(Migrated { moved: first.moved.plus(second.moved), skipped: second.skipped })
    }

    /// Brings the pages of `range` home ahead of any touch. Returns how many came.
    pub fn prefetch(&self, range: VaRange) -> io::Result<PageCount> {
        let (mut scratch, _buffer) = Managed::scratch()?;
        let _blocked = Blocked::all();
        Ok(self.inner.managed.mm().prefetch(range, &mut scratch))
    }

    /// Moves up to `pages` cold pages, wherever they are, to the first device. Returns how many went.
    pub fn evict(&self, pages: PageCount) -> Result<PageCount, MigrateError> {
        let map = self.inner.pagemaps.first().ok_or(MigrateError::NoDevice(0))?;
        let mut reclaimer = Reclaimer::new(self.inner.managed.clone(), map.clone());
        let _blocked = Blocked::all();
        let _lent = self.inner.managed.lend_thread();
        let mut moved = PageCount::ZERO;
        while moved < pages {
            let staged = reclaimer.stage(pages.minus(moved));
            let written = reclaimer.write_back(pages.minus(moved));
            moved = moved.plus(written.moved);
            if staged.is_zero() && written.moved.is_zero() {
                break;
            }
        }
        Ok(moved)
    }

    /// Where the pages of `range` are.
    pub fn residency(&self, range: VaRange) -> Residency {
        self.inner.managed.residency(range)
    }

    /// A counter's value.
    pub fn count(&self, counter: Counter) -> u64 {
        self.inner.managed.mm().stats().get(counter)
    }

    /// Pages that did not move so far, by reason.
    pub fn skipped(&self) -> Skipped {
        self.inner.managed.mm().stats().skipped()
    }

    /// Pages in use on device number `device`.
    pub fn device_pages(&self, device: usize) -> Option<PageCount> {
        self.inner.pagemaps.get(device).map(|map| map.live())
    }
}

impl Managed {
    /// Where the pages of `range` are. A snapshot; pages may move while it is taken.
    pub fn residency(&self, range: VaRange) -> Residency {
        let mut found = Residency::default();
        let add = |count: &mut PageCount, pages| *count = count.plus(PageCount::new(pages));
        let mut away = 0;
        for part in self.mm().table().used(range) {
            for page in part.iter() {
                let count = match self.mm().table().entry(page).load().state() {
                    State::Empty | State::Resident => continue,
                    State::Staged | State::Moving => &mut found.staged,
                    State::Device | State::Coherent | State::Exclusive => &mut found.device,
                    State::Poisoned => &mut found.poisoned,
                };
                add(count, 1);
                away += 1;
            }
        }
        found.resident = self.present(range);
        found.absent = range.pages().minus(found.resident).minus(PageCount::new(away));
        found
    }

    /// Pages of `range` that are in RAM.
    pub fn present(&self, range: VaRange) -> PageCount {
        let mut regions = [uhmm_sys::scan::Region::UNUSED; 32];
        let mut pages = PageCount::ZERO;
        let mut rest = Some(range);
        while let Some(part) = rest {
            let Ok(scanned) = self.mm().host().scanner().present(part, &mut regions) else { break };
            for region in &regions[..scanned.regions] {
                pages = pages.plus(region.range.pages());
            }
            let end = scanned.walk_end.page().max(part.first().forward(PageCount::ONE));
            rest = VaRange::of_pages(end, part.end_page().since(end));
        }
        pages
    }
}

/// What a thread of a space does.
type Work = Box<dyn FnOnce(&Managed, &Crew) + Send>;

impl Inner {
    fn start_handlers(&mut self) -> io::Result<()> {
        let crew = Arc::new(Crew::new(&THREADS));
        let cpus = placement::allowed_cpus()?;
        let pinned: Vec<Role> =
            if cpus.count() > 1 { cpus.iter().map(Role::Pinned).collect() } else { Vec::new() };
        // A thread that forks holds the allocator's locks until a handler has read its event, and a thread
        // allocates while it starts: no range is watched before every handler is there.
        let ready = Arc::new(Barrier::new(pinned.len() + 3));
        let mut start = |work: Work| -> io::Result<()> {
            let (managed, crew, ready) = (self.managed.clone(), crew.clone(), ready.clone());
            let thread = std::thread::Builder::new().name("uhmm-handler".into()).spawn(move || {
                // The program's signal handlers may touch managed memory; not on this thread.
                let _blocked = Blocked::all();
                ready.wait();
                work(&managed, &crew);
            })?;
            self.threads.push(thread);
            Ok(())
        };
        for role in std::iter::once(Role::First).chain(pinned) {
            let (mut scratch, buffer) = Managed::scratch()?;
            start(Box::new(move |managed, crew| {
                threads::serve(managed, crew, &SpaceHooks, role, &mut scratch);
                drop(buffer);
            }))?;
        }
        start(Box::new(threads::keep_awake))?;
        ready.wait();
        self.crew = Some(crew);
        Ok(())
    }

    fn start_evictor(&mut self, limit: ByteSize) -> io::Result<()> {
        let managed = self.managed.clone();
        let reclaimer = Reclaimer::new(managed.clone(), self.pagemaps[0].clone());
        let gauge = SpaceGauge { managed: managed.clone(), counted: None };
        let mut governor = Governor::new(reclaimer, gauge, limit.pages());
        let thread = std::thread::Builder::new().name("uhmm-evict".into()).spawn(move || {
            let _blocked = Blocked::all();
            if let Ok(tid) = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get())
                && let Some(tid) = std::num::NonZeroU32::new(tid)
            {
                managed.note_ours(tid);
            }
            while !managed.mm().is_closed() {
                let seen = managed.kicks();
                let nap = match governor.cycle() {
                    Outcome::Room(nap) => nap,
                    // A library user's memory is not worth a process: the space grows beyond its limit.
                    Outcome::Stuck | Outcome::Full | Outcome::Failed => {
                        managed.mm().stop_growth(false);
                        managed.mm().grant(PageCount::new(64));
                        managed.announce_room();
                        // Not cut short by the next request: another look would take the grant back before
                        // anybody has used it.
                        std::thread::sleep(Duration::from_millis(1));
                        Duration::ZERO
                    }
                };
                managed.wait_for_kick(seen, nap);
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Brings the pages of `range` home and ends the watch over them.
    pub(crate) fn release(&self, range: VaRange) {
        let mm = self.managed.mm();
        // A signal handler that touched a page would wait for the locks that we take.
        let _blocked = Blocked::all();
        // No page of it is chosen for eviction from now on; those that were chosen before come home as well.
        self.managed.retire(range);
        let (mut scratch, _buffer) = loop {
            match Managed::scratch() {
                Ok(scratch) => break scratch,
                // Without memory for this the contents could not be kept; somebody else's may go meanwhile.
                Err(_) => std::thread::yield_now(),
            }
        };
        loop {
            while self.managed.is_away(range) {
                if mm.prefetch(range, &mut scratch).is_zero() {
                    std::thread::yield_now();
                }
            }
            let layout = mm.lock_layout();
            if self.managed.is_away(range) {
                continue;
            }
            self.managed.forget(range);
            mm.unmapped(&layout, range);
            let _ = mm.host().program().unregister(range);
            return;
        }
    }

    /// The memory of `range` goes away, contents and all.
    pub(crate) fn unmap(&self, mapping: Mapping) {
        let _blocked = Blocked::all();
        let range = mapping.range();
        self.managed.forget(range);
        let mm = self.managed.mm();
        mm.unmapped(&mm.lock_layout(), range);
        mm.pass_discards();
        let layout = mm.lock_layout();
        // Unregistered first, so that unmapping raises no event that would wait for this very lock.
        let _ = mm.host().program().unregister(range);
        drop(mapping);
        drop(layout);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.managed.mm().close();
        self.managed.kick();
        if let Some(crew) = &self.crew {
            crew.wake_all();
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
        drop(self.membership.take());
    }
}

/// Memory of the caller's under management; ends, with every page home, when dropped.
#[derive(Debug)]
pub struct Adoption {
    inner: Arc<Inner>,
    range: VaRange,
}

impl Adoption {
    /// The adopted range.
    pub const fn range(&self) -> VaRange {
        self.range
    }
}

impl Drop for Adoption {
    fn drop(&mut self) {
        self.inner.release(self.range);
    }
}

/// Counts what a space has in RAM: by the counters between two exact counts.
#[derive(Debug)]
struct SpaceGauge {
    managed: Arc<Managed>,
    counted: Option<(std::time::Instant, i64)>,
}

/// How long an estimate may drift before pages are counted again.
const RECOUNT: Duration = Duration::from_millis(100);

impl SpaceGauge {
    /// What the counters say came in, less what went out.
    fn balance(&self) -> i64 {
        let get = |counter| self.managed.mm().stats().get(counter) as i64;
        get(Counter::Filled) + get(Counter::MovedIn) + get(Counter::TakenBack) - get(Counter::MovedOut)
    }

    fn count(&self) -> PageCount {
        let mut pages = PageCount::ZERO;
        let mut at = Vpn::new(0);
        while let Some((range, _)) = self.managed.range_from(at) {
            pages = pages.plus(self.managed.present(range));
            at = range.end_page();
        }
        pages
    }
}

impl Gauge for SpaceGauge {
    fn resident(&mut self) -> io::Result<PageCount> {
        let mm = self.managed.mm();
        let slots = mm.arena().range().pages().minus(mm.arena().free_slots(mm.host()));
        let offset = match self.counted {
            Some((when, offset)) if when.elapsed() < RECOUNT => offset,
            _ => {
                // Pages that came while others were counted may be missing from the count: the balance of
                // before then gives too much, which is evicted, instead of too little, which breaks the limit.
                let before = self.balance();
                let counted = self.count().get() as i64;
                let offset = counted - before.min(self.balance());
                self.counted = Some((std::time::Instant::now(), offset));
                offset
            }
        };
        let home = usize::try_from(self.balance() + offset).unwrap_or(0);
        Ok(PageCount::new(home).plus(slots))
    }

    fn adopt(&mut self) {}
}

/// A space's handlers have nobody to tell but the space's own counters.
struct SpaceHooks;

static FORKED: AtomicU64 = AtomicU64::new(0);

impl Hooks for SpaceHooks {
    fn forked(&self, managed: &Managed, layout: &WriteGuard<'_, LinuxHost>, child: Uffd) {
        // A child has no engine of its own: it gets its pages now.
        crate::child::populate(managed, layout, &child);
        FORKED.fetch_add(1, Ordering::Relaxed);
    }

    fn starved(&self, managed: &Managed, _waited: Duration) {
        managed.wait_for_room(Duration::from_millis(1));
    }

    fn resolved(&self, _took: Duration) {}
}

impl Space {
    /// Forks of the process so far whose children were given copies of all their managed pages. A child keeps
    /// its memory but not the space: what it holds stays in its RAM.
    pub fn forks() -> u64 {
        FORKED.load(Ordering::Relaxed)
    }
}
