//! Coherent memory on the running kernel: pages that the program has in place on a device. The names follow the kernel's
//! own hmm-tests where there is one.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::child::{expect_well, fork};
use common::{
    Memory, PAGE, Random, Setup, WORDS, check, eventually, fill, in_process, memory, name_of, part, settle,
    word,
};
use rustix::mm::{Advice, MprotectFlags, MremapFlags, madvise, mprotect, mremap_fixed};
use uhmm::managed::BuildError;
use uhmm::mirror::{MirrorTable, PageView};
use uhmm::notifier::Event;
use uhmm::space::SpaceError;
use uhmm::{ByteSize, Counter, Device, MemDevice, PageCount, PinError, PinFor, Skip, Space, VaRange};

// With frames that move; without, there is no coherent memory.
macro_rules! with_moves {
    ($module:ident, $engine:ident: $($name:ident),* $(,)?) => {
        mod $module {
            use $crate::common::{Setup, run};
            $(#[test]
            fn $name() {
                let setup = Setup { engine: uhmm::Engine::$engine, forced_fallback: false };
                run(concat!(stringify!($module), "::", stringify!($name)), setup, super::$name);
            })*
        }
    };
}

with_moves!(signal_move, Signal:
    migrate, migrate_multiple, migrate_mixed, migrate_release, migrate_holes, longterm_pins, pages_by_number,
    a_device_that_fills_up, what_cannot_be_written_to, a_mirror_sees_whose_page_it_is, memory_that_was_adopted,
    a_device_is_in_one_space_at_a_time, registered_buffers_stay_in_place, writers_beside_migrations, forks,
    huge_pages_go_in_small_ones, memory_of_a_node,
);
with_moves!(threads_move, Threads:
    migrate, migrate_multiple, migrate_mixed, migrate_release, migrate_holes, longterm_pins, pages_by_number,
    a_device_that_fills_up, what_cannot_be_written_to, a_mirror_sees_whose_page_it_is, memory_that_was_adopted,
    a_device_is_in_one_space_at_a_time, registered_buffers_stay_in_place, writers_beside_migrations, forks,
    huge_pages_go_in_small_ones, memory_of_a_node,
    what_is_given_up, mappings_that_move, a_limit_does_not_count_them, evicted_pages_are_mapped_when_touched,
);
with_engine!(Signal, signal, signal_fallback: without_moves_it_is_refused);

const PAGES: usize = 256;

/// A mirror's table that nobody looks things up in.
struct Table;

impl MirrorTable for Table {
    fn invalidate(&mut self, _range: VaRange, _event: Event) {}
}

fn coherent(size: ByteSize) -> Arc<dyn Device> {
    Arc::new(MemDevice::coherent(size, None).unwrap())
}

/// A space whose device 0 is private, and 1 coherent.
fn two(setup: Setup) -> Space {
    setup.builder().device(memory(ByteSize::mib(4))).device(coherent(ByteSize::mib(4))).build().unwrap()
}

#[track_caller]
fn expect_in_place(space: &Space, range: VaRange, pages: usize) {
    settle(space, range);
    eventually(|| space.residency(range).mapped.get() == pages);
    let found = space.residency(range);
    assert_eq!((found.mapped.get(), found.device.get()), (pages, pages), "{found:?}");
}

fn migrate(setup: Setup) {
    let space = two(setup);
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 1);
    settle(&space, buffer.range());
    let done = space.migrate_to(buffer.range(), 1).unwrap();
    assert_eq!((done.moved.get(), done.skipped.total()), (PAGES, 0), "{done:?}");
    expect_in_place(&space, buffer.range(), PAGES);
    let before = common::faults(&space);
    check(&buffer, 1);
    fill(&mut buffer, 2);
    check(&buffer, 2);
    assert_eq!(common::faults(&space), before, "a touch in place raises no fault");
    expect_in_place(&space, buffer.range(), PAGES);
    let done = space.recall(buffer.range(), 1).unwrap();
    assert_eq!((done.moved.get(), done.skipped.total()), (PAGES, 0), "{done:?}");
    let found = space.residency(buffer.range());
    assert_eq!(
        (found.resident.get(), found.device.get(), space.device_pages(1).unwrap().get()),
        (PAGES, 0, 0)
    );
    check(&buffer, 2);
}

