//! A program that changes its own mappings: giving contents up, unmapping, moving, protecting and forking,
//! with pages on the device and on the way. Only handler threads hear of such changes.

mod common;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::child::{expect_well, fork};
use common::{Memory, PAGE, Setup, WORDS, check, eventually, fill, in_process, name_of, part, settle, word};
use rustix::mm::{Advice, MprotectFlags, MremapFlags, mremap_fixed};
use uhmm::{ByteSize, Counter, PageCount, Skip, Space};

with_engine!(Threads, threads_move, threads_fallback:
    contents_given_up_read_as_zeros,
    contents_that_may_be_taken,
    contents_given_up_beside_eviction,
    contents_given_up_beside_eviction_inside_a_limit,
    part_of_an_adopted_range_is_unmapped,
    unmapping_beside_migration,
    contents_follow_a_moved_mapping,
    a_mapping_moves_beside_migration,
    read_only_pages_leave_and_come_back,
    a_child_has_its_own_copy,
    forks_beside_migration,
    two_migrations_of_pages_shared_with_a_child,
    a_child_outlives_its_parent,
);

const PAGES: usize = 64;

/// Adopted memory with a pattern.
fn adopted(space: &Space, seed: u64) -> (Memory, uhmm::space::Adoption) {
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), seed);
    let adopted = memory.adopt(space);
    (memory, adopted)
}

fn contents_given_up_read_as_zeros(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (mut memory, adopted) = adopted(&space, 1);
    // 0-31 on the device, the rest in RAM; 16-47 are given up.
    assert_eq!(space.migrate(part(memory.range(), 0, 32)).unwrap().moved, PageCount::new(32));
    memory.give_up(16, 32);
    eventually(|| space.device_pages(0) == Some(PageCount::new(16)));
    assert!(memory.words(16, 32).iter().all(|word| *word == 0));
    check(memory.words(0, 16), 1);
    common::check_from(memory.words(48, 16), 1, 48 * WORDS);
    fill(memory.words_mut(0, PAGES), 2);
    settle(&space, memory.range());
    let done = space.migrate(memory.range()).unwrap();
    assert_eq!(done.moved, PageCount::new(PAGES), "{:?}", done.skipped);
    check(memory.words(0, PAGES), 2);
    // All of it, while it is away, and again.
    let _ = space.migrate(memory.range()).unwrap();
    memory.give_up(0, PAGES);
    memory.give_up(0, PAGES);
    assert!(memory.words(0, PAGES).iter().all(|word| *word == 0));
    drop(adopted);
    assert!(memory.words(0, PAGES).iter().all(|word| *word == 0));
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
}

/// `MADV_FREE`: the kernel may keep what is there until it needs the page. `MADV_REMOVE` is not for private memory.
fn contents_that_may_be_taken(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (mut memory, adopted) = adopted(&space, 6);
    let advise = |first: usize, advice| {
        // SAFETY: the test's own memory, whose contents it gives up.
        unsafe { rustix::mm::madvise(memory.page(first).cast(), 32 * PAGE, advice) }
    };
    assert_eq!(space.migrate(part(memory.range(), 0, 32)).unwrap().moved, PageCount::new(32));
    assert!(advise(16, Advice::LinuxRemove).is_err());
    check(memory.words(0, PAGES), 6);
    settle(&space, memory.range());
    let _ = space.migrate(part(memory.range(), 0, 32)).unwrap();
    advise(16, Advice::LinuxFree).unwrap();
    // What was on the device is given up there; what was in RAM is as it was, or zeros.
    eventually(|| space.device_pages(0) == Some(PageCount::new(16)));
    assert!(memory.words(16, 16).iter().all(|word| *word == 0));
    for (n, found) in (32 * WORDS..).zip(memory.words(32, 16)) {
        assert!(*found == 0 || *found == word(6, n));
    }
    check(memory.words(0, 16), 6);
    common::check_from(memory.words(48, 16), 6, 48 * WORDS);
    // What is written afterwards stays, wherever it goes.
    fill(memory.words_mut(0, PAGES), 7);
    settle(&space, memory.range());
    space.discarded(memory.range());
    let _ = space.migrate(memory.range()).unwrap();
    check(memory.words(0, PAGES), 7);
    drop(adopted);
    check(memory.words(0, PAGES), 7);
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
}

