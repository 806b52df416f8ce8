//! Scenarios of moving pages out and home again, named as in the kernel's `hmm-tests`.

use uhmm_addr::{PageCount, VaRange};
use uhmm_core::device::TransferError;
use uhmm_core::fault::{Access, Fault, Resolution};
use uhmm_core::host::Stop;
use uhmm_core::migrate::{Select, WriteBack};
use uhmm_core::pagetable::reuse::{MOST_LAPS, STEPS};
use uhmm_core::pagetable::{PageWord, State};
use uhmm_core::stats::{Counter, Skip, Skipped};
use uhmm_testdev::sim_host::{Bed, Killed, Setup, deliver, page_at, pages_at};

/// Takes `pages` out and leaves them in their slots.
fn stage(bed: &Bed, first: usize, pages: usize) -> Vec<uhmm_core::frame::Slot> {
    let mut skipped = Skipped::default();
    let (collected, looked_at) =
        bed.mm.collect(pages_at(first, pages), bed.mm.epoch(), Select::All, &mut skipped);
    assert_eq!(looked_at.get(), pages);
    let isolated =
        collected.and_then(|collected| collected.isolate(&mut skipped)).expect("pages that can leave");
    let mut slots = Vec::new();
    isolated.stage(|slot| slots.push(slot));
    assert_eq!((slots.len(), skipped.total()), (pages, 0));
    slots
}

#[test]
fn migrate() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 64);
        let result = bed.migrate(0, 64);
        assert_eq!((result.moved.get(), result.skipped.total()), (64, 0));
        for n in 0..64 {
            assert!(!bed.host().is_present(page_at(n)));
            assert_eq!(bed.word(n).state(), State::Device);
        }
        assert_eq!(bed.pagemap.live().get(), 64);
        assert_eq!(bed.mm.stats().get(Counter::MovedOut), 64);
        assert_eq!(bed.mm.stats().get(Counter::Written), 64);
        bed.check_nothing_leaked();
    });
}

#[test]
fn migrate_fault() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 64);
        assert_eq!(bed.migrate(0, 64).moved.get(), 64);
        bed.check(0, 64);
        assert_eq!(bed.pagemap.live(), PageCount::ZERO, "what is home is not on the device");
        assert_eq!(bed.mm.stats().get(Counter::MovedIn), 64);
        for n in 0..64 {
            assert_eq!(bed.word(n).state(), State::Resident);
        }
        // And once more, over frames that have been used.
        assert_eq!(bed.migrate(0, 64).moved.get(), 64);
        bed.check(0, 64);
        bed.check_nothing_leaked();
    });
}

#[test]
fn migrate_release() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 96);
        assert_eq!(bed.migrate(0, 96).moved.get(), 96);
        let mut home = 0;
        while home < 96 {
            let came = bed.program.prefetch(pages_at(0, 96)).get();
            assert!(came > 0, "prefetch stopped after {home} pages");
            home += came;
        }
        assert!((0..96).all(|n| bed.host().is_present(page_at(n))));
        let faults = bed.mm.stats().get(Counter::Faults);
        bed.check(0, 96);
        assert_eq!(bed.mm.stats().get(Counter::Faults), faults, "no touch faulted after the prefetch");
        bed.check_nothing_leaked();
    });
}

#[test]
fn migrate_mixed() {
    let bed = Bed::new(Setup::default());
    // 0..4 written, 4..8 holes, 8..12 written and pinned for DMA, 12..16 read-only, 16..20 away already,
    // 20..24 to stay by order, 24..28 written.
    for part in [0, 8, 12, 16, 20, 24] {
        bed.fill(part, 4);
    }
    bed.program.dontneed(pages_at(4, 4));
    assert_eq!(bed.migrate(16, 4).moved.get(), 4);
    (8..12).for_each(|n| assert!(bed.host().pin(page_at(n), true)));
    bed.host().set_read_only(pages_at(12, 4), true);
    bed.mm.set_pinned(pages_at(20, 4), true);
    let result = bed.migrate(0, 28);
    assert_eq!(result.skipped.get(Skip::Busy), 4);
    assert_eq!(result.skipped.get(Skip::Elsewhere), 4);
    assert_eq!(result.skipped.get(Skip::Pinned), 4);
    // Read-only pages cannot be moved, but copied.
    assert_eq!(result.moved.get(), 4 + 4 + 4);
    assert_eq!(result.skipped.get(Skip::Hole), 4);
    assert_eq!(bed.mm.stats().get(Counter::MovedOut), 4 + 12, "only what left is counted");
    for part in [0, 8, 12, 16, 20, 24] {
        bed.check(part, 4);
    }
    assert_eq!(bed.program.store(page_at(12), 1), Err(Killed::Segv));
    bed.check_nothing_leaked();
}

