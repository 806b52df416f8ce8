//! Handles: shared, unique, of ranges; and that the ledger knows them.

use alloc::sync::Arc;
use std::sync::Mutex;
use std::vec::Vec;

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, Pfn, PfnRange};

use super::{PageError, release_pages};
use crate::device::MemoryType;
use crate::pagemap::{Pagemap, PagemapOps, Registry, Spin};
use crate::sync::Ordering;

const START: Pfn = Pfn::new(8 * CHUNK_PAGES as u64);

fn pages(first: usize, count: usize) -> PfnRange {
    PfnRange::new(pfn(first), PageCount::new(count))
}

fn pfn(n: usize) -> Pfn {
    START.forward(PageCount::new(n))
}

/// Notes what was freed.
#[derive(Default)]
struct Freed(Mutex<Vec<PfnRange>>);

impl PagemapOps for Freed {
    fn page_free(&self, map: &Pagemap, pages: PfnRange) {
        assert_eq!(map.page(pages.start).unwrap_err(), PageError::Claimed(pages.start), "nobody has it yet");
        self.0.lock().unwrap().push(pages);
    }
}

fn files(geometry: Geometry, chunks: usize) -> (Registry, Arc<Pagemap>, Arc<Freed>) {
    let (registry, freed) = (Registry::new(Arc::new(Spin)), Arc::new(Freed::default()));
    let builder = Pagemap::builder("pmem0", MemoryType::FsDax).geometry(geometry).ops(freed.clone());
    let map = registry.register(builder.range(pages(0, chunks * CHUNK_PAGES))).unwrap();
    (registry, map, freed)
}

fn taken(freed: &Freed) -> Vec<PfnRange> {
    core::mem::take(&mut freed.0.lock().unwrap())
}

#[test]
fn the_last_handle_frees_the_page_and_tells_the_driver() {
    let (registry, map, freed) = files(Geometry::M2, 2);
    let page = map.page(pfn(CHUNK_PAGES + 7)).unwrap();
    let other = page.clone();
    assert_eq!(
        (page.pages(), page.count(), map.live().get()),
        (pages(CHUNK_PAGES, CHUNK_PAGES), 2, CHUNK_PAGES)
    );
    drop(page);
    assert_eq!((other.count(), taken(&freed)), (1, Vec::new()));
    drop(other);
    assert_eq!((map.live(), taken(&freed)), (PageCount::ZERO, std::vec![pages(CHUNK_PAGES, CHUNK_PAGES)]));
    registry.unregister(&map, &mut |_| false).unwrap();
}

#[test]
fn pages_of_a_range_are_had_all_or_none() {
    let (registry, map, freed) = files(Geometry::K4, 2);
    let alone = map.claim(pages(20, 2)).unwrap();
    assert_eq!(map.pin(pages(0, 40)).unwrap_err(), PageError::Claimed(pfn(20)));
    assert_eq!(
        (map.live().get(), taken(&freed)),
        (2, std::vec![pages(0, 20)]),
        "those before it were given back"
    );
    drop(alone);
    taken(&freed);
    // Across the border of a group.
    let pinned = map.pin(pages(CHUNK_PAGES - 5, 10)).unwrap();
    let again = pinned.clone();
    assert_eq!((map.live().get(), map.count(pfn(CHUNK_PAGES + 4))), (10, 2));
    drop(pinned);
    drop(again);
    assert_eq!(taken(&freed), [pages(CHUNK_PAGES - 5, 5), pages(CHUNK_PAGES, 5)]);
    registry.unregister(&map, &mut |_| false).unwrap();
}

