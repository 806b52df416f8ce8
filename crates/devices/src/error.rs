//! Why a device cannot be opened.
//!
//! What     [`OpenError`]: every variant carries the value that was wrong, and its text says what to do.
//! Why      whoever typed the URL reads this, and nothing else.

use std::path::PathBuf;

use rustix::io::Errno;
use uhmm_addr::ByteSize;

/// Why a device cannot be opened.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The size is no size for a device.
    #[error(
        "{bytes} bytes is no size for a device; it must be a multiple of 4096 above 0 and below 8 EiB, \
         such as 64MiB"
    )]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The memory node is not there, or not for this process.
    #[error("memory cannot be had from node {node} ({errno}); /sys/devices/system/node lists the nodes")]
    Node {
        /// The node.
        node: u32,
        /// What the kernel said.
        errno: Errno,
    },
    /// Memory that is mapped in place is one process's own.
    #[error("type=coherent is memory of one process, and cannot be shared by several; leave it out")]
    CoherentShared,
    /// The file does not exist and nobody said how large it is to be.
    #[error("{path:?} does not exist; add ?size=, such as ?size=64GiB, and it will be created")]
    SizeNeeded {
        /// The file.
        path: PathBuf,
    },
    /// The directory of the file does not exist.
    #[error("the directory {directory:?} does not exist; create it, or name another one")]
    DirectoryMissing {
        /// The directory.
        directory: PathBuf,
    },
    /// The user may not read and write it, or not create it.
    #[error("no permission to read and write {path:?} ({errno}); change its mode or name another file")]
    Permission {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        errno: Errno,
    },
    /// It is there, but it holds no bytes at offsets.
    #[error("{path:?} is a {what}; name a regular file or a block device")]
    NotAFile {
        /// What was named.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Somebody uses it: a mounted block device, or a file that is already a device.
    #[error(
        "{path:?} is in use (mounted, or the device of another process); unmount it, end the other \
         process, or name another one"
    )]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// The file system has no files of this size.
    #[error("{path:?} cannot be {size} ({bytes} bytes) large on its file system; ask for less",
        bytes = size.bytes())]
    TooLarge {
        /// The file, or the directory of a temporary one.
        path: PathBuf,
        /// What was asked for.
        size: ByteSize,
    },
    /// There is less than was asked for, and it cannot grow.
    #[error("{path:?} has {has} bytes, and {wanted} are needed; ask for less or name another one")]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Bytes that there are.
        has: u64,
        /// Bytes that are needed.
        wanted: u64,
    },
    /// The file system of a temporary file is full.
    #[error(
        "the file system of {directory:?} is full; free some space, or name a file elsewhere: file:/path"
    )]
    NoSpace {
        /// Where the file would be.
        directory: PathBuf,
    },
    /// There is not so much memory or address space.
    #[error("{size} of memory cannot be had ({errno}); ask for less, or use a file: device")]
    Memory {
        /// What was asked for.
        size: ByteSize,
        /// What the kernel said.
        errno: Errno,
    },
    /// Memory of this process cannot be shared with another one.
    #[error("memory of one process cannot be shared with another one; open it as shared memory")]
    NotShared,
    /// The descriptor is not what its sender said.
    #[error("the descriptor is no {expected}; pass the one from a device's handle")]
    Descriptor {
        /// What it should have been.
        expected: &'static str,
    },
    /// The kernel refused for another reason.
    #[error("cannot {action} {path:?}: {errno}")]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        errno: Errno,
    },
}
