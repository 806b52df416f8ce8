//! Scenarios of mirrors on the simulated host: what pages are, how they are brought there, and what is never installed.

use std::sync::atomic::{AtomicU32, Ordering};

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, VaRange, Vpn};
use uhmm_core::device::TransferError;
use uhmm_core::host::Host;
use uhmm_core::migrate::Select;
use uhmm_core::mirror::{
    Mirror, PageView, Pages, Patience, RangeFaultError, Request, Retry, Segment, Unusable, Want,
};
use uhmm_core::notifier::{Change, Event, WouldBlock};
use uhmm_core::pin::PinFor;
use uhmm_core::stats::{Counter, Skipped};
use uhmm_testdev::sim_host::{Attempts, Bed, Program, Setup, SimHost, Table, deliver, page_at, pages_at};

const RAM: PageView = PageView::Ram { write: true, order: Geometry::K4 };
const READ_ONLY: PageView = PageView::Ram { write: false, order: Geometry::K4 };
const ABSENT: PageView = PageView::Absent;
const UNMAPPED: PageView = PageView::Error(Unusable::Unmapped);
const POISONED: PageView = PageView::Error(Unusable::Poisoned);

fn snapshot(bed: &Bed, first: usize, pages: usize) -> Vec<PageView> {
    let request = Request::SNAPSHOT.owning(&bed.pagemap);
    let mut views = vec![ABSENT; pages];
    bed.mm.snapshot(pages_at(first, pages), &request, &mut views).unwrap();
    views
}

fn fault(
    bed: &Bed,
    first: usize,
    pages: usize,
    request: &Request<'_>,
) -> Result<Vec<PageView>, RangeFaultError> {
    let mut views = vec![ABSENT; pages];
    let (range, patience) = (pages_at(first, pages), &mut Attempts::new(&bed.mm, 10));
    bed.program
        .with_scratch(|scratch| bed.mm.range_fault(range, request, &mut views, scratch, patience))
        .map(|()| views)
}

fn populate(
    bed: &Bed,
    mirror: &Mirror<'_, SimHost, Table>,
    range: VaRange,
    want: Want,
) -> Result<(), RangeFaultError> {
    populate_by(&bed.program, mirror, range, want, &mut Attempts::new(&bed.mm, 10))
}

fn populate_by(
    program: &Program,
    mirror: &Mirror<'_, SimHost, Table>,
    range: VaRange,
    want: Want,
    patience: &mut dyn Patience,
) -> Result<(), RangeFaultError> {
    let (request, room) = (Request::all(want), &mut [Segment::UNUSED; 64]);
    program.with_scratch(|scratch| mirror.populate(range, &request, room, scratch, patience, Table::install))
}

fn mirrored(mirror: &Mirror<'_, SimHost, Table>, first: usize, pages: usize) -> Vec<PageView> {
    mirror.look(|table| {
        let view = |page: Vpn| table.entries.get(&page).copied().unwrap_or(ABSENT);
        pages_at(first, pages).iter().map(view).collect()
    })
}

/// Takes `pages` pages out and leaves them half way.
fn stage(bed: &Bed, first: usize, pages: usize) {
    let mut skipped = Skipped::default();
    let (collected, _) = bed.mm.collect(pages_at(first, pages), bed.mm.epoch(), Select::All, &mut skipped);
    collected.and_then(|collected| collected.isolate(&mut skipped)).unwrap().stage(|_| ());
}

