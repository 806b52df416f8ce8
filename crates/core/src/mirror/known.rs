//! Chunks of which a mirror knows that all their pages are in RAM, and in no store's way.
//!
//! What    [`Known`], two bits for each chunk of a mirror's range: one set when a look found all its pages there, one by
//!         one, the other when it found one huge page. They are cleared when the mirror is told of a change of any page of
//!         the chunk.
//! Why     to ask the system about a page costs several times what it takes to fill the entry of a table. What a driver
//!         may keep in his table as long as nobody tells him otherwise, a look may say for as long: the bits are such a
//!         table (rule R5), and kept true in the same way. Only whole chunks: pages that come into being are told to
//!         nobody, and where none is missing none can.
//! Races   a bit is set past the check of its ticket, and cleared, under the mirror's lock, as a driver's entries are. It
//!         is read without: *beside a change of ours*, which is told before the page changes, the look is from before
//!         it; *beside the program's own*, which is under way from before it takes effect until its event was read and
//!         told, under the layout lock held for writing, the look finds it under way or the bit cleared.
//! Behind  *everybody's back* the system may swap a page out, replace it by an equal one, or map it in smaller or larger
//!         pieces: the contents are found at its address all the same, which is what a mirror's entry says. Protections,
//!         of whose changes nobody is told, are asked for at every look. What takes pages and raises no event
//!         (`MADV_GUARD_INSTALL`) takes them from under mirrors' tables as well. Where the system tells of no change of the
//!         program's ([`Host::hears`]), nothing is remembered.
//! Fails   nothing here fails.
//!
//! [`Host::hears`]: crate::host::Host::hears

use alloc::boxed::Box;

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, VaRange, Vpn};

use super::view::{PageView, Segment};
use crate::sync::{AtomicU64, Ordering};

/// The chunks of a range, from its first whole one on.
pub(super) struct Known {
    first: Vpn,
    chunks: usize,
    small: Box<[AtomicU64]>,
    huge: Box<[AtomicU64]>,
}

/// The chunks that lie in `range` as wholes; and all that it has to do with.
fn chunks_in(range: VaRange) -> Option<VaRange> {
    let first = range.first().forward(PageCount::new(CHUNK_PAGES - 1)).chunk_base();
    VaRange::of_pages(first, range.end_page().chunk_base().since(first))
}

fn chunks_around(range: VaRange) -> VaRange {
    let end = range.end_page().forward(PageCount::new(CHUNK_PAGES - 1)).chunk_base();
    VaRange::page(range.first().chunk_base()).grow(end.since(range.first().chunk_base()))
}

/// How many bits from `at` to before `end` are set, or not, before the first that is otherwise.
fn count(bits: &[AtomicU64], at: usize, end: usize, set: bool) -> usize {
    let mut n = at;
    while n < end {
        let word = bits[n / 64].load(Ordering::Acquire) >> (n % 64);
        let same = if set { word.trailing_ones() } else { word.trailing_zeros() } as usize;
        let left = 64 - n % 64;
        n += same.min(left);
        if same < left {
            break;
        }
    }
    n.min(end) - at
}