#[test]
fn what_one_holder_claims_nobody_finds() {
    let (registry, map, _) = files(Geometry::K4, 1);
    let page = map.page(pfn(3)).unwrap();
    assert_eq!(map.claim(pages(0, 8)).unwrap_err(), PageError::InUse(pfn(3), 1));
    assert_eq!(map.first_busy(pages(0, 8)), Some(pfn(3)));
    assert_eq!((map.first_busy(pages(4, 100)), map.live().get()), (None, 1));
    let other = page.clone();
    let page = page.into_unique().unwrap_err();
    drop(other);
    let sole = page.into_unique().unwrap();
    assert_eq!(map.page(pfn(3)).unwrap_err(), PageError::Claimed(pfn(3)));
    assert_eq!(map.claim(pages(3, 1)).unwrap_err(), PageError::InUse(pfn(3), 1));
    let shared = sole.share();
    assert_eq!(map.page(pfn(3)).unwrap().count(), 2);
    drop(shared);
    let whole = map.claim(pages(0, 8)).unwrap();
    assert_eq!((whole.pages(), map.live().get()), (pages(0, 8), 8));
    drop(whole);
    registry.unregister(&map, &mut |_| false).unwrap();
}

#[test]
fn many_handles_are_dropped_together() {
    let (registry, map, freed) = files(Geometry::K4, 2);
    let kept = map.page(pfn(10)).unwrap();
    let mut all: Vec<_> = (0..CHUNK_PAGES + 4).map(|n| map.page(pfn(n)).unwrap()).collect();
    all.push(map.page(pfn(2)).unwrap());
    release_pages(all);
    let expected =
        [pages(0, 2), pages(3, 7), pages(11, CHUNK_PAGES - 11), pages(CHUNK_PAGES, 4), pages(2, 1)];
    assert_eq!(taken(&freed), expected);
    assert_eq!((map.live().get(), kept.count()), (1, 1));
    drop(kept);
    registry.unregister(&map, &mut |_| false).unwrap();
}

#[test]
fn handles_are_of_registered_pagemaps_and_pages_in_use() {
    let (registry, map, _) = files(Geometry::K4, 1);
    assert_eq!(map.page(pfn(CHUNK_PAGES)).unwrap_err(), PageError::Outside(pfn(CHUNK_PAGES)));
    assert_eq!(map.pin(pages(500, 20)).unwrap_err(), PageError::Outside(pfn(520)));
    assert_eq!(registry.page(Pfn::new(3)).unwrap_err(), PageError::Outside(Pfn::new(3)));
    let loose = Pagemap::new(Pfn::new(0), crate::pagemap::tests::device(8, false));
    let number = loose.allocate(PageCount::ONE).unwrap().start;
    assert_eq!(loose.page(number).unwrap_err(), PageError::Unregistered(number));
    loose.put(number);
    let private =
        Pagemap::builder("vram", MemoryType::Private).range(PfnRange::new(Pfn::new(0), PageCount::new(8)));
    let private = registry.register(private.device(crate::pagemap::tests::device(8, false))).unwrap();
    let first = Pfn::new(0);
    assert_eq!(private.page(first).unwrap_err(), PageError::Free(first), "private pages are allocated first");
    let fresh = private.allocate_unique(PageCount::new(4)).unwrap();
    assert_eq!(private.page(first).unwrap_err(), PageError::Claimed(first), "and shared when they are ready");
    let shared = fresh.share();
    drop(private.page(first).unwrap());
    // By number, as page words count.
    private.get(first);
    drop(shared);
    assert_eq!((private.count(first), private.live().get()), (1, 1));
    private.put(first);
    registry.unregister(&private, &mut |_| false).unwrap();
}

#[test]
fn a_word_of_its_own_lies_at_the_head() {
    let (_registry, map, _) = files(Geometry::M2, 2);
    let word = |n: usize| map.page_data(pfn(n)).unwrap();
    word(CHUNK_PAGES + 9).store(77, Ordering::Relaxed);
    assert_eq!((word(CHUNK_PAGES).load(Ordering::Relaxed), word(0).load(Ordering::Relaxed)), (77, 0));
    assert!(Pagemap::new(pfn(0), crate::pagemap::tests::device(8, false)).page_data(pfn(0)).is_none());
}

