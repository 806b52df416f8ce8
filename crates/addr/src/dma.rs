//! Addresses by which a device reaches memory.

use core::fmt;

use crate::PageCount;

/// A byte address as a device puts it on its bus (the kernel's `dma_addr_t`), which an IOMMU translates. It is no
/// address of any process, even where the numbers are the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct DmaAddr(u64);

impl DmaAddr {
    /// The address with this numeric value, in bytes.
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The numeric value, in bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address `bytes` further on.
    pub const fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }

    /// The address `pages` pages further on.
    pub const fn forward(self, pages: PageCount) -> Self {
        self.offset(pages.bytes())
    }
}

impl fmt::Debug for DmaAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dma {:#x}", self.0)
    }
}
