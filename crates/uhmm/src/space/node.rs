//! Memory that is added to a space while it runs, as a second and slower node, and removed again.
//!
//! What    [`Space::add_memory`] (the kernel's `dev_dax_kmem_probe` and `add_memory_driver_managed`) gives a device's pages
//!         to the space: the evictor demotes cold pages to them before it sends any to a device. [`Space::remove_memory`]
//!         (`dev_dax_kmem_remove`, offline) empties the node and lets go of its device. [`Space::nodes`] lists them.
//! Why     a machine's slower memory, such as a dax device in the mode `system-ram`, is to be had as RAM is: for whatever
//!         is cold, for as long as its owner lends it.
//! Design  a node is a device like others, with the next number: all that works with a device's pages works with a node's
//!         (`migrate_to`, `recall`, `evacuate`, mirrors). Of a coherent device the pages are mapped in place, and are
//!         loaded from and stored to without a fault; a private one's are copied home when they are touched. What comes on
//!         top is that it comes and goes: the pagemap stays in the set for good, as words may be read at any time, and
//!         between it and the device is a `Plug`, which is pulled when no page is in use.
//! Pages   that the device says are lost ([`Device::report_failures`]) are never given out again, and a touch of one that
//!         is in use raises SIGBUS.
//! Owns    the device, until it is removed or the space ends.
//! Locks   `Nodes::list`; while it is held the kernel is asked to watch a node's memory, and the pagemap is added; no
//!         device is called, and no handler takes it. A plug's lock is held for reading around transfers; for writing only
//!         when no page is in use, nor can be, so that nobody waits for it.
//! Races   *a node is removed while pages are about to be moved to it*: who took pages before the allocation was stopped is
//!         seen by the drain, and who takes some later gives them back ([`Pagemap::stop_allocation`]).
//! Fails   [`AddMemoryError`] and [`RemoveMemoryError`]; then everything is as before.

use std::any::Any;
use std::sync::{Arc, RwLock, TryLockError, Weak};
use std::time::Duration;

use uhmm_addr::{CHUNK_PAGES, PageCount, Pfn, PfnRange, VaRange};
use uhmm_core::device::{
    Device, DeviceMemory, DevicePage, Failures, MemoryType, PeerTransfer, Transfer, TransferError,
};
use uhmm_core::pagemap::{AddError, Pagemap};
use uhmm_sys::futex::Lock;
use uhmm_sys::signals::Blocked;
use uhmm_sys::uffd::{Mode, RegisterError};

use super::{DrainError, MigrateError, Space};
use crate::managed::Managed;

/// Why memory was not added. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum AddMemoryError {
    /// Pages migrate to private and coherent devices.
    #[error("the memory of {device} is {memory_type}; a node's is private or coherent")]
    Type {
        /// The device.
        device: String,
        /// What it has.
        memory_type: MemoryType,
    },
    /// It has no page.
    #[error("{device} has no page")]
    Empty {
        /// The device.
        device: String,
    },
    /// Pages of a coherent device are mapped in place by moving their frames.
    #[error(
        "{device} is coherent: its pages are mapped in place, for which the kernel must be able to move frames \
         (UFFDIO_MOVE, Linux 6.8 or later)"
    )]
    Coherent {
        /// The device.
        device: String,
    },
    /// A coherent device's memory could not be registered.
    #[error("the memory of {device} cannot be watched; a coherent device can be in one space at a time")]
    DeviceMemory {
        /// The device.
        device: String,
        /// What the kernel said.
        source: RegisterError,
    },
    /// The space has no place for another pagemap.
    #[error("{device} cannot be added: {error}")]
    Pagemap {
        /// The device.
        device: String,
        /// Why.
        error: AddError,
    },
}

/// Why a node is still there. It can be used as before.
#[derive(Debug, thiserror::Error)]
pub enum RemoveMemoryError {
    /// The number is a device's, or nobody's.
    #[error("number {0} is no node of this space: its nodes are {1:?}")]
    NoNode(usize, Vec<usize>),
    /// Somebody else is removing it.
    #[error("node {0} is being removed already")]
    Removing(usize),
    /// Pages are in use; it says who is in the way.
    #[error("node {node} cannot be removed: {error}")]
    InUse {
        /// The node.
        node: usize,
        /// What stays.
        error: DrainError,
    },
}

