//! Migration to a device and back, on the running kernel: what moves, what does not and why, and that the
//! bytes are always the same. The names follow the kernel's own hmm-tests.

mod common;

use common::{
    Memory, PAGE, Setup, WORDS, check, check_from, eventually, expect_places, file, fill, memory, part,
    settle, word,
};
use rustix::mm::MprotectFlags;
use uhmm::space::{LEAST_BUDGET, MapError, MigrateError, SpaceError};
use uhmm::{ByteSize, Counter, PageCount, Skip, Space};

scenarios!(
    migrate,
    migrate_to_file,
    migrate_fault,
    migrate_release,
    migrate_mixed,
    migrate_multiple,
    migrate_between_devices,
    anon_read_untouched,
    adoption_ends_with_every_page_home,
    what_is_not_managed_is_refused,
    what_cannot_be_mapped_is_refused,
    a_limit_needs_a_device_and_room,
    a_window_brings_neighbours,
    many_buffers,
);

const PAGES: usize = 1024;
const ALL: PageCount = PageCount::new(PAGES);

fn there_and_back(setup: Setup, space: &Space) {
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 1);
    expect_places(space, buffer.range(), PAGES, 0);
    let done = space.migrate(buffer.range()).unwrap();
    assert_eq!((done.moved, done.skipped.total()), (ALL, 0), "{:?}", done.skipped);
    expect_places(space, buffer.range(), 0, PAGES);
    assert_eq!(space.device_pages(0), Some(ALL));
    assert_eq!(space.count(Counter::Written), PAGES as u64);
    check(&buffer, 1);
    expect_places(space, buffer.range(), PAGES, 0);
    eventually(|| space.count(Counter::MovedIn) == PAGES as u64);
    let kept = if setup.keeps_copies() { ALL } else { PageCount::ZERO };
    assert_eq!(space.device_pages(0), Some(kept));
    fill(&mut buffer, 2);
    settle(space, buffer.range());
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO), "a written page's copy is out of date");
    check(&buffer, 2);
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    check(&buffer, 2);
    drop(buffer);
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
}

fn migrate(setup: Setup) {
    there_and_back(setup, &setup.space(ByteSize::mib(8)));
}

fn migrate_to_file(setup: Setup) {
    there_and_back(setup, &setup.with(file(ByteSize::mib(8))));
}

fn migrate_fault(setup: Setup) {
    let space = setup.space(ByteSize::mib(8));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 3);
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    // Half of it comes back, by stores.
    for page in 0..PAGES / 2 {
        buffer[page * WORDS] = word(3, page * WORDS);
    }
    expect_places(&space, buffer.range(), PAGES / 2, PAGES / 2);
    let again = space.migrate(buffer.range()).unwrap();
    assert_eq!(again.moved, PageCount::new(PAGES / 2));
    assert_eq!(again.skipped.get(Skip::Elsewhere), PAGES as u64 / 2, "{:?}", again.skipped);
    expect_places(&space, buffer.range(), 0, PAGES);
    check(&buffer, 3);
}

fn migrate_release(setup: Setup) {
    let space = setup.space(ByteSize::mib(8));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 4);
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    assert_eq!(space.prefetch(buffer.range()).unwrap(), ALL);
    expect_places(&space, buffer.range(), PAGES, 0);
    let faults = common::faults(&space);
    check(&buffer, 4);
    assert_eq!(common::faults(&space), faults, "nothing is left to fault on");
    assert_eq!(space.prefetch(buffer.range()).unwrap(), PageCount::ZERO);
    // The device's pages can be used again.
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    check(&buffer, 4);
}

fn migrate_mixed(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    // 0-3 never touched, 4-7 only read, 8-15 written, 12-13 read-only since, 16-19 on the device already.
    let mut memory = Memory::new(40);
    let adopted = memory.adopt(&space);
    assert!(memory.words(4, 4).iter().all(|word| *word == 0));
    fill(memory.words_mut(24, 12), 5);
    let away = part(memory.range(), 32, 4);
    assert_eq!(space.migrate(away).unwrap().moved, PageCount::new(4));
    memory.protect(28, 2, MprotectFlags::READ);
    let done = space.migrate(memory.range()).unwrap();
    // The zero page, which is all that reads have brought, counts as a page or as a hole, as the kernel has it.
    let zeros = done.moved.get() - 8;
    // A fault on fresh memory fills 16 pages, but none behind the border of a chunk: there, the reads raise two.
    assert!(zeros <= 23, "{zeros}");
    assert_eq!(done.skipped.get(Skip::Elsewhere), 4, "{:?}", done.skipped);
    assert_eq!(done.skipped.get(Skip::Hole), 28 - zeros as u64, "{:?}", done.skipped);
    assert_eq!(done.skipped.total(), 32 - zeros as u64, "{:?}", done.skipped);
    assert_eq!(space.skipped(), done.skipped);
    assert_eq!(space.residency(memory.range()).device, PageCount::new(12 + zeros));
    check_from(&memory.words(24, 12)[4 * WORDS..6 * WORDS], 5, 4 * WORDS);
    check(memory.words(24, 12), 5);
    memory.protect(28, 2, MprotectFlags::READ | MprotectFlags::WRITE);
    fill(memory.words_mut(24, 12), 6);
    assert!(memory.words(0, 24).iter().all(|word| *word == 0));
    check(memory.words(24, 12), 6);
    drop(adopted);
    check(memory.words(24, 12), 6);
}

