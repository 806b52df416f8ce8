//! Runs of slots, and the bitmap that finds them.

use std::vec;
use std::vec::Vec;

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, Pfn, VaRange, Vpn};

use super::bitmap::Bitmap;
use super::{Arena, Run, Slot};
use crate::sync::{AtomicU32, Park};

/// Nobody waits in these tests.
struct NoPark;

impl Park for NoPark {
    fn park(&self, _word: &AtomicU32, _expected: u32) {}

    fn unpark(&self, _word: &AtomicU32) {}
}

fn arena(slots: usize) -> Arena {
    Arena::new(VaRange::of_pages(Vpn::new(0x1000), PageCount::new(slots)).unwrap(), Geometry::K4)
}

fn counts(arena: &Arena) -> (usize, usize) {
    (arena.free_slots(&NoPark).get(), arena.free_frames(&NoPark).get())
}

#[test]
fn a_bitmap_gives_runs_behind_its_cursor() {
    let mut bits = Bitmap::new(200);
    assert_eq!(bits.take_run(5), None);
    bits.insert(60, 10);
    bits.insert(100, 1);
    bits.insert(190, 10);
    assert_eq!(bits.count(), 21);
    assert_eq!(bits.take_run(6), Some((60, 6)), "across words");
    assert_eq!(bits.take_run(100), Some((66, 4)), "no further than the run");
    assert_eq!(bits.take_run(100), Some((100, 1)));
    bits.insert(0, 3);
    assert_eq!(bits.take_run(100), Some((190, 10)), "goes on before it goes round");
    assert_eq!(bits.take_run(2), Some((0, 2)));
    assert_eq!(bits.take_run(2), Some((2, 1)));
    assert_eq!((bits.take_run(1), bits.count()), (None, 0));
}

#[test]
fn a_bitmap_of_whole_words() {
    let mut bits = Bitmap::new(256);
    bits.insert(0, 256);
    assert_eq!(bits.take_run(64), Some((0, 64)));
    assert_eq!(bits.take_run(usize::MAX), Some((64, 192)));
    bits.insert(63, 2);
    assert_eq!(bits.take_run(9), Some((63, 2)));
}

#[test]
fn a_bitmap_agrees_with_a_plain_set() {
    // A multiplicative sequence stands in for chance.
    let mut plain = vec![false; 300];
    let mut bits = Bitmap::new(300);
    let mut seed = 1_usize;
    for _ in 0..4000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (first, len) = ((seed >> 33) % 300, 1 + (seed >> 50) % 70);
        let end = (first..300.min(first + len)).find(|n| plain[*n]).unwrap_or(300.min(first + len));
        if seed >> 20 & 1 == 0 && end > first {
            bits.insert(first, end - first);
            plain[first..end].fill(true);
        } else if let Some((first, got)) = bits.take_run(len) {
            assert!(got <= len && plain[first..first + got].iter().all(|bit| *bit));
            assert!(got == len || plain.get(first + got) != Some(&true), "the run could have been longer");
            plain[first..first + got].fill(false);
        } else {
            assert!(!plain.contains(&true));
        }
        assert_eq!(bits.count(), plain.iter().filter(|bit| **bit).count());
    }
}

#[test]
fn a_dropped_run_goes_back_to_the_pool_of_its_state() {
    let arena = arena(16);
    assert_eq!(counts(&arena), (16, 0));
    let run = arena.take_empty(&NoPark, PageCount::new(6)).unwrap();
    assert_eq!((run.first(), run.pages().get(), counts(&arena)), (Slot::new(0), 6, (10, 0)));
    assert_eq!(run.range(), VaRange::of_pages(Vpn::new(0x1000), PageCount::new(6)).unwrap());
    let run = run.filled();
    assert_eq!(run.as_ptr().as_ptr() as usize, arena.address(Slot::new(0)).get());
    assert_eq!(counts(&arena), (10, 0), "a change of state gives nothing back");
    drop(run);
    assert_eq!(counts(&arena), (10, 6));
    let run = arena.take_framed(&NoPark, PageCount::new(100)).unwrap();
    assert_eq!(run.pages().get(), 6);
    assert!(arena.take_framed(&NoPark, PageCount::ONE).is_none());
    drop(run.emptied());
    assert_eq!(counts(&arena), (16, 0));
}

