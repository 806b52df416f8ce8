//! [`Space`]: managed memory for a program that knows about it.
//!
//! What    memory that can be moved to a device and comes home when it is touched, from any thread; with
//!         prefetch, eviction, and an answer to "where is this page".
//! Owns    every thread that serves it, and the memory that it mapped. Memory that was adopted stays its
//!         owner's and is brought home when the adoption ends.
//! Locks   none of its own beyond those of [`Managed`]; methods may be called from any thread.
//! Fails   each operation has its own small error; pages that did not move are counted by reason.
//! Rooms   `builder` makes a space; `handlers` and `evictor` are its threads; `residency` says where pages are, and
//!         `pins` keeps them there; `adoption` is memory that was there before, `program` what the program maps as it
//!         likes, `detach` what it has of files; `migration` moves the pages of a range, `evacuation` those of a device;
//!         `node` is slower memory that is added and removed;
//!         [`mirror`] is for a device's own page table, [`userptr`] for a device's single jobs, [`dma`] for the addresses
//!         that it uses. Here are the other operations.
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

mod adoption;
mod builder;
mod detach;
pub mod dma;
mod evacuation;
mod evictor;
mod handlers;
mod migration;
pub mod mirror;
mod node;
mod pins;
mod program;
mod residency;
pub mod userptr;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use uhmm_addr::{Geometry, PageCount, Pfn, RangeError, VaRange};
use uhmm_core::device::DevicePage;
use uhmm_core::notifier::{Owner, Subscriber, Subscription};
use uhmm_core::pagemap::{Pagemap, PagemapSet};
use uhmm_core::stats::{Counter, Skipped};
use uhmm_sys::host::LinuxHost;
use uhmm_sys::mapping::Mapping;
use uhmm_sys::signals::Blocked;
use uhmm_sys::uffd::RegisterError;

pub use adoption::Adoption;
pub use builder::{Builder, LEAST_BUDGET, SpaceError};
pub(crate) use detach::Replacing;
pub use detach::{DetachError, Detached};
pub use evacuation::{DrainError, Drained, Evacuated, InUse};
pub use migration::Migration;
pub(crate) use node::Nodes;
pub use node::{AddMemoryError, Node, RemoveMemoryError};
pub use pins::Pinned;
pub use program::{MappingKind, ProgramMapping};
pub use residency::Residency;

use crate::buffer::{Buffer, Plain};
use crate::engine::signal::Membership;
use crate::engine::threads::Crew;
use crate::managed::Managed;
use crate::reclaim::Reclaimer;

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
    /// The signal engine does not hear what a program does to its mappings.
    #[error("memory that the program may unmap needs the engine `Threads`")]
    Deaf,
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
    /// A device cannot be emptied onto itself.
    #[error("device number {0} cannot be emptied onto itself")]
    Itself(usize),
    /// No memory to work with.
    #[error("there is no memory for the buffer through which pages go")]
    NoMemory,
}

/// An address space's managed part. Cheap to clone; memory mapped from it keeps it alive.
#[derive(Clone, Debug)]
pub struct Space {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) managed: Arc<Managed>,
    nodes: Arc<Nodes>,
    /// Whether resident memory has a limit; then there is a device.
    limited: bool,
    stops: Vec<evacuation::Stops>,
    membership: Option<Membership>,
    crew: Option<Arc<Crew>>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space").field("pagemaps", self.pagemaps()).finish_non_exhaustive()
    }
}

impl Space {
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

    /// Tells `subscriber` before pages of `range` change, until the subscription is dropped (the kernel's
    /// `mmu_interval_notifier_insert`): pages that move to or from a device, contents that are given up, mappings
    /// that go, a fork, the end of the space. What the program does past the space is told when its event is read,
    /// which may be a moment after the pages went; the signal engine hears of none of that.
    pub fn subscribe(&self, range: VaRange, subscriber: Arc<dyn Subscriber>) -> Subscription<'_, LinuxHost> {
        let mm = self.inner.managed.mm();
        mm.notifiers().subscribe(mm.host(), range, subscriber)
    }

    /// Brings the pages of `range` home ahead of any touch. Returns how many came.
    pub fn prefetch(&self, range: VaRange) -> io::Result<PageCount> {
        let (mut scratch, _buffer) = Managed::scratch()?;
        let _blocked = Blocked::all();
        Ok(self.inner.managed.mm().prefetch(range, &mut scratch))
    }

    /// Moves up to `pages` cold pages, wherever they are, to the first device. Returns how many went.
    pub fn evict(&self, pages: PageCount) -> Result<PageCount, MigrateError> {
        let map = self.pagemap(0)?;
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

    /// Whether no page of `range` is on its way, as [`Residency::staged`] counts them; touches no page, and asks nobody.
    pub fn is_settled(&self, range: VaRange) -> bool {
        self.inner.managed.is_settled(range)
    }

    /// A counter's value.
    pub fn count(&self, counter: Counter) -> u64 {
        self.inner.managed.mm().stats().get(counter)
    }

    /// Pages that did not move so far, by reason.
    pub fn skipped(&self) -> Skipped {
        self.inner.managed.mm().stats().skipped()
    }

    /// Whose the pages of device number `device` are.
    pub fn owner(&self, device: usize) -> Option<Owner> {
        self.inner.pagemaps().get(device).map(|map| map.owner())
    }

    fn pagemap(&self, device: usize) -> Result<&Arc<Pagemap>, MigrateError> {
        self.is_there(device)?;
        self.inner.pagemaps().get(device).ok_or(MigrateError::NoDevice(device))
    }

    /// Where page `pfn` of device number `device` lies on it, as its own driver wants to know. `None` if it is not one
    /// of its pages.
    pub fn device_page(&self, device: usize, pfn: Pfn) -> Option<DevicePage> {
        let map = self.inner.pagemaps().get(device)?;
        map.range().contains(pfn).then(|| map.device_page(pfn))
    }

    /// Pages in use on device number `device`.
    pub fn device_pages(&self, device: usize) -> Option<PageCount> {
        self.inner.pagemaps().get(device).map(|map| map.live())
    }
}

impl Inner {
    /// The devices by number: those of the builder, and then the nodes.
    fn pagemaps(&self) -> &PagemapSet {
        self.managed.mm().pagemaps()
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
