//! Device pages: allocation, references, trimming.

use alloc::sync::Arc;
use std::sync::Mutex;
use std::vec;
use std::vec::Vec;

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, Pfn, PfnRange};

use super::descriptors::{Descriptors, Left};
use super::resource::ResourceKind;
use super::shape::Shape;
use super::{
    AddError, DescriptorMemory, GROUP_PAGES, MOST_ADDED, PageError, Pagemap, PagemapSet, Registry,
    UnregisterError,
};
use crate::device::{Device, DevicePage, MemoryType, Transfer, TransferError};
use crate::notifier::Owner;
use crate::sync::Ordering;

/// A device that only remembers what was discarded.
pub(super) struct Discards {
    pages: usize,
    seen: Mutex<Vec<(u64, usize)>>,
    refuses: bool,
}

impl Device for Discards {
    fn name(&self) -> &str {
        "discards:"
    }

    fn memory_type(&self) -> MemoryType {
        MemoryType::Private
    }

    fn capacity(&self) -> PageCount {
        PageCount::new(self.pages)
    }

    fn write(&self, _batch: &mut [Transfer]) {}

    fn read(&self, _batch: &mut [Transfer]) {}

    fn discard(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        self.seen.lock().unwrap().push((page.0, pages.get()));
        if self.refuses { Err(TransferError::Io(95)) } else { Ok(()) }
    }
}

const START: Pfn = Pfn::new(1000);

pub(super) fn device(pages: usize, refuses: bool) -> Arc<Discards> {
    Arc::new(Discards { pages, seen: Mutex::default(), refuses })
}

fn map(pages: usize) -> Pagemap {
    Pagemap::new(START, device(pages, false))
}

fn allocate(map: &Pagemap, most: usize) -> Option<(u64, usize)> {
    map.allocate(PageCount::new(most)).map(|got| (got.start.get() - START.get(), got.pages.get()))
}

fn pfn(n: usize) -> Pfn {
    START.forward(PageCount::new(n))
}

#[test]
fn pages_are_handed_out_in_order_and_come_back() {
    let map = map(8);
    assert_eq!(allocate(&map, 3), Some((0, 3)));
    assert_eq!(allocate(&map, 3), Some((3, 3)));
    assert_eq!(allocate(&map, 3), Some((6, 2)), "as many as are left");
    assert_eq!(allocate(&map, 1), None);
    assert_eq!(map.live().get(), 8);
    map.put(pfn(4));
    map.put(pfn(1));
    map.put(pfn(2));
    assert_eq!(allocate(&map, 8), Some((1, 2)), "the search goes round");
    assert_eq!(allocate(&map, 8), Some((4, 1)));
    map.put_range(PfnRange::new(START, PageCount::new(8)));
    assert_eq!(map.live(), PageCount::ZERO);
}

#[test]
fn a_page_is_free_when_the_last_reference_is_put() {
    let map = map(4);
    assert_eq!(allocate(&map, 1), Some((0, 1)));
    map.get(pfn(0));
    assert_eq!(map.count(pfn(0)), 2);
    map.put(pfn(0));
    assert_eq!((map.count(pfn(0)), map.live().get()), (1, 1));
    map.put(pfn(0));
    assert_eq!((map.count(pfn(0)), map.live().get()), (0, 0));
}

#[test]
fn a_pagemap_has_an_owner_to_itself_unless_it_is_said_to_share_one() {
    let at = |start, owner: Option<u64>| {
        let device = Discards { pages: 4, seen: Mutex::default(), refuses: false };
        let map = Pagemap::new(Pfn::new(start), Arc::new(device));
        if let Some(owner) = owner { map.owned_by(Owner(owner)) } else { map }
    };
    assert_ne!(at(0, None).owner(), at(4, None).owner());
    assert_eq!(at(4, None).owner(), at(4, None).owner(), "in another process as well");
    assert!(at(0, None).owner().0 >= Owner::FIRST_OWN);
    assert_eq!(at(0, Some(7)).owner(), at(4, Some(7)).owner());
}

#[test]
#[should_panic(expected = "a reference too few")]
#[cfg(debug_assertions)]
fn a_reference_too_few_is_a_bug() {
    map(4).put(pfn(2));
}

#[test]
#[should_panic(expected = "a reference to the free page")]
#[cfg(debug_assertions)]
fn a_reference_to_a_free_page_is_a_bug() {
    map(4).get(pfn(2));
}

#[test]
fn allocations_stay_inside_a_group() {
    let map = map(2 * GROUP_PAGES + 10);
    assert_eq!(allocate(&map, 500), Some((0, 500)));
    assert_eq!(allocate(&map, 500), Some((500, 12)));
    assert_eq!(allocate(&map, 5000), Some((512, 512)));
    assert_eq!(allocate(&map, 5000), Some((1024, 10)));
    assert_eq!(allocate(&map, 1), None);
}

