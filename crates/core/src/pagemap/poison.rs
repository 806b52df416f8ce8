//! Pages that are lost (the kernel's `memory_failure_dev_pagemap`).
//!
//! What    [`Registry::memory_failure`]: a pfn that is bad takes its whole compound page; the driver is told, or else
//!         every [`Mapper`]; the list of what is bad; and [`Pagemap::clear_poison`], when whole pages were written
//!         anew.
//! Why     whoever maps a lost page must learn it before he reads what is not there, and nobody may be given it.
//! Locks   one for the list and the mappers, innermost; not held while anybody is called.
//! Fails   with a [`FailureError`]: for pfns of nobody's, and for those that hold descriptors.

#[cfg(all(test, not(loom)))]
mod tests;

use alloc::sync::Arc;
use alloc::vec::Vec;

use uhmm_addr::{Geometry, PageCount, Pfn, PfnRange};

use super::registry::Registry;
use super::{PageError, Pagemap};
use crate::sync::locked::Locked;

/// What was lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The page that failed.
    pub pfn: Pfn,
    /// What that takes along: its compound page.
    pub pages: PfnRange,
    /// The size in which it is mapped at most, which is what a SIGBUS says (`si_addr_lsb`).
    pub geometry: Geometry,
    /// References to it when it failed.
    pub references: u32,
}

/// What a driver did about a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Told {
    /// It has told everybody who maps the pages.
    Mappers(usize),
    /// It leaves that to the mappers that have registered themselves (`-EOPNOTSUPP`).
    Generic,
}

/// Somebody who maps pages of a pagemap, and must learn when they are lost.
pub trait Mapper: Send + Sync {
    /// These pages are lost: accesses must end in SIGBUS. Whether this mapper maps any of them.
    fn poisoned(&self, map: &Pagemap, failure: &Failure) -> bool;
}

/// What came of a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Poisoned {
    /// What failed.
    pub failure: Failure,
    /// How many map it, and were told.
    pub told: usize,
    /// Whether it was lost already: then nobody is told once more.
    pub known: bool,
}

/// Why a failure could not be handled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FailureError {
    /// Of no pagemap, or descriptors lie there (`ENXIO`): what uses the pagemap cannot go on.
    #[error(transparent)]
    Page(#[from] PageError),
}

#[derive(Default)]
struct List {
    // By address, apart from each other.
    bad: Vec<PfnRange>,
    mappers: Vec<Arc<dyn Mapper>>,
}

/// What is bad, and who is to be told.
pub(super) struct Bad {
    list: Locked<List>,
}

impl Default for Bad {
    fn default() -> Self {
        Self { list: Locked::new(List::default()) }
    }
}

impl Registry {
    /// Page `pfn` is lost: its compound page is given out no more, and whoever maps it is told (`memory_failure`).
    ///
    /// # Errors
    /// See [`FailureError`].
    pub fn memory_failure(&self, pfn: Pfn) -> Result<Poisoned, FailureError> {
        let map = self.find(pfn).ok_or(PageError::Outside(pfn))?;
        Ok(map.memory_failure(pfn)?)
    }
}

impl Pagemap {
    /// Page `pfn` is lost. See [`Registry::memory_failure`].
    ///
    /// # Errors
    /// [`PageError::Outside`] and [`PageError::Reserved`].
    pub fn memory_failure(&self, pfn: Pfn) -> Result<Poisoned, PageError> {
        let page = self.ranges.page_of(pfn).ok_or(PageError::Outside(pfn))?;
        let unit = self.ranges.unit_of_page(page).ok_or(PageError::Reserved(pfn))?;
        let known = {
            let mut list = self.bad.list.lock(&*self.park);
            insert(&mut list.bad, pfn);
            !self.descriptors.poison(unit)
        };
        let failure = Failure {
            pfn,
            pages: self.ranges.pfns(unit, 1),
            geometry: self.geometry(),
            references: self.descriptors.count(unit),
        };
        let told = if known { 0 } else { self.tell_failure(&failure) };
        Ok(Poisoned { failure, told, known })
    }