#[test]
fn a_snapshot_tells_places_apart_and_brings_nothing() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { track: true, ..setup });
        bed.fill(0, 10);
        // 0, 1 present; 2, 3 on the device; 4, 5 staged; 6, 7 tracked; 8 read-only; 9 unmapped; 30 a hole.
        assert_eq!(bed.migrate(2, 2).moved.get(), 2);
        assert_eq!(bed.migrate(6, 2).moved.get(), 2);
        bed.check(6, 2);
        stage(&bed, 4, 2);
        bed.host().set_read_only(pages_at(8, 1), true);
        bed.program.unmap(pages_at(9, 1));
        let (calls, faults) = (bed.host().calls(), bed.mm.stats().get(Counter::Faults));
        let views = snapshot(&bed, 0, 11);
        assert_eq!(views[..2], [RAM; 2]);
        for (n, view) in views[2..4].iter().enumerate() {
            let pfn = bed.word(2 + n).pfn().unwrap();
            assert_eq!(*view, PageView::Device { pfn, write: true });
        }
        assert_eq!(views[4..], [ABSENT, ABSENT, READ_ONLY, READ_ONLY, READ_ONLY, UNMAPPED, RAM]);
        assert_eq!(snapshot(&bed, 30, 1), [ABSENT]);
        let mut foreign = [RAM; 4];
        bed.mm.snapshot(pages_at(1, 4), &Request::SNAPSHOT, &mut foreign).unwrap();
        assert_eq!(foreign, [RAM, ABSENT, ABSENT, ABSENT], "of another owner");
        assert_eq!((bed.host().calls(), bed.mm.stats().get(Counter::Faults)), (calls, faults));
        assert_eq!(fault(&bed, 0, 11, &Request::default()), Ok(snapshot_without_owner(&bed)));
    });
}

fn snapshot_without_owner(bed: &Bed) -> Vec<PageView> {
    let mut views = vec![ABSENT; 11];
    bed.mm.snapshot(pages_at(0, 11), &Request::SNAPSHOT, &mut views).unwrap();
    views
}

#[test]
fn what_is_asked_for_is_brought_from_wherever_it_is() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { track: true, ..setup });
        bed.fill(0, 40);
        assert_eq!(bed.migrate(10, 20).moved.get(), 20);
        stage(&bed, 30, 5);
        assert!(fault(&bed, 0, 45, &Request::all(Want::Read)).unwrap().iter().all(|view| view.is_valid()));
        assert_eq!(fault(&bed, 0, 45, &Request::all(Want::Write)), Ok(vec![RAM; 45]));
        bed.check(0, 40);
        assert_eq!(bed.program.load(page_at(44)), Ok(0));
        bed.check_nothing_leaked();
    });
}

#[test]
fn pages_of_ones_own_stay_where_they_are() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 8);
    assert_eq!(bed.migrate(0, 8).moved.get(), 8);
    let own = Request::all(Want::Write).owning(&bed.pagemap);
    let views = fault(&bed, 0, 8, &own).unwrap();
    assert!(views.iter().all(|view| matches!(view, PageView::Device { write: true, .. })));
    assert_eq!(bed.device.reads(), 0);
    assert_eq!(fault(&bed, 0, 8, &Request::all(Want::Read)), Ok(vec![RAM; 8]), "home in one step");
    bed.check(0, 8);
}

#[test]
fn single_pages_are_asked_for_within_the_mask() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 4);
    assert_eq!(bed.migrate(0, 4).moved.get(), 4);
    let wants = [Want::Nothing, Want::Read, Want::Nothing, Want::Write];
    let none = Request::default().each(Want::Nothing, &wants);
    assert_eq!(fault(&bed, 0, 4, &none), Ok(vec![ABSENT; 4]), "the mask lets nothing through");
    let some = Request::default().each(Want::Write, &wants);
    assert_eq!(fault(&bed, 0, 4, &some), Ok(vec![ABSENT, RAM, ABSENT, RAM]));
    bed.host().set_read_only(pages_at(0, 4), true);
    assert_eq!(fault(&bed, 0, 4, &some), Err(RangeFaultError::Permission(page_at(3).base())));
    let reads = Request::default().each(Want::Read, &wants);
    assert_eq!(fault(&bed, 0, 4, &reads), Ok(vec![ABSENT, READ_ONLY, ABSENT, READ_ONLY]));
}

