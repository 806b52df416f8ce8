use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::uffd::tests::{Memory, open, register};
use crate::uffd::{Event, EventBuffer, Mode, ReadOutcome};

const PAGES: usize = 4;

struct Rig {
    host: LinuxHost,
    memory: Memory,
    arena: Memory,
}

/// Four pages of the program with contents, and as many empty slots.
fn rig(options: HostOptions) -> Option<Rig> {
    let program = open(Features::MOVE.union(Features::WP).union(Features::EVENT_REMOVE))?;
    let (memory, arena) = (Memory::new(PAGES), Memory::new(PAGES));
    memory.fill(0, PAGES, 0xa5);
    register(&program, memory.range(), Mode::MISSING_AND_WP);
    register(&program, arena.range(), Mode::MISSING);
    let chute = Some(Chute::new().unwrap());
    Some(Rig { host: LinuxHost::new(program, chute, options).unwrap(), memory, arena })
}

#[test]
fn frames_go_out_and_come_home() {
    let Some(Rig { host, memory, arena }) = rig(HostOptions::default()) else { return };
    // SAFETY: memory and slots are the test's own; nothing else touches them.
    unsafe {
        let present = Progress::stopped(PageCount::ZERO, Stop::Present);
        assert!(host.isolate(memory.part(0, 3), arena.addr(0)).is_complete());
        assert_eq!(arena.ends(2), (0xa5, 0xa5));
        assert_eq!(host.isolate(memory.part(3, 1), arena.addr(0)), present);
        assert_eq!(host.install(arena.addr(0), memory.part(3, 1)), present);
        assert!(host.install(arena.addr(0), memory.part(0, 3)).is_complete());
    }
    assert!(!host.is_huge(memory.range()));
    assert_eq!(memory.ends(0), (0xa5, 0xa5));
    let mut out = [crate::scan::Region::UNUSED; 4];
    assert_eq!(host.scanner().present(arena.range(), &mut out).unwrap().regions, 0);
    assert_eq!(host.scanner().present(memory.range(), &mut out).unwrap().regions, 1);
}

#[test]
fn what_the_kernel_moved_and_did_not_count_is_counted() {
    let Some(Rig { host, memory, arena }) = rig(HostOptions::default()) else { return };
    let present = |done| Progress::stopped(PageCount::new(done), Stop::Present);
    let recount = |told| host.recount(told, memory.range().start(), arena.addr(0), PageCount::new(PAGES));
    assert_eq!(recount(present(0)), present(0), "the pages are where they were");
    // SAFETY: memory and slots are the test's own.
    unsafe { assert!(host.isolate(memory.part(0, 2), arena.addr(0)).is_complete()) };
    let more = Progress::stopped(PageCount::new(2), Stop::Pending);
    assert_eq!((recount(present(0)), recount(more)), (more, more));
    // SAFETY: as above.
    unsafe { assert!(host.isolate(memory.part(2, 2), arena.addr(2)).is_complete()) };
    assert_eq!(recount(present(0)), Progress::complete(PageCount::new(PAGES)));
    assert_eq!(recount(more), Progress::complete(PageCount::new(PAGES)));
    let hole = Progress::stopped(PageCount::ZERO, Stop::Hole);
    assert_eq!(recount(hole), hole, "what the kernel says of a hole is so");
}

/// Lets every round begin, with the page there, when the test ends early.
struct Release<'a>(&'a AtomicU64, &'a LinuxHost, VaRange);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        let _ = self.1.install_zero(self.2);
        self.0.store(u64::MAX, Ordering::Release);
    }
}

