//! The gate under loom: mutual exclusion, and no waiter that sleeps for ever.

use ::loom::cell::UnsafeCell;
use ::loom::sync::{Arc, Condvar, Mutex};
use ::loom::thread;

use super::{AtomicU32, Gate, Ordering, Park};

/// A futex that wakes nobody on its own, so that a lost wake-up is a deadlock.
pub(crate) struct Futex {
    lock: Mutex<()>,
    changed: Condvar,
}

impl Futex {
    pub(crate) fn new() -> Self {
        Self { lock: Mutex::new(()), changed: Condvar::new() }
    }
}

impl Park for Futex {
    fn park(&self, word: &AtomicU32, expected: u32) {
        let held = self.lock.lock().unwrap();
        if word.load(Ordering::Relaxed) == expected {
            drop(self.changed.wait(held).unwrap());
        }
    }

    fn unpark(&self, _word: &AtomicU32) {
        let _held = self.lock.lock().unwrap();
        self.changed.notify_all();
    }
}

struct Guarded {
    gate: Gate,
    futex: Futex,
    value: UnsafeCell<u32>,
}

// SAFETY: the value is accessed under the gate only, which is what the models check.
unsafe impl Sync for Guarded {}
// SAFETY: as above.
unsafe impl Send for Guarded {}

impl Guarded {
    fn new() -> Arc<Self> {
        Arc::new(Self { gate: Gate::new(), futex: Futex::new(), value: UnsafeCell::new(0) })
    }

    fn add(&self) {
        let _alone = self.gate.write(&self.futex);
        // SAFETY: the gate is held for writing; loom reports any access besides.
        self.value.with_mut(|value| unsafe { *value += 1 });
    }

    fn get(&self) -> u32 {
        let _shared = self.gate.read(&self.futex);
        // SAFETY: the gate is held for reading; loom reports any write besides.
        self.value.with(|value| unsafe { *value })
    }
}

#[test]
fn two_writers_exclude_each_other() {
    ::loom::model(|| {
        let guarded = Guarded::new();
        let other = guarded.clone();
        let thread = thread::spawn(move || other.add());
        guarded.add();
        thread.join().unwrap();
        assert_eq!(guarded.get(), 2);
    });
}

#[test]
fn readers_share_and_exclude_the_writer() {
    ::loom::model(|| {
        let guarded = Guarded::new();
        let (writer, reader) = (guarded.clone(), guarded.clone());
        let writer = thread::spawn(move || writer.add());
        let reader = thread::spawn(move || reader.get());
        assert!(guarded.get() <= 1);
        assert!(reader.join().unwrap() <= 1);
        writer.join().unwrap();
        assert_eq!(guarded.get(), 1);
    });
}

/// The turn of a writer that slept is taken by it, whoever else comes: else a thread would sleep for ever.
#[test]
fn a_writer_that_slept_has_its_turn_beside_writers_that_come_back() {
    ::loom::model(|| {
        let guarded = Guarded::new();
        let other = guarded.clone();
        let thread = thread::spawn(move || {
            other.add();
            other.add();
        });
        (0..3).for_each(|_| guarded.add());
        thread.join().unwrap();
        assert_eq!(guarded.get(), 5);
    });
}

#[test]
fn a_reader_and_two_writers_that_come_back_all_get_in() {
    ::loom::model(|| {
        let guarded = Guarded::new();
        let (writer, reader) = (guarded.clone(), guarded.clone());
        let writer = thread::spawn(move || writer.add());
        let reader = thread::spawn(move || reader.get());
        guarded.add();
        guarded.add();
        assert!(reader.join().unwrap() <= 3);
        writer.join().unwrap();
        assert_eq!(guarded.get(), 3);
    });
}
