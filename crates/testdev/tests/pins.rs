//! Pins over the simulated host.

use uhmm_addr::{CHUNK_PAGES, PageCount};
use uhmm_core::device::TransferError;
use uhmm_core::pagetable::State;
use uhmm_core::pin::{Pin, PinError, PinFor};
use uhmm_core::stats::{Skip, Skipped};
use uhmm_testdev::sim_host::{Bed, Setup, page_at, pages_at};

fn pin(bed: &Bed, first: usize, pages: usize, purpose: PinFor) -> Result<Pin, PinError> {
    bed.program.with_scratch(|scratch| bed.mm.pin(pages_at(first, pages), purpose, scratch))
}

#[test]
fn pinned_pages_come_home_and_stay() {
    Setup::both_ways(|setup| {
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
    Setup::both_ways(|setup| {
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

fn chunk_bed() -> Bed {
    let bed =
        Bed::new(Setup { memory: 3 * CHUNK_PAGES, device: 3 * CHUNK_PAGES, track: true, ..Setup::default() });
    bed.fill(0, 3 * CHUNK_PAGES);
    bed
}

/// Pins a whole chunk for writing, and says whether pages had to be looked at.
fn looked_to_pin(bed: &Bed, chunk: usize) -> (Pin, bool) {
    let before = (bed.host().calls(), bed.host().looks());
    let held = pin(bed, chunk * CHUNK_PAGES, CHUNK_PAGES, PinFor::Write).unwrap();
    assert!((0..CHUNK_PAGES).all(|n| bed.host().is_present(page_at(chunk * CHUNK_PAGES + n))));
    assert!((0..CHUNK_PAGES).all(|n| bed.word(chunk * CHUNK_PAGES + n).is_pinned()));
    (held, before != (bed.host().calls(), bed.host().looks()))
}

#[test]
fn a_chunk_is_pinned_again_without_a_look() {
    let bed = chunk_bed();
    let (held, looked) = looked_to_pin(&bed, 1);
    assert!(looked);
    let (second, looked) = looked_to_pin(&bed, 1);
    assert!(!looked && bed.mm.pins().len() == 2);
    bed.mm.unpin(held);
    assert_eq!(bed.migrate(0, 3 * CHUNK_PAGES).skipped.get(Skip::Pinned), CHUNK_PAGES as u64);
    bed.mm.unpin(second);
    // Nobody holds them: the first who wants to move them can.
    assert!(bed.mm.pins().is_empty());
    let done = bed.migrate(CHUNK_PAGES, CHUNK_PAGES);
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Pinned)), (CHUNK_PAGES, 0));
    let (held, looked) = looked_to_pin(&bed, 1);
    assert!(looked, "they were away");
    bed.mm.unpin(held);
    let (held, looked) = looked_to_pin(&bed, 1);
    assert!(!looked);
    bed.mm.unpin(held);
    bed.check(0, 3 * CHUNK_PAGES);
    bed.check_nothing_leaked();
}

#[test]
fn what_the_program_changed_is_looked_at_before_it_is_pinned_again() {
    type Act = fn(&Bed);
    let changes: [Act; 4] = [
        |bed| bed.program.dontneed(pages_at(CHUNK_PAGES + 7, 2)),
        |bed| bed.mm.forked(&bed.mm.lock_layout(), bed.memory()),
        |bed| {
            bed.mm.freeze();
            bed.mm.thaw();
        },
        |bed| bed.mm.set_pinned(pages_at(CHUNK_PAGES, 1), false),
    ];
    for change in changes {
        let bed = chunk_bed();
        let held = [looked_to_pin(&bed, 0), looked_to_pin(&bed, 1)];
        held.into_iter().for_each(|(held, _)| bed.mm.unpin(held));
        change(&bed);
        let (held, looked) = looked_to_pin(&bed, 1);
        assert!(looked);
        bed.mm.unpin(held);
        // All of it can go.
        assert_eq!(bed.migrate(0, 2 * CHUNK_PAGES).skipped.get(Skip::Pinned), 0);
    }
}

#[test]
fn pages_that_nobody_holds_are_not_pinned_where_they_are_mapped_next() {
    let bed = chunk_bed();
    let (held, _) = looked_to_pin(&bed, 1);
    bed.mm.unpin(held);
    bed.program.unmap(pages_at(2 * CHUNK_PAGES, CHUNK_PAGES));
    bed.program.remap(pages_at(CHUNK_PAGES, CHUNK_PAGES), page_at(2 * CHUNK_PAGES));
    let moved = bed.migrate(2 * CHUNK_PAGES, CHUNK_PAGES);
    assert_eq!((moved.moved.get(), moved.skipped.get(Skip::Pinned)), (CHUNK_PAGES, 0));
}

#[test]
fn parts_of_a_chunk_are_let_go_page_by_page() {
    let bed = chunk_bed();
    let (whole, _) = looked_to_pin(&bed, 0);
    let inside = pin(&bed, 10, 4, PinFor::Read).unwrap();
    bed.mm.unpin(whole);
    let done = bed.migrate(0, CHUNK_PAGES);
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Pinned)), (CHUNK_PAGES - 4, 4));
    bed.mm.unpin(inside);
    assert_eq!(bed.migrate(0, CHUNK_PAGES).moved.get(), 4);
    bed.check(0, CHUNK_PAGES);
    // For reading, and where nobody hears of changes, each pin looks.
    for _ in 0..2 {
        let before = bed.host().looks();
        let held = pin(&bed, CHUNK_PAGES, CHUNK_PAGES, PinFor::Read).unwrap();
        assert!(bed.host().looks() > before);
        bed.mm.unpin(held);
    }
    bed.host().set_deaf();
    for _ in 0..2 {
        let (held, looked) = looked_to_pin(&bed, 2);
        assert!(looked);
        bed.mm.unpin(held);
    }
    bed.check_nothing_leaked();
}
