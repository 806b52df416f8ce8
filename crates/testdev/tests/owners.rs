//! Whose pages move where: selection by owner, holes, from device to device, and off a device by its pages' numbers.

use std::sync::{Arc, Mutex};

use uhmm_addr::{CHUNK_PAGES, PageCount, PfnRange, VaRange};
use uhmm_core::device::{MemoryType, TransferError};
use uhmm_core::host::Stop;
use uhmm_core::migrate::{Select, Sources};
use uhmm_core::notifier::{Change, Event, Mark, Owner, Subscriber, WouldBlock};
use uhmm_core::pagetable::State;
use uhmm_core::stats::{Counter, Skip, Skipped};
use uhmm_testdev::sim_host::{Bed, Setup, page_at, pages_at};

/// Both ways of taking pages out, with a link between the devices and without one.
fn all_ways(scenario: impl Fn(Setup)) {
    for can_move in [true, false] {
        for linked in [true, false] {
            scenario(Setup { can_move, linked, ..Setup::default() });
        }
    }
}

fn private(owner: Owner) -> Sources {
    Sources { private: Some(owner), ..Sources::NONE }
}

/// Whether the `n`-th page is on the other device.
fn is_across(bed: &Bed, n: usize) -> bool {
    bed.word(n).pfn().is_some_and(|pfn| bed.other_map.range().contains(pfn))
}

/// A driver that writes down what it is told, and passes over its own migrations.
struct Driver {
    me: Owner,
    seen: Mutex<Vec<VaRange>>,
}

impl Driver {
    fn new(me: Owner) -> Arc<Self> {
        Arc::new(Self { me, seen: Mutex::new(Vec::with_capacity(64)) })
    }

    fn was_told(&self) -> bool {
        self.seen.lock().unwrap().drain(..).count() > 0
    }
}

impl Subscriber for Driver {
    fn invalidate(&self, change: &Change, mark: Mark<'_>) -> Result<(), WouldBlock> {
        if change.event == Event::Migrate && change.owner == Some(self.me) {
            return Ok(());
        }
        let mut seen = self.seen.lock().unwrap();
        mark.set();
        if change.event == Event::Migrate {
            seen.push(change.range);
        }
        Ok(())
    }
}

#[test]
fn own_private_pages_go_from_device_to_device() {
    all_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 100);
        assert_eq!(bed.migrate(0, 100).moved.get(), 100);
        let (home, done) = (bed.host().calls(), bed.migrate_across(10, 80));
        assert_eq!((done.moved.get(), done.skipped.total()), (80, 0), "{done:?}");
        assert_eq!(done.direct.get(), if setup.linked { 80 } else { 0 });
        assert_eq!(bed.host().calls(), home, "the program's addresses have nothing to do with it");
        assert!((0..100).all(|n| bed.word(n).state() == State::Device));
        assert!((10..90).all(|n| is_across(&bed, n)) && !is_across(&bed, 9) && !is_across(&bed, 90));
        assert_eq!((bed.pagemap.live().get(), bed.other_map.live().get()), (20, 80));
        assert_eq!(bed.other.hops() > 0, setup.linked);
        bed.check(0, 100);
        bed.check_nothing_leaked();
    });
}

#[test]
fn pages_of_another_owner_are_passed_over() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 16);
    assert_eq!(bed.migrate(0, 8).moved.get(), 8);
    // The kernel's SELECT_SYSTEM: what is on the device of another driver stays there.
    let done = bed.migrate_from(0, 16, &bed.other_map, &Sources::RAM);
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Foreign)), (8, 8), "{done:?}");
    // SELECT_DEVICE_PRIVATE: what is in RAM stays there, and so does what is there already.
    let done = bed.migrate_from(0, 16, &bed.other_map, &private(bed.other_map.owner()));
    assert_eq!((done.skipped.get(Skip::Foreign), done.skipped.get(Skip::Elsewhere)), (8, 8), "{done:?}");
    bed.check(8, 4);
    let done = bed.migrate_from(8, 4, &bed.other_map, &private(bed.pagemap.owner()));
    assert_eq!(done.skipped.get(Skip::Unselected), 4, "{done:?}");
    assert_eq!(bed.mm.stats().skipped().get(Skip::Foreign), 16, "counted");
    bed.check(0, 16);
    bed.check_nothing_leaked();
}

