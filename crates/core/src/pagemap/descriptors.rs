//! The descriptors of a pagemap: a word for every compound page, a word for every group of 512 of them, and what is
//! live, in shards.
//!
//! What    how the words lie in memory, and what a word of a compound page and of a group may become. A compound page
//!         is called a *unit* here: the pages of a unit have one descriptor (the kernel's head page), and there is
//!         no word of a tail that anybody could refer to.
//! Why     all bytes zero are the valid first state, so that a table of any size is made in no time, and memory is
//!         used for what was used.
//! Sharing neighbours lie in different cache lines: 32 words apart is the nearest that shares one.
//! Order   a unit is counted live in its shard before its word says so, and is counted out last of all. So a shard in
//!         which [`Descriptors::refuse`] has left its mark, and that counts nothing, has no unit in use, and gets none.

use alloc::boxed::Box;
use core::ptr::NonNull;

use super::shape::{BLOCK, DescriptorMemory, GROUP_PAGES, LINES, SHARD_WORDS, SHARDS, Shape};
use crate::sync::{AtomicU32, AtomicU64, Ordering, zeroed};

/// In a unit's word: it is lost, and given out no more.
const POISON: u32 = 1 << 31;
/// In a unit's word: one holder has it for himself, or it is being freed. Nobody finds it by its number.
const SOLE: u32 = 1 << 30;
/// In a unit's word: references.
const COUNT: u32 = SOLE - 1;
/// References that are too many, and far from [`COUNT`], so that threads that find out all at once do not reach it.
const MOST: u32 = 1 << 29;

/// In a group's word: the group is being discarded; nobody may allocate in it.
const GUARD: u32 = 1 << 31;
/// In a group's word: units of it have been used since it was last discarded.
const USED: u32 = 1 << 30;
/// In a group's word: units of it are poisoned.
const BAD: u32 = 1 << 29;
/// In a group's word: units in use.
const LIVE: u32 = BAD - 1;

/// In a shard's word: no unit may become live any more.
const DYING: u32 = 1 << 31;

/// Why a reference cannot be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Denied {
    /// The unit is not in use.
    Free,
    /// One holder has it for himself.
    Sole,
    /// It is lost.
    Poisoned,
    /// No unit becomes live any more.
    Dying,
    /// It has as many references as can be counted.
    TooMany,
}

/// Units that were freed and are yet to be counted out of their shard.
#[must_use]
pub(super) struct Left {
    shard: NonNull<AtomicU32>,
    units: u32,
}

impl Left {
    /// Counts them out. Whoever waits for that may free the descriptors, and the pagemap, the moment it is done.
    pub(super) fn count_out(self) {
        // SAFETY: the descriptors live as long as units are live, and these still are: nobody else counts them out.
        unsafe { self.shard.as_ref() }.fetch_sub(self.units, Ordering::Release);
    }
}

/// The words.
pub(super) struct Descriptors {
    words: NonNull<AtomicU32>,
    data: Option<NonNull<AtomicU64>>,
    shape: Shape,
    // What the pointers lead to, if it is ours.
    _words: Option<Box<[AtomicU32]>>,
    _data: Option<Box<[AtomicU64]>>,
}

// SAFETY: arrays of atomics, valid as long as `self` is, by the constructors' contracts.
unsafe impl Send for Descriptors {}
// SAFETY: as above; all access goes through atomics.
unsafe impl Sync for Descriptors {}

impl Descriptors {
    pub(super) fn owned(shape: Shape) -> Self {
        // SAFETY: all bytes zero are an atomic integer.
        let words: Box<[AtomicU32]> = unsafe { zeroed(shape.data_at()) };
        // SAFETY: as above.
        let data: Box<[AtomicU64]> = unsafe { zeroed(if shape.data { shape.units } else { 0 }) };
        Self {
            words: NonNull::from(&*words).cast(),
            data: shape.data.then(|| NonNull::from(&*data).cast()),
            shape,
            _words: Some(words),
            _data: Some(data),
        }
    }

