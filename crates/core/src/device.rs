//! The port to a device: memory that holds pages, and an engine that copies them.
//!
//! What     [`Device`], which every backend implements, and [`Transfer`], one piece of work for it.
//! Why      migration, fault-back and eviction are the same for RAM, a file, a GPU or a remote store;
//!          only the copy differs.
//! Owns     a device owns its bytes. Which of its pages are in use is the pagemap's business
//!          ([`crate::pagemap`]): a device never allocates pages and never counts references.
//! Locks    a device is called with no lock of this crate held, from any thread, several at a time.
//! Fails    per transfer, in its outcome; a transfer that failed has changed nothing that anybody may
//!          rely on, and its page stays where it was (rule R1).
//!
//! `read` is called by fault handlers: it must not allocate, log, touch managed memory, or wait for a lock
//! that a thread may hold while it touches managed memory (rule R7).

use alloc::sync::Arc;
use core::any::Any;
use core::fmt;
use core::ptr::NonNull;

use uhmm_addr::{PAGE_SIZE, PageCount, VaRange};

/// How the CPU sees a device's memory (the kernel's `enum memory_type`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryType {
    /// The CPU cannot touch it; a touch brings the page home (`MEMORY_DEVICE_PRIVATE`).
    Private,
    /// The CPU maps it in place (`MEMORY_DEVICE_COHERENT`).
    Coherent,
    /// Like RAM, of a file system that maps it: may be pinned for a while, since truncation waits for that
    /// (`MEMORY_DEVICE_FS_DAX`).
    FsDax,
    /// Like RAM, of a device that is mapped whole: may be pinned as long as its user likes (`MEMORY_DEVICE_GENERIC`).
    Generic,
    /// Of a device on a bus, for other devices to reach (`MEMORY_DEVICE_PCI_P2PDMA`).
    PeerToPeer,
}

impl MemoryType {
    /// Whether pages of processes migrate there; else they are mapped, and referred to where they are.
    pub const fn is_migratable(self) -> bool {
        matches!(self, Self::Private | Self::Coherent)
    }
}

impl fmt::Display for MemoryType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Private => "private",
            Self::Coherent => "coherent",
            Self::FsDax => "fs-dax",
            Self::Generic => "generic",
            Self::PeerToPeer => "peer-to-peer",
        })
    }
}

/// Where the pages of a coherent device lie in this address space, the first one first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceMemory(VaRange);

impl DeviceMemory {
    /// Describes the memory of a device.
    ///
    /// # Safety
    /// `range` must be private anonymous memory in small pages, as long as the device's capacity, mapped as long as the
    /// device lives, that nobody but the device and one space at a time accesses, and to which no Rust reference exists.
    /// Its frames change places with those of managed memory: an absent page of it holds nothing.
    pub const unsafe fn new(range: VaRange) -> Self {
        Self(range)
    }

    /// Its addresses.
    pub const fn range(self) -> VaRange {
        self.0
    }
}

/// A page of one device, counted from the device's first page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DevicePage(pub u64);

impl DevicePage {
    /// Byte offset from the start of the device.
    pub const fn offset(self) -> u64 {
        self.0 * PAGE_SIZE as u64
    }
}

/// Why a transfer did not happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TransferError {
    /// The device has no room for these bytes (`ENOSPC`, `EDQUOT`). Freeing pages may help.
    Full,
    /// The medium answered with this error number.
    Io(i32),
    /// The medium ended early: so many bytes of the transfer exist (a file that was truncated).
    Short(u32),
    /// The device is gone for good.
    Gone,
    /// The device does not take this page (the kernel's driver that allocates no destination for it).
    Declined,
}

impl fmt::Display for TransferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("the device is full"),
            Self::Io(errno) => write!(f, "the device failed with error {errno}"),
            Self::Short(bytes) => write!(f, "the device ended after {bytes} bytes"),
            Self::Gone => f.write_str("the device is gone"),
            Self::Declined => f.write_str("the device does not take the page"),
        }
    }
}

impl core::error::Error for TransferError {}

/// One contiguous copy between RAM and consecutive pages of a device.
#[derive(Debug)]
pub struct Transfer {
    page: DevicePage,
    ram: NonNull<u8>,
    pages: PageCount,
    outcome: Result<(), TransferError>,
}

// SAFETY: a transfer is a description; whoever made it promised (`Transfer::new`) that the memory may be
// accessed until the batch has been carried out, which does not depend on the thread.
unsafe impl Send for Transfer {}

impl Transfer {
    /// Describes a copy between `pages` pages at `ram` and as many pages of the device from `page` on.
    ///
    /// # Safety
    /// From now until the call of [`Device::read`] or [`Device::write`] that gets this transfer has
    /// returned, `ram` must be valid for reads and writes of that many bytes, aligned to a page, and no
    /// Rust reference to those bytes may exist. For a read, nobody else may access them.
    pub const unsafe fn new(page: DevicePage, ram: NonNull<u8>, pages: PageCount) -> Self {
        Self { page, ram, pages, outcome: Ok(()) }
    }

    /// A transfer of nothing, to fill arrays with.
    pub(crate) const fn vacant() -> Self {
        Self { page: DevicePage(0), ram: NonNull::dangling(), pages: PageCount::ZERO, outcome: Ok(()) }
    }