fn migrate_multiple(setup: Setup) {
    let space = setup.space(ByteSize::mib(6));
    for round in 0..10 {
        let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
        assert!(buffer.iter().step_by(WORDS).all(|word| *word == 0), "fresh memory is zero");
        fill(&mut buffer, round);
        assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
        if round % 2 == 0 {
            check(&buffer, round);
        }
        drop(buffer);
        assert_eq!(space.device_pages(0), Some(PageCount::ZERO), "round {round}");
    }
}

fn migrate_between_devices(setup: Setup) {
    let space =
        setup.builder().device(memory(ByteSize::mib(4))).device(file(ByteSize::mib(4))).build().unwrap();
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 7);
    let half = part(buffer.range(), 0, PAGES / 2);
    assert_eq!(space.migrate_to(half, 1).unwrap().moved, PageCount::new(PAGES / 2));
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, PageCount::new(PAGES / 2));
    assert_eq!(space.device_pages(0), Some(PageCount::new(PAGES / 2)));
    assert_eq!(space.device_pages(1), Some(PageCount::new(PAGES / 2)));
    assert_eq!(space.device_pages(2), None);
    assert_eq!(space.migrate_to(half, 2), Err(MigrateError::NoDevice(2)));
    check(&buffer, 7);
    settle(&space, buffer.range());
    assert_eq!(space.prefetch(buffer.range()).unwrap(), PageCount::ZERO);
    assert_eq!(space.migrate_to(buffer.range(), 1).unwrap().moved, ALL);
    // Where it was asked to go, and not where a clean copy of it was left.
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
    assert_eq!(space.device_pages(1), Some(ALL));
    check(&buffer, 7);
}

fn anon_read_untouched(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    let buffer = space.map::<u64>(64 * WORDS).unwrap();
    expect_places(&space, buffer.range(), 0, 0);
    let done = space.migrate(buffer.range()).unwrap();
    assert_eq!((done.moved, done.skipped.get(Skip::Hole)), (PageCount::ZERO, 64));
    assert!(buffer.iter().all(|word| *word == 0));
    // The zero page has nothing that would have to be kept.
    let done = space.migrate(buffer.range()).unwrap();
    assert_eq!(done.moved.get() + done.skipped.total() as usize, 64);
    assert!(buffer.iter().all(|word| *word == 0));
}

fn adoption_ends_with_every_page_home(setup: Setup) {
    let space = setup.space(ByteSize::mib(8));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 8);
    let adopted = memory.adopt(&space);
    assert_eq!(adopted.range(), memory.range());
    assert_eq!(space.migrate(memory.range()).unwrap().moved, ALL);
    drop(adopted);
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
    assert_eq!(space.migrate(memory.range()), Err(MigrateError::Unmanaged(memory.range())));
    let faults = common::faults(&space);
    check(memory.words(0, PAGES), 8);
    assert_eq!(common::faults(&space), faults);
    // It can be adopted again, and by another space.
    let other = setup.space(ByteSize::mib(8));
    let adopted = memory.adopt(&other);
    // SAFETY: as for any adoption; it is refused.
    let twice = unsafe { space.adopt(memory.start(), PAGES * PAGE) };
    assert!(matches!(twice, Err(MapError::Register(_))), "{twice:?}");
    assert_eq!(other.migrate(memory.range()).unwrap().moved, ALL);
    drop(adopted);
    drop((space, other));
    check(memory.words(0, PAGES), 8);
}

fn what_is_not_managed_is_refused(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    let buffer = space.map::<u8>(4 * PAGE).unwrap();
    let elsewhere = Memory::new(4);
    let other = setup.space(ByteSize::mib(1));
    let foreign = other.map::<u8>(PAGE).unwrap();
    for range in
        [buffer.range().take(PageCount::ONE).grow(PageCount::new(5)), elsewhere.range(), foreign.range()]
    {
        assert_eq!(space.migrate(range), Err(MigrateError::Unmanaged(range)));
    }
    let without = setup.builder().build().unwrap();
    let buffer = without.map::<u8>(PAGE).unwrap();
    assert_eq!(without.migrate(buffer.range()), Err(MigrateError::NoDevice(0)));
    assert_eq!(without.evict(PageCount::ONE), Err(MigrateError::NoDevice(0)));
    assert_eq!(without.device_pages(0), None);
}