#[test]
#[cfg(debug_assertions)]
fn the_ledger_knows_where_each_handle_was_made() {
    let (registry, map, _) = files(Geometry::K4, 1);
    let here = core::panic::Location::caller().line();
    let page = map.page(pfn(1)).unwrap();
    let copy = page.clone();
    let range = map.pin(pages(4, 3)).unwrap();
    map.page(pfn(9)).map(core::mem::forget).unwrap();
    let lines: Vec<_> =
        map.holders().iter().map(|holder| (holder.pages, holder.place.unwrap().line() - here)).collect();
    assert_eq!(lines, [(pages(1, 1), 1), (pages(1, 1), 2), (pages(4, 3), 3), (pages(9, 1), 4)]);
    drop((page, copy, range));
    let left = map.holders();
    assert_eq!((left.len(), left[0].pages), (1, pages(9, 1)), "the one that was forgotten");
    map.put(pfn(9));
    // A reference that is counted by number is no handle: it has no line, and is listed all the same.
    let by_number = map.allocate(PageCount::new(3)).unwrap();
    let holder = *map.holders().last().unwrap();
    assert_eq!((holder.pages, holder.place), (by_number, None));
    map.put_range(by_number);
    drop(registry);
}

#[test]
fn ranges_of_no_page_and_past_every_end_are_refused() {
    let (registry, map, _freed) = files(Geometry::K4, 1);
    let last = pfn(CHUNK_PAGES - 1);
    for (start, len, told) in [
        (pfn(3), 0, pfn(3)),
        (last, 2, pfn(CHUNK_PAGES + 1)),
        (pfn(CHUNK_PAGES), 0, pfn(CHUNK_PAGES)),
        (pfn(CHUNK_PAGES), 1, pfn(CHUNK_PAGES)),
    ] {
        let range = PfnRange::new(start, PageCount::new(len));
        assert_eq!(map.pin(range).map(drop), Err(PageError::Outside(told)), "{range:?}");
        assert_eq!(map.claim(range).map(drop), Err(PageError::Outside(told)), "{range:?}");
        assert_eq!(map.first_busy(range), None);
    }
    let page = map.page(last).unwrap();
    // So long that no number says where they end.
    for start in [pfn(0), pfn(1), last] {
        let range = PfnRange::new(start, PageCount::new(usize::MAX));
        assert!(matches!(map.pin(range).map(drop), Err(PageError::Outside(_))), "{range:?}");
        assert!(matches!(map.claim(range).map(drop), Err(PageError::Outside(_))), "{range:?}");
        assert_eq!(map.first_busy(range), Some(last), "{range:?}");
    }
    assert_eq!((page.count(), map.live()), (1, PageCount::ONE), "none was referred to");
    drop(page);
    registry.unregister(&map, &mut |_| false).unwrap();
}

#[test]
fn the_first_page_in_use_is_found_in_any_range() {
    let registry = Registry::new(Arc::new(Spin));
    let builder = Pagemap::builder("pmem0", MemoryType::FsDax);
    let builder = builder.range(pages(0, CHUNK_PAGES)).range(pages(2 * CHUNK_PAGES, CHUNK_PAGES));
    let map = registry.register(builder).unwrap();
    let all = pages(0, 3 * CHUNK_PAGES);
    assert_eq!(map.first_busy(all), None);
    let second = map.page(pfn(2 * CHUNK_PAGES + 9)).unwrap();
    assert_eq!(map.first_busy(all), Some(pfn(2 * CHUNK_PAGES + 9)));
    let first = map.page(pfn(5)).unwrap();
    assert_eq!(map.first_busy(all), Some(pfn(5)));
    assert_eq!(map.first_busy(pages(6, 2 * CHUNK_PAGES)), None, "the gap is nobody's");
    assert_eq!(map.first_busy(pages(6, 3 * CHUNK_PAGES)), Some(pfn(2 * CHUNK_PAGES + 9)));
    drop((first, second));
    registry.unregister(&map, &mut |_| false).unwrap();
}
