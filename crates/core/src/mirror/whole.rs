//! Chunks of which a mirror knows that they are one huge page each, there, and in no store's way.
//!
//! What    [`Whole`], a bit for each chunk of a mirror's range, set when a look found the chunk so, cleared when the mirror
//!         is told of a change of any page of it.
//! Why     to ask the system about a huge page costs as much as to fill ten entries of a table, and to read the 512 words
//!         of its pages more. What a driver may keep in his table as long as nobody tells him otherwise, a look may say
//!         for as long: the bits are such a table (rule R5), and kept true in the same way.
//! Races   a bit is set past the check of its ticket, and cleared, under the mirror's lock, as a driver's entries are. It
//!         is read without: *beside a change of ours*, which is told before the page changes, the look is from before
//!         it; *beside the program's own*, which is under way from before it takes effect until its event was read and
//!         told, under the layout lock held for writing, the look finds it under way or the bit cleared.
//!         *Behind everybody's back* the system may swap the page out, or map it in small pieces: its contents are found
//!         at its address all the same. What nobody is told of at all (`MADV_GUARD_INSTALL`), mirrors are not either.
//!         Where the system tells of no change of the program's ([`Host::hears`]), nothing is remembered.
//! Fails   nothing here fails.
//!
//! [`Host::hears`]: crate::host::Host::hears

use alloc::boxed::Box;

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, VaRange, Vpn};

use super::view::{PageView, Segment};
use crate::sync::{AtomicU64, Ordering};

/// The chunks of a range, from its first whole one on.
pub(super) struct Whole {
    first: Vpn,
    chunks: usize,
    bits: Box<[AtomicU64]>,
}

/// The chunks that lie in `range` as wholes: from which page on, and how many.
fn chunks_in(range: VaRange) -> (Vpn, usize) {
    let first = range.first().forward(PageCount::new(CHUNK_PAGES - 1)).chunk_base();
    (first, range.end_page().chunk_base().since(first).get() / CHUNK_PAGES)
}

/// Whether it tells of huge pages that may be written: protected ones will be in pieces soon.
const fn is_whole(segment: &Segment) -> bool {
    matches!(segment.view(), PageView::Ram { order: Geometry::M2, write: true })
}

