//! The device on the running kernel: the scenarios of the kernel's hmm-tests by name, and what those do not see.

#[path = "../../uhmm/tests/common/mod.rs"]
mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use common::{Memory, PAGE, Random, Setup, check, fill, part};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use uhmm::{ByteSize, Counter, PageCount, PinFor, VaRange, VirtAddr};
use uhmm_dmirror::{Dmirror, Error, Handle, Kind, Node, load};

with_engine!(Threads, threads_move, threads_fallback:
    open_close,
    anon_read,
    anon_read_prot,
    anon_write,
    anon_write_prot,
    shared_and_file,
    migrate,
    migrate_fault,
    migrate_release,
    migrate_shared,
    migrate_mixed,
    migrate_multiple,
    anon_teardown,
    snapshot,
    double_map,
    gup,
    writers_race_a_migration,
    the_device_races_a_migration,
    protection_changes_under_reads,
    discards_under_reads,
    two_handles_and_two_nodes,
    a_device_that_is_full_half_way,
    a_handle_closes_with_pages_on_the_device,
    a_handle_closes_while_others_work,
    an_address_that_is_mapped_anew,
);

with_engine!(Threads, coherent_move, coherent_fallback:
    coherent_pages_are_touched_in_place,
    coherent_pages_of_a_mapping_that_may_only_be_read,
    coherent_pages_and_others,
    coherent_pages_that_are_held,
    exclusive_pages_of_a_coherent_device,
);

const PAGES: usize = 64;
const NODES: [Node; 4] = Node::ALL;

fn machine(setup: Setup, size: ByteSize) -> Dmirror {
    // SAFETY: the tests ask about memory of their own only, and read what a device wrote after it was written.
    unsafe { Dmirror::with(setup.builder(), size) }.unwrap()
}

fn pages(n: usize) -> PageCount {
    PageCount::new(n)
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()
}

fn read(handle: &Handle<'_>, range: VaRange) -> Result<(Vec<u64>, u64), Error> {
    let mut into = vec![0xee; range.bytes()];
    let counts = handle.read(range, &mut into)?;
    assert_eq!(counts.pages, range.pages());
    Ok((words(&into), counts.faults))
}

fn to_device(handle: &Handle<'_>, range: VaRange) -> Result<Vec<u64>, Error> {
    let mut into = vec![0xee; range.bytes()];
    let counts = handle.migrate_to_device(range, &mut into)?;
    assert_eq!(counts.pages, range.pages());
    Ok(words(&into))
}

fn look(handle: &Handle<'_>, range: VaRange) -> Vec<u8> {
    let mut into = vec![0xee; range.pages().get()];
    handle.snapshot(range, &mut into).unwrap();
    into
}

fn pattern(seed: u64, pages: usize) -> Vec<u64> {
    let mut words = vec![0; pages * PAGE / 8];
    fill(&mut words, seed);
    words
}

/// Runs a scenario in which addresses are free for a while in a process of its own: here another test might map something
/// there, and find it gone.
fn alone(setup: Setup, name: &str, scenario: fn(Setup)) {
    common::in_process(&common::name_of(setup, name), None, || scenario(setup));
}

fn open_close(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    for node in NODES {
        let opened = machine.open(node).map(|handle| handle.node());
        // Coherent memory is mapped in place by moving frames.
        let there = node.kind() == Kind::Private || !setup.forced_fallback;
        assert_eq!(opened, if there { Ok(node) } else { Err(Error::NoDevice) });
    }
}

fn anon_read(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(2, PAGES - 2), 1);
    memory.protect(0, PAGES, MprotectFlags::READ);
    let (found, faults) = read(&handle, memory.range()).unwrap();
    assert_eq!(faults, 1);
    assert!(found[..2 * PAGE / 8].iter().all(|word| *word == 0));
    check(&found[2 * PAGE / 8..], 1);
    assert_eq!(read(&handle, memory.range()).unwrap().1, 0, "a warm table misses nothing");
}

fn anon_read_prot(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 2);
    memory.protect(0, PAGES, MprotectFlags::empty());
    assert_eq!(read(&handle, memory.range()), Err(Error::Fault));
    memory.protect(0, PAGES, MprotectFlags::READ);
    check(&read(&handle, memory.range()).unwrap().0, 2);
}

