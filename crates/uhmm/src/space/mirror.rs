//! Mirrors of a space: a device's own page table, kept true.
//!
//! What    [`Space::mirror`] makes a [`Mirror`] of managed pages: core's, with a deadline and the memory that it works
//!         with. [`Space::protect`] changes a protection so that mirrors hear of it. [`Mirror::exclusive`] has pages for
//!         the device alone.
//! Owns    the table; the space is borrowed, and outlives the mirror.
//! Locks   `work`, by one thread that populates at a time; no fault handler and no callback takes it. Signals are
//!         blocked as long as the mirror's own lock may be held: a signal handler that touched a page would wait for
//!         its own thread.
//! Fails   with a [`MirrorError`] at the start; later with core's
//!         [`RangeFaultError`].
//!
//! ```
//! use std::collections::BTreeMap;
//! use std::sync::Arc;
//! use uhmm::mirror::{MirrorTable, PageView, Want};
//! use uhmm::notifier::Event;
//! use uhmm::{ByteSize, MemDevice, Space, VaRange, Vpn};
//!
//! /// What the device can reach.
//! #[derive(Default)]
//! struct DeviceTable(BTreeMap<Vpn, PageView>);
//!
//! impl MirrorTable for DeviceTable {
//!     fn invalidate(&mut self, range: VaRange, _event: Event) {
//!         range.iter().for_each(|page| _ = self.0.remove(&page));
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # if uhmm::Space::builder().build().is_err() { return Ok(()) } // no userfaultfd for this user
//! let vram = Arc::new(MemDevice::private(ByteSize::mib(64))?);
//! let space = Space::builder().device(vram).build()?;
//! let mut numbers = space.map::<u64>(1 << 16)?;
//! numbers[12345] = 42;
//! let mirror = space.mirror(numbers.range(), DeviceTable::default())?;
//! mirror.populate(numbers.range(), Want::Write, |table, pages| table.0.extend(pages.iter()))?;
//! let page = numbers.range().first();
//! assert!(mirror.look(|table| table.0[&page].may_write()));
//! let done = space.migrate(numbers.range())?;           // the table is told before the pages go
//! assert!(done.moved.get() > 0);
//! assert!(mirror.look(|table| table.0.is_empty()));
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::mm::MprotectFlags;
use uhmm_addr::{CHUNK_PAGES, VaRange};
use uhmm_core::fault::Scratch;
use uhmm_core::mirror::{self as core, Patience, Terms};
use uhmm_core::notifier::{Change, Event};
use uhmm_core::pagemap::Pagemap;
use uhmm_sys::clock::now;
use uhmm_sys::futex::Lock;
use uhmm_sys::host::LinuxHost;
use uhmm_sys::mapping::Mapping;
use uhmm_sys::signals::Blocked;

pub use uhmm_core::mirror::{
    Exclusive, MirrorTable, PageView, Pages, RangeFaultError, Request, Retry, Segment, Unusable, Want,
};

use super::{ProgramMapping, Space};
use crate::managed::Managed;

/// How long a batch of pages is tried unless said otherwise (the kernel's `HMM_RANGE_DEFAULT_TIMEOUT`).
pub const DEFAULT_TIMEOUT: Duration = Duration::from_millis(1000);

/// Why there is no mirror.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// Not this space's memory.
    #[error("{0} is not managed by this space")]
    Unmanaged(VaRange),
    /// The space has no such device.
    #[error("the space has no device number {0}")]
    NoDevice(usize),
    /// No memory to work with.
    #[error("no memory for the mirror to work with")]
    Memory(#[from] io::Error),
}

/// A device's table that is true about pages of a space, or says nothing about them.
#[must_use = "a mirror that is dropped is told nothing any more"]
pub struct Mirror<'s, T> {
    space: &'s Space,
    mirror: core::Mirror<'s, LinuxHost, T>,
    own: Option<Arc<Pagemap>>,
    timeout: Duration,
    work: Lock<Work>,
}

/// What populating takes, made beforehand.
struct Work {
    scratch: Scratch,
    room: Box<[Segment]>,
    // What the scratch copies through; dropped after it.
    _buffer: Mapping,
}

impl<T> fmt::Debug for Mirror<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror").field("range", &self.range()).finish_non_exhaustive()
    }
}

impl<'s, T> Mirror<'s, T> {
    pub(super) fn new(space: &'s Space, mirror: core::Mirror<'s, LinuxHost, T>) -> Result<Self, MirrorError> {
        let (scratch, buffer) = Managed::scratch()?;
        let room = vec![Segment::UNUSED; CHUNK_PAGES].into_boxed_slice();
        let work = Lock::new(Work { scratch, room, _buffer: buffer });
        Ok(Self { space, mirror, own: None, timeout: DEFAULT_TIMEOUT, work })
    }

