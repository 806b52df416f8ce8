//! Whose pages move where, on the running kernel: by owner, holes, from device to device, and off a device. The names
//! follow the kernel's own hmm-tests where there is one.

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use common::{Memory, Random, Setup, WORDS, check, expect_places, file, fill, memory, part, settle, word};
use uhmm::notifier::{Change, Event, Mark, Subscriber, WouldBlock};
use uhmm::space::MigrateError;
use uhmm::{ByteSize, Counter, Device, Owner, PageCount, Skip, Space, VaRange};

scenarios!(
    migrate_between_private_devices,
    migrate_between_memory_and_file,
    migrate_mixed_owners,
    devices_that_share_an_owner,
    migrate_holes,
    migrate_holes_among_pages,
    migrate_zero_pages,
    migrate_read_only,
    migrate_release,
    a_device_is_emptied_onto_another,
    device_pages_by_number,
    an_owner_passes_over_its_own,
    holes_that_are_written_meanwhile,
    touches_while_pages_change_devices,
);

// Only this engine is told of what the program gives up.
with_engine!(Threads, threads_given_up, threads_given_up_fallback: pages_are_given_up_while_all_kinds_move);

const PAGES: usize = 256;
const ALL: PageCount = PageCount::new(PAGES);

fn two(setup: Setup, second: Arc<dyn Device>) -> Space {
    setup.builder().device(memory(ByteSize::mib(4))).device(second).build().unwrap()
}

fn on_devices(space: &Space) -> [usize; 2] {
    [0, 1].map(|device| space.device_pages(device).unwrap().get())
}

/// From the first device to the second and back.
fn across(space: &Space, direct: PageCount) {
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 1);
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    for (from, to) in [(0, 1), (1, 0)] {
        let owner = space.owner(from).unwrap();
        let done = space.migration(buffer.range()).private(owner).to(to).run().unwrap();
        assert_eq!((done.moved, done.direct, done.skipped.total()), (ALL, direct, 0), "{done:?}");
        let expected = if to == 0 { [PAGES, 0] } else { [0, PAGES] };
        assert_eq!(on_devices(space), expected);
        expect_places(space, buffer.range(), 0, PAGES);
        assert_eq!(space.count(Counter::MovedIn), 0, "the program's memory has nothing to do with it");
    }
    check(&buffer, 1);
    fill(&mut buffer, 2);
    check(&buffer, 2);
}

fn migrate_between_private_devices(setup: Setup) {
    across(&two(setup, memory(ByteSize::mib(4))), ALL);
}

fn migrate_between_memory_and_file(setup: Setup) {
    across(&two(setup, file(ByteSize::mib(4))), PageCount::ZERO);
}

fn migrate_mixed_owners(setup: Setup) {
    let space = two(setup, memory(ByteSize::mib(4)));
    let mut buffer = space.map::<u64>(64 * WORDS).unwrap();
    fill(&mut buffer, 3);
    let (lower, upper) = (part(buffer.range(), 0, 32), part(buffer.range(), 32, 16));
    assert_eq!(space.migrate(lower).unwrap().moved.get(), 32);
    assert_eq!(space.migrate_to(upper, 1).unwrap().moved.get(), 16);
    let done = space.migration(buffer.range()).to(1).run().unwrap();
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Foreign)), (16, 32), "{done:?}");
    assert_eq!((done.skipped.get(Skip::Elsewhere), done.skipped.total()), (16, 48), "{done:?}");
    let done = space.migration(buffer.range()).ram(false).private(space.owner(1).unwrap()).run().unwrap();
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Elsewhere)), (32, 32), "{done:?}");
    check(&buffer, 3);
    settle(&space, buffer.range());
    assert_eq!(space.migration(buffer.range()).to(2).run(), Err(MigrateError::NoDevice(2)));
    let beyond = VaRange::of_pages(buffer.range().first(), PageCount::new(1 << 20)).unwrap();
    assert_eq!(space.migration(beyond).run(), Err(MigrateError::Unmanaged(beyond)));
}