#[test]
fn a_write_that_is_forbidden_touches_nothing() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        assert_eq!(bed.migrate(0, 8).moved.get(), 8);
        bed.host().set_read_only(pages_at(6, 1), true);
        let calls = bed.host().calls();
        let forbidden = fault(&bed, 0, 8, &Request::all(Want::Write));
        assert_eq!(forbidden, Err(RangeFaultError::Permission(page_at(6).base())));
        bed.program.unmap(pages_at(7, 1));
        let hole = fault(&bed, 0, 8, &Request::all(Want::Read));
        assert_eq!(hole, Err(RangeFaultError::Fault(page_at(7).base())));
        assert_eq!((bed.device.reads(), bed.host().calls()), (0, calls));
        let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
        assert_eq!(
            populate(&bed, &mirror, pages_at(0, 8), Want::Write),
            Err(RangeFaultError::Permission(page_at(6).base()))
        );
        assert_eq!(bed.device.reads(), 0);
    });
}

#[test]
fn a_lost_page_is_told_by_its_address() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 4);
    assert_eq!(bed.migrate(1, 1).moved.get(), 1);
    bed.break_reads(Some(TransferError::Gone));
    let lost = Err(RangeFaultError::Poisoned(page_at(1).base()));
    assert_eq!(fault(&bed, 0, 4, &Request::all(Want::Read)), lost);
    assert_eq!(snapshot(&bed, 0, 4), [RAM, POISONED, RAM, RAM]);
    assert_eq!(fault(&bed, 0, 4, &Request::all(Want::Read)), lost);
    let around = Request::default().each(Want::Write, &[Want::Write, Want::Nothing, Want::Write]);
    assert_eq!(fault(&bed, 0, 3, &around), Ok(vec![RAM, POISONED, RAM]));
}

#[test]
fn a_huge_mapping_is_reported_whole_or_not_at_all() {
    let bed = Bed::new(Setup::default());
    bed.host().fill_huge(pages_at(0, CHUNK_PAGES), |n| 100 + n as u64);
    let huge = PageView::Ram { write: true, order: Geometry::M2 };
    assert_eq!(snapshot(&bed, 0, CHUNK_PAGES), vec![huge; CHUNK_PAGES]);
    assert_eq!(snapshot(&bed, 0, CHUNK_PAGES - 1), vec![RAM; CHUNK_PAGES - 1], "a part");
    let views = snapshot(&bed, 0, CHUNK_PAGES + 1);
    assert_eq!((views[0], views[CHUNK_PAGES]), (huge, ABSENT));
    assert_eq!(bed.migrate(7, 1).moved.get(), 1);
    let views = snapshot(&bed, 0, CHUNK_PAGES);
    assert_eq!((views[6], views[8], views[7].is_valid()), (RAM, RAM, true));
}

#[test]
fn batches_of_any_size() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { memory: 3 * CHUNK_PAGES, device: 4 * CHUNK_PAGES, ..setup });
        let pages = 2 * CHUNK_PAGES + 77;
        bed.fill(11, pages);
        assert_eq!(bed.migrate(100, CHUNK_PAGES).moved.get(), CHUNK_PAGES);
        let mirror = bed.mm.mirror(bed.memory(), Table::default());
        let mut batches = Vec::new();
        let mut install = |table: &mut Table, pages: Pages<'_>| {
            batches.push(pages.range());
            table.install(pages);
        };
        let request = Request::all(Want::Write);
        let (room, patience) = (&mut [Segment::UNUSED; 5], &mut Attempts::new(&bed.mm, 10));
        let range = pages_at(11, pages);
        bed.program
            .with_scratch(|scratch| mirror.populate(range, &request, room, scratch, patience, &mut install))
            .unwrap();
        assert_eq!(mirrored(&mirror, 11, pages), vec![RAM; pages]);
        // What has to be brought is brought chunk by chunk; what is there by then comes along.
        assert_eq!(batches[0], pages_at(11, CHUNK_PAGES - 11));
        assert_eq!(batches.len(), 2, "{batches:?}");
        assert_eq!(batches.iter().map(|batch| batch.pages().get()).sum::<usize>(), pages);
        assert_eq!(fault(&bed, 11, pages, &request), Ok(vec![RAM; pages]));
        bed.check(11, pages);
        let outside = populate(&bed, &mirror, pages_at(0, 3 * CHUNK_PAGES + 1), Want::Read);
        assert!(matches!(outside, Err(RangeFaultError::Outside(_))));
    });
}

