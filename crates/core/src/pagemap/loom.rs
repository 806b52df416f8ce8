//! Reference counts under loom: freed exactly once, and never allocated while the device discards.

use std::sync::Arc;

use ::loom::cell::UnsafeCell;
use ::loom::thread;
use uhmm_addr::PageCount;

use super::descriptors::{Descriptors, GROUP_PAGES};

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
        let counts = Descriptors::owned(PageCount::new(GROUP_PAGES));
        Arc::new(Self { counts, contents: UnsafeCell::new(0) })
    }

    /// What the owner of the pages, or of the guard, does to them.
    fn touch(&self) {
        // SAFETY: the caller owns them; loom reports anybody besides.
        self.contents.with_mut(|value| unsafe { *value += 1 });
    }

    fn assert_empty(&self) {
        assert_eq!(self.counts.live(), PageCount::ZERO);
        assert_eq!(self.counts.allocate(0, GROUP_PAGES), Some((0, GROUP_PAGES)), "all of it is free");
    }
}

#[test]
fn the_last_of_two_references_frees() {
    ::loom::model(|| {
        let group = Group::new();
        let (page, _) = group.counts.allocate(0, 1).unwrap();
        group.counts.get(page);
        let other = group.clone();
        let thread = thread::spawn(move || other.counts.put(page));
        group.counts.put(page);
        thread.join().unwrap();
        group.assert_empty();
    });
}

#[test]
fn two_allocations_get_different_pages() {
    ::loom::model(|| {
        let group = Group::new();
        let other = group.clone();
        let thread = thread::spawn(move || other.counts.allocate(0, 1));
        let (mine, theirs) = (group.counts.allocate(0, 1), thread.join().unwrap());
        let (mine, theirs) = (mine.expect("there is room").0, theirs.expect("there is room").0);
        assert_ne!(mine, theirs);
        assert_eq!(group.counts.live().get(), 2);
        group.counts.put(mine);
        group.counts.put(theirs);
        group.assert_empty();
    });
}

#[test]
fn a_guarded_group_is_nobody_elses() {
    ::loom::model(|| {
        let group = Group::new();
        let all = group.counts.allocate(0, GROUP_PAGES).unwrap();
        assert_eq!(all, (0, GROUP_PAGES));
        group.counts.put(1);
        let (owner, trimmer) = (group.clone(), group.clone());
        let owner = thread::spawn(move || {
            owner.touch();
            owner.counts.put(0);
        });
        let trimmer = thread::spawn(move || {
            if let Some(found) = trimmer.counts.guard_idle_group() {
                trimmer.touch();
                trimmer.counts.unguard(found);
            }
        });
        // Whole or not at all, so that the contents have one owner.
        if let Some(page) = group.counts.allocate_group() {
            group.touch();
            (page..page + GROUP_PAGES).for_each(|page| group.counts.put(page));
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
        let (page, _) = group.counts.allocate(0, 1).unwrap();
        group.counts.put(page);
        let trimmer = group.clone();
        let trimmer = thread::spawn(move || {
            if let Some(found) = trimmer.counts.guard_idle_group() {
                trimmer.touch();
                trimmer.counts.unguard(found);
            }
        });
        if let Some((page, _)) = group.counts.allocate(0, 1) {
            group.touch();
            group.counts.put(page);
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
        let whole = thread::spawn(move || other.counts.allocate_group());
        let single = group.counts.allocate(0, 1);
        let whole = whole.join().unwrap();
        assert!(whole.is_some() ^ single.is_some(), "{whole:?} and {single:?}");
        let pages = if whole.is_some() { GROUP_PAGES } else { 1 };
        assert_eq!(group.counts.live().get(), pages);
        (0..GROUP_PAGES).filter(|page| group.counts.count(*page) > 0).for_each(|page| group.counts.put(page));
        group.assert_empty();
    });
}
