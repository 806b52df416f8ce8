//! Exclusive pages on the running kernel: a device alone touches them, until a thread or the kernel does.

mod common;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::child::{expect_well, fork};
use common::{
    Memory, PAGE, Setup, WORDS, check, eventually, fill, in_process, memory, name_of, part, settle, turn,
    word,
};
use rustix::mm::MprotectFlags;
use uhmm::mirror::{Exclusive, Mirror, MirrorTable, PageView, Pages, RangeFaultError, Want};
use uhmm::notifier::Event;
use uhmm::{ByteSize, MemDevice, PageCount, PinFor, Skip, Space, VaRange, VirtAddr};

scenarios!(
    exclusive,
    exclusive_mprotect,
    exclusive_cow,
    no_update_is_lost,
    of_two_devices_one_has_a_page,
    another_mirror_brings_pages_home,
    pages_come_from_wherever_they_are,
    pinned_pages_are_not_lent,
    whole_chunks,
    the_end_of_a_buffer_is_told,
    a_device_that_asks_without_end_does_not_stop_the_end_of_an_adoption,
    a_limit_is_kept,
    children_beside_a_device,
);
with_engine!(Threads, threads_kernel, threads_kernel_fallback:
    the_kernel_takes_pages_back,
    what_the_program_gives_up_is_gone,
);

const PAGES: usize = 32;

/// The frames that a device has for itself, by page of the mirror.
struct Table {
    range: VaRange,
    frames: Vec<Option<VirtAddr>>,
    last: Option<Event>,
}

impl Table {
    fn of(range: VaRange) -> Self {
        Self { range, frames: vec![None; range.pages().get()], last: None }
    }

    fn install(&mut self, pages: Pages<'_>) {
        for (page, view) in pages.iter() {
            self.frames[page.since(self.range.first()).get()] = match view {
                PageView::Exclusive { at } => Some(at),
                _ => None,
            };
        }
    }

    /// A word of page `n`, for a device that has it for itself; good as long as the table's lock is held.
    fn word(&self, n: usize, at: usize) -> Option<&AtomicU64> {
        assert!(at < WORDS);
        let frame = std::ptr::with_exposed_provenance_mut::<u64>(self.frames[n]?.get());
        // SAFETY: a frame of the arena, a page long, which is the table's until it is told; whoever tells it waits for
        // the lock under which this borrows from it.
        Some(unsafe { AtomicU64::from_ptr(frame.add(at)) })
    }
}

impl MirrorTable for Table {
    fn invalidate(&mut self, range: VaRange, event: Event) {
        let first = range.first().since(self.range.first()).get();
        self.frames[first..first + range.pages().get()].fill(None);
        self.last = Some(event);
    }
}

fn mirror(space: &Space, range: VaRange) -> Mirror<'_, Table> {
    space.mirror(range, Table::of(range)).unwrap()
}

fn take(mirror: &Mirror<'_, Table>, range: VaRange) -> Result<Exclusive, RangeFaultError> {
    mirror.exclusive(range, Table::install)
}

#[track_caller]
fn take_all(mirror: &Mirror<'_, Table>, range: VaRange) {
    assert_eq!(take(mirror, range), Ok(Exclusive { pages: range.pages(), ..Exclusive::default() }));
}

fn held(mirror: &Mirror<'_, Table>) -> usize {
    mirror.look(|table| table.frames.iter().flatten().count())
}

/// The device adds one to every word of the pages that it has. Returns how many those are.
fn add_to_all(mirror: &Mirror<'_, Table>) -> usize {
    mirror.look(|table| {
        let pages = (0..table.frames.len()).filter(|n| table.frames[*n].is_some());
        let added =
            |n| (0..WORDS).for_each(|at| _ = table.word(n, at).unwrap().fetch_add(1, Ordering::Relaxed));
        pages.map(added).count()
    })
}

/// Whether each word says what the pattern does, and `more`.
fn holds(words: &[u64], seed: u64, more: u64) -> bool {
    words.iter().enumerate().all(|(at, found)| *found == word(seed, at) + more)
}

fn adopted(space: &Space, seed: u64) -> (Memory, uhmm::space::Adoption) {
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, PAGES), seed);
    let adopted = memory.adopt(space);
    (memory, adopted)
}

