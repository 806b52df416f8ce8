//! A space with a limit: resident memory stays inside it, hot pages stay home, and pages that were only read
//! leave without being written again.

mod common;

use common::{PAGE, Setup, WORDS, check, eventually, fill, proc_kib, settle, turn};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uhmm::{Buffer, ByteSize, Counter, Engine, MemDevice, PageCount, Skip, Space};

scenarios!(
    resident_memory_stays_inside_the_limit,
    hot_pages_mostly_stay,
    locked_pages_are_left_alone_for_a_while,
    the_limit_holds_for_several_threads,
    a_full_device_does_not_stop_the_program,
);
with_engine!(Threads, threads_copies, threads_copies_fallback: pages_that_were_only_read_leave_unwritten);

const LIMIT: ByteSize = ByteSize::mib(8);
const PAGES: usize = 8192;
/// What may come on top of the limit: pages in flight, and what came between two looks.
const SLACK: usize = 1024;

/// A space with the limit, and a device whose memory does not count as the process's anonymous memory.
fn limited(setup: Setup, device: ByteSize) -> Space {
    let device = Arc::new(MemDevice::shared(device).unwrap());
    setup.builder().device(device).ram(LIMIT).build().unwrap()
}

#[track_caller]
fn check_limit(space: &Space, buffer: &Buffer<u64>) {
    let found = space.residency(buffer.range());
    let inside = LIMIT.pages().get() + SLACK;
    assert!(found.resident.get() <= inside, "{found:?}");
}

fn resident_memory_stays_inside_the_limit(setup: Setup) {
    let _turn = turn();
    let space = limited(setup, ByteSize::mib(64));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    let before = proc_kib("status", "RssAnon:").unwrap();
    let mut peak = 0;
    for chunk in 0..PAGES / 256 {
        let words = chunk * 256 * WORDS..(chunk + 1) * 256 * WORDS;
        for at in words {
            buffer[at] = common::word(1, at);
        }
        check_limit(&space, &buffer);
        peak = peak.max(proc_kib("status", "RssAnon:").unwrap());
    }
    check(&buffer, 1);
    peak = peak.max(proc_kib("status", "RssAnon:").unwrap());
    check_limit(&space, &buffer);
    let grown = peak.saturating_sub(before);
    assert!(grown < LIMIT.bytes() / 1024 + 6 * 1024, "anonymous memory grew by {grown} KiB");
    // Without a touch, what is resident does not grow.
    settle_staged(&space, &buffer);
    assert!(space.count(Counter::Written) >= (PAGES - LIMIT.pages().get() - SLACK) as u64);
    assert_eq!(space.count(Counter::Poisoned), 0);
}

/// Pages may be staged at rest, as a second chance; they count, too.
fn settle_staged(space: &Space, buffer: &Buffer<u64>) {
    let found = space.residency(buffer.range());
    let sum = found.resident.get() + found.staged.get();
    assert!(sum <= LIMIT.pages().get() + SLACK, "{found:?}");
}

fn hot_pages_mostly_stay(setup: Setup) {
    const HOT: usize = 256;
    let _turn = turn();
    let space = limited(setup, ByteSize::mib(64));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 2);
    let before = space.count(Counter::MovedIn);
    let (mut cold, mut hot) = (0_u64, 0_u64);
    for sweep in 0..2 {
        for page in HOT..PAGES {
            // In an order in which nothing can be read ahead.
            let page = HOT + (page * 1_237 + sweep * 7) % (PAGES - HOT);
            assert_eq!(buffer[page * WORDS], common::word(2, page * WORDS));
            cold += 1;
            if page.is_multiple_of(64) {
                for page in 0..HOT {
                    assert_eq!(buffer[page * WORDS + 1], common::word(2, page * WORDS + 1));
                    hot += 1;
                }
            }
        }
    }
    let home = space.count(Counter::MovedIn) - before;
    let missed = home.saturating_sub(cold);
    assert!(missed < hot / 4, "{home} pages came home, {cold} cold and {hot} hot touches");
}