    /// # Safety
    /// `memory` must hold the shape's bytes, be aligned to 8, zero where nobody stored anything, and valid as long as
    /// the descriptors are and units are live.
    pub(super) unsafe fn over(memory: DescriptorMemory, shape: Shape) -> Self {
        let words = memory.words.cast::<AtomicU32>();
        // SAFETY: inside the memory, by the shape, and at a multiple of 8 from its start.
        let data = shape.data.then(|| unsafe { words.add(shape.data_at()) }.cast());
        Self { words, data, shape, _words: None, _data: None }
    }

    pub(super) const fn bytes(&self) -> usize {
        self.shape.bytes()
    }

    fn word(&self, index: usize) -> &AtomicU32 {
        debug_assert!(index < self.shape.data_at());
        // SAFETY: callers stay inside the array, which lives as long as `self`.
        unsafe { self.words.add(index).as_ref() }
    }

    fn groups(&self) -> usize {
        self.shape.groups()
    }

    pub(super) fn group(&self, unit: usize) -> &AtomicU32 {
        self.word(SHARDS * SHARD_WORDS + unit / GROUP_PAGES)
    }

    fn shards(&self) -> impl Iterator<Item = &AtomicU32> {
        (0..SHARDS).map(|n| self.word(n * SHARD_WORDS))
    }

    fn shard(&self, unit: usize) -> &AtomicU32 {
        self.word(unit / GROUP_PAGES % SHARDS * SHARD_WORDS)
    }

    pub(super) fn unit(&self, unit: usize) -> &AtomicU32 {
        assert!(unit < self.shape.units, "page {unit} of {}", self.shape.units);
        let (block, inside) = (unit / BLOCK * BLOCK, unit % BLOCK);
        self.word(self.shape.counts_at() + block + inside % LINES * (BLOCK / LINES) + inside / LINES)
    }

    /// The word of a unit that is its owner's business, where there are such.
    pub(super) fn data(&self, unit: usize) -> Option<&AtomicU64> {
        assert!(unit < self.shape.units, "page {unit} of {}", self.shape.units);
        // SAFETY: inside the array, which lives as long as `self`.
        self.data.map(|data| unsafe { data.add(unit).as_ref() })
    }

    /// Units in use, or about to be.
    pub(super) fn live(&self) -> usize {
        self.shards().map(|shard| (shard.load(Ordering::Acquire) & !DYING) as usize).sum()
    }

    /// From now on no unit becomes live, until [`accept`](Self::accept).
    pub(super) fn refuse(&self) {
        self.shards().for_each(|shard| _ = shard.fetch_or(DYING, Ordering::AcqRel));
    }

    pub(super) fn accept(&self) {
        self.shards().for_each(|shard| _ = shard.fetch_and(!DYING, Ordering::Release));
    }

    pub(super) fn count(&self, unit: usize) -> u32 {
        self.unit(unit).load(Ordering::Acquire) & COUNT
    }

    pub(super) fn is_poisoned(&self, unit: usize) -> bool {
        self.unit(unit).load(Ordering::Acquire) & POISON != 0
    }

    /// Reserves up to `most` units' worth of a group's room, so that no discard starts, and counts them live.
    fn enter(&self, unit: usize, most: u32) -> Result<u32, Denied> {
        let group = self.group(unit);
        let size = GROUP_PAGES.min(self.shape.units - unit / GROUP_PAGES * GROUP_PAGES) as u32;
        let mut seen = group.load(Ordering::Relaxed);
        let taken = loop {
            let room = size - (seen & LIVE).min(size);
            let take = most.min(room);
            if seen & GUARD != 0 || take == 0 {
                return Err(Denied::Sole);
            }
            let next = (seen + take) | USED;
            match group.compare_exchange_weak(seen, next, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => break take,
                Err(now) => seen = now,
            }
        };
        if self.shard(unit).fetch_add(taken, Ordering::AcqRel) & DYING != 0 {
            self.leave(unit, taken).count_out();
            return Err(Denied::Dying);
        }
        Ok(taken)
    }

    fn leave(&self, unit: usize, units: u32) -> Left {
        let before = self.group(unit).fetch_sub(units, Ordering::Release);
        debug_assert!(before & LIVE >= units, "a group lost more pages than it had");
        Left { shard: NonNull::from(self.shard(unit)), units }
    }

