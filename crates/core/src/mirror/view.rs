//! What is known of a page, as a driver's table takes it over.
//!
//! What    [`PageView`], one page; [`Segment`], consecutive pages that are alike; [`Pages`], whatever lies in a range,
//!         segment by segment.
//! Why     the kernel overlays request, result, order and page number in one word (`hmm_pfns`); here what cannot be
//!         together cannot be said. And a range of a gigabyte that is all in RAM is one fact, not 262,144: a driver
//!         with a page table takes each page from it as it fills the entry.
//! Fails   nothing here fails.

use uhmm_addr::{Geometry, PAGE_SIZE, PageCount, Pfn, VaRange, VirtAddr, Vpn};

use crate::notifier::Owner;

/// Why a page cannot be had, whatever is asked (the kernel's `HMM_PFN_ERROR`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unusable {
    /// Nothing that may be read is mapped there, or not the mapping that was watched.
    Unmapped,
    /// A device has lost the contents.
    Poisoned,
}

/// What is known of one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PageView {
    /// Nothing there now: never touched, given up, on its way, or on a device of somebody else. To ask for it would
    /// bring it.
    #[default]
    Absent,
    /// In RAM, reached at its own address: its frame's number is not to be had in user space, and is no secret that a
    /// device must know that reaches memory by address.
    Ram {
        /// A store needs nothing of the space. A page that is shared since a fork is replaced by the system itself.
        write: bool,
        /// 2 MiB where one huge page maps the whole chunk, and all of the chunk was asked about; otherwise 4 KiB.
        order: Geometry,
    },
    /// The page of zeros that everybody shares, reached at its own address: to be read only.
    Zeros,
    /// On the caller's own device.
    Device {
        /// Which page of it.
        pfn: Pfn,
        /// The mapping may be written.
        write: bool,
    },
    /// The caller's alone, which nobody else can touch without its being told
    /// ([`Mirror::exclusive`](super::Mirror::exclusive)).
    Exclusive {
        /// Where its frame lies: memory of this process, good for loads, stores and atomic operations with the
        /// mirror's lock held.
        at: VirtAddr,
    },
    /// On a coherent device, mapped in place: reached at its own address, by the program and by every device. A driver
    /// knows its own pages by the owner, and may go past the page table for them.
    Coherent {
        /// Whose page it is.
        owner: Owner,
        /// Which one.
        pfn: Pfn,
        /// A store needs nothing of the space.
        write: bool,
    },
    /// Never to be had.
    Error(Unusable),
}

impl PageView {
    /// Whether the page can be read where it is (`HMM_PFN_VALID`).
    pub const fn is_valid(self) -> bool {
        match self {
            Self::Ram { .. } | Self::Zeros | Self::Device { .. } => true,
            Self::Coherent { .. } | Self::Exclusive { .. } => true,
            Self::Absent | Self::Error(_) => false,
        }
    }

    /// Whether it can be written where it is (`HMM_PFN_WRITE`).
    pub const fn may_write(self) -> bool {
        match self {
            Self::Ram { write, .. } | Self::Device { write, .. } | Self::Coherent { write, .. } => write,
            Self::Exclusive { .. } => true,
            Self::Zeros | Self::Absent | Self::Error(_) => false,
        }
    }

    /// Whether it is the caller's alone.
    pub const fn is_exclusive(self) -> bool {
        matches!(self, Self::Exclusive { .. })
    }

    /// The size of the mapping that the page is part of.
    pub const fn order(self) -> Geometry {
        match self {
            Self::Ram { order, .. } => order,
            _ => Geometry::K4,
        }
    }

    /// Why it cannot be had.
    pub const fn error(self) -> Option<Unusable> {
        match self {
            Self::Error(why) => Some(why),
            _ => None,
        }
    }
}

impl PageView {
    /// The view of a page that lies `pages` further on in the same segment.
    #[must_use]
    const fn forward(self, pages: PageCount) -> Self {
        match self {
            Self::Device { pfn, write } => Self::Device { pfn: pfn.forward(pages), write },
            Self::Coherent { owner, pfn, write } => Self::Coherent { owner, pfn: pfn.forward(pages), write },
            Self::Exclusive { at } => {
                Self::Exclusive { at: VirtAddr::new(at.get() + pages.get() * PAGE_SIZE) }
            }
            Self::Absent | Self::Ram { .. } | Self::Zeros | Self::Error(_) => self,
        }
    }
}

