//! Waiting for a read without falling asleep.
//!
//! What     [`Awake`] says whether to, and [`Awake::wait`] does it: it gives the processor to whoever else wants
//!          it and looks again, for a moment at most; the caller sleeps for the rest.
//! Why      an idle processor takes longer to wake than a good disk takes to answer. Where the processor is
//!          virtual, a page of 75 us takes 105 to 140 us to whoever sleeps (README, figures). The kernel does the
//!          same below us where its `haltpoll` governor runs.
//! Which    only what a fault waits for. Where others want the processor, or where the disk takes longer, it is
//!          left alone for a while that doubles each time.
//! Races    the numbers are hints in relaxed atomics; a lost update costs one sleep, or one wait.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::clock::now;

/// The longest wait: what `guest_halt_poll_ns` is by default.
const LONGEST: Duration = Duration::from_micros(200);
/// Whoever was given the processor for so long had work to do.
const WANTED: Duration = Duration::from_micros(100);
/// The most reads in a row that sleep before one is waited for again.
const MOST_ASLEEP: u32 = 1 << 10;

/// Whether waiting awake has been worth it of late.
#[derive(Debug, Default)]
pub struct Awake {
    /// Reads that are yet to sleep.
    asleep: AtomicU32,
    /// How many there were the last time.
    last: AtomicU32,
}

impl Awake {
    /// Worth it, until shown otherwise.
    pub const fn new() -> Self {
        Self { asleep: AtomicU32::new(0), last: AtomicU32::new(0) }
    }

    /// Whether the next read is to be waited for awake.
    pub fn begin(&self) -> bool {
        let asleep = self.asleep.load(Ordering::Relaxed);
        if asleep > 0 {
            self.asleep.store(asleep - 1, Ordering::Relaxed);
        }
        asleep == 0
    }

    /// Asks `is_done` again and again; `false` if it did not come true soon.
    pub fn wait(&self, mut is_done: impl FnMut() -> bool) -> bool {
        let start = now();
        let mut before = start;
        loop {
            if is_done() {
                self.last.store(0, Ordering::Relaxed);
                return true;
            }
            rustix::thread::sched_yield();
            let after = now();
            let wanted = after.saturating_sub(before) > WANTED;
            before = after;
            if wanted || after.saturating_sub(start) > LONGEST {
                let asleep = (2 * self.last.load(Ordering::Relaxed)).clamp(1, MOST_ASLEEP);
                self.last.store(asleep, Ordering::Relaxed);
                self.asleep.store(asleep, Ordering::Relaxed);
                return is_done();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_slow_is_left_alone_for_longer_each_time() {
        let awake = Awake::default();
        let mut gaps = Vec::new();
        for _ in 0..12 {
            assert!(awake.begin());
            assert!(!awake.wait(|| false));
            gaps.push((0..).take_while(|_| !awake.begin()).count());
        }
        assert_eq!(gaps[..4], [1, 2, 4, 8]);
        assert_eq!(gaps[11], MOST_ASLEEP as usize);
    }

    #[test]
    fn what_is_soon_done_is_waited_for_every_time() {
        let awake = Awake::default();
        for _ in 0..100 {
            assert!(awake.begin() && awake.wait(|| true));
        }
    }
}
