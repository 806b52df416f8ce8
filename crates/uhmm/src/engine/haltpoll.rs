//! Keeping the faulting thread's processor out of its halt while faults follow each other closely.
//!
//! What    [`HaltPoll`], a state shared by the handlers and one thread of lowest priority ([`keep_awake`]), which
//!         runs where the faulting thread waits, for as long as the faults go on and nobody else wants the processor.
//! Why     a processor that has nothing to do halts, and a halted one takes longer to wake than a good disk
//!         takes to answer: 30 to 70 us where it is virtual. The kernel's `haltpoll` governor does the same for
//!         itself; where it is not in use we do it, for a storm of faults only.
//!         Being there, it also does the wake-ups that the handlers leave to it ([`uhmm_sys::relay`]).
//! Policy  the thread is `SCHED_IDLE`: whatever else can run goes first, and the scheduler takes its processor for
//!         an idle one, so that the faulting thread wakes up where it was.
//! Aside   while a handler waits for a device again and again, whoever works in the background had better not be on
//!         its processor ([`Managed::busy_cpu`]): each step of his delays the answer.
//! Ends    a storm ends when no fault came for [`QUIET`]; the thread sleeps then.
//! Races   the fields are hints in relaxed atomics, but `storm`, on which the thread sleeps.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use uhmm_sys::clock::now;
use uhmm_sys::futex;
use uhmm_sys::placement;

use crate::managed::Managed;

/// Faults that follow each other closely before it is a storm.
const STORM: u32 = 4;
/// A storm is over when there was no fault for so long.
const QUIET: Duration = Duration::from_millis(4);
/// How often the thread looks whether the space is closing.
const IDLE: Duration = Duration::from_millis(100);
/// Looks at the relay, between two looks at the clock.
const SPINS: u32 = 200;

/// Whether faults follow each other closely, and where.
#[derive(Debug, Default)]
pub(super) struct HaltPoll {
    /// 1 during a storm.
    storm: AtomicU32,
    /// Faults in a row, each soon after the one before.
    streak: AtomicU32,
    /// When the last fault was answered, in nanoseconds.
    last: AtomicU64,
    /// Where its thread runs, plus one; 0 if that is not known.
    place: AtomicU32,
}

impl HaltPoll {
    pub(super) const fn new() -> Self {
        Self {
            storm: AtomicU32::new(0),
            streak: AtomicU32::new(0),
            last: AtomicU64::new(0),
            place: AtomicU32::new(0),
        }
    }

    /// A thread that runs on `cpu` got the answer to its fault `at` this time. Whether there is a storm.
    pub(super) fn note(&self, cpu: Option<u32>, at: Duration) -> bool {
        let at = at.as_nanos() as u64;
        let gap = at.saturating_sub(self.last.swap(at, Ordering::Relaxed));
        self.place.store(cpu.map_or(0, |cpu| cpu + 1), Ordering::Relaxed);
        if gap > QUIET.as_nanos() as u64 {
            self.streak.store(0, Ordering::Relaxed);
        } else if self.streak.fetch_add(1, Ordering::Relaxed) > STORM
            && self.storm.load(Ordering::Relaxed) == 0
            && self.storm.swap(1, Ordering::Release) == 0
        {
            futex::wake(&self.storm, 1);
        }
        self.storm.load(Ordering::Relaxed) == 1
    }

    /// Lets the thread of lowest priority notice that the space is closing.
    pub(super) fn wake(&self) {
        futex::wake(&self.storm, 1);
    }
}

/// The life of the thread of lowest priority.
pub(super) fn keep_awake(managed: &Managed, halt: &HaltPoll) {
    if placement::yield_to_all().is_err() {
        return;
    }
    let relay = managed.mm().host().relay();
    let wake = |range| managed.mm().host().program().wake(range);
    let mut here = None;
    while !managed.mm().is_closed() {
        if halt.storm.load(Ordering::Acquire) == 0 {
            let _ = futex::wait(&halt.storm, 0, Some(IDLE));
            continue;
        }
        let place = halt.place.load(Ordering::Relaxed).checked_sub(1);
        if let Some(cpu) = place
            && here != place
            && placement::set_affinity(cpu).is_ok()
        {
            here = place;
        }
        for _ in 0..SPINS {
            relay.listen(wake);
            std::hint::spin_loop();
        }
        let last = Duration::from_nanos(halt.last.load(Ordering::Relaxed));
        if now().saturating_sub(last) > QUIET {
            managed.note_busy(None);
            halt.storm.store(0, Ordering::Release);
            relay.leave(wake);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(halt: &HaltPoll, millis: u64) -> bool {
        halt.note(Some(3), Duration::from_millis(millis))
    }

    #[test]
    fn faults_that_follow_each_other_closely_are_a_storm() {
        let halt = HaltPoll::new();
        assert!(!(100..).take(STORM as usize + 2).any(|millis| at(&halt, millis)), "too few");
        assert!(at(&halt, 106));
        assert_eq!(halt.place.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn faults_far_apart_are_none() {
        let halt = HaltPoll::new();
        assert!(!(1..100).any(|n| at(&halt, 1000 * n)));
    }
}
