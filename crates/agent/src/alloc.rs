//! The agent's heap: dlmalloc in one mapping of our own.
//!
//! Why    the C library's heap is managed memory: a handler thread that allocated from it could wait for
//!        itself.
//! Large  blocks are fresh pages, which are zero already and cost nothing before they are touched; they are not used
//!        again. The agent has a few, its tables, as long as the process lives.
//! Fork   the child starts with a heap of its own ([`Heap::renew`]): the parent's may have been locked, or
//!        half changed, by a thread that the child does not have. What lies in the old one stays readable.
//! Fails  as any allocator, with null, when a gigabyte is used up. Whether the address space has a gigabyte is to
//!        be asked first ([`Heap::is_there`]): where an allocation fails, the program ends.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use dlmalloc::{Allocator, Dlmalloc};
use uhmm_addr::{ByteSize, PAGE_SIZE};
use uhmm_sys::futex::Lock;
use uhmm_sys::mapping::Mapping;

const HEAP: ByteSize = ByteSize::gib(1);
/// Blocks of so many bytes are large.
const LARGE: usize = 256 << 10;

const fn is_large(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= PAGE_SIZE
}

/// Where the heap gets its pages from: a mapping, front to back.
struct Pages {
    next: AtomicUsize,
    end: AtomicUsize,
}

impl Pages {
    /// Whether there is a mapping; makes one if need be.
    fn are_there(&self) -> bool {
        if self.next.load(Ordering::Relaxed) != 0 {
            return true;
        }
        let Ok(mapping) = Mapping::reserve(HEAP.bytes() as usize, "uhmm-heap") else { return false };
        // Small pages: the heap is small, and a huge page would make it cost two megabytes.
        let _ = mapping.advise_no_huge();
        let range = mapping.leak();
        self.end.store(range.end().get(), Ordering::Relaxed);
        self.next.store(range.start().get(), Ordering::Relaxed);
        true
    }
}

// SAFETY: the pages handed out are fresh, zero, and given to nobody twice: `next` only grows.
unsafe impl Allocator for &'static Pages {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let size = size.next_multiple_of(1 << 16);
        if !self.are_there() {
            return (ptr::null_mut(), 0, 0);
        }
        let start = self.next.load(Ordering::Relaxed);
        if self.end.load(Ordering::Relaxed) - start < size {
            return (ptr::null_mut(), 0, 0);
        }
        self.next.store(start + size, Ordering::Relaxed);
        (ptr::with_exposed_provenance_mut(start), size, 0)
    }

    fn remap(&self, _ptr: *mut u8, _old: usize, _new: usize, _can_move: bool) -> *mut u8 {
        ptr::null_mut()
    }

    fn free_part(&self, _ptr: *mut u8, _old: usize, _new: usize) -> bool {
        false
    }

    fn free(&self, _ptr: *mut u8, _size: usize) -> bool {
        false
    }

    fn can_release_part(&self, _flags: u32) -> bool {
        false
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        PAGE_SIZE
    }
}

static PAGES: Pages = Pages { next: AtomicUsize::new(0), end: AtomicUsize::new(0) };

/// The global allocator.
pub struct Heap {
    inner: UnsafeCell<Lock<Dlmalloc<&'static Pages>>>,
}

// SAFETY: the cell is only written by `renew`, which runs while its process has one thread.
unsafe impl Sync for Heap {}

impl Heap {
    pub const fn new() -> Self {
        Self { inner: UnsafeCell::new(Lock::new(Dlmalloc::new_with_allocator(&PAGES))) }
    }

    fn inner(&self) -> &Lock<Dlmalloc<&'static Pages>> {
        // SAFETY: nobody writes the cell while others run (see `renew`).
        unsafe { &*self.inner.get() }
    }

    /// Whether there is memory for it.
    pub fn is_there(&self) -> bool {
        // The heap's lock guards the pages as well.
        let _heap = self.inner().lock();
        PAGES.are_there()
    }

    /// Starts afresh, in the child of a fork.
    ///
    /// # Safety
    /// The process must have one thread, which must not be inside the heap.
    pub unsafe fn renew(&self) {
        PAGES.next.store(0, Ordering::Relaxed);
        // SAFETY: the only thread is here, and not in the heap, so that no reference into the cell exists.
        unsafe { self.inner.get().write(Lock::new(Dlmalloc::new_with_allocator(&PAGES))) };
    }
}

// SAFETY: dlmalloc under a lock; sizes and alignments are passed through as they are.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut heap = self.inner().lock();
        if is_large(layout) {
            // The heap's lock guards the pages as well.
            return (&PAGES).alloc(layout.size()).0;
        }
        // SAFETY: the layout's size is not zero, by this function's contract.
        unsafe { heap.malloc(layout.size(), layout.align()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            // SAFETY: the caller's promise.
            return unsafe { self.alloc(layout) };
        }
        // SAFETY: as above.
        unsafe { self.inner().lock().calloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if is_large(layout) {
            return;
        }
        // SAFETY: the block came from here with this layout, by this function's contract.
        unsafe { self.inner().lock().free(at, layout.size(), layout.align()) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(larger) = Layout::from_size_align(size, layout.align()) else { return ptr::null_mut() };
        if is_large(layout) || is_large(larger) {
            // SAFETY: the caller's promise; the two blocks do not overlap, and both have as many bytes as are copied.
            return unsafe {
                let to = self.alloc(larger);
                if !to.is_null() {
                    ptr::copy_nonoverlapping(at, to, layout.size().min(size));
                    self.dealloc(at, layout);
                }
                to
            };
        }
        // SAFETY: as above.
        unsafe { self.inner().lock().realloc(at, layout.size(), layout.align(), size) }
    }
}
