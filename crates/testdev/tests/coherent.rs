//! Pages of a coherent device, which the program has in place: the other device of the bed is one.

use std::sync::Arc;

use uhmm_addr::{PageCount, PfnRange};
use uhmm_core::device::{MemoryType, TransferError};
use uhmm_core::host::Stop;
use uhmm_core::migrate::{Migrated, Select, Sources};
use uhmm_core::mirror::{PageView, Request, Want};
use uhmm_core::pagetable::{PageWord, State};
use uhmm_core::pin::{Pin, PinError, PinFor};
use uhmm_core::stats::{Counter, Skip};
use uhmm_testdev::sim_host::{Bed, Setup, page_at, pages_at};

fn setup() -> Setup {
    Setup { other_type: MemoryType::Coherent, ..Setup::default() }
}

/// A bed of which the first `pages` pages are mapped in place.
fn placed(setup: Setup, pages: usize) -> Bed {
    let bed = Bed::new(setup);
    bed.fill(0, pages);
    let done = to_coherent(&bed, 0, pages);
    assert_eq!((done.moved.get(), done.skipped.total()), (pages, 0), "{done:?}");
    expect_in_place(&bed, 0, pages);
    bed
}

fn to_coherent(bed: &Bed, first: usize, pages: usize) -> Migrated {
    bed.migrate_from(first, pages, &bed.other_map, &Sources::RAM)
}

fn off(bed: &Bed) -> Sources {
    Sources { coherent: Some(bed.other_map.owner()), ..Sources::NONE }
}

fn recall(bed: &Bed, first: usize, pages: usize) -> Migrated {
    let range = bed.other_map.range();
    bed.program.with_scratch(|scratch| bed.mm.evict_pfns(pages_at(first, pages), range, None, scratch))
}

fn pin(bed: &Bed, first: usize, pages: usize) -> Result<Pin, PinError> {
    bed.program.with_scratch(|scratch| bed.mm.pin(pages_at(first, pages), PinFor::Write, scratch))
}

fn pin_in_place(bed: &Bed, first: usize, pages: usize) -> Result<Pin, PinError> {
    bed.program.with_scratch(|scratch| bed.mm.pin_in_place(pages_at(first, pages), PinFor::Write, scratch))
}

fn states(bed: &Bed, first: usize, pages: usize) -> Vec<State> {
    (first..first + pages).map(|n| bed.word(n).state()).collect()
}

fn expect_in_place(bed: &Bed, first: usize, pages: usize) {
    assert_eq!(states(bed, first, pages), vec![State::Coherent; pages]);
    assert!((first..first + pages).all(|n| bed.host().is_present(page_at(n))));
}

fn faults(bed: &Bed) -> u64 {
    bed.mm.stats().get(Counter::Faults)
}

#[test]
fn a_touch_of_a_page_in_place_raises_no_fault() {
    let bed = placed(setup(), 48);
    let before = (faults(&bed), bed.other.reads());
    bed.check(0, 48);
    bed.fill(0, 48);
    bed.check(0, 48);
    assert_eq!((faults(&bed), bed.other.reads()), before);
    assert_eq!(
        (bed.other_map.live().get(), bed.host().device_frames()),
        (48, 0),
        "the frames are the program's"
    );
    bed.check_nothing_leaked();
}

#[test]
fn what_was_written_in_place_comes_home() {
    let bed = placed(setup(), 32);
    for n in 0..32 {
        bed.program.store(page_at(n), 7000 + n as u64).unwrap();
    }
    let done = recall(&bed, 0, 32);
    assert_eq!((done.moved.get(), done.skipped.total()), (32, 0), "{done:?}");
    assert!(bed.other_map.live().is_zero() && (0..32).all(|n| bed.host().is_present(page_at(n))));
    assert_eq!(bed.host().device_frames(), 32, "the device has its frames back");
    for n in 0..32 {
        assert_eq!(bed.program.load(page_at(n)), Ok(7000 + n as u64));
    }
    // And once more, into the frames that are there now.
    assert_eq!(to_coherent(&bed, 0, 32).moved.get(), 32);
    expect_in_place(&bed, 0, 32);
    assert_eq!(bed.program.load(page_at(31)), Ok(7031));
    bed.check_nothing_leaked();
}