/// Consecutive pages that are alike: each is as the one before it, and where they lie on a device, or in frames of a
/// device's own, they follow each other there as well.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    range: VaRange,
    view: PageView,
}

impl Segment {
    /// A value to fill an array with, as room for segments.
    pub const UNUSED: Self = Self { range: VaRange::page(Vpn::new(0)), view: PageView::Absent };

    /// The pages.
    pub const fn range(&self) -> VaRange {
        self.range
    }

    /// What is known of the first one.
    pub const fn view(&self) -> PageView {
        self.view
    }

    /// Page by page, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Vpn, PageView)> + use<> {
        let Self { range, view } = *self;
        range.iter().map(move |page| (page, view.forward(page.since(range.first()))))
    }

    /// Mapping by mapping, in order: a huge page once, as all its pages, others one by one.
    pub fn mappings(&self) -> impl Iterator<Item = (VaRange, PageView)> + use<> {
        let Self { range, view } = *self;
        let size = view.order().pages();
        let mut rest = Some(range);
        core::iter::from_fn(move || {
            let here = rest?.take(size);
            rest = rest?.skip(here.pages());
            Some((here, view.forward(here.first().since(range.first()))))
        })
    }

    /// Puts the views of its pages into their places among those of pages from `first` on.
    ///
    /// # Panics
    /// If there is no place for one.
    pub fn copy_to(&self, first: Vpn, views: &mut [PageView]) {
        let at = self.range.first().since(first).get();
        let places = &mut views[at..at + self.range.pages().get()];
        match self.view {
            PageView::Device { .. } | PageView::Coherent { .. } | PageView::Exclusive { .. } => {
                places.iter_mut().zip(self.iter()).for_each(|(place, (_, view))| *place = view);
            }
            view => places.fill(view),
        }
    }

    /// The part that lies in `range`.
    pub(super) fn part(&self, range: VaRange) -> Option<Self> {
        let part = self.range.intersect(range)?;
        let view = self.view.forward(part.first().since(self.range.first()));
        Some(Self { range: part, view })
    }

    /// The same, of a look that may be over.
    pub(super) const fn in_doubt(self) -> Self {
        if self.view.is_valid() { Self { view: PageView::Absent, ..self } } else { self }
    }
}

/// There is no room for another segment.
pub(super) struct Full;

/// Segments of consecutive pages from one on, in the room that there is.
#[derive(Debug)]
pub(super) struct Segments<'a> {
    first: Vpn,
    room: &'a mut [Segment],
    len: usize,
}

impl<'a> Segments<'a> {
    /// None yet.
    pub(super) fn new(room: &'a mut [Segment]) -> Self {
        Self { first: Vpn::new(0), room, len: 0 }
    }

    /// None any more; the next one begins at `first`.
    pub(super) const fn start(&mut self, first: Vpn) {
        (self.first, self.len) = (first, 0);
    }

    /// The page behind the last one.
    pub(super) fn end(&self) -> Vpn {
        self.as_slice().last().map_or(self.first, |last| last.range.end_page())
    }

    pub(super) fn as_slice(&self) -> &[Segment] {
        &self.room[..self.len]
    }

    /// Adds the pages from where it ends to before `end`, if there are any.
    pub(super) fn push_to(&mut self, end: Vpn, view: PageView) -> Result<(), Full> {
        let from = self.end();
        let Some(range) = VaRange::of_pages(from, end.since(from)) else { return Ok(()) };
        if let Some(last) = self.room[..self.len].last_mut()
            && last.view.forward(last.range.pages()) == view
        {
            last.range = last.range.grow(last.range.pages().plus(range.pages()));
            return Ok(());
        }
        *self.room.get_mut(self.len).ok_or(Full)? = Segment { range, view };
        self.len += 1;
        Ok(())
    }

    /// What was seen may be over: what is there may not be any more.
    pub(super) fn doubt(&mut self) {
        self.room[..self.len].iter_mut().for_each(|segment| *segment = segment.in_doubt());
    }

    /// Whether the last pages are huge ones.
    pub(super) fn end_huge(&self) -> bool {
        self.as_slice().last().is_some_and(|last| last.view.order() == Geometry::M2)
    }

    /// Forgets the pages from `end` on.
    pub(super) fn truncate(&mut self, end: Vpn) {
        let keep = self.as_slice().iter().take_while(|segment| segment.range.first() < end).count();
        self.len = keep;
        if let Some(last) = self.room[..keep].last_mut() {
            last.range = last.range.take(end.since(last.range.first()));
        }
    }

