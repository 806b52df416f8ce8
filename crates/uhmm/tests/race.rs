//! Threads that touch pages while other threads move them: no update is lost, no page is fetched twice, and
//! random operations agree with a plain model.

mod common;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    PAGE, Random, Setup, WORDS, check, check_from, eventually, expect_places, file, fill, memory, part,
    settle,
};
use uhmm::{Buffer, ByteSize, Counter, Engine, PageCount, Space};

scenarios!(
    no_update_is_lost_to_migration,
    no_update_is_lost_to_eviction,
    no_update_is_lost_to_a_file,
    none_of_ten_million_updates_is_lost,
    two_threads_on_one_page_fetch_it_once,
    many_threads_fault,
    migrations_race_each_other,
    prefetch_races_migration,
    fresh_memory_is_filled_once,
    buffers_come_and_go_beside_migration,
    random_operations_agree_with_a_model,
    random_operations_agree_with_a_model_beside_migration,
);

/// Words of a buffer that several threads change.
fn atomics(buffer: &Buffer<u64>) -> &[AtomicU64] {
    // SAFETY: the same size and alignment; the tests touch the memory through these only.
    unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast(), buffer.len()) }
}

/// Sets a flag when dropped, so that threads end when the one they wait for panics.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Increments words all over `pages` pages, while `disturb` moves them; every increment must be found.
fn no_update_is_lost(space: &Space, pages: usize, disturb: impl Fn(&Buffer<u64>, &mut Random)) {
    const LEAST: u64 = 1_000_000;
    let buffer = space.map::<u64>(pages * WORDS).unwrap();
    let words = atomics(&buffer);
    let over = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    let started = Instant::now();
    let rounds = AtomicU64::new(0);
    let tally = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let _ends = Ends(&over);
            let mut tally = vec![0_u64; words.len()];
            let mut random = Random::new(1);
            while (done.load(Ordering::Relaxed) < LEAST || rounds.load(Ordering::Relaxed) < 20)
                && (rounds.load(Ordering::Relaxed) < 20 || started.elapsed() < Duration::from_secs(1))
            {
                let page = random.below(pages);
                // Some increments on each page, and then all over.
                for _ in 0..16 {
                    let at = page * WORDS + random.below(WORDS);
                    words[at].fetch_add(1, Ordering::Relaxed);
                    tally[at] += 1;
                }
                done.fetch_add(16, Ordering::Relaxed);
            }
            tally
        });
        let mut random = Random::new(2);
        while !over.load(Ordering::Acquire) {
            disturb(&buffer, &mut random);
            rounds.fetch_add(1, Ordering::Relaxed);
        }
        writer.join().unwrap()
    });
    assert!(space.count(Counter::MovedOut) > 0);
    for (at, (word, expected)) in words.iter().zip(&tally).enumerate() {
        assert_eq!(word.load(Ordering::Relaxed), *expected, "word {at} of page {}", at / WORDS);
    }
}

fn no_update_is_lost_to_migration(setup: Setup) {
    let space = setup.space(ByteSize::mib(8));
    let moved = space.clone();
    no_update_is_lost(&space, 128, move |buffer, random| {
        let first = random.below(120);
        let _ = moved.migrate(part(buffer.range(), first, 1 + random.below(8))).unwrap();
    });
}

fn no_update_is_lost_to_eviction(setup: Setup) {
    let space = setup.space(ByteSize::mib(8));
    let evicted = space.clone();
    no_update_is_lost(&space, 128, move |_, random| {
        evicted.evict(PageCount::new(1 + random.below(32))).unwrap();
    });
}

fn no_update_is_lost_to_a_file(setup: Setup) {
    let space = setup.with(file(ByteSize::mib(8)));
    let moved = space.clone();
    no_update_is_lost(&space, 64, move |buffer, _| {
        let _ = moved.migrate(buffer.range()).unwrap();
    });
}

