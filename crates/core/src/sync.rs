//! The switch between the real atomics and loom's, and the two locks of this crate.
//!
//! What   every module takes its atomics from here, never from `core` or `std`, so that
//!        `RUSTFLAGS="--cfg loom" cargo test -p uhmm-core --release loom` explores the code that ships.
//!        [`Gate`] is a lock with readers and a writer, [`Park`] how its waiters sleep; `locked` puts a value
//!        behind it.
//! Why    a lock of the standard library may allocate, keeps thread-local state, and cannot be told how to
//!        sleep inside a program that is not ours.
//! Fails  nothing here fails; a lock whose holder died stays locked.

pub(crate) mod locked;
#[cfg(all(test, loom))]
pub(crate) mod loom;
#[cfg(all(test, not(loom)))]
mod tests;

use alloc::boxed::Box;

#[cfg(not(loom))]
pub use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

#[cfg(loom)]
pub use ::loom::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

/// How a thread sleeps until another one has changed a word (a futex).
pub trait Park: Send + Sync {
    /// Sleeps unless `word` no longer holds `expected`; returns when woken, after a bounded time, or for
    /// no reason at all.
    fn park(&self, word: &AtomicU32, expected: u32);

    /// Wakes every thread that sleeps on `word`.
    fn unpark(&self, word: &AtomicU32);
}

/// So many values whose bytes are all zero, in memory that is not touched before they are; loom's have more to them
/// than their bytes, and are made one by one.
///
/// # Safety
/// All bytes zero must be a valid `T`, and the same as its default.
pub(crate) unsafe fn zeroed<T: Default>(count: usize) -> Box<[T]> {
    #[cfg(not(loom))]
    {
        // SAFETY: the caller's promise.
        unsafe { Box::<[T]>::new_zeroed_slice(count).assume_init() }
    }
    #[cfg(loom)]
    {
        (0..count).map(|_| T::default()).collect()
    }
}

/// Tells the processor (or the model) that this thread waits for another one.
pub(crate) fn relax() {
    #[cfg(not(loom))]
    core::hint::spin_loop();
    #[cfg(loom)]
    ::loom::thread::yield_now();
}

const WRITER: u32 = 1 << 31;
const WAITING: u32 = 1 << 30;
const TURN: u32 = 1 << 29;
const READERS: u32 = TURN - 1;
/// Looks before sleeping: as long as it takes to be woken, which is longer than the lock is held, as a rule.
const SPINS: u32 = if cfg!(loom) { 1 } else { 512 };

/// Who waits, and what he may ask of others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// A writer, who keeps out whoever comes later.
    Write,
    /// A reader, or somebody who only waits for a writer to be gone.
    Read,
}

