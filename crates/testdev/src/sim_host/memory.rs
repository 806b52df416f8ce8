//! Memory for the simulated host: an allocation that is reached through raw pointers only.

use std::alloc::{self, Layout};
use std::ptr::NonNull;

use uhmm_addr::{PAGE_SIZE, PageCount, VaRange, VirtAddr};

/// Zeroed, page-aligned memory at a multiple of 2 MiB.
#[derive(Debug)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory; whoever accesses it does so under the contract of the methods below.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) fn new(pages: PageCount) -> Self {
        let layout =
            Layout::from_size_align(pages.bytes().max(PAGE_SIZE), 2 << 20).expect("a size that exists");
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc::alloc_zeroed(layout) };
        Self { base: NonNull::new(base).expect("memory for a test"), layout }
    }

    pub(crate) const fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn range(&self) -> VaRange {
        VaRange::new(VirtAddr::of(self.base.as_ptr()), self.layout.size()).expect("whole pages")
    }

    /// The number of the page at `address`, counted from the first.
    pub(crate) fn index(&self, address: VirtAddr) -> usize {
        assert!(self.range().contains(address.page()), "{address} lies elsewhere");
        address.page().since(self.range().first()).get()
    }

    fn page(&self, index: usize) -> NonNull<u8> {
        assert!((index + 1) * PAGE_SIZE <= self.layout.size());
        // SAFETY: inside the allocation.
        unsafe { self.base.add(index * PAGE_SIZE) }
    }

    /// What page `index` holds. The page must have no other user at the time.
    pub(crate) fn read(&self, index: usize) -> Box<[u8]> {
        let mut bytes = vec![0; PAGE_SIZE].into_boxed_slice();
        // SAFETY: both are a page long and apart; slots have one owner, who called.
        unsafe { self.page(index).as_ptr().copy_to_nonoverlapping(bytes.as_mut_ptr(), PAGE_SIZE) };
        bytes
    }

    /// Overwrites page `index`. The page must have no other user at the time.
    pub(crate) fn write(&self, index: usize, bytes: &[u8]) {
        assert_eq!(bytes.len(), PAGE_SIZE);
        // SAFETY: both are a page long and apart; slots have one owner, who called.
        unsafe { self.page(index).as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), PAGE_SIZE) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout by `new`.
        unsafe { alloc::dealloc(self.base.as_ptr(), self.layout) }
    }
}
