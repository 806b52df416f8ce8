//! Pagemaps come, are found, and go: what is refused, in which order, and who is named.

use alloc::sync::Arc;
use std::string::{String, ToString};
use std::sync::Mutex;
use std::vec;
use std::vec::Vec;

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, Pfn, PfnRange};

use super::{Registry, UnregisterError};
use crate::device::{Device, DevicePage, MemoryType, Transfer, TransferError};
use crate::notifier::Owner;
use crate::pagemap::resource::ResourceKind;
use crate::pagemap::{DescriptorMemory, PageError, Pagemap, PagemapBuilder, PagemapOps, RegisterError, Spin};

const CHUNK: u64 = CHUNK_PAGES as u64;
const G1: u64 = 512 * CHUNK;

fn registry() -> Registry {
    Registry::new(Arc::new(Spin))
}

fn chunks(first: u64, count: usize) -> PfnRange {
    PfnRange::new(Pfn::new(first * CHUNK), PageCount::new(count * CHUNK_PAGES))
}

fn generic(range: PfnRange, geometry: Geometry) -> PagemapBuilder {
    Pagemap::builder("dax0.0", MemoryType::Generic).geometry(geometry).range(range)
}

/// A device of so many pages.
struct Vram(MemoryType, usize);

impl Device for Vram {
    fn name(&self) -> &str {
        "vram:"
    }

    fn memory_type(&self) -> MemoryType {
        self.0
    }

    fn capacity(&self) -> PageCount {
        PageCount::new(self.1)
    }

    fn write(&self, _batch: &mut [Transfer]) {}

    fn read(&self, _batch: &mut [Transfer]) {}

    fn discard(&self, _page: DevicePage, _pages: PageCount) -> Result<(), TransferError> {
        Ok(())
    }
}

fn refused(registry: &Registry, builder: PagemapBuilder) -> RegisterError {
    let before = registry.resources(|tree| tree.to_string());
    let why = registry.register(builder).expect_err("it should be refused");
    assert_eq!(registry.resources(|tree| tree.to_string()), before, "and nothing claimed");
    why
}

#[test]
fn arguments_are_checked_and_named() {
    let registry = registry();
    let refused = |builder| refused(&registry, builder);
    let none = Pagemap::builder("x", MemoryType::Generic);
    assert_eq!(refused(none), RegisterError::NoRange);
    let part = PfnRange::new(Pfn::new(CHUNK), PageCount::new(100));
    let why = refused(generic(part, Geometry::M2));
    assert_eq!(why, RegisterError::Misaligned(part, Geometry::M2));
    assert!(why.to_string().contains("2M"), "{why}");
    let empty = PfnRange::new(Pfn::new(CHUNK), PageCount::ZERO);
    assert_eq!(refused(generic(empty, Geometry::K4)), RegisterError::Misaligned(empty, Geometry::K4));
    let odd = PfnRange::new(Pfn::new(CHUNK + 1), PageCount::new(CHUNK_PAGES));
    assert_eq!(refused(generic(odd, Geometry::K4)), RegisterError::Subsection(odd));
    let far = PfnRange::new(Pfn::new((1 << 40) - CHUNK), PageCount::new(2 * CHUNK_PAGES));
    assert_eq!(refused(generic(far, Geometry::M2)), RegisterError::NotAddressable(far));
    let private = || Pagemap::builder("x", MemoryType::Private).range(chunks(1, 1));
    assert_eq!(refused(private()), RegisterError::NoDevice(MemoryType::Private));
    let other = private().device(Arc::new(Vram(MemoryType::Coherent, CHUNK_PAGES)));
    assert_eq!(refused(other), RegisterError::OtherType(MemoryType::Private, MemoryType::Coherent));
    let small = private().device(Arc::new(Vram(MemoryType::Private, 10)));
    assert_eq!(refused(small), RegisterError::Capacity(PageCount::new(CHUNK_PAGES), PageCount::new(10)));
    let vram = registry.register(private().device(Arc::new(Vram(MemoryType::Private, CHUNK_PAGES)))).unwrap();
    assert_eq!(vram.owner(), Owner::of_own(Pfn::new(CHUNK)));
}

