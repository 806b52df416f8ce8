//! Huge pages that stay huge on the way out and back.

mod common;

use common::{Memory, PAGE, Setup, WORDS, check, check_from, expect_places, fill, memory, part, settle};
use uhmm::{ByteSize, Counter, PageCount, Space, VaRange};
use uhmm_sys::scan::{Categories, PagemapScan, Query, Region};

with_engine!(Signal, signal_move, signal_fallback:
    huge_pages_come_back_huge, part_of_a_huge_page_leaves, huge_pages_without_room, a_buffer_that_was_collapsed);
with_engine!(Threads, threads_move, threads_fallback:
    huge_pages_come_back_huge, part_of_a_huge_page_leaves, huge_pages_without_room, a_buffer_that_was_collapsed);

const CHUNK: usize = 512;
const CHUNKS: usize = 4;
const PAGES: usize = CHUNK * CHUNKS;

/// Huge pages in `range`, by pages of 4 KiB.
fn huge(range: VaRange) -> usize {
    let mut found = [Region::UNUSED; 2 * CHUNKS];
    let query = Query { required: Categories::HUGE, report: Categories::HUGE, ..Query::default() };
    let scanned = PagemapScan::open().unwrap().scan(range, query, &mut found).unwrap();
    found[..scanned.regions].iter().map(|region| region.range.pages().get()).sum()
}

fn space(setup: Setup, device: ByteSize) -> Space {
    setup.builder().huge_pages(true).device(memory(device)).build().unwrap()
}

/// Aligned memory in huge pages and a pattern; `None`, and a word about it, where the system has none to give.
fn huge_memory(seed: u64) -> Option<(Memory, usize)> {
    let mut memory = Memory::new(PAGES + CHUNK);
    let before = memory.range().first().get().next_multiple_of(CHUNK) - memory.range().first().get();
    // SAFETY: advice on the memory's own pages.
    unsafe {
        rustix::mm::madvise(memory.start().cast(), (PAGES + CHUNK) * PAGE, rustix::mm::Advice::LinuxHugepage)
    }
    .unwrap();
    fill(memory.words_mut(before, PAGES), seed);
    let found = huge(part(memory.range(), before, PAGES));
    if found < PAGES {
        common::skip("huge pages", &format!("the system gave {found} of {PAGES} pages as huge ones"));
        return None;
    }
    Some((memory, before))
}

fn huge_pages_come_back_huge(setup: Setup) {
    let Some((mut memory, before)) = huge_memory(1) else { return };
    let space = space(setup, ByteSize::mib(16));
    let adopted = memory.adopt(&space);
    let range = part(memory.range(), before, PAGES);
    for round in 1..4 {
        let done = space.migrate(range).unwrap();
        assert_eq!(done.moved, PageCount::new(PAGES), "{:?}", done.skipped);
        expect_places(&space, range, 0, PAGES);
        let home = space.count(Counter::MovedIn);
        // One touch brings the whole of it.
        assert_eq!(memory.words(before, PAGES)[700 * WORDS], common::word(round, 700 * WORDS));
        settle(&space, range);
        if !setup.forced_fallback {
            expect_places(&space, range, CHUNK, PAGES - CHUNK);
            assert_eq!(space.count(Counter::MovedIn) - home, CHUNK as u64);
            assert_eq!(huge(range), CHUNK);
        }
        check(memory.words(before, PAGES), round);
        settle(&space, range);
        if !setup.forced_fallback {
            assert_eq!(huge(range), PAGES);
            assert_eq!(space.device_pages(0), Some(PageCount::ZERO));
        }
        fill(memory.words_mut(before, PAGES), round + 1);
        settle(&space, range);
    }
    assert_eq!(space.migrate(range).unwrap().moved, PageCount::new(PAGES));
    drop(adopted);
    check(memory.words(before, PAGES), 4);
}

fn part_of_a_huge_page_leaves(setup: Setup) {
    let Some((mut memory, before)) = huge_memory(2) else { return };
    let space = space(setup, ByteSize::mib(16));
    let adopted = memory.adopt(&space);
    let range = part(memory.range(), before, PAGES);
    let some = part(range, 100, 1000);
    let done = space.migrate(some).unwrap();
    assert_eq!(done.moved, PageCount::new(1000), "{:?}", done.skipped);
    expect_places(&space, range, PAGES - 1000, 1000);
    check(memory.words(before, PAGES), 2);
    settle(&space, range);
    let done = space.migrate(range).unwrap();
    assert_eq!(done.moved, PageCount::new(PAGES), "{:?}", done.skipped);
    fill(memory.words_mut(before, PAGES), 3);
    check(memory.words(before, PAGES), 3);
    drop(adopted);
    check(memory.words(before, PAGES), 3);
}

fn huge_pages_without_room(setup: Setup) {
    let Some((memory, before)) = huge_memory(3) else { return };
    // Room for one and a half.
    let space = space(setup, ByteSize::mib(3));
    let adopted = memory.adopt(&space);
    let range = part(memory.range(), before, PAGES);
    let done = space.migrate(range).unwrap();
    assert_eq!(done.moved.get() as u64 + done.skipped.total(), PAGES as u64, "{:?}", done.skipped);
    assert!(done.moved.get() > CHUNK / 2, "{:?}", done.skipped);
    check(memory.words(before, PAGES), 3);
    drop(adopted);
    check(memory.words(before, PAGES), 3);
}

fn a_buffer_that_was_collapsed(setup: Setup) {
    const COLLAPSE: i32 = 25;
    let space = space(setup, ByteSize::mib(16));
    let mut buffer = space.map::<u64>(PAGES * WORDS).unwrap();
    buffer.advise_huge().unwrap();
    fill(&mut buffer, 4);
    settle(&space, buffer.range());
    // SAFETY: advice on the buffer's own pages, whose contents stay.
    let collapsed = unsafe { libc::madvise(buffer.as_mut_ptr().cast(), PAGES * PAGE, COLLAPSE) };
    if collapsed != 0 || huge(buffer.range()) < PAGES {
        common::skip("a_buffer_that_was_collapsed", "the kernel made no huge pages of it");
        return;
    }
    assert_eq!(space.migrate(buffer.range()).unwrap().moved, PageCount::new(PAGES));
    check_from(&buffer[CHUNK * WORDS..], 4, CHUNK * WORDS);
    settle(&space, buffer.range());
    if !setup.forced_fallback {
        assert_eq!(huge(buffer.range()), PAGES - CHUNK);
    }
    check(&buffer, 4);
}