/// A page that is written for the first time while it moves makes the kernel begin again, and miscount.
#[test]
fn a_first_store_beside_a_move_is_never_lost() {
    let Some(Rig { host, memory, arena }) = rig(HostOptions::default()) else { return };
    let (page, slot) = (memory.part(0, 1), arena.addr(0));
    // SAFETY: memory and slots are the test's own.
    unsafe { assert!(host.isolate(page, slot).is_complete()) };
    let (begun, stored) = (AtomicU64::new(0), AtomicU64::new(0));
    let rounds = 5000;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=rounds {
                for spins in 0.. {
                    if begun.load(Ordering::Acquire) >= round {
                        break;
                    }
                    if spins % 256 == 255 { std::thread::yield_now() } else { std::hint::spin_loop() }
                }
                // Now early, now late beside the move.
                (0..round % 48).for_each(|_| std::hint::spin_loop());
                // SAFETY: the test's own page; the other thread reads it when the store is known to be done.
                unsafe { memory.at(0).cast::<u64>().write_volatile(round) };
                stored.store(round, Ordering::Release);
            }
        });
        let _all = Release(&begun, &host, page);
        for round in 1..=rounds {
            // SAFETY: as above; nobody needs what lies in the slot.
            unsafe { host.release(&[arena.part(0, 1)]) };
            assert!(host.install_zero(page).is_complete());
            begun.store(round, Ordering::Release);
            // SAFETY: as above.
            let out = unsafe { host.isolate(page, slot) };
            if out.is_complete() {
                // SAFETY: as above.
                assert!(unsafe { host.install(slot, page) }.is_complete());
            }
            while stored.load(Ordering::Acquire) < round {
                std::thread::yield_now();
            }
            assert_eq!(
                host.is_occupied(page.first()),
                Some(true),
                "round {round}: {out:?}, and the page is gone"
            );
            // SAFETY: the page is there, and the other thread waits for the next round.
            assert_eq!(unsafe { memory.at(0).cast::<u64>().read_volatile() }, round, "{out:?}");
            // SAFETY: as above.
            unsafe { assert!(host.isolate(page, slot).is_complete()) };
        }
    });
}

#[test]
fn the_copying_way_round_trips() {
    let options = HostOptions { forced_fallback: true, forced_pagemap: true };
    let Some(Rig { host, memory, arena }) = rig(options) else { return };
    assert!(!host.can_move());
    let stop = AtomicBool::new(false);
    // SAFETY: memory and slots are the test's own; the other thread only reads events.
    unsafe {
        assert_eq!(host.isolate(memory.range(), arena.addr(0)), refused());
        assert_eq!(host.install(arena.addr(0), memory.range()), refused());
        assert!(host.write_protect(memory.range(), true).is_complete());
        assert!(host.copy_out(memory.range(), arena.addr(0)).is_complete());
        std::thread::scope(|scope| {
            let events = scope.spawn(|| {
                let mut buffer = EventBuffer::new();
                let mut removed = 0;
                while !stop.load(Ordering::Relaxed) {
                    if let ReadOutcome::Events(_) = host.program().read(&mut buffer) {
                        removed += buffer.by_ref().filter(|e| matches!(e, Event::Remove(_))).count();
                    }
                }
                removed
            });
            assert!(host.discard(memory.range()).is_complete());
            stop.store(true, Ordering::Relaxed);
            assert_eq!(events.join().unwrap(), 1);
        });
        let source = NonNull::new(arena.at(0)).unwrap();
        assert!(host.install_copy(source, memory.part(0, 2), Install::Tracked).is_complete());
        assert!(host.install_zero(memory.part(2, 2)).is_complete());
        assert_eq!((memory.ends(1), memory.ends(3)), ((0xa5, 0xa5), (0, 0)));
        host.release(&[arena.range()]);
        let mut out = [crate::scan::Region::UNUSED; 4];
        assert_eq!(host.scanner().present(arena.range(), &mut out).unwrap().regions, 0);
    }
}

