//! A child of a process whose faults raise signals: it has the parent's bytes, wherever they were.

mod common;

use std::sync::{Mutex, PoisonError};

use common::Setup;
use common::child::{expect_well, fork};
use uhmm::{ByteSize, PageCount};

with_engine!(Signal, signal_move, signal_fallback: a_child_has_the_parents_bytes);

/// A fork brings the pages of every space of the process home, the other scenario's as well.
static TURN: Mutex<()> = Mutex::new(());

fn a_child_has_the_parents_bytes(setup: Setup) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let space = setup.space(ByteSize::mib(8));
    const WORDS: usize = 1 << 19;
    let mut buffer = space.map::<u64>(WORDS).unwrap();
    for (n, word) in buffer.iter_mut().enumerate() {
        *word = n as u64 * 3 + 1;
    }
    for round in 0..10 {
        let done = space.migrate(buffer.range()).unwrap();
        assert!(done.moved > PageCount::ZERO, "round {round}: {:?}", done.skipped);
        let child = fork(|| {
            let right = buffer.iter().enumerate().all(|(n, word)| *word == n as u64 * 3 + 1);
            buffer[0] = 99;
            right && buffer[0] == 99
        });
        expect_well(child);
        assert_eq!(buffer[0], 1, "the child's store reached the parent");
    }
    assert!(space.migrate(buffer.range()).unwrap().moved > PageCount::ZERO, "the space goes on after a fork");
    assert_eq!(buffer[WORDS - 1], (WORDS as u64 - 1) * 3 + 1);
}