#[test]
fn pages_in_place_are_evicted_by_number() {
    let bed = placed(setup(), 24);
    let first = bed.word(8).pfn().unwrap();
    let done = bed.evict_pfns(PfnRange::new(first, PageCount::new(4)), None);
    assert_eq!((done.moved.get(), done.skipped.total()), (4, 0), "{done:?}");
    assert!((8..12).all(|n| !bed.word(n).is_on_device()));
    expect_in_place(&bed, 0, 8);
    expect_in_place(&bed, 12, 12);
    bed.check(0, 24);
    let done = bed.evict_pfns(bed.other_map.range(), Some(&bed.pagemap));
    assert_eq!((done.moved.get(), bed.pagemap.live().get()), (20, 20), "{done:?}");
    assert_eq!(states(&bed, 12, 12), [State::Device; 12]);
    bed.check(0, 24);
    bed.check_nothing_leaked();
}

#[test]
fn pages_go_from_a_private_device_into_place_and_back() {
    for linked in [true, false] {
        let bed = Bed::new(Setup { linked, ..setup() });
        bed.fill(0, 40);
        assert_eq!(bed.migrate(0, 40).moved.get(), 40);
        assert_eq!(bed.migrate_across(0, 40).moved.get(), 40);
        expect_in_place(&bed, 0, 40);
        assert!(bed.pagemap.live().is_zero());
        bed.check(0, 40);
        bed.program.store(page_at(5), 105).unwrap();
        let done = bed.migrate_from(0, 40, &bed.pagemap, &off(&bed));
        assert_eq!((done.moved.get(), done.direct.get()), (40, if linked { 40 } else { 0 }), "{done:?}");
        assert_eq!(states(&bed, 0, 40), [State::Device; 40]);
        bed.check(0, 40);
        bed.check_nothing_leaked();
    }
}

#[test]
fn selection_is_by_type_and_owner() {
    let bed = placed(setup(), 8);
    let owner = bed.other_map.owner();
    let private = Sources { private: Some(owner), ..Sources::NONE };
    assert_eq!(bed.migrate_from(0, 8, &bed.pagemap, &private).skipped.get(Skip::Unselected), 8);
    assert_eq!(bed.migrate_from(0, 8, &bed.pagemap, &Sources::RAM).skipped.get(Skip::Foreign), 8);
    assert_eq!(to_coherent(&bed, 0, 8).skipped.get(Skip::Elsewhere), 8);
    // What walks over present pages passes over these: the evictor, and a plain migration.
    assert_eq!(bed.migrate(0, 8).skipped.get(Skip::Elsewhere), 8);
    expect_in_place(&bed, 0, 8);
    bed.check(0, 8);
    bed.check_nothing_leaked();
}

#[test]
fn holes_get_pages_in_place() {
    let bed = Bed::new(setup());
    let done = bed.migrate_from(0, 16, &bed.other_map, &Sources { holes: true, ..Sources::NONE });
    assert_eq!((done.moved.get(), done.holes.get()), (16, 16), "{done:?}");
    expect_in_place(&bed, 0, 16);
    let before = faults(&bed);
    assert!((0..16).all(|n| bed.program.load(page_at(n)) == Ok(0)));
    bed.fill(0, 16);
    assert_eq!(faults(&bed), before);
    assert_eq!(recall(&bed, 0, 16).moved.get(), 16);
    // Frames with old contents, which nobody gets to see.
    let done = bed.migrate_from(16, 16, &bed.other_map, &Sources { holes: true, ..Sources::NONE });
    assert_eq!(done.holes.get(), 16);
    assert!((16..32).all(|n| bed.program.load(page_at(n)) == Ok(0)));
    bed.check(0, 16);
    bed.check_nothing_leaked();
}