/// Writes and gives up, again and again: what is read afterwards is zero or newer.
fn give_up_again_and_again(memory: &mut Memory, rounds: u64) {
    let mut random = common::Random::new(3);
    for round in 1..=rounds {
        let (first, pages) = (random.below(PAGES / 2), 1 + random.below(PAGES / 2));
        for page in 0..pages {
            memory.words_mut(first + page, 1)[5] = round;
        }
        memory.give_up(first, pages);
        for page in 0..pages {
            let found = memory.words(first + page, 1)[5];
            assert_eq!(found, 0, "page {page} in round {round}");
            memory.words_mut(first + page, 1)[6] = round;
        }
        for page in 0..pages {
            let found = memory.words(first + page, 1);
            assert_eq!((found[5], found[6]), (0, round), "page {page} in round {round}");
        }
    }
}

fn contents_given_up_beside_eviction(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (mut memory, adopted) = adopted(&space, 4);
    let (range, over) = (memory.range(), AtomicBool::new(false));
    thread::scope(|scope| {
        let mover = scope.spawn(|| {
            for round in 0.. {
                if over.load(Ordering::Acquire) {
                    break;
                }
                if round % 8 == 7 {
                    let _ = space.evict(PageCount::new(PAGES)).unwrap();
                } else {
                    let _ = space.migrate(range).unwrap();
                }
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            give_up_again_and_again(&mut memory, 300);
        }));
        over.store(true, Ordering::Release);
        mover.join().unwrap();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    drop(adopted);
}

fn contents_given_up_beside_eviction_inside_a_limit(setup: Setup) {
    let device = common::memory(ByteSize::mib(16));
    let space = setup.builder().device(device).ram(ByteSize::mib(1)).build().unwrap();
    let mut pressure = space.map::<u64>(512 * WORDS).unwrap();
    let (mut memory, adopted) = adopted(&space, 5);
    thread::scope(|scope| {
        scope.spawn(|| {
            for seed in 0..3 {
                fill(&mut pressure, seed);
                check(&pressure, seed);
            }
        });
        give_up_again_and_again(&mut memory, 100);
    });
    drop(adopted);
}

fn part_of_an_adopted_range_is_unmapped(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (memory, adopted) = adopted(&space, 6);
    assert_eq!(space.migrate(memory.range()).unwrap().moved, PageCount::new(PAGES));
    memory.unmap(16, 16);
    eventually(|| space.device_pages(0) == Some(PageCount::new(PAGES - 16)));
    check(memory.words(0, 16), 6);
    common::check_from(memory.words(32, 32), 6, 32 * WORDS);
    settle(&space, memory.range());
    for (first, pages) in [(0, 16), (32, 32)] {
        let done = space.migrate(part(memory.range(), first, pages)).unwrap();
        assert_eq!(done.moved, PageCount::new(pages), "{:?}", done.skipped);
    }
    assert_eq!(space.migrate(part(memory.range(), 16, 16)).unwrap().moved, PageCount::ZERO);
    drop(adopted);
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
    check(memory.words(0, 16), 6);
    common::check_from(memory.words(32, 32), 6, 32 * WORDS);
}

fn unmapping_beside_migration(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    for round in 0..40 {
        let (memory, adopted) = adopted(&space, round);
        let range = memory.range();
        thread::scope(|scope| {
            scope.spawn(|| {
                let _ = space.migrate(range).unwrap();
                let _ = space.prefetch(range).unwrap();
            });
            memory.unmap(PAGES / 2, PAGES / 2);
            check(memory.words(0, PAGES / 2), round);
        });
        drop(adopted);
        check(memory.words(0, PAGES / 2), round);
        assert_eq!(space.device_pages(0), Some(PageCount::ZERO), "round {round}");
    }
}

/// Moves the mapping to where `to` is, which is replaced. Where it was, anything may be mapped: such tests run
/// alone.
fn move_mapping(memory: Memory, to: &Memory) {
    let (len, flags) = (PAGES * PAGE, MremapFlags::MAYMOVE);
    // SAFETY: both mappings are the test's; the source is a hole afterwards and not touched again.
    let moved = unsafe { mremap_fixed(memory.start().cast(), len, len, flags, to.start().cast()) };
    assert_eq!(moved.unwrap().cast(), to.start());
    memory.forget();
}

fn contents_follow_a_moved_mapping(setup: Setup) {
    in_process(&name_of(setup, "contents_follow_a_moved_mapping"), None, || {
        let space = setup.space(ByteSize::mib(4));
        let (memory, adopted) = adopted(&space, 7);
        // The lower half is on the device, the upper in RAM.
        let half = PageCount::new(PAGES / 2);
        assert_eq!(space.migrate(part(memory.range(), 0, PAGES / 2)).unwrap().moved, half);
        let mut target = Memory::new(PAGES);
        move_mapping(memory, &target);
        check(target.words(0, PAGES), 7);
        fill(target.words_mut(0, PAGES), 8);
        check(target.words(0, PAGES), 8);
        drop(adopted);
        eventually(|| space.device_pages(0) == Some(PageCount::ZERO));
        check(target.words(0, PAGES), 8);
    });
}

fn a_mapping_moves_beside_migration(setup: Setup) {
    in_process(&name_of(setup, "a_mapping_moves_beside_migration"), None, || {
        let space = setup.space(ByteSize::mib(4));
        let rounds = 30;
        let (send, receive) = std::sync::mpsc::channel::<uhmm::VaRange>();
        thread::scope(|scope| {
            scope.spawn(|| {
                for range in receive {
                    for _ in 0..3 {
                        // Refused from when the adoption is over.
                        let _ = space.migrate(range);
                        let _ = space.prefetch(part(range, 0, PAGES / 2)).unwrap();
                    }
                }
            });
            // Made beforehand, so that no mapping of a round comes to lie where one of another was.
            let memories: Vec<_> = (0..rounds).map(|_| (Memory::new(PAGES), Memory::new(PAGES))).collect();
            let mut kept = Vec::new();
            for (round, (mut memory, target)) in (0..).zip(memories) {
                fill(memory.words_mut(0, PAGES), round);
                let adopted = memory.adopt(&space);
                send.send(memory.range()).unwrap();
                check(&memory.words(0, PAGES)[..8 * WORDS], round);
                move_mapping(memory, &target);
                check(target.words(0, PAGES), round);
                kept.push((target, adopted));
            }
            drop(send);
            for (round, (target, _)) in kept.iter().enumerate() {
                check(target.words(0, PAGES), round as u64);
            }
        });
        eventually(|| space.device_pages(0) == Some(PageCount::ZERO));
    });
}

fn read_only_pages_leave_and_come_back(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (mut memory, adopted) = adopted(&space, 9);
    memory.protect(8, 16, MprotectFlags::READ);
    let done = space.migrate(memory.range()).unwrap();
    assert_eq!(done.moved, PageCount::new(PAGES), "{:?}", done.skipped);
    check(memory.words(0, PAGES), 9);
    settle(&space, memory.range());
    // Made inaccessible and accessible again while they are away.
    assert_eq!(space.migrate(memory.range()).unwrap().moved, PageCount::new(PAGES));
    memory.protect(8, 16, MprotectFlags::empty());
    let _ = space.migrate(memory.range()).unwrap();
    memory.protect(8, 16, MprotectFlags::READ | MprotectFlags::WRITE);
    check(memory.words(0, PAGES), 9);
    fill(memory.words_mut(0, PAGES), 10);
    memory.protect(0, PAGES, MprotectFlags::READ);
    settle(&space, memory.range());
    assert_eq!(space.migrate(memory.range()).unwrap().moved, PageCount::new(PAGES));
    drop(adopted);
    check(memory.words(0, PAGES), 10);
}

/// Whether the words hold a pattern. For children, which must not panic.
fn holds(words: &[u64], seed: u64) -> bool {
    words.iter().enumerate().all(|(at, found)| *found == word(seed, at))
}

fn a_child_has_its_own_copy(setup: Setup) {
    in_process(&name_of(setup, "a_child_has_its_own_copy"), None, || {
        let space = setup.space(ByteSize::mib(4));
        let (mut memory, adopted) = adopted(&space, 11);
        let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
        fill(&mut buffer, 12);
        // Some on the device, some home with a copy there, some never away.
        assert_eq!(space.migrate(part(memory.range(), 0, 48)).unwrap().moved, PageCount::new(48));
        assert_eq!(space.migrate(buffer.range()).unwrap().moved, PageCount::new(PAGES));
        check(memory.words(0, 16), 11);
        check(&buffer[..16 * WORDS], 12);
        settle(&space, memory.range());
        let forks = Space::forks();
        let child = fork(|| {
            let right = holds(memory.words(0, PAGES), 11) && holds(&buffer, 12);
            fill(memory.words_mut(0, PAGES), 13);
            fill(&mut buffer, 14);
            right && holds(memory.words(0, PAGES), 13) && holds(&buffer, 14)
        });
        eventually(|| Space::forks() > forks);
        fill(&mut memory.words_mut(0, 8)[..4 * WORDS], 11);
        expect_well(child);
        check(memory.words(0, PAGES), 11);
        check(&buffer, 12);
        settle(&space, memory.range());
        // The pages are no longer shared with anybody, and can leave.
        fill(memory.words_mut(0, PAGES), 15);
        settle(&space, memory.range());
        let done = space.migrate(memory.range()).unwrap();
        assert_eq!(
            done.moved.get() as u64 + done.skipped.get(Skip::Busy),
            PAGES as u64,
            "{:?}",
            done.skipped
        );
        check(memory.words(0, PAGES), 15);
        drop(adopted);
        drop(buffer);
        assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
        assert_eq!(space.count(Counter::Poisoned), 0);
    });
}

fn forks_beside_migration(setup: Setup) {
    in_process(&name_of(setup, "forks_beside_migration"), None, || {
        let space = setup.space(ByteSize::mib(4));
        let (mut memory, adopted) = adopted(&space, 0);
        let (range, over) = (memory.range(), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Acquire) {
                    let _ = space.migrate(range).unwrap();
                }
            });
            for round in 0..20 {
                fill(memory.words_mut(0, PAGES), round);
                let child = fork(|| {
                    let right = holds(memory.words(0, PAGES), round);
                    fill(memory.words_mut(0, PAGES), 1000);
                    right && holds(memory.words(0, PAGES), 1000)
                });
                fill(memory.words_mut(0, PAGES), round + 100);
                let mut status = 0;
                // SAFETY: the status is this frame's.
                unsafe { libc::waitpid(child, &raw mut status, 0) };
                let right = holds(memory.words(0, PAGES), round + 100);
                if status != 0 || !right {
                    over.store(true, Ordering::Release);
                }
                assert_eq!((status, right), (0, true), "round {round}");
            }
            over.store(true, Ordering::Release);
        });
        drop(adopted);
    });
}

