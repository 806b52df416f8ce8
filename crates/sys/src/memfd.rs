//! Memory that has a file descriptor, so that another process can map it.
//!
//! What     [`Memfd`]: a file in memory of a fixed size, of ordinary or huge pages.
//! Why      memory of devices is shared between a program, its agent and its forked children.
//! Owns     the descriptor; the pages live as long as any descriptor or mapping of them does.
//! Fails    creating fails with the kernel's error; huge pages where the pool has none of that size.

use core::ops::Range;
use std::io;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{self, MemfdFlags, SeekFrom};
use rustix::io::Errno;
use uhmm_addr::PAGE_SIZE;

pub use crate::mapping::Huge;
use crate::mapping::Mapping;

/// A file in memory.
#[derive(Debug)]
pub struct Memfd {
    fd: OwnedFd,
    size: u64,
}

impl Memfd {
    /// A file of `size` zero bytes, a multiple of its page size; `name` shows up in `/proc/<pid>/maps`.
    pub fn create(name: &str, size: u64, huge: Option<Huge>) -> io::Result<Self> {
        let page = huge.map_or(PAGE_SIZE, Huge::bytes) as u64;
        if size == 0 || !size.is_multiple_of(page) {
            return Err(Errno::INVAL.into());
        }
        let pages = match huge {
            None => MemfdFlags::empty(),
            Some(Huge::M2) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            Some(Huge::G1) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        };
        let flags = MemfdFlags::CLOEXEC | pages;
        // Some systems forbid files in memory that could be executed; older kernels do not know the flag.
        let fd = match fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => fs::memfd_create(name, flags),
            other => other,
        }?;
        fs::ftruncate(&fd, size)?;
        Ok(Self { fd, size })
    }

    /// The file in memory behind `fd`, as another process made it.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let size = fs::fstat(&fd)?.st_size.max(0) as u64;
        if size == 0 {
            return Err(Errno::INVAL.into());
        }
        Ok(Self { fd, size })
    }

    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes in it.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Maps all of it, shared, readable and writable, aligned to its huge pages.
    pub fn map(&self) -> io::Result<Mapping> {
        let len = usize::try_from(self.size).map_err(|_| Errno::NOMEM)?;
        // Pages with a file are shown by its name.
        Mapping::shared(self.fd(), 0, len, "")
    }

    /// The parts that have pages, in order. Where the kernel cannot tell, everything that is left counts.
    ///
    /// Moves the file's offset, which every duplicate of the descriptor shares: one caller at a time.
    pub fn data_extents(&self) -> impl Iterator<Item = Range<u64>> {
        let mut at = 0;
        core::iter::from_fn(move || {
            if at >= self.size {
                return None;
            }
            let start = match fs::seek(&self.fd, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(Errno::NXIO) => self.size,
                Err(_) => at,
            };
            if start >= self.size {
                at = self.size;
                return None;
            }
            let end = match fs::seek(&self.fd, SeekFrom::Hole(start)) {
                Ok(end) if end > start => end.min(self.size),
                _ => self.size,
            };
            at = end;
            Some(start..end)
        })
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_seen_through_every_mapping() {
        let memfd = Memfd::create("uhmm-test", 4 << 20, None).unwrap();
        let (one, two) = (memfd.map().unwrap(), memfd.map().unwrap());
        assert!(one.range().start().is_aligned_to(2 << 20));
        assert_eq!((one.len() as u64, memfd.size()), (4 << 20, 4 << 20));
        // SAFETY: both mappings are readable and writable for 4 MiB and used by this thread alone.
        unsafe {
            one.as_ptr().add(12_345).write(9);
            assert_eq!(two.as_ptr().add(12_345).read(), 9);
        }
        let tail = Mapping::shared(memfd.fd(), 3 << 12, 4096, "uhmm tail").unwrap();
        // SAFETY: the mapping is one readable page, the one that holds byte 12,345 of the file.
        assert_eq!(unsafe { tail.as_ptr().add(12_345 - (3 << 12)).read() }, 9);
    }

    #[test]
    fn extents_are_what_was_written() {
        let memfd = Memfd::create("uhmm-test", 1 << 20, None).unwrap();
        assert_eq!(memfd.data_extents().count(), 0);
        rustix::io::pwrite(memfd.fd(), &[1; 4096], 8192).unwrap();
        rustix::io::pwrite(memfd.fd(), &[1; 8192], (1 << 20) - 8192).unwrap();
        let found: Vec<_> = memfd.data_extents().collect();
        assert_eq!(found, [8192..12_288, (1 << 20) - 8192..1 << 20]);
    }

    #[test]
    fn sizes_are_whole_pages() {
        assert!(Memfd::create("uhmm-test", 0, None).is_err());
        assert!(Memfd::create("uhmm-test", 4097, None).is_err());
        assert!(Memfd::create("uhmm-test", 4096, Some(Huge::M2)).is_err());
    }
}