/// A node of a space ([`Space::nodes`]).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// Its number, to be named wherever a device's number is asked for.
    pub device: usize,
    /// What its device is called.
    pub name: String,
    /// Its pages.
    pub pages: PageCount,
    /// Those that are in use.
    pub used: PageCount,
    /// Those that are lost, and not given out any more.
    pub lost: PageCount,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Online,
    Removing,
    Offline,
}

#[derive(Debug)]
struct Entry {
    number: usize,
    map: Arc<Pagemap>,
    plug: Arc<Plug>,
    state: State,
}

/// The nodes of a space.
#[derive(Debug)]
pub(crate) struct Nodes {
    list: Lock<List>,
}

#[derive(Debug)]
struct List {
    entries: Vec<Entry>,
    /// The pfn from which on none is taken.
    next: Pfn,
}

impl Nodes {
    /// None, with pfns from `next` on.
    pub(super) fn new(next: Pfn) -> Self {
        Self { list: Lock::new(List { entries: Vec::new(), next }) }
    }

    /// Those to which pages may go, in the order in which they came.
    pub(crate) fn online(&self) -> Vec<Arc<Pagemap>> {
        let list = self.list.lock();
        list.entries
            .iter()
            .filter(|entry| entry.state == State::Online)
            .map(|entry| entry.map.clone())
            .collect()
    }

    fn set(&self, number: usize, state: State) {
        let mut list = self.list.lock();
        list.entries.iter_mut().filter(|entry| entry.number == number).for_each(|entry| entry.state = state);
    }
}

impl Space {
    /// Adds the pages of `device` as a node of slower memory: cold pages are demoted to it before any goes to a device.
    /// Returns its number, which is the next one behind the devices' and earlier nodes', and works wherever a device's
    /// number is asked for. A number is used once: there may be 64 nodes in the life of a space.
    ///
    /// The device is the space's until [`Space::remove_memory`], or the end of the space.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use std::time::Duration;
    /// # use uhmm::{ByteSize, MemDevice, Space};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # if uhmm::Space::builder().build().is_err() { return Ok(()) } // no userfaultfd for this user
    /// let space = Space::builder().device(Arc::new(MemDevice::private(ByteSize::mib(4))?)).build()?;
    /// let node = space.add_memory(Arc::new(MemDevice::private(ByteSize::mib(1))?))?;
    /// let mut numbers = space.map::<u64>(512)?;
    /// numbers[0] = 7;
    /// let _ = space.migrate_to(numbers.range(), node)?;
    /// assert_eq!(space.residency(numbers.range()).node.get(), 1);
    /// space.remove_memory(node, Duration::from_secs(1))?;        // what was there is home again
    /// assert_eq!(space.residency(numbers.range()).resident.get(), 1);
    /// assert_eq!(numbers[0], 7);
    /// # Ok(())
    /// # }
    /// ```
    pub fn add_memory(&self, device: Arc<dyn Device>) -> Result<usize, AddMemoryError> {
        let name = device.name().to_owned();
        let (memory_type, managed) = (device.memory_type(), &self.inner.managed);
        if !memory_type.is_migratable() {
            return Err(AddMemoryError::Type { device: name, memory_type });
        }
        if device.capacity().is_zero() {
            return Err(AddMemoryError::Empty { device: name });
        }
        let _blocked = Blocked::all();
        let plug = Arc::new(Plug::new(device.clone()));
        // From here on alone: no other gets the same pfns.
        let mut list = self.inner.nodes.list.lock();
        let map = Arc::new(Pagemap::new(list.next, plug.clone()));
        if let Some(memory) = map.memory() {
            if !uhmm_core::host::Host::can_move(managed.mm().host()) {
                return Err(AddMemoryError::Coherent { device: name });
            }
            // SAFETY: the device's memory, of which an absent page is touched by nobody before it has a frame.
            unsafe { managed.mm().host().program().register(memory, Mode::MISSING) }
                .map_err(|source| AddMemoryError::DeviceMemory { device: name.clone(), source })?;
        }
        let number = match managed.mm().pagemaps().add(map.clone()) {
            Ok(number) => number,
            Err(error) => {
                self.unwatch_memory(&map);
                return Err(AddMemoryError::Pagemap { device: name, error });
            }
        };
        let end = map.range().end().get();
        list.next = Pfn::new(end.next_multiple_of(CHUNK_PAGES as u64));
        // Before the evictor knows of it, so that it puts nothing on pages that are lost.
        map.stop_allocation(true);
        list.entries.push(Entry { number, map: map.clone(), plug, state: State::Removing });
        drop(list);
        device.report_failures(Arc::new(Ear { map: Arc::downgrade(&map), managed: Arc::downgrade(managed) }));
        map.stop_allocation(false);
        self.inner.nodes.set(number, State::Online);
        managed.kick();
        Ok(number)
    }

