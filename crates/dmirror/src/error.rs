//! Why the device did not do what it was asked.
//!
//! What    [`Error`]: one variant for each error number of the kernel's device; who has numbers to give translates.
//! Why     each says what the caller does next.

use uhmm::mirror::{MirrorError, RangeFaultError};
use uhmm::space::{MapError, MigrateError};

/// Why the device did not do what it was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// The range has holes, or memory that cannot be asked for this (`EINVAL`). Ask for less.
    #[error("not all of the range can be asked for this")]
    Invalid,
    /// Nothing that can be read is there (`EFAULT`).
    #[error("nothing that can be read is mapped there")]
    Fault,
    /// It is to be written and may only be read (`EPERM`).
    #[error("the memory may only be read")]
    Permission,
    /// A page is not in the device's table when all is done: it could not be moved (`ENOENT`).
    #[error("not every page could be moved")]
    NotThere,
    /// Pages did not come to rest in time (`EBUSY`). Try again.
    #[error("the pages did not come to rest in time")]
    Busy,
    /// No memory to work with (`ENOMEM`).
    #[error("there is no memory to work with")]
    NoMemory,
    /// There is no such device (`ENODEV`).
    #[error("there is no such device")]
    NoDevice,
    /// The device cannot do this (`EOPNOTSUPP`).
    #[error("the device cannot do this")]
    Unsupported,
}

impl From<RangeFaultError> for Error {
    fn from(error: RangeFaultError) -> Self {
        match error {
            RangeFaultError::Permission(_) => Self::Permission,
            RangeFaultError::TimedOut(_) => Self::Busy,
            RangeFaultError::Outside(_) => Self::Invalid,
            RangeFaultError::Fault(_) | RangeFaultError::Poisoned(_) | RangeFaultError::Closed => Self::Fault,
        }
    }
}

impl From<MirrorError> for Error {
    fn from(error: MirrorError) -> Self {
        match error {
            MirrorError::NoDevice(_) => Self::NoDevice,
            MirrorError::Memory(_) => Self::NoMemory,
            // Unmapped a moment after it was watched.
            MirrorError::Unmanaged(_) => Self::Fault,
        }
    }
}

impl From<MigrateError> for Error {
    fn from(error: MigrateError) -> Self {
        match error {
            MigrateError::NoMemory => Self::NoMemory,
            MigrateError::NoDevice(_) | MigrateError::Itself(_) => Self::NoDevice,
            MigrateError::Unmanaged(_) => Self::NotThere,
        }
    }
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Self {
        match error {
            MapError::Map(_) => Self::NoMemory,
            MapError::Range(_) | MapError::TooLarge(_) => Self::Invalid,
            MapError::Deaf | MapError::Register(_) => Self::Unsupported,
        }
    }
}
