//! userfaultfd: one descriptor, opened, and asked what it can do.
//!
//! What     [`Uffd`], a descriptor after its handshake; [`Features`]; and how to get one ([`Uffd::open`]).
//!          Ranges are registered in [`register`], pages changed in [`resolve`], messages read in
//!          [`event`].
//! Why      a kernel that lacks one feature of a handshake refuses the whole handshake, so the features
//!          are asked for first, on a descriptor that is thrown away.
//! Owns     the descriptor. Closing it unregisters every range and lets every waiting thread go, to find
//!          zero pages where something was: whoever owns a `Uffd` brings its pages home first.
//! Fails    [`OpenError`] names each way that was tried, what it said, and what would grant it.

use core::sync::atomic::{AtomicU64, Ordering};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use linux_raw_sys::general as raw;
use rustix::fs::{Mode as FileMode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, ioctl};
use rustix::mm::UserfaultfdFlags;

use crate::uapi;

pub mod event;
pub mod register;
pub mod resolve;
#[cfg(test)]
pub(crate) mod tests;

pub use event::{Event, EventBuffer, ReadOutcome};
pub use register::{Mode, RegisterError};

/// What a userfaultfd can do, one bit each; the kernel's `UFFD_FEATURE_*`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Features(u64);

impl Features {
    /// None of them.
    pub const NONE: Self = Self(0);
    /// Write-protection faults on anonymous memory.
    pub const WP: Self = Self(raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64);
    /// Tells of fork, with a descriptor for the child. Needs `CAP_SYS_PTRACE`.
    pub const EVENT_FORK: Self = Self(raw::UFFD_FEATURE_EVENT_FORK as u64);
    /// Tells of mremap.
    pub const EVENT_REMAP: Self = Self(raw::UFFD_FEATURE_EVENT_REMAP as u64);
    /// Tells of madvise that takes pages away.
    pub const EVENT_REMOVE: Self = Self(raw::UFFD_FEATURE_EVENT_REMOVE as u64);
    /// Tells of munmap.
    pub const EVENT_UNMAP: Self = Self(raw::UFFD_FEATURE_EVENT_UNMAP as u64);
    /// Missing faults on shared memory.
    pub const MISSING_SHMEM: Self = Self(raw::UFFD_FEATURE_MISSING_SHMEM as u64);
    /// Missing faults on hugetlb memory.
    pub const MISSING_HUGETLBFS: Self = Self(raw::UFFD_FEATURE_MISSING_HUGETLBFS as u64);
    /// Minor faults on shared memory.
    pub const MINOR_SHMEM: Self = Self(raw::UFFD_FEATURE_MINOR_SHMEM as u64);
    /// Minor faults on hugetlb memory.
    pub const MINOR_HUGETLBFS: Self = Self(raw::UFFD_FEATURE_MINOR_HUGETLBFS as u64);
    /// A fault raises SIGBUS in the thread that touched, instead of a message.
    pub const SIGBUS: Self = Self(raw::UFFD_FEATURE_SIGBUS as u64);
    /// A fault names the thread.
    pub const THREAD_ID: Self = Self(raw::UFFD_FEATURE_THREAD_ID as u64);
    /// A fault carries the address that was touched, not that of its page.
    pub const EXACT_ADDRESS: Self = Self(raw::UFFD_FEATURE_EXACT_ADDRESS as u64);
    /// Write-protection of shared and hugetlb memory.
    pub const WP_HUGETLBFS_SHMEM: Self = Self(raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64);
    /// Write-protection of pages that are not there.
    pub const WP_UNPOPULATED: Self = Self(raw::UFFD_FEATURE_WP_UNPOPULATED as u64);
    /// Pages that raise SIGBUS when touched.
    pub const POISON: Self = Self(raw::UFFD_FEATURE_POISON as u64);
    /// Writes to protected pages are noted instead of reported.
    pub const WP_ASYNC: Self = Self(raw::UFFD_FEATURE_WP_ASYNC as u64);
    /// Frames change places.
    pub const MOVE: Self = Self(raw::UFFD_FEATURE_MOVE as u64);

