//! Virtual addresses and virtual page numbers.

use core::fmt;

use crate::{CHUNK_PAGES, CHUNK_SHIFT, PAGE_SHIFT, PAGE_SIZE, PageCount};

/// A byte address in some process's address space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct VirtAddr(usize);

impl VirtAddr {
    /// The address with this numeric value.
    pub const fn new(value: usize) -> Self {
        Self(value)
    }

    /// The address of what `ptr` points to. Provenance is not carried: a `VirtAddr` names memory, it
    /// does not permit access to it.
    pub fn of<T: ?Sized>(ptr: *const T) -> Self {
        Self(ptr.cast::<u8>() as usize)
    }

    /// The numeric value, in bytes.
    pub const fn get(self) -> usize {
        self.0
    }

    /// The page that contains this address.
    pub const fn page(self) -> Vpn {
        Vpn(self.0 >> PAGE_SHIFT)
    }

    /// The address rounded down to its page.
    pub const fn page_base(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }

    /// Bytes from the start of the page.
    pub const fn page_offset(self) -> usize {
        self.0 & (PAGE_SIZE - 1)
    }

    /// Whether the address is a multiple of `bytes`, a power of two.
    pub const fn is_aligned_to(self, bytes: usize) -> bool {
        self.0 & (bytes - 1) == 0
    }

    /// The address `bytes` further on, or `None` past the end of the address space.
    pub const fn checked_add(self, bytes: usize) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

impl fmt::Debug for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Virtual page number: an address divided by the page size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Vpn(usize);

impl Vpn {
    /// The page with this number.
    pub const fn new(number: usize) -> Self {
        Self(number)
    }

    /// The page's number.
    pub const fn get(self) -> usize {
        self.0
    }

    /// The page's first byte.
    pub const fn base(self) -> VirtAddr {
        VirtAddr(self.0 << PAGE_SHIFT)
    }

    /// The page `count` pages further on.
    pub const fn forward(self, count: PageCount) -> Self {
        Self(self.0 + count.get())
    }

    /// The page `count` pages back; stops at page 0.
    pub const fn back(self, count: PageCount) -> Self {
        Self(self.0.saturating_sub(count.get()))
    }

    /// Pages from `earlier` to this one; zero when `earlier` is not earlier.
    pub const fn since(self, earlier: Self) -> PageCount {
        PageCount::new(self.0.saturating_sub(earlier.0))
    }

    /// The number of the chunk (2 MiB) that contains this page.
    pub const fn chunk(self) -> usize {
        self.0 >> CHUNK_SHIFT
    }

    /// The first page of the chunk that contains this page.
    pub const fn chunk_base(self) -> Self {
        Self(self.0 & !(CHUNK_PAGES - 1))
    }

    /// Position inside the chunk, `0..512`.
    pub const fn in_chunk(self) -> usize {
        self.0 & (CHUNK_PAGES - 1)
    }
}

impl fmt::Debug for Vpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vpn {:#x}", self.0)
    }
}
