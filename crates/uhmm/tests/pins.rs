//! Pinned memory on the running kernel.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{PAGE, Setup, WORDS, check, fill, part, settle, word};
use io_uring::{IoUring, opcode, types};
use rustix::mm::{MprotectFlags, mprotect};
use uhmm::{ByteSize, Engine, PageCount, PinError, PinFor, Skip};

scenarios!(
    pinned_pages_come_home_and_stay,
    fresh_memory_is_there_once_it_is_pinned,
    memory_that_cannot_be_written_to_is_not_pinned_for_that,
    what_is_not_managed_is_not_pinned,
    registered_buffers_beside_migration,
    pins_beside_migration_and_eviction,
    a_chunk_is_pinned_again_and_let_go,
    pins_of_a_chunk_beside_migration,
    a_space_with_a_limit_makes_room_for_what_is_pinned,
);

const PAGES: usize = 64;

fn pinned_pages_come_home_and_stay(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 3);
    settle(&space, buffer.range());
    assert_eq!(space.migrate(buffer.range()).unwrap().moved.get(), PAGES);
    let half = part(buffer.range(), 0, PAGES / 2);
    let pinned = space.pin(half, PinFor::Write).unwrap();
    assert_eq!((pinned.range(), space.residency(half).resident.get()), (half, PAGES / 2));
    assert_eq!(space.pins()[0].place.file(), file!());
    let done = space.migrate(buffer.range()).unwrap();
    assert_eq!(done.skipped.get(Skip::Pinned), PAGES as u64 / 2);
    assert_eq!(space.residency(half).resident.get(), PAGES / 2);
    drop(pinned);
    assert!(space.pins().is_empty());
    check(&buffer, 3);
    settle(&space, half);
    assert_eq!(space.migrate(half).unwrap().skipped.get(Skip::Pinned), 0);
    check(&buffer, 3);
}

fn fresh_memory_is_there_once_it_is_pinned(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    assert_eq!(space.residency(buffer.range()).resident, PageCount::ZERO);
    let pinned = space.pin(buffer.range(), PinFor::Write).unwrap();
    assert_eq!(space.residency(buffer.range()).resident.get(), PAGES);
    drop(pinned);
    assert!(buffer.iter().all(|word| *word == 0));
}

fn memory_that_cannot_be_written_to_is_not_pinned_for_that(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 5);
    let protect = |flags| {
        // SAFETY: the buffer's own pages, which are not written to while they cannot be.
        unsafe { mprotect(buffer.as_ptr().cast_mut().cast(), PAGES * PAGE, flags) }.unwrap();
    };
    protect(MprotectFlags::READ);
    assert_eq!(space.pin(buffer.range(), PinFor::Write).unwrap_err(), PinError::ReadOnly(buffer.range()));
    assert!(space.pins().is_empty());
    drop(space.pin(buffer.range(), PinFor::Read).unwrap());
    protect(MprotectFlags::READ | MprotectFlags::WRITE);
    check(&buffer, 5);
}

fn what_is_not_managed_is_not_pinned(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let buffer = space.map::<u64>(WORDS).unwrap();
    let range = buffer.range();
    drop(buffer);
    assert_eq!(space.pin(range, PinFor::Read).unwrap_err(), PinError::Unmanaged(range.start()));
}

/// Input by io_uring into registered buffers, which the kernel pins for as long as they are registered, while
/// everything else of the space moves out again and again.
fn registered_buffers_beside_migration(setup: Setup) {
    const ROUNDS: u64 = 40;
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    let mut other = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 1);
    fill(&mut other, 2);
    settle(&space, buffer.range());
    assert!(!space.migrate(buffer.range()).unwrap().moved.is_zero());
    let file = tempfile(|at| word(7, at));
    let pinned = space.pin(buffer.range(), PinFor::Write).unwrap();
    let mut ring = IoUring::new(4).unwrap();
    let base = buffer.as_mut_ptr().cast::<u8>();
    let vector = libc::iovec { iov_base: base.cast(), iov_len: PAGES * PAGE };
    // SAFETY: the buffer outlives the ring, and its pages stay until `pinned` is dropped.
    unsafe { ring.submitter().register_buffers(&[vector]) }.unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let pinned = space.migrate(buffer.range()).unwrap();
                assert_eq!((pinned.moved.get(), pinned.skipped.get(Skip::Pinned)), (0, PAGES as u64));
                let _ = space.migrate(other.range()).unwrap();
            }
        });
        let _stop = Stop(&stop);
        for round in 0..ROUNDS {
            let fd = types::Fd(std::os::fd::AsRawFd::as_raw_fd(&file));
            let read = opcode::ReadFixed::new(fd, base, (PAGES * PAGE) as u32, 0).build().user_data(round);
            // SAFETY: as above; nobody else touches the buffer until the read is done.
            unsafe { ring.submission().push(&read) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            let done = ring.completion().next().unwrap();
            assert_eq!((done.user_data(), done.result()), (round, (PAGES * PAGE) as i32));
            for at in 0..PAGES * WORDS {
                // SAFETY: inside the buffer; through the pointer that the ring has as well.
                let place = unsafe { base.cast::<u64>().add(at) };
                // SAFETY: as above.
                unsafe {
                    assert_eq!(place.read(), word(7, at), "word {at} in round {round}");
                    place.write(0);
                }
            }
        }
    });
    ring.submitter().unregister_buffers().unwrap();
    drop((ring, pinned));
    check(&other, 2);
    assert!(buffer.iter().all(|word| *word == 0));
}