    /// Finds up to `most` consecutive free units at or behind `from`, then from the start; `border` says where the
    /// pages behind a unit stop following each other. `sole`: they are found by nobody yet.
    pub(super) fn allocate(
        &self,
        from: usize,
        most: usize,
        sole: bool,
        border: impl Fn(usize) -> usize,
    ) -> Option<(usize, usize)> {
        let from = if from < self.shape.units { from } else { 0 };
        let first_group = from / GROUP_PAGES;
        // The first group comes up twice: from `from` on at first, from its start at last.
        for step in 0..=self.groups() {
            let group = (first_group + step) % self.groups();
            let start = if step == 0 { from } else { group * GROUP_PAGES };
            let end = self.shape.units.min((group + 1) * GROUP_PAGES);
            let room = match self.enter(group * GROUP_PAGES, most.min(end - start) as u32) {
                Ok(room) => room as usize,
                Err(Denied::Dying) => return None,
                Err(_) => continue,
            };
            let found = self.claim_run(start, end, room, sole, &border);
            let got = found.map_or(0, |(_, len)| len);
            if got < room {
                self.leave(group * GROUP_PAGES, (room - got) as u32).count_out();
            }
            if found.is_some() {
                return found;
            }
        }
        None
    }

    fn claim_run(
        &self,
        start: usize,
        end: usize,
        most: usize,
        sole: bool,
        border: impl Fn(usize) -> usize,
    ) -> Option<(usize, usize)> {
        let first = (start..end).find(|unit| self.claim(*unit, sole))?;
        let end = end.min(first + most).min(border(first));
        let len = 1 + (first + 1..end).take_while(|unit| self.claim(*unit, sole)).count();
        Some((first, len))
    }

