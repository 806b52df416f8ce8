//! Where the blocks of a file are, and which blocks are nobody's.
//!
//! What     [`Runs`], a file's blocks as runs of consecutive ones; [`Free`], the blocks of a namespace that no file has.
//! Fails    nothing here.

use std::collections::BTreeMap;

/// Consecutive blocks of a file that are consecutive in the namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    /// The first block, counted from the file's first.
    pub(super) at: u64,
    /// Where it is, counted from the namespace's first block.
    pub(super) block: u64,
    /// How many, at least 1.
    pub(super) len: u64,
}

impl Run {
    /// What of it is in blocks `from..to` of the file.
    fn part(self, from: u64, to: u64) -> Option<Self> {
        let (start, end) = (self.at.max(from), (self.at + self.len).min(to));
        (start < end).then(|| Self { at: start, block: self.block + (start - self.at), len: end - start })
    }
}

/// A file's blocks, in order; what is in none is a hole.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Runs(Vec<Run>);

impl Runs {
    /// Those runs, if they are in order and apart.
    pub(super) fn checked(runs: Vec<Run>) -> Option<Self> {
        let fine = runs.iter().all(|run| run.len > 0 && run.at.checked_add(run.len).is_some());
        let ordered = runs.windows(2).all(|pair| pair[0].at + pair[0].len <= pair[1].at);
        (fine && ordered).then_some(Self(runs))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Run> {
        self.0.iter().copied()
    }

    /// Those in blocks `from..to` of the file.
    pub(super) fn within(&self, from: u64, to: u64) -> impl Iterator<Item = Run> {
        let first = self.0.partition_point(|run| run.at + run.len <= from);
        self.0[first..].iter().map_while(move |run| run.part(from, to))
    }

    /// Has `fresh`, in any order and apart, where there is something else or nothing: all in one pass.
    pub(super) fn replace(&mut self, mut fresh: Vec<Run>) {
        fresh.sort_unstable_by_key(|run| run.at);
        let mut kept = Vec::with_capacity(self.0.len() + fresh.len());
        let mut next = fresh.iter().peekable();
        for run in &self.0 {
            let mut from = run.at;
            let end = run.at + run.len;
            // What comes behind this one may be in the next as well.
            while let Some(new) = next.peek().filter(|new| new.at < end) {
                kept.extend(run.part(from, new.at));
                from = from.max(new.at + new.len);
                if new.at + new.len > end {
                    break;
                }
                next.next();
            }
            kept.extend(run.part(from, end));
        }
        kept.extend(fresh);
        kept.sort_unstable_by_key(|run| run.at);
        self.0 = kept;
        self.join();
    }

    /// Makes neighbours that follow each other on both sides one.
    fn join(&mut self) {
        self.0.dedup_by(|run, last| {
            let follows = last.at + last.len == run.at && last.block + last.len == run.block;
            last.len += if follows { run.len } else { 0 };
            follows
        });
    }

    /// The holes among blocks `from..to`, as first and end block.
    pub(super) fn holes(&self, from: u64, to: u64) -> Vec<(u64, u64)> {
        let mut at = from;
        let mut holes = Vec::new();
        for run in self.within(from, to) {
            if at < run.at {
                holes.push((at, run.at));
            }
            at = run.at + run.len;
        }
        if at < to {
            holes.push((at, to));
        }
        holes
    }

    /// Makes blocks `from..to` holes; what was there.
    pub(super) fn remove(&mut self, from: u64, to: u64) -> Vec<Run> {
        let removed = self.within(from, to).collect();
        let left = self.iter().flat_map(|run| [run.part(0, from), run.part(to, u64::MAX)]);
        self.0 = left.flatten().collect();
        removed
    }

    /// Puts blocks where there is a hole: what many at once must agree with.
    #[cfg(test)]
    fn insert(&mut self, run: Run) {
        let at = self.0.partition_point(|other| other.at < run.at);
        self.0.insert(at, run);
        self.join();
    }
}

/// Blocks that no file has: first block to length.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Free(BTreeMap<u64, u64>);

impl Free {
    /// Blocks in all.
    pub(super) fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// Up to `most` consecutive blocks, from the first gap on.
    pub(super) fn take(&mut self, most: u64) -> Option<(u64, u64)> {
        let (start, len) = self.0.pop_first()?;
        let taken = len.min(most);
        if taken < len {
            self.0.insert(start + taken, len - taken);
        }
        Some((start, taken))
    }