    /// Every feature that has a name here, for printing.
    pub const NAMED: [(&'static str, Self); 17] = [
        ("wp", Self::WP),
        ("event-fork", Self::EVENT_FORK),
        ("event-remap", Self::EVENT_REMAP),
        ("event-remove", Self::EVENT_REMOVE),
        ("event-unmap", Self::EVENT_UNMAP),
        ("missing-shmem", Self::MISSING_SHMEM),
        ("missing-hugetlbfs", Self::MISSING_HUGETLBFS),
        ("minor-shmem", Self::MINOR_SHMEM),
        ("minor-hugetlbfs", Self::MINOR_HUGETLBFS),
        ("sigbus", Self::SIGBUS),
        ("thread-id", Self::THREAD_ID),
        ("exact-address", Self::EXACT_ADDRESS),
        ("wp-hugetlbfs-shmem", Self::WP_HUGETLBFS_SHMEM),
        ("wp-unpopulated", Self::WP_UNPOPULATED),
        ("poison", Self::POISON),
        ("wp-async", Self::WP_ASYNC),
        ("move", Self::MOVE),
    ];

    /// The features with these bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The kernel's bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether all of `other` are among them.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both together.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What both have.
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// These without `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// Why there is no userfaultfd. Its text says what would grant one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpenError {
    /// Neither way opened.
    #[error(
        "no userfaultfd: the system call said {syscall} and /dev/userfaultfd said {device}; {}",
        advice(*syscall, *device)
    )]
    Denied {
        /// What the system call said.
        syscall: Errno,
        /// What `/dev/userfaultfd` said.
        device: Errno,
    },
    /// A descriptor opened, but the kernel refused the handshake.
    #[error("the kernel refused the userfaultfd handshake: {0}")]
    Handshake(Errno),
}

const fn advice(syscall: Errno, device: Errno) -> &'static str {
    if syscall.raw_os_error() == Errno::NOSYS.raw_os_error()
        && device.raw_os_error() == Errno::NOENT.raw_os_error()
    {
        "the kernel was built without CONFIG_USERFAULTFD, or a filter hides it"
    } else if syscall.raw_os_error() == Errno::MFILE.raw_os_error()
        || syscall.raw_os_error() == Errno::NFILE.raw_os_error()
    {
        "raise the limit of open files"
    } else {
        "any one of these grants it: sysctl vm.unprivileged_userfaultfd=1, read and write access to \
         /dev/userfaultfd, or CAP_SYS_PTRACE"
    }
}

/// Passes the flags of a new descriptor in place of a pointer, and takes the descriptor from the result.
struct NewDescriptor(usize);

// SAFETY: the request copies nothing from or to our memory: its argument is a number (so the "pointer" is
// never followed), and its result is a descriptor that nobody else knows of.
unsafe impl Ioctl for NewDescriptor {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        uapi::USERFAULTFD_IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        core::ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut core::ffi::c_void) -> Result<OwnedFd, Errno> {
        // SAFETY: `ioctl` calls this only after success, and then `out` is a new descriptor, which the
        // kernel has given to us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(out as RawFd) })
    }
}

const OPEN_FLAGS: UserfaultfdFlags = UserfaultfdFlags::CLOEXEC.union(UserfaultfdFlags::NONBLOCK);

/// The system call, for faults from user code and from the kernel.
pub(crate) fn open_syscall() -> Result<OwnedFd, Errno> {
    // SAFETY: the new descriptor is watching no memory yet; that is what `Uffd::register` is unsafe for.
    unsafe { rustix::mm::userfaultfd(OPEN_FLAGS) }
}

/// The system call, for faults from user code alone: a read(2) into an absent page would fail with EFAULT.
pub(crate) fn open_user_mode() -> Result<OwnedFd, Errno> {
    let flags = OPEN_FLAGS | UserfaultfdFlags::from_bits_retain(raw::UFFD_USER_MODE_ONLY);
    // SAFETY: as in `open_syscall`.
    unsafe { rustix::mm::userfaultfd(flags) }
}