#[test]
fn what_the_program_gives_up_is_free_and_gets_fresh_frames() {
    let bed = placed(setup(), 32);
    bed.program.dontneed(pages_at(0, 8));
    assert_eq!(bed.other_map.live().get(), 24);
    assert!((0..8).all(|n| bed.program.load(page_at(n)) == Ok(0)));
    bed.program.unmap(pages_at(8, 8));
    bed.host().map(pages_at(8, 8));
    assert_eq!(bed.other_map.live().get(), 16);
    assert_eq!(bed.program.load(page_at(9)), Ok(0));
    bed.program.remap(pages_at(16, 8), page_at(64));
    assert_eq!(bed.other_map.live().get(), 16);
    expect_in_place(&bed, 64, 8);
    for n in 16..24 {
        assert_eq!(bed.program.load(page_at(n + 48)), Ok(100 + n as u64));
    }
    bed.check(24, 8);
    bed.fill(128, 100);
    assert_eq!(to_coherent(&bed, 128, 100).moved.get(), 100, "all of the device can be used");
    bed.check(128, 100);
    bed.check_nothing_leaked();
}

#[test]
fn what_was_given_up_without_a_word_reads_as_zeros() {
    let bed = placed(setup(), 4);
    // As with the signal engine, which hears of nothing.
    bed.host().zap(pages_at(0, 3));
    assert_eq!(bed.program.load(page_at(0)), Ok(0));
    bed.program.store(page_at(1), 101).unwrap();
    assert_eq!((bed.other_map.live().get(), bed.word(0).state()), (2, State::Empty));
    let _ = recall(&bed, 2, 1);
    assert_eq!((bed.program.load(page_at(2)), bed.other_map.live().get()), (Ok(0), 1));
    bed.check(1, 1);
    bed.check(3, 1);
    bed.check_nothing_leaked();
}

#[test]
fn a_fork_makes_pages_in_place_ordinary_memory_of_both() {
    let bed = placed(setup(), 8);
    let layout = bed.mm.lock_layout();
    let child = bed.mm.word_for_child(&layout, page_at(0), |_, _| panic!("the kernel has shared the frame"));
    assert_eq!(child, PageWord::RESIDENT);
    bed.mm.forked(&layout, bed.memory());
    drop(layout);
    assert_eq!(states(&bed, 0, 8), [State::Empty; 8]);
    assert!(bed.other_map.live().is_zero() && (0..8).all(|n| bed.host().is_present(page_at(n))));
    bed.check(0, 8);
    // Shared frames cannot move; when they are the process's own again, they go as any page in RAM.
    assert!((0..8).all(|n| bed.host().pin(page_at(n), true)));
    assert_eq!(to_coherent(&bed, 0, 8).skipped.get(Skip::Busy), 8);
    assert!((0..8).all(|n| bed.host().pin(page_at(n), false)));
    assert_eq!(to_coherent(&bed, 0, 8).moved.get(), 8);
    expect_in_place(&bed, 0, 8);
    bed.check(0, 8);
    bed.check_nothing_leaked();
}

#[test]
fn a_child_that_shares_an_unmapped_page_keeps_it_from_being_mapped() {
    let bed = placed(setup(), 2);
    // Off, as a page is whose mapping failed.
    bed.host().fail_nth(2, Stop::NoMemory);
    let _ = recall(&bed, 0, 1);
    let layout = bed.mm.lock_layout();
    let word = bed.mm.word_for_child(&layout, page_at(0), |_, _| ());
    drop(layout);
    let pfn = word.pfn().expect("the page is on the device");
    assert_eq!((bed.word(0).state(), bed.other_map.count(pfn)), (State::Device, 2));
    assert_eq!(bed.program.load(page_at(0)), Ok(100));
    assert!(!bed.word(0).is_on_device(), "home by a copy, the frame stays where the child's word says");
    assert_eq!((bed.other_map.count(pfn), bed.host().device_frames()), (1, 1));
    // SAFETY: the child's word had the reference.
    unsafe { bed.other_map.put_counted(PfnRange::new(pfn, PageCount::ONE)) };
    bed.check(0, 2);
    bed.check_nothing_leaked();
}