fn migrate_multiple(setup: Setup) {
    let space = two(setup);
    for round in 0..10 {
        let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
        fill(&mut buffer, round);
        settle(&space, buffer.range());
        assert_eq!(space.migrate_to(buffer.range(), 1).unwrap().moved.get(), PAGES);
        check(&buffer, round);
        if round % 2 == 0 {
            assert_eq!(space.recall(buffer.range(), 1).unwrap().moved.get(), PAGES);
            check(&buffer, round);
        }
        drop(buffer);
        assert_eq!(space.device_pages(1).unwrap(), PageCount::ZERO);
    }
}

fn migrate_mixed(setup: Setup) {
    let space = two(setup);
    let [private, place] = [0, 1].map(|device| space.owner(device).unwrap());
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 3);
    let (low, high) = (part(buffer.range(), 0, PAGES / 2), part(buffer.range(), PAGES / 2, PAGES / 2));
    settle(&space, buffer.range());
    assert_eq!(space.migrate(low).unwrap().moved.get(), PAGES / 2);
    assert_eq!(space.migrate_to(high, 1).unwrap().moved.get(), PAGES / 2);
    let done = space.migration(buffer.range()).to(1).run().unwrap();
    let reasons = [Skip::Foreign, Skip::Elsewhere].map(|why| done.skipped.get(why));
    assert_eq!((done.moved.get(), reasons), (0, [PAGES as u64 / 2; 2]), "{done:?}");
    // A private device's pages go into place, and those in place to a private device: directly, both are memory.
    let done = space.migration(low).private(private).to(1).run().unwrap();
    assert_eq!((done.moved.get(), done.direct.get()), (PAGES / 2, PAGES / 2), "{done:?}");
    expect_in_place(&space, buffer.range(), PAGES);
    let faults = common::faults(&space);
    check(&buffer, 3);
    assert_eq!(common::faults(&space), faults);
    let done = space.migration(high).private(place).run().unwrap();
    assert_eq!(done.skipped.get(Skip::Unselected), PAGES as u64 / 2, "{done:?}");
    let done = space.migration(high).coherent(place).run().unwrap();
    assert_eq!((done.moved.get(), done.direct.get()), (PAGES / 2, PAGES / 2), "{done:?}");
    assert_eq!([0, 1].map(|device| space.device_pages(device).unwrap().get()), [PAGES / 2; 2]);
    check(&buffer, 3);
}

fn migrate_release(setup: Setup) {
    let space = two(setup);
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 4);
    settle(&space, buffer.range());
    assert_eq!(space.migrate_to(buffer.range(), 1).unwrap().moved.get(), PAGES);
    let done = space.evacuate(1, None).unwrap();
    assert_eq!((done.moved.get(), done.left.get(), done.skipped.total()), (PAGES, 0, 0), "{done:?}");
    assert_eq!(space.residency(buffer.range()).resident.get(), PAGES);
    check(&buffer, 4);
    assert_eq!(space.migrate_to(buffer.range(), 1).unwrap().moved.get(), PAGES);
    let done = space.evacuate(1, Some(0)).unwrap();
    assert_eq!((done.moved.get(), space.device_pages(0).unwrap().get()), (PAGES, PAGES), "{done:?}");
    check(&buffer, 4);
}

fn pages_by_number(setup: Setup) {
    let space = two(setup);
    let mut buffer = space.map::<u64>(64 * WORDS).unwrap();
    fill(&mut buffer, 5);
    settle(&space, buffer.range());
    assert_eq!(space.migrate_to(buffer.range(), 1).unwrap().moved.get(), 64);
    let done = space.evacuate_pages(1, 0..20, None).unwrap();
    assert_eq!((done.moved.get(), done.left.get()), (20, 44), "{done:?}");
    expect_in_place(&space, buffer.range(), 44);
    check(&buffer, 5);
}

