//! Handles of pages: a reference each, as long as the handle lives.
//!
//! What    [`PageRef`], shared, of one compound page; [`PageRange`], shared, of consecutive ones; [`UniquePages`],
//!         that nobody else refers to or finds. [`release_pages`] drops many at once.
//! Why     references that are counted by hand are forgotten, or dropped twice. (The words of a page table count by
//!         hand, by number, because a word is all that they are.)
//! Owns    each handle one reference to each of its compound pages; the first reference to a page makes it live, and a
//!         live page keeps its pagemap registered and its descriptors in place. So a handle has no lifetime, and
//!         neither cloning nor dropping one touches the pagemap, unless it is the last.
//! Fails   with a [`PageError`], which says which page and what can be done.

#[cfg(all(test, not(loom)))]
mod tests;

use core::fmt;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;

use uhmm_addr::{PageCount, Pfn, PfnRange};

use super::Pagemap;
use super::descriptors::{Denied, Descriptors};
use super::ledger::Entry;
use crate::sync::AtomicU32;

/// Why there is no reference to a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PageError {
    /// It belongs to no pagemap, or the range leaves the pagemap's (`ENXIO`).
    #[error("{0:?} does not belong to the pagemap")]
    Outside(Pfn),
    /// The pagemap's own descriptors lie there (`ENXIO`).
    #[error("{0:?} holds descriptors of the pagemap")]
    Reserved(Pfn),
    /// Nobody uses it, and pages of this pagemap are allocated before they are used.
    #[error("{0:?} is free")]
    Free(Pfn),
    /// One holder has it for himself, or it is being freed this moment (`EBUSY`): try again later.
    #[error("{0:?} is somebody's alone")]
    Claimed(Pfn),
    /// It is in use (`EBUSY`): wait for [`PagemapOps::page_free`](super::PagemapOps::page_free).
    #[error("{0:?} is in use by {1}")]
    InUse(Pfn, u32),
    /// It is lost (`EHWPOISON`): write it anew.
    #[error("{0:?} is poisoned")]
    Poisoned(Pfn),
    /// The pagemap is being unregistered (`ENODEV`).
    #[error("the pagemap of {0:?} is going away")]
    Dying(Pfn),
    /// It has as many references as can be counted (`ENOMEM`).
    #[error("{0:?} has too many references")]
    TooMany(Pfn),
    /// The pagemap is in no registry, which would keep it as long as the handle lives.
    #[error("the pagemap of {0:?} is not registered")]
    Unregistered(Pfn),
    /// No free page is left (`ENOSPC`).
    #[error("no page of the pagemap is free")]
    Full,
}

impl PageError {
    pub(super) const fn new(denied: Denied, pfn: Pfn) -> Self {
        match denied {
            Denied::Free => Self::Free(pfn),
            Denied::Sole => Self::Claimed(pfn),
            Denied::Poisoned => Self::Poisoned(pfn),
            Denied::Dying => Self::Dying(pfn),
            Denied::TooMany => Self::TooMany(pfn),
        }
    }
}

/// Units of a registered pagemap with a reference to each: what the handles have in common.
struct Held {
    map: NonNull<Pagemap>,
    first: usize,
    units: usize,
    entry: Entry,
}

// SAFETY: a pagemap is `Sync`, and the references that keep it there are counted by atomics.
unsafe impl Send for Held {}
// SAFETY: as above.
unsafe impl Sync for Held {}

impl Held {
    #[track_caller]
    fn new(map: &Pagemap, first: usize, units: usize) -> Self {
        let entry = map.ledger.enter(&*map.park, map.ranges.pfns(first, units));
        Self { map: NonNull::from(map), first, units, entry }
    }

    fn map(&self) -> &Pagemap {
        // SAFETY: pages that are live keep their pagemap registered, and the registry keeps it.
        unsafe { self.map.as_ref() }
    }

    fn pages(&self) -> PfnRange {
        self.map().ranges.pfns(self.first, self.units)
    }

    /// One reference more to each.
    #[track_caller]
    fn again(&self) -> Self {
        let map = self.map();
        (self.first..self.first + self.units).for_each(|unit| Descriptors::get(map.descriptors.unit(unit)));
        Self::new(map, self.first, self.units)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let map = self.map();
        if self.units == 1 {
            let word = map.descriptors.word_of(self.first);
            // SAFETY: the reference is this handle's, whose life ends here, and the word is the unit's.
            unsafe { put_one(self.map, self.first, word, &self.entry) };
            return;
        }
        map.forget_handle(&self.entry);
        // SAFETY: the references are this handle's, whose life ends here.
        unsafe { Pagemap::put_units(self.map, self.first, self.units) };
    }
}

/// A handle's only reference goes.
///
/// # Safety
/// The reference must be the caller's, who gives it up, and `word` the unit's: it is all that is looked at unless the
/// reference was the last one.
unsafe fn put_one(map: NonNull<Pagemap>, unit: usize, word: NonNull<AtomicU32>, entry: &Entry) {
    // SAFETY: the page is live until `release` has given the reference up.
    let hold = unsafe { map.as_ref() }.forget_handle(entry);
    // SAFETY: the reference is the caller's, and is used no more.
    if unsafe { Descriptors::release(word, hold) } {
        // SAFETY: it was the last one, so that the page is ours, and live until it is counted out.
        let left = unsafe { map.as_ref() }.freed(unit);
        left.count_out();
    }
}

