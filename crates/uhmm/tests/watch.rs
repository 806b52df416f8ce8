//! Memory that the program maps and unmaps as it likes, under management while it is there.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{Memory, PAGE, Setup, check, fill, memory, part};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous};
use uhmm::mirror::PageView;
use uhmm::space::{MapError, MappingKind};
use uhmm::{ByteSize, Geometry, PageCount, Skip};

with_engine!(Signal, signal_move, signal_fallback: who_hears_nothing_watches_nothing);
with_engine!(Threads, threads_move, threads_fallback:
    mappings_are_listed,
    a_list_has_no_hole_that_was_none,
    a_new_mapping_is_watched_anew,
    a_part_is_watched,
    the_page_of_zeros_goes_as_a_page,
    what_is_left_is_evacuated,
);

const PAGES: usize = 16;

fn who_hears_nothing_watches_nothing(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    let memory = Memory::new(PAGES);
    // SAFETY: the test's own memory.
    assert!(matches!(unsafe { space.watch(memory.range()) }, Err(MapError::Deaf)));
}

fn mappings_are_listed(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    let memory = Memory::new(PAGES);
    memory.protect(4, 2, MprotectFlags::READ);
    memory.protect(6, 1, MprotectFlags::empty());
    let found = space.mappings(part(memory.range(), 2, 6)).unwrap();
    let expected = [(2, 2, true, true), (4, 2, true, false), (6, 1, false, false), (7, 1, true, true)];
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for (found, (first, pages, read, write)) in found.iter().zip(expected) {
        assert_eq!((found.range, found.read, found.write), (part(memory.range(), first, pages), read, write));
        assert_eq!(found.kind, MappingKind::Anonymous);
    }
    let ours = space.map::<u64>(512).unwrap();
    assert_eq!(space.mappings(ours.range()).unwrap()[0].kind, MappingKind::Other);
}

/// Mappings are split and joined while they are listed.
fn a_list_has_no_hole_that_was_none(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    let memory = Memory::new(PAGES);
    let (range, over) = (memory.range(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for n in 0..PAGES {
                    // SAFETY: the test's own memory, unwatched at once.
                    unsafe { space.watch(part(range, n, 1)) }.unwrap();
                    space.unwatch(part(range, n, 1));
                }
            }
        });
        for _ in 0..500 {
            let mut end = range.first();
            for mapping in space.mappings(range).unwrap() {
                assert!(mapping.range.first() <= end, "{mapping:?} comes behind {end:?}");
                end = end.max(mapping.range.end_page());
            }
            assert_eq!(end, range.end_page());
        }
        over.store(true, Ordering::Relaxed);
    });
}

fn a_new_mapping_is_watched_anew(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    let mut memory = Memory::new(PAGES);
    let range = memory.range();
    for round in 0..20 {
        fill(memory.words_mut(0, PAGES), round);
        // SAFETY: the test's own memory, unwatched at the end.
        unsafe { space.watch(range) }.unwrap();
        assert_eq!(space.migrate(range).unwrap().moved, PageCount::new(PAGES));
        check(memory.words(0, PAGES / 2), round);
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
        // SAFETY: over the memory's own mapping, to which nothing refers.
        unsafe { mmap_anonymous(memory.start().cast(), PAGES * PAGE, prot, flags) }.unwrap();
        fill(memory.words_mut(0, 1), round);
        // Nobody watches what is there now: a page of it that was taken out would come back as zeros.
        match space.migrate(range) {
            Ok(done) => assert_eq!((done.moved.get(), done.skipped.get(Skip::Changed)), (0, PAGES as u64)),
            Err(error) => panic!("{error}"),
        }
        check(memory.words(0, 1), round);
    }
    space.unwatch(range);
}

fn a_part_is_watched(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    let mut memory = Memory::new(PAGES);
    let range = memory.range();
    fill(memory.words_mut(0, PAGES), 1);
    // SAFETY: the test's own memory, unwatched at the end.
    unsafe {
        space.watch(part(range, 2, 8)).unwrap();
        space.watch(part(range, 4, 2)).unwrap();
    }
    assert!(space.migrate(part(range, 0, 4)).is_err());
    for (first, pages) in [(3, 6), (2, 1), (9, 1)] {
        assert_eq!(space.migrate(part(range, first, pages)).unwrap().moved, PageCount::new(pages));
    }
    let mut views = [PageView::Absent; PAGES];
    space.snapshot(range, Some(0), &mut views).unwrap();
    let own = |view: &PageView| matches!(view, PageView::Device { write: true, .. });
    assert_eq!(views.iter().filter(|view| own(view)).count(), 8);
    assert_eq!(views[0], PageView::Ram { write: true, order: Geometry::K4 });
    let PageView::Device { pfn, .. } = views[2] else { panic!("{views:?}") };
    assert!(space.device_page(0, pfn).is_some() && space.device_page(1, pfn).is_none());
    space.unwatch(range);
    assert_eq!(space.residency(range).resident, PageCount::new(PAGES));
    check(memory.words(0, PAGES), 1);
}

fn the_page_of_zeros_goes_as_a_page(setup: Setup) {
    let space = setup.space(ByteSize::mib(1));
    let memory = Memory::new(PAGES);
    let range = memory.range();
    memory.protect(8, 8, MprotectFlags::READ);
    assert!(memory.words(0, PAGES).iter().all(|word| *word == 0));
    for part in [part(range, 0, 8), part(range, 8, 8)] {
        let mut views = [PageView::Absent; 8];
        space.snapshot(part, None, &mut views).unwrap();
        assert_eq!(views, [PageView::Zeros; 8]);
        // SAFETY: the test's own memory, unwatched at the end.
        unsafe { space.watch(part) }.unwrap();
        let done = space.migration(part).run().unwrap();
        assert_eq!(done.moved.get(), 8, "{done:?}");
    }
    assert!(memory.words(0, PAGES).iter().all(|word| *word == 0));
    space.unwatch(range);
}

/// Pages whose mapping nobody would take more pages out of.
fn what_is_left_is_evacuated(setup: Setup) {
    let space = setup.builder().device(memory(ByteSize::mib(1))).build().unwrap();
    let mut memory = Memory::new(PAGES);
    let range = memory.range();
    fill(memory.words_mut(0, PAGES), 2);
    // SAFETY: the test's own memory, unwatched at the end.
    unsafe { space.watch(range) }.unwrap();
    assert_eq!(space.migrate(range).unwrap().moved, PageCount::new(PAGES));
    memory.give_up(0, 2);
    let other = Memory::new(1);
    // SAFETY: as above. The list is looked through for what has changed.
    unsafe { space.watch(other.range()) }.unwrap();
    let done = space.evacuate(0, None).unwrap();
    assert_eq!((done.moved.get(), done.left.get()), (PAGES - 2, 0));
    common::check_from(memory.words(2, PAGES - 2), 2, 2 * PAGE / 8);
    space.unwatch(range);
    space.unwatch(other.range());
}
