//! Scenarios of exclusive pages on the simulated host: a device alone touches them, until somebody else does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use uhmm_addr::{PageCount, VaRange, VirtAddr};
use uhmm_core::host::Stop;
use uhmm_core::migrate::{Select, Sources};
use uhmm_core::mirror::{
    Exclusive, Mirror, PageView, Patience, RangeFaultError, Request, Retry, Segment, Terms, Want,
};
use uhmm_core::mm::Mm;
use uhmm_core::notifier::{Change, Event, Mark, Owner, Subscriber, WouldBlock};
use uhmm_core::pagetable::{PageWord, State};
use uhmm_core::stats::Skip;
use uhmm_testdev::sim_host::{Attempts, Bed, Killed, Program, Setup, SimHost, Table, page_at, pages_at};

/// Where the device has page `n`, if it has it for itself.
fn frame(table: &Table, n: usize) -> Option<VirtAddr> {
    match table.entries.get(&page_at(n))? {
        PageView::Exclusive { at } => Some(*at),
        _ => None,
    }
}

type TableMirror<'m> = Mirror<'m, SimHost, Table>;

fn take_by(
    program: &Program,
    mm: &Arc<Mm<SimHost>>,
    mirror: &TableMirror<'_>,
    range: VaRange,
    by: Option<Owner>,
) -> Result<Exclusive, RangeFaultError> {
    let (terms, room) = (Terms { since: mm.epoch(), by }, &mut [Segment::UNUSED; 7]);
    let patience = &mut Attempts::new(mm, 10);
    program.with_scratch(|scratch| mirror.exclusive(range, &terms, room, scratch, patience, Table::install))
}

fn take(
    bed: &Bed,
    mirror: &TableMirror<'_>,
    first: usize,
    pages: usize,
) -> Result<Exclusive, RangeFaultError> {
    take_by(&bed.program, &bed.mm, mirror, pages_at(first, pages), None)
}

fn take_all(bed: &Bed, mirror: &TableMirror<'_>, first: usize, pages: usize) {
    let all = Exclusive { pages: PageCount::new(pages), ..Exclusive::default() };
    assert_eq!(take(bed, mirror, first, pages), Ok(all));
    assert_eq!(held(mirror, first, pages), pages);
}

/// The device adds `add` to what page `n` says. `false` if it has it not.
fn add(bed: &Bed, mirror: &TableMirror<'_>, n: usize, add: u64) -> bool {
    mirror.look(|table| match frame(table, n) {
        Some(at) => {
            bed.host().store_frame(at, bed.host().load_frame(at) + add);
            true
        }
        None => false,
    })
}

fn held(mirror: &TableMirror<'_>, first: usize, pages: usize) -> usize {
    mirror.look(|table| (first..first + pages).filter(|n| frame(table, *n).is_some()).count())
}

fn snapshot(bed: &Bed, first: usize, pages: usize) -> Vec<PageView> {
    let mut views = vec![PageView::Absent; pages];
    bed.mm.snapshot(pages_at(first, pages), &Request::SNAPSHOT, &mut views).unwrap();
    views
}

#[test]
fn a_touch_takes_back_what_the_device_wrote() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { track: true, ..setup });
        bed.fill(0, 20);
        let mirror = bed.mm.mirror(pages_at(0, 20), Table::default());
        take_all(&bed, &mirror, 0, 20);
        assert!(
            (0..20).all(|n| !bed.host().is_present(page_at(n)) && bed.word(n).state() == State::Exclusive)
        );
        assert!((0..20).all(|n| add(&bed, &mirror, n, 1000)));
        // A load is enough, and a store: each for its page alone.
        assert_eq!(bed.program.load(page_at(3)), Ok(1103));
        assert_eq!(bed.program.store(page_at(4), 7), Ok(()));
        assert_eq!((held(&mirror, 0, 20), held(&mirror, 3, 2)), (18, 0));
        assert_eq!(mirror.look(|table| *table.events.last().unwrap()), Event::Exclusive);
        assert!(!add(&bed, &mirror, 3, 1), "it is the program's again");
        assert_eq!((bed.program.load(page_at(3)), bed.program.load(page_at(4))), (Ok(1103), Ok(7)));
        for n in (0..20).filter(|n| *n != 4) {
            assert_eq!(bed.program.load(page_at(n)), Ok(1100 + n as u64));
        }
        assert_eq!(held(&mirror, 0, 20), 0);
        drop(mirror);
        bed.check_nothing_leaked();
    });
}

