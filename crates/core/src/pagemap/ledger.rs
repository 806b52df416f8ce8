//! Who holds which pages, in debug builds: the place in the source where each handle was made.
//!
//! What    [`Ledger`], of one pagemap; nothing at all in release builds.
//! Why     a page that does not come back keeps its pagemap from being unregistered, and the count does not say whose
//!         it is.
//! Locks   one, innermost.

use core::panic::Location;

use uhmm_addr::PfnRange;

/// A handle's line in the ledger.
#[derive(Debug)]
pub(super) struct Entry {
    #[cfg(debug_assertions)]
    number: u64,
}

/// Pages that are held, and where that began.
#[cfg(debug_assertions)]
pub(super) struct Ledger {
    lines: crate::sync::locked::Locked<Lines>,
}

#[cfg(debug_assertions)]
#[derive(Default)]
struct Lines {
    next: u64,
    held: alloc::collections::BTreeMap<u64, (PfnRange, &'static Location<'static>)>,
}

/// Nothing.
#[cfg(not(debug_assertions))]
pub(super) struct Ledger;

#[cfg(debug_assertions)]
mod kept {
    use alloc::vec::Vec;

    use super::{Entry, Ledger, Lines, Location, PfnRange};
    use crate::sync::Park;
    use crate::sync::locked::Locked;

    impl Ledger {
        pub(crate) fn new() -> Self {
            Self { lines: Locked::new(Lines::default()) }
        }

        #[track_caller]
        pub(crate) fn enter(&self, park: &dyn Park, pages: PfnRange) -> Entry {
            let mut lines = self.lines.lock(park);
            let number = lines.next;
            lines.next += 1;
            lines.held.insert(number, (pages, Location::caller()));
            Entry { number }
        }

        pub(crate) fn leave(&self, park: &dyn Park, entry: &Entry) {
            self.lines.lock(park).held.remove(&entry.number);
        }

        /// Every line: pages, and where the handle was made.
        pub(crate) fn lines(&self, park: &dyn Park) -> Vec<(PfnRange, &'static Location<'static>)> {
            self.lines.lock(park).held.values().copied().collect()
        }
    }
}

#[cfg(not(debug_assertions))]
mod kept {
    use alloc::vec::Vec;

    use super::{Entry, Ledger, Location, PfnRange};
    use crate::sync::Park;

    impl Ledger {
        pub(crate) const fn new() -> Self {
            Self
        }

        pub(crate) const fn enter(&self, _park: &dyn Park, _pages: PfnRange) -> Entry {
            Entry {}
        }

        pub(crate) const fn leave(&self, _park: &dyn Park, _entry: &Entry) {}

        pub(crate) const fn lines(&self, _park: &dyn Park) -> Vec<(PfnRange, &'static Location<'static>)> {
            Vec::new()
        }
    }
}
