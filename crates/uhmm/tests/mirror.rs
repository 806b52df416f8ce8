//! Mirrors on the running kernel: what pages are, how they are brought, and what is never installed.

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::child::{expect_well, fork};
use common::deaf::Deaf;
use common::{
    Memory, PAGE, Setup, WORDS, check, check_from, eventually, expect_places, fill, memory, part, settle,
};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use uhmm::mirror::{
    DEFAULT_TIMEOUT, Mirror, MirrorError, MirrorTable, PageView, Pages, RangeFaultError, Request, Retry,
    Unusable, Want,
};
use uhmm::notifier::Event;
use uhmm::{ByteSize, Engine, Geometry, PageCount, VaRange, Vpn};
use uhmm_sys::scan::{Categories, PagemapScan, Query, Region};

scenarios!(
    a_snapshot_tells_places_apart,
    a_write_fault_makes_pages_writable,
    what_is_asked_for_comes_home,
    pages_of_ones_own_stay,
    a_forbidden_write_touches_nothing,
    a_change_of_protection_is_told,
    batches_across_chunks,
    a_huge_mapping_has_its_order,
    a_budget_is_kept_while_populating,
    a_mirror_never_lies,
    whole_chunks_are_known_until_they_change,
    a_mirror_that_knows_whole_chunks_never_lies,
    patience_comes_to_an_end,
    changes_without_end,
    a_lost_page_is_told_by_its_address,
    mirrors_come_and_go_beside_changes,
    the_end_of_an_adoption_is_told,
);
with_engine!(Threads, threads_events_move, threads_events_fallback:
    what_the_program_takes_away_is_not_installed,
    what_came_home_is_told_as_the_system_has_it,
    what_came_home_and_was_given_up_is_told_by_nobody,
);

const PAGES: usize = 32;
const CHUNK: usize = 512;

const RAM: PageView = PageView::Ram { write: true, order: Geometry::K4 };
const READ_ONLY: PageView = PageView::Ram { write: false, order: Geometry::K4 };
const UNMAPPED: PageView = PageView::Error(Unusable::Unmapped);

/// What a device would know.
#[derive(Default)]
struct Table {
    entries: BTreeMap<Vpn, PageView>,
    told: usize,
    last: Option<Event>,
}

impl MirrorTable for Table {
    fn invalidate(&mut self, range: VaRange, event: Event) {
        // Entries are changed in place: nothing is allocated or freed here.
        let pages = self.entries.range_mut(range.first()..range.end_page());
        pages.for_each(|(_, entry)| *entry = PageView::Absent);
        self.told += 1;
        self.last = Some(event);
    }
}

impl Table {
    fn install(&mut self, pages: Pages<'_>) {
        self.entries.extend(pages.iter());
    }
}

fn snapshot(mirror: &Mirror<'_, Table>, range: VaRange) -> Vec<PageView> {
    let mut views = vec![PageView::Absent; range.pages().get()];
    mirror.snapshot(range, &mut views).unwrap();
    views
}

fn mirrored(mirror: &Mirror<'_, Table>, range: VaRange) -> Vec<PageView> {
    let view = |table: &Table, page| table.entries.get(&page).copied().unwrap_or_default();
    mirror.look(|table| range.iter().map(|page| view(table, page)).collect())
}