fn migrate_holes(setup: Setup) {
    let space = two(setup);
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    for round in 0..3 {
        let done = space.migration(buffer.range()).to(1).run().unwrap();
        assert_eq!((done.moved.get(), done.holes.get()), (PAGES, PAGES), "{done:?}");
        expect_in_place(&space, buffer.range(), PAGES);
        let faults = common::faults(&space);
        assert!(buffer.iter().all(|word| *word == 0), "round {round}: what others left there");
        fill(&mut buffer, round);
        check(&buffer, round);
        assert_eq!(common::faults(&space), faults);
        assert_eq!(space.recall(buffer.range(), 1).unwrap().moved.get(), PAGES);
        check(&buffer, round);
        // Device pages with old contents are what the next buffer's holes get.
        buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    }
}

fn longterm_pins(setup: Setup) {
    let space = two(setup);
    let mut buffer = space.map::<u64>(4 * WORDS).unwrap();
    fill(&mut buffer, 6);
    settle(&space, buffer.range());
    assert_eq!(space.migrate_to(buffer.range(), 1).unwrap().moved.get(), 4);
    let (low, high) = (part(buffer.range(), 0, 2), part(buffer.range(), 2, 2));
    let short = space.pin_in_place(low, PinFor::Write).unwrap();
    assert_eq!(space.pins()[0].place.file(), file!());
    let long = space.pin(high, PinFor::Write).unwrap();
    expect_in_place(&space, buffer.range(), 2);
    assert_eq!((space.residency(low).mapped.get(), space.residency(high).resident.get()), (2, 2));
    assert_eq!(space.recall(low, 1).unwrap().skipped.get(Skip::Pinned), 2);
    assert_eq!(space.pin(low, PinFor::Read).unwrap_err(), PinError::Busy(low.start()));
    drop(short);
    let also = space.pin(low, PinFor::Read).unwrap();
    assert_eq!(space.residency(buffer.range()).resident.get(), 4);
    drop((also, long));
    check(&buffer, 6);
}

fn registered_buffers_stay_in_place(setup: Setup) {
    let space = two(setup);
    let mut buffer = space.map::<u64>(8 * WORDS).unwrap();
    fill(&mut buffer, 7);
    settle(&space, buffer.range());
    assert_eq!(space.migrate_to(buffer.range(), 1).unwrap().moved.get(), 8);
    let Ok(ring) = io_uring::IoUring::new(4) else {
        return common::skip("registered buffers", "no io_uring here");
    };
    let held = part(buffer.range(), 2, 3);
    let iovec = libc::iovec { iov_base: held.start().get() as *mut _, iov_len: held.bytes() };
    // SAFETY: the buffer outlives the registration, which ends below.
    unsafe { ring.submitter().register_buffers(&[iovec]) }.unwrap();
    let done = space.recall(buffer.range(), 1).unwrap();
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Busy)), (5, 3), "{done:?}");
    expect_in_place(&space, held, 3);
    assert_eq!(space.pin(held, PinFor::Write).unwrap_err(), PinError::Busy(held.start()));
    check(&buffer, 7);
    ring.submitter().unregister_buffers().unwrap();
    eventually(|| space.recall(buffer.range(), 1).unwrap().skipped.total() == 0);
    assert_eq!(space.device_pages(1).unwrap(), PageCount::ZERO);
    check(&buffer, 7);
}

fn a_device_that_fills_up(setup: Setup) {
    let space =
        setup.builder().device(memory(ByteSize::mib(1))).device(coherent(ByteSize::kib(40))).build().unwrap();
    let mut buffer = space.map::<u64>(32 * WORDS).unwrap();
    fill(&mut buffer, 8);
    settle(&space, buffer.range());
    let done = space.migrate_to(buffer.range(), 1).unwrap();
    assert_eq!((done.moved.get(), done.skipped.get(Skip::Full)), (10, 22), "{done:?}");
    check(&buffer, 8);
    expect_in_place(&space, buffer.range(), 10);
}

