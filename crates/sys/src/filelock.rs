//! Locks on parts of a file that belong to an open file, not to a process.
//!
//! What     [`FileLock`], one byte of a file, held by one or shared by many (`F_OFD_SETLK`); [`reopened`], the
//!          same file opened once more, to hold locks of its own.
//! Why      `flock` knows only the whole file, and the older locks of POSIX are a process's: any close of the
//!          file in it lets them go, and its own threads do not exclude each other.
//! Owns     the open file, whose closing, by exit and by SIGKILL as well, lets the lock go.
//! Fails    [`LockError::Held`] if somebody has it. File systems without locks say so with another error.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use linux_raw_sys::general as sys;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::thread::raw;

/// `F_OFD_SETLK`, which the bindings do not know.
const OFD_SETLK: usize = 37;

/// How a byte is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// With others that share it. The file must be open for reading.
    Shared,
    /// Alone. The file must be open for writing.
    Exclusive,
}

/// Why a byte is not held.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another open file has it, in a way that leaves no room.
    #[error("another holds it")]
    Held,
    /// The system refused.
    #[error(transparent)]
    Os(#[from] io::Error),
}

/// A byte of a file, held until dropped.
#[derive(Debug)]
#[must_use = "dropped, the lock is gone"]
pub struct FileLock {
    file: OwnedFd,
    byte: u64,
}

impl FileLock {
    /// Takes the byte at `byte`, which may lie behind the file's end, without waiting. The lock is the open
    /// file's: no two of them can be on one open file, so every lock gets one of its own (see [`reopened`]).
    pub fn try_acquire(file: OwnedFd, byte: u64, kind: Kind) -> Result<Self, LockError> {
        set(file.as_fd(), byte, kind)?;
        Ok(Self { file, byte })
    }

    /// Holds it in another way, without letting go in between. On failure it is held as before.
    pub fn try_convert(&self, kind: Kind) -> Result<(), LockError> {
        set(self.file.as_fd(), self.byte, kind)
    }
}

fn set(file: BorrowedFd<'_>, byte: u64, kind: Kind) -> Result<(), LockError> {
    let kind = match kind {
        Kind::Shared => sys::F_RDLCK,
        Kind::Exclusive => sys::F_WRLCK,
    };
    let lock = sys::flock {
        l_type: kind as _,
        l_whence: 0,
        l_start: i64::try_from(byte).map_err(|_| io::Error::from(Errno::INVAL))?,
        l_len: 1,
        // Must be zero for locks of open files.
        l_pid: 0,
    };
    let args = [file.as_raw_fd() as usize, OFD_SETLK, &raw const lock as usize];
    // SAFETY: the request reads a `struct flock`, which this is, and changes no memory of ours.
    match unsafe { raw::syscall(sys::__NR_fcntl, args) } {
        Ok(_) => Ok(()),
        Err(Errno::AGAIN | Errno::ACCESS) => Err(LockError::Held),
        Err(errno) => Err(LockError::Os(errno.into())),
    }
}

/// The file behind `file`, opened once more: what is locked through one excludes the other.
pub fn reopened(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memfd::Memfd;

    fn open(memfd: &Memfd) -> OwnedFd {
        reopened(memfd.fd()).unwrap()
    }

    #[test]
    fn one_holds_or_many_share() {
        let memfd = Memfd::create("uhmm-test", 4096, None).unwrap();
        let shared = FileLock::try_acquire(open(&memfd), 1 << 40, Kind::Shared).unwrap();
        let also = FileLock::try_acquire(open(&memfd), 1 << 40, Kind::Shared).unwrap();
        let alone = || FileLock::try_acquire(open(&memfd), 1 << 40, Kind::Exclusive);
        assert!(matches!(alone(), Err(LockError::Held)));
        assert!(FileLock::try_acquire(open(&memfd), 7, Kind::Exclusive).is_ok(), "another byte is free");
        assert!(matches!(shared.try_convert(Kind::Exclusive), Err(LockError::Held)));
        drop(also);
        shared.try_convert(Kind::Exclusive).unwrap();
        assert!(matches!(alone(), Err(LockError::Held)));
        drop(shared);
        assert!(alone().is_ok());
    }
}