    /// Adds a copy that goes on where this one ends, on both sides. `false` if it does not.
    pub(crate) fn extend(&mut self, page: DevicePage, ram: NonNull<u8>, pages: PageCount) -> bool {
        let follows = self.page.0 + self.pages.get() as u64 == page.0
            && self.ram.as_ptr().wrapping_add(self.bytes()) == ram.as_ptr();
        if follows {
            self.pages = self.pages.plus(pages);
        }
        follows
    }

    /// First page on the device.
    pub const fn page(&self) -> DevicePage {
        self.page
    }

    /// First byte in RAM.
    pub const fn ram(&self) -> NonNull<u8> {
        self.ram
    }

    /// Length in pages.
    pub const fn pages(&self) -> PageCount {
        self.pages
    }

    /// Length in bytes.
    pub const fn bytes(&self) -> usize {
        self.pages.bytes()
    }

    /// What became of it; `Ok` until the device says otherwise.
    pub const fn outcome(&self) -> Result<(), TransferError> {
        self.outcome
    }

    /// Called by the device: this transfer failed.
    pub const fn fail(&mut self, error: TransferError) {
        self.outcome = Err(error);
    }
}

/// One contiguous copy between consecutive pages of two devices.
#[derive(Clone, Copy, Debug)]
pub struct PeerTransfer {
    from: DevicePage,
    to: DevicePage,
    pages: PageCount,
    outcome: Result<(), TransferError>,
}

impl PeerTransfer {
    /// Describes a copy of `pages` pages, from `from` on of one device to `to` on of another.
    pub const fn new(from: DevicePage, to: DevicePage, pages: PageCount) -> Self {
        Self { from, to, pages, outcome: Ok(()) }
    }

    /// Adds a copy of one page if it goes on where this one ends, on both sides. `false` if it does not.
    pub(crate) const fn extend(&mut self, from: DevicePage, to: DevicePage) -> bool {
        let pages = self.pages.get() as u64;
        let follows = self.from.0 + pages == from.0 && self.to.0 + pages == to.0;
        if follows {
            self.pages = self.pages.plus(PageCount::ONE);
        }
        follows
    }

    /// First page on the device that has the contents.
    pub const fn from(&self) -> DevicePage {
        self.from
    }

    /// First page on the device that is to have them.
    pub const fn to(&self) -> DevicePage {
        self.to
    }

    /// Length in pages.
    pub const fn pages(&self) -> PageCount {
        self.pages
    }

    /// What became of it; `Ok` until the device says otherwise.
    pub const fn outcome(&self) -> Result<(), TransferError> {
        self.outcome
    }

    /// Called by the device: this transfer failed.
    pub const fn fail(&mut self, error: TransferError) {
        self.outcome = Err(error);
    }
}

/// Who is told of pages that a device has lost ([`Device::report_failures`]).
pub trait Failures: Send + Sync {
    /// These pages are lost: reading them fails from now on, and nothing is to be put there. Called by a thread that may
    /// wait, never by one that serves faults, and with no lock of the device's held that a transfer takes.
    fn lost(&self, page: DevicePage, pages: PageCount);
}

/// Memory that can hold pages, with the engine that copies them.
pub trait Device: Send + Sync {
    /// What people call it: its URL.
    fn name(&self) -> &str;

    /// How the CPU sees it.
    fn memory_type(&self) -> MemoryType;

    /// Where its pages lie in this address space, for a coherent device: what is not mapped for the program is there,
    /// and a frame is there before a transfer to the page begins. Fixed for the device's life. None by default: then
    /// its pages are not mapped in place, whatever its type.
    fn memory(&self) -> Option<DeviceMemory> {
        None
    }

    /// How many pages it can hold. Fixed for the device's life.
    fn capacity(&self) -> PageCount;

    /// Copies RAM to the device, every transfer of the batch, in any order. Returns when all are done and
    /// each failed one has its [`Transfer::fail`].
    fn write(&self, batch: &mut [Transfer]);

    /// Copies the device to RAM, likewise. A page that was never written reads as zeros.
    fn read(&self, batch: &mut [Transfer]);

    /// As [`Device::read`], of pages that no thread waits for right now: their bytes need not come by way of the
    /// processor's caches.
    fn read_ahead(&self, batch: &mut [Transfer]) {
        self.read(batch);
    }

    /// Copies pages of `source`, another device, to pages of this one without a stop in RAM, and returns when all
    /// are done and each failed one has its [`PeerTransfer::fail`]. `false` if this device cannot reach that one:
    /// then nothing was done, and the pages go by way of RAM, which is what happens by default.
    fn copy_from(&self, source: &dyn Device, batch: &mut [PeerTransfer]) -> bool {
        let _ = (source, batch);
        false
    }

    /// The device itself, for another one to find out whether it can reach it ([`Device::copy_from`]). `None` by
    /// default: no other device can.
    fn as_any(&self) -> Option<&dyn Any> {
        None
    }

    /// Gives the space of these pages back to whoever lent it (hole punching, discard). What they hold
    /// afterwards is zeros. The caller owns the pages: nobody reads or writes them meanwhile.
    fn discard(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError>;

    /// Makes these pages read as zeros, whatever becomes of their space: they are about to hold pages that nobody has
    /// written yet. The caller owns them. A device whose discard may leave old contents in place must do better, or
    /// fail.
    fn zero(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        self.discard(page, pages)
    }

    /// Tells `to` of every page that is lost: of those that are, before this returns; of others as soon as that is known.
    /// By default there is nothing to tell, and a page is found to be lost when it cannot be read.
    fn report_failures(&self, to: Arc<dyn Failures>) {
        drop(to);
    }
}