/// A reference to one compound page (`get_page` on its head).
#[must_use]
pub struct PageRef {
    held: ManuallyDrop<Held>,
    // The page's count, which the first of ours keeps.
    word: NonNull<AtomicU32>,
}

// SAFETY: as `Held`.
unsafe impl Send for PageRef {}
// SAFETY: as `Held`.
unsafe impl Sync for PageRef {}

impl PageRef {
    #[track_caller]
    pub(super) fn new(map: &Pagemap, unit: usize) -> Self {
        let word = map.descriptors.word_of(unit);
        Self { held: ManuallyDrop::new(Held::new(map, unit, 1)), word }
    }

    /// Its pagemap.
    pub fn pagemap(&self) -> &Pagemap {
        self.held.map()
    }

    /// The pages that it is about: one, or a compound page whole.
    pub fn pages(&self) -> PfnRange {
        self.held.pages()
    }

    /// The head: the first of the pages.
    pub fn head(&self) -> Pfn {
        self.pages().start
    }

    /// References to the page, this one included. A snapshot.
    pub fn count(&self) -> u32 {
        self.held.map().descriptors.count(self.held.first)
    }

    /// The page for this holder alone, if nobody else has a reference.
    ///
    /// # Errors
    /// The reference, unchanged, if somebody has.
    pub fn into_unique(self) -> Result<UniquePages, Self> {
        if !self.held.map().descriptors.make_sole(self.held.first) {
            return Err(self);
        }
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not used any more, and not dropped.
        Ok(UniquePages { held: unsafe { ManuallyDrop::take(&mut this.held) } })
    }
}

impl Clone for PageRef {
    #[track_caller]
    fn clone(&self) -> Self {
        // SAFETY: our own reference keeps the descriptors.
        Descriptors::get(unsafe { self.word.as_ref() });
        Self { held: ManuallyDrop::new(Held::new(self.held.map(), self.held.first, 1)), word: self.word }
    }
}

impl Drop for PageRef {
    fn drop(&mut self) {
        // SAFETY: the reference is this handle's, whose life ends here, and the word is the unit's.
        unsafe { put_one(self.held.map, self.held.first, self.word, &self.held.entry) };
    }
}

impl fmt::Debug for PageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PageRef").field(&self.pages()).finish()
    }
}

/// References to consecutive pages: one to each compound page of which there are some in the range. So 512 pages of a
/// 2M page are pinned by one atomic operation.
#[must_use]
pub struct PageRange {
    held: Held,
    pages: PfnRange,
}

impl PageRange {
    #[track_caller]
    pub(super) fn new(map: &Pagemap, first: usize, units: usize, pages: PfnRange) -> Self {
        Self { held: Held::new(map, first, units), pages }
    }

    /// Their pagemap.
    pub fn pagemap(&self) -> &Pagemap {
        self.held.map()
    }

    /// The pages that were asked for, which need not be whole compound pages.
    pub const fn pages(&self) -> PfnRange {
        self.pages
    }
}

impl Clone for PageRange {
    #[track_caller]
    fn clone(&self) -> Self {
        Self { held: self.held.again(), pages: self.pages }
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PageRange").field(&self.pages()).finish()
    }
}

/// Pages that nobody else refers to, nor finds by their numbers (`page_ref_freeze`; a page that was just allocated,
/// which the kernel returns locked). Dropped, they are free.
#[must_use]
pub struct UniquePages {
    held: Held,
}

impl UniquePages {
    #[track_caller]
    pub(super) fn new(map: &Pagemap, first: usize, units: usize) -> Self {
        Self { held: Held::new(map, first, units) }
    }

    /// Their pagemap.
    pub fn pagemap(&self) -> &Pagemap {
        self.held.map()
    }

    /// The pages, compound pages whole.
    pub fn pages(&self) -> PfnRange {
        self.held.pages()
    }

    /// From now on they are found, and may be shared.
    pub fn share(self) -> PageRange {
        let (map, pages) = (self.held.map(), self.pages());
        (self.held.first..self.held.first + self.held.units).for_each(|unit| map.descriptors.publish(unit));
        PageRange { pages, held: self.held }
    }
}

impl fmt::Debug for UniquePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("UniquePages").field(&self.pages()).finish()
    }
}

/// Drops many references (`release_pages`): pages of one group that are freed are counted out of it, and of the
/// pagemap, together.
pub fn release_pages(pages: impl IntoIterator<Item = PageRef>) {
    let mut run: Option<Held> = None;
    for page in pages {
        let mut page = ManuallyDrop::new(page);
        // SAFETY: the handle is not used any more, and not dropped.
        let next = unsafe { ManuallyDrop::take(&mut page.held) };
        match &mut run {
            Some(run) if run.map == next.map && run.first + run.units == next.first => {
                let next = ManuallyDrop::new(next);
                let map = next.map();
                // The run stands for it in the ledger from now on.
                map.ledger.leave(&*map.park, &next.entry);
                run.units += 1;
            }
            _ => run = Some(next),
        }
    }
}

