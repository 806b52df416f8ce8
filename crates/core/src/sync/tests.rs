//! The order in which a gate is taken.

use std::sync::Mutex;

use super::{AtomicU32, Gate, Ordering, Park, TURN, WAITING, WriteGuard};

/// Wakes nobody.
struct Deaf;

impl Park for Deaf {
    fn park(&self, _word: &AtomicU32, _expected: u32) {
        panic!("there is nothing to wait for");
    }

    fn unpark(&self, _word: &AtomicU32) {}
}

/// Whoever holds a gate, and lets it go and tries to have it again whenever somebody sleeps on it, before that one
/// is awake.
struct Greedy<'g> {
    gate: &'g Gate,
    held: Mutex<Option<WriteGuard<'g, Deaf>>>,
    came_back: AtomicU32,
}

impl Park for Greedy<'_> {
    fn park(&self, _word: &AtomicU32, _expected: u32) {
        let mut held = self.held.lock().unwrap();
        assert!(held.take().is_some(), "nobody sleeps for a gate that is open");
        *held = self.gate.try_write(&Deaf);
        if held.is_some() {
            assert!(self.came_back.fetch_add(1, Ordering::Relaxed) < 100, "the sleeper waits for ever");
        }
    }

    fn unpark(&self, _word: &AtomicU32) {}
}

#[test]
fn whoever_comes_back_again_and_again_lets_a_sleeping_writer_go_first() {
    let gate = Gate::new();
    let held = Mutex::new(Some(gate.write(&Deaf)));
    let greedy = Greedy { gate: &gate, held, came_back: AtomicU32::new(0) };
    let turn = gate.write(&greedy);
    assert_eq!(greedy.came_back.load(Ordering::Relaxed), 1, "ahead of the sleeper once, and not twice");
    assert!(gate.try_write(&Deaf).is_none());
    drop(turn);
    // Nothing is left of the turn.
    drop(gate.read(&Deaf));
    drop(gate.write(&Deaf));
}

/// Sleeps for a moment, and is woken by nobody.
struct Dozing(AtomicU32);

impl Park for Dozing {
    fn park(&self, _word: &AtomicU32, _expected: u32) {
        assert!(self.0.fetch_add(1, Ordering::Relaxed) < 100, "nobody ever gets in");
    }

    fn unpark(&self, _word: &AtomicU32) {}
}

#[test]
fn the_turn_of_a_waiter_that_a_forked_child_lacks_costs_one_sleep() {
    for left_behind in [TURN, TURN | WAITING] {
        let gate = Gate::new();
        gate.word.store(left_behind, Ordering::Relaxed);
        let park = Dozing(AtomicU32::new(0));
        drop(gate.read(&park));
        assert_eq!(park.0.load(Ordering::Relaxed), 1);
        drop(gate.write(&Deaf));
        gate.word.store(left_behind, Ordering::Relaxed);
        drop(gate.write(&park));
        assert_eq!(park.0.load(Ordering::Relaxed), 2);
        drop(gate.read(&Deaf));
        // The child ends what froze the pages before the fork.
        std::mem::forget(gate.write(&Deaf));
        gate.word.fetch_or(left_behind, Ordering::Relaxed);
        gate.release_forgotten(&Deaf);
        drop(gate.read(&Deaf));
    }
}
