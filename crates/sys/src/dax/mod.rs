//! Files mapped directly, and what makes stores to them safe.
//!
//! What     [`Window`], addresses of ours of which parts map parts of files and all others raise SIGBUS; and
//!          [`flush`], which sees that what was stored is where power cannot take it.
//! Why      a part can be taken away or given back at any time without a moment in which the addresses belong to
//!          nobody: the kernel replaces a mapping in one step. So a page that broke, a file that became shorter and
//!          a device that is gone look the same to who touches them, and never like somebody else's memory.
//! Owns     a `Window` its addresses; the files are others'.
//! Fails    with the kernel's error. `mmap` may fail half way for want of memory for mappings: the part is then as
//!          it was, or raises SIGBUS.

pub mod flush;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::mm::{self, Advice, MapFlags, MsyncFlags, ProtFlags};
use uhmm_addr::{PAGE_SIZE, VaRange, VirtAddr};

use crate::mapping::Mapping;

/// What may be done with a part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protection {
    /// It may be read.
    Read,
    /// It may be read and written.
    ReadWrite,
}

/// Addresses of which parts map parts of files. Touching any other part raises SIGBUS.
///
/// The memory is reached through raw pointers only.
#[derive(Debug)]
pub struct Window {
    mapping: Mapping,
    protection: Protection,
    /// An empty file: there is no page behind any of its addresses.
    void: OwnedFd,
}

impl Window {
    /// `len` bytes of addresses, whole pages, of which the first has the remainder `phase` by `align`: what lies at
    /// a multiple of huge pages in a file lies at one in memory.
    pub fn reserve(len: usize, align: usize, phase: usize, protection: Protection) -> io::Result<Self> {
        let void = memfd_create("uhmm-void", MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL);
        let void = match void {
            // Older kernels do not know that flag.
            Err(Errno::INVAL) => memfd_create("uhmm-void", MemfdFlags::CLOEXEC),
            made => made,
        }?;
        let mapping = Mapping::void(void.as_fd(), len, align, phase)?;
        Ok(Self { mapping, protection, void })
    }

    /// The addresses.
    pub fn range(&self) -> VaRange {
        self.mapping.range()
    }

    /// The first byte.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.mapping.as_ptr()
    }

    /// The addresses of `len` bytes from byte `at` on, whole pages inside the window.
    pub fn part(&self, at: usize, len: usize) -> io::Result<VaRange> {
        let start = self.range().start().checked_add(at);
        let part = start.and_then(|start| VaRange::new(start, len).ok());
        part.filter(|part| self.range().encloses(*part)).ok_or_else(|| Errno::INVAL.into())
    }

    /// Maps the bytes of `file` from `offset` on over `len` bytes from `at` on. With `sync` only if a store is safe
    /// as soon as it is flushed from the processor's cache (`MAP_SYNC`); else the error is `EOPNOTSUPP`.
    pub fn map(
        &self,
        at: usize,
        len: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        sync: bool,
    ) -> io::Result<()> {
        let kind = if sync { MapFlags::SHARED_VALIDATE | MapFlags::SYNC } else { MapFlags::SHARED };
        self.replace(at, len, file, offset, kind)
    }

    /// Takes the file away from `len` bytes from `at` on.
    pub fn close(&self, at: usize, len: usize) -> io::Result<()> {
        self.replace(at, len, self.void.as_fd(), 0, MapFlags::SHARED | MapFlags::NORESERVE)
    }

    fn replace(
        &self,
        at: usize,
        len: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        kind: MapFlags,
    ) -> io::Result<()> {
        let part = self.part(at, len)?;
        let protection = match self.protection {
            Protection::Read => ProtFlags::READ,
            Protection::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: the part lies inside the mapping, which this value owns and of which no references exist; whoever
        // keeps pointers into it expects its contents to change, and SIGBUS.
        unsafe {
            mm::mmap(self.pointer(part), part.bytes(), protection, kind | MapFlags::FIXED, file, offset)
        }?;
        Ok(())
    }

    /// Unmaps the pages of `len` bytes from `at` on: the next touch faults. The file keeps its bytes.
    pub fn forget(&self, at: usize, len: usize) -> io::Result<()> {
        let part = self.part(at, len)?;
        // SAFETY: inside the mapping, which is this value's own; shared pages of a file lose nothing by it.
        unsafe { mm::madvise(self.pointer(part), part.bytes(), Advice::LinuxDontNeed) }?;
        Ok(())
    }

    /// Makes every page of `len` bytes from `at` on present.
    pub fn populate(&self, at: usize, len: usize) -> io::Result<()> {
        let part = self.part(at, len)?;
        let advice = match self.protection {
            Protection::Read => Advice::LinuxPopulateRead,
            Protection::ReadWrite => Advice::LinuxPopulateWrite,
        };
        // SAFETY: inside the mapping, which is this value's own; no byte changes.
        unsafe { mm::madvise(self.pointer(part), part.bytes(), advice) }?;
        Ok(())
    }

    /// Has the kernel write back what was stored to `len` bytes from `at` on, rounded outwards to pages, and waits
    /// for it.
    pub fn write_back(&self, at: usize, len: usize) -> io::Result<()> {
        let first = at / PAGE_SIZE * PAGE_SIZE;
        let end = at.checked_add(len).ok_or(Errno::INVAL)?.next_multiple_of(PAGE_SIZE);
        let part = self.part(first, end - first)?;
        // SAFETY: inside the mapping, which is this value's own; no byte changes.
        unsafe { mm::msync(self.pointer(part), part.bytes(), MsyncFlags::SYNC) }?;
        Ok(())
    }

    fn pointer(&self, part: VaRange) -> *mut core::ffi::c_void {
        let before = part.start().get() - self.range().start().get();
        self.as_ptr().as_ptr().wrapping_add(before).cast()
    }

    /// The byte at which `addr` is, if it is inside.
    pub fn offset_of(&self, addr: VirtAddr) -> Option<usize> {
        self.range().contains(addr.page()).then(|| addr.get() - self.range().start().get())
    }
}