#[test]
fn devices_that_share_an_owner_have_their_pages_in_common() {
    let bed = Bed::new(Setup { shared_owner: true, ..Setup::default() });
    bed.fill(0, 16);
    assert_eq!(bed.migrate(0, 8).moved.get(), 8);
    // Theirs, but not asked for.
    let done = bed.migrate_from(0, 16, &bed.other_map, &Sources::RAM);
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Unselected)), (8, 8), "{done:?}");
    let done = bed.migrate_from(0, 16, &bed.other_map, &private(Owner(1)));
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Elsewhere)), (8, 8), "{done:?}");
    bed.check(0, 16);
    bed.check_nothing_leaked();
}

#[test]
fn coherent_pages_are_selected_as_such() {
    let bed = Bed::new(Setup { other_type: MemoryType::Coherent, ..Setup::default() });
    bed.fill(0, 8);
    let done = bed.migrate_from(0, 8, &bed.other_map, &Sources::RAM);
    assert_eq!(done.moved.get(), 8);
    let owner = bed.other_map.owner();
    let done = bed.migrate_from(0, 8, &bed.pagemap, &private(owner));
    assert_eq!(done.skipped.get(Skip::Unselected), 8, "{done:?}");
    let sources = Sources { coherent: Some(owner), ..Sources::NONE };
    assert_eq!(bed.migrate_from(0, 8, &bed.pagemap, &sources).moved.get(), 8);
    bed.check(0, 8);
    bed.check_nothing_leaked();
}

#[test]
fn a_driver_passes_over_its_own_migrations() {
    all_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        let (mine, theirs) = (Driver::new(Owner(5)), Driver::new(Owner(6)));
        let notifiers = bed.mm.notifiers();
        let subscriptions =
            [&mine, &theirs].map(|who| notifiers.subscribe(bed.host(), pages_at(0, 8), who.clone()));
        bed.program.dontneed(pages_at(8, 8));
        let of = |sources| Sources { by: Some(Owner(5)), ..sources };
        let done = bed.migrate_from(0, 16, &bed.pagemap, &of(Sources::RAM));
        assert_eq!((done.moved.get(), done.holes.get()), (16, 8));
        assert_eq!((mine.was_told(), theirs.was_told()), (false, true));
        let done = bed.migrate_from(0, 8, &bed.other_map, &of(private(bed.pagemap.owner())));
        assert_eq!(done.moved.get(), 8);
        assert_eq!((mine.was_told(), theirs.was_told()), (false, true));
        // What nobody calls his own doing is told to all: a touch that brings pages home, or a plain migration.
        bed.check(0, 8);
        assert_eq!((mine.was_told(), theirs.was_told()), (true, true));
        assert_eq!(bed.migrate(0, 8).moved.get(), 8);
        assert_eq!((mine.was_told(), theirs.was_told()), (true, true));
        let holes = of(Sources { holes: true, ..Sources::NONE });
        drop(subscriptions);
        let subscription = notifiers.subscribe(bed.host(), pages_at(16, 8), mine.clone());
        bed.program.dontneed(pages_at(16, 8));
        assert_eq!(bed.migrate_from(16, 8, &bed.pagemap, &holes).holes.get(), 8);
        assert!(!mine.was_told());
        drop(subscription);
        bed.check_nothing_leaked();
    });
}

#[test]
fn holes_get_pages_without_a_copy() {
    all_ways(|setup| {
        let bed = Bed::new(setup);
        // 4..12 and 20..24 written, the rest holes; the device's pages are not fresh.
        bed.fill(0, 32);
        assert_eq!(bed.migrate_from(0, 32, &bed.other_map, &Sources::RAM).moved.get(), 32);
        bed.program.dontneed(pages_at(0, 32));
        bed.fill(4, 8);
        bed.fill(20, 4);
        // A touch fills neighbours as well.
        bed.program.dontneed(pages_at(12, 8));
        bed.program.dontneed(pages_at(24, 16));
        let (writes, out) = (bed.other.writes(), bed.mm.stats().get(Counter::MovedOut));
        let done = bed.migrate_from(0, 32, &bed.other_map, &Sources { ram: None, ..Sources::RAM });
        assert_eq!((done.moved.get(), done.holes.get()), (20, 20), "{done:?}");
        assert_eq!(done.skipped.get(Skip::Unselected), 12, "{done:?}");
        assert_eq!((bed.other.writes(), bed.mm.stats().get(Counter::MovedOut)), (writes, out));
        assert_eq!(bed.other_map.live().get(), 20);
        let done = bed.migrate_from(0, 32, &bed.other_map, &Sources::RAM);
        assert_eq!((done.moved.get(), done.holes.get()), (12, 0), "{done:?}");
        for n in (0..4).chain(12..20).chain(24..32) {
            assert_eq!(bed.word(n).state(), State::Device);
            assert_eq!(bed.program.load(page_at(n)), Ok(0), "page {n}");
        }
        bed.check(4, 8);
        bed.check(20, 4);
        bed.check_nothing_leaked();
    });
}

