//! Page frame numbers: pages of devices, in one machine-wide space.

use core::fmt;

use crate::PageCount;

/// Number of a physical page, a device's or an arena's, in the space that the resource tree keeps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Pfn(u64);

impl Pfn {
    /// Bits that a pfn may use: 40, which is 4 PiB.
    pub const BITS: u32 = 40;

    /// The page with this number, which must fit [`Pfn::BITS`].
    pub const fn new(number: u64) -> Self {
        debug_assert!(number >> Self::BITS == 0, "a pfn has 40 bits");
        Self(number)
    }

    /// The page's number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The page `count` pages further on; past the last number there is, that one, which is no page's.
    pub const fn forward(self, count: PageCount) -> Self {
        Self(self.0.saturating_add(count.get() as u64))
    }

    /// Pages from `earlier` to this one; zero when `earlier` is not earlier.
    pub const fn since(self, earlier: Self) -> PageCount {
        PageCount::new(self.0.saturating_sub(earlier.0) as usize)
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn {:#x}", self.0)
    }
}

/// Consecutive pfns, `start..start + pages`. May be empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PfnRange {
    /// First pfn.
    pub start: Pfn,
    /// Length.
    pub pages: PageCount,
}

impl PfnRange {
    /// `pages` pages from `start` on.
    pub const fn new(start: Pfn, pages: PageCount) -> Self {
        Self { start, pages }
    }

    /// The first pfn behind the range.
    pub const fn end(self) -> Pfn {
        self.start.forward(self.pages)
    }

    /// Whether `pfn` lies inside.
    pub const fn contains(self, pfn: Pfn) -> bool {
        self.start.get() <= pfn.get() && pfn.get() < self.end().get()
    }

    /// Whether `other` lies inside entirely.
    pub const fn encloses(self, other: Self) -> bool {
        self.start.get() <= other.start.get() && other.end().get() <= self.end().get()
    }

    /// Whether some pfn lies in both.
    pub const fn overlaps(self, other: Self) -> bool {
        !self.pages.is_zero()
            && !other.pages.is_zero()
            && self.start.get() < other.end().get()
            && other.start.get() < self.end().get()
    }
}