    /// Core's mirror, for whoever has blocked signals.
    pub(super) const fn core(&self) -> &core::Mirror<'s, LinuxHost, T> {
        &self.mirror
    }

    /// Has `use_mirror` do something with core's mirror and all that this takes, in the thread that works with it now.
    pub(super) fn work<'a, R>(
        &'a self,
        use_mirror: impl FnOnce(
            &'a core::Mirror<'s, LinuxHost, T>,
            &mut [Segment],
            &mut Scratch,
            &mut dyn Patience,
        ) -> R,
    ) -> R {
        let _blocked = Blocked::all();
        let mut work = self.work.lock();
        let Work { scratch, room, .. } = &mut *work;
        let managed = &*self.space.inner.managed;
        let mut patience = Until { managed, timeout: self.timeout, end: now() };
        use_mirror(&self.mirror, room, scratch, &mut patience)
    }
}

impl Space {
    /// A mirror of `range`, with a table that says nothing yet. It is told before pages of `range` change, as with
    /// [`Space::subscribe`], and with the same limits.
    ///
    /// # Errors
    /// [`MirrorError::Unmanaged`], or no memory.
    pub fn mirror<T: MirrorTable>(&self, range: VaRange, table: T) -> Result<Mirror<'_, T>, MirrorError> {
        if !self.manages(range) {
            return Err(MirrorError::Unmanaged(range));
        }
        Mirror::new(self, self.inner.managed.mm().mirror(range, table))
    }

    /// What the pages of `range` are, into `views`, one for each page, managed or not: what is there, and for device
    /// number `own` which of its pages (the kernel's `hmm_range_fault` with nothing asked for). Nobody tells when it is
    /// over.
    ///
    /// What was done by calls that have returned is told: by the space's own, and by the program's `munmap`, `mremap`,
    /// `madvise`, `mprotect` and `fork`. What is under way makes pages absent. With [`Engine::Signal`](crate::Engine::Signal),
    /// and of pages that were not brought home by the space, that is what the system's page map said a moment ago. With
    /// [`Engine::Threads`](crate::Engine::Threads), pages that the space itself put back into RAM are told to be there
    /// without a look at the page map, because every change of theirs is heard. So of these it is not told that the system
    /// has swapped one out, joined them to a huge page or lost one to a memory error, nor that the program has put guard
    /// pages there (`MADV_GUARD_INSTALL`): a touch of their addresses finds what it would find anyway.
    ///
    /// # Errors
    /// [`RangeFaultError::Outside`].
    ///
    /// # Panics
    /// If there are more or fewer views than pages.
    pub fn snapshot(
        &self,
        range: VaRange,
        own: Option<usize>,
        views: &mut [PageView],
    ) -> Result<(), RangeFaultError> {
        assert_eq!(range.pages().get(), views.len(), "one view for each page");
        self.segments(range, own, |segment| segment.copy_to(range.first(), views))
    }

    /// The same, told in segments of pages that are alike.
    ///
    /// # Errors
    /// [`RangeFaultError::Outside`].
    pub fn segments(
        &self,
        range: VaRange,
        own: Option<usize>,
        found: impl FnMut(Segment),
    ) -> Result<(), RangeFaultError> {
        let own = own.and_then(|device| self.inner.pagemaps().get(device));
        let request = own.map_or(Request::SNAPSHOT, |own| Request::SNAPSHOT.owning(own));
        let _blocked = Blocked::all();
        self.inner.managed.mm().segments(range, &request, found)
    }

    pub(super) fn manages(&self, range: VaRange) -> bool {
        let known = self.inner.managed.range_from(range.first());
        known.is_some_and(|(known, _)| known.encloses(range))
    }

    /// Permits or forbids writing to `range`, as `mprotect`, and tells mirrors and subscribers before. When the program
    /// calls `mprotect` itself nobody hears of it.
    ///
    /// # Errors
    /// As `mprotect`; `EINVAL` if the range is not managed by this space.
    pub fn protect(&self, range: VaRange, write: bool) -> io::Result<()> {
        if !self.manages(range) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = if write { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::READ };
        let start = std::ptr::with_exposed_provenance_mut(range.start().get());
        self.protecting(range, || {
            // SAFETY: managed memory stays mapped and readable; a store that is forbidden ends the program, and does
            // not change what any reference says.
            Ok(unsafe { rustix::mm::mprotect(start, range.bytes(), flags) }?)
        })
    }

    /// Has `protect` change the protection of `range`, managed or not, and tells mirrors and subscribers before: for
    /// whoever sees the program's own calls of `mprotect`, which raise no event.
    pub fn protecting<R>(&self, range: VaRange, protect: impl FnOnce() -> R) -> R {
        self.protecting_each(&[range], protect)
    }

    /// The same for several ranges, or none, that one call changes. Not to be nested, nor with [`Space::remapping`].
    pub fn protecting_each<R>(&self, ranges: &[VaRange], protect: impl FnOnce() -> R) -> R {
        // First: a signal handler that changes mappings would wait for this very thread.
        let _blocked = Blocked::all();
        let _kept = self.inner.managed.change_mappings();
        let mm = self.inner.managed.mm();
        let begin = |range: &VaRange| mm.notifiers().begin(mm.host(), &Change::new(*range, Event::Protect));
        let told: Vec<_> = ranges.iter().map(begin).collect();
        let done = protect();
        ranges.iter().for_each(|range| mm.protected(*range));
        // A change that may block is never refused.
        drop(told);
        done
    }
}

