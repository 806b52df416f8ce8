//! Scenarios in which the program changes its mappings, and several threads meet at one page.

use uhmm_addr::{CHUNK_PAGES, PageCount, PfnRange, VaRange};
use uhmm_core::fault::{Access, Fault, Resolution};
use uhmm_core::frame::Slot;
use uhmm_core::host::{Host, Stop};
use uhmm_core::migrate::{Isolated, Select};
use uhmm_core::pagetable::{PageWord, State};
use uhmm_core::stats::{Counter, Skip, Skipped};
use uhmm_testdev::sim_host::{Bed, Program, Setup, SimHost, deliver, page_at, pages_at};

/// Pages on their way out: their bytes may be read by a device, a touch takes them back.
fn isolate(bed: &Bed, first: usize, pages: usize) -> Isolated<'_, SimHost> {
    let mut skipped = Skipped::default();
    let (collected, _) = bed.mm.collect(pages_at(first, pages), bed.mm.epoch(), Select::All, &mut skipped);
    collected.and_then(|collected| collected.isolate(&mut skipped)).expect("pages that can leave")
}

fn stage(bed: &Bed, first: usize, pages: usize) -> Vec<Slot> {
    let mut slots = Vec::new();
    isolate(bed, first, pages).stage(|slot| slots.push(slot));
    slots
}

fn assert_zeros(bed: &Bed, first: usize, pages: usize) {
    for n in first..first + pages {
        assert_eq!(bed.program.load(page_at(n)), Ok(0), "page {n}");
    }
}

#[test]
fn what_was_given_up_comes_back_as_zeros() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 12);
        // 0..4 on the device, 4..8 staged, 8..12 present.
        assert_eq!(bed.migrate(0, 4).moved.get(), 4);
        let slots = stage(&bed, 4, 4);
        bed.program.dontneed(pages_at(0, 12));
        assert_eq!(bed.pagemap.live(), PageCount::ZERO);
        assert_zeros(&bed, 0, 12);
        assert_eq!(bed.mm.write_back(&slots, &bed.pagemap, |_| ()).moved, PageCount::ZERO);
        assert_zeros(&bed, 0, 12);
        bed.fill(0, 12);
        assert_eq!(bed.migrate(0, 12).moved.get(), 12, "new contents may leave again");
        bed.check(0, 12);
        bed.check_nothing_leaked();
    });
}

#[test]
fn what_is_given_up_on_its_way_out_comes_back_as_zeros() {
    Setup::both_ways(|setup| {
        for unmap in [false, true] {
            let bed = Bed::new(setup);
            bed.fill(0, 8);
            let isolated = isolate(&bed, 0, 8);
            let give_up = |range| if unmap { bed.program.unmap(range) } else { bed.program.dontneed(range) };
            give_up(pages_at(0, 2));
            let mut skipped = Skipped::default();
            let copied = isolated.copy(&bed.pagemap, &mut skipped);
            give_up(pages_at(2, 2));
            assert_eq!(copied.commit(&mut skipped).get(), 4);
            assert_eq!(skipped.get(Skip::Raced), 4);
            bed.host().map(pages_at(0, 4));
            assert_zeros(&bed, 0, 4);
            bed.check(4, 4);
            bed.check_nothing_leaked();
        }
    });
}

#[test]
fn what_is_given_up_on_its_way_in_comes_back_as_zeros() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { window: (8, 8), ..setup });
        bed.fill(0, 8);
        assert_eq!(bed.migrate(0, 8).moved.get(), 8);
        bed.during_next_read(|mm| {
            assert_eq!(mm.table().entry(page_at(3)).load().state(), State::Moving);
            Program::new(mm.clone()).dontneed(pages_at(2, 3));
        });
        bed.check(0, 2);
        assert_zeros(&bed, 2, 3);
        bed.check(5, 3);
        bed.check_nothing_leaked();
    });
}

#[test]
fn a_page_given_up_a_moment_ago_is_not_moved_out_before_it_is_gone() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 8);
    bed.host().announce_removal(pages_at(0, 4));
    deliver(&bed.mm);
    // The kernel has told us, and has yet to take the pages away.
    let result = bed.migrate(0, 8);
    assert_eq!((result.moved.get(), result.skipped.get(Skip::Discarded)), (4, 4));
    bed.host().zap(pages_at(0, 4));
    bed.mm.removal_done(pages_at(0, 4));
    assert_zeros(&bed, 0, 4);
    bed.check(4, 4);
    bed.check_nothing_leaked();
}

