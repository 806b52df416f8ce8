//! The end of things beside their use: devices that are emptied while pages move to them, memory that goes while a device
//! collects its pages, and who is named when a device does not become empty.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::deaf::Deaf;
use common::{Memory, Random, Setup, WORDS, check, check_from, eventually, fill, memory, part, settle};
use uhmm::mirror::{MirrorTable, PageView, RangeFaultError, Want};
use uhmm::notifier::Event;
use uhmm::space::{DrainError, MigrateError};
use uhmm::{ByteSize, MemDevice, PageCount, PinFor, Skip, Space, VaRange, Vpn};

scenarios!(
    a_device_is_emptied_while_pages_move_to_it,
    a_drained_device_stays_empty,
    a_device_that_loses_pages_is_not_empty,
    populating_races_the_end_of_an_adoption,
);
with_engine!(Threads, threads_events_move, threads_events_fallback: populating_races_unmapping);

// Only where frames are moved is there anything that a pin keeps on a device.
mod holders {
    use super::common::{Setup, run};
    use uhmm::Engine;

    #[test]
    fn signal_move() {
        let setup = Setup { engine: Engine::Signal, forced_fallback: false };
        run("holders::signal_move", setup, super::who_is_in_the_way_is_named);
    }

    #[test]
    fn threads_move() {
        let setup = Setup { engine: Engine::Threads, forced_fallback: false };
        run("holders::threads_move", setup, super::who_is_in_the_way_is_named);
    }
}

const PAGES: usize = 64;
const ALL: PageCount = PageCount::new(PAGES);

fn a_device_is_emptied_while_pages_move_to_it(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 1);
    let (range, over, moved) = (buffer.range(), AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                let done = space.migrate(range).unwrap();
                moved.fetch_add(done.moved.get(), Ordering::Relaxed);
            }
        });
        scope.spawn(|| {
            let mut random = Random::new(1);
            while !over.load(Ordering::Acquire) {
                let at = random.below(PAGES) * WORDS;
                check_from(&buffer[at..at + 8], 1, at);
            }
        });
        for round in 0..8 {
            if round % 2 == 0 {
                let done = space.evacuate(0, None).unwrap();
                assert_eq!(done.skipped.get(Skip::Failed), 0);
            } else {
                let drained = space.drain(0, Duration::from_secs(10)).unwrap();
                assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
                drop(drained);
            }
            // Pages get there in between.
            let before = moved.load(Ordering::Relaxed);
            while moved.load(Ordering::Relaxed) == before {
                thread::yield_now();
            }
        }
        over.store(true, Ordering::Release);
    });
    assert_eq!(space.evacuate(0, None).unwrap().left, PageCount::ZERO);
    check(&buffer, 1);
}

fn a_drained_device_stays_empty(setup: Setup) {
    let space =
        setup.builder().device(memory(ByteSize::mib(4))).device(memory(ByteSize::mib(4))).build().unwrap();
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 2);
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    let drained = space.drain(0, Duration::from_secs(10)).unwrap();
    assert_eq!(space.residency(buffer.range()).resident, ALL);
    assert_eq!(space.migrate(buffer.range()).unwrap().skipped.get(Skip::Full), PAGES as u64);
    // Whoever empties it as well does not open it.
    assert_eq!(space.evacuate(0, None).unwrap().moved, PageCount::ZERO);
    let again = space.drain(0, Duration::ZERO).unwrap();
    drop(drained);
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, PageCount::ZERO);
    assert_eq!(space.migrate_to(buffer.range(), 1).unwrap().moved, ALL, "the other one is open");
    check(&buffer, 2);
    drop(again);
    settle(&space, buffer.range());
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    check(&buffer, 2);
    assert!(matches!(space.drain(2, Duration::ZERO), Err(DrainError::Migrate(MigrateError::NoDevice(2)))));
}

fn a_device_that_loses_pages_is_not_empty(setup: Setup) {
    let device = Deaf::new(memory(ByteSize::mib(4)));
    let space = setup.with(device.clone());
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 3);
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    device.set(true);
    let (start, patience) = (Instant::now(), Duration::from_millis(50));
    let Err(DrainError::InUse(why)) = space.drain(0, patience) else {
        panic!("a device that gives nothing back was emptied")
    };
    assert!(start.elapsed() >= patience);
    assert_eq!((why.left, why.skipped.get(Skip::Failed), why.holders.len()), (ALL, PAGES as u64, 0));
    // Nothing was given up, and everything goes on.
    device.set(false);
    check(&buffer, 3);
    settle(&space, buffer.range());
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL, "it is open again");
    drop(space.drain(0, Duration::from_secs(10)).unwrap());
    check(&buffer, 3);
}

