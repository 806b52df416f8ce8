//! Ranges of virtual pages.

use core::fmt;

use crate::{PAGE_SIZE, PageCount, VirtAddr, Vpn};

/// Whole pages of virtual addresses, never empty: `start()` inclusive, `end()` exclusive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VaRange {
    start: Vpn,
    pages: PageCount,
}

/// Why an address and a length do not make a [`VaRange`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RangeError {
    /// The length is zero.
    Empty,
    /// The address or the length is not a multiple of 4096; carries the offending value.
    Misaligned(usize),
    /// The range runs past the end of the address space.
    Overflow(VirtAddr),
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the range is empty"),
            Self::Misaligned(value) => write!(f, "{value:#x} is not a multiple of the page size, 4096"),
            Self::Overflow(start) => write!(f, "the range at {start} runs past the end of the address space"),
        }
    }
}

impl core::error::Error for RangeError {}

impl VaRange {
    /// `len` bytes from `start` on; both must be whole pages.
    pub fn new(start: VirtAddr, len: usize) -> Result<Self, RangeError> {
        if len == 0 {
            return Err(RangeError::Empty);
        }
        for value in [start.get(), len] {
            if value % PAGE_SIZE != 0 {
                return Err(RangeError::Misaligned(value));
            }
        }
        start.checked_add(len).ok_or(RangeError::Overflow(start))?;
        Ok(Self { start: start.page(), pages: PageCount::in_bytes(len) })
    }

    /// The pages that `start..start + len` touches, rounded outwards; `None` if the bytes are none.
    pub fn covering(start: VirtAddr, len: usize) -> Option<Self> {
        let last = start.checked_add(len.checked_sub(1)?)?.page();
        Some(Self { start: start.page(), pages: last.since(start.page()).plus(PageCount::ONE) })
    }

    /// `pages` pages from `start` on; `None` if that is none.
    pub const fn of_pages(start: Vpn, pages: PageCount) -> Option<Self> {
        if pages.is_zero() { None } else { Some(Self { start, pages }) }
    }

    /// The single page `page`.
    pub const fn page(page: Vpn) -> Self {
        Self { start: page, pages: PageCount::ONE }
    }

    /// The first page.
    pub const fn first(self) -> Vpn {
        self.start
    }

    /// The page behind the last one.
    pub const fn end_page(self) -> Vpn {
        self.start.forward(self.pages)
    }

    /// The first byte.
    pub const fn start(self) -> VirtAddr {
        self.start.base()
    }

    /// The first byte behind the range.
    pub const fn end(self) -> VirtAddr {
        self.end_page().base()
    }

    /// Length in pages, at least one.
    pub const fn pages(self) -> PageCount {
        self.pages
    }

    /// Length in bytes.
    pub const fn bytes(self) -> usize {
        self.pages.bytes()
    }

    /// Whether `page` lies inside.
    pub const fn contains(self, page: Vpn) -> bool {
        self.start.get() <= page.get() && page.get() < self.end_page().get()
    }

    /// Whether `other` lies inside entirely.
    pub const fn encloses(self, other: Self) -> bool {
        self.start.get() <= other.start.get() && other.end_page().get() <= self.end_page().get()
    }

    /// The pages common to both, if any.
    pub fn intersect(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end_page().min(other.end_page());
        Self::of_pages(start, end.since(start))
    }

    /// The first `pages` pages (at most all of them; at least one).
    pub fn take(self, pages: PageCount) -> Self {
        Self { start: self.start, pages: self.pages.at_most(pages).max(PageCount::ONE) }
    }

    /// The range of `pages` pages (at least one) with the same start.
    pub fn grow(self, pages: PageCount) -> Self {
        Self { start: self.start, pages: pages.max(PageCount::ONE) }
    }

    /// What is left behind the first `pages` pages.
    pub fn skip(self, pages: PageCount) -> Option<Self> {
        Self::of_pages(self.start.forward(pages), self.pages.minus(pages))
    }

    /// Every page, in order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = Vpn> + ExactSizeIterator {
        (self.start.get()..self.start.get() + self.pages.get()).map(Vpn::new)
    }

    /// The range cut at chunk borders (2 MiB), in order.
    pub fn chunks(self) -> impl Iterator<Item = Self> {
        let mut rest = Some(self);
        core::iter::from_fn(move || {
            let range = rest?;
            let room = crate::CHUNK_PAGES - range.first().in_chunk();
            let head = range.take(PageCount::new(room));
            rest = range.skip(head.pages());
            Some(head)
        })
    }
}

impl fmt::Debug for VaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start().get(), self.end().get())
    }
}

impl fmt::Display for VaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