impl Known {
    /// Nothing is known of the chunks of `range`. If not `remember`, nothing ever is.
    pub(super) fn new(range: VaRange, remember: bool) -> Self {
        let chunks = chunks_in(range).filter(|_| remember);
        let first = chunks.map_or(Vpn::new(0), VaRange::first);
        let chunks = chunks.map_or(0, |chunks| chunks.pages().get() / CHUNK_PAGES);
        let none = || (0..chunks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { first, chunks, small: none(), huge: none() }
    }

    fn bits(&self, order: Geometry) -> &[AtomicU64] {
        if order == Geometry::K4 { &self.small } else { &self.huge }
    }

    /// The numbers of the chunks of `range`, which consists of whole ones, as far as there are bits for them.
    fn numbers(&self, range: VaRange) -> core::ops::Range<usize> {
        let number = |page: Vpn| (page.since(self.first).get() / CHUNK_PAGES).min(self.chunks);
        number(range.first())..number(range.end_page())
    }

    /// The words of bits of these chunks, and which bits of each.
    fn each(&self, order: Geometry, numbers: core::ops::Range<usize>, mut f: impl FnMut(&AtomicU64, u64)) {
        let mut at = numbers.start;
        while at < numbers.end {
            let here = (64 - at % 64).min(numbers.end - at);
            f(&self.bits(order)[at / 64], u64::MAX >> (64 - here) << (at % 64));
            at += here;
        }
    }

    /// The chunks of a segment that are worth to be known, and how they are mapped.
    fn of(&self, segment: &Segment) -> Option<(Geometry, core::ops::Range<usize>)> {
        match segment.view() {
            PageView::Ram { order, write: true } => {
                chunks_in(segment.range()).map(|chunks| (order, self.numbers(chunks)))
            }
            _ => None,
        }
    }

    /// Whether a segment tells of more than is known.
    pub(super) fn is_news(&self, segment: &Segment) -> bool {
        let mut news = false;
        if let Some((order, numbers)) = self.of(segment) {
            self.each(order, numbers, |bits, mask| news |= bits.load(Ordering::Relaxed) & mask != mask);
        }
        news
    }

    /// Remembers what a segment tells. With the mirror's lock held, past the check.
    pub(super) fn note(&self, segment: &Segment) {
        let Some((order, numbers)) = self.of(segment) else { return };
        let other = if order == Geometry::K4 { Geometry::M2 } else { Geometry::K4 };
        self.each(other, numbers.clone(), |bits, mask| _ = bits.fetch_and(!mask, Ordering::Release));
        self.each(order, numbers, |bits, mask| _ = bits.fetch_or(mask, Ordering::Release));
    }

    /// Pages of `range` change. With the mirror's lock held.
    pub(super) fn forget(&self, range: VaRange) {
        for order in [Geometry::K4, Geometry::M2] {
            let numbers = self.numbers(chunks_around(range));
            self.each(order, numbers, |bits, mask| _ = bits.fetch_and(!mask, Ordering::Release));
        }
    }

    /// The pages at the front of `range` that are known, and how they are mapped.
    pub(super) fn run(&self, range: VaRange) -> Option<(VaRange, Geometry)> {
        let numbers = self.numbers(chunks_in(range)?);
        let begins = range.first().in_chunk() == 0 && range.first() >= self.first;
        [Geometry::M2, Geometry::K4].into_iter().filter(|_| begins).find_map(|order| {
            let chunks = count(self.bits(order), numbers.start, numbers.end, true);
            let known = VaRange::of_pages(range.first(), PageCount::new(chunks * CHUNK_PAGES))?;
            Some((known, order))
        })
    }

    /// The pages at the front of `range` that are not known.
    pub(super) fn gap(&self, range: VaRange) -> VaRange {
        let Some(chunks) = chunks_in(range).filter(|chunks| chunks.end_page() > self.first) else {
            return range;
        };
        let numbers = self.numbers(chunks);
        let unknown = [Geometry::M2, Geometry::K4]
            .map(|order| count(self.bits(order), numbers.start, numbers.end, false));
        let unknown = unknown[0].min(unknown[1]);
        if unknown == numbers.len() {
            return range;
        }
        let end = self.first.forward(PageCount::new((numbers.start + unknown) * CHUNK_PAGES));
        range.take(end.since(range.first()))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::mirror::view::Segments;

    fn pages(first: usize, pages: usize) -> VaRange {
        VaRange::of_pages(Vpn::new(first), PageCount::new(pages)).unwrap()
    }

    fn chunks(first: usize, chunks: usize) -> VaRange {
        pages(first * CHUNK_PAGES, chunks * CHUNK_PAGES)
    }

    fn note(known: &Known, range: VaRange, order: Geometry) -> bool {
        let mut room = [Segment::UNUSED; 1];
        let mut seen = Segments::new(&mut room);
        seen.start(range.first());
        assert!(seen.push_to(range.end_page(), PageView::Ram { order, write: true }).is_ok());
        let news = known.is_news(&seen.as_slice()[0]);
        known.note(&seen.as_slice()[0]);
        news
    }

    #[test]
    fn what_is_noted_is_known_until_a_page_of_it_changes() {
        // A mirror that begins and ends inside of chunks.
        let known = Known::new(pages(100, 300 * CHUNK_PAGES), true);
        for order in [Geometry::K4, Geometry::M2] {
            for (first, len) in [(1, 1), (60, 10), (120, 70), (250, 50)] {
                assert!(note(&known, chunks(first, len), order) && !note(&known, chunks(first, len), order));
                let found = known.run(chunks(first, 300));
                assert_eq!(found, Some((chunks(first, len.min(300 - first)), order)));
                let before = chunks(first, 300).first().back(PageCount::new(1000));
                let gap = known.gap(VaRange::page(before).grow(PageCount::new(5000)));
                assert_eq!(gap.end_page(), chunks(first, 1).first());
            }
        }
        assert_eq!(known.run(chunks(60, 3)).unwrap().0, chunks(60, 3), "no more than asked about");
        assert_eq!(known.run(pages(60 * CHUNK_PAGES, CHUNK_PAGES - 1)), None, "no part of a chunk");
        assert_eq!(known.run(pages(60 * CHUNK_PAGES + 1, 2 * CHUNK_PAGES)), None);
        known.forget(pages(64 * CHUNK_PAGES - 1, 2));
        assert_eq!(known.run(chunks(60, 10)).unwrap().0, chunks(60, 3));
        assert_eq!((known.run(chunks(63, 1)), known.run(chunks(64, 1))), (None, None));
        assert_eq!(known.gap(chunks(63, 10)), chunks(63, 2));
        assert_eq!(known.run(chunks(65, 10)).unwrap().0, chunks(65, 5));
        note(&known, chunks(66, 1), Geometry::K4);
        assert_eq!(known.run(chunks(65, 10)), Some((chunks(65, 1), Geometry::M2)));
        assert_eq!(known.run(chunks(66, 10)), Some((chunks(66, 1), Geometry::K4)));
        known.forget(pages(0, 1000 * CHUNK_PAGES));
        assert!((0..300).all(|n| known.run(chunks(n, 1)).is_none()));
        assert_eq!(known.gap(pages(7, 300 * CHUNK_PAGES)), pages(7, 300 * CHUNK_PAGES));
    }

    #[test]
    fn nothing_is_known_of_chunks_that_are_not_all_the_mirror_s() {
        let known = Known::new(pages(100, 2 * CHUNK_PAGES), true);
        known.note(&Segment::UNUSED);
        note(&known, chunks(0, 3), Geometry::M2);
        assert_eq!((known.run(chunks(0, 1)), known.run(chunks(2, 1))), (None, None));
        assert_eq!(known.run(chunks(1, 2)).unwrap().0, chunks(1, 1));
        note(&known, pages(CHUNK_PAGES + 1, CHUNK_PAGES), Geometry::K4);
        assert_eq!(known.run(chunks(1, 1)), Some((chunks(1, 1), Geometry::M2)), "a part tells nothing");
        for known in [Known::new(chunks(0, 4), false), Known::new(pages(1, 600), true)] {
            assert!(!note(&known, chunks(0, 4), Geometry::M2));
            assert_eq!((known.run(chunks(0, 4)), known.gap(chunks(0, 4))), (None, chunks(0, 4)));
            known.forget(chunks(0, 4));
        }
    }
}
