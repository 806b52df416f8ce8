//! Sleeping on a word of memory.
//!
//! What     [`wait`] and [`wake`] on a 32-bit word, their [`wait_shared`] and [`wake_shared`] forms for words
//!          in memory that several processes map, and [`Lock`], a mutex made of them.
//! Why      the locks of the standard library use thread-local storage to note panics, which the raw threads
//!          of [`crate::thread`] do not have.
//! Owns     nothing but the value inside a [`Lock`].
//! Fails    never: a wait may end for no reason, and every caller looks at its condition again.

use core::cell::UnsafeCell;
use core::fmt;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::time::Duration;

use rustix::io::Errno;
use rustix::thread::futex::{self, Flags, Timespec};

/// Why a wait ended.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// Somebody woke the word, or the wait ended for no reason.
    Woken,
    /// The word did not hold the expected value: there was no wait.
    Changed,
    /// The time is over.
    TimedOut,
}

/// Sleeps while `word` holds `expected`, until a [`wake`] or for `timeout` at most. May end early.
pub fn wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> Wait {
    sleep(word, Flags::PRIVATE, expected, timeout)
}

/// Wakes at most `n` of the threads of this process that [`wait`] on `word`; says how many there were.
pub fn wake(word: &AtomicU32, n: u32) -> usize {
    rouse(word, Flags::PRIVATE, n)
}

/// [`wait`] for a word in memory shared between processes.
pub fn wait_shared(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> Wait {
    sleep(word, Flags::empty(), expected, timeout)
}

/// [`wake`] for a word in memory shared between processes.
pub fn wake_shared(word: &AtomicU32, n: u32) -> usize {
    rouse(word, Flags::empty(), n)
}

fn sleep(word: &AtomicU32, flags: Flags, expected: u32, timeout: Option<Duration>) -> Wait {
    // A time that does not fit is longer than anybody waits.
    let limit = timeout.and_then(|time| {
        let tv_sec = time.as_secs().try_into().ok()?;
        Some(Timespec { tv_sec, tv_nsec: time.subsec_nanos().into() })
    });
    match futex::wait(word, flags, expected, limit.as_ref()) {
        Err(Errno::AGAIN) => Wait::Changed,
        Err(Errno::TIMEDOUT) => Wait::TimedOut,
        // A signal (INTR) counts as woken. Other errors mean a kernel without futexes: do not hang.
        Ok(()) | Err(_) => Wait::Woken,
    }
}

fn rouse(word: &AtomicU32, flags: Flags, n: u32) -> usize {
    // The kernel takes a signed number, of which the largest means everybody.
    let n = n.min(i32::MAX as u32);
    // Fails only for a word that is not mapped, which a reference rules out.
    futex::wake(word, flags, n).unwrap_or(0)
}

const FREE: u32 = 0;
const HELD: u32 = 1;
const CONTENDED: u32 = 2;

/// How often a lock that is held is looked at again before its thread sleeps.
const SPINS: u32 = 64;

/// A mutex that works in every thread: no thread-local storage, no poisoning, no allocation.
///
/// Not fair and not recursive. After `fork` the child sees it as the parent's threads left it.
pub struct Lock<T: ?Sized> {
    word: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: a `Lock` owns its value; whoever gets the lock may move out of or drop the value (`&mut T`), which
// is allowed on any thread because T is Send.
unsafe impl<T: ?Sized + Send> Send for Lock<T> {}
// SAFETY: a shared `Lock` hands out the value to one guard at a time (`word`), with Acquire on taking and
// Release on letting go, so that sharing it amounts to sending T from thread to thread.
unsafe impl<T: ?Sized + Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// A free lock around `value`.
    pub const fn new(value: T) -> Self {
        Self { word: AtomicU32::new(FREE), value: UnsafeCell::new(value) }
    }

    /// The value; nobody else can have it.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

impl<T: ?Sized> Lock<T> {
    /// Takes the lock, sleeping until it is free.
    pub fn lock(&self) -> Guard<'_, T> {
        if self.word.compare_exchange(FREE, HELD, Acquire, Relaxed).is_err() {
            self.lock_slow();
        }
        Guard { lock: self }
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> Option<Guard<'_, T>> {
        self.word.compare_exchange(FREE, HELD, Acquire, Relaxed).ok()?;
        Some(Guard { lock: self })
    }

    /// The value, without locking: the exclusive borrow shows that nobody else has it.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    #[cold]
    fn lock_slow(&self) {
        for _ in 0..SPINS {
            if self.word.load(Relaxed) == FREE
                && self.word.compare_exchange(FREE, HELD, Acquire, Relaxed).is_ok()
            {
                return;
            }
            core::hint::spin_loop();
        }
        // Others may sleep as well, so the lock is taken as contended: its release then wakes one.
        while self.word.swap(CONTENDED, Acquire) != FREE {
            let _ = wait(&self.word, CONTENDED, None);
        }
    }
}

impl<T: ?Sized> fmt::Debug for Lock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.word.load(Relaxed) == FREE { "Lock(free)" } else { "Lock(held)" })
    }
}

/// The value of a [`Lock`], until dropped.
#[must_use]
pub struct Guard<'a, T: ?Sized> {
    lock: &'a Lock<T>,
}

// SAFETY: `&Guard` gives out `&T` and nothing else, and the lock is not bound to the thread that took it.
unsafe impl<T: ?Sized + Sync> Sync for Guard<'_, T> {}

impl<T: ?Sized> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: this guard exists, so it holds the lock, and the one guard is the only way to the value;
        // the borrow of the guard keeps `deref_mut` away meanwhile.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T: ?Sized> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`; the exclusive borrow of the guard makes the reference the only one.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T: ?Sized> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        if self.lock.word.swap(FREE, Release) == CONTENDED {
            wake(&self.lock.word, 1);
        }
    }
}

#[cfg(test)]
mod tests;