/// Two threads count to five million each, in words beside each other, while their pages leave again and again.
fn none_of_ten_million_updates_is_lost(setup: Setup) {
    const PAGES: usize = 16;
    const EACH: usize = 5_000_000;
    const AT_ONCE: usize = 1000;
    let space = setup.space(ByteSize::mib(4));
    let buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    let (words, left) = (atomics(&buffer), AtomicU64::new(2));
    let tallies = thread::scope(|scope| {
        let writers = [0, 1].map(|writer| {
            let left = &left;
            scope.spawn(move || {
                let (mut random, mut tally) = (Random::new(writer as u64), [0_u64; PAGES]);
                for _ in 0..EACH / AT_ONCE {
                    let page = random.below(PAGES);
                    let word = &words[page * WORDS + writer];
                    for _ in 0..AT_ONCE {
                        // No atomic step: a store to a page that has left would be lost with it.
                        word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                    }
                    tally[page] += AT_ONCE as u64;
                }
                left.fetch_sub(1, Ordering::Release);
                tally
            })
        });
        while left.load(Ordering::Acquire) > 0 {
            let _ = space.migrate(buffer.range()).unwrap();
        }
        writers.map(|writer| writer.join().unwrap())
    });
    let moved = space.count(Counter::MovedOut);
    assert!(moved > 100, "the pages hardly left: {moved}");
    for (writer, tally) in tallies.iter().enumerate() {
        for (page, expected) in tally.iter().enumerate() {
            let found = words[page * WORDS + writer].load(Ordering::Relaxed);
            assert_eq!(found, *expected, "writer {writer}, page {page}");
        }
    }
    assert_eq!(tallies.iter().flatten().sum::<u64>(), 2 * EACH as u64);
}

fn two_threads_on_one_page_fetch_it_once(setup: Setup) {
    const ROUNDS: u64 = 300;
    let space = setup.space(ByteSize::mib(1));
    let mut buffer = space.map::<u64>(WORDS).unwrap();
    fill(&mut buffer, 1);
    let range = buffer.range();
    let before = space.count(Counter::MovedIn);
    let (start, end) = (Barrier::new(3), Barrier::new(3));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    start.wait();
                    check(&buffer, 1);
                    end.wait();
                }
            });
        }
        for _ in 0..ROUNDS {
            settle(&space, range);
            assert_eq!(space.migrate(range).unwrap().moved, PageCount::ONE);
            start.wait();
            end.wait();
        }
    });
    settle(&space, range);
    assert_eq!(space.count(Counter::MovedIn) - before, ROUNDS);
}

fn many_threads_fault(setup: Setup) {
    const PAGES: usize = 256;
    let space = setup.with(file(ByteSize::mib(4)));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 2);
    for round in 0..8 {
        // A handler may hold messages of threads that another one has answered; what it makes of them, late, is to
        // bring a page home that nobody asks for any more.
        eventually(|| {
            settle(&space, buffer.range());
            let _ = space.migrate(buffer.range()).unwrap();
            space.residency(buffer.range()).device.get() == PAGES
        });
        let before = space.count(Counter::MovedIn);
        thread::scope(|scope| {
            for thread in 0..12 {
                let buffer = &buffer;
                scope.spawn(move || {
                    let mut random = Random::new(round * 100 + thread);
                    let order: Vec<usize> = (0..PAGES).map(|_| random.below(PAGES)).chain(0..PAGES).collect();
                    for page in order {
                        let first = page * WORDS;
                        check_from(&buffer[first..first + WORDS], 2, first);
                    }
                });
            }
        });
        expect_places(&space, buffer.range(), PAGES, 0);
        let came = space.count(Counter::MovedIn) - before;
        assert!(came <= PAGES as u64, "{came} fetches of {PAGES} pages");
    }
}

fn migrations_race_each_other(setup: Setup) {
    const PAGES: usize = 256;
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    for round in 0..30 {
        fill(&mut buffer, round);
        let start = Barrier::new(3);
        let moved: usize = thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|thread| {
                    let (space, start, range) = (&space, &start, buffer.range());
                    scope.spawn(move || {
                        start.wait();
                        match thread {
                            0 => space.evict(PageCount::new(PAGES)).unwrap().get(),
                            _ => space.migrate(range).unwrap().moved.get(),
                        }
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert!(moved <= PAGES, "{moved} pages moved of {PAGES}");
        let now = space.residency(buffer.range());
        assert_eq!(now.device.get(), space.device_pages(0).unwrap().get(), "{now:?}");
        check(&buffer, round);
    }
}

fn prefetch_races_migration(setup: Setup) {
    const PAGES: usize = 128;
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    fill(&mut buffer, 3);
    let over = AtomicBool::new(false);
    let range = buffer.range();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                let _ = space.prefetch(range).unwrap();
            }
        });
        let _ends = Ends(&over);
        for _ in 0..150 {
            let _ = space.migrate(range).unwrap();
            let mut random = Random::new(5);
            for _ in 0..16 {
                let first = random.below(PAGES) * WORDS;
                check_from(&buffer[first..first + WORDS], 3, first);
            }
        }
    });
    check(&buffer, 3);
}

