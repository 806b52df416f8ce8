//! The pages of a store that cannot be read any more.
//!
//! What     [`BadPages`], a sorted list of disjoint runs (the kernel's `struct badblocks`).
//! Why      what broke stays broken until it was written anew as a whole, over restarts too, so the list is
//!          part of the labels.
//! Fails    nothing here; how long the list may be, the labels say.

use super::Extent;

/// Pages that are bad, in order; neighbours are one run.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BadPages(Vec<Extent>);

impl BadPages {
    /// None.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Those runs, if they are what this type promises: in order, disjoint, and no two of them touch.
    pub(crate) fn from_sorted(runs: Vec<Extent>) -> Option<Self> {
        runs.windows(2).all(|pair| pair[0].end() < pair[1].start).then_some(Self(runs))
    }

    /// Every run.
    pub fn runs(&self) -> &[Extent] {
        &self.0
    }

    /// The bad pages among `pages`.
    pub fn among(&self, pages: Extent) -> impl Iterator<Item = Extent> {
        let first = self.0.partition_point(|run| run.end() <= pages.start);
        self.0[first..].iter().map_while(move |run| run.intersect(pages))
    }

    /// Whether one of `pages` is bad.
    pub fn touches(&self, pages: Extent) -> bool {
        self.among(pages).next().is_some()
    }

    /// These pages are bad.
    pub fn add(&mut self, pages: Extent) {
        // Everything that overlaps it or touches it becomes one run with it.
        let first = self.0.partition_point(|run| run.end() < pages.start);
        let behind = self.0.partition_point(|run| run.start <= pages.end());
        let mut whole = pages;
        if let [head, .., tail] | [head @ tail] = &self.0[first..behind] {
            let start = head.start.min(pages.start);
            whole = Extent { start, len: tail.end().max(pages.end()) - start };
        }
        self.0.splice(first..behind, [whole]);
    }

    /// These pages are good again. Says how many were bad.
    pub fn clear(&mut self, pages: Extent) -> u64 {
        let first = self.0.partition_point(|run| run.end() <= pages.start);
        let behind = self.0.partition_point(|run| run.start < pages.end());
        let hit: Vec<Extent> = self.0[first..behind].to_vec();
        let cleared = hit.iter().filter_map(|run| run.intersect(pages)).map(|run| run.len).sum();
        let left = hit.iter().flat_map(|run| {
            [Extent::between(run.start, pages.start), Extent::between(pages.end().max(run.start), run.end())]
        });
        self.0.splice(first..behind, left.flatten().collect::<Vec<_>>());
        cleared
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn pages(bad: &BadPages) -> BTreeSet<u64> {
        bad.runs().iter().flat_map(|run| run.start..run.end()).collect()
    }

    #[test]
    fn the_list_agrees_with_a_set() {
        let mut bad = BadPages::new();
        let mut set = BTreeSet::new();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let run = Extent { start: (state >> 33) % 64, len: (state >> 40) % 9 + 1 };
            if state >> 63 == 0 {
                bad.add(run);
                set.extend(run.start..run.end());
            } else {
                let before = set.len();
                set.retain(|page| !run.contains(*page));
                assert_eq!(bad.clear(run), (before - set.len()) as u64);
            }
            assert_eq!(pages(&bad), set);
            assert!(BadPages::from_sorted(bad.runs().to_vec()).is_some(), "{bad:?}");
            let probe = Extent { start: state % 70, len: 3 };
            assert_eq!(bad.touches(probe), (probe.start..probe.end()).any(|page| set.contains(&page)));
        }
    }
}