#[test]
fn pages_whose_mapping_changed_are_not_moved_out_by_an_old_list() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 16);
    let before = bed.mm.epoch();
    bed.program.unmap(pages_at(4, 4));
    bed.host().map(pages_at(4, 4));
    bed.fill(4, 4);
    let old = bed.mm.migrate(pages_at(0, 16), before, &bed.pagemap, Select::All);
    assert_eq!((old.moved, old.skipped.get(Skip::Changed)), (PageCount::ZERO, 16));
    let beside = bed.mm.migrate(pages_at(8, 8), before, &bed.pagemap, Select::All);
    assert_eq!(beside.moved.get(), 8);
    assert_eq!(bed.migrate(0, 8).moved.get(), 8);
    bed.check(0, 16);
    bed.check_nothing_leaked();
}

#[test]
fn unmap_frees_device_pages_and_slots() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { track: true, ..setup });
        bed.fill(0, 24);
        assert_eq!(bed.migrate(0, 16).moved.get(), 16);
        let _slots = stage(&bed, 16, 8);
        bed.check(8, 8);
        bed.program.unmap(pages_at(0, 24));
        assert_eq!(bed.pagemap.live(), PageCount::ZERO);
        bed.host().map(pages_at(0, 24));
        assert_zeros(&bed, 0, 24);
        bed.check_nothing_leaked();
    });
}

#[test]
fn mremap_carries_pages_along() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { track: true, ..setup });
        bed.fill(0, 16);
        // 0..4 on the device, 4..8 staged, 8..12 tracked, 12..16 present.
        assert_eq!(bed.migrate(8, 4).moved.get(), 4);
        bed.check(8, 4);
        assert_eq!(bed.migrate(0, 4).moved.get(), 4);
        let slots = stage(&bed, 4, 4);
        let to = CHUNK_PAGES + 32;
        bed.program.unmap(pages_at(to, 16));
        bed.program.remap(pages_at(0, 16), page_at(to));
        assert!((0..16).all(|n| bed.word(n) == PageWord::EMPTY));
        assert_eq!(bed.mm.write_back(&slots[..2], &bed.pagemap, |_| ()).moved.get(), 2, "notes went along");
        for n in 0..16 {
            assert_eq!(bed.program.load(page_at(to + n)), Ok(100 + n as u64), "page {n}");
        }
        let writes = bed.device.writes();
        assert_eq!(bed.migrate(to + 8, 4).moved.get(), 4);
        assert_eq!(bed.device.writes(), writes, "their copies are still good");
        bed.host().map(pages_at(0, 16));
        assert_zeros(&bed, 0, 16);
        bed.check_nothing_leaked();
    });
}

#[test]
fn mremap_of_pages_in_flight() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { window: (8, 8), ..setup });
        bed.fill(0, 16);
        assert_eq!(bed.migrate(0, 8).moved.get(), 8);
        let isolated = isolate(&bed, 8, 8);
        let to = CHUNK_PAGES;
        bed.program.unmap(pages_at(to, 16));
        bed.during_next_read(move |mm| Program::new(mm.clone()).remap(pages_at(0, 16), page_at(to)));
        let fault = Fault { addr: page_at(0).base(), access: Access::Read, ours: false };
        assert!(matches!(bed.program.resolve(fault), Resolution::Resolved(_)));
        let mut skipped = Skipped::default();
        assert_eq!(isolated.copy(&bed.pagemap, &mut skipped).commit(&mut skipped).get(), 8);
        for n in 0..16 {
            assert_eq!(bed.program.load(page_at(to + n)), Ok(100 + n as u64), "page {n}");
        }
        bed.host().map(pages_at(0, 16));
        assert_zeros(&bed, 0, 16);
        bed.check_nothing_leaked();
    });
}