/// The device node, whose file permissions decide instead of a capability.
pub(crate) fn open_device() -> Result<OwnedFd, Errno> {
    let node = rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, FileMode::empty())?;
    // SAFETY: `NewDescriptor` describes this request (see there).
    unsafe { ioctl(&node, NewDescriptor(OPEN_FLAGS.bits() as usize)) }
}

/// Either way, the system call first.
fn open_any() -> Result<OwnedFd, OpenError> {
    open_syscall().or_else(|syscall| open_device().map_err(|device| OpenError::Denied { syscall, device }))
}

/// Shakes hands, asking for `features`; the answer is every feature the kernel has.
pub(crate) fn handshake(fd: BorrowedFd<'_>, features: Features) -> Result<Features, Errno> {
    let mut api = uapi::uffdio_api { api: uapi::API, features: features.bits(), ioctls: 0 };
    // SAFETY: the opcode is made from the size of `uffdio_api`, which the kernel reads and writes, and
    // nothing in it is an address.
    unsafe { ioctl(fd, Updater::<{ uapi::UFFDIO_API }, _>::new(&mut api))? };
    Ok(Features::from_bits(api.features))
}

/// The features of the running kernel, once asked; bit 63 says that it was asked.
static AVAILABLE: AtomicU64 = AtomicU64::new(0);
const ASKED: u64 = 1 << 63;

fn available() -> Result<Features, OpenError> {
    let known = AVAILABLE.load(Ordering::Relaxed);
    if known & ASKED != 0 {
        return Ok(Features::from_bits(known & !ASKED));
    }
    let throw_away = open_any()?;
    let features = handshake(throw_away.as_fd(), Features::NONE).map_err(OpenError::Handshake)?;
    // Two threads that ask at once get the same answer, so that either may be the one that stays.
    AVAILABLE.store(features.bits() | ASKED, Ordering::Relaxed);
    Ok(features)
}

/// A userfaultfd after its handshake. Non-blocking, closed on exec.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    features: Features,
    /// Whether it is certain that it watches this process.
    own: bool,
}

impl Uffd {
    /// Opens a descriptor for this process, with those of the `wanted` features that the kernel has and
    /// permits; [`Uffd::features`] tells which.
    pub fn open(wanted: Features) -> Result<Self, OpenError> {
        let features = available()?.intersection(wanted);
        let fd = open_any()?;
        match handshake(fd.as_fd(), features) {
            Ok(_) => Ok(Self { fd, features, own: true }),
            // Fork events need CAP_SYS_PTRACE even where the descriptor itself does not. A refused
            // handshake leaves the descriptor as it was.
            Err(Errno::PERM) if features.contains(Features::EVENT_FORK) => {
                let features = features.without(Features::EVENT_FORK);
                handshake(fd.as_fd(), features).map_err(OpenError::Handshake)?;
                Ok(Self { fd, features, own: true })
            }
            Err(errno) => Err(OpenError::Handshake(errno)),
        }
    }

    /// Takes over a descriptor that has had its handshake, with these features: one received from
    /// another process, or of a forked child. It may watch another process than this one.
    pub const fn from_fd(fd: OwnedFd, features: Features) -> Self {
        Self { fd, features, own: false }
    }

    /// The features that were enabled.
    pub const fn features(&self) -> Features {
        self.features
    }

    /// Carries out one request of userfaultfd.
    ///
    /// # Safety
    /// `OPCODE` must be the request whose structure `T` is, and what the kernel does to the memory that
    /// `arg` names must be within the caller's rights.
    unsafe fn request<const OPCODE: Opcode, T>(&self, arg: &mut T) -> Result<(), Errno> {
        // SAFETY: the caller says that `T` belongs to the opcode, and `arg` is exclusively ours.
        unsafe { ioctl(&self.fd, Updater::<OPCODE, T>::new(arg)) }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