#[test]
fn huge_pages_are_whole_free_groups() {
    let map = map(3 * GROUP_PAGES + 5);
    assert_eq!(allocate(&map, 1), Some((0, 1)));
    let first = map.allocate_huge().unwrap();
    assert_eq!((first.start, first.pages.get()), (pfn(GROUP_PAGES), GROUP_PAGES));
    assert_eq!(map.allocate_huge().unwrap().start, pfn(2 * GROUP_PAGES));
    assert_eq!(map.allocate_huge(), None, "the first is in use, the last too short");
    assert_eq!(map.live().get(), 1 + 2 * GROUP_PAGES);
    // A part of it given back is not a group again, the rest of it makes it one.
    map.put(pfn(GROUP_PAGES + 3));
    assert_eq!(map.allocate_huge(), None);
    map.put_range(PfnRange::new(pfn(GROUP_PAGES), PageCount::new(3)));
    map.put_range(PfnRange::new(pfn(GROUP_PAGES + 4), PageCount::new(GROUP_PAGES - 4)));
    assert_eq!(map.allocate_huge(), Some(first));
}

#[test]
fn trim_gives_back_what_was_used_and_is_empty() {
    for refuses in [false, true] {
        let device = device(2 * GROUP_PAGES + 10, refuses);
        let map = Pagemap::new(START, device.clone());
        assert_eq!(map.trim(8), PageCount::ZERO, "nothing was used");
        let (first, second, last) = (
            map.allocate(PageCount::new(GROUP_PAGES)).unwrap(),
            map.allocate(PageCount::new(1)).unwrap(),
            map.allocate_huge(),
        );
        assert_eq!((second.start, last), (pfn(GROUP_PAGES), None));
        map.put_range(first);
        let given = if refuses { 0 } else { GROUP_PAGES };
        assert_eq!(map.trim(8).get(), given);
        assert_eq!(*device.seen.lock().unwrap(), vec![(0, GROUP_PAGES)], "the second group is in use");
        assert_eq!(map.trim(8), PageCount::ZERO, "once");
        assert_eq!(map.allocate_huge(), Some(first), "and it can be used again");
    }
}

#[test]
fn trim_of_the_short_group_at_the_end() {
    let device = device(GROUP_PAGES + 10, false);
    let map = Pagemap::new(START, device.clone());
    let _all = map.allocate(PageCount::new(GROUP_PAGES)).unwrap();
    map.put_range(map.allocate(PageCount::new(GROUP_PAGES)).unwrap());
    assert_eq!(map.trim(1).get(), 10);
    assert_eq!(*device.seen.lock().unwrap(), vec![(GROUP_PAGES as u64, 10)]);
}

#[test]
fn a_guard_keeps_allocation_out() {
    let counts = Descriptors::owned(Shape { units: GROUP_PAGES, data: false });
    assert_eq!(counts.guard_idle_group(), None, "never used");
    let end = |_| GROUP_PAGES;
    assert_eq!(counts.allocate(0, 1, false, end), Some((0, 1)));
    assert_eq!(counts.guard_idle_group(), None, "in use");
    // SAFETY: the reference of the allocation.
    let left = unsafe { Descriptors::put(core::ptr::NonNull::from(&counts), 0, 1, None) };
    left.into_iter().for_each(Left::count_out);
    assert_eq!(counts.guard_idle_group(), Some(0));
    assert_eq!(counts.guard_idle_group(), None, "guarded already");
    assert_eq!((counts.allocate(0, 1, false, end), counts.allocate_group(end)), (None, None));
    counts.unguard(0);
    assert_eq!(counts.allocate_group(end), Some(0));
}

#[test]
fn what_the_killed_have_begun_is_undone() {
    const BIT_31: u32 = 1 << 31;
    let counts = Descriptors::owned(Shape { units: 3 * GROUP_PAGES, data: false });
    let end = |unit: usize| (unit / GROUP_PAGES + 1) * GROUP_PAGES;
    for group in 0..3 {
        assert_eq!(counts.allocate_group(end), Some(group * GROUP_PAGES));
    }
    assert_eq!(counts.free_all(), 3 * GROUP_PAGES);
    // Killed while a group was discarded; and between the steps of taking three units: counted in the group alone.
    assert_eq!(counts.guard_idle_group(), Some(0));
    assert_ne!(counts.group(0).load(Ordering::Relaxed) & BIT_31, 0);
    counts.group(GROUP_PAGES).fetch_add(3, Ordering::Relaxed);
    assert_eq!((counts.live(), counts.allocate_group(end)), (0, Some(2 * GROUP_PAGES)), "neither of the two");
    assert_eq!(counts.free_all(), GROUP_PAGES);
    assert_eq!([counts.guard_idle_group(), counts.guard_idle_group()], [Some(0), Some(1)], "to be discarded");
    counts.unguard(0);
    counts.unguard(1);
    let groups = [0; 4].map(|_| counts.allocate_group(end).map(|first| first / GROUP_PAGES));
    assert_eq!(groups, [Some(0), Some(1), Some(2), None]);
    assert_eq!(counts.live(), 3 * GROUP_PAGES);
}

