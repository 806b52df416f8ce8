//! Discards of our own, and whose a REMOVE event is.
//!
//! What    [`OwnDiscard`] holds the range that the fallback is taking away, and answers for each event whether it
//!         is about that or the program's.
//! Why     both raise the same event, and its consequence is the opposite: what we take away was copied, what the
//!         program takes away is to come back as zeros.
//! How     a discard of ours is reported from its first page on, in one event for each mapping that it spans. The
//!         program's that begins at the same page cannot be told from the first of those, but then ours begins
//!         *again*: what was taken for ours before is the program's. That is early enough, as the pages are
//!         under our claim until our discard is over, and nobody gets to touch them.
//! Locks   set by whoever holds `Mm::fallback`; asked under the layout lock held for writing.
//! Fails   where the program gives up part of a range that spans mappings, from its middle on, between two events
//!         of ours: the pages behind count as given up as well. The fallback's gap (see
//!         [`migrate`](crate::migrate)) is as narrow, and it is taken only for pages that cannot be moved.

use uhmm_addr::{PageCount, VaRange, Vpn};

use crate::sync::{AtomicUsize, Ordering};

/// A discard of our own that is under way, if any. All zero: none.
#[derive(Debug)]
pub(super) struct OwnDiscard {
    first: AtomicUsize,
    pages: AtomicUsize,
    /// Pages, from the first one on, of which an event was taken for ours.
    reported: AtomicUsize,
}

/// Whose an event is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Whose {
    /// Ours: nothing is given up.
    Ours,
    /// Ours, and what was taken for ours before was the program's.
    OursAfter(VaRange),
    /// The program's.
    Programs,
}

impl OwnDiscard {
    pub(super) fn new() -> Self {
        Self { first: AtomicUsize::new(0), pages: AtomicUsize::new(0), reported: AtomicUsize::new(0) }
    }

    /// We are about to take `range` away.
    pub(super) fn begin(&self, range: VaRange) {
        self.reported.store(0, Ordering::Release);
        self.first.store(range.first().get(), Ordering::Release);
        self.pages.store(range.pages().get(), Ordering::Release);
    }

    /// It is done, its events applied.
    pub(super) fn end(&self) {
        self.pages.store(0, Ordering::Release);
    }

    /// Whose the event about `range` is.
    pub(super) fn whose(&self, range: VaRange) -> Whose {
        let pages = self.pages.load(Ordering::Acquire);
        let first = Vpn::new(self.first.load(Ordering::Acquire));
        let reported = self.reported.load(Ordering::Acquire);
        let at = range.first().get().wrapping_sub(first.get());
        let end = at.saturating_add(range.pages().get());
        if end > pages || (at != reported && at != 0) {
            return Whose::Programs;
        }
        self.reported.store(end, Ordering::Release);
        match VaRange::of_pages(first, PageCount::new(reported)) {
            Some(before) if at == 0 => Whose::OursAfter(before),
            _ => Whose::Ours,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pages(first: usize, pages: usize) -> VaRange {
        VaRange::of_pages(Vpn::new(first), PageCount::new(pages)).unwrap()
    }

    fn of_ten() -> OwnDiscard {
        let own = OwnDiscard::new();
        own.begin(pages(100, 10));
        own
    }

    #[test]
    fn ours_comes_mapping_by_mapping() {
        let own = of_ten();
        for (first, len) in [(100, 3), (103, 6), (109, 1)] {
            assert_eq!(own.whose(pages(first, len)), Whose::Ours);
        }
        own.end();
        assert_eq!(own.whose(pages(100, 10)), Whose::Programs);
    }

    #[test]
    fn what_begins_elsewhere_or_is_longer_is_the_program_s() {
        let own = of_ten();
        for (first, len) in [(99, 1), (101, 1), (100, 11), (0, 1000)] {
            assert_eq!(own.whose(pages(first, len)), Whose::Programs, "{first} {len}");
        }
        assert_eq!(own.whose(pages(100, 10)), Whose::Ours);
    }

    #[test]
    fn the_program_s_at_the_same_page_is_known_when_ours_comes() {
        for length in [1, 9, 10] {
            let own = of_ten();
            assert_eq!(own.whose(pages(100, length)), Whose::Ours, "so far");
            assert_eq!(own.whose(pages(100, 10)), Whose::OursAfter(pages(100, length)));
        }
    }

    #[test]
    fn of_two_of_the_same_range_one_is_the_program_s() {
        let own = of_ten();
        assert_eq!(own.whose(pages(100, 10)), Whose::Ours);
        assert_eq!(own.whose(pages(100, 10)), Whose::OursAfter(pages(100, 10)), "whichever came first");
    }
}
