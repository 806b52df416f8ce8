//! The descriptors of a pagemap: a count for every page, and one for every group of 512.

use alloc::boxed::Box;
use core::ptr::NonNull;

use uhmm_addr::{CHUNK_PAGES, PageCount};

use crate::sync::{AtomicU32, Ordering, zeroed};

/// Pages in a group: the step in which a device gets its space back.
pub const GROUP_PAGES: usize = if cfg!(loom) { 2 } else { CHUNK_PAGES };

/// In a group's word: the group is being discarded; nobody may allocate in it.
const GUARD: u32 = 1 << 31;
/// In a group's word: pages of it have been used since it was last discarded.
const USED: u32 = 1 << 30;
/// In a group's word: pages in use.
const LIVE: u32 = USED - 1;

/// Zeroed memory for the descriptors of a pagemap.
#[derive(Clone, Copy, Debug)]
pub struct DescriptorMemory {
    words: NonNull<u32>,
}

impl DescriptorMemory {
    /// Memory that starts at `words`.
    pub const fn new(words: NonNull<u32>) -> Self {
        Self { words }
    }

    /// Bytes needed for a device of `pages` pages. Only what is used will be touched.
    pub const fn bytes_for(pages: PageCount) -> usize {
        (words_for(pages.get())) * size_of::<u32>()
    }
}

const fn words_for(pages: usize) -> usize {
    1 + pages.div_ceil(GROUP_PAGES) + pages
}

/// Where the counts lie: word 0 counts the live pages, then a word for every group, then one for every
/// page.
pub(super) struct Descriptors {
    words: NonNull<AtomicU32>,
    pages: usize,
    _owned: Option<Box<[AtomicU32]>>,
}

// SAFETY: an array of atomics, valid as long as `self` is, by the constructors' contracts.
unsafe impl Send for Descriptors {}
// SAFETY: as above; all access goes through atomics.
unsafe impl Sync for Descriptors {}

impl Descriptors {
    pub(super) fn owned(pages: PageCount) -> Self {
        // SAFETY: all bytes zero are an atomic integer.
        let owned: Box<[AtomicU32]> = unsafe { zeroed(words_for(pages.get())) };
        let words = NonNull::from(&*owned).cast();
        Self { words, pages: pages.get(), _owned: Some(owned) }
    }

    /// # Safety
    /// As [`super::Pagemap::over`].
    pub(super) unsafe fn over(memory: DescriptorMemory, pages: PageCount) -> Self {
        Self { words: memory.words.cast(), pages: pages.get(), _owned: None }
    }

    fn word(&self, index: usize) -> &AtomicU32 {
        debug_assert!(index < words_for(self.pages));
        // SAFETY: callers stay inside the array, which lives as long as `self`.
        unsafe { self.words.add(index).as_ref() }
    }

    fn groups(&self) -> usize {
        self.pages.div_ceil(GROUP_PAGES)
    }

    fn group(&self, page: usize) -> &AtomicU32 {
        self.word(1 + page / GROUP_PAGES)
    }

    fn page(&self, page: usize) -> &AtomicU32 {
        assert!(page < self.pages, "page {page} of a device of {} pages", self.pages);
        self.word(1 + self.groups() + page)
    }

    pub(super) fn live(&self) -> PageCount {
        PageCount::new(self.word(0).load(Ordering::Relaxed) as usize)
    }

    pub(super) fn count(&self, page: usize) -> u32 {
        self.page(page).load(Ordering::Acquire)
    }

    /// Reserves up to `most` pages' worth of a group's room, so that no discard starts.
    fn enter(&self, page: usize, most: u32) -> u32 {
        let group = self.group(page);
        let size = GROUP_PAGES.min(self.pages - page / GROUP_PAGES * GROUP_PAGES) as u32;
        let mut seen = group.load(Ordering::Relaxed);
        loop {
            let room = size - (seen & LIVE).min(size);
            let take = most.min(room);
            if seen & GUARD != 0 || take == 0 {
                return 0;
            }
            match group.compare_exchange_weak(
                seen,
                (seen + take) | USED,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return take,
                Err(now) => seen = now,
            }
        }
    }

    fn leave(&self, page: usize, pages: u32) {
        let before = self.group(page).fetch_sub(pages, Ordering::Release);
        debug_assert!(before & LIVE >= pages, "a group lost more pages than it had");
    }