fn a_snapshot_tells_places_apart(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, 8), 1);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    assert_eq!(space.migrate(part(range, 2, 2)).unwrap().moved, PageCount::new(2));
    memory.protect(4, 2, MprotectFlags::READ);
    memory.protect(6, 1, MprotectFlags::empty());
    let mirror = space.mirror(range, Table::default()).unwrap();
    let views = snapshot(&mirror, part(range, 0, 9));
    let absent = PageView::Absent;
    assert_eq!(views, [RAM, RAM, absent, absent, READ_ONLY, READ_ONLY, UNMAPPED, RAM, absent]);
    let own = space.mirror(range, Table::default()).unwrap().of_device(0).unwrap();
    let views = snapshot(&own, part(range, 1, 4));
    assert!(matches!(views[1], PageView::Device { write: true, .. }), "{views:?}");
    assert_eq!((views[0], views[3]), (RAM, READ_ONLY));
    // Looking brought nothing.
    memory.protect(6, 1, MprotectFlags::READ | MprotectFlags::WRITE);
    expect_places(&space, range, 6, 2);
    let elsewhere = Memory::new(1);
    assert!(matches!(space.mirror(elsewhere.range(), Table::default()), Err(MirrorError::Unmanaged(_))));
    assert!(matches!(mirror.of_device(1), Err(MirrorError::NoDevice(1))));
    drop(own);
    drop(adopted);
}

fn a_write_fault_makes_pages_writable(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let mirror = space.mirror(range, Table::default()).unwrap();
    mirror.populate(range, Want::Read, Table::install).unwrap();
    let views = mirrored(&mirror, range);
    assert!(views.iter().all(|view| view.is_valid()), "{views:?}");
    assert!(!views[0].may_write(), "the page of zeros");
    mirror.populate(range, Want::Write, Table::install).unwrap();
    assert_eq!(mirrored(&mirror, range), [RAM; PAGES]);
    fill(memory.words_mut(0, PAGES), 2);
    // Pages that were read from a device keep their copy there, and are protected for it.
    assert_eq!(space.migrate(range).unwrap().moved, PageCount::new(PAGES));
    assert_eq!(mirrored(&mirror, range), [PageView::Absent; PAGES]);
    check(memory.words(0, PAGES), 2);
    settle(&space, range);
    let tracked = snapshot(&mirror, range).iter().any(|view| !view.may_write());
    assert_eq!(tracked, setup.keeps_copies());
    mirror.populate(range, Want::Write, Table::install).unwrap();
    assert_eq!(mirrored(&mirror, range), [RAM; PAGES]);
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO), "the copies are given up");
    check(memory.words(0, PAGES), 2);
    drop(mirror);
    drop(adopted);
}

fn what_is_asked_for_comes_home(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 3);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let mirror = space.mirror(range, Table::default()).unwrap();
    assert_eq!(space.migrate(range).unwrap().moved, PageCount::new(PAGES));
    let wants: Vec<Want> = (0..PAGES).map(|n| if n % 4 == 0 { Want::Write } else { Want::Nothing }).collect();
    let some = Request::default().each(Want::Write, &wants);
    mirror.populate(range, some, Table::install).unwrap();
    for (n, view) in mirrored(&mirror, range).into_iter().enumerate() {
        assert_eq!(view == RAM, n % 4 == 0, "page {n}: {view:?}");
    }
    expect_places(&space, range, PAGES / 4, PAGES - PAGES / 4);
    mirror.populate(range, Want::Read, Table::install).unwrap();
    assert!(mirrored(&mirror, range).iter().all(|view| view.is_valid()));
    check(memory.words(0, PAGES), 3);
    drop(mirror);
    drop(adopted);
}

fn pages_of_ones_own_stay(setup: Setup) {
    let device = || memory(ByteSize::mib(4));
    let space = setup.builder().device(device()).device(device()).build().unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 4);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let (own, foreign) = (part(range, 0, 8), part(range, 8, 8));
    assert_eq!(space.migrate_to(own, 0).unwrap().moved, PageCount::new(8));
    assert_eq!(space.migrate_to(foreign, 1).unwrap().moved, PageCount::new(8));
    let mirror = space.mirror(range, Table::default()).unwrap().of_device(0).unwrap();
    mirror.populate(range, Want::Write, Table::install).unwrap();
    let views = mirrored(&mirror, range);
    assert!(views[..8].iter().all(|view| matches!(view, PageView::Device { write: true, .. })), "{views:?}");
    assert!(views[8..].iter().all(|view| *view == RAM), "{views:?}");
    assert_eq!(
        (space.device_pages(0), space.device_pages(1)),
        (Some(PageCount::new(8)), Some(PageCount::ZERO))
    );
    check(memory.words(0, PAGES), 4);
    assert_eq!(mirrored(&mirror, own), [PageView::Absent; 8], "the touch was told");
    drop(mirror);
    drop(adopted);
}