#[test]
fn a_batch_across_mappings_moves_as_far_as_frames_can() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 40);
    bed.host().set_read_only(pages_at(13, 20), false);
    assert_eq!(bed.migrate(0, 40).moved.get(), 40);
    assert_eq!(bed.host().copied_out().get(), 0, "three mappings, all of which may be written");
    bed.check(0, 40);
    bed.host().set_read_only(pages_at(13, 20), true);
    assert_eq!(bed.migrate(0, 40).moved.get(), 40);
    assert_eq!(bed.host().copied_out().get(), 27, "from the read-only mapping on");
    bed.check(0, 40);
    bed.check_nothing_leaked();
}

#[test]
fn a_pinned_page_stays_pinned_when_it_comes_home() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        assert_eq!(bed.migrate(0, 4).moved.get(), 4);
        let slots = stage(&bed, 4, 4);
        bed.mm.set_pinned(pages_at(0, 8), true);
        bed.check(0, 8);
        assert!((0..8).all(|n| bed.word(n).is_pinned()), "{:?} {:?}", bed.word(0), bed.word(4));
        assert_eq!(bed.migrate(0, 8).skipped.get(Skip::Pinned), 8);
        assert_eq!(bed.mm.write_back(&slots, &bed.pagemap, |_| ()).raced.get(), 4);
        bed.check_nothing_leaked();
    });
}

#[test]
fn after_many_busy_pages_the_rest_is_not_tried() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 64);
    (0..64).for_each(|n| assert!(bed.host().pin(page_at(n), true)));
    let calls = bed.host().calls();
    assert_eq!(bed.migrate(0, 64).skipped.get(Skip::Busy), 64);
    assert!(bed.host().calls() - calls < 16);
    bed.check(0, 64);
    bed.check_nothing_leaked();
}

#[test]
fn cold_selection_passes_over_what_comes_back_at_once() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 16);
    let cold = |first, lap| {
        bed.mm.migrate(pages_at(first, 4), bed.mm.epoch(), &bed.pagemap, Select::Cold { lap }).moved.get()
    };
    let moved = |first| (0..MOST_LAPS).map(|lap| cold(first, lap)).sum::<usize>();
    assert_eq!(cold(12, 0), 4, "nothing is known of it");
    for _ in 0..6 {
        let _slots = stage(&bed, 0, 8);
        bed.check(0, 8);
    }
    assert_eq!((moved(0), moved(4)), (4, 4), "hot pages have their turn within so many laps");
    bed.check(0, 8);
    assert!((0..MOST_LAPS).filter(|lap| cold(0, *lap) > 0).count() < 2, "and not more often");
    bed.check(0, 16);
    bed.check_nothing_leaked();
}

#[test]
fn what_comes_back_soon_after_it_left_is_tried_less_often() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        let tries = |away: usize| {
            let tried = (0..MOST_LAPS).filter(|lap| {
                let select = Select::Cold { lap: *lap };
                let moved = bed.mm.migrate(pages_at(0, 4), bed.mm.epoch(), &bed.pagemap, select).moved;
                (0..away).for_each(|_| bed.mm.grow_older());
                bed.check(0, 8);
                !moved.is_zero()
            });
            tried.count()
        };
        assert_eq!(tries(STEPS), MOST_LAPS as usize, "each time a whole budget was evicted meanwhile");
        assert!(tries(1) < MOST_LAPS as usize / 2);
        bed.check_nothing_leaked();
    });
}

#[test]
fn a_touch_takes_a_staged_page_back_without_the_device() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 16);
        let slots = stage(&bed, 0, 16);
        assert!((0..16).all(|n| !bed.host().is_present(page_at(n))));
        bed.check(0, 16);
        assert_eq!((bed.device.reads(), bed.device.writes()), (0, 0));
        assert_eq!(bed.mm.stats().get(Counter::TakenBack), 16);
        let late = bed.mm.write_back(&slots, &bed.pagemap, |_| panic!("nothing failed"));
        assert_eq!(late, WriteBack { raced: PageCount::new(16), ..WriteBack::default() });
        bed.check_nothing_leaked();
    });
}

#[test]
fn staged_then_written_then_touched() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 16);
        let slots = stage(&bed, 0, 16);
        let sent = bed.mm.write_back(&slots, &bed.pagemap, |_| panic!("nothing failed"));
        assert_eq!(sent.moved.get(), 16);
        assert_eq!(bed.device.writes(), 1, "pages side by side are one transfer");
        bed.check(0, 16);
        bed.check_nothing_leaked();
    });
}