fn anon_write(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let memory = Memory::new(PAGES);
    let counts = handle.write(memory.range(), &bytes(&pattern(3, PAGES))).unwrap();
    assert_eq!((counts.pages, counts.faults), (pages(PAGES), 1));
    check(memory.words(0, PAGES), 3);
    // On the device as well, where it stays.
    check(&to_device(&handle, memory.range()).unwrap(), 3);
    let counts = handle.write(memory.range(), &bytes(&pattern(4, PAGES))).unwrap();
    assert_eq!(counts.faults, 0);
    assert_eq!(machine.device_pages(NODES[0]), pages(PAGES));
    check(memory.words(0, PAGES), 4);
}

fn anon_write_prot(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let memory = Memory::new(PAGES);
    memory.protect(0, PAGES, MprotectFlags::READ);
    assert_eq!(read(&handle, part(memory.range(), 0, 1)).unwrap().1, 1);
    let from = bytes(&pattern(5, PAGES));
    assert_eq!(handle.write(memory.range(), &from), Err(Error::Permission));
    assert!(memory.words(0, PAGES).iter().all(|word| *word == 0));
    memory.protect(0, PAGES, MprotectFlags::READ | MprotectFlags::WRITE);
    handle.write(memory.range(), &from).unwrap();
    check(memory.words(0, PAGES), 5);
    // Nobody tells the table of this; the kernel refuses the store all the same.
    memory.protect(0, PAGES, MprotectFlags::READ);
    assert_eq!(handle.write(memory.range(), &from), Err(Error::Permission));
    // Told, it knows.
    memory.protect(0, PAGES, MprotectFlags::READ | MprotectFlags::WRITE);
    to_device(&handle, memory.range()).unwrap();
    machine.space().protecting(memory.range(), || memory.protect(0, PAGES, MprotectFlags::READ));
    assert_eq!(handle.write(memory.range(), &from), Err(Error::Permission));
    check(&read(&handle, memory.range()).unwrap().0, 5);
}

/// Memory that no page leaves.
fn shared_and_file(setup: Setup) {
    alone(setup, "shared_and_file", shared_and_file_alone);
}

fn shared_and_file_alone(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, PAGE as u64 * 4).unwrap();
    for (flags, read_only) in
        [(MapFlags::SHARED, false), (MapFlags::SHARED, true), (MapFlags::PRIVATE, false)]
    {
        let prot = if read_only { ProtFlags::READ } else { ProtFlags::READ | ProtFlags::WRITE };
        // SAFETY: a fresh mapping, where the kernel likes.
        let start = unsafe { mmap(std::ptr::null_mut(), 4 * PAGE, prot, flags, &file, 0) }.unwrap();
        let range = VaRange::new(VirtAddr::of(start), 4 * PAGE).unwrap();
        let from = bytes(&pattern(6, 4));
        let written = handle.write(range, &from).map(|counts| counts.faults);
        assert_eq!(written, if read_only { Err(Error::Permission) } else { Ok(1) });
        check(&read(&handle, range).unwrap().0, 6);
        assert_eq!(to_device(&handle, range), Err(Error::NotThere));
        // SAFETY: the mapping from above, to which nothing refers.
        unsafe { munmap(start, 4 * PAGE) }.unwrap();
        assert_eq!(read(&handle, range), Err(Error::Fault));
    }
}

fn migrate(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 7);
    check(&to_device(&handle, memory.range()).unwrap(), 7);
    assert_eq!(machine.device_pages(NODES[0]), pages(PAGES));
    let (found, faults) = read(&handle, memory.range()).unwrap();
    assert_eq!(faults, 0);
    check(&found, 7);
    assert_eq!(machine.device_pages(NODES[0]), pages(PAGES), "the device reads its own pages where they are");
    let counts = handle.migrate_to_system(memory.range()).unwrap();
    assert_eq!(counts.pages, pages(PAGES));
    check(memory.words(0, PAGES), 7);
}

fn migrate_fault(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 8);
    check(&to_device(&handle, memory.range()).unwrap(), 8);
    check(memory.words(0, PAGES / 2), 8);
    check(&to_device(&handle, memory.range()).unwrap(), 8);
    assert_eq!(machine.device_pages(NODES[0]), pages(PAGES));
    check(memory.words(0, PAGES), 8);
}