fn a_forbidden_write_touches_nothing(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 5);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    assert_eq!(space.migrate(range).unwrap().moved, PageCount::new(PAGES));
    memory.protect(20, 2, MprotectFlags::READ);
    let mirror = space.mirror(range, Table::default()).unwrap();
    let forbidden = mirror.populate(range, Want::Write, Table::install);
    assert_eq!(forbidden, Err(RangeFaultError::Permission(part(range, 20, 1).start())));
    expect_places(&space, range, 0, PAGES);
    assert_eq!(mirrored(&mirror, range), [PageView::Absent; PAGES]);
    mirror.populate(range, Want::Read, Table::install).unwrap();
    assert!(mirrored(&mirror, part(range, 20, 2)).iter().all(|view| view.is_valid() && !view.may_write()));
    memory.protect(21, 1, MprotectFlags::empty());
    let unreadable = mirror.populate(range, Want::Read, Table::install);
    assert_eq!(unreadable, Err(RangeFaultError::Fault(part(range, 21, 1).start())));
    memory.protect(20, 2, MprotectFlags::READ | MprotectFlags::WRITE);
    check(memory.words(0, PAGES), 5);
    drop(mirror);
    drop(adopted);
}

fn a_change_of_protection_is_told(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 6);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let mirror = space.mirror(range, Table::default()).unwrap();
    let mut attempts = 0;
    // Changed by another thread between the look and the lock: what is installed is what is true then.
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..200 {
                space.protect(part(range, 3, 5), round % 2 == 1).unwrap();
            }
            over.store(true, Ordering::Release);
        });
        while !over.load(Ordering::Acquire) || attempts == 0 {
            attempts += 1;
            mirror.populate(range, Want::Nothing, Table::install).unwrap();
        }
    });
    assert!(mirror.look(|table| table.last == Some(Event::Protect) && table.told >= 200));
    space.protect(part(range, 3, 5), false).unwrap();
    assert_eq!(mirrored(&mirror, part(range, 3, 5)), [PageView::Absent; 5]);
    let forbidden = mirror.populate(range, Want::Write, Table::install);
    assert_eq!(forbidden, Err(RangeFaultError::Permission(part(range, 3, 1).start())));
    space.protect(part(range, 3, 5), true).unwrap();
    mirror.populate(range, Want::Write, Table::install).unwrap();
    fill(memory.words_mut(0, PAGES), 7);
    let elsewhere = Memory::new(1);
    assert!(space.protect(elsewhere.range(), false).is_err());
    drop(mirror);
    drop(adopted);
}

fn batches_across_chunks(setup: Setup) {
    let pages = 3 * CHUNK + 100;
    let space = setup.space(ByteSize::mib(16));
    let mut memory = Memory::new(pages);
    fill(memory.words_mut(0, pages), 8);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    assert_eq!(space.migrate(part(range, 300, CHUNK)).unwrap().moved, PageCount::new(CHUNK));
    let mirror = space.mirror(range, Table::default()).unwrap();
    let mut seen = 0;
    mirror
        .populate(range, Want::Write, |table, batch| {
            assert_eq!(batch.views().count(), batch.range().pages().get());
            seen += batch.views().count();
            table.install(batch);
        })
        .unwrap();
    assert_eq!(seen, pages);
    assert!(mirrored(&mirror, range).iter().all(|view| view.may_write()));
    assert!(snapshot(&mirror, range).iter().all(|view| view.may_write()));
    check(memory.words(0, pages), 8);
    let beyond = part(range, 1, pages - 1).grow(PageCount::new(pages));
    let outside = mirror.populate(beyond, Want::Read, Table::install);
    assert_eq!(outside, Err(RangeFaultError::Outside(beyond)));
    drop(mirror);
    drop(adopted);
}