    fn tell_failure(&self, failure: &Failure) -> usize {
        let told = self.ops.as_ref().map_or(Told::Generic, |ops| ops.memory_failure(self, failure));
        match told {
            Told::Mappers(told) => told,
            Told::Generic => {
                let mappers = self.bad.list.lock(&*self.park).mappers.clone();
                mappers.iter().filter(|mapper| mapper.poisoned(self, failure)).count()
            }
        }
    }

    /// `mapper` is told of failures from now on.
    pub fn add_mapper(&self, mapper: Arc<dyn Mapper>) {
        self.bad.list.lock(&*self.park).mappers.push(mapper);
    }

    /// `mapper` is told no more; a call to it may be under way.
    pub fn remove_mapper(&self, mapper: &Arc<dyn Mapper>) {
        let mappers = &mut self.bad.list.lock(&*self.park).mappers;
        mappers.retain(|other| !core::ptr::addr_eq(Arc::as_ptr(other), Arc::as_ptr(mapper)));
    }

    /// Whether the compound page of `pfn` is lost.
    pub fn is_poisoned(&self, pfn: Pfn) -> bool {
        self.ranges.unit_of(pfn).is_some_and(|unit| self.descriptors.is_poisoned(unit))
    }

    /// The bad pages, as they failed, by address (the kernel's `badblocks`).
    pub fn bad_pages(&self) -> Vec<PfnRange> {
        self.bad.list.lock(&*self.park).bad.clone()
    }

    /// All of `pages` were written anew, whole (`pmem_clear_poison`): they are bad no more, and a compound page of
    /// which none is bad is lost no more. Returns how many were bad.
    pub fn clear_poison(&self, pages: PfnRange) -> PageCount {
        let mut list = self.bad.list.lock(&*self.park);
        let old = list.bad.clone();
        let cleared = remove(&mut list.bad, pages);
        let was_bad =
            old.iter().flat_map(|run| (0..run.pages.get()).map(|n| run.start.forward(PageCount::new(n))));
        for unit in was_bad.filter(|pfn| pages.contains(*pfn)).filter_map(|pfn| self.ranges.unit_of(pfn)) {
            let whole = self.ranges.pfns(unit, 1);
            if self.descriptors.is_poisoned(unit) && !list.bad.iter().any(|bad| bad.overlaps(whole)) {
                self.descriptors.cure(unit);
            }
        }
        cleared
    }
}

/// Adds a page to a list of ranges, and joins it with its neighbours.
fn insert(bad: &mut Vec<PfnRange>, pfn: Pfn) {
    let at = bad.partition_point(|range| range.end() < pfn);
    let next = pfn.forward(PageCount::ONE);
    match bad.get_mut(at) {
        Some(range) if range.contains(pfn) => return,
        Some(range) if range.end() == pfn => range.pages = range.pages.plus(PageCount::ONE),
        Some(range) if range.start == next => {
            *range = PfnRange::new(pfn, range.pages.plus(PageCount::ONE));
        }
        _ => bad.insert(at, PfnRange::new(pfn, PageCount::ONE)),
    }
    if let Some(behind) = bad.get(at + 1).copied().filter(|behind| behind.start == bad[at].end()) {
        bad[at].pages = bad[at].pages.plus(behind.pages);
        bad.remove(at + 1);
    }
}

/// Takes pages out of a list of ranges. Returns how many were in it.
fn remove(bad: &mut Vec<PfnRange>, pages: PfnRange) -> PageCount {
    let mut removed = PageCount::ZERO;
    let old = core::mem::take(bad);
    for range in old {
        if !range.overlaps(pages) {
            bad.push(range);
            continue;
        }
        let (start, end) = (range.start.max(pages.start), range.end().min(pages.end()));
        removed = removed.plus(end.since(start));
        let parts = [(range.start, start), (end, range.end())];
        bad.extend(parts.iter().filter(|(a, b)| a < b).map(|(a, b)| PfnRange::new(*a, b.since(*a))));
    }
    removed
}