#[test]
fn a_long_pin_moves_pages_to_ram_and_a_short_one_does_not() {
    let bed = placed(setup(), 16);
    let short = pin_in_place(&bed, 0, 8).unwrap();
    expect_in_place(&bed, 0, 8);
    assert_eq!(bed.migrate_from(0, 8, &bed.pagemap, &off(&bed)).skipped.get(Skip::Pinned), 8);
    assert_eq!(recall(&bed, 0, 8).skipped.get(Skip::Pinned), 8);
    assert_eq!(pin(&bed, 0, 8), Err(PinError::Busy(page_at(0).base())));
    expect_in_place(&bed, 0, 8);
    let long = pin(&bed, 8, 8).unwrap();
    assert!((8..16).all(|n| !bed.word(n).is_on_device() && bed.host().is_present(page_at(n))));
    assert_eq!(bed.other_map.live().get(), 8);
    assert_eq!(to_coherent(&bed, 8, 8).skipped.get(Skip::Pinned), 8);
    // In RAM it is pinned by whoever wants to.
    let both = pin_in_place(&bed, 8, 8).unwrap();
    bed.mm.unpin(long);
    bed.mm.unpin(both);
    bed.mm.unpin(short);
    let long = pin(&bed, 0, 8).unwrap();
    assert!((0..8).all(|n| !bed.word(n).is_on_device() && bed.word(n).is_pinned()));
    bed.mm.unpin(long);
    bed.check(0, 16);
    bed.check_nothing_leaked();
}

#[test]
fn what_others_have_pinned_for_dma_stays_in_place() {
    let bed = placed(setup(), 8);
    assert!(bed.host().pin(page_at(3), true));
    let done = recall(&bed, 0, 8);
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Busy)), (7, 1), "{done:?}");
    assert_eq!(bed.migrate_from(3, 1, &bed.pagemap, &off(&bed)).skipped.get(Skip::Busy), 1);
    assert_eq!(pin(&bed, 3, 1), Err(PinError::Busy(page_at(3).base())));
    expect_in_place(&bed, 3, 1);
    bed.host().pin(page_at(3), false);
    assert_eq!(recall(&bed, 0, 8).moved.get(), 1);
    bed.check(0, 8);
    bed.check_nothing_leaked();
}

#[test]
fn what_cannot_be_written_to_is_copied_off() {
    let bed = placed(setup(), 12);
    bed.host().set_read_only(pages_at(0, 8), true);
    assert_eq!(bed.migrate_from(0, 4, &bed.pagemap, &off(&bed)).moved.get(), 4);
    assert_eq!(bed.host().copied_out().get(), 4);
    let long = bed.program.with_scratch(|scratch| bed.mm.pin(pages_at(4, 2), PinFor::Read, scratch)).unwrap();
    assert!((4..6).all(|n| !bed.word(n).is_on_device() && bed.host().is_present(page_at(n))));
    bed.mm.unpin(long);
    // Given up between the copy and the discard: zeros, and nothing of ours in the way.
    let mm = bed.mm.clone();
    bed.host().after_next_copy_out(move || mm.host().announce_removal(pages_at(6, 1)));
    let _ = recall(&bed, 6, 1);
    bed.host().zap(pages_at(6, 1));
    bed.mm.removal_done(pages_at(6, 1));
    assert_eq!(bed.program.load(page_at(6)), Ok(0));
    assert_eq!(recall(&bed, 0, 12).moved.get(), 5);
    bed.check(0, 6);
    bed.check(7, 5);
    bed.check_nothing_leaked();
}

#[test]
fn whichever_call_of_a_copy_off_fails_nothing_is_lost() {
    for stop in [Stop::Pending, Stop::Busy, Stop::NoMemory, Stop::Refused, Stop::Errno(5)] {
        for n in 1..12 {
            let bed = placed(setup(), 3);
            bed.host().set_read_only(pages_at(0, 3), true);
            bed.host().fail_nth(n, stop);
            let _ = recall(&bed, 0, 3);
            bed.check(0, 3);
            bed.host().fail_nth(0, stop);
            bed.host().set_read_only(pages_at(0, 3), false);
            // A protection that could not be lifted goes with the first store.
            bed.fill(0, 3);
            let _ = recall(&bed, 0, 3);
            assert!(bed.other_map.live().is_zero(), "{stop:?} {n}");
            bed.check(0, 3);
            bed.check_nothing_leaked();
        }
    }
}