fn exclusive(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (mut memory, adopted) = adopted(&space, 1);
    let range = memory.range();
    let mirror = mirror(&space, range);
    take_all(&mirror, range);
    let found = space.residency(range);
    assert_eq!((found.exclusive, found.resident), (range.pages(), PageCount::ZERO));
    let right = |table: &Table| {
        let says = |n: usize| table.word(n / WORDS, n % WORDS).unwrap().load(Ordering::Relaxed);
        (0..PAGES * WORDS).all(|n| says(n) == word(1, n))
    };
    assert!(mirror.look(right), "the device reads what the program wrote");
    assert_eq!(add_to_all(&mirror), PAGES);
    // A load is enough to take a page back, and so is a store: of this page alone.
    assert_eq!(memory.words(3, 1)[5], word(1, 3 * WORDS + 5) + 1);
    memory.words_mut(7, 1)[0] += 1;
    assert_eq!((held(&mirror), mirror.look(|table| table.last)), (PAGES - 2, Some(Event::Exclusive)));
    memory.words_mut(7, 1)[0] -= 1;
    for words in memory.words_mut(0, PAGES) {
        *words += 1;
    }
    assert_eq!(held(&mirror), 0);
    assert!(holds(memory.words(0, PAGES), 1, 2));
    // And once more.
    take_all(&mirror, range);
    assert_eq!(add_to_all(&mirror), PAGES);
    assert!(holds(memory.words(0, PAGES), 1, 3));
    drop(mirror);
    drop(adopted);
}

fn exclusive_mprotect(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (memory, adopted) = adopted(&space, 2);
    let range = memory.range();
    let mirror = mirror(&space, range);
    take_all(&mirror, range);
    assert_eq!(add_to_all(&mirror), PAGES);
    space.protect(range, false).unwrap();
    assert_eq!(held(&mirror), 0);
    assert_eq!(take(&mirror, range), Err(RangeFaultError::Permission(range.start())));
    assert!(holds(memory.words(0, PAGES), 2, 1), "home, where nobody may write");
    space.protect(range, true).unwrap();
    take_all(&mirror, range);
    // Past the space, of which nobody hears: the next request does.
    memory.protect(4, 2, MprotectFlags::READ);
    assert_eq!(take(&mirror, range), Err(RangeFaultError::Permission(part(range, 4, 1).start())));
    memory.protect(4, 2, MprotectFlags::READ | MprotectFlags::WRITE);
    assert!(holds(memory.words(0, PAGES), 2, 1));
    drop(mirror);
    drop(adopted);
}

fn exclusive_cow(setup: Setup) {
    in_process(&name_of(setup, "exclusive_cow"), None, || {
        let space = setup.space(ByteSize::mib(4));
        // Memory of the space: what is adopted is looked after by the signal engine in the same way.
        let mut memory = space.map::<u64>(PAGES * WORDS).unwrap();
        fill(&mut memory, 3);
        let range = memory.range();
        let mirror = mirror(&space, range);
        take_all(&mirror, range);
        assert_eq!(add_to_all(&mirror), PAGES);
        let child = fork(|| {
            memory.iter_mut().for_each(|word| *word += 1);
            holds(&memory, 3, 2)
        });
        // Told when the event is read, which lets the parent go on a moment before.
        let start = Instant::now();
        while held(&mirror) > 0 {
            assert!(start.elapsed() < Duration::from_secs(5), "nobody told of the fork");
            thread::yield_now();
        }
        memory.iter_mut().for_each(|word| *word += 1);
        assert!(holds(&memory, 3, 2));
        expect_well(child);
        assert!(holds(&memory, 3, 2));
        take_all(&mirror, range);
        assert_eq!(add_to_all(&mirror), PAGES);
        assert!(holds(&memory, 3, 3));
    });
}