/// A lock held by many readers or by one writer; a waiting writer goes before new readers.
///
/// A writer that has slept and finds the lock taken again says that it is its turn: from then on those alone may take
/// the lock who have slept for it as well. Whoever lets go and comes back at once would otherwise be faster each time
/// than the sleeper is woken, and the sleeper, who may be a fault handler, would wait for as long as that goes on.
///
/// Not recursive. It guards a protocol, not a value: what it protects is said where it lives.
#[derive(Debug)]
pub struct Gate {
    // WRITER: held for writing. WAITING: somebody may sleep on the word. TURN: a writer that has slept is next. It goes
    // when anybody who has slept takes the open lock, so that who set it last is still waiting, and will take it; in a
    // forked child, which has the word and not the waiter, it costs the next one a sleep. The rest: number of readers.
    word: AtomicU32,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Gate {
    /// A lock that nobody holds.
    #[cfg(not(loom))]
    pub const fn new() -> Self {
        Self { word: AtomicU32::new(0) }
    }

    /// A lock that nobody holds.
    #[cfg(loom)]
    pub fn new() -> Self {
        Self { word: AtomicU32::new(0) }
    }

    /// Waits until no writer holds or wants the lock, and joins the readers.
    pub fn read<'a, P: Park + ?Sized>(&'a self, park: &'a P) -> ReadGuard<'a, P> {
        self.acquire(park, Wait::Read, |word, slept| match word & (WRITER | WAITING | TURN) {
            0 => Some(word + 1),
            _ if slept && word & (WRITER | READERS) == 0 => Some((word & !TURN) + 1),
            _ => None,
        });
        ReadGuard { gate: self, park }
    }

    /// Waits until nobody holds the lock, and holds it alone.
    pub fn write<'a, P: Park + ?Sized>(&'a self, park: &'a P) -> WriteGuard<'a, P> {
        self.acquire(park, Wait::Write, |word, slept| {
            let (barred, next) = if slept { (0, word & !TURN) } else { (TURN, word) };
            (word & (WRITER | READERS | barred) == 0).then_some(next | WRITER)
        });
        WriteGuard { gate: self, park }
    }

    /// Holds the lock alone, if nobody holds it now and it is nobody's turn.
    pub fn try_write<'a, P: Park + ?Sized>(&'a self, park: &'a P) -> Option<WriteGuard<'a, P>> {
        let mut word = self.word.load(Ordering::Relaxed);
        while word & (WRITER | READERS | TURN) == 0 {
            match self.word.compare_exchange(word, word | WRITER, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(WriteGuard { gate: self, park }),
                Err(now) => word = now,
            }
        }
        None
    }

    /// Waits until the writer that holds the lock now, if any, has let it go.
    pub fn pass<P: Park + ?Sized>(&self, park: &P) {
        self.acquire(park, Wait::Read, |word, _| (word & WRITER == 0).then_some(word));
    }

    /// Ends a hold for writing whose guard was forgotten.
    pub(crate) fn release_forgotten<P: Park + ?Sized>(&self, park: &P) {
        // In a forked child there is nobody left whose turn it was; in the parent he says so again.
        self.word.fetch_and(!TURN, Ordering::Relaxed);
        self.release(park, WRITER);
    }

    /// `step`: what the word becomes if it can be taken as it is, by one who has slept for it or has not.
    ///
    /// A writer keeps whoever comes later out from the beginning, not only once it sleeps. A reader that comes back
    /// again and again would be faster each time than a sleeper is woken.
    fn acquire<P: Park + ?Sized>(&self, park: &P, wait: Wait, step: impl Fn(u32, bool) -> Option<u32>) {
        let (mut spins, mut slept) = (0, false);
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let mark = if slept && wait == Wait::Write { WAITING | TURN } else { WAITING };
            if let Some(next) = step(word, slept) {
                match self.word.compare_exchange_weak(word, next, Ordering::Acquire, Ordering::Relaxed) {
                    Ok(_) => return,
                    Err(seen) => word = seen,
                }
            } else if spins < SPINS && (word & mark == mark || wait == Wait::Read) {
                spins += 1;
                relax();
                word = self.word.load(Ordering::Relaxed);
            } else if word & mark != mark {
                match self.word.compare_exchange_weak(word, word | mark, Ordering::Relaxed, Ordering::Relaxed)
                {
                    Ok(_) => word |= mark,
                    Err(seen) => word = seen,
                }
            } else {
                park.park(&self.word, word);
                (spins, slept) = (0, true);
                word = self.word.load(Ordering::Relaxed);
            }
        }
    }

    fn release<P: Park + ?Sized>(&self, park: &P, held: u32) {
        let before = self.word.fetch_sub(held, Ordering::Release);
        let left = before - held;
        // The last one out opens the gate to all who wait; they settle the order among themselves. Where the word has
        // changed somebody is in again, and opens it then.
        if left & !TURN == WAITING
            && self.word.compare_exchange(left, left & !WAITING, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            park.unpark(&self.word);
        }
    }
}

/// Proof that the gate is held for reading.
///
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # use uhmm_core::sync::{Gate, Park};
/// fn read<P: Park>(gate: &Gate, park: &P) {
///     gate.read(park);
/// }
/// ```
#[must_use]
#[derive(Debug)]
pub struct ReadGuard<'a, P: Park + ?Sized> {
    gate: &'a Gate,
    park: &'a P,
}

/// Proof that the gate is held for writing.
///
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # use uhmm_core::sync::{Gate, Park};
/// fn write<P: Park>(gate: &Gate, park: &P) {
///     gate.write(park);
/// }
/// ```
/// ```
/// #![deny(unused_must_use)]
/// # use uhmm_core::sync::{Gate, Park};
/// fn write<P: Park>(gate: &Gate, park: &P) {
///     let _alone = gate.write(park);
/// }
/// ```
#[must_use]
#[derive(Debug)]
pub struct WriteGuard<'a, P: Park + ?Sized> {
    gate: &'a Gate,
    park: &'a P,
}

impl<P: Park + ?Sized> Drop for ReadGuard<'_, P> {
    fn drop(&mut self) {
        self.gate.release(self.park, 1);
    }
}

impl<P: Park + ?Sized> Drop for WriteGuard<'_, P> {
    fn drop(&mut self) {
        self.gate.release(self.park, WRITER);
    }
}
