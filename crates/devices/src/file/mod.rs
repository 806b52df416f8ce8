//! A file or a block device as a device.
//!
//! What     [`FileDevice`]: page `n` is the 4096 bytes at offset `n * 4096`.
//! Why      the memory that everybody has more of: a disk.
//! How      `opening` gets a descriptor with the right size, `ahead` has space found before it is written,
//!          `awake` waits for what a fault needs, `ring` carries batches through io_uring, and `positioned`
//!          carries them with `preadv`/`pwritev`: what is one request, where that is faster; everything where
//!          io_uring is refused or all rings are busy; and whatever a ring did not finish.
//! Owns     the descriptor and the rings. An existing file's bytes are what its pages read as until they are
//!          written; a new file reads as zeros.
//! Fails    per transfer. A file that became shorter is [`TransferError::Short`], a full file system or
//!          quota [`TransferError::Full`]. Writes through the page cache ([`FileDevice::direct`] is `false`)
//!          may fail after they were reported done, when the kernel writes them back.
//!
//! With direct access the kernel may hold on to the RAM of a transfer for an instant after the transfer is
//! done: whoever moves that page next may find it pinned, and tries again.
//!
//! After a fork the child's copy of a `FileDevice` works, with positioned calls: rings belong to the process
//! that made them. A child that wants rings makes its own device from [`FileDevice::handle`].

mod ahead;
mod opening;
mod positioned;
mod ring;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use uhmm_addr::{ByteSize, PageCount};
use uhmm_core::device::{Device, DevicePage, MemoryType, Transfer, TransferError};
use uhmm_sys::awake::Awake;

pub use opening::FileOptions;

use crate::{Backing, Handle, OUT_OF_RANGE, OpenError, fits};
use ahead::Ahead;
use ring::Rings;

/// A device that is a regular file or a block device.
#[derive(Debug)]
pub struct FileDevice {
    name: String,
    path: PathBuf,
    fd: OwnedFd,
    pages: PageCount,
    direct: bool,
    rings: Option<Rings>,
    keeps_space: AtomicBool,
    awake: Awake,
    ahead: Ahead,
}

impl FileDevice {
    /// How to open one, where the defaults do not fit.
    pub fn options() -> FileOptions {
        FileOptions::default()
    }

    /// Opens or creates the file at `path`; see [`FileOptions::open`].
    pub fn open(path: &Path, size: Option<ByteSize>) -> Result<Self, OpenError> {
        FileOptions::default().open(path, size)
    }

    /// Makes an unlinked temporary file; see [`FileOptions::temporary`].
    pub fn temporary(directory: Option<&Path>, size: Option<ByteSize>) -> Result<Self, OpenError> {
        FileOptions::default().temporary(directory, size)
    }

    /// The file behind `fd`; see [`FileOptions::from_fd`].
    pub fn from_fd(fd: OwnedFd, size: ByteSize) -> Result<Self, OpenError> {
        FileOptions::default().from_fd(fd, size)
    }

    /// Where the file is; for a temporary file, the directory that it is in without a name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether transfers go past the page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// Whether batches go through io_uring.
    pub fn uses_io_uring(&self) -> bool {
        self.rings.as_ref().is_some_and(Rings::usable)
    }

    /// Whether discarded pages give their space back. `false` once the file system or the block device has
    /// refused to: then a discard does nothing, the space stays with the file, and what the pages hold
    /// afterwards is what they held before.
    pub fn returns_space(&self) -> bool {
        !self.keeps_space.load(Ordering::Relaxed)
    }

    /// The open file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// What another process needs to have the same device.
    pub fn handle(&self) -> Result<Handle, OpenError> {
        let fd = self.fd.try_clone().map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::MFILE);
            OpenError::System { action: "duplicate the descriptor of", path: self.path.clone(), errno }
        })?;
        Ok(Handle { backing: Backing::File, size: self.pages.size(), fd })
    }

    /// Carries the batch out. `urgent` if somebody waits for it, whom it would cost time if we slept.
    fn carry(&self, direction: Direction, batch: &mut [Transfer], urgent: bool) {
        let awake = (urgent && self.direct && self.awake.begin()).then_some(&self.awake);
        let job = Job { fd: self.fd.as_fd(), direction, pages: self.pages, awake };
        // Asleep, one request is done soonest by the system call that does nothing else.
        let carried = (awake.is_some() || !positioned::is_one_request(job, batch))
            && self.rings.as_ref().is_some_and(|rings| rings.carry(job, batch));
        if !carried {
            positioned::carry(job, batch);
        }
    }
}