/// Calls `between` each time that a batch was collected and is not yet installed: at the mirror's own lock.
fn populate_with(
    bed: &Bed,
    mirror: &Mirror<'_, SimHost, Table>,
    mut between: impl FnMut(u32),
) -> Result<u32, RangeFaultError> {
    let range = pages_at(0, 8);
    for attempt in 1..=10 {
        let collection = mirror.collect();
        let views = fault(bed, 0, 8, &Request::all(Want::Read))?;
        between(attempt);
        if let Some(mut table) = collection.lock() {
            table.entries.extend(range.iter().zip(views));
            return Ok(attempt);
        }
    }
    Err(RangeFaultError::TimedOut(Retry::Changed))
}

#[test]
fn what_was_collected_before_a_change_is_not_installed() {
    type Act = fn(&Bed);
    let changes: [(Act, Event); 4] = [
        (|bed| assert_eq!(bed.migrate(3, 2).moved.get(), 2), Event::Migrate),
        (|bed| bed.program.dontneed(pages_at(3, 2)), Event::Clear),
        (|bed| bed.mm.forked(&bed.mm.lock_layout(), bed.memory()), Event::ProtectPage),
        (
            |bed| {
                let change = Change::new(pages_at(3, 1), Event::Protect);
                drop(bed.mm.notifiers().begin(bed.host(), &change).unwrap());
            },
            Event::Protect,
        ),
    ];
    Setup::both_ways(|setup| {
        for (change, event) in changes {
            let bed = Bed::new(setup);
            bed.fill(0, 8);
            let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
            let attempts = populate_with(&bed, &mirror, |attempt| {
                if attempt == 1 {
                    change(&bed);
                }
            });
            // Pages that have to be brought home change once more by that.
            assert_eq!(attempts, Ok(if event == Event::Migrate { 3 } else { 2 }), "{event:?}");
            assert!(mirror.look(|table| table.events.contains(&event)));
            assert!(mirrored(&mirror, 0, 8).iter().all(|view| view.is_valid()));
            change(&bed);
            assert!(mirrored(&mirror, 3, 1) == [ABSENT], "what was installed is taken out: {event:?}");
        }
    });
}

#[test]
fn unmapped_pages_are_not_installed_and_stay_away() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 8);
    let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
    let unmapped = populate_with(&bed, &mirror, |_| bed.program.unmap(pages_at(2, 2)));
    assert_eq!(unmapped, Err(RangeFaultError::Fault(page_at(2).base())));
    // Somebody else's memory, of whose changes nobody would tell.
    bed.host().map(pages_at(2, 2));
    assert_eq!(
        bed.host().load(page_at(2)),
        Err(uhmm_testdev::sim_host::Trap::Fault(uhmm_core::fault::Access::Read))
    );
    let fault = Err(RangeFaultError::Fault(page_at(2).base()));
    assert_eq!(populate(&bed, &mirror, pages_at(0, 8), Want::Read), fault);
    assert_eq!(populate(&bed, &mirror, pages_at(0, 8), Want::Nothing), Ok(()));
    assert_eq!(mirrored(&mirror, 0, 5), [RAM, RAM, ABSENT, ABSENT, RAM]);
    let again = bed.mm.mirror(pages_at(0, 8), Table::default());
    assert_eq!(populate(&bed, &again, pages_at(0, 8), Want::Write), Ok(()));
    assert_eq!(mirrored(&again, 0, 8), [RAM; 8]);
}

/// Moves the pages out again whenever they were brought home for nothing.
struct Storm<'a>(&'a Bed, u32);

impl Patience for Storm<'_> {
    fn begin(&mut self) {}

    fn again(&mut self, why: Retry) -> bool {
        assert_eq!(why, Retry::Changed);
        assert_eq!(self.0.migrate(0, 8).moved.get(), 8);
        self.1 -= 1;
        self.1 > 0
    }
}

