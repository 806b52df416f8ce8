//! What a fault handler needs in its hands, made before the first fault.

use core::ptr::NonNull;

use uhmm_addr::{PAGE_SIZE, PageCount, Pfn};

use crate::device::{DevicePage, Transfer};

/// The most pages that one fault brings home: 1 MiB.
pub const MAX_WINDOW: PageCount = PageCount::new(256);

/// Working memory for one fault at a time.
#[derive(Debug)]
pub struct Scratch {
    pub(crate) bounce: NonNull<u8>,
    pub(super) zeros: NonNull<u8>,
    pub(super) pfns: [Pfn; MAX_WINDOW.get()],
    pub(crate) transfers: Transfers,
    /// Nobody waits for the pages.
    pub(super) ahead: bool,
    /// A page that cannot be read is not given up.
    pub(super) sparing: bool,
}

// SAFETY: the two buffers belong to this scratch alone, whichever thread has it.
unsafe impl Send for Scratch {}

impl Scratch {
    /// Bytes that [`Scratch::new`] needs.
    pub const BUFFER_BYTES: usize = 2 * MAX_WINDOW.bytes();

    /// Working memory with `buffer` to copy through.
    ///
    /// # Safety
    /// `buffer` must be page-aligned and valid for reads and writes of [`Scratch::BUFFER_BYTES`] as long as
    /// the scratch lives, not be managed (what is not present yet is filled by the kernel, not by a handler),
    /// belong to it alone, and its second half must be zero.
    pub unsafe fn new(buffer: NonNull<u8>) -> Self {
        debug_assert_eq!(buffer.as_ptr() as usize % PAGE_SIZE, 0);
        Self {
            bounce: buffer,
            // SAFETY: the buffer has room for two windows.
            zeros: unsafe { buffer.add(MAX_WINDOW.bytes()) },
            pfns: [Pfn::new(0); MAX_WINDOW.get()],
            transfers: Transfers { items: [const { Transfer::vacant() }; MAX_WINDOW.get()], len: 0 },
            ahead: false,
            sparing: false,
        }
    }
}

/// Transfers of one window: a vector that cannot grow.
#[derive(Debug)]
pub(crate) struct Transfers {
    items: [Transfer; MAX_WINDOW.get()],
    len: usize,
}

impl Transfers {
    pub(crate) const fn clear(&mut self) {
        self.len = 0;
    }

    /// Adds one page, joined to the last transfer where both sides go on.
    ///
    /// # Safety
    /// As [`Transfer::new`].
    pub(crate) unsafe fn push(&mut self, page: DevicePage, ram: NonNull<u8>) {
        if self.len > 0 && self.items[self.len - 1].extend(page, ram, PageCount::ONE) {
            return;
        }
        // SAFETY: the caller's promise.
        self.items[self.len] = unsafe { Transfer::new(page, ram, PageCount::ONE) };
        self.len += 1;
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [Transfer] {
        &mut self.items[..self.len]
    }
}