impl Whole {
    /// Nothing is known of the chunks of `range`. If not `remember`, nothing ever is.
    pub(super) fn new(range: VaRange, remember: bool) -> Self {
        let (first, chunks) = chunks_in(range);
        let chunks = if remember { chunks } else { 0 };
        let bits = (0..chunks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { first, chunks, bits }
    }

    /// The bits of the chunks that `range` has to do with, word by word.
    fn each(&self, range: VaRange, whole: bool, mut f: impl FnMut(&AtomicU64, u64)) {
        let range = if whole {
            let (first, chunks) = chunks_in(range);
            VaRange::of_pages(first, PageCount::new(chunks * CHUNK_PAGES))
        } else {
            Some(range)
        };
        let all = VaRange::of_pages(self.first, PageCount::new(self.chunks * CHUNK_PAGES));
        let Some(part) = range.zip(all).and_then(|(range, all)| range.intersect(all)) else { return };
        let mut chunk = part.first().chunk() - self.first.chunk();
        let end = part.end_page().back(PageCount::ONE).chunk() - self.first.chunk() + 1;
        while chunk < end {
            let (from, to) = (chunk % 64, 64.min(chunk % 64 + end - chunk));
            let mask = u64::MAX >> (64 - (to - from)) << from;
            f(&self.bits[chunk / 64], mask);
            chunk += to - from;
        }
    }

    /// Whether a segment tells of huge pages that are not known.
    pub(super) fn is_news(&self, segment: &Segment) -> bool {
        let mut news = false;
        if is_whole(segment) {
            self.each(segment.range(), true, |bits, mask| {
                news |= bits.load(Ordering::Relaxed) & mask != mask;
            });
        }
        news
    }

    /// Remembers the chunks of a segment that are told as huge. With the mirror's lock held, past the check.
    pub(super) fn note(&self, segment: &Segment) {
        if is_whole(segment) {
            self.each(segment.range(), true, |bits, mask| {
                bits.fetch_or(mask, Ordering::Release);
            });
        }
    }

    /// Pages of `range` change. With the mirror's lock held.
    pub(super) fn forget(&self, range: VaRange) {
        self.each(range, false, |bits, mask| {
            bits.fetch_and(!mask, Ordering::Release);
        });
    }

    /// The pages at the front of `range` that are known, if there are any.
    pub(super) fn run(&self, range: VaRange) -> Option<VaRange> {
        if range.first().in_chunk() != 0 || range.first() < self.first {
            return None;
        }
        let mut known = 0;
        let mut at = range.first().chunk() - self.first.chunk();
        while at < self.chunks {
            let bits = self.bits[at / 64].load(Ordering::Acquire) >> (at % 64);
            let ones = (bits.trailing_ones() as usize).min(64 - at % 64);
            known += ones;
            at += ones;
            if ones == 0 || at % 64 != 0 {
                break;
            }
        }
        let chunks = known.min(range.pages().get() / CHUNK_PAGES);
        VaRange::of_pages(range.first(), PageCount::new(chunks * CHUNK_PAGES))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pages(first: usize, pages: usize) -> VaRange {
        VaRange::of_pages(Vpn::new(first), PageCount::new(pages)).unwrap()
    }

    fn chunks(first: usize, chunks: usize) -> VaRange {
        pages(first * CHUNK_PAGES, chunks * CHUNK_PAGES)
    }

    fn note(whole: &Whole, range: VaRange) {
        let mut room = [Segment::UNUSED; 1];
        let mut seen = super::super::view::Segments::new(&mut room);
        seen.start(range.first());
        assert!(seen.push_to(range.end_page(), PageView::Ram { order: Geometry::M2, write: true }).is_ok());
        assert_eq!(whole.is_news(&seen.as_slice()[0]), whole.run(range) != Some(range));
        whole.note(&seen.as_slice()[0]);
    }

    #[test]
    fn what_is_noted_is_known_until_a_page_of_it_changes() {
        // A mirror that begins and ends inside of chunks.
        let whole = Whole::new(pages(100, 300 * CHUNK_PAGES), true);
        for (first, len) in [(1, 1), (60, 10), (120, 70), (250, 50)] {
            note(&whole, chunks(first, len));
            assert_eq!(whole.run(chunks(first, 300)), Some(chunks(first, len.min(300 - first))));
            assert_eq!(whole.run(chunks(first + len - 1, 300)).map(|known| known.first()), {
                (first + len <= 300).then(|| chunks(first + len - 1, 1).first())
            });
        }
        assert_eq!(whole.run(chunks(60, 3)), Some(chunks(60, 3)), "no more than asked about");
        assert_eq!(whole.run(pages(60 * CHUNK_PAGES, CHUNK_PAGES - 1)), None, "no part of a chunk");
        assert_eq!(whole.run(pages(60 * CHUNK_PAGES + 1, 2 * CHUNK_PAGES)), None);
        whole.forget(pages(64 * CHUNK_PAGES - 1, 2));
        assert_eq!(whole.run(chunks(60, 10)), Some(chunks(60, 3)));
        assert_eq!((whole.run(chunks(63, 1)), whole.run(chunks(64, 1))), (None, None));
        assert_eq!(whole.run(chunks(65, 10)), Some(chunks(65, 5)));
        whole.forget(pages(0, 1000 * CHUNK_PAGES));
        assert!((0..300).all(|n| whole.run(chunks(n, 1)).is_none()));
    }

    #[test]
    fn nothing_is_known_of_chunks_that_are_not_all_the_mirror_s() {
        let whole = Whole::new(pages(100, 2 * CHUNK_PAGES), true);
        whole.note(&Segment::UNUSED);
        note_quietly(&whole, chunks(0, 3));
        assert_eq!((whole.run(chunks(0, 1)), whole.run(chunks(2, 1))), (None, None));
        assert_eq!(whole.run(chunks(1, 2)), Some(chunks(1, 1)));
        let deaf = Whole::new(chunks(0, 4), false);
        note_quietly(&deaf, chunks(0, 4));
        assert_eq!(deaf.run(chunks(0, 4)), None);
    }

    fn note_quietly(whole: &Whole, range: VaRange) {
        whole.each(range, true, |bits, mask| {
            bits.fetch_or(mask, Ordering::Release);
        });
    }
}