impl Device for FileDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn memory_type(&self) -> MemoryType {
        MemoryType::Private
    }

    fn capacity(&self) -> PageCount {
        self.pages
    }

    fn write(&self, batch: &mut [Transfer]) {
        let size = self.pages.bytes() as u64;
        let parts = batch.iter().filter(|part| fits(self.pages, part.page(), part.pages()));
        let end = parts.map(|part| part.page().offset() + part.bytes() as u64).max();
        self.ahead.reach(self.fd(), end.unwrap_or(0), size);
        self.carry(Direction::Write, batch, false);
    }

    fn read(&self, batch: &mut [Transfer]) {
        self.carry(Direction::Read, batch, true);
    }

    fn read_ahead(&self, batch: &mut [Transfer]) {
        self.carry(Direction::Read, batch, false);
    }

    fn discard(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        if !fits(self.pages, page, pages) {
            return Err(OUT_OF_RANGE);
        }
        if pages.is_zero() || self.keeps_space.load(Ordering::Relaxed) {
            return Ok(());
        }
        // On a block device the kernel answers this with a discard that is sure to leave zeros, or refuses.
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (offset, len) = (page.offset(), pages.bytes() as u64);
        match rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.fd, punch, offset, len)) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.keeps_space.store(true, Ordering::Relaxed);
                Ok(())
            }
            done => done.map_err(failure),
        }
    }

    /// Where the file keeps its space, what is in it stays as well: such a device takes pages with contents only.
    fn zero(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        self.discard(page, pages)?;
        if self.keeps_space.load(Ordering::Relaxed) { Err(TransferError::Declined) } else { Ok(()) }
    }
}

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Direction {
    /// From RAM to the file.
    Write,
    /// From the file to RAM.
    Read,
}

/// What every piece of a batch has in common.
#[derive(Clone, Copy)]
struct Job<'a> {
    fd: BorrowedFd<'a>,
    direction: Direction,
    pages: PageCount,
    /// Set if the answer is to be waited for awake.
    awake: Option<&'a Awake>,
}

/// What an error number means for a transfer.
fn failure(errno: Errno) -> TransferError {
    match errno {
        Errno::NOSPC | Errno::DQUOT => TransferError::Full,
        _ => TransferError::Io(errno.raw_os_error()),
    }
}

/// Whether `after` starts on the device where `before`, a transfer that fits, ends.
fn follows(job: Job<'_>, before: &Transfer, after: &Transfer) -> bool {
    fits(job.pages, after.page(), after.pages())
        && before.page().0 + before.pages().get() as u64 == after.page().0
}

/// Fails `transfer`, of which bytes from `offset` on got `error`. Of several pieces that ended early the first
/// one counts.
fn fail_piece(transfer: &mut Transfer, offset: usize, error: TransferError) {
    let error = match error {
        TransferError::Short(bytes) => {
            TransferError::Short(u32::try_from(offset).unwrap_or(u32::MAX).saturating_add(bytes))
        }
        other => other,
    };
    match (transfer.outcome(), error) {
        (Err(TransferError::Short(earlier)), TransferError::Short(bytes)) if earlier <= bytes => {}
        _ => transfer.fail(error),
    }
}

#[cfg(test)]
mod tests {
    use uhmm_addr::ByteSize;
    use uhmm_testdev::device_suite::{Ram, read, write};

    use super::*;

    #[test]
    fn a_file_that_keeps_its_space_takes_no_page_that_must_be_zero() {
        let device = FileDevice::temporary(None, Some(ByteSize::mib(1))).unwrap();
        let mut ram = Ram::new(2);
        ram.stamp(0, 5);
        write(&device, &ram, &[(0, 1, 3)]);
        device.keeps_space.store(true, Ordering::Relaxed);
        assert_eq!(device.discard(DevicePage(3), PageCount::ONE), Ok(()));
        assert_eq!(device.zero(DevicePage(3), PageCount::ONE), Err(TransferError::Declined));
        device.keeps_space.store(false, Ordering::Relaxed);
        read(&device, &ram, &[(1, 1, 3)]);
        assert_eq!(ram.stamp_of(1), Some(5));
        device.zero(DevicePage(3), PageCount::ONE).unwrap();
        read(&device, &ram, &[(1, 1, 3)]);
        assert_eq!(ram.stamp_of(1), Some(0));
    }
}