#[test]
fn pages_come_from_wherever_they_are() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { track: true, ..setup });
        bed.fill(0, 12);
        // 0..4 on the device, 4..8 tracked, 8..12 in RAM, 12..16 never touched.
        assert_eq!(bed.migrate(0, 8).moved, PageCount::new(8));
        bed.check(4, 4);
        let mirror = bed.mm.mirror(pages_at(0, 16), Table::default());
        take_all(&bed, &mirror, 0, 16);
        assert_eq!(bed.pagemap.live(), PageCount::ZERO, "copies that are about to be wrong");
        (0..16).for_each(|n| assert!(add(&bed, &mirror, n, 1)));
        (0..12).for_each(|n| assert_eq!(bed.program.load(page_at(n)), Ok(101 + n as u64)));
        (12..16).for_each(|n| assert_eq!(bed.program.load(page_at(n)), Ok(1)));
        drop(mirror);
        bed.check_nothing_leaked();
    });
}

#[test]
fn asked_for_once_more_a_page_stays_where_it_is() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
        take_all(&bed, &mirror, 0, 8);
        let words: Vec<_> = (0..8).map(|n| bed.word(n)).collect();
        assert_eq!(bed.program.load(page_at(5)), Ok(105));
        take_all(&bed, &mirror, 0, 8);
        (0..8).filter(|n| *n != 5).for_each(|n| assert_eq!(bed.word(n), words[n]));
        assert!(add(&bed, &mirror, 5, 1));
        assert_eq!(bed.program.load(page_at(5)), Ok(106));
    });
}

#[test]
fn of_two_devices_one_has_a_page() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        let one = bed.mm.mirror(pages_at(0, 8), Table::default());
        let other = bed.mm.mirror(pages_at(0, 8), Table::default());
        take_all(&bed, &one, 0, 8);
        assert!(add(&bed, &one, 3, 10));
        take_all(&bed, &other, 2, 4);
        assert_eq!((held(&one, 0, 8), held(&other, 0, 8)), (4, 4));
        assert!(add(&bed, &other, 3, 100) && !add(&bed, &one, 3, 1));
        take_all(&bed, &one, 0, 8);
        assert_eq!((held(&one, 0, 8), held(&other, 0, 8)), (8, 0));
        assert_eq!(bed.program.load(page_at(3)), Ok(213));
    });
}

#[test]
fn a_fault_of_another_mirror_is_a_touch_and_a_snapshot_is_none() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 4);
        let mirror = bed.mm.mirror(pages_at(0, 4), Table::default());
        take_all(&bed, &mirror, 0, 4);
        assert_eq!(snapshot(&bed, 0, 4), [PageView::Absent; 4]);
        let mut views = [PageView::Absent; 4];
        mirror.snapshot(pages_at(0, 4), &Request::SNAPSHOT, &mut views).unwrap();
        assert_eq!((views, held(&mirror, 0, 4)), ([PageView::Absent; 4], 4));
        let (request, patience) = (Request::all(Want::Read), &mut Attempts::new(&bed.mm, 10));
        bed.program
            .with_scratch(|scratch| {
                bed.mm.range_fault(pages_at(1, 2), &request, &mut views[..2], scratch, patience)
            })
            .unwrap();
        assert!(views[..2].iter().all(|view| matches!(view, PageView::Ram { write: true, .. })));
        assert_eq!((held(&mirror, 0, 4), held(&mirror, 1, 2)), (2, 0));
        bed.check(0, 4);
    });
}