#[test]
fn the_parts_of_a_split_run_are_owned_apart() {
    let arena = arena(8);
    let run = arena.take_empty(&NoPark, PageCount::new(8)).unwrap();
    let (head, tail) = run.split(PageCount::new(3));
    let (head, tail) = (head.unwrap(), tail.unwrap());
    assert_eq!(tail.slots().map(Slot::get).collect::<Vec<_>>(), [3, 4, 5, 6, 7]);
    drop(head);
    assert_eq!(counts(&arena), (3, 0));
    let (none, all) = tail.split(PageCount::ZERO);
    assert!(none.is_none());
    let (all, none) = all.unwrap().split(PageCount::new(99));
    assert!(none.is_none());
    drop(all.map(Run::filled));
    assert_eq!(counts(&arena), (3, 5));
}

#[test]
fn a_dissolved_run_belongs_to_its_words_until_it_is_adopted() {
    let arena = arena(4);
    arena.take_empty(&NoPark, PageCount::new(4)).unwrap().filled().dissolve();
    assert_eq!(counts(&arena), (0, 0));
    arena.note(Slot::new(2), Vpn::new(77), Some(Pfn::new(0)));
    assert_eq!((arena.page_of(Slot::new(2)), arena.copy_of(Slot::new(2))), (Vpn::new(77), Some(Pfn::new(0))));
    arena.renote(Slot::new(2), Vpn::new(78));
    assert_eq!(arena.page_of(Slot::new(2)), Vpn::new(78));
    assert_eq!(arena.take_copy(Slot::new(2)), Some(Pfn::new(0)));
    assert_eq!(arena.take_copy(Slot::new(2)), None, "a copy is taken once");
    drop(arena.adopt(&NoPark, Slot::new(2)));
    assert_eq!(counts(&arena), (0, 1));
    drop(arena.adopt(&NoPark, Slot::new(0)).emptied());
    assert_eq!(counts(&arena), (1, 1));
}

#[test]
#[should_panic(expected = "who did not own it")]
#[cfg(debug_assertions)]
fn a_slot_given_back_twice_is_a_bug() {
    let arena = arena(4);
    let run = arena.take_empty(&NoPark, PageCount::ONE).unwrap();
    arena.put(&NoPark, run.first(), 1, false);
}

#[test]
fn a_huge_arena_hands_out_blocks() {
    let range = VaRange::of_pages(Vpn::new(4 * CHUNK_PAGES), PageCount::new(2 * CHUNK_PAGES)).unwrap();
    let arena = Arena::new(range, Geometry::M2);
    let run = arena.take_empty(&NoPark, PageCount::new(CHUNK_PAGES)).unwrap();
    assert_eq!((run.pages().get(), counts(&arena)), (CHUNK_PAGES, (CHUNK_PAGES, 0)));
    drop(run.filled());
    let second = arena.take_empty(&NoPark, PageCount::new(CHUNK_PAGES)).unwrap();
    assert_eq!(second.first(), Slot::new(CHUNK_PAGES as u32));
    assert_eq!(counts(&arena), (0, CHUNK_PAGES));
    drop(second);
    assert_eq!(arena.range(), range);
}

#[test]
#[should_panic(expected = "is_aligned_to")]
fn a_huge_arena_starts_at_a_huge_page() {
    let range = VaRange::of_pages(Vpn::new(1), PageCount::new(CHUNK_PAGES)).unwrap();
    let _ = Arena::new(range, Geometry::M2);
}