    /// Takes a unit that is free, in a group that was entered.
    fn claim(&self, unit: usize, sole: bool) -> bool {
        let (word, taken) = (self.unit(unit), if sole { SOLE | 1 } else { 1 });
        word.load(Ordering::Relaxed) == 0
            && word.compare_exchange(0, taken, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Takes a whole group of which no unit is in use, and whose pages follow each other.
    pub(super) fn allocate_group(&self, border: impl Fn(usize) -> usize) -> Option<usize> {
        for group in 0..self.shape.units / GROUP_PAGES {
            let first = group * GROUP_PAGES;
            let word = self.group(first);
            let seen = word.load(Ordering::Relaxed);
            if seen & (LIVE | GUARD | BAD) != 0 || border(first) < first + GROUP_PAGES {
                continue;
            }
            let all = GROUP_PAGES as u32;
            if word.compare_exchange(seen, all | USED, Ordering::Acquire, Ordering::Relaxed).is_err() {
                continue;
            }
            if self.shard(first).fetch_add(all, Ordering::AcqRel) & DYING != 0 {
                self.leave(first, all).count_out();
                return None;
            }
            // The group's room is all ours, so that nobody else can claim a unit of it; one may be poisoned meanwhile.
            for unit in first..first + GROUP_PAGES {
                self.unit(unit).fetch_add(1, Ordering::Relaxed);
            }
            return Some(first);
        }
        None
    }

    /// As [`get`](Self::get), by somebody who counts by number: nothing happens to a unit that is free.
    pub(super) fn get_counted(word: &AtomicU32) {
        let mut seen = word.load(Ordering::Relaxed);
        loop {
            debug_assert!(seen & COUNT > 0, "a reference to the free page");
            if seen & COUNT == 0 || seen & COUNT >= MOST {
                return;
            }
            match word.compare_exchange_weak(seen, seen + 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// A reference to a unit of which the caller has one.
    pub(super) fn get(word: &AtomicU32) {
        let before = word.fetch_add(1, Ordering::Relaxed);
        debug_assert!(before & COUNT > 0, "a reference to the free page");
        if before & COUNT >= MOST {
            // Whoever catches the panic has no reference.
            word.fetch_sub(1, Ordering::Relaxed);
            panic!("a page has {} references", before & COUNT);
        }
    }

    /// A reference to a unit that somebody uses; to one that is free, if `free`, which makes it live.
    pub(super) fn find(&self, unit: usize, free: bool) -> Result<(), Denied> {
        let word = self.unit(unit);
        let mut seen = word.load(Ordering::Relaxed);
        loop {
            if seen & (POISON | SOLE) != 0 {
                return Err(if seen & POISON != 0 { Denied::Poisoned } else { Denied::Sole });
            }
            if seen >= MOST {
                return Err(Denied::TooMany);
            }
            if seen == 0 {
                if !free {
                    return Err(Denied::Free);
                }
                self.enter(unit, 1)?;
            }
            match word.compare_exchange_weak(seen, seen + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(now) => {
                    if seen == 0 {
                        self.leave(unit, 1).count_out();
                    }
                    seen = now;
                }
            }
        }
    }

    /// Takes a unit that nobody uses for one holder.
    pub(super) fn seize(&self, unit: usize) -> Result<(), Denied> {
        self.enter(unit, 1)?;
        let taken = self.unit(unit).compare_exchange(0, SOLE | 1, Ordering::Acquire, Ordering::Relaxed);
        taken.map(|_| ()).map_err(|seen| {
            self.leave(unit, 1).count_out();
            if seen & POISON != 0 { Denied::Poisoned } else { Denied::Sole }
        })
    }

    /// Whether the only reference is the caller's, who has the unit for himself from then on.
    pub(super) fn make_sole(&self, unit: usize) -> bool {
        self.unit(unit).compare_exchange(1, SOLE | 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// What one holder had for himself is found by others again.
    pub(super) fn publish(&self, unit: usize) {
        self.unit(unit).fetch_and(!SOLE, Ordering::Release);
    }

    /// The word of a unit, for a handle of it.
    pub(super) fn word_of(&self, unit: usize) -> NonNull<AtomicU32> {
        NonNull::from(self.unit(unit))
    }

    /// One reference less to each of `len` units of one group, which are counted out of it in one step. Of a run that
    /// is freed `freed` is told, before anybody can get it.
    ///
    /// When the caller's reference was the last thing that kept the descriptors, and others have dropped theirs
    /// meanwhile, they are gone when this returns without an answer; until then, and with one, they are there.
    ///
    /// # Safety
    /// `this` must be valid, and the caller must have a reference to each unit, which is given up.
    pub(super) unsafe fn put(
        this: NonNull<Self>,
        first: usize,
        len: usize,
        freed: Option<&dyn Fn(usize, usize)>,
    ) -> Option<Left> {
        let (mut count, mut run) = (0, first);
        for unit in first..first + len {
            // SAFETY: the reference to this unit, which is not given up yet, keeps the descriptors.
            let word = unsafe { this.as_ref() }.word_of(unit);
            // SAFETY: as above; `release` does not look at the word any more when it has given the reference up.
            if unsafe { Self::release(word, freed.is_some()) } {
                count += 1;
            } else {
                // SAFETY: if there is something to finish, it was freed and is not counted out.
                unsafe { Self::finish(this, run, unit, freed) };
                run = unit + 1;
            }
        }
        // SAFETY: as above.
        unsafe { Self::finish(this, run, first + len, freed) };
        // SAFETY: what was freed is not counted out.
        (count > 0).then(|| unsafe { this.as_ref() }.leave(first, count))
    }

    /// # Safety
    /// `this` must be valid unless `first` is `end`.
    unsafe fn finish(this: NonNull<Self>, first: usize, end: usize, freed: Option<&dyn Fn(usize, usize)>) {
        if let Some(freed) = freed.filter(|_| first < end) {
            freed(first, end - first);
            // SAFETY: the caller's promise.
            (first..end).for_each(|unit| unsafe { this.as_ref() }.publish(unit));
        }
    }

    /// One reference less; whether that was the last, and the unit is free, or the caller's to free if `hold`. If it
    /// was not the last the word may be gone.
    ///
    /// # Safety
    /// `word` must be a unit's, to which the caller has a reference.
    pub(super) unsafe fn release(word: NonNull<AtomicU32>, hold: bool) -> bool {
        // SAFETY: the caller's reference keeps it.
        let word = unsafe { word.as_ref() };
        let mut seen = word.load(Ordering::Relaxed);
        loop {
            debug_assert!(seen & COUNT > 0, "a reference too few: {seen:#x}");
            if seen & COUNT == 0 {
                return false;
            }
            let last = seen & COUNT == 1;
            let next = match last {
                true if hold => (seen & POISON) | SOLE,
                true => seen & POISON,
                false => seen - 1,
            };
            match word.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return last,
                Err(now) => seen = now,
            }
        }
    }

    /// What is left to do for a unit whose last reference [`release`](Self::release) gave up.
    pub(super) fn freed(&self, unit: usize, freed: Option<&dyn Fn(usize, usize)>) -> Left {
        if let Some(freed) = freed {
            freed(unit, 1);
            self.publish(unit);
        }
        self.leave(unit, 1)
    }

    /// Makes every unit free, and undoes what was begun: who was killed while he discarded a group has left it guarded,
    /// and who was killed while he took units has left them counted in their group, perhaps in no shard.
    pub(super) fn free_all(&self) -> usize {
        let mut freed = 0;
        for first in (0..self.groups()).map(|group| group * GROUP_PAGES) {
            let seen = self.group(first).load(Ordering::Acquire);
            if seen & (LIVE | GUARD) == 0 {
                continue;
            }
            for unit in first..self.shape.units.min(first + GROUP_PAGES) {
                freed += usize::from(self.unit(unit).fetch_and(POISON, Ordering::AcqRel) & COUNT > 0);
            }
            self.group(first).store(USED | seen & BAD, Ordering::Release);
        }
        self.shards().for_each(|shard| _ = shard.fetch_and(DYING, Ordering::AcqRel));
        freed
    }

    /// Finds a group that was used and is empty now, and keeps allocation out of it.
    pub(super) fn guard_idle_group(&self) -> Option<usize> {
        (0..self.groups()).find(|group| {
            let word = self.group(group * GROUP_PAGES);
            word.load(Ordering::Relaxed) == USED
                && word.compare_exchange(USED, GUARD, Ordering::Acquire, Ordering::Relaxed).is_ok()
        })
    }

    pub(super) fn unguard(&self, group: usize) {
        self.group(group * GROUP_PAGES).fetch_and(BAD, Ordering::Release);
    }

    /// The unit is lost. Whether it was not known to be.
    pub(super) fn poison(&self, unit: usize) -> bool {
        let before = self.unit(unit).fetch_or(POISON, Ordering::AcqRel);
        self.group(unit).fetch_or(BAD, Ordering::AcqRel);
        before & POISON == 0
    }

    /// The unit was written anew. Its group stays apart if another one of it is lost.
    pub(super) fn cure(&self, unit: usize) {
        self.unit(unit).fetch_and(!POISON, Ordering::AcqRel);
        let first = unit / GROUP_PAGES * GROUP_PAGES;
        let others = || (first..self.shape.units.min(first + GROUP_PAGES)).any(|unit| self.is_poisoned(unit));
        // Never for a moment is a group given out whole of which a page is known to be lost.
        if others() {
            return;
        }
        self.group(unit).fetch_and(!BAD, Ordering::AcqRel);
        // Whoever poisons one meanwhile marks the unit first: it is seen here, or he marks the group after us.
        if others() {
            self.group(unit).fetch_or(BAD, Ordering::AcqRel);
        }
    }

    /// Units in use, from `from` on, with the references to each. Groups in which there are none are passed over whole.
    pub(super) fn in_use(&self, from: usize, end: usize) -> impl Iterator<Item = (usize, u32)> {
        (from / GROUP_PAGES..end.div_ceil(GROUP_PAGES))
            .map(|group| group * GROUP_PAGES)
            .filter(|first| self.group(*first).load(Ordering::Acquire) & LIVE != 0)
            .flat_map(move |first| from.max(first)..end.min(first + GROUP_PAGES))
            .map(|unit| (unit, self.count(unit)))
            .filter(|(_, count)| *count > 0)
    }
}