#[test]
fn exclusive_mprotect() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
        take_all(&bed, &mirror, 0, 8);
        assert!(add(&bed, &mirror, 2, 1000));
        let change = Change::new(pages_at(0, 4), Event::Protect);
        let told = bed.mm.notifiers().begin(bed.host(), &change).unwrap();
        bed.host().set_read_only(pages_at(0, 4), true);
        drop(told);
        assert_eq!(held(&mirror, 0, 8), 4, "the device is to ask again");
        let calls = bed.host().calls();
        assert_eq!(take(&bed, &mirror, 0, 8), Err(RangeFaultError::Permission(page_at(0).base())));
        assert_eq!((bed.host().calls(), held(&mirror, 4, 4)), (calls, 4), "nothing was touched");
        // Home to where nobody may write.
        assert_eq!(bed.program.load(page_at(2)), Ok(1102));
        assert_eq!(bed.program.store(page_at(2), 1), Err(Killed::Segv));
        bed.host().set_read_only(pages_at(0, 4), false);
        take_all(&bed, &mirror, 0, 8);
        drop(mirror);
        bed.check_nothing_leaked();
    });
}

#[test]
fn exclusive_cow() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
        take_all(&bed, &mirror, 0, 8);
        (0..8).for_each(|n| assert!(add(&bed, &mirror, n, 1000)));
        let layout = bed.mm.lock_layout();
        bed.mm.forked(&layout, bed.memory());
        assert_eq!(held(&mirror, 0, 8), 0, "told before the bytes are the child's");
        for n in 0..8 {
            let mut copied = None;
            let word = bed.mm.word_for_child(&layout, page_at(n), |page, slot| {
                copied = Some((page, bed.host().load_frame(slot)));
            });
            assert_eq!((word, copied), (PageWord::RESIDENT, Some((page_at(n), 1100 + n as u64))));
        }
        drop(layout);
        // The parent's frames are its own as before.
        take_all(&bed, &mirror, 0, 4);
        (0..4).for_each(|n| assert!(add(&bed, &mirror, n, 1)));
        (0..8).for_each(|n| {
            assert_eq!(bed.program.load(page_at(n)), Ok(1100 + n as u64 + u64::from(n < 4)));
        });
        drop(mirror);
        bed.check_nothing_leaked();
    });
}

#[test]
fn what_is_given_up_is_gone() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 12);
        let mirror = bed.mm.mirror(pages_at(0, 12), Table::default());
        take_all(&bed, &mirror, 0, 12);
        bed.program.dontneed(pages_at(0, 4));
        assert_eq!((held(&mirror, 0, 12), bed.program.load(page_at(1))), (8, Ok(0)));
        bed.program.unmap(pages_at(4, 4));
        assert_eq!((held(&mirror, 0, 12), bed.program.load(page_at(5))), (4, Err(Killed::Segv)));
        assert_eq!(take(&bed, &mirror, 0, 12), Err(RangeFaultError::Fault(page_at(4).base())));
        assert!(add(&bed, &mirror, 9, 1));
        bed.program.remap(pages_at(8, 4), page_at(100));
        assert_eq!(held(&mirror, 0, 12), 0);
        assert_eq!(bed.word(101).state(), State::Staged, "nobody was told of the new address");
        assert_eq!((bed.program.load(page_at(100)), bed.program.load(page_at(101))), (Ok(108), Ok(110)));
        take_all(&bed, &mirror, 0, 4);
        drop(mirror);
        bed.check_nothing_leaked();
    });
}

#[test]
fn migrations_pass_over_what_is_lent() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
        take_all(&bed, &mirror, 2, 4);
        let done = bed.migrate_from(0, 8, &bed.pagemap, &Sources::RAM);
        assert_eq!((done.moved.get(), done.skipped.get(Skip::Exclusive)), (4, 4), "{done:?}");
        assert_eq!(held(&mirror, 2, 4), 0, "a migration is told of the whole range");
        take_all(&bed, &mirror, 2, 4);
        let done = bed.migrate(0, 8);
        assert_eq!((done.skipped.get(Skip::Exclusive), done.skipped.get(Skip::Elsewhere)), (4, 4));
        assert_eq!(bed.evict(None).moved, PageCount::new(4));
        assert_eq!(held(&mirror, 2, 4), 4);
        // Whoever asks for a page ahead of a touch touches it.
        assert_eq!(bed.program.prefetch(pages_at(0, 4)), PageCount::new(2));
        assert_eq!(held(&mirror, 2, 4), 2);
        assert_eq!(bed.migrate(0, 4).moved, PageCount::new(4));
        bed.check(0, 8);
        drop(mirror);
        bed.check_nothing_leaked();
    });
}

