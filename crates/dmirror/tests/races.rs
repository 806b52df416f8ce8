//! The device on the running kernel beside programs and devices that do something else with the same pages.

mod bed;
#[path = "../../uhmm/tests/common/mod.rs"]
mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use bed::{NODES, PAGES, bytes, look, machine, pages, pattern, read, to_device};
use common::{Memory, PAGE, Random, Setup, check, fill, part};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous};
use uhmm::{ByteSize, PageCount};
use uhmm_dmirror::Error;

with_engine!(Threads, threads_move, threads_fallback:
    writers_race_a_migration,
    the_device_races_a_migration,
    protection_changes_under_reads,
    discards_under_reads,
    two_handles_and_two_nodes,
    a_device_that_is_full_half_way,
    a_handle_closes_with_pages_on_the_device,
    a_handle_closes_while_others_work,
    releases_beside_migrations,
    an_address_that_is_mapped_anew,
);

/// What the program writes while its pages move is not lost.
fn writers_race_a_migration(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let memory = Memory::new(PAGES);
    let (range, over) = (memory.range(), AtomicBool::new(false));
    let start = memory.start().expose_provenance();
    let count = |page: usize| {
        // SAFETY: an aligned word of the mapping, which everybody uses as this atomic.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicUsize>(start + page * PAGE) }
    };
    let written = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut random = Random::new(1);
            let mut written = vec![0; PAGES];
            while !over.load(Ordering::Relaxed) {
                let page = random.below(PAGES);
                count(page).fetch_add(1, Ordering::Relaxed);
                written[page] += 1;
            }
            written
        });
        for _ in 0..200 {
            // A touch may take a page home before the device has read it.
            assert!(matches!(to_device(&handle, range), Ok(_) | Err(Error::NotThere)));
        }
        over.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    for (page, written) in written.into_iter().enumerate() {
        assert_eq!(count(page).load(Ordering::Relaxed), written, "page {page}");
    }
}

/// Nor is what another device writes.
fn the_device_races_a_migration(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let memory = Memory::new(PAGES);
    let (range, over) = (memory.range(), AtomicBool::new(false));
    thread::scope(|scope| {
        for node in [NODES[0], NODES[1]] {
            let (machine, over) = (&machine, &over);
            scope.spawn(move || {
                let handle = machine.open(node).unwrap();
                while !over.load(Ordering::Relaxed) {
                    assert!(matches!(to_device(&handle, range), Ok(_) | Err(Error::NotThere)));
                }
            });
        }
        let handle = machine.open(NODES[0]).unwrap();
        for round in 0..30 {
            handle.write(range, &bytes(&pattern(round, PAGES))).unwrap();
            check(&read(&handle, range).unwrap().0, round);
        }
        over.store(true, Ordering::Relaxed);
    });
    check(memory.words(0, PAGES), 29);
    assert_eq!(machine.device_pages(NODES[0]), PageCount::ZERO, "the handles are closed");
    assert_eq!(machine.device_pages(NODES[1]), PageCount::ZERO);
}

fn protection_changes_under_reads(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 15);
    let (range, over) = (memory.range(), AtomicBool::new(false));
    thread::scope(|scope| {
        let reading = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                match read(&handle, range) {
                    Ok((found, _)) => check(&found, 15),
                    Err(error) => assert_eq!(error, Error::Fault),
                }
            }
        });
        for _ in 0..100 {
            machine.space().protecting(range, || memory.protect(0, PAGES, MprotectFlags::empty()));
            machine.space().protecting(range, || memory.protect(0, PAGES, MprotectFlags::READ));
        }
        over.store(true, Ordering::Relaxed);
        reading.join().unwrap();
    });
    check(&read(&handle, range).unwrap().0, 15);
}

/// A handler brings a page that the device is about to read, and tells the device's table first: nobody may wait for
/// the other.
fn discards_under_reads(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let memory = Memory::new(PAGES);
    let (range, over) = (memory.range(), AtomicBool::new(false));
    let filled = bytes(&vec![u64::MAX; PAGES * PAGE / 8]);
    thread::scope(|scope| {
        let working = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                handle.write(range, &filled).unwrap();
                let (found, _) = read(&handle, range).unwrap();
                assert!(found.iter().all(|word| *word == 0 || *word == u64::MAX));
                assert!(matches!(to_device(&handle, range), Ok(_) | Err(Error::NotThere)));
            }
        });
        for n in 0..2000 {
            memory.give_up(n % PAGES, 1);
        }
        over.store(true, Ordering::Relaxed);
        working.join().unwrap();
    });
}

