use std::sync::atomic::{AtomicBool, Ordering};
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
        assert!(host.isolate(memory.range(), arena.addr(0)).is_complete());
        assert_eq!(arena.ends(PAGES - 1), (0xa5, 0xa5));
        assert_eq!(host.isolate(memory.part(0, 1), arena.addr(0)).stop, Stop::Present);
        assert!(host.install(arena.addr(0), memory.range()).is_complete());
    }
    assert!(!host.is_huge(memory.range()));
    assert_eq!(memory.ends(0), (0xa5, 0xa5));
    let mut out = [crate::scan::Region::UNUSED; 4];
    assert_eq!(host.scanner().present(arena.range(), &mut out).unwrap().regions, 0);
    assert_eq!(host.scanner().present(memory.range(), &mut out).unwrap().regions, 1);
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
        host.release(arena.range());
        let mut out = [crate::scan::Region::UNUSED; 4];
        assert_eq!(host.scanner().present(arena.range(), &mut out).unwrap().regions, 0);
    }
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