fn a_huge_mapping_has_its_order(setup: Setup) {
    let space = setup.builder().huge_pages(true).device(memory(ByteSize::mib(8))).build().unwrap();
    let mut buffer = space.map_huge::<u64>(2 * CHUNK * PAGE / 8).unwrap();
    fill(&mut buffer, 9);
    let range = buffer.range();
    let mirror = space.mirror(range, Table::default()).unwrap();
    let views = snapshot(&mirror, range);
    let huge = PageView::Ram { write: true, order: Geometry::M2 };
    if views[0] != huge || views[CHUNK] != huge {
        common::skip("a_huge_mapping_has_its_order", "the system gave no huge pages");
        return;
    }
    mirror.populate(range, Want::Write, Table::install).unwrap();
    assert_eq!(mirrored(&mirror, range), vec![huge; 2 * CHUNK]);
    assert_eq!(snapshot(&mirror, part(range, 1, CHUNK)), vec![RAM; CHUNK], "no whole chunk was asked about");
    assert_eq!(space.migrate(part(range, 5, 3)).unwrap().moved, PageCount::new(3));
    let views = snapshot(&mirror, range);
    assert_eq!((views[4], views[5], views[CHUNK]), (RAM, PageView::Absent, huge));
    drop(mirror);
    check(&buffer, 9);
}

fn a_budget_is_kept_while_populating(setup: Setup) {
    let pages = 2 * CHUNK;
    let space = setup.builder().ram(ByteSize::mib(2)).device(memory(ByteSize::mib(16))).build().unwrap();
    let memory = Memory::new(pages);
    let adopted = memory.adopt(&space);
    let mirror = space.mirror(memory.range(), Table::default()).unwrap();
    // Twice what may be in RAM, a little at a time.
    for n in (0..pages).step_by(64) {
        let range = part(memory.range(), n, 64);
        mirror.populate(range, Want::Write, Table::install).unwrap();
    }
    // As long as the lock is held, no change gets past its callback.
    let (valid, resident) = mirror.look(|table| {
        let valid = table.entries.values().filter(|view| view.is_valid()).count();
        (valid, space.residency(memory.range()).resident.get())
    });
    assert!(valid <= resident, "{valid} pages are said to be there, and {resident} are");
    eventually(|| {
        let valid = mirror.look(|table| table.entries.values().filter(|view| view.is_valid()).count());
        valid <= CHUNK
    });
    drop(mirror);
    drop(adopted);
}

fn a_mirror_never_lies(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 10);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let mirror = space.mirror(range, Table::default()).unwrap().of_device(0).unwrap();
    let over = AtomicBool::new(false);
    let seen = [AtomicUsize::new(0), AtomicUsize::new(0)];
    thread::scope(|scope| {
        let mirroring = scope.spawn(|| {
            let mut round = 0;
            while !over.load(Ordering::Acquire) {
                let want = if round % 3 == 0 { Want::Read } else { Want::Nothing };
                match mirror.populate(range, want, Table::install) {
                    Ok(()) | Err(RangeFaultError::TimedOut(_)) => {}
                    Err(error) => panic!("{error}"),
                }
                round += 1;
                // As long as the lock is held, no change gets past its callback.
                mirror.look(|table| {
                    for (page, view) in &table.entries {
                        let found = space.residency(VaRange::page(*page));
                        match view {
                            PageView::Ram { .. } => {
                                assert_eq!(found.resident, PageCount::ONE, "{found:?}");
                                seen[0].fetch_add(1, Ordering::Relaxed);
                            }
                            PageView::Device { .. } => {
                                assert_eq!(found.resident.get(), 0, "{found:?}");
                                seen[1].fetch_add(1, Ordering::Relaxed);
                            }
                            _ => {}
                        }
                    }
                });
            }
        });
        let mut rounds = 0;
        while rounds < 100
            || (!mirroring.is_finished() && seen.iter().any(|times| times.load(Ordering::Relaxed) == 0))
        {
            let _ = space.migrate(range).unwrap();
            thread::sleep(Duration::from_micros(100));
            check(memory.words(0, PAGES), 10);
            thread::sleep(Duration::from_micros(100));
            rounds += 1;
        }
        over.store(true, Ordering::Release);
    });
    drop(mirror);
    drop(adopted);
}

