//! The pagemaps to which page words of one address space lead.
//!
//! What    [`PagemapSet`]: few, so that a look at each is the fastest way to find one. Further ones can be added while
//!         words are read ([`PagemapSet::add`]), and stay: a word may name a page at any time.
//! Ranges  each has one range of pfns: whoever walks the words of a pagemap asks for [`Pagemap::range`], and must see all
//!         of it. [`PagemapSet::new`] and [`PagemapSet::add`] refuse others.
//! Owns    what was added lies in boxes of its own, which are freed with the set.
//! Locks   none. Places are filled from the front by compare and exchange, each once: whoever finds one filled finds
//!         what was written before it.
//! Fails   a pfn of none of them is a bug: words hold pfns of these pagemaps only.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, Ordering};

use uhmm_addr::{Geometry, Pfn};

use super::Pagemap;

/// Pagemaps that can be added to a set, over all of its life.
pub const MOST_ADDED: usize = 64;

/// Why a pagemap was not added.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AddError {
    /// The words of a space count small pages.
    #[error("the words of a space count pages of 4K, not of {0}")]
    Geometry(Geometry),
    /// Its pages could not be walked by one range.
    #[error("a pagemap of a space has one range of pfns, this one has {0}")]
    Ranges(usize),
    /// Some of its pfns are another one's.
    #[error("{0:?} overlaps {1:?}")]
    Overlap(uhmm_addr::PfnRange, uhmm_addr::PfnRange),
    /// There is no place left.
    #[error("{MOST_ADDED} pagemaps were added to this space already, which is all that it can have")]
    TooMany,
}

/// The pagemaps of one address space.
pub struct PagemapSet {
    maps: Box<[Arc<Pagemap>]>,
    // Each null, or a box of the set's own. Not loom's: the only order is that of a pointer and what it leads to.
    added: [AtomicPtr<Arc<Pagemap>>; MOST_ADDED],
}

impl Default for PagemapSet {
    fn default() -> Self {
        Self::new([])
    }
}

impl fmt::Debug for PagemapSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

fn check<'a>(map: &Pagemap, others: impl Iterator<Item = &'a Arc<Pagemap>>) -> Result<(), AddError> {
    if map.geometry() != Geometry::K4 {
        return Err(AddError::Geometry(map.geometry()));
    }
    let ranges = map.ranges().count();
    if ranges != 1 {
        return Err(AddError::Ranges(ranges));
    }
    let mut taken = others.map(|other| other.range()).filter(|range| range.overlaps(map.range()));
    taken.next().map_or(Ok(()), |range| Err(AddError::Overlap(map.range(), range)))
}

impl PagemapSet {
    /// These pagemaps, whose ranges are disjoint, and one each.
    ///
    /// # Panics
    /// If two ranges overlap, if a pagemap has several, or pages larger than 4K.
    pub fn new(maps: impl IntoIterator<Item = Arc<Pagemap>>) -> Self {
        let maps: Box<[_]> = maps.into_iter().collect();
        for (n, map) in maps.iter().enumerate() {
            if let Err(error) = check(map, maps[..n].iter()) {
                panic!("{error}");
            }
        }
        Self { maps, added: [const { AtomicPtr::new(ptr::null_mut()) }; MOST_ADDED] }
    }

    /// Adds a pagemap, for as long as the set lives. Returns its number in the order of [`PagemapSet::iter`]. Two calls at a
    /// time are the caller's to keep apart: their ranges are not compared with each other.
    ///
    /// # Errors
    /// [`AddError`]; nothing was added then.
    pub fn add(&self, map: Arc<Pagemap>) -> Result<usize, AddError> {
        check(&map, self.iter())?;
        let new = Box::into_raw(Box::new(map));
        for (n, place) in self.added.iter().enumerate() {
            if place.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return Ok(self.maps.len() + n);
            }
        }
        // SAFETY: made by `into_raw` above, and put nowhere.
        drop(unsafe { Box::from_raw(new) });
        Err(AddError::TooMany)
    }

    /// The pagemap to which `pfn` belongs.
    ///
    /// # Panics
    /// If there is none: pfns come from page words, which hold pfns of registered pagemaps only.
    pub fn of(&self, pfn: Pfn) -> &Arc<Pagemap> {
        self.iter().find(|map| map.contains(pfn)).expect("a pfn without a pagemap")
    }

    /// Number `n` of them.
    pub fn get(&self, n: usize) -> Option<&Arc<Pagemap>> {
        self.iter().nth(n)
    }

    /// All of them: those from the beginning, then what was added, in that order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Pagemap>> {
        self.maps.iter().chain(self.added())
    }

    /// What was added.
    pub fn added(&self) -> impl Iterator<Item = &Arc<Pagemap>> {
        let filled = self.added.iter().map_while(|place| NonNull::new(place.load(Ordering::Acquire)));
        // SAFETY: a place that is filled leads to a box that nobody changes, and that is freed with the set, which is
        // borrowed.
        filled.map(|place| unsafe { place.as_ref() })
    }
}

impl Drop for PagemapSet {
    fn drop(&mut self) {
        for place in &mut self.added {
            if let Some(map) = NonNull::new(*place.get_mut()) {
                // SAFETY: made by `into_raw` in `add`, and nobody has the set any more.
                drop(unsafe { Box::from_raw(map.as_ptr()) });
            }
        }
    }
}