#[test]
fn a_change_that_may_not_wait_is_refused_while_somebody_looks() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 8);
    let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
    populate(&bed, &mirror, pages_at(0, 8), Want::Read).unwrap();
    let change = Change::new(pages_at(4, 100), Event::Clear).without_blocking();
    let begin = || bed.mm.notifiers().begin(bed.host(), &change).map(drop);
    assert_eq!(mirror.look(|_| begin()), Err(WouldBlock));
    assert_eq!(mirrored(&mirror, 0, 8), [RAM; 8]);
    assert_eq!(begin(), Ok(()));
    assert_eq!(mirrored(&mirror, 3, 5), [RAM, ABSENT, ABSENT, ABSENT, ABSENT]);
}

#[test]
fn a_storm_of_changes_ends_with_patience() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 8);
    assert_eq!(bed.migrate(0, 8).moved.get(), 8);
    let (mirror, range) = (bed.mm.mirror(pages_at(0, 8), Table::default()), pages_at(0, 8));
    let mut storm = Storm(&bed, 20);
    let outcome = populate_by(&bed.program, &mirror, range, Want::Read, &mut storm);
    assert_eq!((outcome, storm.1), (Err(RangeFaultError::TimedOut(Retry::Changed)), 0));
    assert_eq!(mirrored(&mirror, 0, 8), [ABSENT; 8]);
    assert_eq!(populate(&bed, &mirror, range, Want::Read), Ok(()), "nothing is left behind");
    assert_eq!(mirrored(&mirror, 0, 8), [RAM; 8]);
    bed.check(0, 8);
}

#[test]
fn events_that_nobody_reads_end_with_patience() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 8);
    bed.host().announce_removal(pages_at(100, 1));
    let mut views = [ABSENT; 8];
    let mut deaf = Deaf(5);
    let request = Request::all(Want::Read);
    let outcome = bed
        .program
        .with_scratch(|scratch| bed.mm.range_fault(pages_at(0, 8), &request, &mut views, scratch, &mut deaf));
    assert_eq!(outcome, Err(RangeFaultError::TimedOut(Retry::Pending)));
    assert_eq!(snapshot(&bed, 0, 8), [ABSENT; 8], "what is there may be over");
    deliver(&bed.mm);
    assert_eq!(snapshot(&bed, 0, 8), [RAM; 8]);
}

/// Tries a few times and does nothing.
struct Deaf(u32);

impl Patience for Deaf {
    fn begin(&mut self) {}

    fn again(&mut self, _why: Retry) -> bool {
        self.0 -= 1;
        self.0 > 0
    }
}

#[test]
fn a_page_given_up_and_not_yet_gone_is_waited_for() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 8);
    bed.host().announce_removal(pages_at(2, 2));
    deliver(&bed.mm);
    assert_eq!(snapshot(&bed, 0, 5), [RAM, RAM, ABSENT, ABSENT, RAM]);
    bed.host().zap(pages_at(2, 2));
    assert_eq!(fault(&bed, 0, 8, &Request::all(Want::Write)), Ok(vec![RAM; 8]));
    assert_eq!(bed.program.load(page_at(2)), Ok(0));
}

#[test]
fn room_is_waited_for() {
    let bed = Bed::new(Setup::default());
    bed.mm.set_allowance(PageCount::new(3));
    assert_eq!(fault(&bed, 0, 32, &Request::all(Want::Write)), Ok(vec![RAM; 32]));
}

#[test]
fn the_end_of_the_space_ends_populate() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 8);
    let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
    populate(&bed, &mirror, pages_at(0, 8), Want::Read).unwrap();
    let (mm, mirror_of) = (&bed.mm, &mirror);
    std::thread::scope(|scope| {
        let populating = scope.spawn(|| {
            let program = Program::new(mm.clone());
            loop {
                let (range, patience) = (pages_at(0, 8), &mut Attempts::new(mm, 10));
                if let Err(error) = populate_by(&program, mirror_of, range, Want::Read, patience) {
                    break error;
                }
            }
        });
        std::thread::yield_now();
        mm.close();
        assert_eq!(populating.join().unwrap(), RangeFaultError::Closed);
    });
    let table = mirror.into_table();
    assert!(table.events.contains(&Event::Release));
    assert!(table.entries.is_empty());
}