fn migrate_release(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 9);
    to_device(&handle, memory.range()).unwrap();
    assert_eq!(handle.release().unwrap().pages, pages(PAGES));
    assert_eq!(machine.device_pages(NODES[0]), PageCount::ZERO);
    check(memory.words(0, PAGES / 2), 9);
    check(&to_device(&handle, memory.range()).unwrap(), 9);
}

fn migrate_shared(setup: Setup) {
    alone(setup, "migrate_shared", migrate_shared_alone);
}

fn migrate_shared_alone(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping, where the kernel likes.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), 4 * PAGE, prot, MapFlags::SHARED) }.unwrap();
    let range = VaRange::new(VirtAddr::of(start), 4 * PAGE).unwrap();
    handle.write(range, &bytes(&pattern(10, 4))).unwrap();
    assert_eq!(to_device(&handle, range), Err(Error::NotThere));
    check(&read(&handle, range).unwrap().0, 10);
    // SAFETY: the mapping from above, to which nothing refers.
    unsafe { munmap(start, 4 * PAGE) }.unwrap();
}

fn migrate_mixed(setup: Setup) {
    alone(setup, "migrate_mixed", migrate_mixed_alone);
}

fn migrate_mixed_alone(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let (first, second) = (machine.open(NODES[0]).unwrap(), machine.open(NODES[1]).unwrap());
    let mut memory = Memory::new(6);
    let range = memory.range();
    fill(memory.words_mut(3, 3), 11);
    memory.protect(0, 6, MprotectFlags::empty());
    assert_eq!(to_device(&second, range), Err(Error::Invalid));
    // SAFETY: a page of the mapping, to which nothing refers; the memory minds no hole.
    unsafe { munmap(memory.page(1).cast(), PAGE) }.unwrap();
    memory.protect(0, 1, MprotectFlags::READ);
    assert_eq!(to_device(&second, part(range, 0, 3)), Err(Error::Invalid));
    memory.protect(2, 2, MprotectFlags::READ);
    assert!(memory.words(2, 1).iter().all(|word| *word == 0));
    memory.protect(4, 2, MprotectFlags::READ | MprotectFlags::WRITE);
    check(&to_device(&second, part(range, 2, 4)).unwrap()[PAGE / 8..], 11);
    assert_eq!(machine.device_pages(NODES[1]), pages(5), "the first page went before the hole was found");
    assert_eq!(to_device(&first, part(range, 5, 1)), Err(Error::NotThere));
    check(memory.words(3, 3), 11);
}

fn migrate_multiple(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    for round in 0..10 {
        let mut memory = Memory::new(PAGES);
        fill(memory.words_mut(0, PAGES), round);
        check(&to_device(&handle, memory.range()).unwrap(), round);
        if round % 2 == 0 {
            assert_eq!(handle.migrate_to_system(memory.range()).unwrap().pages, pages(PAGES));
        }
        check(memory.words(0, PAGES), round);
    }
    common::eventually(|| machine.device_pages(NODES[0]).is_zero());
}

/// Half of a buffer goes while the device reads it.
fn anon_teardown(setup: Setup) {
    alone(setup, "anon_teardown", anon_teardown_alone);
}

fn anon_teardown_alone(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    for round in 0..50 {
        let mut memory = Memory::new(PAGES);
        fill(memory.words_mut(0, PAGES), round);
        let range = memory.range();
        let upper = memory.page(PAGES / 2).expose_provenance();
        thread::scope(|scope| {
            scope.spawn(move || {
                (0..round * 200).for_each(|_| std::hint::spin_loop());
                // SAFETY: nothing refers to that half; the memory minds no hole.
                unsafe { munmap(std::ptr::with_exposed_provenance_mut(upper), PAGES / 2 * PAGE) }.unwrap();
            });
            match read(&handle, range) {
                Ok((found, faults)) => {
                    assert_eq!(faults, 1);
                    check(&found, round);
                }
                Err(error) => assert_eq!(error, Error::Fault),
            }
        });
        check(memory.words(0, PAGES / 2), round);
        assert_eq!(read(&handle, range), Err(Error::Fault));
    }
}

fn snapshot(setup: Setup) {
    alone(setup, "snapshot", snapshot_alone);
}

