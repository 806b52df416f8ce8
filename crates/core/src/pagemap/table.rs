//! Which pagemap a pfn belongs to: a table of three levels, read without a lock.
//!
//! What    [`PfnTable`]: an entry for every 2 MiB of pfns, in leaves of 2 GiB and nodes of 2 TiB; an entry higher up
//!         stands for all below it. So a look-up is one to three loads, and a range of any size is a few thousand
//!         stores at most (the kernel's `pgmap_array`, an xarray).
//! Owns    its nodes, which stay until it is dropped. What the entries point to is the registry's.
//! Locks   changes are made by one thread at a time; look-ups need none.
//! Fails   nothing here fails.

use alloc::boxed::Box;
use core::ptr::NonNull;

use uhmm_addr::{CHUNK_SHIFT, Pfn, PfnRange};

use super::Pagemap;
use crate::sync::{AtomicUsize, Ordering, zeroed};

/// log2 of the entries in a node below the root.
const BITS: u32 = if cfg!(loom) { 1 } else { 10 };
/// log2 of the entries in the root.
const ROOT_BITS: u32 = if cfg!(loom) { 1 } else { Pfn::BITS - CHUNK_SHIFT - 2 * BITS };
/// Levels: the root is 2.
const TOP: u32 = 2;

/// In an entry: it is a pagemap, not a node.
const LEAF: usize = 1;

type Node = Box<[AtomicUsize]>;

/// The table.
pub(super) struct PfnTable {
    root: Node,
}

fn node(bits: u32) -> Node {
    // SAFETY: all bytes zero are an atomic integer.
    unsafe { zeroed(1 << bits) }
}

/// log2 of the pages for which an entry of this level stands.
const fn shift(level: u32) -> u32 {
    CHUNK_SHIFT + level * BITS
}

fn index(pfn: u64, level: u32) -> usize {
    let bits = if level == TOP { ROOT_BITS } else { BITS };
    (pfn >> shift(level)) as usize & ((1 << bits) - 1)
}

/// What an entry holds.
enum Entry {
    Nothing,
    Map(NonNull<Pagemap>),
    Node(NonNull<[AtomicUsize]>),
}

impl PfnTable {
    pub(super) fn new() -> Self {
        Self { root: node(ROOT_BITS) }
    }

    fn entry(entry: &AtomicUsize) -> Entry {
        let word = entry.load(Ordering::Acquire);
        if word & LEAF != 0 {
            let map = core::ptr::with_exposed_provenance_mut(word & !LEAF);
            return NonNull::new(map).map_or(Entry::Nothing, Entry::Map);
        }
        let node = NonNull::new(core::ptr::with_exposed_provenance_mut(word));
        node.map_or(Entry::Nothing, |node| Entry::Node(NonNull::slice_from_raw_parts(node, 1 << BITS)))
    }

    /// The pagemap that has `pfn`, or had it a moment ago.
    pub(super) fn get(&self, pfn: Pfn) -> Option<NonNull<Pagemap>> {
        let mut node: &[AtomicUsize] = &self.root;
        for level in (0..=TOP).rev() {
            match Self::entry(&node[index(pfn.get(), level)]) {
                Entry::Nothing => return None,
                Entry::Map(map) => return Some(map),
                // SAFETY: nodes stay as long as the table.
                Entry::Node(below) => node = unsafe { below.as_ref() },
            }
        }
        None
    }

    /// Lets every entry of `range`, of which there is some in each 2 MiB, point to `map`, or to nothing.
    pub(super) fn set(&self, range: PfnRange, map: Option<NonNull<Pagemap>>) {
        let word = map.map_or(0, |map| map.as_ptr().expose_provenance() | LEAF);
        // Entries stand for whole chunks; no two pagemaps share one.
        let mask = (1 << CHUNK_SHIFT) - 1;
        Self::fill(&self.root, TOP, range.start.get() & !mask, (range.end().get() + mask) & !mask, word);
    }

    fn fill(node: &[AtomicUsize], level: u32, mut start: u64, end: u64, word: usize) {
        let size = 1_u64 << shift(level);
        while start < end {
            let entry = &node[index(start, level)];
            let next = (start | (size - 1)) + 1;
            let whole = start & (size - 1) == 0 && next <= end;
            let is_node = matches!(Self::entry(entry), Entry::Node(_));
            if whole && !is_node {
                entry.store(word, Ordering::Release);
            } else {
                Self::fill(Self::below(entry), level - 1, start, next.min(end), word);
            }
            start = next;
        }
    }

    /// The node below an entry, which is made if there is none.
    fn below(entry: &AtomicUsize) -> &[AtomicUsize] {
        let found = match Self::entry(entry) {
            Entry::Node(node) => node,
            Entry::Map(_) => unreachable!("a range is set and cleared whole, and shares no entry"),
            Entry::Nothing => {
                let made = NonNull::from(Box::leak(node(BITS)));
                entry.store(made.cast::<AtomicUsize>().as_ptr().expose_provenance(), Ordering::Release);
                made
            }
        };
        // SAFETY: nodes stay as long as the table, and so does the entry.
        unsafe { found.as_ref() }
    }

    fn free(node: &[AtomicUsize]) {
        for entry in node {
            if let Entry::Node(below) = Self::entry(entry) {
                // SAFETY: made by `below`, from a box of this length; nobody else reaches it any more.
                let below = unsafe { Box::from_raw(below.as_ptr()) };
                Self::free(&below);
            }
        }
    }
}

impl Drop for PfnTable {
    fn drop(&mut self) {
        Self::free(&self.root);
    }
}
