//! Pages that are lost: what goes with them, who is told, and what brings them back.

use alloc::sync::Arc;
use std::sync::Mutex;
use std::vec::Vec;

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, Pfn, PfnRange};

use super::{Failure, Mapper, Told};
use crate::device::MemoryType;
use crate::pagemap::{PageError, Pagemap, PagemapOps, Registry, Spin};

const START: Pfn = Pfn::new(8 * CHUNK_PAGES as u64);

fn pfn(n: usize) -> Pfn {
    START.forward(PageCount::new(n))
}

fn pages(first: usize, count: usize) -> PfnRange {
    PfnRange::new(pfn(first), PageCount::new(count))
}

fn map(geometry: Geometry, ops: Option<Arc<dyn PagemapOps>>) -> (Registry, Arc<Pagemap>) {
    let registry = Registry::new(Arc::new(Spin));
    let builder = Pagemap::builder("dax0.0", MemoryType::Generic).geometry(geometry);
    let builder = builder.range(pages(0, 4 * CHUNK_PAGES));
    let builder = if let Some(ops) = ops { builder.ops(ops) } else { builder };
    let map = registry.register(builder).unwrap();
    (registry, map)
}

/// Maps some pages.
struct Mapping(PfnRange, Mutex<Vec<Failure>>);

impl Mapping {
    fn new(pages: PfnRange) -> Arc<Self> {
        Arc::new(Self(pages, Mutex::default()))
    }
}

impl Mapper for Mapping {
    fn poisoned(&self, _map: &Pagemap, failure: &Failure) -> bool {
        let mine = self.0.overlaps(failure.pages);
        if mine {
            self.1.lock().unwrap().push(*failure);
        }
        mine
    }
}

#[test]
fn a_bad_page_takes_its_compound_page_along() {
    let (registry, map) = map(Geometry::M2, None);
    let (near, far) = (Mapping::new(pages(CHUNK_PAGES, 8)), Mapping::new(pages(0, 8)));
    map.add_mapper(near.clone());
    map.add_mapper(far.clone());
    let held = map.page(pfn(CHUNK_PAGES)).unwrap();
    let bad = pfn(CHUNK_PAGES + 300);
    let found = registry.memory_failure(bad).unwrap();
    let failure =
        Failure { pfn: bad, pages: pages(CHUNK_PAGES, CHUNK_PAGES), geometry: Geometry::M2, references: 1 };
    assert_eq!((found.failure, found.told, found.known), (failure, 1, false));
    assert_eq!((near.1.lock().unwrap().as_slice(), far.1.lock().unwrap().len()), (&[failure][..], 0));
    let again = registry.memory_failure(pfn(CHUNK_PAGES)).unwrap();
    assert_eq!((again.told, again.known), (0, true), "they know");
    assert_eq!(map.bad_pages(), [pages(CHUNK_PAGES, 1), pages(CHUNK_PAGES + 300, 1)]);
    assert_eq!(map.page(pfn(CHUNK_PAGES + 5)).unwrap_err(), PageError::Poisoned(pfn(CHUNK_PAGES + 5)));
    drop(held.clone());
    drop(held);
    assert_eq!(map.claim(pages(CHUNK_PAGES, 1)).unwrap_err(), PageError::Poisoned(pfn(CHUNK_PAGES)));
    let mapper: Arc<dyn Mapper> = far.clone();
    map.remove_mapper(&mapper);
    registry.memory_failure(pfn(0)).unwrap();
    assert_eq!(far.1.lock().unwrap().len(), 0, "he has left");
    registry.unregister(&map, &mut |_| false).unwrap();
}

#[test]
fn what_is_bad_is_given_to_nobody() {
    let (_registry, map) = map(Geometry::K4, None);
    map.memory_failure(pfn(2)).unwrap();
    let first = map.allocate_unique(PageCount::new(CHUNK_PAGES)).unwrap();
    let second = map.allocate_unique(PageCount::new(CHUNK_PAGES)).unwrap();
    assert_eq!((first.pages(), second.pages()), (pages(0, 2), pages(3, CHUNK_PAGES - 3)));
    drop((first, second));
    assert_eq!(map.allocate_huge(), Some(pages(CHUNK_PAGES, CHUNK_PAGES)), "nor whole with its group");
    map.put_range(pages(CHUNK_PAGES, CHUNK_PAGES));
    // In use when it fails: it is freed like any other, and not found again.
    let page = map.page(pfn(100)).unwrap();
    assert_eq!(map.memory_failure(pfn(100)).unwrap().failure.references, 1);
    drop(page);
    assert_eq!(
        (map.live(), map.page(pfn(100)).unwrap_err()),
        (PageCount::ZERO, PageError::Poisoned(pfn(100)))
    );
}

#[test]
fn the_space_of_what_is_bad_is_not_given_back() {
    let device = crate::pagemap::tests::device(2 * CHUNK_PAGES, false);
    let map = Pagemap::new(START, device);
    for _ in 0..2 {
        assert_eq!(map.allocate(PageCount::new(CHUNK_PAGES)).unwrap().pages.get(), CHUNK_PAGES);
    }
    map.memory_failure(pfn(3)).unwrap();
    map.put_range(pages(0, 2 * CHUNK_PAGES));
    assert_eq!(map.trim(8).get(), CHUNK_PAGES, "of the other group");
    map.clear_poison(pages(3, 1));
    assert_eq!(map.trim(8).get(), CHUNK_PAGES);
}

#[test]
fn writing_whole_pages_clears() {
    let (_registry, map) = map(Geometry::M2, None);
    for n in [5, 6, 7, 9, 8, CHUNK_PAGES + 1] {
        map.memory_failure(pfn(n)).unwrap();
    }
    assert_eq!(map.bad_pages(), [pages(5, 5), pages(CHUNK_PAGES + 1, 1)]);
    assert_eq!(map.clear_poison(pages(6, 2)).get(), 2);
    assert_eq!(map.bad_pages(), [pages(5, 1), pages(8, 2), pages(CHUNK_PAGES + 1, 1)]);
    assert!(map.is_poisoned(pfn(0)), "some of the compound page is bad still");
    assert_eq!(map.clear_poison(pages(0, CHUNK_PAGES)).get(), 3);
    assert!(!map.is_poisoned(pfn(0)) && map.is_poisoned(pfn(CHUNK_PAGES)));
    drop(map.page(pfn(3)).unwrap());
    assert_eq!(map.clear_poison(pages(0, 4 * CHUNK_PAGES)).get(), 1);
    assert_eq!((map.bad_pages(), map.clear_poison(pages(0, 8))), (Vec::new(), PageCount::ZERO));
    let whole = map.claim(pages(0, 4 * CHUNK_PAGES)).unwrap();
    drop(whole);
}

#[test]
fn the_driver_may_see_to_it_himself() {
    struct Driver(Mutex<Vec<Pfn>>);
    impl PagemapOps for Driver {
        fn memory_failure(&self, _map: &Pagemap, failure: &Failure) -> Told {
            self.0.lock().unwrap().push(failure.pfn);
            Told::Mappers(3)
        }
    }
    let driver = Arc::new(Driver(Mutex::default()));
    let (registry, map) = map(Geometry::K4, Some(driver.clone()));
    let mapping = Mapping::new(pages(0, 100));
    map.add_mapper(mapping.clone());
    assert_eq!(registry.memory_failure(pfn(7)).unwrap().told, 3);
    assert_eq!((driver.0.lock().unwrap().as_slice(), mapping.1.lock().unwrap().len()), (&[pfn(7)][..], 0));
    assert!(registry.memory_failure(Pfn::new(1)).is_err(), "of no pagemap");
}