fn what_cannot_be_mapped_is_refused(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    assert!(matches!(space.map::<u64>(usize::MAX), Err(MapError::TooLarge(usize::MAX))));
    // More than there are addresses, in pieces of which each would fit.
    let mut pieces = Vec::new();
    let error = loop {
        match space.map::<u8>((1 << 46) - (1 << 30)) {
            Ok(piece) => pieces.push(piece),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, MapError::Map(_)), "{error:?}");
    assert!(matches!(space.map::<u8>(1 << 46), Err(MapError::TooLarge(_))));
    drop(pieces);
    assert_eq!(space.map::<u64>(0).unwrap().len(), 0);
    let memory = Memory::new(2);
    // SAFETY: refused before anything happens to the memory.
    let unaligned = unsafe { space.adopt(memory.start().wrapping_add(1), PAGE) };
    assert!(matches!(unaligned, Err(MapError::Range(_))), "{unaligned:?}");
    // SAFETY: as above.
    let empty = unsafe { space.adopt(memory.start(), 0) };
    assert!(matches!(empty, Err(MapError::Range(_))), "{empty:?}");
    // SAFETY: as above: nothing is mapped there, below where the system maps anything.
    let unmapped = unsafe { space.adopt(std::ptr::without_provenance_mut(0x10_0000), PAGE) };
    assert!(matches!(unmapped, Err(MapError::Register(_))), "{unmapped:?}");
    let executable = std::fs::File::open("/proc/self/exe").unwrap();
    // SAFETY: the kernel chooses a free place.
    let of_file = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            PAGE,
            rustix::mm::ProtFlags::READ,
            rustix::mm::MapFlags::PRIVATE,
            &executable,
            0,
        )
    }
    .unwrap();
    // SAFETY: refused.
    let adopted = unsafe { space.adopt(of_file.cast(), PAGE) };
    assert!(matches!(adopted, Err(MapError::Register(_))), "{adopted:?}");
}

fn a_limit_needs_a_device_and_room(setup: Setup) {
    let limit = ByteSize::mib(64);
    let without = setup.builder().ram(limit).build();
    assert!(matches!(without, Err(SpaceError::NoDevice(given)) if given == limit), "{without:?}");
    let given = ByteSize::kib(512);
    let small = setup.builder().ram(given).device(memory(ByteSize::mib(1))).build();
    assert!(matches!(small, Err(SpaceError::Budget { least: LEAST_BUDGET, .. })), "{small:?}");
    let least = setup.builder().ram(LEAST_BUDGET).device(memory(ByteSize::mib(16))).build().unwrap();
    let mut buffer = least.map::<u64>(2 * PAGES * WORDS).unwrap();
    fill(&mut buffer, 9);
    check(&buffer, 9);
}

fn a_window_brings_neighbours(setup: Setup) {
    let window = PageCount::new(16);
    let space = setup.builder().device(memory(ByteSize::mib(8))).window(window).build().unwrap();
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 10);
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, ALL);
    let home = space.count(Counter::MovedIn);
    buffer[512 * WORDS] = word(10, 512 * WORDS);
    eventually(|| space.count(Counter::MovedIn) - home == 16);
    let faults = common::faults(&space);
    check(&buffer, 10);
    assert!(space.count(Counter::Faults) - faults <= PAGES as u64 / 16);
}

fn many_buffers(setup: Setup) {
    let space = setup.space(ByteSize::mib(8));
    let mut buffers: Vec<_> = (0..32).map(|_| space.map::<u64>(16 * WORDS).unwrap()).collect();
    for (n, buffer) in buffers.iter_mut().enumerate() {
        fill(buffer, n as u64);
        let done = space.migrate(buffer.range()).unwrap();
        assert_eq!(done.moved, PageCount::new(16), "buffer {n}: {:?}", done.skipped);
    }
    for n in (0..32).rev().step_by(3) {
        drop(buffers.swap_remove(n));
        let kept = buffers.len() * 16;
        assert_eq!(space.device_pages(0), Some(PageCount::new(kept)));
    }
    let clone = space.clone();
    drop(space);
    // A buffer keeps what serves it.
    drop(clone);
    let mut seen: Vec<u64> =
        buffers.iter().map(|buffer| (0..32).find(|n| buffer[0] == word(*n, 0)).unwrap()).collect();
    for (buffer, seed) in buffers.iter().zip(&seen) {
        check(buffer, *seed);
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), buffers.len());
}