fn whole_chunks_are_known_until_they_change(setup: Setup) {
    let pages = 4 * CHUNK;
    let space = setup.space(ByteSize::mib(16));
    let mut memory = Memory::new(pages);
    fill(memory.words_mut(0, pages), 20);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let mirror = space.mirror(range, Table::default()).unwrap();
    let hears = setup.engine == Engine::Threads;
    let as_found = |what: &str| {
        let (there, told) = (present(range), snapshot(&mirror, range));
        assert!(told.iter().zip(there).all(|(view, there)| !view.is_valid() || there), "{what}");
        let mut found = vec![UNMAPPED; pages];
        space.snapshot(range, None, &mut found).unwrap();
        let known = snapshot(&mirror, range);
        let wrong = known.iter().zip(&found).position(|(known, found)| known != found);
        assert_eq!(wrong.map(|n| (n, known[n], found[n])), None, "{what}");
    };
    let acts: [(&str, &dyn Fn()); 6] = [
        ("a page leaves", &|| assert_eq!(space.migrate(part(range, 700, 1)).unwrap().moved.get(), 1)),
        ("pages leave across a border", &|| {
            assert_eq!(space.migrate(part(range, 2 * CHUNK - 40, 80)).unwrap().moved.get(), 80);
        }),
        ("it may only be read", &|| memory.protect(CHUNK, CHUNK, MprotectFlags::READ)),
        ("and written", &|| memory.protect(CHUNK, CHUNK, MprotectFlags::READ | MprotectFlags::WRITE)),
        ("contents are given up", &|| {
            if hears {
                memory.give_up(900, 3);
            }
        }),
        ("all of it leaves", &|| assert!(space.migrate(range).unwrap().moved.get() > 0)),
    ];
    for (what, act) in acts {
        let populated = mirror.populate(range, Want::Write, Table::install);
        assert!(populated.is_ok() || what == "and written", "{populated:?}");
        as_found("all of it is there");
        settle(&space, range);
        act();
        as_found(what);
    }
    check(memory.words(0, 900), 20);
    drop(mirror);
    drop(adopted);
}

fn a_mirror_that_knows_whole_chunks_never_lies(setup: Setup) {
    let pages = 3 * CHUNK;
    let space = setup.space(ByteSize::mib(16));
    let mut memory = Memory::new(pages);
    fill(memory.words_mut(0, pages), 21);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let mirror = space.mirror(range, Table::default()).unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                match mirror.populate(range, Want::Nothing, Table::install) {
                    Ok(()) | Err(RangeFaultError::TimedOut(_)) => {}
                    Err(error) => panic!("{error}"),
                }
                // As long as the lock is held, no change gets past its callback.
                mirror.look(|table| {
                    let there = table.entries.values().filter(|view| view.is_valid()).count();
                    let found = space.residency(range).resident;
                    assert!(there <= found.get(), "{there} are said to be there, {found:?} are");
                });
            }
        });
        for round in 0..150 {
            let page = round * 97 % pages;
            let _ = space.migrate(part(range, page, 1)).unwrap();
            thread::sleep(Duration::from_micros(200));
            check_from(memory.words(page, 1), 21, page * WORDS);
            thread::sleep(Duration::from_micros(200));
        }
        over.store(true, Ordering::Release);
    });
    check(memory.words(0, pages), 21);
    drop(mirror);
    drop(adopted);
}

