//! Buffers for one job, on the running kernel: what is said to be valid is, and what changed is never said to be.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Memory, Setup, WORDS, check, eventually, expect_places, fill, memory, part, word};
use rustix::mm::MprotectFlags;
use uhmm::mirror::{MirrorError, PageView, RangeFaultError, Want};
use uhmm::userptr::{Changed, UserPages};
use uhmm::{ByteSize, Geometry, PageCount, VaRange};

scenarios!(
    pages_come_home_for_a_job,
    what_changed_meanwhile_is_not_valid,
    nobody_changes_what_is_valid,
    a_job_that_writes_needs_permission,
    valid_pages_are_there,
    more_than_may_be_resident_never_comes_to_rest,
);
with_engine!(Threads, threads_events_move, threads_events_fallback:
    a_buffer_that_was_unmapped,
);

const PAGES: usize = 32;
const RAM: PageView = PageView::Ram { write: true, order: Geometry::K4 };

fn pages_come_home_for_a_job(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 1);
    let range = buffer.range();
    assert_eq!(space.migrate(range).unwrap().moved, PageCount::new(PAGES));
    let mut job = space.userptr(range).unwrap();
    let looked = job.get_pages(Want::Nothing).unwrap();
    assert!(looked.pages().views().eq([PageView::Absent; PAGES]));
    assert!(looked.done().is_ok());
    expect_places(&space, range, 0, PAGES);
    let got = job.get_pages(Want::Write).unwrap();
    assert_eq!((got.pages().range(), got.pages().segments().len()), (range, 1), "all alike");
    assert!(got.pages().views().eq([RAM; PAGES]));
    assert!(!got.is_stale());
    drop(got.done().unwrap());
    expect_places(&space, range, PAGES, 0);
    drop(job);
    check(&buffer, 1);
    let elsewhere = Memory::new(1);
    assert!(matches!(space.userptr(elsewhere.range()), Err(MirrorError::Unmanaged(_))));
}

fn what_changed_meanwhile_is_not_valid(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 2);
    let range = buffer.range();
    let mut job = space.userptr(part(range, 0, 16)).unwrap();
    // One page of it is enough; others do not count.
    for (first, changes) in [(15, true), (16, false), (0, true)] {
        let got = job.get_pages(Want::Read).unwrap();
        assert_eq!(space.migrate(part(range, first, 1)).unwrap().moved, PageCount::ONE);
        assert_eq!(got.is_stale(), changes, "page {first}");
        assert_eq!(got.done().err(), changes.then_some(Changed), "page {first}");
    }
    // There and back again is a change as well.
    let got = job.get_pages(Want::Write).unwrap();
    assert_eq!(space.migrate(part(range, 3, 1)).unwrap().moved, PageCount::ONE);
    assert_eq!(buffer[3 * WORDS], word(2, 3 * WORDS));
    assert_eq!(got.done().err(), Some(Changed));
    assert!(job.get_pages(Want::Write).unwrap().done().is_ok());
    check(&buffer, 2);
}

fn nobody_changes_what_is_valid(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 3);
    let range = buffer.range();
    let mut job = space.userptr(range).unwrap();
    let gone = AtomicBool::new(false);
    let valid = job.get_pages(Want::Write).unwrap().done().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(space.migrate(range).unwrap().moved, PageCount::new(PAGES));
            gone.store(true, Ordering::Release);
        });
        thread::sleep(Duration::from_millis(50));
        assert!(!gone.load(Ordering::Acquire), "pages left while the job was handed on");
        drop(valid);
    });
    expect_places(&space, range, 0, PAGES);
    check(&buffer, 3);
}

fn a_job_that_writes_needs_permission(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 4);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    memory.protect(7, 1, MprotectFlags::READ);
    let mut job = space.userptr(range).unwrap();
    let forbidden = job.get_pages(Want::Write).err();
    assert_eq!(forbidden, Some(RangeFaultError::Permission(part(range, 7, 1).start())));
    assert!(job.get_pages(Want::Read).unwrap().done().is_ok());
    // Permission that is taken away through the space is a change.
    let got = job.get_pages(Want::Read).unwrap();
    space.protect(part(range, 8, 1), false).unwrap();
    assert_eq!(got.done().err(), Some(Changed));
    drop(job);
    memory.protect(0, PAGES, MprotectFlags::READ | MprotectFlags::WRITE);
    drop(adopted);
    check(memory.words(0, PAGES), 4);
}

/// Whether every page is mapped, as the kernel says without touching one.
fn all_there(range: VaRange) -> bool {
    let mut there = vec![0_u8; range.pages().get()];
    let start = std::ptr::with_exposed_provenance_mut(range.start().get());
    // SAFETY: the kernel writes a byte for each page of the range.
    assert_eq!(unsafe { libc::mincore(start, range.bytes(), there.as_mut_ptr()) }, 0);
    there.iter().all(|page| page & 1 == 1)
}

/// While pages come and go, whoever has a guard finds all of them.
fn valid_pages_are_there(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 5);
    let range = buffer.range();
    let mut job = space.userptr(range).unwrap();
    let over = AtomicBool::new(false);
    let (start, mut missing) = (Instant::now(), 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                let _ = space.migrate(range).unwrap();
                thread::yield_now();
            }
        });
        // As many as there are; the other thread may be faster for a while.
        for _ in 0..100 {
            let got = job.get_pages(Want::Write);
            if let Ok(Ok(valid)) = got.map(UserPages::done) {
                missing += usize::from(!all_there(range));
                drop(valid);
            }
            if start.elapsed() > Duration::from_secs(3) {
                break;
            }
        }
        over.store(true, Ordering::Release);
    });
    assert_eq!(missing, 0);
    let valid = job.get_pages(Want::Write).unwrap().done().unwrap();
    assert!(all_there(range));
    drop(valid);
    check(&buffer, 5);
}

fn more_than_may_be_resident_never_comes_to_rest(setup: Setup) {
    let pages = 1024;
    let space = setup.builder().device(memory(ByteSize::mib(16))).ram(ByteSize::mib(1)).build().unwrap();
    let mut buffer = space.map::<u64>(pages * WORDS).unwrap();
    fill(&mut buffer, 6);
    // From when on the limit is kept.
    eventually(|| space.residency(buffer.range()).resident.get() < pages / 2);
    let mut job = space.userptr(buffer.range()).unwrap();
    assert!(matches!(job.get_pages(Want::Write).err(), Some(RangeFaultError::TimedOut(_))));
    // A part that fits does.
    let mut small = space.userptr(part(buffer.range(), 100, 16)).unwrap();
    assert!(small.get_pages(Want::Write).is_ok());
    drop((job, small));
    check(&buffer, 6);
}

fn a_buffer_that_was_unmapped(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), 7);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let mut job = space.userptr(range).unwrap();
    let got = job.get_pages(Want::Write).unwrap();
    memory.unmap(8, 8);
    // It is heard of when the event is read.
    eventually(|| got.is_stale());
    assert_eq!(got.done().err(), Some(Changed));
    let gone = job.get_pages(Want::Read).err();
    assert_eq!(gone, Some(RangeFaultError::Fault(part(range, 8, 1).start())));
    drop(job);
    check(memory.words(0, 8), 7);
    drop(adopted);
}
