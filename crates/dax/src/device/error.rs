//! What can go wrong with a device.
//!
//! What     one enum for each thing that is asked of it; each variant carries the values that were wrong.

use std::io;
use std::path::PathBuf;

use uhmm_addr::{ByteSize, Geometry};
use uhmm_core::pagemap::{PageError, RegisterError, UnregisterError};
use uhmm_sys::signals::InstallError;
use uhmm_sys::uffd;

use crate::store::{ChangeError, Kind, Mode};

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The namespace is for something else.
    #[error(
        "{device} is in the mode {mode}, and {wanted} is needed; to change it: \
         uhmm dax reconfigure {store} {device} --mode {wanted}"
    )]
    Mode {
        /// The namespace.
        device: String,
        /// Its mode.
        mode: Mode,
        /// The mode that it would have to be in.
        wanted: Mode,
        /// The store's path; `STORE` if it has none.
        store: String,
    },
    /// Its pages cannot be had as private memory.
    #[error(
        "{device} lies on {}, whose frames cannot be mapped into private memory; only a store in memory can be reached \
         in place: use Reach::Copied", what(*.kind)
    )]
    NotInPlace {
        /// The namespace.
        device: String,
        /// What it lies on.
        kind: Kind,
    },
    /// Private memory cannot be had.
    #[error("the memory for {device} cannot be had: {error}")]
    Memory {
        /// The namespace.
        device: String,
        /// Why.
        error: uhmm_devices::OpenError,
    },
    /// The labels cannot be read, or somebody is changing the namespace.
    #[error(transparent)]
    Store(#[from] ChangeError),
    /// Its faults cannot be served in the way that was asked for.
    #[error("{0}; with Faults::Kernel the kernel serves them by itself")]
    Userfault(#[from] uffd::OpenError),
    /// This kernel has no minor faults of this kind of memory.
    #[error(
        "this kernel tells of no minor faults on {0}, for which Linux 5.13 (huge pages) or 5.14 is needed; with Faults::Kernel the kernel serves them by itself"
    )]
    NoMinorFaults(&'static str),
    /// No handler of SIGBUS can be installed.
    #[error(transparent)]
    Signal(#[from] InstallError),
    /// Its pages cannot be registered.
    #[error("the pages of {device} cannot be registered: {error}")]
    Register {
        /// The device.
        device: String,
        /// Why.
        error: RegisterError,
    },
    /// There is no room for its pfns.
    #[error("there are no {0} of pfns left for a store")]
    NoPfns(ByteSize),
    /// It is no device of the kernel's `dax` bus.
    #[error("{path:?} is no device-dax node: {why}")]
    NotANode {
        /// What was named.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// The system refused.
    #[error("{device}: {error}")]
    Io {
        /// The device.
        device: String,
        /// What the system said.
        error: io::Error,
    },
}

const fn what(kind: Kind) -> &'static str {
    match kind {
        Kind::PageCache => "a file whose pages are copies",
        Kind::Dax => "persistent memory",
        Kind::Memory => "memory",
        Kind::Huge(_) => "a pool of huge pages",
    }
}

/// Why a part of a device is not mapped (`check_vma`).
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The device was killed (`ENXIO`).
    #[error("{device} is gone")]
    Dead {
        /// The device.
        device: String,
    },
    /// A private mapping was asked for (`EINVAL`).
    #[error("{device} can be mapped shared alone; a private mapping would copy pages out of it")]
    Private {
        /// The device.
        device: String,
    },
    /// Offset or length is no multiple of the alignment (`EINVAL`).
    #[error("{device} is aligned to {align}, and the {what} {value:#x} is no multiple of {:#x} above 0", align.bytes())]
    Misaligned {
        /// The device.
        device: String,
        /// "offset" or "length".
        what: &'static str,
        /// The value.
        value: u64,
        /// The alignment.
        align: Geometry,
    },
    /// It runs past the device's end.
    #[error("{device} has {size} ({:#x} bytes), and {offset:#x}+{len:#x} were asked for", size.bytes())]
    Outside {
        /// The device.
        device: String,
        /// The first byte.
        offset: u64,
        /// How many.
        len: u64,
        /// The device's size.
        size: ByteSize,
    },
    /// A store to it would not be safe by a flush alone (`EOPNOTSUPP`).
    #[error(
        "{device} lies on a file whose pages are copies: stores are safe after DaxMapping::flush alone; leave sync out"
    )]
    NoSync {
        /// The device.
        device: String,
    },
    /// The system refused.
    #[error("{device} cannot be mapped: {error}")]
    Io {
        /// The device.
        device: String,
        /// What the system said.
        error: io::Error,
    },
}

/// Why bytes of a device were not read or written.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The device was killed.
    #[error("the device is gone")]
    Dead,
    /// It runs past the end.
    #[error("{offset:#x}+{len:#x} is not inside the device's {size} ({:#x} bytes)", size.bytes())]
    Outside {
        /// The first byte.
        offset: u64,
        /// How many.
        len: u64,
        /// The device's size.
        size: ByteSize,
    },
    /// A page is bad (`EIO`).
    #[error("the page at {offset:#x} is bad; writing it whole (4096 bytes) would mend it")]
    Poisoned {
        /// Where the first bad page begins.
        offset: u64,
    },
    /// The labels cannot be changed.
    #[error(transparent)]
    Store(#[from] ChangeError),
    /// The system refused.
    #[error("the device cannot be accessed: {0}")]
    Io(#[from] io::Error),
}

/// Why pages are not pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// It runs past the end, or is no page.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// They cannot be referred to.
    #[error(transparent)]
    Page(#[from] PageError),
}

/// Why a device is still there. It can be used as before.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct KillError(#[from] pub UnregisterError);