fn devices_that_share_an_owner(setup: Setup) {
    let hive = Owner(7);
    let space = setup
        .builder()
        .device_of(hive, memory(ByteSize::mib(1)))
        .device_of(hive, memory(ByteSize::mib(1)))
        .device(memory(ByteSize::mib(1)))
        .build()
        .unwrap();
    assert_eq!([0, 1].map(|device| space.owner(device)), [Some(hive); 2]);
    assert_ne!(space.owner(2), Some(hive));
    assert_eq!(space.owner(3), None);
    let mut buffer = space.map::<u64>(32 * WORDS).unwrap();
    fill(&mut buffer, 4);
    assert_eq!(space.migrate(part(buffer.range(), 0, 16)).unwrap().moved.get(), 16);
    assert_eq!(space.migrate_to(part(buffer.range(), 16, 8), 2).unwrap().moved.get(), 8);
    let done = space.migration(buffer.range()).private(hive).to(1).run().unwrap();
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Foreign)), (24, 8), "{done:?}");
    check(&buffer, 4);
}

fn migrate_holes(setup: Setup) {
    let space = two(setup, file(ByteSize::mib(4)));
    let copied = || space.count(Counter::MovedOut) + space.count(Counter::Written);
    for device in [0, 1] {
        let before = copied();
        let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
        let done = space.migration(buffer.range()).to(device).run().unwrap();
        assert_eq!((done.moved, done.holes, done.skipped.total()), (ALL, ALL, 0), "{done:?}");
        assert_eq!(copied(), before, "there is nothing to copy");
        expect_places(&space, buffer.range(), 0, PAGES);
        assert!(buffer.iter().all(|word| *word == 0));
        fill(&mut buffer, 5);
        check(&buffer, 5);
        settle(&space, buffer.range());
        assert_eq!(space.migrate_to(buffer.range(), device).unwrap().moved, ALL);
        drop(buffer);
        // The device's pages are not fresh any more.
        let buffer = space.map::<u64>(PAGES * WORDS).unwrap();
        let done = space.migration(buffer.range()).to(device).ram(false).run().unwrap();
        assert_eq!((done.moved, done.holes), (ALL, ALL), "{done:?}");
        assert!(buffer.iter().all(|word| *word == 0), "what others left there is not to be seen");
    }
    let buffer = space.map::<u64>(8 * WORDS).unwrap();
    let done = space.migration(buffer.range()).holes(false).run().unwrap();
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Hole)), (0, 8), "{done:?}");
}

fn migrate_holes_among_pages(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(64);
    memory.words_mut(8, 4).fill(6);
    let adopted = memory.adopt(&space);
    let done = space.migration(memory.range()).run().unwrap();
    assert_eq!((done.moved.get(), done.holes.get(), done.skipped.total()), (64, 60, 0), "{done:?}");
    assert!(memory.words(8, 4).iter().all(|word| *word == 6));
    assert!(memory.words(0, 8).iter().chain(memory.words(12, 52)).all(|word| *word == 0));
    drop(adopted);
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
}

fn migrate_zero_pages(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    let mut buffer = space.map::<u64>(64 * WORDS).unwrap();
    // Reads bring the zero page, which the kernel moves as a page, or calls a hole.
    assert!(buffer.iter().all(|word| *word == 0));
    let done = space.migration(buffer.range()).run().unwrap();
    assert_eq!(done.moved.get() + done.skipped.get(Skip::Hole) as usize, 64, "{done:?}");
    assert!(buffer.iter().all(|word| *word == 0));
    fill(&mut buffer, 7);
    let done = space.migration(buffer.range()).run().unwrap();
    assert_eq!(done.moved.get(), 64, "{done:?}");
    check(&buffer, 7);
}

fn migrate_read_only(setup: Setup) {
    let space = two(setup, memory(ByteSize::mib(1)));
    let mut memory = Memory::new(16);
    fill(memory.words_mut(0, 8), 8);
    let adopted = memory.adopt(&space);
    memory.protect(0, 16, rustix::mm::MprotectFlags::READ);
    let done = space.migration(memory.range()).run().unwrap();
    assert_eq!((done.moved.get(), done.holes.get()), (16, 8), "{done:?}");
    let done = space.migration(memory.range()).private(space.owner(0).unwrap()).to(1).run().unwrap();
    assert_eq!((done.moved.get(), done.direct.get()), (16, 16), "{done:?}");
    check(memory.words(0, 8), 8);
    assert!(memory.words(8, 8).iter().all(|word| *word == 0));
    memory.protect(0, 16, rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE);
    fill(memory.words_mut(0, 16), 9);
    check(memory.words(0, 16), 9);
    drop(adopted);
}