fn two_handles_and_two_nodes(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handles = [NODES[0], NODES[0], NODES[1], NODES[1]].map(|node| machine.open(node).unwrap());
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 16);
    let range = memory.range();
    thread::scope(|scope| {
        for (n, handle) in handles.iter().enumerate() {
            scope.spawn(move || {
                let mut random = Random::new(n as u64);
                for _ in 0..100 {
                    let part = part(range, random.below(PAGES / 2), 1 + random.below(PAGES / 2));
                    match random.below(4) {
                        0 => match to_device(handle, part) {
                            Ok(_) | Err(Error::NotThere) => {}
                            Err(error) => panic!("{error}"),
                        },
                        1 => _ = handle.migrate_to_system(part).unwrap(),
                        2 => assert_eq!(look(handle, part).len(), part.pages().get()),
                        _ => {
                            let first = part.first().since(range.first()).get() * PAGE / 8;
                            common::check_from(&read(handle, part).unwrap().0, 16, first);
                        }
                    }
                }
            });
        }
    });
    check(memory.words(0, PAGES), 16);
}

fn a_device_that_is_full_half_way(setup: Setup) {
    let small = 16;
    let machine = machine(setup, ByteSize::new((small * PAGE) as u64));
    let handle = machine.open(NODES[0]).unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 17);
    assert_eq!(to_device(&handle, memory.range()), Err(Error::NotThere));
    assert_eq!(machine.device_pages(NODES[0]), pages(small));
    check(&read(&handle, memory.range()).unwrap().0, 17);
    // There is room again when its pages are written, or released.
    fill(memory.words_mut(0, PAGES), 18);
    common::settle(machine.space(), memory.range());
    assert_eq!(machine.device_pages(NODES[0]), PageCount::ZERO);
    check(&to_device(&handle, part(memory.range(), 0, small)).unwrap(), 18);
}

fn a_handle_closes_with_pages_on_the_device(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 18);
    let handle = machine.open(NODES[0]).unwrap();
    to_device(&handle, memory.range()).unwrap();
    drop(handle);
    assert_eq!(machine.device_pages(NODES[0]), PageCount::ZERO);
    drop(machine);
    check(memory.words(0, PAGES), 18);
}

fn a_handle_closes_while_others_work(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 19);
    let (range, over) = (memory.range(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..10 {
                drop(machine.open(NODES[0]).unwrap());
            }
            over.store(true, Ordering::Relaxed);
        });
        let handle = machine.open(NODES[0]).unwrap();
        while !over.load(Ordering::Relaxed) {
            match to_device(&handle, range) {
                Ok(found) => check(&found, 19),
                // The other one's end brought a page home, or kept the device from taking one.
                Err(error) => assert_eq!(error, Error::NotThere),
            }
            check(&read(&handle, range).unwrap().0, 19);
        }
    });
    check(memory.words(0, PAGES), 19);
}

/// All pages are taken from the device while others bring them there, and the program writes.
fn releases_beside_migrations(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let memory = Memory::new(PAGES);
    let (range, over) = (memory.range(), AtomicBool::new(false));
    let start = memory.start().expose_provenance();
    let count = |page: usize| {
        // SAFETY: an aligned word of the mapping, which everybody uses as this atomic.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicUsize>(start + page * PAGE) }
    };
    let handle = machine.open(NODES[0]).unwrap();
    let (written, there) = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let (mut random, mut written) = (Random::new(3), vec![0; PAGES]);
            while !over.load(Ordering::Relaxed) {
                let page = random.below(PAGES);
                count(page).fetch_add(1, Ordering::Relaxed);
                written[page] += 1;
            }
            written
        });
        let mover = scope.spawn(|| {
            let mut there = 0;
            // Once more when it is over, however late this thread begins.
            let mut last = false;
            while !last {
                last = over.load(Ordering::Relaxed);
                let part = part(range, there % 32, 16);
                assert!(matches!(to_device(&handle, part), Ok(_) | Err(Error::NotThere)));
                there += 1;
            }
            there
        });
        for round in 0..10 {
            match round % 2 {
                0 => _ = handle.release().unwrap(),
                _ => drop(machine.open(NODES[0]).unwrap()),
            }
        }
        over.store(true, Ordering::Relaxed);
        (writer.join().unwrap(), mover.join().unwrap())
    });
    assert!(there > 0);
    for (page, written) in written.into_iter().enumerate() {
        assert_eq!(count(page).load(Ordering::Relaxed), written, "page {page}");
    }
    handle.release().unwrap();
    assert_eq!(machine.device_pages(NODES[0]), PageCount::ZERO);
}

/// A new mapping at the place of one that the device knew.
fn an_address_that_is_mapped_anew(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let memory = Memory::new(PAGES);
    let range = memory.range();
    for round in 0..50 {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
        // SAFETY: over the memory's own mapping, to which nothing refers.
        unsafe { mmap_anonymous(memory.start().cast(), PAGES * PAGE, prot, flags) }.unwrap();
        let (found, faults) = read(&handle, range).unwrap();
        assert!(faults == 1 && found.iter().all(|word| *word == 0), "{round}");
        handle.write(range, &bytes(&pattern(round, PAGES))).unwrap();
        check(&to_device(&handle, range).unwrap(), round);
        check(memory.words(0, 1), round);
    }
}