#[test]
fn write_back_that_fails_leaves_pages_staged() {
    Setup::both_ways(|setup| {
        for (error, full) in [(TransferError::Full, 8), (TransferError::Io(5), 0)] {
            let bed = Bed::new(setup);
            bed.fill(0, 8);
            let slots = stage(&bed, 0, 8);
            bed.device.fail_nth(1, error);
            let mut again = Vec::new();
            let sent = bed.mm.write_back(&slots, &bed.pagemap, |slot| again.push(slot));
            assert_eq!((sent.full.get(), sent.failed.get(), again.len()), (full, 8 - full, 8));
            assert_eq!(bed.pagemap.live(), PageCount::ZERO);
            assert_eq!(bed.mm.write_back(&again, &bed.pagemap, |_| ()).moved.get(), 8);
            bed.check(0, 8);
            bed.check_nothing_leaked();
        }
    });
}

#[test]
fn a_slot_that_is_named_twice_is_sent_once() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 4);
        let mut slots = stage(&bed, 0, 4);
        slots.extend_from_within(..);
        let sent = bed.mm.write_back(&slots, &bed.pagemap, |_| panic!("nothing failed"));
        assert_eq!((sent.moved.get(), sent.raced.get()), (4, 4));
        assert_eq!(bed.pagemap.live().get(), 4);
        bed.check(0, 4);
        bed.check_nothing_leaked();
    });
}

#[test]
fn dropping_any_phase_puts_the_pages_back() {
    Setup::both_ways(|setup| {
        for phase in 0..3 {
            let bed = Bed::new(setup);
            bed.fill(0, 8);
            let mut skipped = Skipped::default();
            let (collected, _) = bed.mm.collect(pages_at(0, 8), bed.mm.epoch(), Select::All, &mut skipped);
            let collected = collected.expect("eight willing pages");
            if phase == 0 {
                drop(collected);
            } else {
                let isolated = collected.isolate(&mut skipped).expect("eight pages");
                if phase == 1 {
                    drop(isolated);
                } else {
                    drop(isolated.copy(&bed.pagemap, &mut skipped));
                }
            }
            assert!((0..8).all(|n| bed.host().is_present(page_at(n))), "phase {phase}");
            assert_eq!(bed.pagemap.live(), PageCount::ZERO);
            bed.check(0, 8);
            bed.check_nothing_leaked();
        }
    });
}

#[test]
fn a_device_that_fills_half_way_takes_what_fits() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { device: 24, ..setup });
        bed.fill(0, 64);
        let result = bed.migrate(0, 64);
        assert_eq!((result.moved.get(), result.skipped.get(Skip::Full)), (24, 40));
        assert!((24..64).all(|n| bed.host().is_present(page_at(n))), "the others are back");
        bed.check(0, 64);
        bed.check_nothing_leaked();

        let bed = Bed::new(setup);
        bed.fill(0, 64);
        bed.device.full_after(PageCount::new(10));
        let result = bed.migrate(0, 64);
        assert_eq!(result.moved.get() as u64 + result.skipped.get(Skip::Full), 64);
        assert_eq!(bed.pagemap.live(), result.moved);
        bed.check(0, 64);
        bed.check_nothing_leaked();
    });
}

#[test]
fn an_arena_without_slots_moves_nothing() {
    let bed = Bed::new(Setup { slots: 4, ..Setup::default() });
    bed.fill(0, 64);
    let slots = stage(&bed, 0, 4);
    assert_eq!(bed.migrate(4, 60).skipped.get(Skip::NoFrame), 60);
    assert_eq!(bed.mm.write_back(&slots, &bed.pagemap, |_| ()).moved.get(), 4);
    bed.check(0, 64);
    bed.check_nothing_leaked();
}

#[test]
fn a_failed_read_poisons_only_the_page_that_was_touched() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { window: (8, 8), ..setup });
        bed.fill(0, 16);
        assert_eq!(bed.migrate(0, 16).moved.get(), 16);
        // The window fails, and then the page by itself.
        bed.device.fail_nth(1, TransferError::Io(5));
        let fault = Fault { addr: page_at(4).base(), access: Access::Read, ours: false };
        assert_eq!(bed.program.resolve(fault), Resolution::Resolved(PageCount::ONE), "alone it can be read");
        bed.break_reads(Some(TransferError::Gone));
        assert_eq!(bed.program.load(page_at(6)), Err(Killed::Bus));
        bed.break_reads(None);
        assert_eq!(bed.program.load(page_at(6)), Err(Killed::Bus), "lost is lost");
        assert_eq!(bed.word(6).state(), State::Poisoned);
        assert_eq!(bed.mm.stats().get(Counter::Poisoned), 1);
        assert_eq!(bed.mm.stats().first_lost(), Some(page_at(6).base()));
        bed.check(0, 6);
        bed.check(7, 9);
        // What the program gives up is no longer lost.
        bed.program.dontneed(VaRange::page(page_at(6)));
        assert_eq!(bed.program.load(page_at(6)), Ok(0));
        bed.check_nothing_leaked();
    });
}

