//! What can go wrong with files.
//!
//! What     [`FileError`], of everything but opening the file system, which is [`FsError`]; each variant carries the
//!          values that were wrong.

use std::io;
use std::time::Duration;

use uhmm_addr::ByteSize;
use uhmm_core::pagemap::PageError;

use super::meta::MetaError;
use crate::device::DeviceError;
use crate::store::{ChangeError, Holder, listed};

/// Why a namespace's files are not to be had.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The namespace is not to be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It is too small for a table of files and one block.
    #[error("a namespace for files has at least {least}, and {device} has {size}")]
    TooSmall {
        /// The namespace.
        device: String,
        /// Its size.
        size: ByteSize,
        /// The least there can be.
        least: ByteSize,
    },
    /// Somebody has its files.
    #[error(
        "the files of {device} are in use by {}; one has them at a time: end that first, or, in one process, share the FileSystem",
        listed(holders)
    )]
    InUse {
        /// The namespace.
        device: String,
        /// Who has them.
        holders: Vec<Holder>,
    },
    /// The table cannot be used.
    #[error("{device}: {error}")]
    Meta {
        /// The namespace.
        device: String,
        /// Why.
        error: MetaError,
    },
    /// A file has blocks that are not there, or another file's.
    #[error("{device}: the file {name:?} has block {block}, which is not its own; nothing was changed")]
    Inconsistent {
        /// The namespace.
        device: String,
        /// The file.
        name: String,
        /// The block.
        block: u64,
    },
    /// The system refused.
    #[error("{device}: {error}")]
    Io {
        /// The namespace.
        device: String,
        /// What the system said.
        error: io::Error,
    },
}

/// Why nothing came of something with a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is a file of that name.
    #[error("there is a file {name:?} already")]
    Exists {
        /// The name.
        name: String,
    },
    /// There is none, or none any more.
    #[error("there is no file {name:?}")]
    Unknown {
        /// The name.
        name: String,
    },
    /// No name for a file.
    #[error("{name:?} is no name for a file; it has 1 to 255 bytes, no slash and no control character")]
    Name {
        /// The name.
        name: String,
    },
    /// No block is free.
    #[error("{wanted} is needed and {free} is free; remove a file, or shorten one")]
    Full {
        /// So much more is needed.
        wanted: ByteSize,
        /// So much there is.
        free: ByteSize,
    },
    /// The table of files has no room for more. Files are as they were, and the others can be used.
    #[error(
        "the table of files would outgrow the {room} that there are for it, a 64th of the namespace; remove files, or put some in a larger namespace"
    )]
    TableFull {
        /// How large it may be.
        room: ByteSize,
    },
    /// A file can be no longer.
    #[error("{offset}+{len} is longer than a file can be, 2^56 bytes")]
    TooLong {
        /// The first byte.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// What is mapped begins and ends at blocks.
    #[error("the {what} {value:#x} of a mapping is no multiple of the block, {block:#x}")]
    Misaligned {
        /// "offset" or "length".
        what: &'static str,
        /// The value.
        value: u64,
        /// Bytes of a block.
        block: u64,
    },
    /// It runs past the file's end.
    #[error("{offset}+{len} is not inside the file's {size} bytes")]
    Outside {
        /// The first byte.
        offset: u64,
        /// How many.
        len: u64,
        /// The file's size.
        size: u64,
    },
    /// A page is bad (`EIO`).
    #[error("the page at {offset} is bad; writing it whole (4096 bytes) would mend it")]
    Poisoned {
        /// Where the first bad page begins in the file.
        offset: u64,
    },
    /// Pages are in use that were to be taken away, and were not let go of in time (`break_layouts`).
    #[error(
        "the page at {offset} was in use (by {references}) for all of {waited:?}; let go of it, or wait longer"
    )]
    Busy {
        /// Where in the file.
        offset: u64,
        /// References to the page.
        references: u32,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The wait for pages was interrupted (`EINTR`).
    #[error("interrupted while the page at {offset} was in use")]
    Interrupted {
        /// Where in the file.
        offset: u64,
    },
    /// The pages cannot be referred to.
    #[error(transparent)]
    Page(#[from] PageError),
    /// The table cannot be read or written.
    #[error(transparent)]
    Meta(MetaError),
    /// The labels cannot be read or written.
    #[error(transparent)]
    Store(#[from] ChangeError),
    /// The system refused.
    #[error("the file cannot be accessed: {0}")]
    Io(#[from] io::Error),
}

impl From<MetaError> for FileError {
    fn from(error: MetaError) -> Self {
        match error {
            MetaError::Full { room } => Self::TableFull { room },
            error @ MetaError::Database(_) => Self::Meta(error),
        }
    }
}
