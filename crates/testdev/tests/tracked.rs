//! Pages that keep their copy on the device until they are written.

use uhmm_addr::PageCount;
use uhmm_core::device::TransferError;
use uhmm_core::fault::{Access, Fault, Resolution};
use uhmm_core::host::Stop;
use uhmm_core::pagetable::State;
use uhmm_core::stats::Counter;
use uhmm_testdev::sim_host::{Bed, Setup, page_at, pages_at};

/// A bed whose first eight pages were moved out and read again.
fn read_again(can_move: bool) -> Bed {
    let bed = Bed::new(Setup { track: true, can_move, ..Setup::default() });
    bed.fill(0, 8);
    assert_eq!(bed.migrate(0, 8).moved.get(), 8);
    bed.check(0, 8);
    bed
}

#[test]
fn a_read_keeps_the_copy_and_moving_out_again_writes_nothing() {
    for can_move in [true, false] {
        let bed = read_again(can_move);
        assert_eq!(bed.pagemap.live().get(), 8);
        assert!((0..8).all(|n| bed.word(n).is_tracked() && bed.host().is_protected(page_at(n))));
        let writes = bed.device.writes();
        assert_eq!(bed.migrate(0, 8).moved.get(), 8);
        assert_eq!(bed.device.writes(), writes);
        assert_eq!(bed.mm.stats().get(Counter::DroppedClean), 8);
        bed.check(0, 8);
        bed.check_nothing_leaked();
    }
}

#[test]
fn a_write_after_the_read_drops_the_copy() {
    for can_move in [true, false] {
        let bed = read_again(can_move);
        assert_eq!(bed.program.store(page_at(3), 7), Ok(()));
        assert!(!bed.word(3).is_tracked());
        assert_eq!(bed.pagemap.live().get(), 7);
        let writes = bed.device.writes();
        assert_eq!(bed.migrate(0, 8).moved.get(), 8);
        assert_eq!(bed.device.writes(), writes + 1);
        assert_eq!(bed.program.load(page_at(3)), Ok(7));
        bed.check(4, 4);
        bed.check_nothing_leaked();
    }
}

#[test]
fn a_write_that_brings_the_page_home_keeps_no_copy() {
    let bed = read_again(true);
    assert_eq!(bed.migrate(0, 8).moved.get(), 8);
    assert_eq!(bed.program.store(page_at(0), 5), Ok(()));
    assert_eq!(bed.pagemap.live().get(), 7);
    assert!(!bed.word(0).is_tracked());
    bed.check_nothing_leaked();
}

#[test]
fn a_chunk_that_is_always_written_is_no_longer_tracked() {
    let bed = Bed::new(Setup { track: true, ..Setup::default() });
    for round in 0..4 {
        bed.fill(0, 4);
        assert_eq!(bed.migrate(0, 4).moved.get(), 4);
        bed.check(0, 4);
        if round == 3 {
            assert!((0..4).all(|n| !bed.word(n).is_tracked()));
        }
    }
    bed.check_nothing_leaked();
}

#[test]
fn a_tracked_page_is_staged_and_read_with_its_copy() {
    let bed = read_again(true);
    let mut skipped = Default::default();
    let (collected, _) =
        bed.mm.collect(pages_at(0, 8), bed.mm.epoch(), uhmm_core::migrate::Select::All, &mut skipped);
    let mut slots = Vec::new();
    collected.and_then(|all| all.isolate(&mut skipped)).expect("all leave").stage(|slot| slots.push(slot));
    bed.check(0, 4);
    assert!((0..4).all(|n| bed.word(n).is_tracked()));
    assert_eq!(bed.program.store(page_at(4), 104), Ok(()));
    assert_eq!(bed.pagemap.live().get(), 7, "the store gave the copy of one up");
    let writes = bed.device.writes();
    assert_eq!(bed.mm.write_back(&slots, &bed.pagemap, |_| ()).moved.get(), 3);
    assert_eq!(bed.device.writes(), writes);
    bed.check(0, 8);
    bed.check_nothing_leaked();
}

#[test]
fn giving_a_copy_out_up_keeps_no_copy_of_a_page_that_can_be_written() {
    // Every call of the fallback in turn fails: a page whose protection was lifted may have no copy.
    for n in 1..8 {
        for stop in [Stop::Errno(5), Stop::NoMemory, Stop::Pending] {
            let bed = read_again(false);
            bed.host().fail_nth(n, stop);
            let _ = bed.migrate(0, 8);
            bed.host().fail_nth(0, stop);
            for n in 0..8 {
                let protected = !bed.host().is_present(page_at(n)) || bed.host().is_protected(page_at(n));
                assert!(protected || !bed.word(n).is_tracked(), "page {n} can be written past its copy");
                assert_eq!(bed.program.store(page_at(n), 900 + n as u64), Ok(()));
            }
            let _ = bed.migrate(0, 8);
            for n in 0..8 {
                assert_eq!(bed.program.load(page_at(n)), Ok(900 + n as u64));
            }
            bed.check_nothing_leaked();
        }
    }
}

/// A message about a page that came home before it was read.
fn stale_read(n: usize) -> Fault {
    Fault { addr: page_at(n).base(), access: Access::Read, ours: false }
}

#[test]
fn a_stale_fault_leaves_a_tracked_page_usable() {
    let bed = read_again(true);
    bed.host().fail_nth(1, Stop::Pending);
    let resolution = bed.program.resolve(stale_read(2));
    assert!(matches!(resolution, Resolution::Pending | Resolution::Resolved(_)), "{resolution:?}");
    assert_eq!(bed.word(2).state(), State::Resident, "the page is in RAM all the time");
    assert_eq!(bed.program.store(page_at(2), 102), Ok(()));
    let _ = bed.program.resolve(stale_read(3));
    bed.check(0, 8);
    bed.check_nothing_leaked();
}

#[test]
fn a_stale_fault_loses_no_page_that_is_present() {
    let bed = read_again(true);
    bed.break_reads(Some(TransferError::Gone));
    let _ = bed.program.resolve(stale_read(2));
    bed.break_reads(None);
    bed.check(0, 8);
    assert_eq!(bed.program.store(page_at(2), 102), Ok(()));
    assert!(bed.pagemap.live() >= PageCount::new(7));
    bed.check(0, 8);
    bed.check_nothing_leaked();
}
