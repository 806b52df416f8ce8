//! The transitions of a page word. Each is one atomic step and says what its caller must do next.

use crate::sync::{AtomicU32, AtomicU64, Ordering};

use super::{Kind, PageWord, State};

/// One word of the table.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'t> {
    word: &'t AtomicU64,
    /// Pages of its chunk, and some others, that are away.
    away: Option<&'t AtomicU32>,
}

/// What became of a claim when it was given up ([`Entry::leave`]).
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leave {
    /// Somebody waits for the page and must be woken.
    pub wake: bool,
    /// The program gave the page's contents up meanwhile: the word is now empty, and what the page owned is
    /// the caller's to free.
    pub discarded: bool,
}

/// What a discard of the page's contents did ([`Entry::discard`]).
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Discard {
    /// The word was settled; its old value's payload is the caller's to free.
    Took(PageWord),
    /// Some thread moves the page and will find the flag when it is done.
    Flagged,
}

impl<'t> Entry<'t> {
    pub(super) const fn new(word: &'t AtomicU64, away: Option<&'t AtomicU32>) -> Self {
        Self { word, away }
    }

    /// Carries out `step` from one word to another, counting pages that are away: one that leaves is counted before it is
    /// gone, and one that comes until it is there.
    fn counted<E>(
        self,
        was_home: bool,
        is_home: bool,
        step: impl FnOnce(&AtomicU64) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(away) = self.away.filter(|_| was_home != is_home) else { return step(self.word) };
        if was_home {
            away.fetch_add(1, Ordering::AcqRel);
        }
        let done = step(self.word);
        if was_home != done.is_ok() {
            away.fetch_sub(1, Ordering::AcqRel);
        }
        done
    }

    /// The word as it is now.
    pub fn load(self) -> PageWord {
        PageWord::from_raw(self.word.load(Ordering::Acquire))
    }

    /// One step from `seen` to `next`. On failure, the word that is there instead.
    ///
    /// A claim (`next` moving) transfers what `seen` owns to the caller.
    pub fn exchange(self, seen: PageWord, next: PageWord) -> Result<(), PageWord> {
        self.counted(seen.is_at_home(), next.is_at_home(), |word| {
            word.compare_exchange(seen.raw(), next.raw(), Ordering::AcqRel, Ordering::Acquire)
                .map(|_| ())
                .map_err(PageWord::from_raw)
        })
    }

    /// Gives a claim up: the page is now `next`. To be called by the claimant only.
    ///
    /// If the contents were given up meanwhile the word becomes empty instead: the page is not there any
    /// more, and whatever `next` would have owned falls to the caller. A page that was not brought home is not said to
    /// be where it was put: the claim may have changed how it is mapped.
    pub fn leave(self, next: PageWord) -> Leave {
        let mut seen = self.load();
        loop {
            debug_assert!(seen.state() == State::Moving, "only a claim can be left: {seen:?}");
            let discarded = seen.is_discarded();
            let pinned = seen.is_pinned();
            let next = match seen.kind() {
                _ if !discarded => next,
                // The page is still there, and the kernel may be yet to take it away.
                Some(Kind::Out) => PageWord::EMPTY.with_discarded(),
                Some(Kind::In) if next.state() == State::Coherent => PageWord::EMPTY.with_discarded(),
                _ => PageWord::EMPTY,
            };
            let next = match seen.kind() {
                Some(Kind::In | Kind::Back) => next,
                _ => next.without_installed(),
            };
            let next = next.with_pinned(pinned);
            match self.exchange(seen, next) {
                Ok(()) => return Leave { wake: seen.is_waited(), discarded },
                Err(now) => seen = now,
            }
        }
    }

    /// Notes on a moving page that somebody waits for it. `Err` with the present word if it has come to
    /// rest, in which case the caller looks again instead of waiting.
    pub fn wait(self) -> Result<(), PageWord> {
        let mut seen = self.load();
        loop {
            if seen.state() != State::Moving {
                return Err(seen);
            }
            if seen.is_waited() {
                return Ok(());
            }
            match self.exchange(seen, seen.with_waited()) {
                Ok(()) => return Ok(()),
                Err(now) => seen = now,
            }
        }
    }

    /// The program gives the contents up. A settled page becomes empty; it may not be moved out until it
    /// has been filled again, if `hold` says that the kernel is yet to take the old page away.
    pub fn discard(self, hold: bool) -> Discard {
        let mut seen = self.load();
        loop {
            let moving = seen.state() == State::Moving;
            let next = if moving {
                seen.with_discarded()
            } else if hold {
                PageWord::EMPTY.with_discarded().with_pinned(seen.is_pinned())
            } else {
                PageWord::EMPTY
            };
            match self.exchange(seen, next) {
                Ok(()) if moving => return Discard::Flagged,
                Ok(()) => return Discard::Took(seen),
                Err(now) => seen = now,
            }
        }
    }

    /// Changes the flags of a settled word by `change`, which must not touch state or payload. Does nothing
    /// to a moving page. Says whether it was done.
    pub fn annotate(self, change: impl Fn(PageWord) -> PageWord) -> bool {
        let mut seen = self.load();
        loop {
            if seen.state() == State::Moving {
                return false;
            }
            match self.exchange(seen, change(seen)) {
                Ok(()) => return true,
                Err(now) => seen = now,
            }
        }
    }

    /// Stores a word whatever the old one is: for tables, and pages, that nobody else uses yet.
    pub fn store(self, word: PageWord) {
        let mut seen = self.load();
        while let Err(now) = self.exchange(seen, word) {
            seen = now;
        }
    }
}