/// The three ways in which mappings change while the fallback holds claims without the layout lock.
#[test]
fn mappings_that_change_in_the_middle_of_the_fallback() {
    for change in 0..3 {
        let bed = Bed::new(Setup { can_move: false, track: true, ..Setup::default() });
        bed.fill(0, 12);
        // Some of them with copies.
        assert_eq!(bed.migrate(0, 4).moved.get(), 4);
        bed.check(0, 4);
        let to = CHUNK_PAGES;
        bed.program.unmap(pages_at(to, 4));
        let mm = bed.mm.clone();
        bed.host().after_next_copy_out(move || {
            let program = Program::new(mm.clone());
            match change {
                0 => program.dontneed(pages_at(2, 4)),
                1 => program.unmap(pages_at(2, 4)),
                _ => program.remap(pages_at(2, 4), page_at(to)),
            }
        });
        let result = bed.migrate(0, 12);
        assert!(result.moved.get() <= 8, "what changed did not move: {result:?}");
        assert!((2..6).all(|n| bed.word(n).pfn().is_none()));
        if change > 0 {
            bed.host().map(pages_at(2, 4));
        }
        assert_zeros(&bed, 2, 4);
        bed.check(0, 2);
        bed.check(6, 6);
        if change == 2 {
            for n in 0..4 {
                assert_eq!(bed.program.load(page_at(to + n)), Ok(102 + n as u64), "page {n}");
            }
        }
        bed.check_nothing_leaked();
    }
}

#[test]
fn of_two_faulters_one_reads_and_the_other_waits() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 1);
        assert_eq!(bed.migrate(0, 1).moved.get(), 1);
        bed.during_next_read(|mm| {
            let fault = Fault { addr: page_at(0).base(), access: Access::Write, ours: false };
            assert_eq!(Program::new(mm.clone()).resolve(fault), Resolution::InFlight);
            assert!(mm.table().entry(page_at(0)).load().is_waited());
        });
        bed.check(0, 1);
        assert_eq!(bed.device.reads(), 1);
        assert!(!bed.word(0).is_waited());
        bed.check_nothing_leaked();
    });
}

#[test]
fn a_touch_between_isolation_and_commit_wins() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        let mut skipped = Skipped::default();
        let isolated = isolate(&bed, 0, 8);
        assert_eq!(bed.program.store(page_at(1), 1), Ok(()));
        let copied = isolated.copy(&bed.pagemap, &mut skipped);
        assert_eq!(bed.program.store(page_at(2), 2), Ok(()));
        assert_eq!(copied.commit(&mut skipped).get(), 6);
        assert_eq!(skipped.get(Skip::Raced), 2);
        assert_eq!(bed.program.load(page_at(1)), Ok(1));
        assert_eq!(bed.program.load(page_at(2)), Ok(2));
        bed.check(3, 5);
        bed.check_nothing_leaked();
    });
}

#[test]
fn many_threads_on_the_same_pages() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { window: (4, 16), track: true, ..setup });
        bed.fill(0, 32);
        let mm = bed.mm.clone();
        let pagemap = bed.pagemap.clone();
        std::thread::scope(|scope| {
            for seed in 0..3 {
                let mm = mm.clone();
                scope.spawn(move || {
                    let program = Program::new(mm);
                    for n in 0..400 {
                        let page = (n * 7 + seed * 11) % 32;
                        assert_eq!(program.load(page_at(page)), Ok(100 + page as u64));
                        assert_eq!(program.store(page_at(page), 100 + page as u64), Ok(()));
                    }
                });
            }
            for _ in 0..50 {
                let _ = mm.migrate(pages_at(0, 32), mm.epoch(), &pagemap, Select::All);
            }
        });
        bed.check(0, 32);
        bed.check_nothing_leaked();
    });
}