#[test]
fn a_change_is_under_way_until_its_event_is_read() {
    let Some(Rig { host, memory, .. }) = rig(HostOptions::default()) else { return };
    assert!(!host.is_changing());
    std::thread::scope(|scope| {
        // SAFETY: the test's own memory, of which nobody needs the contents.
        let giving_up = scope.spawn(|| unsafe { dont_need(memory.part(0, 2)) });
        while !host.is_changing() {
            std::thread::yield_now();
        }
        let mut buffer = EventBuffer::new();
        while !matches!(host.program().read(&mut buffer), ReadOutcome::Events(_)) {}
        assert!(buffer.by_ref().any(|event| matches!(event, Event::Remove(_))));
        giving_up.join().unwrap().unwrap();
    });
    assert!(!host.is_changing());
}

#[test]
fn pages_are_told_apart_by_what_a_store_meets() {
    let Some(Rig { host, memory, arena }) = rig(HostOptions::default()) else { return };
    // SAFETY: memory and slots are the test's own.
    assert!(unsafe { host.isolate(memory.part(1, 2), arena.addr(0)) }.is_complete());
    assert!(host.install_zero(memory.part(1, 1)).is_complete());
    assert!(host.write_protect(memory.part(3, 1), true).is_complete());
    let protected = Unusual { present: true, ..Unusual::absent(memory.part(3, 1)) };
    let zeros = Unusual { zero: true, range: memory.part(1, 1), ..protected };
    let mut found = [protected; 8];
    for sort in [Sort::Managed, Sort::Anonymous, Sort::File] {
        if host.scanner().is_fallback() {
            break;
        }
        let (count, end) = host.unusual(memory.range(), sort, &mut found);
        assert_eq!(end, memory.range().end_page());
        // The first one is as pages are as a rule.
        assert_eq!(found[..count], [zeros, Unusual::absent(memory.part(2, 1)), protected], "{sort:?}");
        // With little room it is looked on from where it ended.
        let (mut rest, mut one_by_one) = (Some(memory.range()), 0);
        while let Some(range) = rest {
            let (count, end) = host.unusual(range, sort, &mut found[..2]);
            one_by_one += count;
            rest = range.skip(end.since(range.first()));
        }
        assert_eq!(one_by_one, 3, "{sort:?}");
    }
    assert!(host.write_protect(memory.part(3, 1), false).is_complete());
    assert!(host.touch(memory.part(1, 1), true).is_complete());
    let (count, _) = host.unusual(memory.range(), Sort::Managed, &mut found);
    assert_eq!(found[..count], [Unusual::absent(memory.part(2, 1))]);
    let mut rights =
        [Rights { range: memory.range(), read: false, write: false, shared: false, file: false }; 2];
    assert_eq!(host.mappings(memory.part(1, 2), &mut rights), (1, memory.part(1, 2).end_page()));
    assert_eq!(
        rights[0],
        Rights { range: memory.part(1, 2), read: true, write: true, shared: false, file: false }
    );
}

#[test]
fn parked_threads_are_woken_or_wake_by_themselves() {
    let Some(Rig { host, .. }) = rig(HostOptions::default()) else { return };
    let start = Instant::now();
    let word = AtomicU32::new(1);
    host.park(&word, 1);
    host.park(&word, 2);
    assert!(start.elapsed() < Duration::from_secs(5), "a nap is short, and another value is none");
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            while word.load(Ordering::SeqCst) == 1 {
                host.park(&word, 1);
            }
        });
        std::thread::sleep(Duration::from_millis(5));
        word.store(2, Ordering::SeqCst);
        host.unpark(&word);
        sleeper.join().unwrap();
    });
}

#[test]
fn poison_takes_the_place_of_a_page() {
    let Some(Rig { host, memory, arena }) = rig(HostOptions::default()) else { return };
    // SAFETY: memory and slots are the test's own.
    assert!(unsafe { host.isolate(memory.range(), arena.addr(0)) }.is_complete());
    if host.program().features().contains(Features::POISON) {
        assert!(host.poison(memory.range()).is_complete());
        // The kernel asks whether a range is watched, not by whom: the arena's slots are in use, that is all.
        assert_eq!(host.poison(arena.range()).stop, Stop::Present);
        let other = Memory::new(1);
        assert_eq!(host.poison(other.range()).stop, Stop::Unmapped);
    }
}