fn what_cannot_be_written_to(setup: Setup) {
    let space = two(setup);
    let mut buffer = space.map::<u64>(32 * WORDS).unwrap();
    fill(&mut buffer, 9);
    settle(&space, buffer.range());
    assert_eq!(space.migrate_to(part(buffer.range(), 0, 16), 1).unwrap().moved.get(), 16);
    let protect = |flags| {
        let start = buffer.range().start().get() as *mut _;
        // SAFETY: the buffer's own pages, which nobody writes to meanwhile.
        unsafe { mprotect(start, 32 * PAGE, flags) }.unwrap();
    };
    protect(MprotectFlags::READ);
    // To the device, from where a touch brings it home: a mapping that may not be written takes no frame.
    assert_eq!(space.migrate_to(part(buffer.range(), 16, 16), 1).unwrap().moved.get(), 16);
    expect_in_place(&space, part(buffer.range(), 0, 16), 16);
    check(&buffer, 9);
    let done = space.recall(buffer.range(), 1).unwrap();
    assert_eq!(done.skipped.total(), 0, "{done:?}");
    assert_eq!(space.device_pages(1).unwrap(), PageCount::ZERO);
    check(&buffer, 9);
    protect(MprotectFlags::READ | MprotectFlags::WRITE);
    fill(&mut buffer, 10);
    settle(&space, buffer.range());
    assert_eq!(space.migrate_to(buffer.range(), 1).unwrap().moved.get(), 32);
    expect_in_place(&space, buffer.range(), 32);
    check(&buffer, 10);
}

fn a_mirror_sees_whose_page_it_is(setup: Setup) {
    let space = two(setup);
    let mut buffer = space.map::<u64>(4 * WORDS).unwrap();
    fill(&mut buffer, 11);
    settle(&space, buffer.range());
    assert_eq!(space.migrate_to(part(buffer.range(), 1, 2), 1).unwrap().moved.get(), 2);
    let mirror = space.mirror(buffer.range(), Table).unwrap();
    let mut views = [PageView::default(); 4];
    mirror.snapshot(buffer.range(), &mut views).unwrap();
    let place = space.owner(1).unwrap();
    let is_ours =
        |view: &PageView| matches!(view, PageView::Coherent { owner, write: true, .. } if *owner == place);
    assert_eq!(views.each_ref().map(is_ours), [false, true, true, false], "{views:?}");
    assert_eq!(space.recall(buffer.range(), 1).unwrap().moved.get(), 2);
    mirror.snapshot(buffer.range(), &mut views).unwrap();
    assert!(views.iter().all(|view| matches!(view, PageView::Ram { write: true, .. })), "{views:?}");
}

/// The device's memory is in small pages; so are the pages that come home.
fn huge_pages_go_in_small_ones(setup: Setup) {
    let space = setup.builder().huge_pages(true).device(coherent(ByteSize::mib(4))).build().unwrap();
    let mut buffer = space.map_huge::<u64>(512 * WORDS).unwrap();
    fill(&mut buffer, 23);
    settle(&space, buffer.range());
    let done = space.migrate(buffer.range()).unwrap();
    assert_eq!((done.moved.get(), done.skipped.total()), (512, 0), "{done:?}");
    expect_in_place(&space, buffer.range(), 512);
    check(&buffer, 23);
    assert_eq!(space.recall(buffer.range(), 0).unwrap().moved.get(), 512);
    check(&buffer, 23);
}

fn memory_of_a_node(setup: Setup) {
    let device = match MemDevice::coherent(ByteSize::mib(1), Some(0)) {
        Ok(device) => device,
        Err(error) => return common::skip("memory of node 0", &error.to_string()),
    };
    let space = setup.with(Arc::new(device));
    let mut buffer = space.map::<u64>(64 * WORDS).unwrap();
    let done = space.migration(buffer.range()).run().unwrap();
    assert_eq!(done.holes.get(), 64);
    fill(&mut buffer, 24);
    expect_in_place(&space, buffer.range(), 64);
    check(&buffer, 24);
    let refused = MemDevice::coherent(ByteSize::mib(1), Some(999)).unwrap_err().to_string();
    assert!(refused.contains("node 999"), "{refused}");
}

fn memory_that_was_adopted(setup: Setup) {
    let space = two(setup);
    let mut held = Memory::new(32);
    fill(held.words_mut(0, 32), 12);
    let adoption = held.adopt(&space);
    assert_eq!(space.migrate_to(adoption.range(), 1).unwrap().moved.get(), 32);
    expect_in_place(&space, adoption.range(), 32);
    drop(adoption);
    assert_eq!(space.device_pages(1).unwrap(), PageCount::ZERO);
    drop(space);
    check(held.words(0, 32), 12);
}