#[test]
fn ranges_that_somebody_has_are_refused_with_his_name() {
    let registry = registry();
    registry.resources(|tree| tree.insert(chunks(0, 4), "System RAM", ResourceKind::SystemRam)).unwrap();
    let RegisterError::Conflict(ram) = refused(&registry, generic(chunks(3, 2), Geometry::M2)) else {
        panic!()
    };
    assert_eq!((&*ram.name, ram.range), ("System RAM", chunks(0, 4)));
    let _first = registry.register(generic(chunks(8, 4), Geometry::M2)).unwrap();
    let builder = Pagemap::builder("dax0.1", MemoryType::Generic).geometry(Geometry::M2);
    // The third range is in the way of the first pagemap's: the first two are given back.
    let builder = builder.range(chunks(4, 2)).range(chunks(20, 1)).range(chunks(11, 2));
    let RegisterError::Conflict(taken) = refused(&registry, builder) else { panic!() };
    assert_eq!((&*taken.name, taken.range, taken.wanted), ("dax0.0", chunks(8, 4), chunks(11, 2)));
    assert!(registry.find(Pfn::new(4 * CHUNK)).is_none());
    let _second = registry.register(generic(chunks(4, 2), Geometry::M2)).unwrap();
}

#[test]
fn a_pfn_finds_its_pagemap_whatever_lies_around_it() {
    let registry = registry();
    // Whole leaves, parts of leaves, and neighbours that share a node; the last one ends inside 2 MiB.
    let ranges = [(0, 1), (1, 1), (2, 1021), (1023, 1025), (2048, 1024), (4096, 3 << 20), (5 << 20, 7)];
    let maps: Vec<_> = ranges
        .iter()
        .map(|(first, count)| registry.register(generic(chunks(*first, *count), Geometry::M2)).unwrap())
        .collect();
    let odd = PfnRange::new(Pfn::new((6 << 20) * CHUNK), PageCount::new(CHUNK_PAGES + 3));
    let odd = registry.register(generic(odd, Geometry::K4)).unwrap();
    let reader = registry.read();
    let is = |pfn: u64, map: &Arc<Pagemap>| {
        reader.pagemap(Pfn::new(pfn)).is_some_and(|found| core::ptr::eq(found, Arc::as_ptr(map)))
    };
    for ((first, count), map) in ranges.iter().zip(&maps) {
        let (start, end) = (first * CHUNK, (first + *count as u64) * CHUNK);
        for pfn in [start, start + 1, (start + end) / 2, end - 1] {
            assert!(is(pfn, map), "{pfn:#x}");
        }
    }
    for pfn in [3072 * CHUNK, (4 << 20) * CHUNK, (5 << 20) * CHUNK + 7 * CHUNK, (1 << 40) - 1] {
        assert!(reader.pagemap(Pfn::new(pfn)).is_none(), "{pfn:#x}");
    }
    let start = odd.range().start.get();
    assert!(is(start + CHUNK + 2, &odd));
    assert!(reader.pagemap(Pfn::new(start + CHUNK + 3)).is_none(), "the rest of the 2 MiB is nobody's");
    drop(reader);
    for map in maps {
        registry.unregister(&map, &mut |_| false).unwrap();
        for range in map.ranges() {
            assert!(registry.find(range.start).is_none());
        }
    }
    // What was large, once more, where small ones have left nodes behind.
    let again = registry.register(generic(chunks(0, 4096), Geometry::M2)).unwrap();
    assert!(Arc::ptr_eq(&registry.find(Pfn::new(1023 * CHUNK)).unwrap(), &again));
}

#[test]
fn pages_of_several_ranges_follow_each_other_on_the_device() {
    let registry = registry();
    let builder = Pagemap::builder("dax0.0", MemoryType::Generic).geometry(Geometry::M2);
    let map = registry.register(builder.range(chunks(40, 2)).range(chunks(8, 3))).unwrap();
    assert_eq!(map.ranges().collect::<Vec<_>>(), [chunks(40, 2), chunks(8, 3)]);
    for (pfn, page) in [(40, 0), (41, 1), (8, 2), (10, 4)] {
        let (pfn, page) = (Pfn::new(pfn * CHUNK + 5), DevicePage(page * CHUNK + 5));
        assert_eq!((map.device_page(pfn), map.pfn_of(page)), (page, Some(pfn)));
    }
    assert_eq!(map.pfn_of(DevicePage(5 * CHUNK)), None);
    // What is allocated is consecutive: it ends where a range does.
    let all = PageCount::new(5 * CHUNK_PAGES);
    let [first, second] = [(); 2].map(|()| map.allocate_unique(all).unwrap());
    assert_eq!((first.pages(), second.pages()), (chunks(40, 2), chunks(8, 3)));
    assert_eq!(map.allocate_unique(all).unwrap_err(), PageError::Full);
    drop((first, second));
    let across = PfnRange::new(Pfn::new(41 * CHUNK), PageCount::new(2 * CHUNK_PAGES));
    assert!(
        matches!(map.pin(across), Err(PageError::Outside(_))),
        "a range of pfns is not one of the device"
    );
    registry.unregister(&map, &mut |_| false).unwrap();
}

