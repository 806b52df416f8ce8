//! Which memory a userfaultfd watches.
//!
//! What     [`Uffd::register`] and [`Uffd::unregister`], with [`Mode`].
//! Why      registering is the door through which memory comes under a fault handler's power: from then on
//!          a load may wait, and what it finds is what the handler puts there.
//! Owns     nothing; the kernel keeps the registration in its mapping. Registering an own range once more
//!          is fine; a mapping that grows is not registered where it grew.
//! Fails    [`RegisterError`], and then nothing has changed.

use rustix::io::Errno;
use rustix::mm::MsyncFlags;
use uhmm_addr::VaRange;

use super::Uffd;
use crate::uapi;

/// Which faults are wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mode {
    /// Touches of pages that are not there.
    pub missing: bool,
    /// Writes to pages that are protected.
    pub write_protect: bool,
    /// Touches of shared pages that exist and are not mapped here.
    pub minor: bool,
}

impl Mode {
    /// Missing pages alone.
    pub const MISSING: Self = Self { missing: true, write_protect: false, minor: false };
    /// Missing pages and protected ones.
    pub const MISSING_AND_WP: Self = Self { missing: true, write_protect: true, minor: false };

    /// Pages of a file that are there and not mapped here.
    pub const MINOR: Self = Self { missing: false, write_protect: false, minor: true };

    const fn bits(self) -> u64 {
        use linux_raw_sys::general as raw;
        let mut bits = 0;
        if self.missing {
            bits |= raw::UFFDIO_REGISTER_MODE_MISSING;
        }
        if self.write_protect {
            bits |= raw::UFFDIO_REGISTER_MODE_WP;
        }
        if self.minor {
            bits |= raw::UFFDIO_REGISTER_MODE_MINOR;
        }
        bits as u64
    }
}

/// Why a range was not registered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RegisterError {
    /// Part of the range, or all of it, is not mapped.
    #[error("the range is not mapped")]
    Unmapped,
    /// This kind of mapping cannot be watched in this mode: a file's, a device's.
    #[error("this kind of mapping cannot be watched")]
    Refused,
    /// Another userfaultfd watches part of it.
    #[error("another userfaultfd watches the range")]
    Taken,
    /// No memory, too many mappings (`vm.max_map_count`), or the process is exiting.
    #[error("no memory to register the range, or too many mappings")]
    NoMemory,
    /// An error number that no rule covers.
    #[error("registering failed with error {0}")]
    Errno(i32),
}

impl Uffd {
    /// Watches `range`. Touches of its pages, as far as `mode` names them, wait from now on (or raise
    /// SIGBUS, see [`super::Features::SIGBUS`]) until somebody resolves them.
    ///
    /// # Safety
    /// The caller must have the right to decide about this memory: nobody may rely on absent pages
    /// reading as zeros, and whoever resolves its faults must put the right bytes there, without touching
    /// the memory itself.
    pub unsafe fn register(&self, range: VaRange, mode: Mode) -> Result<(), RegisterError> {
        let mut arg = uapi::uffdio_register { range: raw_range(range), mode: mode.bits(), ioctls: 0 };
        // SAFETY: the structure is the request's; the kernel marks mappings and changes no byte of them.
        // What that means for those who use the memory, the caller answers for.
        match unsafe { self.request::<{ uapi::UFFDIO_REGISTER }, _>(&mut arg) } {
            Ok(()) => Ok(()),
            Err(Errno::INVAL) if self.own && !is_mapped(range) => Err(RegisterError::Unmapped),
            // EPERM: a shared mapping of a file that may not be written.
            Err(Errno::INVAL | Errno::PERM) => Err(RegisterError::Refused),
            Err(Errno::BUSY) => Err(RegisterError::Taken),
            Err(Errno::NOMEM) => Err(RegisterError::NoMemory),
            Err(errno) => Err(RegisterError::Errno(errno.raw_os_error())),
        }
    }

    /// Stops watching `range` and lets every thread go that waits there. Absent pages are ordinary fresh
    /// ones afterwards: what the caller still keeps elsewhere, nobody will ask for.
    pub fn unregister(&self, range: VaRange) -> Result<(), RegisterError> {
        let mut arg = raw_range(range);
        // SAFETY: the structure is the request's, and no byte of the memory changes.
        match unsafe { self.request::<{ uapi::UFFDIO_UNREGISTER }, _>(&mut arg) } {
            Ok(()) => Ok(()),
            Err(Errno::INVAL) if self.own && !is_mapped(range) => Err(RegisterError::Unmapped),
            Err(Errno::INVAL) => Err(RegisterError::Refused),
            Err(Errno::NOMEM) => Err(RegisterError::NoMemory),
            Err(errno) => Err(RegisterError::Errno(errno.raw_os_error())),
        }
    }
}

pub(super) const fn raw_range(range: VaRange) -> uapi::uffdio_range {
    uapi::uffdio_range { start: range.start().get() as u64, len: range.bytes() as u64 }
}

/// Whether every page of `range` is mapped in this process. The kernel says EINVAL both for "not mapped"
/// and for "not this kind of mapping"; `msync(MS_ASYNC)` does nothing but tell them apart.
fn is_mapped(range: VaRange) -> bool {
    let start = core::ptr::with_exposed_provenance_mut(range.start().get());
    // SAFETY: MS_ASYNC reads and writes no memory; it looks the mappings up.
    let looked_up = unsafe { rustix::mm::msync(start, range.bytes(), MsyncFlags::ASYNC) };
    looked_up != Err(Errno::NOMEM)
}