#[test]
fn pinned_pages_are_not_lent_and_a_pin_is_a_touch() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
        bed.mm.set_pinned(pages_at(1, 1), true);
        let done = take(&bed, &mirror, 0, 4).unwrap();
        assert_eq!((done.pages.get(), done.skipped.get(Skip::Pinned), held(&mirror, 0, 4)), (3, 1, 3));
        assert!(bed.host().pin(page_at(5), true));
        let done = take(&bed, &mirror, 4, 4).unwrap();
        if setup.can_move {
            assert_eq!((done.pages.get(), done.skipped.get(Skip::Busy)), (3, 1), "the kernel's own pin");
        }
        bed.host().pin(page_at(5), false);
        take_all(&bed, &mirror, 4, 4);
        let told = mirror.look(|table| table.events.len());
        let pin = bed.program.with_scratch(|scratch| {
            bed.mm.pin(pages_at(4, 2), uhmm_core::pin::PinFor::Write, scratch).unwrap()
        });
        assert_eq!(held(&mirror, 4, 4), 2);
        assert!(mirror.look(|table| table.events.len()) > told);
        assert_eq!(take(&bed, &mirror, 4, 4).map(|done| done.skipped.get(Skip::Pinned)), Ok(2));
        bed.mm.unpin(pin);
        take_all(&bed, &mirror, 4, 4);
        bed.mm.set_pinned(pages_at(1, 1), false);
        bed.check(0, 8);
        drop(mirror);
        bed.check_nothing_leaked();
    });
}

#[test]
fn an_arena_that_is_full_lends_what_it_can() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(Setup { slots: 5, ..setup });
        bed.fill(0, 8);
        let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
        let done = take(&bed, &mirror, 0, 8).unwrap();
        assert_eq!((done.pages.get(), done.skipped.get(Skip::NoFrame), done.skipped.total()), (5, 3, 3));
        bed.check(0, 8);
        drop(mirror);
        bed.check_nothing_leaked();
    });
}

#[test]
fn whoever_is_short_of_memory_ends_loans() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 8);
        let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
        take_all(&bed, &mirror, 0, 8);
        (0..8).for_each(|n| assert!(add(&bed, &mirror, n, 1000)));
        let mut slots = Vec::new();
        let ended = bed.mm.end_loans(bed.memory(), Select::All, PageCount::new(5), |slot| slots.push(slot));
        assert_eq!((ended.get(), slots.len(), held(&mirror, 0, 8)), (5, 5, 3));
        assert_eq!(bed.program.load(page_at(0)), Ok(1100), "taken back before it is written");
        let sent = bed.mm.write_back(&slots, &bed.pagemap, |_| ());
        assert_eq!((sent.moved.get(), sent.raced.get()), (4, 1));
        (0..8).for_each(|n| assert_eq!(bed.program.load(page_at(n)), Ok(1100 + n as u64)));
        assert_eq!(bed.mm.end_loans(bed.memory(), Select::All, PageCount::new(5), |_| ()), PageCount::ZERO);
        drop(mirror);
        bed.check_nothing_leaked();
    });
}

/// Notes what it is told, unless it is its own doing.
#[derive(Default)]
struct Driver {
    own: Option<Owner>,
    told: Mutex<Vec<(Event, Option<Owner>)>>,
}

impl Subscriber for Driver {
    fn invalidate(&self, change: &Change, mark: Mark<'_>) -> Result<(), WouldBlock> {
        if change.owner.is_none() || change.owner != self.own {
            mark.set();
            self.told.lock().unwrap().push((change.event, change.owner));
        }
        Ok(())
    }
}