/// Notes what it is asked, in order.
#[derive(Default)]
struct Steps(Mutex<Vec<String>>);

impl Steps {
    fn note(&self, step: impl Into<String>) {
        self.0.lock().unwrap().push(step.into());
    }

    fn taken(&self) -> Vec<String> {
        core::mem::take(&mut self.0.lock().unwrap())
    }
}

impl PagemapOps for Steps {
    fn page_free(&self, map: &Pagemap, pages: PfnRange) {
        assert_eq!(map.count(pages.start), 0);
        self.note(std::format!("free {}", pages.start.get() / CHUNK));
    }

    fn freeze(&self, map: &Pagemap) {
        assert!(map.page(map.range().start).is_ok(), "requests that are under way may still need pages");
        self.note("freeze");
    }

    fn thaw(&self, map: &Pagemap) {
        assert!(map.page(map.range().start).is_ok(), "requests need pages");
        self.note("thaw");
    }

    fn invalidate(&self, map: &Pagemap) {
        assert!(matches!(map.page(map.range().start), Err(PageError::Dying(_))), "nothing comes back");
        self.note("invalidate");
    }

    fn released(&self) {
        self.note("released");
    }
}

/// The order of the series that gave each page one reference to its pagemap: the queue is frozen before pages go, the
/// wait comes after the pages are unmapped, and what belongs to the queue goes last.
#[test]
fn teardown_freezes_refuses_invalidates_drains_and_frees() {
    let registry = registry();
    let steps = Arc::new(Steps::default());
    let map = registry.register(generic(chunks(8, 4), Geometry::M2).ops(steps.clone())).unwrap();
    let page = map.page(Pfn::new(9 * CHUNK)).unwrap();
    let mut rounds = 0;
    let busy = registry.unregister(&map, &mut |live| {
        assert_eq!(live.get(), CHUNK_PAGES);
        rounds += 1;
        rounds < 3
    });
    let Err(UnregisterError::Busy { name, live, holders }) = busy else { panic!("{busy:?}") };
    assert_eq!((&*name, live.get(), rounds), ("dax0.0", CHUNK_PAGES, 3));
    assert_eq!((holders.len(), holders[0].pages, holders[0].references), (1, chunks(9, 1), 1));
    if cfg!(debug_assertions) {
        let place = holders[0].place.expect("debug builds know where");
        assert!(place.file().ends_with("registry/tests.rs"), "{place}");
    }
    assert_eq!(steps.taken(), ["free 8", "freeze", "invalidate", "free 8", "thaw"]);
    // Everything works as before.
    drop(map.page(Pfn::new(8 * CHUNK)).unwrap());
    let mut page = Some(page);
    registry
        .unregister(&map, &mut |_| {
            steps.note("wait");
            drop(page.take());
            true
        })
        .unwrap();
    assert_eq!(steps.taken(), ["free 8", "free 8", "freeze", "invalidate", "wait", "free 9", "released"]);
    assert_eq!(registry.resources(|tree| tree.iter().count()), 0);
}

#[test]
fn of_two_teardowns_one_is_refused_and_a_third_comes_too_late() {
    let registry = registry();
    let map = registry.register(generic(chunks(8, 1), Geometry::M2)).unwrap();
    let mut page = Some(map.page(Pfn::new(8 * CHUNK)).unwrap());
    registry
        .unregister(&map, &mut |_| {
            let second = registry.unregister(&map, &mut |_| false);
            assert_eq!(second, Err(UnregisterError::UnderWay("dax0.0".into())));
            drop(page.take());
            true
        })
        .unwrap();
    let third = registry.unregister(&map, &mut |_| false);
    assert_eq!(third, Err(UnregisterError::NotRegistered("dax0.0".into())));
}