#[test]
fn holes_that_cannot_be_placed_are_counted() {
    let bed = Bed::new(Setup { other: 8, ..Setup::default() });
    bed.fill(4, 2);
    bed.program.dontneed(pages_at(6, 16));
    bed.mm.set_pinned(pages_at(2, 2), true);
    let holes = Sources { holes: true, ..Sources::NONE };
    let done = bed.migrate_from(0, 20, &bed.other_map, &holes);
    assert_eq!(done.holes.get(), 8, "{done:?}");
    assert_eq!(done.skipped.get(Skip::Unselected), 4, "pinned ones and full ones: {done:?}");
    assert_eq!(done.skipped.get(Skip::Full), 8, "{done:?}");
    let done = bed.migrate_from(2, 2, &bed.pagemap, &Sources::RAM);
    assert_eq!(done.skipped.get(Skip::Pinned), 2, "{done:?}");
    // Not mapped at all, or mapped anew since the list of ranges was made.
    let since = bed.mm.epoch();
    bed.program.unmap(pages_at(40, 8));
    let done = bed.program.with_scratch(|scratch| {
        bed.mm.migrate_from(pages_at(40, 8), since, &bed.pagemap, &Sources::RAM, scratch)
    });
    assert_eq!((done.moved, done.skipped.get(Skip::Changed)), (PageCount::ZERO, 8), "{done:?}");
    bed.check_nothing_leaked();
}

#[test]
fn what_a_touch_brings_home_meanwhile_has_raced() {
    all_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        assert_eq!(bed.migrate(0, 8).moved.get(), 8);
        // In the middle of the transfer, which only the way through RAM lets us in on.
        let racing = bed.mm.clone();
        bed.during_next_read(move |mm| {
            assert!(Arc::ptr_eq(&racing, mm));
            let layout = mm.lock_layout();
            mm.unmapped(&layout, pages_at(3, 1));
        });
        let done = bed.migrate_across(0, 8);
        let raced = if setup.linked { 0 } else { 1 };
        assert_eq!((done.moved.get(), done.skipped.get(Skip::Raced)), (8 - raced, raced as u64), "{done:?}");
        bed.check(0, 3);
        bed.check(4, 4);
        bed.check_nothing_leaked();
    });
}

#[test]
fn a_page_that_a_child_shares_moves_for_one_of_them() {
    all_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 1);
        assert_eq!(bed.migrate(0, 1).moved.get(), 1);
        let layout = bed.mm.lock_layout();
        let word = bed.mm.word_for_child(&layout, page_at(0), |_, _| panic!("it is on the device"));
        drop(layout);
        let pfn = word.pfn().unwrap();
        assert_eq!(bed.pagemap.count(pfn), 2);
        assert_eq!(bed.migrate_across(0, 1).moved.get(), 1);
        assert_eq!(bed.pagemap.count(pfn), 1, "the child's");
        bed.check(0, 1);
        // SAFETY: the child's word had the reference.
        unsafe { bed.pagemap.put_counted(PfnRange::new(pfn, PageCount::ONE)) };
        bed.check_nothing_leaked();
    });
}