#[test]
fn subscribers_of_the_owner_may_pass_over_the_taking_and_not_over_the_end() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 2);
    let owner = Some(Owner(5));
    let drivers = [owner, None].map(|own| Arc::new(Driver { own, ..Driver::default() }));
    let subscribe =
        |driver: &Arc<Driver>| bed.mm.notifiers().subscribe(bed.host(), pages_at(0, 2), driver.clone());
    let subscriptions = drivers.each_ref().map(subscribe);
    let mirror = bed.mm.mirror(pages_at(0, 2), Table::default());
    assert_eq!(
        take_by(&bed.program, &bed.mm, &mirror, pages_at(0, 2), owner).map(|done| done.pages.get()),
        Ok(2)
    );
    let told = |n: usize| drivers[n].told.lock().unwrap().clone();
    assert_eq!((told(0), told(1)), (vec![], vec![(Event::Exclusive, owner)]));
    bed.check(0, 1);
    assert_eq!(told(0), [(Event::Exclusive, None)]);
    drop(mirror);
    drop(subscriptions);
}

/// Touches the pages whenever they were taken, for so many times.
struct Thief<'a>(&'a Bed, u32);

impl Patience for Thief<'_> {
    fn begin(&mut self) {}

    fn again(&mut self, _why: Retry) -> bool {
        self.1 -= 1;
        self.1 > 0
    }

    fn moving(&mut self, work: &mut dyn FnMut()) {
        work();
        if self.1 > 1 {
            Program::new(self.0.mm.clone()).load(page_at(1)).unwrap();
        }
    }
}

#[test]
fn a_page_that_is_touched_meanwhile_is_asked_for_again() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 3);
        let mirror = bed.mm.mirror(pages_at(0, 3), Table::default());
        let terms = Terms { since: bed.mm.epoch(), by: None };
        let ask = |patience: &mut dyn Patience| {
            let room = &mut [Segment::UNUSED; 8];
            bed.program.with_scratch(|scratch| {
                mirror.exclusive(pages_at(0, 3), &terms, room, scratch, patience, Table::install)
            })
        };
        let mut thief = Thief(&bed, 6);
        assert_eq!(ask(&mut thief).map(|done| done.pages.get()), Ok(3));
        assert_eq!((thief.1, held(&mirror, 0, 3)), (1, 3));
        bed.check(0, 3);
        // Who has no patience gets what is left.
        struct Once<'a>(&'a Bed);
        impl Patience for Once<'_> {
            fn begin(&mut self) {}

            fn again(&mut self, why: Retry) -> bool {
                assert_eq!(why, Retry::Changed);
                false
            }

            fn moving(&mut self, work: &mut dyn FnMut()) {
                work();
                Program::new(self.0.mm.clone()).load(page_at(1)).unwrap();
            }
        }
        let done = ask(&mut Once(&bed)).unwrap();
        assert_eq!((done.pages.get(), done.skipped.get(Skip::Raced), done.skipped.total()), (2, 1, 1));
        assert_eq!((held(&mirror, 0, 3), held(&mirror, 1, 1)), (2, 0));
        bed.check(0, 3);
    });
}

#[test]
fn pages_whose_mapping_changed_are_not_taken_on_old_terms() {
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        bed.fill(0, 4);
        let terms = Terms { since: bed.mm.epoch(), by: None };
        // Mapped anew, and not registered, for all that is known.
        bed.program.unmap(pages_at(2, 2));
        bed.host().map(pages_at(2, 2));
        bed.fill(2, 2);
        let mirror = bed.mm.mirror(pages_at(0, 4), Table::default());
        let (room, patience) = (&mut [Segment::UNUSED; 2], &mut Attempts::new(&bed.mm, 10));
        let done = bed.program.with_scratch(|scratch| {
            mirror.exclusive(pages_at(0, 4), &terms, room, scratch, patience, Table::install)
        });
        let done = done.unwrap();
        assert_eq!((done.pages.get(), done.skipped.get(Skip::Changed)), (2, 2));
        bed.check(0, 4);
    });
}

