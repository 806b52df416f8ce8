//! The device on the running kernel: the scenarios of the kernel's hmm-tests by name.

mod bed;
#[path = "../../uhmm/tests/common/mod.rs"]
mod common;

use std::thread;

use bed::{NODES, PAGES, alone, bytes, look, machine, pages, pattern, read, to_device};
use common::{Memory, PAGE, Setup, check, fill, part};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use uhmm::{ByteSize, PageCount, PinFor, VaRange, VirtAddr};
use uhmm_dmirror::{Error, Kind, load};

with_engine!(Threads, threads_move, threads_fallback:
    open_close,
    anon_read,
    anon_read_prot,
    anon_write,
    anon_write_prot,
    shared_and_file,
    migrate,
    migrate_file_private,
    migrate_fault,
    migrate_release,
    migrate_shared,
    migrate_mixed,
    migrate_multiple,
    anon_teardown,
    snapshot,
    double_map,
    gup,
);

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

/// Memory that no page leaves, and a private mapping of it, whose written pages do.
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
        match to_device(&handle, range) {
            Ok(found) => {
                assert_eq!(flags, MapFlags::PRIVATE);
                check(&found, 6);
            }
            Err(error) => assert_eq!(error, Error::NotThere),
        }
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

/// What was written of a private mapping of a file goes to the device, the file's own pages do not.
fn migrate_file_private(setup: Setup) {
    let machine = machine(setup, ByteSize::mib(4));
    let handle = machine.open(NODES[0]).unwrap();
    let file = rustix::fs::memfd_create("dmirror", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&file, &bytes(&pattern(20, PAGES)), 0).unwrap();
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
    let mut memory = Memory::new(PAGES);
    // SAFETY: over the memory's own mapping, to which nothing refers.
    unsafe { mmap(memory.start().cast(), PAGES * PAGE, prot, flags, &file, 0) }.unwrap();
    let (low, high) = (part(memory.range(), 0, PAGES / 2), part(memory.range(), PAGES / 2, PAGES / 2));
    fill(memory.words_mut(0, PAGES / 2), 21);
    check(&read(&handle, low).unwrap().0, 21);
    if to_device(&handle, low) == Err(Error::NotThere) {
        return common::skip(
            "migrate_file_private",
            "no pages can be held: no io_uring, or before Linux 6.5",
        );
    }
    assert_eq!(machine.device_pages(NODES[0]), pages(PAGES / 2));
    assert_eq!(to_device(&handle, high), Err(Error::NotThere));
    assert_eq!(
        look(&handle, part(memory.range(), PAGES / 2 - 1, 2)),
        [0x22, 0],
        "nobody has touched that one"
    );
    check(&read(&handle, low).unwrap().0, 21);
    common::check_from(&read(&handle, high).unwrap().0, 20, PAGES / 2 * PAGE / 8);
    check(memory.words(0, PAGES / 2), 21);
    // Written by the device, and then by nobody but it.
    handle.write(high, &bytes(&pattern(22, PAGES / 2))).unwrap();
    let mut into = vec![0; high.bytes()];
    handle.exclusive(high, &mut into).unwrap();
    assert!(handle.is_exclusive(high) && into == bytes(&pattern(22, PAGES / 2)));
    check(memory.words(PAGES / 2, PAGES / 2), 22);
    let mut found = vec![0; PAGES * PAGE];
    rustix::io::pread(&file, &mut found, 0).unwrap();
    assert!(found == bytes(&pattern(20, PAGES)), "none of it gets into the file");
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