/// A thread of the program and a device count in the same words, by atomic operations.
fn no_update_is_lost(setup: Setup) {
    const COUNTED: usize = 4;
    const BURST: u64 = 500;
    const BURSTS: u64 = 1_000_000 / BURST;
    const VISITS: u64 = 21;
    let space = setup.space(ByteSize::mib(4));
    let memory = Memory::new(COUNTED);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    let mirror = mirror(&space, range);
    // SAFETY: words of the mapping, which are touched as atomics as long as these live.
    let words = (0..COUNTED).map(|n| unsafe { AtomicU64::from_ptr(memory.page(n).cast::<u64>().add(n)) });
    let words: Vec<&AtomicU64> = words.collect();
    let (over, visits) = (AtomicBool::new(false), AtomicU64::new(0));
    let (own, added) = thread::scope(|scope| {
        let device = scope.spawn(|| {
            let mut added = [0_u64; COUNTED];
            while !over.load(Ordering::Acquire) {
                match take(&mirror, range) {
                    Ok(_) | Err(RangeFaultError::TimedOut(_)) => {}
                    Err(error) => panic!("{error}"),
                }
                // As long as it has them, with the lock given up in between, as a device's queue would.
                for n in (0..COUNTED).cycle() {
                    let worked = mirror.look(|table| {
                        let word = table.word(n, n)?;
                        (0..50).for_each(|_| _ = word.fetch_add(1, Ordering::Relaxed));
                        Some(())
                    });
                    if worked.is_none() {
                        break;
                    }
                    added[n] += 50;
                    visits.fetch_add(1, Ordering::Relaxed);
                    if over.load(Ordering::Acquire) {
                        break;
                    }
                }
            }
            added
        });
        let (mut own, mut burst) = ([0_u64; COUNTED], 0);
        // Both get to do their part, whatever the scheduler does.
        while burst < BURSTS || (visits.load(Ordering::Relaxed) < VISITS && !device.is_finished()) {
            let n = burst as usize % COUNTED;
            (0..BURST).for_each(|_| _ = words[n].fetch_add(1, Ordering::Relaxed));
            own[n] += BURST;
            if burst % 16 == 0 {
                thread::yield_now();
            }
            burst += 1;
        }
        over.store(true, Ordering::Release);
        (own, device.join().unwrap())
    });
    for n in 0..COUNTED {
        assert_eq!(words[n].load(Ordering::Relaxed), own[n] + added[n], "word {n}");
    }
    drop(mirror);
    drop(adopted);
}

fn of_two_devices_one_has_a_page(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (memory, adopted) = adopted(&space, 4);
    let range = memory.range();
    let (one, other) = (mirror(&space, range), mirror(&space, range));
    take_all(&one, range);
    assert_eq!(add_to_all(&one), PAGES);
    take_all(&other, part(range, 8, 8));
    assert_eq!((held(&one), held(&other)), (PAGES - 8, 8));
    assert_eq!(add_to_all(&one) + add_to_all(&other), PAGES);
    assert!(holds(memory.words(0, PAGES), 4, 2));
    // Both at once.
    let rounds = |mirror: &Mirror<'_, Table>| {
        let mut added = 0;
        for _ in 0..100 {
            match take(mirror, part(range, 0, 1)) {
                Ok(_) | Err(RangeFaultError::TimedOut(_)) => {}
                Err(error) => panic!("{error}"),
            }
            added += mirror.look(|table| {
                let Some(word) = table.word(0, 0) else { return 0 };
                // Not one step: whoever else were inside would be seen.
                let seen = word.load(Ordering::Relaxed);
                thread::yield_now();
                word.store(seen + 1, Ordering::Relaxed);
                1
            });
        }
        added
    };
    let added = thread::scope(|scope| {
        let beside = scope.spawn(|| rounds(&other));
        rounds(&one) + beside.join().unwrap()
    });
    assert!(added > 0);
    assert_eq!(memory.words(0, 1)[0], word(4, 0) + 2 + added);
    drop((one, other));
    drop(adopted);
}

fn another_mirror_brings_pages_home(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (memory, adopted) = adopted(&space, 5);
    let range = memory.range();
    let (mirror, other) = (mirror(&space, range), mirror(&space, range));
    take_all(&mirror, range);
    assert_eq!(add_to_all(&mirror), PAGES);
    let mut views = [PageView::Error(uhmm::mirror::Unusable::Unmapped); PAGES];
    other.snapshot(range, &mut views).unwrap();
    assert_eq!((views, held(&mirror)), ([PageView::Absent; PAGES], PAGES), "a snapshot touches nothing");
    let mut valid = 0;
    other
        .populate(part(range, 0, 8), Want::Read, |_, pages| {
            valid += pages.views().filter(|view| view.is_valid()).count();
        })
        .unwrap();
    assert_eq!((valid, held(&mirror)), (8, PAGES - 8));
    assert!(holds(memory.words(0, PAGES), 5, 1));
    drop((mirror, other));
    drop(adopted);
}

fn pages_come_from_wherever_they_are(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut memory = Memory::new(PAGES);
    fill(memory.words_mut(0, 24), 6);
    let adopted = memory.adopt(&space);
    let range = memory.range();
    // 0-7 on the device, 8-15 home with a copy there, 16-23 never away, 24-27 the page of zeros, 28-31 holes.
    assert_eq!(space.migrate(part(range, 0, 16)).unwrap().moved, PageCount::new(16));
    common::check_from(memory.words(8, 8), 6, 8 * WORDS);
    assert!(memory.words(24, 4).iter().all(|word| *word == 0));
    settle(&space, range);
    let mirror = mirror(&space, range);
    take_all(&mirror, range);
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO), "copies would be out of date");
    // A migration has no use for them, and a device that is emptied neither.
    let done = space.migrate(range).unwrap();
    assert_eq!((done.moved, done.skipped.total()), (PageCount::ZERO, done.skipped.get(Skip::Exclusive)));
    take_all(&mirror, range);
    assert_eq!(add_to_all(&mirror), PAGES);
    assert!(holds(memory.words(0, 24), 6, 1));
    assert!(memory.words(24, 8).iter().all(|word| *word == 1));
    assert_eq!(space.migrate(range).unwrap().moved, PageCount::new(PAGES), "they leave as others do");
    assert!(holds(memory.words(0, 24), 6, 1));
    drop(mirror);
    drop(adopted);
}