    /// Takes node number `node` from the space: nothing is moved to it any more, what it has comes home, for as long as
    /// `patience` says, and its device is let go of. Its number is nobody's from then on.
    ///
    /// In a space with a limit ([`Builder::ram`](super::Builder::ram)) what it has goes to the first device, and comes home
    /// where that has no room: RAM is what the program competes for, and would have to be made room in first.
    ///
    /// # Errors
    /// [`RemoveMemoryError::InUse`], with the pins that keep pages on it; then it can be used as before.
    pub fn remove_memory(&self, node: usize, patience: Duration) -> Result<(), RemoveMemoryError> {
        let (map, plug) = {
            let mut list = self.inner.nodes.list.lock();
            let nodes: Vec<usize> = list
                .entries
                .iter()
                .filter(|entry| entry.state != State::Offline)
                .map(|entry| entry.number)
                .collect();
            let entry = list.entries.iter_mut().find(|entry| entry.number == node && nodes.contains(&node));
            let entry = entry.ok_or(RemoveMemoryError::NoNode(node, nodes))?;
            if entry.state == State::Removing {
                return Err(RemoveMemoryError::Removing(node));
            }
            entry.state = State::Removing;
            (entry.map.clone(), entry.plug.clone())
        };
        let onto = self.inner.limited.then_some(0);
        let drained = match self.drain_onto(node, onto, patience) {
            Ok(drained) => drained,
            Err(error) => {
                self.inner.nodes.set(node, State::Online);
                return Err(RemoveMemoryError::InUse { node, error });
            }
        };
        // Nothing is moved there, ever again.
        std::mem::forget(drained);
        let blocked = Blocked::all();
        self.unwatch_memory(&map);
        let device = plug.pull();
        self.inner.nodes.set(node, State::Offline);
        drop(blocked);
        // What a device does at its end may take long.
        drop(device);
        Ok(())
    }

    /// A coherent device's memory is nobody's business of this space any more; nothing of it is in use.
    fn unwatch_memory(&self, map: &Pagemap) {
        if let Some(memory) = map.memory() {
            // That it was registered was seen to; and unregistering raises no event.
            let _ = self.inner.managed.mm().host().program().unregister(memory);
        }
    }

    /// The nodes, in the order in which they came, without those that were removed.
    pub fn nodes(&self) -> Vec<Node> {
        let list = self.inner.nodes.list.lock();
        let live = list.entries.iter().filter(|entry| entry.state != State::Offline);
        let node = |entry: &Entry| Node {
            device: entry.number,
            name: entry.map.name().to_owned(),
            pages: entry.map.range().pages,
            used: entry.map.live(),
            lost: PageCount::new(entry.map.bad_pages().iter().map(|bad| bad.pages.get()).sum()),
        };
        live.map(node).collect()
    }