#[test]
fn a_transfer_that_fails_leaves_pages_where_they_are() {
    all_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 16);
        assert_eq!(bed.migrate(0, 16).moved.get(), 16);
        // Of many pages at once, and then of the fourth by itself.
        for (n, error, why) in [
            (1, TransferError::Io(5), Skip::Failed),
            (1, TransferError::Declined, Skip::Declined),
            (1, TransferError::Full, Skip::Full),
        ] {
            bed.other.fail_nth(n, error);
            assert_eq!(bed.migrate_across(0, 1).skipped.get(why), 1);
        }
        bed.other.fail_nth(1, TransferError::Io(5));
        let done = bed.migrate_across(0, 16);
        assert_eq!((done.moved.get(), done.skipped.total()), (16, 0), "page by page: {done:?}");
        bed.check(0, 16);
        bed.check_nothing_leaked();
    });
}

#[test]
fn the_driver_may_decline_a_page() {
    for can_move in [true, false] {
        let bed = Bed::new(Setup { can_move, ..Setup::default() });
        bed.fill(0, 4);
        bed.device.fail_nth(1, TransferError::Declined);
        let done = bed.migrate(0, 1);
        assert_eq!((done.moved, done.skipped.get(Skip::Declined)), (PageCount::ZERO, 1));
        bed.check(0, 4);
        bed.check_nothing_leaked();
    }
}

#[test]
fn a_full_target_takes_what_it_can() {
    all_ways(|setup| {
        let bed = Bed::new(Setup { other: 10, ..setup });
        bed.fill(0, 16);
        assert_eq!(bed.migrate(0, 16).moved.get(), 16);
        let done = bed.migrate_across(0, 16);
        assert_eq!((done.moved.get(), done.skipped.get(Skip::Full)), (10, 6));
        bed.check(0, 16);
        bed.check_nothing_leaked();
    });
}

#[test]
fn pinned_pages_do_not_change_devices() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 4);
    assert_eq!(bed.migrate(0, 4).moved.get(), 4);
    bed.mm.set_pinned(pages_at(1, 2), true);
    let done = bed.migrate_across(0, 4);
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Pinned)), (2, 2));
    bed.check(0, 4);
    bed.check_nothing_leaked();
}

#[test]
fn a_huge_page_stays_huge_from_device_to_device() {
    for linked in [true, false] {
        let bed = Bed::new(Setup { huge_slots: 1, other: 2 * CHUNK_PAGES, linked, ..Setup::default() });
        let chunk = pages_at(0, CHUNK_PAGES);
        bed.host().fill_huge(chunk, |n| 100 + n as u64);
        assert_eq!(bed.migrate(0, CHUNK_PAGES).moved.get(), CHUNK_PAGES);
        // A page in the way of the first place.
        let stray = bed.other_map.allocate(PageCount::ONE).unwrap();
        assert_eq!(bed.migrate_across(0, CHUNK_PAGES).moved.get(), CHUNK_PAGES);
        // SAFETY: the reference of the allocation.
        unsafe { bed.other_map.put_counted(stray) };
        let faults = bed.mm.stats().get(Counter::Faults);
        bed.check(0, CHUNK_PAGES);
        assert_eq!(bed.mm.stats().get(Counter::Faults) - faults, 1, "it comes home whole");
        bed.check_nothing_leaked();
    }
}

/// A bed with pages of every kind: on the device, in RAM with a copy there, staged with a copy and without one.
fn every_kind(setup: Setup) -> Bed {
    let bed = Bed::new(Setup { track: true, ..setup });
    bed.fill(0, 40);
    assert_eq!(bed.migrate(0, 40).moved.get(), 40);
    bed.check(8, 16);
    bed.fill(20, 4);
    let mut skipped = Skipped::default();
    for part in [12, 20] {
        let (collected, _) = bed.mm.collect(pages_at(part, 4), bed.mm.epoch(), Select::All, &mut skipped);
        collected.and_then(|pages| pages.isolate(&mut skipped)).unwrap().stage(|_| ());
    }
    assert_eq!(bed.pagemap.live().get(), 36, "all but those written since");
    bed
}

#[test]
fn migrate_release_of_a_whole_device() {
    all_ways(|setup| {
        let bed = every_kind(setup);
        bed.pagemap.stop_allocation(true);
        let done = bed.evict(None);
        assert_eq!((done.moved.get(), done.skipped.total()), (36, 0), "{done:?}");
        assert_eq!(bed.pagemap.live(), PageCount::ZERO);
        assert_eq!(bed.migrate(0, 8).skipped.get(Skip::Full), 8, "nothing is given out any more");
        bed.device.fail_nth(1, TransferError::Gone);
        bed.check(0, 40);
        bed.fill(0, 40);
        bed.device.fail_nth(0, TransferError::Gone);
        // The device can be used again.
        bed.pagemap.stop_allocation(false);
        assert_eq!(bed.migrate(0, 8).moved.get(), 8);
        bed.check(0, 40);
        bed.check_nothing_leaked();
    });
}