    /// Takes these blocks, if all are free.
    pub(super) fn reserve(&mut self, block: u64, len: u64) -> bool {
        let Some((start, there)) = self.0.range(..=block).next_back().map(|(start, len)| (*start, *len))
        else {
            return false;
        };
        if block + len > start + there {
            return false;
        }
        self.0.remove(&start);
        self.give(start, block - start);
        self.give(block + len, start + there - block - len);
        true
    }

    /// Gives blocks back that were taken.
    pub(super) fn give(&mut self, mut block: u64, mut len: u64) {
        if len == 0 {
            return;
        }
        if let Some((start, there)) = self.0.range(..block).next_back().map(|(start, len)| (*start, *len)) {
            debug_assert!(start + there <= block, "block {block} is free already");
            if start + there == block {
                self.0.remove(&start);
                (block, len) = (start, there + len);
            }
        }
        if let Some(behind) = self.0.remove(&(block + len)) {
            len += behind;
        }
        self.0.insert(block, len);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn runs_agree_with_a_map() {
        let (mut runs, mut map, mut state) = (Runs::default(), BTreeMap::new(), 1_u64);
        for n in 0..5000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (from, len) = ((state >> 33) % 40, (state >> 45) % 6 + 1);
            let removed: u64 = runs.remove(from, from + len).iter().map(|run| run.len).sum();
            let before = map.len() as u64;
            map.retain(|at, _| !(from..from + len).contains(at));
            assert_eq!(before - map.len() as u64, removed);
            if n % 3 > 0 {
                let block = (state >> 50) % 1000;
                runs.insert(Run { at: from, block, len });
                map.extend((0..len).map(|k| (from + k, block + k)));
            }
            let found: BTreeMap<u64, u64> =
                runs.iter().flat_map(|run| (0..run.len).map(move |k| (run.at + k, run.block + k))).collect();
            assert_eq!(found, map);
            assert!(Runs::checked(runs.iter().collect()).is_some());
            let holes: u64 = runs.holes(3, 30).iter().map(|(from, to)| to - from).sum();
            assert_eq!(holes, 27 - map.range(3..30).count() as u64);
        }
    }

    #[test]
    fn many_at_once_are_as_one_after_the_other() {
        let mut state = 3_u64;
        let mut random = |end: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % end
        };
        for _ in 0..2000 {
            let mut runs = Runs::default();
            let mut at = 0;
            for _ in 0..random(6) {
                at += random(4);
                let len = random(5) + 1;
                runs.insert(Run { at, block: 100 + random(50) * 7, len });
                at += len;
            }
            let (mut fresh, mut at) = (Vec::new(), 0);
            for _ in 0..random(6) {
                at += random(5);
                let len = random(6) + 1;
                fresh.push(Run { at, block: 1000 + random(50) * 7, len });
                at += len;
            }
            let mut one_by_one = runs.clone();
            for run in &fresh {
                one_by_one.remove(run.at, run.at + run.len);
                one_by_one.insert(*run);
            }
            fresh.reverse();
            runs.replace(fresh);
            assert_eq!(runs, one_by_one);
        }
    }

    #[test]
    fn a_file_in_many_pieces_is_changed_in_one_pass() {
        // Were each put by itself, that would be 10^11 steps.
        const PIECES: u64 = 1 << 19;
        let piece = |n: u64, step: u64| Run { at: 2 * n, block: step * n, len: 1 };
        let mut runs = Runs::default();
        runs.replace((0..PIECES).map(|n| piece(n, 3)).collect());
        runs.replace((0..PIECES).rev().filter(|n| n % 2 == 0).map(|n| piece(n, 5)).collect());
        assert_eq!(runs.iter().count() as u64, PIECES);
        assert!((0..PIECES).zip(runs.iter()).all(|(n, run)| run == piece(n, if n % 2 == 0 { 5 } else { 3 })));
        runs.replace(vec![Run { at: 0, block: 7, len: 2 * PIECES }]);
        assert_eq!(runs.iter().count(), 1);
    }

    #[test]
    fn free_blocks_come_back_in_one_piece() {
        let mut free = Free::default();
        free.give(0, 100);
        assert!(free.reserve(10, 5) && !free.reserve(12, 1) && !free.reserve(99, 2));
        assert_eq!(free.take(50), Some((0, 10)));
        assert_eq!(free.take(50), Some((15, 50)));
        assert_eq!(free.total(), 35);
        free.give(10, 5);
        free.give(0, 10);
        free.give(15, 50);
        assert_eq!(free.0, BTreeMap::from([(0, 100)]));
    }
}
