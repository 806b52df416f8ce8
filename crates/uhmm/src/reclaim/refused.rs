//! Pages of mappings that let none go, locked ones most likely.
//!
//! Why     an attempt copies them and puts them back; and where the others are to be reached only by several laps of the
//!         clock, each lap would.
//! Bounds  [`MOST`] stretches are remembered, the oldest are forgotten first.

use std::collections::VecDeque;
use std::time::Duration;

use uhmm_addr::{VaRange, Vpn};
use uhmm_sys::clock::now;

/// How long they are left alone.
const REST: Duration = Duration::from_millis(200);
const MOST: usize = 64;

/// Stretches that could not be taken, and until when each is left alone.
#[derive(Debug)]
pub(super) struct Refused(VecDeque<(VaRange, Duration)>);

impl Refused {
    /// None.
    pub(super) fn new() -> Self {
        Self(VecDeque::with_capacity(MOST))
    }

    /// Where the stretch at the front of `part` ends that is left alone for now, if `part` begins in one.
    pub(super) fn end_at(&mut self, part: VaRange) -> Option<Vpn> {
        if self.0.is_empty() {
            return None;
        }
        let now = now();
        self.0.retain(|(_, until)| *until > now);
        let known = self.0.iter().find(|(range, _)| range.contains(part.first()));
        known.map(|(range, _)| range.end_page().min(part.end_page()))
    }

    /// Leaves `range` alone for a while: as long as what lies before it, if that is left alone.
    pub(super) fn note(&mut self, range: VaRange) {
        if let Some((last, _)) = self.0.back_mut()
            && last.end_page() == range.first()
        {
            *last = last.grow(last.pages().plus(range.pages()));
            return;
        }
        if self.0.len() == MOST {
            self.0.pop_front();
        }
        self.0.push_back((range, now() + REST));
    }
}

#[cfg(test)]
mod tests {
    use uhmm_addr::PageCount;

    use super::*;

    fn pages(first: usize, count: usize) -> VaRange {
        VaRange::of_pages(Vpn::new(first), PageCount::new(count)).unwrap()
    }

    #[test]
    fn what_was_refused_is_passed_over_as_one_stretch_for_a_while() {
        let mut refused = Refused::new();
        assert_eq!(refused.end_at(pages(0, 10)), None);
        refused.note(pages(100, 10));
        refused.note(pages(110, 5));
        assert_eq!(refused.0.len(), 1);
        assert_eq!(refused.end_at(pages(103, 50)), Some(Vpn::new(115)));
        assert_eq!(refused.end_at(pages(103, 4)), Some(Vpn::new(107)));
        assert_eq!(refused.end_at(pages(90, 50)), None, "what lies before it has its turn");
        refused.0[0].1 = Duration::ZERO;
        assert_eq!(refused.end_at(pages(103, 50)), None, "and it has, in the end");
    }

    #[test]
    fn the_oldest_are_forgotten_first() {
        let mut refused = Refused::new();
        (0..=MOST).for_each(|n| refused.note(pages(10 * n, 1)));
        assert_eq!(refused.0.len(), MOST);
        assert_eq!(refused.end_at(pages(0, 1)), None);
        assert_eq!(refused.end_at(pages(10 * MOST, 1)), Some(Vpn::new(10 * MOST + 1)));
    }
}