fn fresh_memory_is_filled_once(setup: Setup) {
    const PAGES: usize = 64;
    let space = setup.space(ByteSize::mib(4));
    for _ in 0..100 {
        let buffer = space.map::<u64>(PAGES * WORDS).unwrap();
        let words = atomics(&buffer);
        let start = Barrier::new(3);
        thread::scope(|scope| {
            for thread in 0..3 {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    for page in 0..PAGES {
                        words[page * WORDS + thread].fetch_add(1 + thread as u64, Ordering::Relaxed);
                    }
                });
            }
        });
        for page in 0..PAGES {
            let found = [0, 1, 2, 3].map(|word| words[page * WORDS + word].load(Ordering::Relaxed));
            assert_eq!(found, [1, 2, 3, 0], "page {page}");
        }
    }
}

fn buffers_come_and_go_beside_migration(setup: Setup) {
    let space = setup.space(ByteSize::mib(16));
    thread::scope(|scope| {
        for thread in 0..3_u64 {
            let space = &space;
            scope.spawn(move || {
                for round in 0..40 {
                    let mut buffer = space.map::<u64>(32 * WORDS).unwrap();
                    fill(&mut buffer, thread * 1000 + round);
                    let _ = space.migrate(buffer.range()).unwrap();
                    let _ = space.evict(PageCount::new(16)).unwrap();
                    check(&buffer, thread * 1000 + round);
                }
            });
        }
    });
    assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
}

/// What a random run does besides loads and stores.
fn agree_with_a_model(space: &Space, buffer: &mut Buffer<u8>, operations: usize, seed: u64) {
    let mut model = vec![0_u8; buffer.len()];
    let pages = buffer.len() / PAGE;
    let mut random = Random::new(seed);
    for operation in 0..operations {
        let at = random.below(model.len());
        let len = (1 + random.below(if operation % 16 == 0 { 3 * PAGE } else { 64 })).min(model.len() - at);
        let first = random.below(pages);
        let range = part(buffer.range(), first, 1 + random.below(pages - first));
        match random.below(20) {
            0..=6 => {
                let value = random.below(256) as u8;
                buffer[at..at + len].fill(value);
                model[at..at + len].fill(value);
            }
            7..=14 => assert!(buffer[at..at + len] == model[at..at + len], "operation {operation} at {at}"),
            15 => drop(space.migrate(range).unwrap()),
            16 => drop(space.migrate(part(range, 0, 1)).unwrap()),
            17 => drop(space.evict(PageCount::new(1 + random.below(16))).unwrap()),
            18 => drop(space.prefetch(range).unwrap()),
            _ => {
                let found = space.residency(range);
                let sum = [found.resident, found.staged, found.device, found.absent, found.poisoned];
                assert!(found.poisoned.is_zero(), "{found:?}");
                assert!(
                    sum.iter().map(|pages| pages.get()).sum::<usize>() >= range.pages().get(),
                    "{found:?}"
                );
            }
        }
    }
    assert!(buffer[..] == model[..]);
}

fn random_operations_agree_with_a_model(setup: Setup) {
    let space = setup.space(ByteSize::mib(4));
    let mut buffer = space.map::<u8>(96 * PAGE).unwrap();
    agree_with_a_model(&space, &mut buffer, 20_000, 42);
}

fn random_operations_agree_with_a_model_beside_migration(setup: Setup) {
    let limited = setup.builder().device(memory(ByteSize::mib(16))).ram(ByteSize::mib(1)).build().unwrap();
    let mut buffer = limited.map::<u8>(512 * PAGE).unwrap();
    let over = AtomicBool::new(false);
    let range = buffer.range();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random::new(7);
            while !over.load(Ordering::Acquire) {
                let _ = limited.migrate(part(range, random.below(511), 1 + random.below(32))).unwrap();
                thread::yield_now();
            }
        });
        let _ends = Ends(&over);
        let operations = if setup.engine == Engine::Threads { 3000 } else { 6000 };
        agree_with_a_model(&limited, &mut buffer, operations, 43);
    });
}
