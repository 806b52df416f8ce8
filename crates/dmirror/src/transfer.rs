//! Copies: between a buffer of the driver's and the device's pages, or RAM by its address.
//!
//! What    [`load`] and [`store`], for memory that may vanish at any moment; `Memory`, the pages of one device.
//! Why     another thread may unmap what a device is about to read. A load of our own would end the process; the
//!         kernel, asked to copy, says that there is nothing.
//! Fails   with [`Unreachable`]: part of it may have been copied.

use std::ptr::NonNull;

use uhmm::mirror::Want;
use uhmm::{Device, MemDevice, PAGE_SIZE, PageCount, Pfn, Space, Transfer, VaRange, VirtAddr};

/// Not all of the memory could be had: it is not mapped, or not for this.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unreachable;

fn remote(at: VirtAddr, len: usize) -> libc::iovec {
    libc::iovec { iov_base: std::ptr::without_provenance_mut(at.get()), iov_len: len }
}

fn whole(copied: isize, len: usize) -> Result<(), Unreachable> {
    if usize::try_from(copied) == Ok(len) { Ok(()) } else { Err(Unreachable) }
}

/// Copies what is at `at` in this process's memory into `into`.
pub fn load(at: VirtAddr, into: &mut [u8]) -> Result<(), Unreachable> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: the kernel writes to `into`, which is borrowed exclusively, and only reads the rest, if it is there.
    let copied = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote(at, into.len()), 1, 0) };
    whole(copied, into.len())
}

/// Copies `from` to `at` in this process's memory.
///
/// # Safety
/// What may be written there must be the caller's to write: no Rust reference says what is there.
pub unsafe fn store(at: VirtAddr, from: &[u8]) -> Result<(), Unreachable> {
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    // SAFETY: the kernel only reads `from`; the rest the caller answers for.
    let copied = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote(at, from.len()), 1, 0) };
    whole(copied, from.len())
}

/// Has the kernel bring what is mapped at `range`, for reading or writing, as far as there is something.
pub(crate) fn touch(range: VaRange, want: Want) {
    let advice = if want == Want::Write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    let start = std::ptr::without_provenance_mut(range.start().get());
    // SAFETY: the contents stay as they are.
    unsafe { libc::madvise(start, range.bytes(), advice) };
}

/// The buffer of an operation, and which way it goes.
pub(crate) enum Buffer<'a> {
    /// The device is read.
    Into(&'a mut [u8]),
    /// The device writes.
    From(&'a [u8]),
}

impl Buffer<'_> {
    pub(crate) const fn writes(&self) -> bool {
        matches!(self, Self::From(_))
    }

    /// What belongs to `pages` pages from number `first` on.
    pub(crate) fn part(&mut self, first: PageCount, pages: PageCount) -> Buffer<'_> {
        let bytes = first.bytes()..first.plus(pages).bytes();
        match self {
            Self::Into(into) => Buffer::Into(&mut into[bytes]),
            Self::From(from) => Buffer::From(&from[bytes]),
        }
    }

    /// Copies to or from RAM at `at`.
    pub(crate) fn ram(self, at: VirtAddr) -> Result<(), Unreachable> {
        match self {
            Self::Into(into) => load(at, into),
            // SAFETY: what a device may write was promised to the machine (`Dmirror::new`).
            Self::From(from) => unsafe { store(at, from) },
        }
    }
}

/// The pages of one device, for its own driver.
pub(crate) struct Memory<'m> {
    pub(crate) space: &'m Space,
    pub(crate) number: usize,
    pub(crate) device: &'m MemDevice,
}

impl Memory<'_> {
    /// Copies to or from the device's page `pfn`. To be called under the lock of a mirror that says that the page is
    /// there: nobody gives it up meanwhile.
    pub(crate) fn copy(&self, pfn: Pfn, page: &mut Page, buffer: Buffer<'_>) -> Result<(), Unreachable> {
        let at = self.space.device_page(self.number, pfn).ok_or(Unreachable)?;
        // SAFETY: the page is ours, aligned, as long as a page, and reached by nobody else until the call is over.
        let mut batch = [unsafe { Transfer::new(at, NonNull::from(&mut page.0).cast(), PageCount::ONE) }];
        match buffer {
            Buffer::Into(into) => {
                self.device.read(&mut batch);
                batch[0].outcome().map_err(|_| Unreachable)?;
                into.copy_from_slice(&page.0);
            }
            Buffer::From(from) => {
                page.0.copy_from_slice(from);
                // As above: the copy is over, and the device only reads the page.
                self.device.write(&mut batch);
                batch[0].outcome().map_err(|_| Unreachable)?;
            }
        }
        Ok(())
    }
}

/// A page by which the device's engine copies, which wants it aligned.
#[repr(align(4096))]
pub(crate) struct Page([u8; PAGE_SIZE]);

impl Page {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self([0; PAGE_SIZE]))
    }
}
