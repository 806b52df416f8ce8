//! Devices that hold pages: memory and files, and the URLs that name them.
//!
//! What     [`MemDevice`] and [`FileDevice`], both a [`Device`]; [`DeviceUrl`], how people name them;
//!          [`open`], from one to the other; [`Handle`], how another process gets the same device.
//! Why      everything above speaks only to the port in `uhmm_core::device`.
//! Owns     a device owns its mapping or its descriptor. Which of its pages are in use is the caller's
//!          business.
//! Fails    opening: [`OpenError`], which names the value and the remedy. Transfers: in their outcome.
//!
//! Transfers neither allocate nor log, wait for no lock and leave `errno` alone, so that a fault handler
//! may make them (rule R7).

mod error;
pub mod file;
mod mem;
mod url;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use uhmm_addr::{ByteSize, PAGE_SIZE, PageCount};
use uhmm_core::device::{Device, DevicePage, Transfer, TransferError};

pub use error::OpenError;
pub use file::{FileDevice, FileOptions};
pub use mem::MemDevice;
pub use url::{DeviceUrl, UrlError};

/// What a URL does not say.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// `mem:` is memory of this process only (the default), or memory that other processes can share.
    pub shared: bool,
    /// How files are accessed.
    pub file: FileOptions,
}

/// Opens what `url` names.
pub fn open(url: &DeviceUrl, options: OpenOptions) -> Result<Arc<dyn Device>, OpenError> {
    Opened::open(url, options).map(Opened::into_device)
}

/// An open device whose kind is known.
#[derive(Clone, Debug)]
pub enum Opened {
    /// `mem:`
    Memory(Arc<MemDevice>),
    /// `file:`
    File(Arc<FileDevice>),
}

impl Opened {
    /// Opens what `url` names.
    pub fn open(url: &DeviceUrl, options: OpenOptions) -> Result<Self, OpenError> {
        Ok(match url {
            DeviceUrl::Memory { size } if options.shared => Self::Memory(Arc::new(MemDevice::shared(*size)?)),
            DeviceUrl::Coherent { .. } if options.shared => return Err(OpenError::CoherentShared),
            DeviceUrl::Coherent { size, node } => Self::Memory(Arc::new(MemDevice::coherent(*size, *node)?)),
            DeviceUrl::Memory { size } => Self::Memory(Arc::new(MemDevice::private(*size)?)),
            DeviceUrl::File { path: Some(path), size } => {
                Self::File(Arc::new(options.file.open(path, *size)?))
            }
            DeviceUrl::File { path: None, size } => {
                Self::File(Arc::new(options.file.temporary(None, *size)?))
            }
        })
    }

    /// The device that a process that owns `handle` shares with the one that made it.
    pub fn from_handle(handle: Handle, file: FileOptions) -> Result<Self, OpenError> {
        Ok(match handle.backing {
            Backing::Memory => Self::Memory(Arc::new(MemDevice::from_fd(handle.fd, handle.size)?)),
            Backing::File => Self::File(Arc::new(file.from_fd(handle.fd, handle.size)?)),
        })
    }

    /// The device, for everybody who does not care what kind it is.
    pub fn device(&self) -> Arc<dyn Device> {
        self.clone().into_device()
    }

    /// The device itself, for everybody who does not care what kind it is.
    pub fn into_device(self) -> Arc<dyn Device> {
        match self {
            Self::Memory(device) => device,
            Self::File(device) => device,
        }
    }

    /// What another process needs to have the same device. Refused for memory of this process only.
    pub fn handle(&self) -> Result<Handle, OpenError> {
        match self {
            Self::Memory(device) => device.handle(),
            Self::File(device) => device.handle(),
        }
    }
}

/// The device that a process that owns `handle` shares with the one that made it.
pub fn from_handle(handle: Handle) -> Result<Arc<dyn Device>, OpenError> {
    Opened::from_handle(handle, FileOptions::default()).map(Opened::into_device)
}

/// What is behind the descriptor of a [`Handle`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Shared memory ([`MemDevice`]).
    Memory,
    /// A regular file or a block device ([`FileDevice`]).
    File,
}

/// A device on its way to another process, through a socket or by inheritance.
///
/// Whether a file is accessed directly is a property of the open file, so that it travels with `fd`.
#[derive(Debug)]
pub struct Handle {
    /// What `fd` is.
    pub backing: Backing,
    /// The size of the device.
    pub size: ByteSize,
    /// The memory or the file.
    pub fd: OwnedFd,
}

/// A size that a device can have: whole pages, at least one, within the reach of a file offset.
fn whole_pages(size: ByteSize) -> Result<PageCount, OpenError> {
    let bytes = size.bytes();
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE as u64) || i64::try_from(bytes).is_err() {
        return Err(OpenError::Size { bytes });
    }
    Ok(size.pages())
}

/// Whether `pages` pages from `page` on are pages of a device that has `capacity`.
fn fits(capacity: PageCount, page: DevicePage, pages: PageCount) -> bool {
    page.0.checked_add(pages.get() as u64).is_some_and(|end| end <= capacity.get() as u64)
}

/// What becomes of a transfer or a discard that [`fits`] refuses.
const OUT_OF_RANGE: TransferError = TransferError::Io(Errno::NXIO.raw_os_error());

/// Fails the transfers that leave the device; `true` if `transfer` may be carried out.
fn admit(capacity: PageCount, transfer: &mut Transfer) -> bool {
    let admitted = fits(capacity, transfer.page(), transfer.pages());
    if !admitted {
        transfer.fail(OUT_OF_RANGE);
    }
    admitted
}