/// Which pages of `range` the system says to be there.
fn present(range: VaRange) -> Vec<bool> {
    let query = Query { required: Categories::PRESENT, report: Categories::PRESENT, ..Query::default() };
    let mut found = [Region::UNUSED; 64];
    let scanned = PagemapScan::open().unwrap().scan(range, query, &mut found).unwrap();
    assert_eq!(scanned.walk_end, range.end(), "more regions than expected");
    let is_there = |page: Vpn| found[..scanned.regions].iter().any(|region| region.range.contains(page));
    range.iter().map(is_there).collect()
}

/// Nothing is asked of the system about pages that we brought home ourselves: whatever the program does to them, it is to be
/// told as if it were.
fn what_came_home_is_told_as_the_system_has_it(setup: Setup) {
    let pages = 2 * CHUNK + 40;
    let space = setup.builder().device(memory(ByteSize::mib(16))).clean_copies(false).build().unwrap();
    let mut memory = Memory::new(pages);
    fill(memory.words_mut(0, pages), 22);
    let range = memory.range();
    // SAFETY: the test's own memory, to which no reference is held across what is done to it.
    unsafe { space.watch(range) }.unwrap();
    let come_home = || {
        let _ = space.migrate(range).unwrap();
        space.prefetch(range).unwrap();
    };
    let (writable, readable) = (MprotectFlags::READ | MprotectFlags::WRITE, MprotectFlags::READ);
    let write = |first: usize, pages: usize| {
        // SAFETY: pages of the test's own memory that may be written.
        (first..first + pages).for_each(|page| unsafe { memory.page(page).cast::<u64>().write_volatile(1) });
    };
    let map_anew = |first: usize, pages: usize| {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
        // SAFETY: replaces pages of the test's own memory.
        unsafe { rustix::mm::mmap_anonymous(memory.page(first).cast(), pages * PAGE, prot, flags) }.unwrap();
    };
    let acts: [(&str, &dyn Fn()); 12] = [
        ("all of it is there", &|| ()),
        ("some was given up", &|| memory.give_up(500, 30)),
        ("and written again", &|| write(510, 10)),
        ("a page left", &|| assert_eq!(space.migrate(part(range, 3, 1)).unwrap().moved, PageCount::ONE)),
        ("and was touched", &|| write(3, 1)),
        ("some may only be read", &|| memory.protect(100, 50, readable)),
        ("some may not be touched", &|| memory.protect(120, 10, MprotectFlags::empty())),
        ("and written again, all of it", &|| memory.protect(100, 50, writable)),
        ("it was shared with a child", &|| expect_well(fork(|| true))),
        ("some was unmapped", &|| memory.unmap(600, 20)),
        ("and mapped anew", &|| map_anew(600, 20)),
        ("and written", &|| write(605, 5)),
    ];
    for home in [true, false] {
        for (what, act) in &acts {
            if home {
                come_home();
            }
            act();
            // A thread goes on as soon as its page is there, a moment before that is known of it.
            settle(&space, range);
            let (there, mappings) = (present(range), space.mappings(range).unwrap());
            let mut views = vec![UNMAPPED; pages];
            space.snapshot(range, None, &mut views).unwrap();
            for (n, page) in range.iter().enumerate() {
                let mapping = mappings.iter().find(|mapping| mapping.range.contains(page));
                let expected = match mapping {
                    Some(mapping) if mapping.read && there[n] && mapping.write => RAM,
                    Some(mapping) if mapping.read && there[n] => READ_ONLY,
                    Some(mapping) if mapping.read => PageView::Absent,
                    _ => UNMAPPED,
                };
                // What was given up may be there for a moment longer, and is not counted on.
                let given_up = views[n] == PageView::Absent && (500..530).contains(&n);
                assert!(
                    views[n] == expected || given_up,
                    "{what}: page {n}: {:?}, not {expected:?}",
                    views[n]
                );
            }
        }
        write(0, pages);
    }
    space.unwatch(range);
}

