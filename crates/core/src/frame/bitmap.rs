//! A set of small numbers that finds runs.

use alloc::boxed::Box;
use alloc::vec;

/// A fixed-size bit set with a cursor from which searches go on.
#[derive(Debug)]
pub(super) struct Bitmap {
    words: Box<[u64]>,
    bits: usize,
    set: usize,
    cursor: usize,
}

impl Bitmap {
    /// `bits` bits, all clear.
    pub(super) fn new(bits: usize) -> Self {
        Self { words: vec![0; bits.div_ceil(64)].into_boxed_slice(), bits, set: 0, cursor: 0 }
    }

    /// How many bits are set.
    pub(super) const fn count(&self) -> usize {
        self.set
    }

    /// Sets `len` bits from `first` on, which are clear.
    pub(super) fn insert(&mut self, first: usize, len: usize) {
        self.for_each_word(first, len, |word, mask| {
            debug_assert!(*word & mask == 0, "a slot was put into the pool twice");
            *word |= mask;
        });
        self.set += len;
    }

    /// Takes the first run of set bits behind the cursor, up to `most` long, and clears it.
    pub(super) fn take_run(&mut self, most: usize) -> Option<(usize, usize)> {
        let first = self.next_set(self.cursor).or_else(|| self.next_set(0))?;
        let limit = self.bits.min(first.saturating_add(most));
        let len = self.next_clear(first, limit) - first;
        self.for_each_word(first, len, |word, mask| *word &= !mask);
        self.set -= len;
        self.cursor = first + len;
        Some((first, len))
    }

    fn next_set(&self, from: usize) -> Option<usize> {
        if from >= self.bits {
            return None;
        }
        let mut index = from / 64;
        let mut word = self.words[index] & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                return Some(index * 64 + word.trailing_zeros() as usize);
            }
            index += 1;
            word = *self.words.get(index)?;
        }
    }

    fn next_clear(&self, from: usize, limit: usize) -> usize {
        let mut at = from;
        while at < limit {
            let ones = (self.words[at / 64] >> (at % 64)).trailing_ones() as usize;
            if ones < 64 - at % 64 {
                return limit.min(at + ones);
            }
            at += ones;
        }
        limit
    }

    fn for_each_word(&mut self, first: usize, len: usize, mut change: impl FnMut(&mut u64, u64)) {
        let mut at = first;
        let end = first + len;
        while at < end {
            let bits = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - bits)) << (at % 64);
            change(&mut self.words[at / 64], mask);
            at += bits;
        }
    }
}