fn snapshot_alone(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let (first, second) = (machine.open(NODES[0]).unwrap(), machine.open(NODES[1]).unwrap());
    let mut memory = Memory::new(8);
    let range = memory.range();
    fill(memory.words_mut(3, 5), 12);
    memory.protect(0, 1, MprotectFlags::empty());
    // SAFETY: a page of the mapping, to which nothing refers; the memory minds no hole.
    unsafe { munmap(memory.page(1).cast(), PAGE) }.unwrap();
    memory.protect(2, 2, MprotectFlags::READ);
    assert_eq!(memory.words(2, 1)[0], 0);
    to_device(&first, part(range, 5, 1)).unwrap();
    to_device(&second, part(range, 6, 1)).unwrap();
    assert_eq!(look(&first, range), [0xff, 0xff, 0x11, 0x01, 0x02, 0x22, 0x00, 0x02]);
    assert_eq!(look(&second, range), [0xff, 0xff, 0x11, 0x01, 0x02, 0x00, 0x22, 0x02]);
    let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, PAGE as u64).unwrap();
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping, where the kernel likes.
    let start = unsafe { mmap(std::ptr::null_mut(), PAGE, prot, MapFlags::PRIVATE, &file, 0) }.unwrap();
    let private = VaRange::new(VirtAddr::of(start), PAGE).unwrap();
    assert_eq!(look(&first, private), [0x00]);
    let mut byte = [1];
    load(private.start(), &mut byte).unwrap();
    assert_eq!((look(&first, private), byte), (vec![0x01], [0]), "a store would get another page");
    first.write(private, &[0; PAGE]).unwrap();
    assert_eq!(look(&first, private), [0x02]);
    // SAFETY: the mapping from above, to which nothing refers.
    unsafe { munmap(start, PAGE) }.unwrap();
}

fn double_map(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let (first, second) = (machine.open(NODES[0]).unwrap(), machine.open(NODES[1]).unwrap());
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 13);
    for handle in [&first, &second] {
        let (found, faults) = read(handle, memory.range()).unwrap();
        assert_eq!(faults, 1);
        check(&found, 13);
    }
    check(&to_device(&second, memory.range()).unwrap(), 13);
    let (found, faults) = read(&first, memory.range()).unwrap();
    assert_eq!(faults, 1, "the first one was told that the pages went");
    check(&found, 13);
    assert_eq!(machine.space().residency(memory.range()).device, PageCount::ZERO);
}

fn gup(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 14);
    to_device(&handle, memory.range()).unwrap();
    for (n, purpose) in [PinFor::Read, PinFor::Write].into_iter().enumerate() {
        let held = machine.hold(part(memory.range(), 8 * n, 8), pages(3), purpose, true);
        assert_eq!(held.pages, pages(8));
    }
    assert_eq!(machine.space().residency(memory.range()).device, pages(PAGES - 16));
    memory.protect(20, 4, MprotectFlags::READ);
    assert_eq!(machine.hold(part(memory.range(), 16, 8), pages(1), PinFor::Write, true).pages, pages(4));
    assert!(machine.space().pins().is_empty());
    check(memory.words(0, PAGES), 14);
}

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

/// A machine with coherent devices, if there can be one: their memory is mapped in place by moving frames.
fn coherent(setup: Setup) -> Option<Dmirror> {
    let machine = machine(setup, ByteSize::mib(4));
    let there = machine.open(NODES[2]).is_ok();
    assert_eq!(there, !setup.forced_fallback);
    there.then_some(machine)
}

fn coherent_pages_are_touched_in_place(setup: Setup) {
    let Some(machine) = coherent(setup) else { return };
    let handle = machine.open(NODES[2]).unwrap();
    let mut memory = Memory::new(PAGES);
    let range = memory.range();
    fill(memory.words_mut(0, PAGES), 31);
    check(&to_device(&handle, range).unwrap(), 31);
    assert_eq!(machine.device_pages(NODES[2]), pages(PAGES));
    let faults = machine.space().count(Counter::Faults);
    check(memory.words(0, PAGES), 31);
    fill(memory.words_mut(0, PAGES), 32);
    assert_eq!(machine.space().count(Counter::Faults), faults, "touched where they are");
    let (found, missed) = read(&handle, range).unwrap();
    assert_eq!(missed, 0);
    check(&found, 32);
    handle.write(range, &bytes(&pattern(33, PAGES))).unwrap();
    check(memory.words(0, PAGES), 33);
    assert_eq!(machine.device_pages(NODES[2]), pages(PAGES));
    assert_eq!(handle.migrate_to_system(range).unwrap().pages, pages(PAGES));
    assert_eq!(machine.device_pages(NODES[2]), PageCount::ZERO);
    check(memory.words(0, PAGES), 33);
    check(&to_device(&handle, range).unwrap(), 33);
    handle.release().unwrap();
    assert_eq!(machine.device_pages(NODES[2]), PageCount::ZERO);
    check(memory.words(0, PAGES), 33);
}