#[test]
fn processes_that_share_the_descriptors_share_the_pages() {
    let device = device(16, false);
    let mut memory = vec![0_u64; DescriptorMemory::bytes_for(PageCount::new(16)).div_ceil(8)];
    let words = core::ptr::NonNull::new(memory.as_mut_ptr()).unwrap().cast();
    // SAFETY: the vector is long enough, zero, aligned to 8, and outlives both.
    let [a, b] =
        [(); 2].map(|()| unsafe { Pagemap::over(START, device.clone(), DescriptorMemory::new(words)) });
    assert_eq!((allocate(&a, 4), allocate(&b, 4)), (Some((0, 4)), Some((4, 4))));
    b.put(pfn(0));
    assert_eq!((a.count(pfn(0)), a.live().get(), b.live().get()), (0, 7, 7));
}

#[test]
fn a_set_finds_the_pagemap_of_a_pfn() {
    let maps = [0, 100, 50].map(|start| Arc::new(Pagemap::new(Pfn::new(start), device(50, false))));
    let set = PagemapSet::new(maps.clone());
    for (pfn, expected) in [(0, 0), (49, 0), (50, 2), (99, 2), (100, 1), (149, 1)] {
        assert!(Arc::ptr_eq(set.of(Pfn::new(pfn)), &maps[expected]), "pfn {pfn}");
    }
    assert_eq!(set.iter().count(), 3);
    assert_eq!(maps[1].device_page(Pfn::new(103)), DevicePage(3));
}

#[test]
#[should_panic(expected = "overlaps")]
fn overlapping_pagemaps_are_refused() {
    let maps = [0, 49].map(|start| Arc::new(Pagemap::new(Pfn::new(start), device(50, false))));
    let _ = PagemapSet::new(maps);
}

fn of_two_ranges() -> Arc<Pagemap> {
    let ranges = [0, 4].map(|chunk| PfnRange::new(Pfn::new(chunk * CHUNK_PAGES as u64), PageCount::new(512)));
    let builder = Pagemap::builder("two", MemoryType::Generic).range(ranges[0]).range(ranges[1]);
    registry().register(builder).unwrap()
}

#[test]
#[should_panic(expected = "a pagemap of a space has one range of pfns, this one has 2")]
fn a_pagemap_of_several_ranges_is_no_space_s() {
    let _ = PagemapSet::new([of_two_ranges()]);
}

#[test]
fn what_is_added_is_found_and_what_does_not_fit_is_refused() {
    let [first, second, over] =
        [0, 50, 99].map(|start| Arc::new(Pagemap::new(Pfn::new(start), device(50, false))));
    let set = PagemapSet::new([first.clone()]);
    assert_eq!(set.add(second.clone()), Ok(1));
    assert!(Arc::ptr_eq(set.of(Pfn::new(99)), &second) && Arc::ptr_eq(set.get(1).unwrap(), &second));
    assert_eq!(set.added().count(), 1);
    assert_eq!(set.add(over.clone()), Err(AddError::Overlap(over.range(), second.range())));
    assert_eq!(set.add(of_two_ranges()), Err(AddError::Ranges(2)));
    for n in 1..MOST_ADDED {
        let map = Arc::new(Pagemap::new(Pfn::new(1000 + 50 * n as u64), device(50, false)));
        assert_eq!(set.add(map), Ok(1 + n));
    }
    let more = Arc::new(Pagemap::new(Pfn::new(1 << 20), device(50, false)));
    assert_eq!(set.add(more.clone()), Err(AddError::TooMany));
    assert!(set.get(1 + MOST_ADDED).is_none());
    drop(set);
    assert_eq!([&first, &second, &more].map(Arc::strong_count), [1; 3], "freed with the set");
}

#[test]
#[should_panic(expected = "a pfn without a pagemap")]
fn a_pfn_of_nobody_is_a_bug() {
    let _ = PagemapSet::default().of(Pfn::new(1));
}

fn registry() -> Registry {
    Registry::new(Arc::new(super::Spin))
}

#[test]
fn a_pagemap_comes_and_goes() {
    let registry = registry();
    let region = registry.resources(|tree| {
        let kind = ResourceKind::PersistentMemory;
        tree.request_free_region(
            PageCount::new(4 * CHUNK_PAGES),
            PageCount::new(CHUNK_PAGES),
            "region0",
            kind,
        )
    });
    let region = region.unwrap();
    let builder = Pagemap::builder("dax0.0", MemoryType::Generic).range(region.range).geometry(Geometry::M2);
    let map = registry.register(builder).unwrap();
    let tail = region.range.start.forward(PageCount::new(CHUNK_PAGES + 3));
    let page = registry.page(tail).unwrap();
    assert_eq!((page.head(), page.count()), (region.range.start.forward(PageCount::new(CHUNK_PAGES)), 1));
    assert!(Arc::ptr_eq(&registry.find(tail).unwrap(), &map));
    let busy = registry.unregister(&map, &mut |_| false).unwrap_err();
    assert!(matches!(&busy, UnregisterError::Busy { live, .. } if live.get() == CHUNK_PAGES), "{busy}");
    drop((page.clone(), page));
    registry.unregister(&map, &mut |_| false).unwrap();
    assert!(registry.find(tail).is_none());
    assert!(matches!(map.page(tail), Err(PageError::Dying(_))));
}