#[test]
fn a_mirror_beside_a_program_never_lies() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { track: true, ..setup });
        bed.fill(0, 32);
        let mirror = bed.mm.mirror(pages_at(0, 32), Table::default());
        let over = AtomicU32::new(0);
        std::thread::scope(|scope| {
            let (mm, pagemap, over) = (&bed.mm, &bed.pagemap, &over);
            scope.spawn(move || {
                let program = Program::new(mm.clone());
                for _ in 0..200 {
                    let _ = mm.migrate(pages_at(0, 32), mm.epoch(), pagemap, Select::All);
                    for n in 0..32 {
                        assert_eq!(program.load(page_at(n)), Ok(100 + n as u64));
                    }
                }
                over.store(1, Ordering::Release);
            });
            while over.load(Ordering::Acquire) == 0 {
                match populate(&bed, &mirror, pages_at(0, 32), Want::Nothing) {
                    Ok(()) | Err(RangeFaultError::TimedOut(_)) => {}
                    Err(error) => panic!("{error}"),
                }
                // As long as the lock is held, no change gets past its callback.
                mirror.look(|table| {
                    for page in table.entries.keys() {
                        assert!(bed.host().is_present(*page), "{page:?} is not where the table says");
                    }
                });
            }
        });
        bed.check(0, 32);
    });
}

/// A source of the same numbers each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % most
    }
}

/// What a mirror says from what it knows is what a look that knows nothing finds.
fn expect_known_is_found(bed: &Bed, mirror: &Mirror<'_, SimHost, Table>, what: &dyn core::fmt::Debug) {
    let range = mirror.range();
    let mut views = vec![UNMAPPED; range.pages().get()];
    mirror.snapshot(range, &Request::SNAPSHOT, &mut views).unwrap();
    let mut found = vec![UNMAPPED; range.pages().get()];
    bed.mm.snapshot(range, &Request::SNAPSHOT, &mut found).unwrap();
    let wrong = views.iter().zip(&found).position(|(view, found)| view != found);
    let wrong = wrong.map(|n| (n, views[n], found[n]));
    assert_eq!(wrong, None, "after {what:?}");
    if bed.host().is_changing() {
        // The table is told when the event is read.
        return;
    }
    mirror.look(|table| {
        for (page, view) in &table.entries {
            assert!(found[page.since(range.first()).get()].is_valid(), "{page:?} {view:?} after {what:?}");
        }
    });
}

#[test]
fn what_a_mirror_knows_is_what_there_is() {
    const PAGES: usize = 4 * CHUNK_PAGES;
    for seed in 0..24 {
        let numbers = &mut Numbers(seed);
        let can_move = seed % 2 == 0;
        let bed = Bed::new(Setup {
            memory: PAGES,
            device: 2 * PAGES,
            slots: 2 * CHUNK_PAGES,
            can_move,
            track: seed % 3 == 0,
            ..Setup::default()
        });
        bed.host().fill_huge(pages_at(CHUNK_PAGES, CHUNK_PAGES), |n| 100 + (CHUNK_PAGES + n) as u64);
        // Whole chunks and parts of some.
        let mirror = bed.mm.mirror(pages_at(40, PAGES - 90), Table::default());
        let mut last = Vec::new();
        for _ in 0..40 {
            let first = numbers.below(PAGES);
            let most = 1 << numbers.below(11);
            let pages = (1 + numbers.below(most)).min(PAGES - first);
            let act = numbers.below(10);
            last.push((act, first, pages));
            let range = pages_at(first, pages);
            match act {
                0 | 1 => drop(populate(&bed, &mirror, mirror.range(), Want::Write)),
                2 => drop(
                    range.intersect(mirror.range()).map(|part| populate(&bed, &mirror, part, Want::Read)),
                ),
                3 => drop(bed.migrate(first, pages.min(64))),
                4 => drop(bed.program.load(page_at(first)).unwrap()),
                5 => bed.program.dontneed(range),
                6 => bed.mm.forked(&bed.mm.lock_layout(), bed.memory()),
                7 => {
                    // Begun, and read a while after.
                    bed.host().announce_removal(range);
                    expect_known_is_found(&bed, &mirror, &last);
                    deliver(&bed.mm);
                    expect_known_is_found(&bed, &mirror, &last);
                    bed.host().zap(range);
                }
                8 => {
                    bed.host().set_read_only(range, true);
                    expect_known_is_found(&bed, &mirror, &last);
                    bed.host().set_read_only(range, false);
                }
                _ => {
                    let held = bed.program.with_scratch(|scratch| bed.mm.pin(range, PinFor::Write, scratch));
                    if let Ok(held) = held {
                        expect_known_is_found(&bed, &mirror, &last);
                        bed.mm.unpin(held);
                    }
                }
            }
            expect_known_is_found(&bed, &mirror, &last);
        }
    }
}