fn pinned_pages_are_not_lent(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (memory, adopted) = adopted(&space, 7);
    let range = memory.range();
    let mirror = mirror(&space, range);
    take_all(&mirror, range);
    let pinned = space.pin(part(range, 2, 3), PinFor::Read).unwrap();
    assert_eq!(held(&mirror), PAGES - 3, "a pin is a touch");
    let done = take(&mirror, range).unwrap();
    assert_eq!((done.pages.get(), done.skipped.get(Skip::Pinned)), (PAGES - 3, 3));
    drop(pinned);
    take_all(&mirror, range);
    check(memory.words(0, PAGES), 7);
    drop(mirror);
    drop(adopted);
}

fn whole_chunks(setup: Setup) {
    const CHUNK: usize = 512;
    let space = setup.builder().huge_pages(true).device(memory(ByteSize::mib(8))).build().unwrap();
    let mut buffer = space.map_huge::<u64>(2 * CHUNK * WORDS).unwrap();
    fill(&mut buffer, 8);
    let range = buffer.range();
    let mirror = mirror(&space, range);
    take_all(&mirror, part(range, 100, CHUNK));
    take_all(&mirror, range);
    assert_eq!(add_to_all(&mirror), 2 * CHUNK);
    assert!(holds(&buffer, 8, 1));
    assert_eq!(held(&mirror), 0);
}

fn the_end_of_a_buffer_is_told(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    let range = buffer.range();
    let mirror = mirror(&space, range);
    take_all(&mirror, range);
    assert_eq!(add_to_all(&mirror), PAGES);
    drop(buffer);
    assert_eq!((held(&mirror), mirror.look(|table| table.last)), (0, Some(Event::Unmap)));
    assert_eq!(take(&mirror, range), Err(RangeFaultError::Fault(range.start())));
    assert_eq!(space.residency(range).exclusive, PageCount::ZERO);
}

fn a_device_that_asks_without_end_does_not_stop_the_end_of_an_adoption(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (memory, adopted) = adopted(&space, 9);
    let range = memory.range();
    let mirror = mirror(&space, range);
    let had = AtomicU64::new(0);
    thread::scope(|scope| {
        let device = scope.spawn(|| {
            loop {
                match take(&mirror, range) {
                    Ok(done) => _ = had.fetch_add(done.pages.get() as u64, Ordering::Release),
                    Err(RangeFaultError::TimedOut(_)) => {}
                    Err(error) => break error,
                }
            }
        });
        eventually(|| had.load(Ordering::Acquire) > 0);
        drop(adopted);
        let error = device.join().unwrap();
        assert!(matches!(error, RangeFaultError::Fault(_)), "{error}");
    });
    assert_eq!((held(&mirror), space.residency(range).exclusive), (0, PageCount::ZERO));
    check(memory.words(0, PAGES), 9);
}

fn a_limit_is_kept(setup: Setup) {
    const LIMIT: ByteSize = ByteSize::mib(8);
    const MANY: usize = 4096;
    let _turn = turn();
    let device = Arc::new(MemDevice::shared(ByteSize::mib(64)).unwrap());
    let space = setup.builder().device(device).ram(LIMIT).build().unwrap();
    let mut buffer = space.map::<u64>(MANY * WORDS).unwrap();
    fill(&mut buffer, 10);
    let mirror = mirror(&space, buffer.range()).timeout(Duration::from_secs(20));
    // Twice what may be resident: what is lent counts, and goes in its turn, so that there is always room.
    for n in (0..MANY).step_by(64) {
        let _ = take(&mirror, part(buffer.range(), n, 64)).unwrap();
        let found = space.residency(buffer.range());
        let resident = found.resident.get() + found.exclusive.get() + found.staged.get();
        assert!(resident <= LIMIT.pages().get() + 1024, "{found:?}");
    }
    assert!(held(&mirror) > 0, "what was asked for last is there");
    assert!(space.device_pages(0).unwrap().get() >= MANY - LIMIT.pages().get() - 1024);
    check(&buffer, 10);
}