#[test]
fn a_child_shares_device_pages_and_gets_copies_of_staged_ones() {
    let bed = Bed::new(Setup { track: true, ..Setup::default() });
    bed.fill(0, 12);
    // 0..4 on the device, 4..8 tracked, 8..12 staged.
    assert_eq!(bed.migrate(0, 8).moved.get(), 8);
    bed.check(4, 4);
    let _slots = stage(&bed, 8, 4);
    bed.mm.set_pinned(pages_at(0, 1), true);
    let mut copied = Vec::new();
    let layout = bed.mm.lock_layout();
    let words: Vec<PageWord> =
        (0..13).map(|n| bed.mm.word_for_child(&layout, page_at(n), |page, _| copied.push(page))).collect();
    drop(layout);
    assert_eq!(copied, pages_at(8, 4).iter().collect::<Vec<_>>());
    for (n, word) in words.iter().enumerate() {
        match n {
            0..4 => assert_eq!((word.state(), word.pfn()), (State::Device, bed.word(n).pfn())),
            4..8 => assert!(word.is_tracked() && word.pfn() == bed.word(n).pfn()),
            8..12 => assert_eq!(*word, PageWord::RESIDENT),
            _ => assert_eq!(*word, PageWord::EMPTY),
        }
        if let Some(pfn) = word.pfn() {
            assert_eq!(bed.pagemap.count(pfn), 2);
        }
    }
    assert!(words[0].is_pinned());
    // The parent's pages go their way; the child's stay until it is gone as well.
    bed.program.unmap(pages_at(0, 12));
    assert_eq!(bed.pagemap.live().get(), 8);
    for pfn in words.iter().filter_map(|word| word.pfn()) {
        // SAFETY: the child's words had the references.
        unsafe { bed.pagemap.put_counted(PfnRange::new(pfn, PageCount::ONE)) };
    }
    bed.check_nothing_leaked();
}

/// Moves a chunk that is one huge page out.
fn huge_bed(setup: Setup) -> (Bed, VaRange) {
    let bed = Bed::new(Setup { huge_slots: 1, ..setup });
    let chunk = pages_at(0, CHUNK_PAGES);
    bed.host().fill_huge(chunk, |n| 100 + n as u64);
    (bed, chunk)
}

#[test]
fn huge_pages_stay_huge() {
    let (bed, chunk) = huge_bed(Setup::default());
    for _ in 0..2 {
        assert!(bed.host().is_huge(chunk));
        let writes = bed.device.writes();
        assert_eq!(bed.migrate(0, CHUNK_PAGES).moved.get(), CHUNK_PAGES);
        assert_eq!(bed.device.writes(), writes + 1);
        assert!(!bed.host().is_present(page_at(0)));
        assert_eq!(bed.program.load(page_at(77)), Ok(177), "one touch brings all of it");
        assert!(bed.host().is_huge(chunk));
    }
    assert_eq!(bed.mm.stats().get(Counter::MovedIn), 2 * CHUNK_PAGES as u64);
    bed.check(0, CHUNK_PAGES);
    bed.check_nothing_leaked();
}

#[test]
fn a_part_of_a_huge_page_goes_page_by_page() {
    let (bed, chunk) = huge_bed(Setup::default());
    assert_eq!(bed.migrate(0, 64).moved.get(), 64);
    assert!(!bed.host().is_huge(chunk));
    bed.check(0, CHUNK_PAGES);
    // A whole one of which a part was given up comes home in pieces.
    bed.host().fill_huge(chunk, |n| 100 + n as u64);
    assert_eq!(bed.migrate(0, CHUNK_PAGES).moved.get(), CHUNK_PAGES);
    bed.program.dontneed(pages_at(0, 8));
    assert_eq!(bed.pagemap.live().get(), CHUNK_PAGES - 8);
    assert_zeros(&bed, 0, 8);
    bed.check(8, CHUNK_PAGES - 8);
    bed.check_nothing_leaked();
}

#[test]
fn a_huge_page_that_cannot_leave_whole_loses_nothing() {
    for (failing_call, pinned) in [(0, 5), (2, 5), (0, 511), (2, 511)] {
        for stop in [Stop::Pending, Stop::NoMemory, Stop::Errno(5)] {
            let (bed, _) = huge_bed(Setup::default());
            assert!(bed.host().pin(page_at(pinned), true));
            bed.host().fail_nth(failing_call, stop);
            let result = bed.migrate(0, CHUNK_PAGES);
            assert!(result.skipped.get(Skip::Busy) <= 1);
            bed.host().fail_nth(0, stop);
            bed.check(0, CHUNK_PAGES);
            bed.check_nothing_leaked();
        }
    }
}

#[test]
fn a_huge_transfer_that_fails_puts_the_pages_back() {
    let (bed, _) = huge_bed(Setup::default());
    bed.device.fail_nth(1, uhmm_core::device::TransferError::Io(5));
    let result = bed.migrate(0, CHUNK_PAGES);
    assert_eq!((result.moved, result.skipped.get(Skip::Failed)), (PageCount::ZERO, CHUNK_PAGES as u64));
    bed.check(0, CHUNK_PAGES);
    bed.check_nothing_leaked();
}