/// The BUG of the series that made compound pagemaps, at `memunmap_pages`: stepping through a 2M page in 4K put its
/// head once for every tail.
#[test]
fn teardown_steps_by_compound_pages() {
    for (geometry, step) in [(Geometry::K4, 1), (Geometry::M2, CHUNK), (Geometry::G1, G1)] {
        let registry = registry();
        let range = PfnRange::new(Pfn::new(4 * G1), PageCount::new(2 * G1 as usize));
        let map = registry.register(generic(range, geometry)).unwrap();
        // Mapped as a whole, pinned page by page and as a range, as gup does.
        let start = range.start;
        let mapped = map.page(start).unwrap();
        let singly: Vec<_> =
            (0..CHUNK_PAGES).map(|n| map.page(start.forward(PageCount::new(n))).unwrap()).collect();
        let pinned = map.pin(PfnRange::new(start, PageCount::new(CHUNK_PAGES))).unwrap();
        let heads = (CHUNK.div_ceil(step)) as usize;
        assert_eq!(map.live().get(), heads * step as usize);
        let of_head = 1 + CHUNK_PAGES / heads + 1;
        assert_eq!(map.count(start) as usize, of_head);
        assert_eq!(
            map.count(start.forward(PageCount::new(step as usize - 1))) as usize,
            of_head,
            "a tail is its head"
        );
        assert!(registry.unregister(&map, &mut |_| false).is_err());
        drop((mapped, pinned));
        crate::pagemap::release_pages(singly);
        assert_eq!((map.live(), map.count(start)), (PageCount::ZERO, 0));
        registry.unregister(&map, &mut |_| false).unwrap();
    }
}

#[test]
fn descriptors_may_lie_on_the_device() {
    let registry = registry();
    let (range, kind) = (chunks(8, 8), MemoryType::Generic);
    let least = PagemapBuilder::pages_to_reserve(range.pages, Geometry::K4, kind);
    let mut area = vec![0_u64; least.bytes() / 8];
    let memory = DescriptorMemory::new(core::ptr::NonNull::new(area.as_mut_ptr()).unwrap().cast());
    let on_device = |geometry, reserved| {
        // SAFETY: the vector is as long, zero, aligned, and outlives the registry's use of it.
        unsafe { generic(range, geometry).descriptors_on_device(memory, reserved) }
    };
    let too_few = PageCount::new(least.get() - 1);
    let why = refused(&registry, on_device(Geometry::K4, too_few));
    assert!(
        matches!(why, RegisterError::Reserved { given, needed, .. } if given == too_few && needed == least),
        "{why}"
    );
    assert!(matches!(refused(&registry, on_device(Geometry::M2, least)), RegisterError::Reserved { .. }));
    let map = registry.register(on_device(Geometry::K4, least)).unwrap();
    assert_eq!(map.reserved(), least);
    let (last, first) = (range.start.forward(too_few), range.start.forward(least));
    assert_eq!(map.page(last).unwrap_err(), PageError::Reserved(last));
    assert!(matches!(map.memory_failure(last), Err(PageError::Reserved(_))));
    assert_eq!(map.device_page(first), DevicePage(least.get() as u64), "device pages count from the start");
    let page = map.page(first).unwrap();
    assert_eq!(page.head(), first);
    let all = map.allocate_unique(range.pages).unwrap();
    assert!(all.pages().start >= first, "what is reserved is not given out");
    assert!(area.iter().any(|word| *word != 0), "the counts are there");
    drop((page, all));
    registry.unregister(&map, &mut |_| false).unwrap();
    let private = Pagemap::builder("x", MemoryType::Private).range(range);
    let private = private.device(Arc::new(Vram(MemoryType::Private, range.pages.get())));
    // SAFETY: as above.
    let private = unsafe { private.descriptors_on_device(memory, least) };
    assert_eq!(refused(&registry, private), RegisterError::ReservedPrivate);
}

#[test]
fn a_registry_that_is_dropped_keeps_what_handles_point_to() {
    let registry = registry();
    let map = registry.register(generic(chunks(8, 1), Geometry::M2)).unwrap();
    let page = map.page(Pfn::new(8 * CHUNK)).unwrap();
    drop((registry, map));
    assert_eq!((page.count(), page.pagemap().name()), (1, "dax0.0"));
    assert!(matches!(page.pagemap().page(Pfn::new(8 * CHUNK)), Err(PageError::Dying(_))));
    drop(page);
}