/// What cannot be taken is not tried in every lap of the clock: an attempt copies it.
fn locked_pages_are_left_alone_for_a_while(setup: Setup) {
    const LOCKED: usize = 512;
    /// A quarter of how long they are left alone.
    const TICK: Duration = Duration::from_millis(50);
    let _turn = turn();
    let space = limited(setup, ByteSize::mib(64));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    // There before they are locked: nobody but the program can fault for the signal engine.
    fill(&mut buffer[..LOCKED * WORDS], 7);
    let locked = common::part(buffer.range(), 0, LOCKED);
    let start = std::ptr::with_exposed_provenance_mut(locked.start().get());
    // SAFETY: the buffer's own pages, whose contents do not change by this.
    if let Err(errno) = unsafe { rustix::mm::mlock(start, locked.bytes()) } {
        println!("skipped: {} bytes cannot be locked: {errno}", locked.bytes());
        return;
    }
    let before = space.skipped().get(Skip::Refused);
    let begin = Instant::now();
    fill(&mut buffer, 7);
    // Read again and again, so that all of it is expected back and is reached after several laps.
    for _ in 0..4 {
        check(&buffer, 7);
    }
    let (took, tried) = (begin.elapsed(), space.skipped().get(Skip::Refused) - before);
    let most = LOCKED as u64 * (took.as_millis() / TICK.as_millis() + 2) as u64;
    assert!(tried <= most, "{tried} attempts at {LOCKED} locked pages in {took:?}");
    assert_eq!(space.residency(locked).resident.get(), LOCKED);
    // SAFETY: as above.
    unsafe { rustix::mm::munlock(start, locked.bytes()) }.unwrap();
}

fn the_limit_holds_for_several_threads(setup: Setup) {
    let _turn = turn();
    let space = limited(setup, ByteSize::mib(128));
    let inside = |buffer: &Buffer<u64>| {
        // More threads than processors may keep the evictor from running for a while; it catches up.
        eventually(|| space.residency(buffer.range()).resident.get() <= LIMIT.pages().get() + SLACK);
    };
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let (space, inside) = (&space, &inside);
            scope.spawn(move || {
                let mut buffer = space.map::<u64>(PAGES / 2 * WORDS).unwrap();
                fill(&mut buffer, thread);
                inside(&buffer);
                check(&buffer, thread);
                inside(&buffer);
            });
        }
    });
    // The evictor may have pages in its hands whose buffer is gone; it gives them back when it has written.
    eventually(|| space.device_pages(0) == Some(PageCount::ZERO));
}

fn a_full_device_does_not_stop_the_program(setup: Setup) {
    let _turn = turn();
    // Nowhere to put most of it: the space grows beyond its limit and loses nothing.
    let space = limited(setup, ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES / 2 * WORDS).unwrap();
    fill(&mut buffer, 3);
    check(&buffer, 3);
    fill(&mut buffer, 4);
    check(&buffer, 4);
    drop(buffer);
    eventually(|| space.device_pages(0) == Some(PageCount::ZERO));
}

fn pages_that_were_only_read_leave_unwritten(setup: Setup) {
    assert_eq!(setup.engine, Engine::Threads);
    let _turn = turn();
    let space = limited(setup, ByteSize::mib(128));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 5);
    // From here on nothing is written; what is not on the device yet gets there in the first passes.
    check(&buffer, 5);
    check(&buffer, 5);
    settle_staged(&space, &buffer);
    let (written, dropped) = (space.count(Counter::Written), space.count(Counter::DroppedClean));
    for page in (0..PAGES).rev() {
        assert_eq!(buffer[page * WORDS], common::word(5, page * WORDS));
    }
    let written = space.count(Counter::Written) - written;
    let dropped = space.count(Counter::DroppedClean) - dropped;
    assert!(written <= PAGES as u64 / 100, "{written} pages were written again");
    assert!(dropped >= PAGES as u64 / 2, "{dropped} pages were dropped clean");
    // A store makes the copy worthless.
    buffer[0] = 1;
    buffer[PAGE / 8] = 2;
    let _ = space.migrate(common::part(buffer.range(), 0, 2)).unwrap();
    settle(&space, common::part(buffer.range(), 0, 2));
    assert_eq!((buffer[0], buffer[PAGE / 8]), (1, 2));
}
