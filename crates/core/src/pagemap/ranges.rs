//! The ranges of pfns of one pagemap, one behind the other.
//!
//! What    [`Ranges`]: which of the device's pages a pfn is, which unit that belongs to, and back. The first pages may
//!         be reserved, for descriptors that lie on the device itself: they are no units.
//! Fails   with `None` for a pfn of nobody's.

use alloc::boxed::Box;

use uhmm_addr::{Geometry, PageCount, Pfn, PfnRange};

/// One range, and which of the device's pages its first one is.
#[derive(Clone, Copy, Debug)]
struct Span {
    range: PfnRange,
    first: usize,
}

/// Ranges in the order of the device's pages. Each is a multiple of the geometry, and there is one at least.
#[derive(Clone, Debug)]
pub(super) struct Ranges {
    spans: Box<[Span]>,
    // The first of them once more, where it is found without a look elsewhere.
    foremost: PfnRange,
    geometry: Geometry,
    reserved: PageCount,
    pages: PageCount,
}

impl Ranges {
    pub(super) fn new(
        ranges: impl IntoIterator<Item = PfnRange>,
        geometry: Geometry,
        reserved: PageCount,
    ) -> Self {
        let mut pages = PageCount::ZERO;
        let spans = ranges.into_iter().map(|range| {
            let first = pages.get();
            pages = pages.plus(range.pages);
            Span { range, first }
        });
        let spans: Box<[Span]> = spans.collect();
        Self { foremost: spans[0].range, spans, geometry, reserved, pages }
    }

    pub(super) const fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(super) const fn reserved(&self) -> PageCount {
        self.reserved
    }

    /// Of all ranges, with those that are reserved.
    pub(super) const fn pages(&self) -> PageCount {
        self.pages
    }

    pub(super) const fn foremost(&self) -> PfnRange {
        self.foremost
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = PfnRange> {
        self.spans.iter().map(|span| span.range)
    }

    /// The device's number of a pfn.
    pub(super) fn page_of(&self, pfn: Pfn) -> Option<usize> {
        if self.foremost.contains(pfn) {
            return Some(pfn.since(self.foremost.start).get());
        }
        let span = self.spans[1..].iter().find(|span| span.range.contains(pfn))?;
        Some(span.first + pfn.since(span.range.start).get())
    }

    fn span_at(&self, page: usize) -> &Span {
        let behind = self.spans.partition_point(|span| span.first <= page);
        &self.spans[behind - 1]
    }

    /// The pfn of a page of the device.
    pub(super) fn pfn_of(&self, page: usize) -> Pfn {
        let span = self.span_at(page);
        span.range.start.forward(PageCount::new(page - span.first))
    }

    /// Compound pages that can be used.
    pub(super) const fn units(&self) -> usize {
        self.pages.minus(self.reserved).get() >> self.geometry.order()
    }

    /// The unit of a page of the device; `None` if it is reserved.
    pub(super) const fn unit_of_page(&self, page: usize) -> Option<usize> {
        match page.checked_sub(self.reserved.get()) {
            Some(page) => Some(page >> self.geometry.order()),
            None => None,
        }
    }

    /// The unit of a pfn; `None` if it is reserved, or another pagemap's.
    pub(super) fn unit_of(&self, pfn: Pfn) -> Option<usize> {
        self.unit_of_page(self.page_of(pfn)?)
    }

    /// First page of a unit: the head.
    pub(super) const fn head(&self, unit: usize) -> usize {
        (unit << self.geometry.order()) + self.reserved.get()
    }

    /// The pfns of consecutive units that do not reach over a [`border`](Self::border).
    pub(super) fn pfns(&self, unit: usize, units: usize) -> PfnRange {
        PfnRange::new(self.pfn_of(self.head(unit)), PageCount::new(units << self.geometry.order()))
    }

    /// The unit at which pfns stop following those of `unit`: that of the next range, or the one behind the last.
    pub(super) fn border(&self, unit: usize) -> usize {
        if self.spans.len() == 1 {
            return self.units();
        }
        let span = self.span_at(self.head(unit));
        (span.first + span.range.pages.get() - self.reserved.get()) >> self.geometry.order()
    }

    /// The units that `pages` touch. `None` if they are not all of one range and usable.
    pub(super) fn units_of(&self, pages: PfnRange) -> Option<(usize, usize)> {
        if pages.pages.is_zero() {
            return Some((0, 0));
        }
        let first = self.page_of(pages.start)?;
        let last = first.checked_add(pages.pages.get() - 1)?;
        let span = if self.foremost.contains(pages.start) { &self.spans[0] } else { self.span_at(first) };
        if last >= span.first + span.range.pages.get() {
            return None;
        }
        let (first, last) = (self.unit_of_page(first)?, self.unit_of_page(last)?);
        Some((first, last + 1 - first))
    }
}
