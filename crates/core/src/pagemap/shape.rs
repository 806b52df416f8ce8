//! Where the words of a pagemap's descriptors lie in memory.
//!
//! What    [`DescriptorMemory`], memory for them that the caller provides, and how much of it is needed; the order of
//!         the words: shards, groups, counts, and what is the owners' own.
//! Why     processes that share descriptors, and whoever keeps them on the device, must agree about it.
//! Fails   nothing here fails.

use core::ptr::NonNull;

use uhmm_addr::{CHUNK_PAGES, PageCount};

/// Compound pages in a group: the step in which a device gets its space back.
pub const GROUP_PAGES: usize = if cfg!(loom) { 2 } else { CHUNK_PAGES };

/// Shards of the count of live units.
pub(super) const SHARDS: usize = if cfg!(loom) { 2 } else { 16 };
/// Words from one shard to the next: a cache line.
pub(super) const SHARD_WORDS: usize = if cfg!(loom) { 1 } else { 16 };
/// Words in a block of counts, inside which neighbours are kept apart.
pub(super) const BLOCK: usize = if cfg!(loom) { 2 } else { 512 };
/// Cache lines in such a block.
pub(super) const LINES: usize = if cfg!(loom) { 2 } else { 32 };

/// Zeroed memory for the descriptors of a pagemap.
#[derive(Clone, Copy, Debug)]
pub struct DescriptorMemory {
    pub(super) words: NonNull<u32>,
}

impl DescriptorMemory {
    /// Memory that starts at `words`.
    pub const fn new(words: NonNull<u32>) -> Self {
        Self { words }
    }

    /// Bytes needed for a device of `pages` pages of 4 KiB. Only what is used will be touched.
    pub const fn bytes_for(pages: PageCount) -> usize {
        Shape { units: pages.get(), data: false }.bytes()
    }
}

/// Where what lies, in words of 32 bits: shards, groups, counts, data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) units: usize,
    pub(super) data: bool,
}

impl Shape {
    pub(super) const fn groups(self) -> usize {
        self.units.div_ceil(GROUP_PAGES)
    }

    pub(super) const fn counts_at(self) -> usize {
        SHARDS * SHARD_WORDS + self.groups().next_multiple_of(2)
    }

    pub(super) const fn data_at(self) -> usize {
        self.counts_at() + self.units.next_multiple_of(BLOCK)
    }

    pub(super) const fn bytes(self) -> usize {
        let data = if self.data { self.units * size_of::<u64>() } else { 0 };
        self.data_at() * size_of::<u32>() + data
    }
}
