//! Reference counts under loom: freed exactly once, never allocated while the device discards, found or refused while
//! a pagemap goes away.

use core::ptr::NonNull;
use std::sync::Arc;

use ::loom::cell::UnsafeCell;
use ::loom::thread;
use uhmm_addr::{CHUNK_PAGES, PageCount, Pfn, PfnRange};

use super::descriptors::{Denied, Descriptors, Left};
use super::readers::Readers;
use super::shape::{GROUP_PAGES, Shape};
use super::{PageError, Pagemap, PagemapOps, Registry, Spin};
use crate::device::MemoryType;
use crate::sync::{AtomicU32, Ordering};

/// One group, and what the device holds there.
struct Group {
    counts: Descriptors,
    contents: UnsafeCell<u32>,
}

// SAFETY: the contents are accessed by the owner of a page or of a guard, which is what the models check.
unsafe impl Sync for Group {}
// SAFETY: as above.
unsafe impl Send for Group {}

impl Group {
    fn new() -> Arc<Self> {
        let counts = Descriptors::owned(Shape { units: GROUP_PAGES, data: false });
        Arc::new(Self { counts, contents: UnsafeCell::new(0) })
    }

    fn allocate(&self, most: usize) -> Option<(usize, usize)> {
        self.counts.allocate(0, most, false, |_| GROUP_PAGES)
    }

    fn allocate_group(&self) -> Option<usize> {
        self.counts.allocate_group(|_| GROUP_PAGES)
    }

    fn get(&self, page: usize) {
        Descriptors::get(self.counts.unit(page));
    }

    fn put(&self, page: usize) {
        self.put_telling(page, None);
    }

    fn put_telling(&self, page: usize, freed: Option<&dyn Fn(usize, usize)>) {
        // SAFETY: the caller's reference is given up.
        let left = unsafe { Descriptors::put(NonNull::from(&self.counts), page, 1, freed) };
        left.into_iter().for_each(Left::count_out);
    }

    /// What the owner of the pages, or of the guard, does to them.
    fn touch(&self) {
        // SAFETY: the caller owns them; loom reports anybody besides.
        self.contents.with_mut(|value| unsafe { *value += 1 });
    }

    fn assert_empty(&self) {
        assert_eq!(self.counts.live(), 0);
        assert_eq!(self.allocate(GROUP_PAGES), Some((0, GROUP_PAGES)), "all of it is free");
    }
}

#[test]
fn the_last_of_two_references_frees() {
    ::loom::model(|| {
        let group = Group::new();
        let (page, _) = group.allocate(1).unwrap();
        group.get(page);
        let other = group.clone();
        let thread = thread::spawn(move || other.put(page));
        group.put(page);
        thread.join().unwrap();
        group.assert_empty();
    });
}

#[test]
fn two_allocations_get_different_pages() {
    ::loom::model(|| {
        let group = Group::new();
        let other = group.clone();
        let thread = thread::spawn(move || other.allocate(1));
        let (mine, theirs) = (group.allocate(1), thread.join().unwrap());
        let (mine, theirs) = (mine.expect("there is room").0, theirs.expect("there is room").0);
        assert_ne!(mine, theirs);
        assert_eq!(group.counts.live(), 2);
        group.put(mine);
        group.put(theirs);
        group.assert_empty();
    });
}

#[test]
fn a_guarded_group_is_nobody_elses() {
    ::loom::model(|| {
        let group = Group::new();
        let all = group.allocate(GROUP_PAGES).unwrap();
        assert_eq!(all, (0, GROUP_PAGES));
        group.put(1);
        let (owner, trimmer) = (group.clone(), group.clone());
        let owner = thread::spawn(move || {
            owner.touch();
            owner.put(0);
        });
        let trimmer = thread::spawn(move || {
            if let Some(found) = trimmer.counts.guard_idle_group() {
                trimmer.touch();
                trimmer.counts.unguard(found);
            }
        });
        // Whole or not at all, so that the contents have one owner.
        if let Some(page) = group.allocate_group() {
            group.touch();
            (page..page + GROUP_PAGES).for_each(|page| group.put(page));
        }
        owner.join().unwrap();
        trimmer.join().unwrap();
        group.assert_empty();
    });
}

#[test]
fn a_page_is_not_allocated_out_of_a_guarded_group() {
    ::loom::model(|| {
        let group = Group::new();
        let (page, _) = group.allocate(1).unwrap();
        group.put(page);
        let trimmer = group.clone();
        let trimmer = thread::spawn(move || {
            if let Some(found) = trimmer.counts.guard_idle_group() {
                trimmer.touch();
                trimmer.counts.unguard(found);
            }
        });
        if let Some((page, _)) = group.allocate(1) {
            group.touch();
            group.put(page);
        }
        trimmer.join().unwrap();
        group.assert_empty();
    });
}

