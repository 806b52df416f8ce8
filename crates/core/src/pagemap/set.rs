//! The pagemaps to which page words of one address space lead.
//!
//! What    [`PagemapSet`]: few, so that a look at each is the fastest way to find one.
//! Fails   a pfn of none of them is a bug: words hold pfns of these pagemaps only.

use alloc::boxed::Box;
use alloc::sync::Arc;

use uhmm_addr::{Geometry, Pfn};

use super::Pagemap;

/// The pagemaps of one address space.
#[derive(Debug, Default)]
pub struct PagemapSet {
    maps: Box<[Arc<Pagemap>]>,
}

impl PagemapSet {
    /// These pagemaps, whose ranges are disjoint.
    ///
    /// # Panics
    /// If two ranges overlap, or pages are larger than 4K.
    pub fn new(maps: impl IntoIterator<Item = Arc<Pagemap>>) -> Self {
        let maps: Box<[_]> = maps.into_iter().collect();
        for (n, map) in maps.iter().enumerate() {
            assert!(
                map.geometry() == Geometry::K4,
                "the words of a space count pages of 4K, not of {}",
                map.geometry()
            );
            for (a, b) in maps[..n]
                .iter()
                .flat_map(|other| map.ranges().flat_map(|a| other.ranges().map(move |b| (a, b))))
            {
                assert!(!a.overlaps(b), "{a:?} overlaps {b:?}");
            }
        }
        Self { maps }
    }

    /// The pagemap to which `pfn` belongs.
    ///
    /// # Panics
    /// If there is none: pfns come from page words, which hold pfns of registered pagemaps only.
    pub fn of(&self, pfn: Pfn) -> &Arc<Pagemap> {
        self.maps.iter().find(|map| map.contains(pfn)).expect("a pfn without a pagemap")
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Pagemap>> {
        self.maps.iter()
    }
}
