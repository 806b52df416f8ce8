//! Which pages of a mirror are no longer the mapping that it was made for.
//!
//! What    [`Gone`], a few ranges, joined where they touch.
//! Why     what is mapped at an address next is not watched, unless somebody adopts it: a mirror would never hear of
//!         its changes. A mirror of the new mapping is made anew.
//! Races   noted under the mirror's lock, when the event is told.
//! Fails   on the safe side: where there are more ranges than room, two are joined across what lies between.

use uhmm_addr::{PageCount, VaRange, Vpn};

const RANGES: usize = 16;

/// Pages that were unmapped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gone {
    /// By address, apart from each other.
    ranges: [VaRange; RANGES],
    len: usize,
}

/// From the start of `low` to the end of `high`, or of `low` where that is further.
fn hull(low: VaRange, high: VaRange) -> VaRange {
    let pages = high.end_page().max(low.end_page()).since(low.first());
    low.grow(pages)
}

impl Gone {
    pub(super) const NOTHING: Self = Self { ranges: [VaRange::page(Vpn::new(0)); RANGES], len: 0 };

    /// In order of addresses.
    pub(super) fn iter(&self) -> impl Iterator<Item = VaRange> {
        self.ranges[..self.len].iter().copied()
    }

    pub(super) fn add(&mut self, range: VaRange) {
        if self.len == RANGES {
            self.join_nearest();
        }
        let at = self.iter().take_while(|other| other.first() < range.first()).count();
        self.ranges.copy_within(at..self.len, at + 1);
        self.ranges[at] = range;
        self.len += 1;
        // The new one and the one before it may touch their neighbours.
        let mut n = at.saturating_sub(1);
        while n + 1 < self.len {
            let (low, high) = (self.ranges[n], self.ranges[n + 1]);
            if low.end_page() < high.first() {
                n += 1;
            } else {
                self.join(n);
            }
        }
    }

    /// Makes one of number `n` and the next.
    fn join(&mut self, n: usize) {
        self.ranges[n] = hull(self.ranges[n], self.ranges[n + 1]);
        self.ranges.copy_within(n + 2..self.len, n + 1);
        self.len -= 1;
    }

    fn join_nearest(&mut self) {
        let between =
            |n: &usize| -> PageCount { self.ranges[n + 1].first().since(self.ranges[*n].end_page()) };
        if let Some(n) = (0..self.len - 1).min_by_key(between) {
            self.join(n);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn pages(first: usize, pages: usize) -> VaRange {
        VaRange::of_pages(Vpn::new(first), PageCount::new(pages)).unwrap()
    }

    #[test]
    fn ranges_that_touch_become_one() {
        let mut gone = Gone::NOTHING;
        for (first, len) in [(10, 2), (20, 2), (5, 1), (12, 8), (6, 4)] {
            gone.add(pages(first, len));
        }
        assert_eq!(gone.iter().collect::<Vec<_>>(), [pages(5, 17)]);
        gone.add(pages(7, 1));
        assert_eq!(gone.iter().collect::<Vec<_>>(), [pages(5, 17)]);
    }

    #[test]
    fn without_room_the_nearest_are_joined() {
        let mut gone = Gone::NOTHING;
        for n in 0..RANGES {
            gone.add(pages(100 * n, 10));
        }
        gone.add(pages(2000, 1));
        gone.add(pages(315, 1));
        assert_eq!(gone.len, RANGES);
        for n in 0..RANGES {
            assert!(gone.iter().any(|range| range.encloses(pages(100 * n, 10))), "{n}");
        }
        assert!(gone.iter().any(|range| range.contains(Vpn::new(2000))));
        assert!(gone.iter().any(|range| range.contains(Vpn::new(315))));
    }
}
