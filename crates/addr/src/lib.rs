//! The units of memory management, as types that cannot be mixed.
//!
//! What   [`VirtAddr`], [`Vpn`], [`Pfn`], [`DmaAddr`], [`PageCount`], [`ByteSize`], [`Geometry`], [`VaRange`].
//! Why    a page index, a byte offset and an address are all "a number"; adding the wrong two of them
//!        is the classic bug of every pager. None of these types has an arithmetic operator: the named
//!        methods say which unit goes in and which comes out.
//! Knows  no operating system and no device.
#![forbid(unsafe_code)]

mod count;
mod dma;
mod geometry;
mod pfn;
mod range;
mod size;
#[cfg(test)]
mod tests;
mod virt;

pub use count::PageCount;
pub use dma::DmaAddr;
pub use geometry::Geometry;
pub use pfn::{Pfn, PfnRange};
pub use range::{RangeError, VaRange};
pub use size::{ByteSize, ParseSizeError};
pub use virt::{VirtAddr, Vpn};

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page, the unit of everything here.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// log2 of the pages in a chunk.
pub const CHUNK_SHIFT: u32 = 9;
/// Pages in a *chunk*: 2 MiB of virtual addresses, the reach of one huge mapping.
pub const CHUNK_PAGES: usize = 1 << CHUNK_SHIFT;