/// A page that is shared is unshared by whoever wants to move it, while another has it on its way out already.
fn two_migrations_of_pages_shared_with_a_child(setup: Setup) {
    in_process(&name_of(setup, "two_migrations_of_pages_shared_with_a_child"), None, || {
        let space = setup.space(ByteSize::mib(4));
        let (mut memory, adopted) = adopted(&space, 0);
        let range = memory.range();
        for round in 0..12 {
            fill(memory.words_mut(0, PAGES), round);
            let child = fork(|| {
                // SAFETY: sleeps.
                unsafe { libc::usleep(5000) };
                holds(memory.words(0, PAGES), round)
            });
            thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        for _ in 0..4 {
                            let _ = space.migrate(range).unwrap();
                        }
                    });
                }
                check(memory.words(0, PAGES), round);
            });
            check(memory.words(0, PAGES), round);
            expect_well(child);
        }
        drop(adopted);
        check(memory.words(0, PAGES), 11);
    });
}

fn a_child_outlives_its_parent(setup: Setup) {
    in_process(&name_of(setup, "a_child_outlives_its_parent"), None, || {
        let space = setup.space(ByteSize::mib(4));
        let (mut memory, adopted) = adopted(&space, 16);
        assert_eq!(space.migrate(memory.range()).unwrap().moved, PageCount::new(PAGES));
        let (verdict, told) = rustix::pipe::pipe().unwrap();
        // The parent of the child that is to live on is a child as well: its end is what is waited for here.
        let (parents, ends) = rustix::pipe::pipe().unwrap();
        let middle = fork(|| {
            // SAFETY: as in `fork`; this process has no other thread.
            match unsafe { libc::fork() } {
                0 => {
                    // SAFETY: the descriptors are this process's copies.
                    let parent_gone = unsafe {
                        libc::alarm(30);
                        libc::close(ends.as_raw_fd());
                        let mut byte = 0_u8;
                        libc::read(parents.as_raw_fd(), (&raw mut byte).cast(), 1) == 0
                    };
                    let right = holds(memory.words(0, PAGES), 16);
                    fill(memory.words_mut(0, PAGES), 17);
                    let answer = [u8::from(parent_gone && right && holds(memory.words(0, PAGES), 17))];
                    rustix::io::write(&told, &answer) == Ok(1)
                }
                // The first word is touched, and the process is gone before its child looks.
                child => child > 0 && memory.words(0, 1)[0] == word(16, 0),
            }
        });
        drop(ends);
        expect_well(middle);
        let mut answer = [9];
        assert_eq!(rustix::io::read(&verdict, &mut answer), Ok(1));
        assert_eq!(answer, [1]);
        check(memory.words(0, PAGES), 16);
        drop(adopted);
        let _ = writeln!(std::io::stderr(), "the grandchild was right");
    });
}
