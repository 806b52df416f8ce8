//! The machine: the memory of a process, and the devices beside it.
//!
//! What    [`Dmirror`], a [`Space`] with the devices; [`Dmirror::open`] gives a [`Handle`] of one of them, a [`Node`].
//! Owns    the space and the devices' memory. Handles borrow it.
//! Locks   `leaving`, outermost: held for reading while a device reads or writes RAM, for writing while pages leave RAM.
//!         Who holds it may wait for a fault, and no fault handler and no callback takes it.
//! Races   *a device's store against a migration*: one after the other, by `leaving`. It cannot be the mirror's lock
//!         that keeps them apart: a page that the program has discarded is brought by a handler, which tells the mirror
//!         first. What the program itself does to its mappings meanwhile, the kernel puts in order.
//! Fails   with a [`SpaceError`] at the start.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use uhmm::managed::BuildError;
use uhmm::space::{Builder, SpaceError};
use uhmm::{ByteSize, Engine, MemDevice, Owner, PageCount, Space};

use crate::handle::Handle;
use crate::{Error, transfer};

/// Private devices of a machine.
const PRIVATE: usize = 2;

/// How the processor sees a device's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Not at all: a touch brings the page home.
    Private,
    /// In place.
    Coherent,
}

/// A device, by its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Node(u8);

impl Node {
    /// The devices that the kernel's module has: 0 and 1 are private, 2 and 3 coherent.
    pub const ALL: [Self; 4] = [Self(0), Self(1), Self(2), Self(3)];

    /// How the processor sees its memory.
    pub const fn kind(self) -> Kind {
        if self.index() < PRIVATE { Kind::Private } else { Kind::Coherent }
    }

    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A process's memory and the devices beside it.
#[derive(Debug)]
pub struct Dmirror {
    space: Space,
    devices: Vec<Arc<MemDevice>>,
    leaving: RwLock<()>,
}

impl Dmirror {
    /// A machine with devices of `size` each. Their memory is taken where it is used.
    ///
    /// # Errors
    /// If the process may not have a [`Space`], or there is no address space for the devices.
    ///
    /// # Safety
    /// The devices read, write and move memory of this process at the addresses that they are asked about, as another
    /// thread of the program would: it must be the program's, no Rust reference may say what a device's write changes,
    /// and none of it may be what the machine needs to work (stacks of its threads, its allocations).
    pub unsafe fn new(size: ByteSize) -> Result<Self, SpaceError> {
        // SAFETY: the caller's promise.
        unsafe { Self::with(Space::builder(), size) }
    }

    /// The same, with a space of which something is said. Where frames cannot be moved, the machine has no coherent
    /// devices.
    ///
    /// # Errors
    /// As [`Dmirror::new`].
    ///
    /// # Safety
    /// As [`Dmirror::new`].
    pub unsafe fn with(builder: Builder, size: ByteSize) -> Result<Self, SpaceError> {
        let memory = |node: Node| match node.kind() {
            Kind::Private => MemDevice::private(size),
            Kind::Coherent => MemDevice::coherent(size, None),
        };
        let devices: Result<Vec<_>, _> =
            Node::ALL.map(|node| memory(node).map(Arc::new)).into_iter().collect();
        let mut devices = devices.map_err(std::io::Error::other)?;
        let space = |devices: &[Arc<MemDevice>]| {
            let builder = builder.clone().engine(Engine::Threads).fault_around(false).clean_copies(false);
            devices.iter().fold(builder, |builder, device| builder.device(device.clone())).build()
        };
        let built = match space(&devices) {
            // Where frames cannot be moved there are no coherent devices.
            Err(SpaceError::Build(BuildError::Coherent(_))) => {
                devices.truncate(PRIVATE);
                space(&devices)
            }
            built => built,
        };
        Ok(Self { space: built?, devices, leaving: RwLock::new(()) })
    }

    /// Opens a device. Its table says nothing yet.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if the machine has no such device.
    pub fn open(&self, node: Node) -> Result<Handle<'_>, Error> {
        if node.index() < self.devices.len() { Ok(Handle::new(self, node)) } else { Err(Error::NoDevice) }
    }

    /// The space.
    pub const fn space(&self) -> &Space {
        &self.space
    }

    /// Whose the pages of a device are.
    pub(crate) fn owner(&self, node: Node) -> Result<Owner, Error> {
        self.space.owner(node.index()).ok_or(Error::NoDevice)
    }

    /// Pages in use on a device.
    pub fn device_pages(&self, node: Node) -> PageCount {
        self.space.device_pages(node.index()).unwrap_or(PageCount::ZERO)
    }

    pub(crate) fn device(&self, node: Node) -> transfer::Memory<'_> {
        transfer::Memory { space: &self.space, number: node.index(), device: &self.devices[node.index()] }
    }

    /// No page leaves RAM until this is dropped.
    pub(crate) fn stay(&self) -> RwLockReadGuard<'_, ()> {
        self.leaving.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// No device reads or writes RAM until this is dropped.
    pub(crate) fn leave(&self) -> RwLockWriteGuard<'_, ()> {
        self.leaving.write().unwrap_or_else(PoisonError::into_inner)
    }
}