fn migrate_release(setup: Setup) {
    let space = two(setup, memory(ByteSize::mib(4)));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    let mut other = space.map::<u64>(16 * WORDS).unwrap();
    fill(&mut buffer, 10);
    fill(&mut other, 11);
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    assert_eq!(space.migrate_to(other.range(), 1).unwrap().moved.get(), 16);
    // Some come home and keep their copies, where the engine can.
    check(&buffer[..64 * WORDS], 10);
    settle(&space, buffer.range());
    let used = space.device_pages(0).unwrap();
    let done = space.evacuate(0, None).unwrap();
    assert_eq!((done.moved, done.left, done.skipped.total()), (used, PageCount::ZERO, 0), "{done:?}");
    assert_eq!(on_devices(&space), [0, 16]);
    expect_places(&space, buffer.range(), PAGES, 0);
    let faults = space.count(Counter::Faults);
    fill(&mut buffer, 12);
    check(&buffer, 12);
    assert_eq!(space.count(Counter::Faults), faults, "nothing is left to fault on");
    // The device can be used again.
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    check(&buffer, 12);
    check(&other, 11);
    assert_eq!(space.evacuate(2, None), Err(MigrateError::NoDevice(2)));
    assert_eq!(space.evacuate(0, Some(2)), Err(MigrateError::NoDevice(2)));
    assert_eq!(space.evacuate(0, Some(0)), Err(MigrateError::Itself(0)));
}

fn a_device_is_emptied_onto_another(setup: Setup) {
    let space = two(setup, file(ByteSize::mib(4)));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 13);
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    let done = space.evacuate(0, Some(1)).unwrap();
    assert_eq!((done.moved, done.left, done.skipped.total()), (ALL, PageCount::ZERO, 0), "{done:?}");
    assert_eq!(on_devices(&space), [0, PAGES]);
    expect_places(&space, buffer.range(), 0, PAGES);
    check(&buffer, 13);
}

fn device_pages_by_number(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 14);
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    let done = space.evacuate_pages(0, 0..100, None).unwrap();
    assert_eq!((done.moved.get(), done.left.get()), (100, PAGES - 100), "{done:?}");
    for nothing in [0..100, 5000..6000, PAGES..1024] {
        assert_eq!(space.evacuate_pages(0, nothing, None).unwrap().moved, PageCount::ZERO);
    }
    expect_places(&space, buffer.range(), 100, PAGES - 100);
    check(&buffer, 14);
}

/// Counts what it is told of migrations, but for its own.
struct Driver(Owner, Mutex<usize>);

impl Subscriber for Driver {
    fn invalidate(&self, change: &Change, mark: Mark<'_>) -> Result<(), WouldBlock> {
        if change.event != Event::Migrate || change.owner == Some(self.0) {
            return Ok(());
        }
        let mut told = self.1.lock().unwrap();
        mark.set();
        *told += 1;
        Ok(())
    }
}

fn an_owner_passes_over_its_own(setup: Setup) {
    let space = two(setup, memory(ByteSize::mib(1)));
    let mut buffer = space.map::<u64>(16 * WORDS).unwrap();
    buffer[..8 * WORDS].fill(15);
    let me = Owner(9);
    let driver = Arc::new(Driver(me, Mutex::new(0)));
    let told = || std::mem::take(&mut *driver.1.lock().unwrap());
    let subscription = space.subscribe(buffer.range(), driver.clone());
    let done = space.migration(buffer.range()).by(me).run().unwrap();
    assert_eq!((done.moved.get(), told()), (16, 0));
    let done = space.migration(buffer.range()).private(space.owner(0).unwrap()).to(1).by(me).run().unwrap();
    assert_eq!((done.moved.get(), told()), (16, 0));
    assert!(buffer[..8 * WORDS].iter().all(|word| *word == 15));
    assert!(told() > 0, "a touch is nobody's doing");
    settle(&space, buffer.range());
    let _ = told();
    let _ = space.migrate(buffer.range()).unwrap();
    assert!(told() > 0);
    drop(subscription);
}