/// System calls find pages that are lent as touches do.
fn the_kernel_takes_pages_back(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (memory, adopted) = adopted(&space, 11);
    let range = memory.range();
    let mirror = mirror(&space, range);
    take_all(&mirror, range);
    assert_eq!(add_to_all(&mirror), PAGES);
    let (reader, writer) = std::io::pipe().unwrap();
    let mut got = vec![0_u64; WORDS];
    // SAFETY: a page of the mapping, and a page of the vector.
    let moved = unsafe {
        let sent = libc::write(writer.as_raw_fd(), memory.page(1).cast(), PAGE);
        (sent, libc::read(reader.as_raw_fd(), got.as_mut_ptr().cast(), PAGE))
    };
    assert_eq!(moved, (PAGE as isize, PAGE as isize));
    assert!(got.iter().enumerate().all(|(at, found)| *found == word(11, WORDS + at) + 1));
    assert_eq!((held(&mirror), mirror.look(|table| table.frames[1])), (PAGES - 1, None));
    assert!(holds(memory.words(0, PAGES), 11, 1));
    drop(mirror);
    drop(adopted);
}

fn what_the_program_gives_up_is_gone(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let (memory, adopted) = adopted(&space, 12);
    let range = memory.range();
    let mirror = mirror(&space, range);
    take_all(&mirror, range);
    assert_eq!(add_to_all(&mirror), PAGES);
    memory.give_up(4, 4);
    eventually(|| held(&mirror) == PAGES - 4);
    assert!(memory.words(4, 4).iter().all(|word| *word == 0));
    take_all(&mirror, range);
    assert_eq!(add_to_all(&mirror), PAGES);
    assert!(memory.words(4, 4).iter().all(|word| *word == 1));
    assert!(holds(memory.words(0, 4), 12, 2));
    // Moved to another place, and back again.
    take_all(&mirror, range);
    let elsewhere = Memory::new(4);
    let move_to = |from: *mut u8, to: *mut u8| {
        // SAFETY: pages of the two mappings, to which no reference is held.
        let moved = unsafe {
            rustix::mm::mremap_fixed(
                from.cast(),
                4 * PAGE,
                4 * PAGE,
                rustix::mm::MremapFlags::MAYMOVE,
                to.cast(),
            )
        };
        assert!(moved.is_ok());
    };
    move_to(memory.page(12), elsewhere.start());
    assert!(
        elsewhere.words(0, 4).iter().enumerate().all(|(at, found)| *found == word(12, 12 * WORDS + at) + 2)
    );
    move_to(elsewhere.start(), memory.page(12));
    eventually(|| held(&mirror) == PAGES - 4);
    assert_eq!(
        take(&mirror, range),
        Err(RangeFaultError::Fault(part(range, 12, 1).start())),
        "watched no more"
    );
    drop(mirror);
    elsewhere.forget();
    drop(adopted);
    assert!(
        memory.words(12, 20).iter().enumerate().all(|(at, found)| *found == word(12, 12 * WORDS + at) + 2)
    );
}

/// Forks while a device works: each child has whole pages, each word as it was at one moment.
fn children_beside_a_device(setup: Setup) {
    in_process(&name_of(setup, "children_beside_a_device"), None, || {
        let space = setup.space(ByteSize::mib(4));
        let mut memory = space.map::<u64>(4 * WORDS).unwrap();
        memory.fill(0);
        let range = memory.range();
        let mirror = mirror(&space, range);
        let (over, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Acquire) {
                    match take(&mirror, range) {
                        Ok(_) | Err(RangeFaultError::TimedOut(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                    // All words of a page under one lock: a child finds them alike.
                    rounds.fetch_add(add_to_all(&mirror) as u64, Ordering::Release);
                }
            });
            for _ in 0..20 {
                let before = rounds.load(Ordering::Acquire);
                eventually(|| rounds.load(Ordering::Acquire) > before + 8);
                let child = fork(|| {
                    let alike = |page: &[u64]| page.iter().all(|word| *word == page[0]);
                    let right = memory.chunks(WORDS).all(alike);
                    memory.fill(7);
                    right && memory.iter().all(|word| *word == 7)
                });
                let mut status = 0;
                // SAFETY: the status is this frame's.
                unsafe { libc::waitpid(child, &raw mut status, 0) };
                if status != 0 {
                    over.store(true, Ordering::Release);
                }
                assert_eq!(status, 0);
            }
            over.store(true, Ordering::Release);
        });
        let sum: u64 = memory.chunks(WORDS).map(|page| page[0]).sum();
        assert_eq!(sum, rounds.load(Ordering::Acquire));
    });
}
