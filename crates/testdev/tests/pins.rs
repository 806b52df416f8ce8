//! Pins over the simulated host.

use uhmm_addr::PageCount;
use uhmm_core::device::TransferError;
use uhmm_core::pagetable::State;
use uhmm_core::pin::{Pin, PinError, PinFor};
use uhmm_core::stats::{Skip, Skipped};
use uhmm_testdev::sim_host::{Bed, Setup, page_at, pages_at};

fn both_ways(scenario: impl Fn(Setup)) {
    for can_move in [true, false] {
        scenario(Setup { can_move, ..Setup::default() });
    }
}

fn pin(bed: &Bed, first: usize, pages: usize, purpose: PinFor) -> Result<Pin, PinError> {
    bed.program.with_scratch(|scratch| bed.mm.pin(pages_at(first, pages), purpose, scratch))
}

#[test]
fn pinned_pages_come_home_and_stay() {
    both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 24);
        assert_eq!(bed.migrate(0, 8).moved.get(), 8);
        let (collected, _) = bed.mm.collect(
            pages_at(8, 8),
            bed.mm.epoch(),
            uhmm_core::migrate::Select::All,
            &mut Skipped::default(),
        );
        let mut slots = Vec::new();
        collected.unwrap().isolate(&mut Skipped::default()).unwrap().stage(|slot| slots.push(slot));
        let held = pin(&bed, 0, 24, PinFor::Write).unwrap();
        assert!((0..24).all(|n| bed.host().is_present(page_at(n)) && bed.word(n).is_pinned()));
        assert_eq!(bed.migrate(0, 24).skipped.get(Skip::Pinned), 24);
        assert_eq!(bed.mm.write_back(&slots, &bed.pagemap, |_| ()).moved, PageCount::ZERO);
        bed.check(0, 24);
        bed.mm.unpin(held);
        assert_eq!(bed.migrate(0, 24).moved.get(), 24);
        bed.check(0, 24);
        bed.check_nothing_leaked();
    });
}

#[test]
fn a_page_stays_as_long_as_anybody_has_pinned_it() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 16);
    let (low, high) = (pin(&bed, 0, 10, PinFor::Read).unwrap(), pin(&bed, 6, 10, PinFor::Write).unwrap());
    bed.mm.unpin(low);
    let done = bed.migrate(0, 16);
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Pinned)), (6, 10));
    bed.mm.unpin(high);
    assert_eq!(bed.migrate(0, 16).moved.get(), 10);
    bed.check_nothing_leaked();
}

#[test]
fn holders_are_listed_with_the_place_that_took_them() {
    let bed = Bed::new(Setup::default());
    assert!(bed.mm.pins().is_empty());
    let take = |scratch: &mut _| (bed.mm.pin(pages_at(3, 2), PinFor::Read, scratch).unwrap(), line!());
    let (held, line) = bed.program.with_scratch(take);
    let holders = bed.mm.pins();
    assert_eq!(holders.len(), 1);
    assert_eq!((holders[0].range, holders[0].purpose), (pages_at(3, 2), PinFor::Read));
    assert_eq!((holders[0].place.file(), holders[0].place.line()), (file!(), line));
    bed.mm.unpin(held);
    assert!(bed.mm.pins().is_empty());
    bed.check_nothing_leaked();
}

#[test]
fn lost_pages_are_not_pinned_and_neither_are_their_neighbours() {
    both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        assert_eq!(bed.migrate(2, 2).moved.get(), 2);
        bed.break_reads(Some(TransferError::Io(5)));
        assert_eq!(pin(&bed, 0, 8, PinFor::Read), Err(PinError::Poisoned(page_at(2).base())));
        bed.break_reads(None);
        assert!(bed.mm.pins().is_empty());
        assert!((0..8).all(|n| !bed.word(n).is_pinned()));
        assert_eq!(bed.word(2).state(), State::Poisoned);
        let rest = pin(&bed, 4, 4, PinFor::Read).unwrap();
        bed.mm.unpin(rest);
        bed.check(4, 4);
    });
}

#[test]
fn without_room_nothing_is_pinned() {
    let bed = Bed::new(Setup { can_move: false, ..Setup::default() });
    bed.fill(0, 4);
    assert_eq!(bed.migrate(0, 4).moved.get(), 4);
    bed.mm.set_allowance(PageCount::ZERO);
    assert!(matches!(pin(&bed, 0, 4, PinFor::Read), Err(PinError::Starved(_))));
    assert!(bed.mm.pins().is_empty() && (0..4).all(|n| !bed.word(n).is_pinned()));
    bed.mm.grant(PageCount::new(4));
    let held = pin(&bed, 0, 4, PinFor::Read).unwrap();
    bed.mm.unpin(held);
    bed.check(0, 4);
    bed.check_nothing_leaked();
}

#[test]
fn a_page_pinned_for_writing_has_no_copy_that_would_go_stale() {
    let bed = Bed::new(Setup { track: true, ..Setup::default() });
    bed.fill(0, 4);
    assert_eq!(bed.migrate(0, 4).moved.get(), 4);
    let read = pin(&bed, 0, 4, PinFor::Read).unwrap();
    let tracked = |n: usize| bed.word(n).is_tracked();
    assert!((0..4).all(tracked), "{:?}", bed.word(0));
    let write = pin(&bed, 1, 2, PinFor::Write).unwrap();
    assert_eq!((0..4).map(tracked).collect::<Vec<_>>()[1..3], [false, false]);
    bed.mm.unpin(read);
    bed.mm.unpin(write);
    bed.check(0, 4);
    bed.check_nothing_leaked();
}
