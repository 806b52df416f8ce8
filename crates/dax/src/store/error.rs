//! Why a store cannot be opened or changed.
//!
//! What     [`OpenError`] and [`ChangeError`]: every variant carries the values that were wrong, and its text says
//!          what to do.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use uhmm_addr::{ByteSize, Geometry};

use super::holders::listed;
use super::{Holder, LabelsError, TableError};

/// Why a store cannot be opened or created.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not there.
    #[error(
        "{path:?} does not exist; say how large it is to be, such as --capacity 1GiB, and it will be created"
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// It holds something else, or nothing.
    #[error("{path:?} is no store: {error}; name another file, or remove it and it will be created")]
    NoStore {
        /// The file.
        path: PathBuf,
        /// What is wrong with its labels.
        error: LabelsError,
    },
    /// It is a store whose labels are lost, or cannot be written.
    #[error("{path:?}: {error}")]
    Labels {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: LabelsError,
    },
    /// The labels speak of another medium than this.
    #[error(
        "the labels of {path:?} speak of {labels} of data in pages of {page}, and there are {found} in pages of {found_page}"
    )]
    OtherMedium {
        /// The file.
        path: PathBuf,
        /// How much the labels say there is.
        labels: ByteSize,
        /// In pages of this size.
        page: Geometry,
        /// How much there is.
        found: ByteSize,
        /// In pages of this size.
        found_page: Geometry,
    },
    /// It is no regular file.
    #[error("{path:?} is no regular file; name a file, on a file system of huge pages for 2M and 1G faults")]
    NotAFile {
        /// What was named.
        path: PathBuf,
    },
    /// There is a file of that name.
    #[error("{path:?} exists; --capacity is for a store that does not")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Somebody is changing the store, and does not come to an end.
    #[error(
        "{path:?} is being changed by {}, which has not finished within {seconds} seconds",
        listed(holders)
    )]
    Locked {
        /// The file.
        path: PathBuf,
        /// How long it was waited for.
        seconds: u64,
        /// Who is changing it.
        holders: Vec<Holder>,
    },
    /// Its first namespace cannot be.
    #[error(transparent)]
    Table(#[from] TableError),
    /// There is not even room for labels and one page.
    #[error("{path:?} has {size} bytes, and a store has at least {least}")]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Bytes that there are.
        size: u64,
        /// Bytes that there must be.
        least: u64,
    },
    /// The capacity is no multiple of the medium's pages.
    #[error("{} bytes is no capacity for a store; it must be a multiple of {} above 0", capacity.bytes(), page.bytes())]
    Capacity {
        /// What was asked for.
        capacity: ByteSize,
        /// The size of the medium's pages.
        page: Geometry,
    },
    /// The pool of huge pages has too few.
    #[error("{wanted} huge pages of {page} are needed and {free} are free; to reserve them: {command}")]
    NoHugePages {
        /// Pages that are needed.
        wanted: usize,
        /// Pages that are free.
        free: usize,
        /// Their size.
        page: Geometry,
        /// The command that reserves them.
        command: String,
    },
    /// The file system of huge pages is mounted with a limit.
    #[error(
        "{wanted} huge pages of {page} are needed for {path:?}, and its file system is mounted with a limit of {limit}, of which {left} are free; mount it with size={}, or without a limit",
        ByteSize::new((limit - left + wanted) as u64 * page.bytes() as u64)
    )]
    HugeMount {
        /// The file.
        path: PathBuf,
        /// Pages that are needed.
        wanted: usize,
        /// Pages that the file system may have.
        limit: usize,
        /// Of these, pages that nobody has.
        left: usize,
        /// Their size.
        page: Geometry,
    },
    /// There is not so much room.
    #[error("there is no room for {path:?} of {size} ({errno}); ask for less, or name a file elsewhere")]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// How large it would be.
        size: ByteSize,
        /// What the kernel said.
        errno: Errno,
    },
    /// The system refused.
    #[error("cannot {action} {path:?}: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

impl OpenError {
    pub(super) fn os(action: &'static str, path: &Path, errno: Errno) -> Self {
        Self::Io { action, path: path.into(), error: errno.into() }
    }
}

/// Why a store was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// What was asked for cannot be.
    #[error(transparent)]
    Table(#[from] TableError),
    /// Somebody uses the namespace.
    #[error("{device} is in use by {}; end that first", listed(holders))]
    Busy {
        /// The namespace.
        device: String,
        /// Who uses it.
        holders: Vec<Holder>,
    },
    /// It is mapped further than the new size reaches.
    #[error("{device} cannot shrink to {size}: {mapped} of it are mapped, by {}", listed(holders))]
    Mapped {
        /// The namespace.
        device: String,
        /// The size that was asked for.
        size: ByteSize,
        /// How far it is mapped.
        mapped: ByteSize,
        /// Who uses it.
        holders: Vec<Holder>,
    },
    /// It holds files, which would be lost.
    #[error("{device} holds files and keeps its size; make another namespace and copy them")]
    Files {
        /// The namespace.
        device: String,
    },
    /// It holds files, whose blocks are of its alignment.
    #[error(
        "{device} holds files in blocks of {align}, its alignment, and keeps it; make another namespace and copy them, or give it another mode, and the files up"
    )]
    FilesAlign {
        /// The namespace.
        device: String,
        /// Its alignment.
        align: Geometry,
    },
    /// Somebody else is changing the store, and does not come to an end.
    #[error(
        "the store is being changed by {}, which has not finished within {seconds} seconds",
        listed(holders)
    )]
    Locked {
        /// How long it was waited for.
        seconds: u64,
        /// Who is changing it.
        holders: Vec<Holder>,
    },
    /// The labels cannot be read or written.
    #[error(transparent)]
    Labels(#[from] LabelsError),
    /// The system refused.
    #[error("the store cannot be changed: {0}")]
    Io(#[from] io::Error),
}