    /// Finds up to `most` consecutive free pages at or behind `from`, then from the start.
    pub(super) fn allocate(&self, from: usize, most: usize) -> Option<(usize, usize)> {
        let from = if from < self.pages { from } else { 0 };
        let first_group = from / GROUP_PAGES;
        // The first group comes up twice: from `from` on at first, from its start at last.
        for step in 0..=self.groups() {
            let group = (first_group + step) % self.groups();
            let start = if step == 0 { from } else { group * GROUP_PAGES };
            let end = self.pages.min((group + 1) * GROUP_PAGES);
            let room = self.enter(group * GROUP_PAGES, most.min(end - start) as u32) as usize;
            if room == 0 {
                continue;
            }
            let found = self.claim_run(start, end, room);
            let got = found.map_or(0, |(_, len)| len);
            if got < room {
                self.leave(group * GROUP_PAGES, (room - got) as u32);
            }
            if let Some(run) = found {
                self.word(0).fetch_add(run.1 as u32, Ordering::Relaxed);
                return Some(run);
            }
        }
        None
    }

    fn claim_run(&self, start: usize, end: usize, most: usize) -> Option<(usize, usize)> {
        let claim = |page: usize| {
            let count = self.page(page);
            count.load(Ordering::Relaxed) == 0
                && count.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let first = (start..end).find(|page| claim(*page))?;
        let len = 1 + (first + 1..end.min(first + most)).take_while(|page| claim(*page)).count();
        Some((first, len))
    }

    /// Takes a whole group of which no page is in use.
    pub(super) fn allocate_group(&self) -> Option<usize> {
        for group in 0..self.pages / GROUP_PAGES {
            let word = self.word(1 + group);
            let seen = word.load(Ordering::Relaxed);
            if seen & (LIVE | GUARD) == 0
                && word
                    .compare_exchange(seen, GROUP_PAGES as u32 | USED, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                let first = group * GROUP_PAGES;
                for page in first..first + GROUP_PAGES {
                    // The group's room is all ours, so that nobody else can claim a page of it.
                    self.page(page).store(1, Ordering::Relaxed);
                }
                self.word(0).fetch_add(GROUP_PAGES as u32, Ordering::Relaxed);
                return Some(first);
            }
        }
        None
    }

    pub(super) fn get(&self, page: usize) {
        let before = self.page(page).fetch_add(1, Ordering::Relaxed);
        debug_assert!(before > 0, "a reference to the free page {page}");
    }

    pub(super) fn put(&self, page: usize) {
        self.put_range(page, 1);
    }

    /// One reference less to each of `len` pages of one group, which are counted out of it in one step.
    pub(super) fn put_range(&self, first: usize, len: usize) {
        let freed = (first..first + len).filter(|page| self.release(*page)).count() as u32;
        if freed > 0 {
            self.word(0).fetch_sub(freed, Ordering::Relaxed);
            self.leave(first, freed);
        }
    }

    /// One reference less; whether that was the last.
    fn release(&self, page: usize) -> bool {
        let count = self.page(page);
        let mut seen = count.load(Ordering::Relaxed);
        loop {
            debug_assert!(seen > 0, "a reference too few to page {page}");
            if seen == 0 {
                return false;
            }
            match count.compare_exchange_weak(seen, seen - 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return seen == 1,
                Err(now) => seen = now,
            }
        }
    }

    pub(super) fn free_all(&self) -> PageCount {
        let mut freed = 0;
        let used = |group: &usize| self.word(1 + group).load(Ordering::Acquire) & LIVE != 0;
        for group in (0..self.groups()).filter(used) {
            for page in group * GROUP_PAGES..self.pages.min((group + 1) * GROUP_PAGES) {
                freed += usize::from(self.page(page).swap(0, Ordering::AcqRel) > 0);
            }
            self.word(1 + group).store(USED, Ordering::Release);
        }
        self.word(0).store(0, Ordering::Relaxed);
        PageCount::new(freed)
    }

    /// Finds a group that was used and is empty now, and keeps allocation out of it.
    pub(super) fn guard_idle_group(&self) -> Option<usize> {
        (0..self.groups()).find(|group| {
            let word = self.word(1 + group);
            word.load(Ordering::Relaxed) == USED
                && word.compare_exchange(USED, GUARD, Ordering::Acquire, Ordering::Relaxed).is_ok()
        })
    }

    pub(super) fn unguard(&self, group: usize) {
        self.word(1 + group).store(0, Ordering::Release);
    }
}