/// A thread that has given pages up finds them told to be there by nobody, however often they come home beside it.
fn what_came_home_and_was_given_up_is_told_by_nobody(setup: Setup) {
    let pages = 2 * CHUNK;
    let space = setup.builder().device(memory(ByteSize::mib(16))).clean_copies(false).build().unwrap();
    let mut memory = Memory::new(pages);
    fill(memory.words_mut(0, pages), 23);
    let range = memory.range();
    let adopted = memory.adopt(&space);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                let _ = space.migrate(range).unwrap();
                space.prefetch(range).unwrap();
            }
        });
        for round in 0..400 {
            let (first, count) = (round * 131 % (pages - 64), 1 + round * 17 % 64);
            let given_up = part(range, first, count);
            memory.give_up(first, count);
            let told = |segment: uhmm::mirror::Segment| {
                assert!(!segment.view().is_valid(), "round {round}: {segment:?}");
            };
            space.segments(given_up, None, told).unwrap();
            for page in first..first + count {
                // SAFETY: a page of the test's own memory, which nobody else writes.
                unsafe { memory.page(page).cast::<u64>().write_volatile(round as u64) };
            }
            space.segments(given_up, Some(0), |_| ()).unwrap();
        }
        over.store(true, Ordering::Release);
    });
    drop(adopted);
}

fn patience_comes_to_an_end(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 14);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    assert_eq!(space.migrate(range).unwrap().moved, PageCount::new(PAGES));
    let mirror = space.mirror(range, Table::default()).unwrap().timeout(Duration::ZERO);
    // That the pages come home is a change, after which there is no time left.
    let outcome = mirror.populate(range, Want::Read, Table::install);
    assert_eq!(outcome, Err(RangeFaultError::TimedOut(Retry::Changed)));
    assert_eq!(mirrored(&mirror, range), [PageView::Absent; PAGES]);
    let mirror = mirror.timeout(DEFAULT_TIMEOUT);
    mirror.populate(range, Want::Read, Table::install).unwrap();
    assert!(mirrored(&mirror, range).iter().all(|view| view.is_valid()));
    drop(mirror);
    drop(adopted);
}

fn changes_without_end(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 11);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let mirror = space.mirror(range, Table::default()).unwrap().timeout(Duration::from_millis(20));
    let over = AtomicBool::new(false);
    let outcome = thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Acquire) {
                    space.protect(range, true).unwrap();
                }
            });
        }
        let start = Instant::now();
        let mut outcome = Ok(());
        while outcome.is_ok() && start.elapsed() < Duration::from_secs(3) {
            let before = Instant::now();
            outcome = mirror.populate(range, Want::Write, Table::install);
            assert!(before.elapsed() < Duration::from_secs(2), "the deadline is kept");
        }
        over.store(true, Ordering::Release);
        outcome
    });
    // Now and then an attempt is lucky, even always.
    assert!(matches!(outcome, Ok(()) | Err(RangeFaultError::TimedOut(Retry::Changed))), "{outcome:?}");
    mirror.populate(range, Want::Write, Table::install).unwrap();
    drop(mirror);
    drop(adopted);
}

fn a_lost_page_is_told_by_its_address(setup: Setup) {
    let device = Deaf::new(memory(ByteSize::mib(4)));
    let space = setup.with(device.clone());
    let mut buffer = space.map::<u64>(PAGES * PAGE / 8).unwrap();
    fill(&mut buffer, 15);
    let range = buffer.range();
    let lost = part(range, 7, 1);
    assert_eq!(space.migrate(lost).unwrap().moved, PageCount::ONE);
    device.set(true);
    let mirror = space.mirror(range, Table::default()).unwrap();
    for _ in 0..2 {
        let outcome = mirror.populate(range, Want::Read, Table::install);
        assert_eq!(outcome, Err(RangeFaultError::Poisoned(lost.start())));
    }
    mirror.populate(range, Want::Nothing, Table::install).unwrap();
    let views = mirrored(&mirror, range);
    assert_eq!(views[7], PageView::Error(Unusable::Poisoned));
    assert!(views.iter().enumerate().all(|(n, view)| n == 7 || *view == RAM), "{views:?}");
}