impl Pagemap {
    fn denied(&self, unit: usize, denied: Denied) -> PageError {
        PageError::new(denied, self.ranges.pfn_of(self.ranges.head(unit)))
    }

    /// Whether handles may be made now.
    fn kept(&self, pfn: Pfn) -> Result<(), PageError> {
        match (self.is_registered(), self.is_closing()) {
            (false, _) => Err(PageError::Unregistered(pfn)),
            (true, true) => Err(PageError::Dying(pfn)),
            (true, false) => Ok(()),
        }
    }

    fn units(&self, pages: PfnRange) -> Result<(usize, usize), PageError> {
        // A handle of no page would keep no pagemap.
        let units = self.ranges.units_of(pages).filter(|(_, units)| *units > 0);
        units.ok_or_else(|| match self.ranges.page_of(pages.start) {
            Some(page) if page < self.ranges.reserved().get() => PageError::Reserved(pages.start),
            Some(_) if pages.pages.is_zero() => PageError::Outside(pages.start),
            Some(_) => PageError::Outside(pages.end()),
            None => PageError::Outside(pages.start),
        })
    }

    /// A reference to the compound page of `pfn`, head or tail. Where pages are allocated (private and coherent ones)
    /// it must be in use; elsewhere a page that nobody uses becomes live.
    ///
    /// # Errors
    /// See [`PageError`].
    #[track_caller]
    pub fn page(&self, pfn: Pfn) -> Result<PageRef, PageError> {
        self.kept(pfn)?;
        let (unit, _) = self.units(PfnRange::new(pfn, PageCount::ONE))?;
        let free = !self.memory_type().is_migratable();
        self.descriptors.find(unit, free).map_err(|denied| PageError::new(denied, pfn))?;
        Ok(PageRef::new(self, unit))
    }

    /// References to all of `pages`, which lie in one range of the pagemap: one to each compound page.
    ///
    /// # Errors
    /// For the first page that cannot be had; then none is referred to.
    #[track_caller]
    pub fn pin(&self, pages: PfnRange) -> Result<PageRange, PageError> {
        self.kept(pages.start)?;
        let (first, units) = self.units(pages)?;
        let free = !self.memory_type().is_migratable();
        for unit in first..first + units {
            if let Err(denied) = self.descriptors.find(unit, free) {
                self.put_indices(first, unit - first);
                return Err(self.denied(unit, denied));
            }
        }
        Ok(PageRange::new(self, first, units, pages))
    }

    /// All of `pages`, in whole compound pages of one range, for one holder, if nobody uses them: what a truncation
    /// holds while it gives them to somebody else.
    ///
    /// # Errors
    /// [`PageError::InUse`] for the first page that somebody has; then none is claimed.
    #[track_caller]
    pub fn claim(&self, pages: PfnRange) -> Result<UniquePages, PageError> {
        self.kept(pages.start)?;
        let (first, units) = self.units(pages)?;
        for unit in first..first + units {
            if let Err(denied) = self.descriptors.seize(unit) {
                self.put_indices(first, unit - first);
                return Err(match (denied, self.descriptors.count(unit)) {
                    (Denied::Sole, count @ 1..) => {
                        PageError::InUse(self.ranges.pfn_of(self.ranges.head(unit)), count)
                    }
                    _ => self.denied(unit, denied),
                });
            }
        }
        Ok(UniquePages::new(self, first, units))
    }

    /// Up to `most` consecutive free pages for one holder; at least one compound page.
    ///
    /// # Errors
    /// [`PageError::Full`], or that the pagemap is going away.
    #[track_caller]
    pub fn allocate_unique(&self, most: PageCount) -> Result<UniquePages, PageError> {
        let start = self.range().start;
        self.kept(start)?;
        match self.allocate_units(most, true) {
            Some((first, units)) => Ok(UniquePages::new(self, first, units)),
            None if self.is_closing() => Err(PageError::Dying(start)),
            None => Err(PageError::Full),
        }
    }

    /// The first page of `pages` that is in use (`dax_layout_busy_page_range`), in the order of the device's pages. Those
    /// that are no pages of the pagemap, or hold descriptors, are in nobody's use.
    pub fn first_busy(&self, pages: PfnRange) -> Option<Pfn> {
        let skipped = |range: PfnRange| if range == self.range() { self.reserved() } else { PageCount::ZERO };
        self.ranges().find_map(|range| {
            let start = range.start.forward(skipped(range)).max(pages.start);
            let end = range.end().min(pages.end());
            let (first, units) = self.ranges.units_of(PfnRange::new(start, end.since(start)))?;
            let (unit, _) = self.descriptors.in_use(first, first + units).next()?;
            Some(self.ranges.pfn_of(self.ranges.head(unit)).max(start))
        })
    }
}
