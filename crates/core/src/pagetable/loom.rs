//! Page words under loom: no waiter is forgotten, and what a word owned is freed exactly once.

use std::sync::Arc;

use ::loom::thread;
use uhmm_addr::{PageCount, Pfn, VaRange, Vpn};

use super::{Discard, Entry, PageTable, PageWord, State};
use crate::frame::Slot;
use crate::sync::{AtomicU64, Ordering};

const PFN: Pfn = Pfn::new(7);

/// A table of one page whose word is `word`.
fn table(word: PageWord) -> Arc<PageTable> {
    let table = PageTable::owned(Vpn::new(0), PageCount::ONE);
    table.entry(Vpn::new(0)).store(word);
    Arc::new(table)
}

fn page(table: &PageTable) -> Entry<'_> {
    table.entry(Vpn::new(0))
}

fn spawn<T: 'static>(
    table: &Arc<PageTable>,
    run: impl FnOnce(Entry<'_>) -> T + 'static,
) -> thread::JoinHandle<T> {
    let table = table.clone();
    thread::spawn(move || run(page(&table)))
}

#[test]
fn a_waited_flag_is_never_lost() {
    ::loom::model(|| {
        let table = table(PageWord::moving_out(Slot::new(1)));
        let waiter = spawn(&table, |entry| entry.wait().is_ok());
        let left = page(&table).leave(PageWord::staged(Slot::new(1)));
        let waits = waiter.join().unwrap();
        assert_eq!(left.wake, waits, "whoever waits is woken, and nobody else");
        assert_eq!(page(&table).load(), PageWord::staged(Slot::new(1)));
    });
}

#[test]
fn of_two_faulters_one_claims_and_the_other_is_woken() {
    fn fault(entry: Entry<'_>) -> (usize, bool, bool) {
        loop {
            let word = entry.load();
            match word.state() {
                State::Device => {
                    if entry.exchange(word, PageWord::moving_in(PFN)).is_ok() {
                        return (1, entry.leave(PageWord::RESIDENT).wake, false);
                    }
                }
                State::Moving => {
                    if entry.wait().is_ok() {
                        return (0, false, true);
                    }
                }
                _ => return (0, false, false),
            }
        }
    }
    ::loom::model(|| {
        let table = table(PageWord::device(PFN));
        let other = spawn(&table, fault);
        let (mine, theirs) = (fault(page(&table)), other.join().unwrap());
        assert_eq!(mine.0 + theirs.0, 1, "one transfer");
        assert_eq!(mine.1 || theirs.1, mine.2 || theirs.2, "whoever waits is woken");
        assert_eq!(page(&table).load(), PageWord::RESIDENT);
    });
}

#[test]
fn of_a_discard_and_the_end_of_a_claim_one_side_frees() {
    for hold in [false, true] {
        ::loom::model(move || {
            let table = table(PageWord::moving_in(PFN));
            let discard = spawn(&table, move |entry| match entry.discard(hold) {
                Discard::Took(word) => word.pfn().is_some(),
                Discard::Flagged => false,
            });
            let left = page(&table).leave(PageWord::device(PFN));
            let freed = discard.join().unwrap();
            assert!(left.discarded ^ freed, "the device page is freed exactly once");
            assert_eq!(page(&table).load().without_discarded(), PageWord::EMPTY);
        });
    }
}

#[test]
fn a_discard_of_a_page_that_a_faulter_claims_frees_it_once() {
    ::loom::model(|| {
        let table = table(PageWord::device(PFN));
        let discard =
            spawn(&table, |entry| matches!(entry.discard(false), Discard::Took(old) if old.pfn().is_some()));
        let entry = page(&table);
        let word = entry.load();
        let mut freed = false;
        if word.state() == State::Device && entry.exchange(word, PageWord::moving_in(PFN)).is_ok() {
            // Home: the claimant frees the device page, whether or not the contents were given up.
            let _ = entry.leave(PageWord::RESIDENT);
            freed = true;
        }
        assert!(freed ^ discard.join().unwrap());
    });
}

#[test]
fn a_pin_that_was_made_is_never_lost() {
    ::loom::model(|| {
        let table = table(PageWord::device(PFN));
        let pin = spawn(&table, |entry| entry.annotate(|word| word.with_pinned(true)));
        let entry = page(&table);
        loop {
            let word = entry.load();
            if entry.exchange(word, PageWord::moving_in(PFN).claimed_from(word)).is_ok() {
                break;
            }
        }
        let _ = entry.leave(PageWord::RESIDENT);
        assert_eq!(pin.join().unwrap(), entry.load().is_pinned());
    });
}

#[test]
fn a_second_owner_of_a_staged_slot_never_appears() {
    ::loom::model(|| {
        // The evictor sends the slot on while a faulter takes the page back.
        let slot = Slot::new(3);
        let table = table(PageWord::staged(slot));
        let faulter = spawn(&table, move |entry| {
            let word = entry.load();
            if word.state() != State::Staged || entry.exchange(word, PageWord::moving_back(slot)).is_err() {
                return None;
            }
            let _ = entry.leave(PageWord::RESIDENT);
            // A slot that a device reads stays with the evictor.
            Some(!word.is_writing())
        });
        let entry = page(&table);
        let mut sent = false;
        let word = entry.load();
        if word.state() == State::Staged && entry.exchange(word, word.with_writing(true)).is_ok() {
            sent = true;
            let seen = entry.load();
            if seen.state() == State::Staged {
                let _ = entry.exchange(seen, PageWord::device(PFN));
            }
        }
        let taken = faulter.join().unwrap();
        assert!(!(sent && taken == Some(true)), "the slot has one owner");
        assert!(sent || taken == Some(true), "the slot has an owner");
    });
}

#[test]
fn a_page_that_left_is_counted() {
    ::loom::model(|| {
        let table = table(PageWord::RESIDENT);
        let present = Arc::new(AtomicU64::new(1));
        let (other, leaves) = (present.clone(), table.clone());
        let mover = thread::spawn(move || {
            let entry = page(&leaves);
            if entry.exchange(PageWord::RESIDENT, PageWord::moving_out(Slot::new(1))).is_ok() {
                // As the kernel does, whose locks order it with a look at its page map.
                other.store(0, Ordering::Release);
                let _ = entry.leave(PageWord::staged(Slot::new(1)));
            }
        });
        // Somebody else's touch, which fails or finds the page staged.
        let toucher = spawn(&table, |entry| {
            let word = entry.load();
            word.state() == State::Staged && entry.exchange(word, PageWord::RESIDENT).is_ok()
        });
        let there = present.load(Ordering::Acquire) == 1;
        let all = VaRange::page(Vpn::new(0));
        let (counted, word) = (table.away(all).next().is_some(), page(&table).load());
        assert!(there || counted || word.is_at_home(), "it left, and nothing says so");
        mover.join().unwrap();
        let home = toucher.join().unwrap();
        assert_eq!(table.away(all).next().is_none(), home, "as many are counted as are away");
    });
}
