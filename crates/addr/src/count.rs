//! Counts of pages.

use core::fmt;

use crate::{ByteSize, PAGE_SHIFT};

/// A number of 4 KiB pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct PageCount(usize);

impl PageCount {
    /// No page.
    pub const ZERO: Self = Self(0);
    /// One page.
    pub const ONE: Self = Self(1);

    /// This many pages.
    pub const fn new(pages: usize) -> Self {
        Self(pages)
    }

    /// Whole pages in `bytes` bytes, rounded down.
    pub const fn in_bytes(bytes: usize) -> Self {
        Self(bytes >> PAGE_SHIFT)
    }

    /// The number of pages.
    pub const fn get(self) -> usize {
        self.0
    }

    /// The same amount in bytes.
    pub const fn bytes(self) -> usize {
        self.0 << PAGE_SHIFT
    }

    /// The same amount as a size.
    pub const fn size(self) -> ByteSize {
        ByteSize::new((self.0 as u64) << PAGE_SHIFT)
    }

    /// Whether it is none.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Both amounts together.
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// What is left after taking `other` away; zero when that is more.
    pub const fn minus(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// The smaller of the two.
    pub const fn at_most(self, other: Self) -> Self {
        if self.0 < other.0 { self } else { other }
    }
}

impl fmt::Debug for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages", self.0)
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