    /// The pages and what is known of each.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn pages(&self) -> Pages<'_> {
        Pages::new(self.as_slice())
    }
}

/// A range of pages and what is known of each.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    segments: &'a [Segment],
}

impl<'a> Pages<'a> {
    /// Of segments that follow each other.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn new(segments: &'a [Segment]) -> Self {
        assert!(!segments.is_empty(), "no look tells of no page");
        debug_assert!(segments.windows(2).all(|two| two[0].range.end_page() == two[1].range.first()));
        Self { segments }
    }

    /// Which pages.
    pub fn range(&self) -> VaRange {
        let (first, last) = (self.segments[0].range, self.segments[self.segments.len() - 1].range);
        first.grow(last.end_page().since(first.first()))
    }

    /// What is known of them, in order: as few segments as there can be.
    pub const fn segments(&self) -> &'a [Segment] {
        self.segments
    }

    /// Page by page, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Vpn, PageView)> + use<'a> {
        self.segments.iter().flat_map(Segment::iter)
    }

    /// What is known of each page, in order.
    pub fn views(&self) -> impl Iterator<Item = PageView> + use<'a> {
        self.iter().map(|(_, view)| view)
    }

    /// Mapping by mapping, in order: a huge page once, as all its pages, others one by one.
    pub fn mappings(&self) -> impl Iterator<Item = (VaRange, PageView)> + use<'a> {
        self.segments.iter().flat_map(Segment::mappings)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use uhmm_addr::CHUNK_PAGES;

    const RAM: PageView = PageView::Ram { write: true, order: Geometry::K4 };

    const fn on_device(pfn: u64) -> PageView {
        PageView::Device { pfn: Pfn::new(pfn), write: true }
    }

    /// Segments of pages that are pushed one by one.
    fn segments<'a>(room: &'a mut [Segment], views: &[PageView]) -> Segments<'a> {
        let mut all = Segments::new(room);
        all.start(Vpn::new(100));
        for view in views {
            let end = all.end().forward(PageCount::ONE);
            if all.push_to(end, *view).is_err() {
                break;
            }
        }
        all
    }

    #[test]
    fn neighbours_that_are_alike_are_one_segment() {
        let views = [RAM, RAM, on_device(7), on_device(8), on_device(10), RAM, PageView::Absent];
        let mut room = [Segment::UNUSED; 8];
        let all = segments(&mut room, &views);
        let lengths: Vec<usize> =
            all.as_slice().iter().map(|segment| segment.range().pages().get()).collect();
        assert_eq!(lengths, [2, 2, 1, 1, 1]);
        assert_eq!(all.pages().views().collect::<Vec<_>>(), views);
        assert!(all.pages().iter().map(|(page, _)| page).eq((100..107).map(Vpn::new)));
        assert_eq!(all.pages().range().first(), Vpn::new(100));
    }

    #[test]
    fn without_room_the_pages_before_are_told() {
        let mut room = [Segment::UNUSED; 2];
        let all = segments(&mut room, &[RAM, on_device(1), on_device(2), RAM, RAM]);
        assert_eq!((all.end(), all.as_slice().len()), (Vpn::new(103), 2));
    }

    #[test]
    fn a_segment_is_cut_where_it_is_asked_to_end() {
        let mut room = [Segment::UNUSED; 4];
        let mut all = segments(&mut room, &[RAM, on_device(1), on_device(2), RAM]);
        all.truncate(Vpn::new(102));
        assert_eq!(all.pages().views().collect::<Vec<_>>(), [RAM, on_device(1)]);
        let part = all.as_slice()[1].part(VaRange::page(Vpn::new(101)));
        assert_eq!(part.map(|part| part.view()), Some(on_device(1)));
        all.truncate(Vpn::new(101));
        assert_eq!((all.end(), all.as_slice().len()), (Vpn::new(101), 1));
    }

    #[test]
    fn a_huge_page_is_one_mapping() {
        let huge = PageView::Ram { write: true, order: Geometry::M2 };
        let range = VaRange::page(Vpn::new(2 * CHUNK_PAGES)).grow(PageCount::new(3 * CHUNK_PAGES));
        let segment = Segment { range, view: huge };
        let mappings: Vec<VaRange> = segment.mappings().map(|(range, _)| range).collect();
        assert_eq!(mappings, range.chunks().collect::<Vec<_>>());
        let small = Segment { range: range.take(PageCount::new(3)), view: RAM };
        assert_eq!(small.mappings().count(), 3);
    }
}