fn a_device_is_in_one_space_at_a_time(setup: Setup) {
    let device = coherent(ByteSize::mib(1));
    let first = setup.with(device.clone());
    let mut buffer = first.map::<u64>(16 * WORDS).unwrap();
    fill(&mut buffer, 13);
    settle(&first, buffer.range());
    assert_eq!(first.migrate(buffer.range()).unwrap().moved.get(), 16);
    let second = setup.builder().device(device.clone()).build();
    assert!(matches!(second, Err(SpaceError::Build(BuildError::DeviceMemory { .. }))), "{second:?}");
    check(&buffer, 13);
    drop((buffer, first));
    let again = setup.with(device);
    let mut buffer = again.map::<u64>(16 * WORDS).unwrap();
    fill(&mut buffer, 14);
    settle(&again, buffer.range());
    assert_eq!(again.migrate(buffer.range()).unwrap().moved.get(), 16);
    expect_in_place(&again, buffer.range(), 16);
    check(&buffer, 14);
}

fn without_moves_it_is_refused(setup: Setup) {
    let built = setup.builder().device(coherent(ByteSize::mib(1))).build();
    match (setup.forced_fallback, built) {
        (true, Err(SpaceError::Build(error @ BuildError::Coherent(_)))) => {
            let text = error.to_string();
            assert!(text.contains("mem:1MiB?type=coherent") && text.contains("Linux 6.8"), "{text}");
        }
        (false, Ok(_)) => {}
        (forced, other) => panic!("{forced}: {other:?}"),
    }
}

fn writers_beside_migrations(setup: Setup) {
    let space = two(setup);
    let place = space.owner(1).unwrap();
    let mut buffer = space.map::<u64>(64 * WORDS).unwrap();
    fill(&mut buffer, 15);
    let range = buffer.range();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let (space, stop) = (&space, &stop);
        scope.spawn(move || {
            let mut random = Random::new(7);
            for _ in 0..60 {
                let some = part(range, random.below(48), 1 + random.below(16));
                let _ = match random.below(5) {
                    0 => space.migrate_to(range, 1),
                    1 => space.migration(some).to(1).run(),
                    2 => space.recall(some, 1),
                    3 => space.migration(some).coherent(place).run(),
                    _ => space.migration(range).private(space.owner(0).unwrap()).to(1).run(),
                }
                .unwrap();
            }
            stop.store(true, Ordering::Release);
        });
        let words: &mut [u64] = &mut buffer;
        let mut seed = 15;
        while !stop.load(Ordering::Acquire) {
            check(words, seed);
            seed += 1;
            fill(words, seed);
        }
        check(words, seed);
        fill(words, 99);
    });
    check(&buffer, 99);
    drop(buffer);
    assert_eq!([0, 1].map(|device| space.device_pages(device).unwrap().get()), [0, 0]);
}

/// In a process of its own: a fork concerns every space of the process.
fn forks(setup: Setup) {
    in_process(&name_of(setup, "forks"), None, || fork_with_pages_in_place(setup));
}

fn fork_with_pages_in_place(setup: Setup) {
    let space = two(setup);
    let mut buffer = space.map::<u64>(64 * WORDS).unwrap();
    fill(&mut buffer, 16);
    for round in 0..4 {
        settle(&space, buffer.range());
        assert_eq!(space.migrate_to(part(buffer.range(), 0, 16), 0).unwrap().moved.get(), 16);
        let done = space.migration(buffer.range()).to(1).run().unwrap();
        assert_eq!(done.moved.get(), 48, "round {round}: {done:?}");
        let child = fork(|| {
            let right = buffer.iter().enumerate().all(|(n, found)| *found == word(16, n));
            buffer.iter_mut().for_each(|word| *word = 1);
            right && buffer.iter().all(|word| *word == 1)
        });
        // Beside the child: its frames are nobody's device's.
        check(&buffer, 16);
        buffer[0] = word(16, 0);
        eventually(|| space.device_pages(1).unwrap().is_zero());
        let mut other = space.map::<u64>(64 * WORDS).unwrap();
        let done = space.migration(other.range()).to(1).run().unwrap();
        assert_eq!(done.holes.get(), 64);
        fill(&mut other, 17);
        expect_well(child);
        check(&buffer, 16);
        check(&other, 17);
        assert_eq!(space.recall(buffer.range(), 1).unwrap().skipped.total(), 0);
        let _ = space.prefetch(buffer.range()).unwrap();
        check(&buffer, 16);
    }
}