#[test]
fn a_device_is_emptied_onto_another() {
    all_ways(|setup| {
        let bed = every_kind(setup);
        let done = bed.evict(Some(&bed.other_map));
        assert_eq!((done.moved.get(), done.skipped.total()), (36, 0), "{done:?}");
        assert_eq!((bed.pagemap.live().get(), bed.other_map.live().get()), (0, 24));
        assert_eq!(done.direct.get(), if setup.linked { 24 } else { 0 });
        bed.check(0, 40);
        bed.check_nothing_leaked();
    });
}

#[test]
fn a_range_of_device_pages_is_emptied() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 32);
    assert_eq!(bed.migrate(0, 32).moved.get(), 32);
    let first = bed.word(0).pfn().unwrap();
    let done = bed.evict_pfns(PfnRange::new(first.forward(PageCount::new(8)), PageCount::new(10)), None);
    assert_eq!(done.moved.get(), 10);
    assert!((0..32).all(|n| bed.host().is_present(page_at(n)) == (8..18).contains(&n)));
    bed.check(0, 32);
    bed.check_nothing_leaked();
}

#[test]
fn what_cannot_be_evicted_stays_and_is_counted() {
    for can_move in [true, false] {
        let bed = Bed::new(Setup { can_move, other: 3, ..Setup::default() });
        bed.fill(0, 8);
        assert_eq!(bed.migrate(0, 8).moved.get(), 8);
        bed.break_reads(Some(TransferError::Io(5)));
        let done = bed.evict(None);
        assert_eq!((done.moved, done.skipped.get(Skip::Failed)), (PageCount::ZERO, 8), "{done:?}");
        assert_eq!(bed.mm.stats().get(Counter::Poisoned), 0, "nobody asked for them");
        bed.break_reads(None);
        let done = bed.evict(Some(&bed.other_map));
        assert_eq!((done.moved.get(), done.skipped.get(Skip::Full)), (3, 5), "{done:?}");
        bed.check(0, 8);
        bed.check_nothing_leaked();
    }
}

#[test]
fn eviction_waits_for_a_page_that_a_fault_brings_home() {
    for can_move in [true, false] {
        let bed = Bed::new(Setup { can_move, ..Setup::default() });
        bed.fill(0, 4);
        assert_eq!(bed.migrate(0, 4).moved.get(), 4);
        let evictor = Arc::new(Mutex::new(None));
        let (started, memory, pages) = (evictor.clone(), bed.memory(), bed.pagemap.range());
        bed.during_next_read(move |mm| {
            let mm = mm.clone();
            let thread = std::thread::spawn(move || {
                let other = uhmm_testdev::sim_host::Program::new(mm.clone());
                other.with_scratch(|scratch| mm.evict_pfns(memory, pages, None, scratch))
            });
            *started.lock().unwrap() = Some(thread);
            std::thread::sleep(std::time::Duration::from_millis(20));
        });
        bed.check(2, 1);
        let done = evictor.lock().unwrap().take().unwrap().join().unwrap();
        assert_eq!((done.moved.get(), done.skipped.total()), (3, 0), "{done:?}");
        assert_eq!(bed.pagemap.live(), PageCount::ZERO);
        bed.check(0, 4);
        bed.check_nothing_leaked();
    }
}

#[test]
fn eviction_goes_on_when_events_are_read() {
    for can_move in [true, false] {
        let bed = Bed::new(Setup { can_move, ..Setup::default() });
        bed.fill(0, 4);
        assert_eq!(bed.migrate(0, 4).moved.get(), 4);
        for n in 1..4 {
            bed.host().fail_nth(n, Stop::Pending);
            let done = bed.evict(None);
            assert_eq!((done.moved.get(), done.skipped.total()), (4, 0), "{done:?}");
            bed.host().fail_nth(0, Stop::Pending);
            assert_eq!(bed.migrate(0, 4).moved.get(), 4);
        }
        bed.check(0, 4);
        bed.check_nothing_leaked();
    }
}