    /// Whether `device` is the number of a device or a node that is there.
    pub(super) fn is_there(&self, device: usize) -> Result<(), MigrateError> {
        let list = self.inner.nodes.list.lock();
        let gone = list.entries.iter().any(|entry| entry.number == device && entry.state == State::Offline);
        if gone { Err(MigrateError::NoDevice(device)) } else { Ok(()) }
    }
}

/// Hears which pages of a node are lost.
struct Ear {
    map: Weak<Pagemap>,
    managed: Weak<Managed>,
}

impl Failures for Ear {
    fn lost(&self, page: DevicePage, pages: PageCount) {
        let (Some(map), Some(managed)) = (self.map.upgrade(), self.managed.upgrade()) else { return };
        let Some(first) = map.pfn_of(page) else { return };
        let lost = PfnRange::new(first, pages.at_most(map.range().end().since(first)));
        for n in 0..lost.pages.get() {
            // Of one's own pages, with descriptors in RAM, any can be lost.
            let _ = map.memory_failure(first.forward(PageCount::new(n)));
        }
        if map.memory().is_some() {
            let _blocked = Blocked::all();
            managed.mm().unmap_lost(lost);
        }
    }
}

/// A device that can be let go of while its pagemap stays.
struct Plug {
    name: String,
    memory_type: MemoryType,
    memory: Option<VaRange>,
    capacity: PageCount,
    device: RwLock<Option<Arc<dyn Device>>>,
}

impl std::fmt::Debug for Plug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plug").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Plug {
    fn new(device: Arc<dyn Device>) -> Self {
        Self {
            name: device.name().to_owned(),
            memory_type: device.memory_type(),
            memory: device.memory().map(DeviceMemory::range),
            capacity: device.capacity(),
            device: RwLock::new(Some(device)),
        }
    }

    /// The device is the caller's. No page of it is in use, so that nobody is in the middle of a transfer.
    fn pull(&self) -> Option<Arc<dyn Device>> {
        self.device.write().unwrap_or_else(std::sync::PoisonError::into_inner).take()
    }

    /// Has the device do something, unless it is gone. Never waits: who writes has seen to it that nobody reads.
    fn with<R>(&self, act: impl FnOnce(&Arc<dyn Device>) -> R) -> Option<R> {
        let device = match self.device.try_read() {
            Ok(device) => device,
            Err(TryLockError::Poisoned(device)) => device.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        device.as_ref().map(act)
    }

    fn transfer(&self, batch: &mut [Transfer], act: impl FnOnce(&dyn Device, &mut [Transfer])) {
        if self.with(|device| act(&**device, batch)).is_none() {
            batch.iter_mut().for_each(|transfer| transfer.fail(TransferError::Gone));
        }
    }
}

impl Device for Plug {
    fn name(&self) -> &str {
        &self.name
    }

    fn memory_type(&self) -> MemoryType {
        self.memory_type
    }

    fn memory(&self) -> Option<DeviceMemory> {
        // SAFETY: what the device has promised, for as long as it is plugged in; afterwards no page is in use, and nobody
        // goes near the place of one that is not.
        self.memory.map(|range| unsafe { DeviceMemory::new(range) })
    }

    fn capacity(&self) -> PageCount {
        self.capacity
    }

    fn write(&self, batch: &mut [Transfer]) {
        self.transfer(batch, |device, batch| device.write(batch));
    }

    fn read(&self, batch: &mut [Transfer]) {
        self.transfer(batch, |device, batch| device.read(batch));
    }

    fn read_ahead(&self, batch: &mut [Transfer]) {
        self.transfer(batch, |device, batch| device.read_ahead(batch));
    }

    fn copy_from(&self, source: &dyn Device, batch: &mut [PeerTransfer]) -> bool {
        self.with(|device| device.copy_from(source, batch)).unwrap_or(false)
    }

    /// None: what another device would reach may be gone while it does.
    fn as_any(&self) -> Option<&dyn Any> {
        None
    }

    fn discard(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        self.with(|device| device.discard(page, pages)).unwrap_or(Err(TransferError::Gone))
    }

    fn zero(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        self.with(|device| device.zero(page, pages)).unwrap_or(Err(TransferError::Gone))
    }
}