#[test]
fn what_is_known_needs_no_look_and_is_forgotten_with_the_first_change() {
    let bed = Bed::new(Setup { memory: 2 * CHUNK_PAGES, device: 2 * CHUNK_PAGES, ..Setup::default() });
    bed.fill(0, 2 * CHUNK_PAGES);
    let mirror = bed.mm.mirror(bed.memory(), Table::default());
    let segments = || {
        let mut all = Vec::new();
        mirror.segments(bed.memory(), &Request::SNAPSHOT, |segment| all.push(segment)).unwrap();
        all.iter().map(|segment| (segment.range(), segment.view())).collect::<Vec<_>>()
    };
    let looks = bed.host().looks();
    assert_eq!(segments(), [(bed.memory(), RAM)]);
    let first = bed.host().looks() - looks;
    assert!(first > 0);
    assert_eq!(segments(), [(bed.memory(), RAM)]);
    assert_eq!(bed.host().looks() - looks, first, "it is known");
    assert_eq!(bed.migrate(CHUNK_PAGES + 5, 1).moved.get(), 1);
    let behind = pages_at(CHUNK_PAGES + 6, CHUNK_PAGES - 6);
    let expected =
        [(pages_at(0, CHUNK_PAGES + 5), RAM), (pages_at(CHUNK_PAGES + 5, 1), ABSENT), (behind, RAM)];
    assert_eq!(segments(), expected);
    assert!(bed.host().looks() - looks > first, "one chunk is not known any more");
    // Nobody is told of what is not heard: nothing is remembered.
    bed.host().set_deaf();
    let deaf = bed.mm.mirror(bed.memory(), Table::default());
    let look = || {
        let before = bed.host().looks();
        deaf.segments(bed.memory(), &Request::SNAPSHOT, |_| ()).unwrap();
        bed.host().looks() - before
    };
    assert!(look() > 0 && look() > 0);
}

#[test]
fn a_mirror_that_knows_whole_chunks_never_lies_either() {
    Setup::both_ways(|setup| {
        let memory = 2 * CHUNK_PAGES;
        let bed = Bed::new(Setup { memory, device: 2 * memory, ..setup });
        bed.fill(0, memory);
        let mirror = bed.mm.mirror(bed.memory(), Table::default());
        let over = AtomicU32::new(0);
        std::thread::scope(|scope| {
            let (mm, pagemap, over) = (&bed.mm, &bed.pagemap, &over);
            scope.spawn(move || {
                let program = Program::new(mm.clone());
                for round in 0..60 {
                    let page = round * 37 % memory;
                    let _ = mm.migrate(pages_at(page, 1), mm.epoch(), pagemap, Select::All);
                    assert_eq!(program.load(page_at(page)), Ok(100 + page as u64));
                }
                over.store(1, Ordering::Release);
            });
            while over.load(Ordering::Acquire) == 0 {
                match populate(&bed, &mirror, bed.memory(), Want::Nothing) {
                    Ok(()) | Err(RangeFaultError::TimedOut(_)) => {}
                    Err(error) => panic!("{error}"),
                }
                mirror.look(|table| {
                    for page in table.entries.keys() {
                        assert!(bed.host().is_present(*page), "{page:?} is not where the table says");
                    }
                });
            }
        });
        bed.check(0, memory);
    });
}