fn who_is_in_the_way_is_named(setup: Setup) {
    let coherent = Arc::new(MemDevice::coherent(ByteSize::mib(4), None).unwrap());
    let space = setup.builder().device(coherent).build().unwrap();
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 4);
    settle(&space, buffer.range());
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    let held = part(buffer.range(), 8, 4);
    let (pin, line) = (space.pin_in_place(held, PinFor::Write).unwrap(), line!());
    // A pin in RAM is in nobody's way.
    let home = space.pin(part(buffer.range(), 30, 2), PinFor::Read).unwrap();
    let error = space.drain(0, Duration::from_millis(50)).unwrap_err();
    let text = error.to_string();
    let DrainError::InUse(why) = error else { panic!("{error}") };
    assert_eq!((why.left.get(), why.skipped.get(Skip::Pinned)), (4, 4));
    let holders: Vec<_> = why.holders.iter().map(|holder| (holder.range, holder.place.line())).collect();
    assert_eq!(holders, [(held, line)]);
    assert!(text.contains(&format!("{}:{line}", file!())), "{text}");
    // All of it can be used as before.
    assert_eq!(space.residency(held).mapped.get(), 4);
    settle(&space, buffer.range());
    assert_eq!(space.migrate(part(buffer.range(), 0, 8)).unwrap().moved.get(), 8);
    check(&buffer, 4);
    // As soon as the holder lets go, whoever waits goes on.
    let drained = thread::scope(|scope| {
        let drain = scope.spawn(|| space.drain(0, Duration::from_secs(10)).map(drop));
        thread::sleep(Duration::from_millis(20));
        drop(pin);
        drain.join().unwrap()
    });
    drained.unwrap();
    drop(home);
    check(&buffer, 4);
}

// --- memory that goes while a device collects it -----------------------------------------------------------------

#[derive(Default)]
struct Table(BTreeMap<Vpn, PageView>);

impl MirrorTable for Table {
    fn invalidate(&mut self, range: VaRange, _event: Event) {
        self.0.range_mut(range.first()..range.end_page()).for_each(|(_, entry)| *entry = PageView::Absent);
    }
}

/// Populates a mirror of `range` again and again, until `over`. Once the memory is `gone` the table is told, a moment
/// after, and nothing is ever put into it again. Counts how often it was put in.
fn populate_until(space: &Space, range: VaRange, over: &AtomicBool, gone: &AtomicBool, whole: &AtomicUsize) {
    let Ok(mirror) = space.mirror(range, Table::default()) else { return };
    let mut told = false;
    let valid = || mirror.look(|table| table.0.values().filter(|view| view.is_valid()).count());
    loop {
        let last = over.load(Ordering::Acquire);
        match mirror.populate(range, Want::Write, |table, pages| table.0.extend(pages.iter())) {
            Ok(()) => _ = whole.fetch_add(1, Ordering::Relaxed),
            Err(RangeFaultError::Fault(_) | RangeFaultError::TimedOut(_)) => {}
            Err(error) => panic!("{error}"),
        }
        if told {
            assert_eq!(valid(), 0, "the table says that pages are there");
        } else if gone.load(Ordering::Acquire) {
            eventually(|| valid() == 0);
            told = true;
        }
        if last && told {
            return;
        }
    }
}

fn populating_races_the_end_of_an_adoption(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let whole = AtomicUsize::new(0);
    for round in 0..30 {
        let mut memory = Memory::new(PAGES);
        fill(memory.words_mut(0, PAGES), round);
        let adopted = memory.adopt(&space);
        let (range, over, gone) = (memory.range(), AtomicBool::new(false), AtomicBool::new(false));
        let _ = space.migrate(part(range, 0, PAGES / 2)).unwrap();
        thread::scope(|scope| {
            let collector = scope.spawn(|| populate_until(&space, range, &over, &gone, &whole));
            (0..round * 2000).for_each(|_| std::hint::spin_loop());
            // However late the collectors began, one of them has had it all.
            while round == 29 && whole.load(Ordering::Relaxed) == 0 && !collector.is_finished() {
                thread::yield_now();
            }
            drop(adopted);
            gone.store(true, Ordering::Release);
            over.store(true, Ordering::Release);
            collector.join().unwrap();
        });
        check(memory.words(0, PAGES), round);
    }
    assert!(whole.into_inner() > 0, "no table was ever whole");
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
}

fn populating_races_unmapping(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    for round in 0..30 {
        let mut memory = Memory::new(PAGES);
        fill(memory.words_mut(0, PAGES), round);
        let adopted = memory.adopt(&space);
        let (range, over, gone) = (memory.range(), AtomicBool::new(false), AtomicBool::new(false));
        let _ = space.migrate(part(range, 0, PAGES / 2)).unwrap();
        let half = part(range, PAGES / 4, PAGES / 2);
        thread::scope(|scope| {
            scope.spawn(|| populate_until(&space, half, &over, &gone, &AtomicUsize::new(0)));
            (0..round * 2000).for_each(|_| std::hint::spin_loop());
            // The event is read before the call returns.
            memory.unmap(PAGES / 4, PAGES / 2);
            gone.store(true, Ordering::Release);
            over.store(true, Ordering::Release);
        });
        check(memory.words(0, PAGES / 4), round);
        drop(adopted);
    }
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
}