/// A store to a hole that is just given a page on the device is never lost.
fn holes_that_are_written_meanwhile(setup: Setup) {
    const HOLES: usize = 1024;
    let space = setup.space(ByteSize::mib(8));
    let holes = AtomicUsize::new(0);
    for round in 0..10 {
        let mut buffer = space.map::<u64>(HOLES * WORDS).unwrap();
        let range = buffer.range();
        let (begin, over) = (Barrier::new(2), AtomicBool::new(false));
        thread::scope(|scope| {
            let mover = scope.spawn(|| {
                begin.wait();
                while !over.load(Ordering::Acquire) {
                    let moved = space.migration(range).run().unwrap().holes.get();
                    holes.fetch_add(moved, Ordering::Relaxed);
                }
            });
            begin.wait();
            for page in 0..HOLES {
                // However late the mover begins, it finds some the first time.
                while round == 0 && page == HOLES / 2 && holes.load(Ordering::Relaxed) == 0 {
                    assert!(!mover.is_finished());
                    thread::yield_now();
                }
                buffer[page * WORDS + round] = word(round as u64, page);
            }
            for page in (0..HOLES).rev() {
                assert_eq!(buffer[page * WORDS + round], word(round as u64, page), "page {page}");
            }
            over.store(true, Ordering::Release);
            mover.join().unwrap();
        });
        for (index, found) in buffer.iter().enumerate() {
            let written = index % WORDS == round;
            let expected = if written { word(round as u64, index / WORDS) } else { 0 };
            assert_eq!(*found, expected, "word {index}");
        }
        drop(buffer);
        assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
    }
}

/// Threads store and load while the pages go round between two devices and RAM.
fn touches_while_pages_change_devices(setup: Setup) {
    let space = two(setup, file(ByteSize::mib(4)));
    let mut buffer = space.map::<u64>(64 * WORDS).unwrap();
    fill(&mut buffer, 16);
    let range = buffer.range();
    let over = AtomicBool::new(false);
    let moved = thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let mut moved = [0; 3];
            for _ in 0..60 {
                let _ = space.migrate(range).unwrap();
                for (from, to) in [(0, 1), (1, 0)] {
                    let owner = space.owner(from).unwrap();
                    let done = space.migration(range).ram(false).private(owner).to(to).run().unwrap();
                    moved[to] += done.moved.get();
                }
                moved[2] += space.evacuate(0, Some(1)).unwrap().moved.get();
                let _ = space.evacuate(1, None).unwrap();
            }
            over.store(true, Ordering::Release);
            moved
        });
        for round in (0_u64..).take_while(|_| !over.load(Ordering::Acquire)) {
            // The other half can always move, however often this thread is faster.
            let page = round as usize * 13 % 32;
            buffer[page * WORDS + 1] = round;
            assert_eq!(buffer[page * WORDS], word(16, page * WORDS));
            assert_eq!(buffer[page * WORDS + 1], round);
            buffer[page * WORDS + 1] = word(16, page * WORDS + 1);
        }
        mover.join().unwrap()
    });
    check(&buffer, 16);
    assert!(moved[0] > 0 && moved[1] > 0, "{moved:?}");
    drop(buffer);
    assert_eq!(on_devices(&space), [0, 0]);
}

/// The program stores and gives up while holes get pages, pages go round, and devices are emptied.
fn pages_are_given_up_while_all_kinds_move(setup: Setup) {
    let space = two(setup, memory(ByteSize::mib(4)));
    let mut memory = Memory::new(64);
    memory.words_mut(0, 64).fill(0);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let over = AtomicBool::new(false);
    let moved = thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let mut moved = 0;
            // Once more when the program has come to rest, whenever this thread got to run.
            let mut last = false;
            while !last {
                last = over.load(Ordering::Acquire);
                moved += space.migration(range).run().unwrap().moved.get();
                let first = space.owner(0).unwrap();
                moved += space.migration(range).private(first).to(1).run().unwrap().moved.get();
                moved += space.evacuate(1, Some(0)).unwrap().moved.get();
                moved += space.evacuate(0, None).unwrap().moved.get();
            }
            moved
        });
        let mut random = Random::new(17);
        let mut values = [0; 64];
        for round in 1..4000_u64 {
            let page = random.below(64);
            if random.below(3) == 0 {
                let pages = 1 + random.below(4).min(63 - page);
                memory.give_up(page, pages);
                values[page..page + pages].fill(0);
            } else {
                memory.words_mut(page, 1)[7] = round;
                values[page] = round;
            }
            let other = random.below(64);
            assert_eq!(memory.words(other, 1)[7], values[other], "page {other} in round {round}");
        }
        over.store(true, Ordering::Release);
        let moved = mover.join().unwrap();
        for (page, value) in values.iter().enumerate() {
            assert_eq!(memory.words(page, 1)[7], *value, "page {page}");
        }
        moved
    });
    assert!(moved > 0);
    drop(adopted);
    assert_eq!(on_devices(&space), [0, 0]);
}