#[test]
fn a_group_goes_whole_or_page_by_page() {
    ::loom::model(|| {
        let group = Group::new();
        let other = group.clone();
        let whole = thread::spawn(move || other.allocate_group());
        let single = group.allocate(1);
        let whole = whole.join().unwrap();
        assert!(whole.is_some() ^ single.is_some(), "{whole:?} and {single:?}");
        let pages = if whole.is_some() { GROUP_PAGES } else { 1 };
        assert_eq!(group.counts.live(), pages);
        (0..GROUP_PAGES).filter(|page| group.counts.count(*page) > 0).for_each(|page| group.put(page));
        group.assert_empty();
    });
}

#[test]
fn a_page_is_found_in_use_or_not_at_all() {
    ::loom::model(|| {
        let group = Group::new();
        let (page, _) = group.allocate(1).unwrap();
        let finder = group.clone();
        let finder = thread::spawn(move || match finder.counts.find(page, false) {
            // Whoever has a reference reads what the owner wrote, and frees it if he is the last.
            Ok(()) => finder.put(page),
            Err(why) => assert_eq!(why, Denied::Free),
        });
        group.put(page);
        finder.join().unwrap();
        group.assert_empty();
    });
}

#[test]
fn nobody_gets_a_page_before_its_driver_was_told() {
    ::loom::model(|| {
        let group = Group::new();
        let (page, _) = group.allocate(1).unwrap();
        let other = group.clone();
        let other = thread::spawn(move || {
            if other.counts.find(page, true).is_ok() {
                let told = |_: usize, _: usize| other.touch();
                other.put_telling(page, Some(&told));
            }
        });
        let told = |_: usize, _: usize| group.touch();
        group.put_telling(page, Some(&told));
        other.join().unwrap();
        group.assert_empty();
    });
}

#[test]
fn one_of_two_has_a_page_for_himself() {
    ::loom::model(|| {
        let group = Group::new();
        let other = group.clone();
        let claim = |group: &Group| {
            let got = group.counts.seize(0).is_ok();
            if got {
                group.touch();
                group.put(0);
            }
            got
        };
        let thread = thread::spawn(move || claim(&other));
        let (mine, theirs) = (claim(&group), thread.join().unwrap());
        assert!(mine || theirs);
        group.assert_empty();
    });
}

#[test]
fn a_sole_holder_is_alone() {
    ::loom::model(|| {
        let group = Group::new();
        let (page, _) = group.allocate(1).unwrap();
        group.get(page);
        let other = group.clone();
        let thread = thread::spawn(move || {
            if other.counts.make_sole(page) {
                other.touch();
            }
            other.put(page);
        });
        if group.counts.make_sole(page) {
            group.touch();
        }
        group.put(page);
        thread.join().unwrap();
        group.assert_empty();
    });
}

#[test]
fn what_is_drained_stays_so() {
    ::loom::model(|| {
        let group = Group::new();
        let other = group.clone();
        let user = thread::spawn(move || {
            if other.counts.find(0, true).is_ok() {
                other.touch();
                other.put(0);
            }
        });
        group.counts.refuse();
        if group.counts.live() == 0 {
            // The descriptors, and what they are about, are the teardown's.
            group.touch();
        }
        user.join().unwrap();
        assert_eq!(group.counts.live(), 0);
        assert_eq!(group.counts.find(0, true), Err(Denied::Dying));
        assert_eq!(group.allocate(1), None);
        group.counts.accept();
        group.assert_empty();
    });
}

#[test]
fn a_cured_page_leaves_no_other_out() {
    ::loom::model(|| {
        let group = Group::new();
        assert!(group.counts.poison(0));
        let other = group.clone();
        let thread = thread::spawn(move || assert!(other.counts.poison(1)));
        group.counts.cure(0);
        thread.join().unwrap();
        assert!(!group.counts.is_poisoned(0) && group.counts.is_poisoned(1));
        assert_eq!(group.allocate_group(), None, "a group with a bad page is not given out whole");
        assert_eq!(group.allocate(2), Some((0, 1)), "but its good pages are");
        group.put(0);
    });
}

/// What readers look at, and whether it is still to be found.
struct Published {
    readers: Readers,
    there: AtomicU32,
    contents: UnsafeCell<u32>,
}

// SAFETY: the contents are read by readers who found them, and written when none is left, which is what the model
// checks.
unsafe impl Sync for Published {}
// SAFETY: as above.
unsafe impl Send for Published {}

#[test]
fn what_readers_look_at_is_not_taken_away() {
    ::loom::model(|| {
        let published =
            Published { readers: Readers::default(), there: AtomicU32::new(1), contents: UnsafeCell::new(1) };
        let published = Arc::new(published);
        let other = published.clone();
        let reader = thread::spawn(move || {
            let reading = other.readers.begin();
            if other.there.load(Ordering::Acquire) == 1 {
                // SAFETY: the writer waits for us; loom reports if he does not.
                assert_eq!(other.contents.with(|contents| unsafe { *contents }), 1);
            }
            drop(reading);
        });
        published.there.store(0, Ordering::Release);
        published.readers.synchronize(&Spin);
        // SAFETY: as above.
        published.contents.with_mut(|contents| unsafe { *contents = 2 });
        reader.join().unwrap();
    });
}