impl<T> Mirror<'_, T> {
    /// Makes it the mirror of device number `device` of the space: pages on that device are reported where they are, and
    /// not brought home.
    ///
    /// # Errors
    /// [`MirrorError::NoDevice`].
    pub fn of_device(mut self, device: usize) -> Result<Self, MirrorError> {
        let map = self.space.inner.pagemaps().get(device).ok_or(MirrorError::NoDevice(device))?;
        self.own = Some(map.clone());
        Ok(self)
    }

    /// Tries each batch of pages for so long; [`DEFAULT_TIMEOUT`] otherwise.
    pub const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The pages that it is about.
    pub const fn range(&self) -> VaRange {
        self.mirror.range()
    }

    /// Makes the pages of `range` what `request` asks, and has `install` put them into the table, in segments of pages that
    /// are alike, many or few at a time. What is installed is true at that moment, and is invalidated before it is not; see
    /// [`Mirror::populate`](uhmm_core::mirror::Mirror::populate).
    ///
    /// Like a touch of the pages it waits for devices and for room. `install` must not touch managed memory, or call the
    /// space or the mirror; nor allocate, if the process forks meanwhile.
    ///
    /// # Errors
    /// See [`RangeFaultError`]. Batches before the one that failed are installed.
    pub fn populate<'r>(
        &self,
        range: VaRange,
        request: impl Into<Request<'r>>,
        install: impl FnMut(&mut T, Pages<'_>),
    ) -> Result<(), RangeFaultError> {
        let own = self.own.as_ref();
        let request = request.into();
        let request = own.map_or(request, |own| request.owning(own));
        self.work(|mirror, room, scratch, patience| {
            mirror.populate(range, &request, room, scratch, patience, install)
        })
    }

    /// Makes the pages of `range` the device's alone, and has `install` put them into the table with the addresses of
    /// their frames ([`PageView::Exclusive`]), a chunk at a time at most. A touch of such a page, by any thread or the
    /// kernel, tells the table to forget it and brings it home with what the device wrote; see
    /// [`Mirror::exclusive`](uhmm_core::mirror::Mirror::exclusive).
    ///
    /// The device touches frames in `install`, or in [`Mirror::look`], and nowhere else. `install` has the duties that it
    /// has with [`Mirror::populate`]. Pages that could not be had are told as they are, and counted.
    ///
    /// ```
    /// use std::sync::atomic::{AtomicU64, Ordering};
    /// use uhmm::mirror::{MirrorTable, PageView};
    /// use uhmm::notifier::Event;
    /// use uhmm::{Space, VaRange, VirtAddr};
    ///
    /// /// The frame of the one page that the device counts in.
    /// struct Counter(Option<VirtAddr>);
    ///
    /// impl MirrorTable for Counter {
    ///     fn invalidate(&mut self, _range: VaRange, _event: Event) {
    ///         self.0 = None;
    ///     }
    /// }
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # if uhmm::Space::builder().build().is_err() { return Ok(()) } // no userfaultfd for this user
    /// let space = Space::builder().build()?;
    /// let mut numbers = space.map::<u64>(512)?;
    /// numbers[0] = 41;
    /// let mirror = space.mirror(numbers.range(), Counter(None))?;
    /// let done = mirror.exclusive(numbers.range(), |counter, pages| {
    ///     counter.0 = pages.views().find_map(|view| match view {
    ///         PageView::Exclusive { at } => Some(at),
    ///         _ => None,
    ///     });
    /// })?;
    /// assert_eq!(done.pages.get(), 1);
    /// mirror.look(|counter| {
    ///     let frame = std::ptr::with_exposed_provenance_mut(counter.0.unwrap().get());
    ///     // SAFETY: the frame is the device's alone as long as the table says so, which it does until `look` ends.
    ///     unsafe { AtomicU64::from_ptr(frame) }.fetch_add(1, Ordering::Relaxed);
    /// });
    /// assert_eq!(numbers[0], 42);                          // the touch brings the page home
    /// assert!(mirror.look(|counter| counter.0.is_none()));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// See [`RangeFaultError`]; the mappings must permit writing. Batches before the one that failed are installed.
    pub fn exclusive(
        &self,
        range: VaRange,
        install: impl FnMut(&mut T, Pages<'_>),
    ) -> Result<Exclusive, RangeFaultError>
    where
        T: MirrorTable,
    {
        let managed = &*self.space.inner.managed;
        let since = match managed.range_from(range.first()) {
            Some((known, since)) if known.encloses(range) => since,
            // An adoption may come to its end while a mirror is there: what comes home then is not to leave again.
            _ => return Err(RangeFaultError::Fault(range.start())),
        };
        let terms = Terms { since, by: self.own.as_ref().map(|own| own.owner()) };
        let _blocked = Blocked::all();
        let mut work = self.work.lock();
        let Work { scratch, room, .. } = &mut *work;
        let mut patience = Until { managed, timeout: self.timeout, end: now() };
        self.bring_in_place_home(range, scratch);
        self.mirror.exclusive(range, &terms, room, scratch, &mut patience, install)
    }

    /// Brings home what is mapped in place: a coherent device's frame is not to be lent. Nothing where something may
    /// not be written, as nothing can be lent then either.
    fn bring_in_place_home(&self, range: VaRange, scratch: &mut Scratch) {
        let space = self.space;
        let writable = |mappings: Vec<ProgramMapping>| mappings.iter().all(|mapping| mapping.write);
        if space.inner.managed.mapped_in_place(range).is_zero() || !space.mappings(range).is_ok_and(writable)
        {
            return;
        }
        for map in space.inner.pagemaps().iter() {
            if map.memory().is_some() {
                let _ = space.inner.managed.mm().evict_pfns(range, map.range(), None, scratch);
            }
        }
    }

    /// What the pages of `range` are, into `views`, one for each page, and without a word to the table.
    ///
    /// # Errors
    /// [`RangeFaultError::Outside`].
    ///
    /// # Panics
    /// If there are more or fewer views than pages.
    pub fn snapshot(&self, range: VaRange, views: &mut [PageView]) -> Result<(), RangeFaultError> {
        assert_eq!(range.pages().get(), views.len(), "one view for each page");
        self.segments(range, |segment| segment.copy_to(range.first(), views))
    }

    /// The same, told in segments of pages that are alike. What was found of whole chunks in RAM is known until they
    /// change, and is not looked at again, where the engine hears of changes ([`Engine::Threads`](crate::Engine::Threads)).
    ///
    /// # Errors
    /// [`RangeFaultError::Outside`].
    pub fn segments(&self, range: VaRange, found: impl FnMut(Segment)) -> Result<(), RangeFaultError> {
        let own = self.own.as_ref();
        let request = own.map_or(Request::SNAPSHOT, |own| Request::SNAPSHOT.owning(own));
        let _blocked = Blocked::all();
        self.mirror.segments(range, &request, found)
    }

    /// Looks something up in the table, whose entries are true as long as this lasts. `look` must not touch managed
    /// memory, or call the space or the mirror.
    pub fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        let _blocked = Blocked::all();
        self.mirror.look(look)
    }

    /// Ends the mirror; the table is told nothing any more.
    pub fn into_table(self) -> T {
        self.mirror.into_table()
    }
}

/// Tries until some time has passed.
struct Until<'a> {
    managed: &'a Managed,
    timeout: Duration,
    end: Duration,
}

impl Patience for Until<'_> {
    fn begin(&mut self) {
        self.end = now() + self.timeout;
    }

    fn again(&mut self, why: Retry) -> bool {
        if now() >= self.end {
            return false;
        }
        match why {
            // Whoever moves the page was waited for already.
            Retry::Changed | Retry::InFlight => {}
            Retry::Pending => rustix::thread::sched_yield(),
            Retry::Starved => self.managed.wait_for_room(Duration::from_millis(1)),
        }
        true
    }

    fn moving(&mut self, work: &mut dyn FnMut()) {
        let _lent = self.managed.lend_thread();
        work();
    }
}