fn coherent_pages_of_a_mapping_that_may_only_be_read(setup: Setup) {
    let Some(machine) = coherent(setup) else { return };
    let (first, second) = (machine.open(NODES[2]).unwrap(), machine.open(NODES[3]).unwrap());
    let mut memory = Memory::new(PAGES);
    let range = memory.range();
    fill(memory.words_mut(0, PAGES), 34);
    memory.protect(0, PAGES, MprotectFlags::READ);
    for handle in [&first, &second] {
        check(&read(handle, range).unwrap().0, 34);
    }
    check(&to_device(&second, range).unwrap(), 34);
    check(&read(&first, range).unwrap().0, 34);
    check(memory.words(0, PAGES), 34);
}

fn coherent_pages_and_others(setup: Setup) {
    let Some(machine) = coherent(setup) else { return };
    let [private, _, first, second] = NODES.map(|node| machine.open(node).unwrap());
    let mut memory = Memory::new(4);
    let range = memory.range();
    fill(memory.words_mut(0, 4), 35);
    to_device(&private, part(range, 1, 1)).unwrap();
    to_device(&first, part(range, 2, 1)).unwrap();
    to_device(&second, part(range, 3, 1)).unwrap();
    assert_eq!(look(&private, range), [0x02, 0x22, 0x52, 0x52]);
    assert_eq!(look(&first, range), [0x02, 0x00, 0x42, 0x52]);
    assert_eq!(look(&second, range), [0x02, 0x00, 0x52, 0x42]);
    // One that another device has is not taken from it; everybody reads it where it is.
    assert_eq!(to_device(&first, part(range, 3, 1)), Err(Error::NotThere));
    check(&read(&first, range).unwrap().0, 35);
    assert_eq!(machine.device_pages(NODES[3]), pages(1));
}

fn coherent_pages_that_are_held(setup: Setup) {
    let Some(machine) = coherent(setup) else { return };
    let handle = machine.open(NODES[2]).unwrap();
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 36);
    to_device(&handle, memory.range()).unwrap();
    for (for_long, there) in [(false, PAGES), (true, PAGES - 8)] {
        let held = machine.hold(part(memory.range(), 8, 8), pages(8), PinFor::Write, for_long);
        assert_eq!((held.pages, machine.device_pages(NODES[2])), (pages(8), pages(there)));
    }
    check(memory.words(0, PAGES), 36);
}

fn exclusive_pages_of_a_coherent_device(setup: Setup) {
    let Some(machine) = coherent(setup) else { return };
    exclusive_of(&machine, NODES[2]);
    exclusive_of(&machine, NODES[0]);
}

fn exclusive_of(machine: &Dmirror, node: Node) {
    let handle = machine.open(node).unwrap();
    let mut memory = Memory::new(PAGES);
    let range = memory.range();
    fill(memory.words_mut(0, PAGES), 37);
    let mut into = vec![0; range.bytes()];
    assert_eq!(handle.exclusive(range, &mut into).unwrap().pages, pages(PAGES));
    check(&words(&into), 37);
    assert!(handle.is_exclusive(range));
    handle.write(part(range, 0, 8), &bytes(&pattern(38, 8))).unwrap();
    assert!(handle.is_exclusive(part(range, 0, 8)), "the device itself revokes nothing");
    check(memory.words(0, 8), 38);
    assert!(!handle.is_exclusive(part(range, 0, 8)) && handle.is_exclusive(part(range, 8, 8)));
    memory.protect(8, 1, MprotectFlags::READ);
    assert_eq!(handle.exclusive(part(range, 8, 2), &mut into[..2 * PAGE]), Err(Error::Busy));
    memory.protect(8, 1, MprotectFlags::READ | MprotectFlags::WRITE);
    common::check_from(memory.words(8, PAGES - 8), 37, 8 * PAGE / 8);
    assert!(!handle.is_exclusive(range));
}