#[test]
fn of_two_who_take_away_each_waits_for_the_readers() {
    ::loom::model(|| {
        let published = Arc::new(Published {
            readers: Readers::default(),
            there: AtomicU32::new(1),
            contents: UnsafeCell::new(1),
        });
        let (looker, other) = (published.clone(), published.clone());
        let reader = thread::spawn(move || {
            let reading = looker.readers.begin();
            if looker.there.load(Ordering::Acquire) == 1 {
                // SAFETY: the writer waits for us; loom reports if he does not.
                assert_eq!(looker.contents.with(|contents| unsafe { *contents }), 1);
            }
            drop(reading);
        });
        // Somebody else takes something else away.
        let other = thread::spawn(move || other.readers.synchronize(&Spin));
        published.there.store(0, Ordering::Release);
        published.readers.synchronize(&Spin);
        // SAFETY: as above.
        published.contents.with_mut(|contents| unsafe { *contents = 2 });
        reader.join().unwrap();
        other.join().unwrap();
    });
}

const RANGE: PfnRange = PfnRange::new(Pfn::new(0), PageCount::new(CHUNK_PAGES));

/// Notes that it was told, and that the pages were gone then.
#[derive(Default)]
struct Gone(std::sync::atomic::AtomicU32);

impl PagemapOps for Gone {
    fn released(&self) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

fn registered(ops: Arc<Gone>) -> (Arc<Registry>, Arc<Pagemap>) {
    let registry = Arc::new(Registry::new(Arc::new(Spin)));
    let builder = Pagemap::builder("dax0.0", MemoryType::Generic).geometry(uhmm_addr::Geometry::M2);
    let map = registry.register(builder.range(RANGE).ops(ops)).unwrap();
    (registry, map)
}

#[test]
fn a_look_up_beside_the_teardown_finds_all_or_nothing() {
    ::loom::model(|| {
        let gone = Arc::new(Gone::default());
        let (registry, map) = registered(gone.clone());
        let (other, seen) = (registry.clone(), gone.clone());
        let user = thread::spawn(move || match other.page(RANGE.start) {
            Ok(page) => {
                assert_eq!(seen.0.load(std::sync::atomic::Ordering::Relaxed), 0, "a page keeps its pagemap");
                drop(page.clone());
                drop(page);
            }
            Err(why) => assert!(matches!(why, PageError::Dying(_) | PageError::Outside(_)), "{why}"),
        });
        let mut wait = |_: PageCount| {
            thread::yield_now();
            true
        };
        registry.unregister(&map, &mut wait).unwrap();
        assert_eq!(gone.0.load(std::sync::atomic::Ordering::Relaxed), 1);
        user.join().unwrap();
        assert!(registry.find(RANGE.start).is_none());
    });
}

#[test]
fn a_teardown_that_gives_up_leaves_everything_usable() {
    ::loom::model(|| {
        let (registry, map) = registered(Arc::default());
        let other = registry.clone();
        let user = thread::spawn(move || other.page(RANGE.start).is_ok());
        let gone = registry.unregister(&map, &mut |_| false).is_ok();
        let found = user.join().unwrap();
        // A page that was had and given back again may have been missed; one that was refused was refused in time.
        assert_eq!(registry.page(RANGE.start).is_ok(), !gone, "found meanwhile: {found}");
    });
}

/// Truncation against a transfer, as fs-dax does both: who transfers refers to the page, who gives it to another file claims
/// it first.
#[test]
fn a_page_that_is_transferred_is_given_to_nobody() {
    ::loom::model(|| {
        let group = Group::new();
        let other = group.clone();
        let transfer = thread::spawn(move || {
            if other.counts.find(0, true).is_ok() {
                // SAFETY: nobody writes while this reads, or loom reports it.
                other.contents.with(|value| unsafe { assert!(*value < 2) });
                other.put(0);
            }
        });
        // The next owner writes to it.
        let gone = group.counts.seize(0).is_ok();
        if gone {
            group.touch();
            group.put(0);
        }
        transfer.join().unwrap();
        assert!(
            gone || group.counts.seize(0).is_ok_and(|()| {
                group.put(0);
                true
            }),
            "a claim that was refused succeeds when the transfer has ended"
        );
        group.assert_empty();
    });
}

#[test]
fn of_an_empty_device_that_is_stopped_no_page_is_taken() {
    ::loom::model(|| {
        let registry = Registry::new(Arc::new(Spin));
        let range = PfnRange::new(Pfn::new(0), PageCount::new(CHUNK_PAGES));
        let map = registry.register(Pagemap::builder("node", MemoryType::Generic).range(range)).unwrap();
        let other = map.clone();
        let taker = thread::spawn(move || other.allocate(PageCount::ONE));
        map.stop_allocation(true);
        let empty = map.live().is_zero();
        let taken = taker.join().unwrap();
        assert!(!empty || taken.is_none(), "the device is gone, and a page of it in use");
        assert_eq!(map.live(), taken.map_or(PageCount::ZERO, |taken| taken.pages));
        // SAFETY: the reference of the allocation; there is no handle.
        taken.into_iter().for_each(|taken| unsafe { map.put_counted(taken) });
        registry.unregister(&map, &mut |_| false).unwrap();
    });
}
