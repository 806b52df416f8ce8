//! The page table: one word per page of the managed address space.
//!
//! What    [`PageTable`], a flat array of [`PageWord`]s indexed by virtual page number, and [`Entry`], one
//!         of them, whose transitions are the only way to change it.
//!         [`PageTable::used`] finds the chunks that any word was ever looked up in.
//! Why     a flat array over reserved, lazily backed memory needs no allocation and no lock to look a page
//!         up, which is what a fault handler needs (rule R7), and costs memory only where pages are used.
//! Owns    a word owns the device page or the arena slot in its payload: whoever takes the payload out of
//!         the word by a transition owns it from then on.
//! Claims  `Moving` is a claim: the thread that made the transition to it, and nobody else, leaves it. Others
//!         may only add the waited flag (and must then be woken) and the discarded flag.
//! Locks   none. The table as a whole changes shape (unmap, remap, fork) under the layout lock only.
//! Fails   a transition that lost a race returns the word that it found.

mod away;
mod entry;
#[cfg(all(test, loom))]
mod loom;
pub mod reuse;
#[cfg(all(test, not(loom)))]
mod tests;
mod word;

use alloc::boxed::Box;
use core::fmt;
use core::ptr::NonNull;

use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, Vpn};

use away::Away;
pub use entry::{Discard, Entry, Leave};
pub use word::{Kind, PageWord, State};

use crate::sync::{AtomicU64, Ordering};

/// The words of all pages from `first` on.
pub struct PageTable {
    words: NonNull<AtomicU64>,
    first: Vpn,
    pages: PageCount,
    // One bit for every chunk: looking a word up backs its memory, so that walks must know where to go.
    used: NonNull<AtomicU64>,
    /// `None` where pages may have been away before.
    away: Option<Away>,
    _owned: Option<[Box<[AtomicU64]>; 2]>,
}

// SAFETY: the table is an array of atomics that lives as long as the table does (see the constructors).
unsafe impl Send for PageTable {}
// SAFETY: as above; all access goes through atomics.
unsafe impl Sync for PageTable {}

impl fmt::Debug for PageTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable").field("first", &self.first).field("pages", &self.pages).finish()
    }
}

fn load(word: &AtomicU64) -> PageWord {
    PageWord::from_raw(word.load(Ordering::Acquire))
}

impl PageTable {
    /// A table over memory that the caller provides: reserved address space, private or shared between
    /// processes, whose bytes are zero where nothing was stored yet.
    ///
    /// # Safety
    /// `words` must be aligned and valid for reads and writes of `pages` words, and `used` of
    /// [`PageTable::used_words`], as long as the table lives, and be accessed as this table only. `first`
    /// must start a chunk.
    #[cfg(not(loom))]
    pub unsafe fn over(words: NonNull<u64>, used: NonNull<u64>, first: Vpn, pages: PageCount) -> Self {
        Self { words: words.cast(), first, pages, used: used.cast(), away: None, _owned: None }
    }

    /// The same, over memory that is all zero: nothing is away yet. Chunks without a page that is away are known as such
    /// from then on.
    ///
    /// # Safety
    /// As with [`PageTable::over`]; and no other table is over this memory as long as this one is used.
    #[cfg(not(loom))]
    pub unsafe fn over_zeros(words: NonNull<u64>, used: NonNull<u64>, first: Vpn, pages: PageCount) -> Self {
        // SAFETY: the caller's promise.
        Self { away: Some(Away::new()), ..unsafe { Self::over(words, used, first, pages) } }
    }

    /// Words needed to remember which chunks of `pages` pages are used.
    pub const fn used_words(pages: PageCount) -> usize {
        pages.get().div_ceil(CHUNK_PAGES).div_ceil(64)
    }

    /// A table in memory of its own, for small address spaces and for tests.
    pub fn owned(first: Vpn, pages: PageCount) -> Self {
        assert_eq!(first.in_chunk(), 0, "a table starts at a chunk");
        let zeros = |len: usize| -> Box<[AtomicU64]> { (0..len).map(|_| AtomicU64::new(0)).collect() };
        let owned = [zeros(pages.get()), zeros(pages.get().div_ceil(CHUNK_PAGES).div_ceil(64))];
        // The boxes are never moved out of, so that the pointers stay valid while the table lives.
        let (words, used) = (NonNull::from(&*owned[0]).cast(), NonNull::from(&*owned[1]).cast());
        Self { words, first, pages, used, away: Some(Away::new()), _owned: Some(owned) }
    }

    /// The pages for which the table has words.
    ///
    /// # Panics
    /// If there are none.
    pub fn range(&self) -> VaRange {
        VaRange::of_pages(self.first, self.pages).expect("a table has words")
    }

    /// Whether the table has a word for every page of `range`.
    pub fn covers(&self, range: VaRange) -> bool {
        self.first <= range.first() && range.end_page() <= self.first.forward(self.pages)
    }

