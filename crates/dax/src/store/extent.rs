//! Runs of pages of a store's data.
//!
//! What     [`Extent`], consecutive pages counted from the data's first; and what can be done with several.
//! Why      a namespace may be made of several runs, and a list of bad pages is one of runs.
//! Fails    nothing here.

use core::fmt;

use uhmm_addr::{Geometry, PageCount};

/// Consecutive 4 KiB pages of a store's data, never none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// The first page, counted from the data's first.
    pub start: u64,
    /// Length in pages, at least 1.
    pub len: u64,
}

impl Extent {
    /// `start..end`; `None` if that is no page.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        (start < end).then(|| Self { start, len: end - start })
    }

    /// The page behind the last.
    pub const fn end(self) -> u64 {
        self.start + self.len
    }

    /// Length.
    pub const fn pages(self) -> PageCount {
        PageCount::new(self.len as usize)
    }

    /// The first byte, counted from the data's first.
    pub const fn offset(self) -> u64 {
        self.start * uhmm_addr::PAGE_SIZE as u64
    }

    /// Length in bytes.
    pub const fn bytes(self) -> u64 {
        self.len * uhmm_addr::PAGE_SIZE as u64
    }

    /// Whether `page` lies inside.
    pub const fn contains(self, page: u64) -> bool {
        self.start <= page && page < self.end()
    }

    /// The pages common to both.
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end().min(other.end()))
    }

    /// The largest part that begins and ends at multiples of `align`.
    pub fn inside(self, align: Geometry) -> Option<Self> {
        let unit = align.pages().get() as u64;
        Self::between(self.start.next_multiple_of(unit), self.end() / unit * unit)
    }

    /// The smallest run of whole compound pages of `align` around it.
    pub fn around(self, align: Geometry) -> Self {
        let unit = align.pages().get() as u64;
        let start = self.start / unit * unit;
        Self { start, len: self.end().next_multiple_of(unit) - start }
    }

    /// Whether it begins and ends at multiples of `align`.
    pub const fn is_aligned(self, align: Geometry) -> bool {
        let unit = align.pages().get() as u64;
        self.start.is_multiple_of(unit) && self.len.is_multiple_of(unit)
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end())
    }
}

/// What `taken`, in any order and disjoint, leaves of `whole`, in order.
pub(crate) fn gaps(whole: Extent, mut taken: Vec<Extent>) -> Vec<Extent> {
    taken.sort_unstable();
    let mut at = whole.start;
    let mut gaps = Vec::new();
    for extent in taken {
        gaps.extend(Extent::between(at, extent.start));
        at = at.max(extent.end());
    }
    gaps.extend(Extent::between(at, whole.end()));
    gaps
}