#[test]
fn whichever_call_fails_nothing_is_lost() {
    let failures = [Stop::Pending, Stop::NoMemory, Stop::Busy, Stop::Refused, Stop::Errno(5)];
    for can_move in [true, false] {
        for failure in failures {
            let mut steps = 0;
            for n in 1.. {
                let bed = Bed::new(Setup { track: true, can_move, window: (1, 8), ..Setup::default() });
                bed.fill(0, 6);
                assert_eq!(bed.migrate(2, 2).moved, PageCount::new(2));
                let mirror = bed.mm.mirror(pages_at(0, 8), Table::default());
                let mut values: Vec<u64> = (0..6).map(|n| 100 + n).chain([0; 2]).collect();
                bed.host().fail_nth(n, failure);
                for round in 0..3 {
                    // Whatever it says: what it has is its own, and what it has not is not touched.
                    let _ = take(&bed, &mirror, 0, 8);
                    for (n, value) in values.iter_mut().enumerate() {
                        *value += 1000 * u64::from(add(&bed, &mirror, n, 1000));
                    }
                    for n in (round..8).step_by(3) {
                        assert_eq!(bed.program.load(page_at(n)), Ok(values[n]), "{failure:?} {n}");
                    }
                    let _ = bed.mm.migrate(pages_at(0, 8), bed.mm.epoch(), &bed.pagemap, Select::All);
                }
                let reached = !bed.host().failure_pending();
                bed.host().fail_nth(0, Stop::Complete);
                (0..8).for_each(|n| assert_eq!(bed.program.load(page_at(n)), Ok(values[n]), "page {n}"));
                take_all(&bed, &mirror, 0, 8);
                drop(mirror);
                bed.check_nothing_leaked();
                if !reached {
                    break;
                }
                steps = n;
            }
            assert!(steps > 10, "{failure:?} fired at {steps} steps only");
        }
    }
}

#[test]
fn the_end_of_the_space_is_told() {
    let bed = Bed::new(Setup::default());
    bed.fill(0, 4);
    let mirror = bed.mm.mirror(pages_at(0, 4), Table::default());
    take_all(&bed, &mirror, 0, 4);
    bed.mm.close();
    assert_eq!(held(&mirror, 0, 4), 0);
    assert_eq!(take(&bed, &mirror, 0, 4), Err(RangeFaultError::Closed));
    let outside = pages_at(2, 4);
    assert_eq!(
        take_by(&bed.program, &bed.mm, &mirror, outside, None),
        Err(RangeFaultError::Outside(outside))
    );
    drop(mirror);
    bed.check(0, 4);
    bed.check_nothing_leaked();
}

/// Says that it is over, whether the test went well or not: whoever waits for that must not wait for ever.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn devices_and_a_program_count_together() {
    // Each touch is a change of threads, for which a busy machine takes its time.
    const ROUNDS: u64 = 100;
    Setup::both_ways(|setup| {
        let bed = Bed::new(setup);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (mm, over, bed) = (&bed.mm, &over, &bed);
            let device = |_| {
                scope.spawn(move || {
                    let program = Program::new(mm.clone());
                    let mirror = mm.mirror(pages_at(0, 4), Table::default());
                    let mut added = [0; 4];
                    for round in 0.. {
                        let n = round % 4;
                        if mirror.look(|table| {
                            let Some(at) = frame(table, n) else { return false };
                            mm.host().store_frame(at, mm.host().load_frame(at) + 1);
                            true
                        }) {
                            added[n] += 1;
                        } else {
                            match take_by(&program, mm, &mirror, pages_at(0, 4), None) {
                                Ok(_) | Err(RangeFaultError::TimedOut(_)) => {}
                                Err(error) => panic!("{error}"),
                            }
                        }
                        if over.load(Ordering::Acquire) && added[n] > 0 {
                            return added;
                        }
                    }
                    unreachable!("rounds without end")
                })
            };
            let devices = [0, 1].map(device);
            let ending = Ending(over);
            for _ in 0..ROUNDS {
                (0..4).for_each(|n| assert_eq!(bed.program.load(page_at(n)).map(drop), Ok(()), "page {n}"));
                std::thread::yield_now();
            }
            drop(ending);
            let [one, other] = devices.map(|device| device.join().unwrap());
            for (n, (one, other)) in one.into_iter().zip(other).enumerate() {
                assert_eq!(bed.program.load(page_at(n)), Ok(one + other), "page {n}");
            }
        });
        bed.check_nothing_leaked();
    });
}