    /// The word of `page`.
    ///
    /// # Panics
    /// If the table does not cover the page.
    pub fn entry(&self, page: Vpn) -> Entry<'_> {
        self.get(page).expect("the page lies outside of the page table")
    }

    /// The word of `page`, if the table covers it.
    pub fn get(&self, page: Vpn) -> Option<Entry<'_>> {
        let index = page.get().checked_sub(self.first.get()).filter(|index| *index < self.pages.get())?;
        let (word, bit) = self.used_bit(index / CHUNK_PAGES);
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::Relaxed);
        }
        // SAFETY: the index is inside the array, which lives as long as `self` by the constructors'
        // contracts.
        let word = unsafe { self.words.add(index).as_ref() };
        Some(Entry::new(word, self.away.as_ref().map(|away| away.of(index / CHUNK_PAGES))))
    }

    /// The words of the pages of `range`, in order, as they are when the iterator comes to them. For parts that are in
    /// use ([`PageTable::used`]): looking backs their memory, and nothing notes that it is.
    ///
    /// # Panics
    /// If the table does not cover the range.
    pub fn words(&self, range: VaRange) -> impl Iterator<Item = PageWord> {
        self.atomics(range).iter().map(load)
    }

    /// The first page of `range` whose word is not that of a page in RAM ([`PageWord::is_at_home`]), and the word. Looks
    /// as [`PageTable::words`] does.
    ///
    /// # Panics
    /// If the table does not cover the range.
    pub fn first_away(&self, range: VaRange) -> Option<(Vpn, PageWord)> {
        // Words that are looked at in one step: those of pages that are all at home are most of what is looked at.
        const STEP: usize = 8;
        for (n, words) in self.atomics(range).chunks(STEP).enumerate() {
            let all = words.iter().fold(0, |all, word| all | load(word).raw());
            if PageWord::from_raw(all).is_at_home() {
                continue;
            }
            // What was away may be back by now.
            let away = words.iter().map(load).enumerate().find(|(_, word)| !word.is_at_home());
            if let Some((at, word)) = away {
                return Some((range.first().forward(PageCount::new(n * STEP + at)), word));
            }
        }
        None
    }

    /// How many pages at the front of `range` were put where they are by ourselves ([`PageWord::is_installed`]).
    ///
    /// # Panics
    /// If the table does not cover the range.
    pub fn installed(&self, range: VaRange) -> PageCount {
        const STEP: usize = 8;
        let mut end = range.first();
        for part in self.used(range) {
            if part.first() != end {
                break;
            }
            for words in self.atomics(part).chunks(STEP) {
                let join = |(all, any), word| {
                    let word = load(word).raw();
                    (all & word, any | word)
                };
                let (all, any) = words.iter().fold((u64::MAX, 0), join);
                if !PageWord::are_installed(all, any) {
                    let here = words.iter().take_while(|word| load(word).is_installed()).count();
                    return end.forward(PageCount::new(here)).since(range.first());
                }
                end = end.forward(PageCount::new(words.len()));
            }
        }
        end.since(range.first())
    }

    /// How many pages at the front of `range`, to the end of a chunk, are to be looked at together: of each chunk the first
    /// page was not put where it is by ourselves. The first chunk's is known not to be.
    ///
    /// # Panics
    /// If the table does not cover the range.
    pub fn not_installed(&self, range: VaRange) -> PageCount {
        let mut pages = PageCount::ZERO;
        for part in range.chunks() {
            let begins = !pages.is_zero() && !self.installed(part.take(PageCount::ONE)).is_zero();
            if begins {
                break;
            }
            pages = pages.plus(part.pages());
        }
        pages
    }

    fn atomics(&self, range: VaRange) -> &[AtomicU64] {
        assert!(self.covers(range), "the pages lie outside of the page table");
        let first = range.first().since(self.first).get();
        // SAFETY: the words of the range are inside the array, as was just looked at, which lives as long as `self` by
        // the constructors' contracts.
        unsafe { core::slice::from_raw_parts(self.words.as_ptr().add(first), range.pages().get()) }
    }

    /// The parts of `range`, cut at chunk borders, of which a page may be away: all words of the others say
    /// [`PageWord::is_at_home`].
    pub fn away(&self, range: VaRange) -> impl Iterator<Item = VaRange> {
        self.used(range).filter(|part| {
            let chunk = part.first().since(self.first).get() / CHUNK_PAGES;
            self.away.as_ref().is_none_or(|away| away.of(chunk).load(Ordering::Acquire) > 0)
        })
    }

    fn used_bit(&self, chunk: usize) -> (&AtomicU64, u64) {
        // SAFETY: callers pass chunks of the table, for each of which the array has a bit.
        let word = unsafe { self.used.add(chunk / 64).as_ref() };
        (word, 1 << (chunk % 64))
    }

    /// The first chunk of the next word of bits that has a used one; of the word behind `range` if none has. All of an
    /// address space is a million words.
    fn next_word(&self, chunk: usize, range: VaRange) -> usize {
        let end = (range.end_page().since(self.first).get() - 1) / CHUNK_PAGES / 64 + 1;
        // SAFETY: the table has a bit for each chunk of its pages, of which `range` is a part.
        let is_empty = |word: usize| unsafe { self.used.add(word).as_ref() }.load(Ordering::Relaxed) == 0;
        let mut word = chunk / 64 + 1;
        while word < end && is_empty(word) {
            word += 1;
        }
        word * 64
    }

    /// The parts of `range` whose words may be other than empty, cut at chunk borders. Pages outside of the
    /// table have no words.
    pub fn used(&self, range: VaRange) -> impl Iterator<Item = VaRange> {
        let all = VaRange::of_pages(self.first, self.pages);
        let mut rest = all.and_then(|all| range.intersect(all));
        core::iter::from_fn(move || {
            loop {
                let here = rest?;
                let chunk = (here.first().get() - self.first.get()) / CHUNK_PAGES;
                let (word, bit) = self.used_bit(chunk);
                let bits = word.load(Ordering::Relaxed) & !(bit - 1);
                // Chunks from here to the next used one, or to the end of this word of bits.
                let ahead = bits.trailing_zeros() as usize;
                if ahead == chunk % 64 {
                    let part = here.take(PageCount::new(CHUNK_PAGES - here.first().in_chunk()));
                    rest = here.skip(part.pages());
                    return Some(part);
                }
                let next = if ahead < 64 { chunk / 64 * 64 + ahead } else { self.next_word(chunk, here) };
                rest = here.skip(PageCount::new((next - chunk) * CHUNK_PAGES - here.first().in_chunk()));
            }
        })
    }
}