#[test]
fn a_sequence_comes_home_in_windows() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { window: (1, 32), ..setup });
        bed.fill(0, 128);
        assert_eq!(bed.migrate(0, 128).moved.get(), 128);
        let faults = bed.mm.stats().get(Counter::Faults);
        bed.check(0, 128);
        assert!(bed.mm.stats().get(Counter::Faults) - faults <= 12);
        assert_eq!(bed.mm.stats().get(Counter::MovedIn), 128);
        bed.check_nothing_leaked();
    });
}

#[test]
fn a_fault_that_meets_an_event_waits_for_it_to_be_read() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 4);
        assert_eq!(bed.migrate(0, 4).moved.get(), 4);
        bed.host().announce_removal(pages_at(9, 1));
        let fault = Fault { addr: page_at(2).base(), access: Access::Read, ours: false };
        assert_eq!(bed.program.resolve(fault), Resolution::Pending);
        assert_eq!(bed.word(2).state(), State::Device, "the claim was given back");
        deliver(&bed.mm);
        assert_eq!(bed.program.resolve(fault), Resolution::Resolved(PageCount::ONE));
        bed.check(0, 4);
        bed.check_nothing_leaked();
    });
}

/// The evictor would wait for room that only it can make.
#[test]
fn a_thread_of_ours_is_filled_past_its_claim_without_an_allowance() {
    let bed = Bed::new(Setup { can_move: false, ..Setup::default() });
    bed.mm.set_allowance(PageCount::ZERO);
    let entry = bed.mm.table().entry(page_at(3));
    entry.store(PageWord::moving_out(uhmm_core::frame::Slot::new(0)).with_discarded());
    let fault = |ours| Fault { addr: page_at(3).base(), access: Access::Read, ours };
    assert_eq!(bed.program.resolve(fault(false)), Resolution::InFlight);
    assert_eq!(bed.program.resolve(fault(true)), Resolution::Resolved(PageCount::ONE));
    assert!(bed.host().is_present(page_at(3)));
    entry.store(PageWord::EMPTY);
    bed.check_nothing_leaked();
}

#[test]
fn a_fault_without_memory_starves_until_it_is_granted() {
    let bed = Bed::new(Setup { can_move: false, ..Setup::default() });
    bed.fill(0, 4);
    assert_eq!(bed.migrate(0, 4).moved.get(), 4);
    // The frames that became free may come home; past them the allowance counts.
    let frames = bed.mm.arena().take_framed(bed.host(), PageCount::new(128)).expect("frames are free");
    bed.mm.set_allowance(PageCount::ZERO);
    for (n, access) in [(2, Access::Read), (40, Access::Write)] {
        let fault = Fault { addr: page_at(n).base(), access, ours: false };
        assert_eq!(bed.program.resolve(fault), Resolution::Starved);
        bed.mm.grant(PageCount::new(1));
        assert_eq!(bed.program.resolve(fault), Resolution::Resolved(PageCount::ONE));
        assert_eq!(bed.mm.allowance(), PageCount::ZERO);
    }
    bed.host().fail_nth(1, Stop::NoMemory);
    let fault = Fault { addr: page_at(3).base(), access: Access::Read, ours: false };
    bed.mm.grant(PageCount::new(1));
    assert_eq!(bed.program.resolve(fault), Resolution::Starved);
    assert_eq!(bed.mm.allowance(), PageCount::ONE, "what was not used is given back");
    drop(frames);
    bed.check(0, 4);
    bed.check_nothing_leaked();
}

#[test]
fn the_fallback_across_mappings_loses_nothing() {
    // The events of one discard come mapping by mapping.
    let bed = Bed::new(Setup { can_move: false, ..Setup::default() });
    bed.fill(0, 16);
    bed.host().map(pages_at(8, 4));
    assert_eq!(bed.migrate(0, 16).moved.get(), 16);
    bed.check(0, 16);
    // And one that fails at the second mapping has emptied the first.
    bed.host().lock_in_memory(pages_at(8, 4));
    let result = bed.migrate(0, 16);
    let refused = result.skipped.get(Skip::Refused);
    assert!(refused >= 4, "the locked ones at least: {refused}");
    assert_eq!(result.moved.get() as u64 + refused, 16);
    bed.check(0, 16);
    bed.fill(0, 16);
    bed.check_nothing_leaked();
}