#[test]
fn a_full_device_takes_what_it_can() {
    let bed = Bed::new(Setup { other: 10, ..setup() });
    bed.fill(0, 16);
    let done = to_coherent(&bed, 0, 16);
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Full)), (10, 6), "{done:?}");
    assert_eq!(states(&bed, 0, 16).iter().filter(|state| **state == State::Coherent).count(), 10);
    bed.check(0, 16);
    bed.check_nothing_leaked();
}

#[test]
fn a_mirror_is_told_whose_page_it_is() {
    let bed = placed(setup(), 4);
    bed.host().set_read_only(pages_at(2, 2), true);
    let look = || {
        let mut views = [PageView::default(); 4];
        bed.mm.snapshot(pages_at(0, 4), &Request::SNAPSHOT, &mut views).unwrap();
        views
    };
    let owner = bed.other_map.owner();
    for (n, view) in look().into_iter().enumerate() {
        let pfn = bed.word(n).pfn().unwrap();
        assert_eq!(view, PageView::Coherent { owner, pfn, write: n < 2 });
        assert!(view.is_valid() && view.may_write() == (n < 2));
    }
    bed.host().set_read_only(pages_at(2, 2), false);
    // What is on the device and not mapped is mapped by being asked for.
    bed.host().fail_nth(2, Stop::NoMemory);
    let _ = recall(&bed, 1, 1);
    let mut views = [PageView::default(); 4];
    let range = pages_at(0, 4);
    let asked = bed.program.with_scratch(|scratch| {
        bed.mm.range_fault(range, &Request::all(Want::Write), &mut views, scratch, &mut Once)
    });
    assert_eq!(asked, Ok(()));
    assert!(views.iter().all(|view| view.may_write()), "{views:?}");
    bed.check(0, 4);
    bed.check_nothing_leaked();
}

struct Once;

impl uhmm_core::mirror::Patience for Once {
    fn begin(&mut self) {}

    fn again(&mut self, _why: uhmm_core::mirror::Retry) -> bool {
        false
    }
}

#[test]
fn a_page_that_cannot_be_mapped_is_on_the_device_all_the_same() {
    let bed = Bed::new(setup());
    bed.fill(0, 4);
    bed.host().set_read_only(pages_at(0, 2), true);
    let done = to_coherent(&bed, 0, 4);
    assert_eq!(done.moved.get(), 4, "{done:?}");
    assert_eq!(states(&bed, 0, 4)[..2], [State::Device; 2]);
    expect_in_place(&bed, 2, 2);
    // A touch brings it home, as from a private device.
    bed.check(0, 4);
    assert!(!bed.word(0).is_on_device());
    bed.check_nothing_leaked();
}

#[test]
fn evicted_pages_are_mapped_when_they_are_touched() {
    let bed = Bed::new(setup());
    bed.fill(0, 8);
    let mut slots = Vec::new();
    let mut skipped = uhmm_core::stats::Skipped::default();
    let (collected, _) = bed.mm.collect(pages_at(0, 8), bed.mm.epoch(), Select::All, &mut skipped);
    collected.unwrap().isolate(&mut skipped).unwrap().stage(|slot| slots.push(slot));
    assert_eq!(bed.mm.write_back(&slots, &bed.other_map, |_| ()).moved.get(), 8);
    assert_eq!(states(&bed, 0, 8), [State::Device; 8]);
    let reads = bed.other.reads();
    bed.check(0, 8);
    expect_in_place(&bed, 0, 8);
    assert_eq!(bed.other.reads(), reads, "nothing was copied");
    bed.check_nothing_leaked();
}