fn mirrors_come_and_go_beside_changes(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 16);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for first in [0, 8] {
            let (space, over) = (&space, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    let range = part(range, first, 16);
                    let mirror = space.mirror(range, Table::default()).unwrap();
                    match mirror.populate(range, Want::Write, Table::install) {
                        Ok(()) | Err(RangeFaultError::TimedOut(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                    let told = mirror.look(|table| table.told);
                    assert!(mirror.into_table().told >= told);
                }
            });
        }
        for _ in 0..200 {
            let _ = space.migrate(range).unwrap();
            check(memory.words(0, PAGES), 16);
        }
        over.store(true, Ordering::Release);
    });
    drop(adopted);
    check(memory.words(0, PAGES), 16);
}

fn the_end_of_an_adoption_is_told(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 12);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let mirror = space.mirror(range, Table::default()).unwrap();
    mirror.populate(range, Want::Write, Table::install).unwrap();
    drop(adopted);
    assert_eq!(mirrored(&mirror, range), [PageView::Absent; PAGES]);
    assert_eq!(snapshot(&mirror, range), [UNMAPPED; PAGES], "nobody would tell of changes any more");
    let unmanaged = mirror.populate(range, Want::Read, Table::install);
    assert_eq!(unmanaged, Err(RangeFaultError::Fault(range.start())));
    let adopted = memory.adopt(&space);
    assert_eq!(snapshot(&mirror, range), [UNMAPPED; PAGES]);
    let anew = space.mirror(range, Table::default()).unwrap();
    anew.populate(range, Want::Write, Table::install).unwrap();
    assert_eq!(mirrored(&anew, range), [RAM; PAGES]);
    assert_eq!(mirror.into_table().last, Some(Event::Unmap));
    drop(anew);
    drop(adopted);
    check(memory.words(0, PAGES), 12);
}

fn what_the_program_takes_away_is_not_installed(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 13);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let mirror = space.mirror(range, Table::default()).unwrap();
    let (over, filled) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                match mirror.populate(range, Want::Write, Table::install) {
                    Ok(()) => _ = filled.fetch_add(1, Ordering::Release),
                    Err(RangeFaultError::TimedOut(_)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
        let mut rounds = 0;
        while rounds < 200 || filled.load(Ordering::Acquire) == 0 {
            memory.give_up(4, 8);
            thread::sleep(Duration::from_micros(100));
            rounds += 1;
        }
        over.store(true, Ordering::Release);
    });
    // The program goes on as soon as its event was read, a moment before it is told of.
    memory.give_up(4, 8);
    eventually(|| mirrored(&mirror, part(range, 4, 8)) == [PageView::Absent; 8]);
    assert_eq!(snapshot(&mirror, part(range, 4, 8)), [PageView::Absent; 8]);
    mirror.populate(range, Want::Write, Table::install).unwrap();
    assert_eq!(mirrored(&mirror, range), [RAM; PAGES]);
    // SAFETY: pages of this mapping, which nobody touches any more; the memory knows of holes.
    unsafe { rustix::mm::munmap(memory.page(12).cast(), 4 * PAGE) }.unwrap();
    eventually(|| mirrored(&mirror, part(range, 11, 6))[1..5] == [PageView::Absent; 4]);
    let gone = mirror.populate(range, Want::Read, Table::install);
    assert_eq!(gone, Err(RangeFaultError::Fault(part(range, 12, 1).start())));
    assert_eq!(snapshot(&mirror, part(range, 11, 6)), [RAM, UNMAPPED, UNMAPPED, UNMAPPED, UNMAPPED, RAM]);
    check(memory.words(0, 4), 13);
    drop(mirror);
    drop(adopted);
}