fn what_is_given_up(setup: Setup) {
    let space = two(setup);
    let mut buffer = space.map::<u64>(64 * WORDS).unwrap();
    fill(&mut buffer, 18);
    settle(&space, buffer.range());
    assert_eq!(space.migrate_to(buffer.range(), 1).unwrap().moved.get(), 64);
    let gone = part(buffer.range(), 8, 16);
    // SAFETY: the buffer's own pages; its words are plain numbers.
    unsafe { madvise(gone.start().get() as *mut _, gone.bytes(), Advice::LinuxDontNeed) }.unwrap();
    // The thread goes on when its event is read, a moment before the handler has done what it says.
    eventually(|| space.device_pages(1).unwrap().get() == 48);
    assert!(buffer[8 * WORDS..24 * WORDS].iter().all(|word| *word == 0));
    let mut other = space.map::<u64>(900 * WORDS).unwrap();
    fill(&mut other, 19);
    settle(&space, other.range());
    assert_eq!(space.migrate_to(other.range(), 1).unwrap().moved.get(), 900, "freed pages get fresh frames");
    check(&other, 19);
    check(&buffer[..8 * WORDS], 18);
    drop(other);
    assert_eq!(space.device_pages(1).unwrap().get(), 48);
    drop(buffer);
    assert_eq!(space.device_pages(1).unwrap().get(), 0);
}

fn mappings_that_move(setup: Setup) {
    let space = two(setup);
    let (mut held, target) = (Memory::new(32), Memory::new(32));
    fill(held.words_mut(0, 32), 20);
    let adoption = held.adopt(&space);
    assert_eq!(space.migrate_to(adoption.range(), 1).unwrap().moved.get(), 32);
    let over = |from: &Memory, to: &Memory| {
        let (from, to) = (from.start().cast(), to.start().cast());
        // SAFETY: one mapping of the test's own moves over the place of the other, whose words nobody has borrowed.
        let moved = unsafe { mremap_fixed(from, 32 * PAGE, 32 * PAGE, MremapFlags::MAYMOVE, to) };
        assert_eq!(moved, Ok(to));
    };
    over(&held, &target);
    check(target.words(0, 32), 20);
    assert_eq!(space.device_pages(1).unwrap().get(), 32, "the pages went along");
    over(&target, &held);
    expect_in_place(&space, adoption.range(), 32);
    check(held.words(0, 32), 20);
    drop(adoption);
    check(held.words(0, 32), 20);
    // There is nothing left of it.
    target.forget();
}

fn a_limit_does_not_count_them(setup: Setup) {
    let space = setup
        .builder()
        .device(memory(ByteSize::mib(16)))
        .device(coherent(ByteSize::mib(8)))
        .ram(ByteSize::mib(2))
        .build()
        .unwrap();
    let mut place = space.map::<u64>(1500 * WORDS).unwrap();
    let done = space.migration(place.range()).to(1).run().unwrap();
    assert_eq!(done.moved.get(), 1500);
    fill(&mut place, 21);
    let mut others = space.map::<u64>(1500 * WORDS).unwrap();
    for round in 0..3 {
        fill(&mut others, round);
        check(&others, round);
        thread::sleep(std::time::Duration::from_millis(150));
        assert_eq!(space.residency(place.range()).mapped.get(), 1500, "the evictor passes them over");
        let resident = space.residency(others.range()).resident.get();
        assert!(resident > 200, "round {round}: {resident} pages: the budget is the others'");
    }
    check(&place, 21);
}

fn evicted_pages_are_mapped_when_touched(setup: Setup) {
    let space = setup.with(coherent(ByteSize::mib(4)));
    let mut buffer = space.map::<u64>(64 * WORDS).unwrap();
    fill(&mut buffer, 22);
    settle(&space, buffer.range());
    assert_eq!(space.evict(PageCount::new(64)).unwrap().get(), 64);
    let found = space.residency(buffer.range());
    assert_eq!((found.device.get(), found.mapped.get()), (64, 0), "{found:?}");
    let home = space.count(Counter::MovedIn);
    check(&buffer, 22);
    expect_in_place(&space, buffer.range(), 64);
    assert_eq!(space.count(Counter::MovedIn), home, "mapped where they are");
}