/// There and back while one call fails. Returns whether it was reached.
fn round_trip(fail: impl Fn(&Bed), is_pending: impl Fn(&Bed) -> bool) -> bool {
    let bed = Bed::new(setup());
    bed.fill(0, 12);
    assert_eq!(bed.migrate(8, 4).moved.get(), 4);
    fail(&bed);
    let _ = to_coherent(&bed, 0, 8);
    let _ = bed.migrate_across(8, 4);
    let _ = bed.migrate_from(12, 2, &bed.other_map, &Sources { holes: true, ..Sources::NONE });
    (0..12).for_each(|n| assert_eq!(bed.program.load(page_at(n)), Ok(100 + n as u64), "{:?}", bed.word(n)));
    let _ = bed.migrate_from(4, 6, &bed.pagemap, &off(&bed));
    let _ = recall(&bed, 0, 14);
    bed.check(0, 12);
    assert_eq!((bed.program.load(page_at(12)), bed.program.load(page_at(13))), (Ok(0), Ok(0)));
    let reached = !is_pending(&bed);
    bed.check_nothing_leaked();
    reached
}

#[test]
fn whichever_call_fails_nothing_is_lost() {
    for stop in [Stop::Pending, Stop::Busy, Stop::NoMemory, Stop::Refused, Stop::Errno(5)] {
        let steps = (1..).take_while(|n| {
            round_trip(|bed| bed.host().fail_nth(*n, stop), |bed| bed.host().failure_pending())
        });
        assert!(steps.count() > 10, "{stop:?}");
    }
    for error in [TransferError::Full, TransferError::Io(5), TransferError::Declined] {
        let steps = (1..).take_while(|n| {
            round_trip(|bed| bed.other.fail_nth(*n, error), |bed| bed.other.failure_pending())
        });
        assert!(steps.count() > 2, "{error:?}");
    }
}

#[test]
fn a_page_in_place_is_told_of_when_it_is_taken_off() {
    use uhmm_core::notifier::{Change, Event, Mark, Subscriber, WouldBlock};
    struct Seen(std::sync::Mutex<Vec<(usize, usize)>>);
    impl Subscriber for Seen {
        fn invalidate(&self, change: &Change, mark: Mark<'_>) -> Result<(), WouldBlock> {
            mark.set();
            if change.event == Event::Migrate {
                let at = change.range.first().since(page_at(0)).get();
                self.0.lock().unwrap().push((at, change.range.pages().get()));
            }
            Ok(())
        }
    }
    let bed = placed(setup(), 6);
    let seen = Arc::new(Seen(std::sync::Mutex::new(Vec::new())));
    let subscription = bed.mm.notifiers().subscribe(bed.host(), pages_at(0, 6), seen.clone());
    assert_eq!(recall(&bed, 2, 3).moved.get(), 3);
    assert_eq!(seen.0.lock().unwrap().first(), Some(&(2, 3)), "before anything is copied");
    drop(subscription);
    bed.check(0, 6);
    bed.check_nothing_leaked();
}

#[test]
fn a_page_that_is_lost_is_taken_from_the_program_and_mapped_no_more() {
    for mapped in [true, false] {
        let bed = placed(setup(), 8);
        // Mapped, or waiting on the device for a touch.
        if !mapped {
            assert_eq!(recall(&bed, 0, 8).moved.get(), 8);
            assert_eq!(bed.migrate_from(0, 8, &bed.other_map, &Sources::RAM).moved.get(), 8);
        }
        let pfn = bed.word(3).pfn().unwrap();
        bed.other_map.memory_failure(pfn).unwrap();
        bed.mm.unmap_lost(PfnRange::new(pfn, PageCount::ONE));
        assert_eq!(bed.word(3).state(), State::Device);
        assert!(!bed.host().is_present(page_at(3)) && bed.host().is_present(page_at(4)));
        // As a device does that knows of it.
        bed.other.lose(bed.other_map.device_page(pfn));
        assert!(bed.program.load(page_at(3)).is_err());
        assert_eq!(states(&bed, 0, 8).iter().filter(|state| **state == State::Coherent).count(), 7);
        assert_eq!(bed.word(3).state(), State::Poisoned);
        bed.check(0, 3);
        bed.check(4, 4);
        // Its place is given to nobody.
        let room = bed.other_map.range().pages.minus(bed.other_map.live());
        let mut got = PageCount::ZERO;
        while let Some(more) = bed.other_map.allocate(PageCount::new(64)) {
            assert!(!more.contains(pfn));
            got = got.plus(more.pages);
        }
        assert_eq!(got, room.minus(PageCount::ONE));
    }
}