fn pins_beside_migration_and_eviction(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 6);
    settle(&space, buffer.range());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = space.migrate(buffer.range()).unwrap();
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = space.evict(PageCount::new(16)).unwrap();
            }
        });
        let _stop = Stop(&stop);
        for round in 0..200 {
            let first = round * 7 % (PAGES - 24);
            let (low, high) = (part(buffer.range(), first, 16), part(buffer.range(), first + 8, 16));
            let low_pin = space.pin(low, PinFor::Read).unwrap();
            let high_pin = space.pin(high, PinFor::Write).unwrap();
            drop(low_pin);
            for _ in 0..20 {
                assert_eq!(space.residency(high).resident, high.pages(), "round {round}");
            }
            drop(high_pin);
        }
    });
    assert!(space.pins().is_empty());
    check(&buffer, 6);
}

fn a_chunk_is_pinned_again_and_let_go(setup: Setup) {
    const CHUNK: usize = 512;
    let space = setup.space(ByteSize::mib(16));
    let mut buffer = space.map::<u64>(2 * CHUNK * WORDS).unwrap();
    fill(&mut buffer, 11);
    let chunk = part(buffer.range(), CHUNK, CHUNK);
    for round in 0..3 {
        for _ in 0..3 {
            let pinned = space.pin(chunk, PinFor::Write).unwrap();
            assert_eq!((pinned.range(), space.pins().len()), (chunk, 1));
            assert_eq!(space.residency(chunk).resident.get(), CHUNK, "round {round}");
            let done = space.migrate(buffer.range()).unwrap();
            assert_eq!(done.skipped.get(Skip::Pinned), CHUNK as u64, "round {round}");
            drop(pinned);
        }
        settle(&space, buffer.range());
        // Nobody holds them any more, and they go.
        let done = space.migrate(chunk).unwrap();
        assert_eq!((done.moved.get(), done.skipped.get(Skip::Pinned)), (CHUNK, 0), "round {round}");
    }
    // What was given up is there again, as zeros, before it is pinned again.
    let pinned = space.pin(chunk, PinFor::Write).unwrap();
    drop(pinned);
    check(&buffer, 11);
    if setup.engine == Engine::Threads {
        let start = std::ptr::with_exposed_provenance_mut(part(chunk, 7, 2).start().get());
        // SAFETY: pages of the buffer, whose contents are given up: they read as zeros.
        unsafe { rustix::mm::madvise(start, 2 * PAGE, rustix::mm::Advice::LinuxDontNeed) }.unwrap();
        let pinned = space.pin(chunk, PinFor::Write).unwrap();
        assert_eq!(space.residency(chunk).resident.get(), CHUNK);
        drop(pinned);
        assert_eq!(buffer[(CHUNK + 7) * WORDS], 0);
    }
}

fn pins_of_a_chunk_beside_migration(setup: Setup) {
    const CHUNK: usize = 512;
    let space = setup.space(ByteSize::mib(16));
    let mut buffer = space.map::<u64>(CHUNK * WORDS).unwrap();
    fill(&mut buffer, 12);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = space.migrate(buffer.range()).unwrap();
            }
        });
        let _stop = Stop(&stop);
        for round in 0..100 {
            let pinned = space.pin(buffer.range(), PinFor::Write).unwrap();
            let second = space.pin(buffer.range(), PinFor::Write).unwrap();
            drop(pinned);
            for _ in 0..5 {
                assert_eq!(space.residency(buffer.range()).resident.get(), CHUNK, "round {round}");
            }
            drop(second);
        }
    });
    assert!(space.pins().is_empty());
    check(&buffer, 12);
}

fn a_space_with_a_limit_makes_room_for_what_is_pinned(setup: Setup) {
    let space =
        setup.builder().device(common::memory(ByteSize::mib(64))).ram(ByteSize::mib(16)).build().unwrap();
    let mut buffer = space.map::<u64>((32 << 20) / 8).unwrap();
    fill(&mut buffer, 9);
    let first = part(buffer.range(), 0, (4 << 20) / PAGE);
    let pinned = space.pin(first, PinFor::Read).unwrap();
    check(&buffer, 9);
    assert_eq!(space.residency(first).resident, first.pages(), "the rest made way");
    drop(pinned);
}

/// Tells the other thread to stop, whatever happens here.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn tempfile(word: impl Fn(usize) -> u64) -> std::fs::File {
    use std::io::Write;
    let flags = rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR;
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let mut file = std::fs::File::from(rustix::fs::open("/var/tmp", flags, mode).unwrap());
    let bytes: Vec<u8> = (0..PAGES * WORDS).flat_map(|at| word(at).to_ne_bytes()).collect();
    file.write_all(&bytes).unwrap();
    file
}
