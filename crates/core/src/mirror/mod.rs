//! Mirrors: a device's copy of part of the page table, that cannot be out of date (rule R5).
//!
//! What    [`Mirror`], a driver's table with the pages that it is about: [`Mirror::populate`] fills it and tries again
//!         until what is installed is true; [`Mirror::exclusive`] makes pages its device's alone. [`Mm::range_fault`]
//!         says what pages are, and brings them there.
//! Why     the kernel's driver calls `mmu_interval_read_begin`, `hmm_range_fault`, his lock, `mmu_interval_read_retry`
//!         in this order, by convention. Here the table is inside, and there is no way to it past the check.
//! Owns    the table; [`Mirror::into_table`] gives it back. A mirror borrows its address space.
//! Locks   the mirror's own, innermost: invalidation takes it in whatever thread changes pages, a fault handler
//!         included. Who holds it touches no managed memory and calls nothing of the space.
//! Races   *populate against a change*: whichever has the lock first, the update is thrown away or taken out again.
//!         *drop against a change*: the drop waits until the callback has returned. *unmapped while mirrored*: the
//!         pages read as unusable for good, whatever is mapped there next; that needs a mirror of its own.
//!         A program that changes a protection itself is heard of by nobody: userfaultfd has no event for it.
//! Fails   with a [`RangeFaultError`], which says what to do next. A device that misses a page calls
//!         [`Mirror::populate`] again.
//!
//! The table is reached by the checked path only:
//!
//! ```
//! # use uhmm_core::{host::Host, mirror::{Mirror, MirrorTable}, notifier::Event};
//! # use uhmm_addr::VaRange;
//! # struct Table; impl Table { fn install(&mut self) {} }
//! # impl MirrorTable for Table { fn invalidate(&mut self, _: VaRange, _: Event) {} }
//! fn install<H: Host>(mirror: &Mirror<'_, H, Table>) {
//!     let collection = mirror.collect();
//!     if let Some(mut table) = collection.lock() {
//!         table.install();
//!     }
//! }
//! ```
//! ```compile_fail,E0599
//! # use uhmm_core::{host::Host, mirror::{Mirror, MirrorTable}, notifier::Event};
//! # use uhmm_addr::VaRange;
//! # struct Table; impl Table { fn install(&mut self) {} }
//! # impl MirrorTable for Table { fn invalidate(&mut self, _: VaRange, _: Event) {} }
//! fn install<H: Host>(mirror: &Mirror<'_, H, Table>) {
//!     let mut table = mirror.collect();
//!     table.install();
//! }
//! ```
//! ```compile_fail,E0596
//! # use uhmm_core::{host::Host, mirror::{Mirror, MirrorTable}, notifier::Event};
//! # use uhmm_addr::VaRange;
//! # struct Table; impl Table { fn install(&mut self) {} }
//! # impl MirrorTable for Table { fn invalidate(&mut self, _: VaRange, _: Event) {} }
//! fn install<H: Host>(mirror: &Mirror<'_, H, Table>) {
//!     mirror.look(|table| table.install());
//! }
//! ```
//! A collection is good for one attempt:
//! ```compile_fail,E0382
//! # use uhmm_core::{host::Host, mirror::{Mirror, MirrorTable}, notifier::Event};
//! # use uhmm_addr::VaRange;
//! # struct Table; impl Table { fn install(&mut self) {} }
//! # impl MirrorTable for Table { fn invalidate(&mut self, _: VaRange, _: Event) {} }
//! fn install<H: Host>(mirror: &Mirror<'_, H, Table>) {
//!     let collection = mirror.collect();
//!     while collection.lock().is_none() {}
//! }
//! ```

mod exclusive;
mod gone;
mod known;
mod look;
#[cfg(all(test, loom))]
mod loom;
mod range_fault;
mod request;
mod userptr;
mod view;
mod watched;

use core::fmt;

use uhmm_addr::VaRange;

pub use exclusive::{Exclusive, Terms};
pub use request::{Patience, RangeFaultError, Request, Retry, Want};
pub use userptr::{Changed, UserPages};
pub use view::{PageView, Pages, Segment, Unusable};
pub use watched::{Checked, Collection};

use crate::fault::Scratch;
use crate::host::Host;
use crate::mm::Mm;
use crate::notifier::Event;
use look::{Beside, behind};
use view::Segments;
use watched::Watched;

/// A device's copy of the page table, as its driver keeps it.
pub trait MirrorTable: Send + 'static {
    /// The pages of `range` change: what the table says about them is dropped, and the device is made to forget it,
    /// before this returns.
    ///
    /// Runs in whatever thread changes the pages, with the mirror's lock held: it must not allocate, touch managed
    /// memory, or call the space.
    fn invalidate(&mut self, range: VaRange, event: Event);
}

/// A table that is true about pages, or says nothing about them.
#[must_use = "a mirror that is dropped is told nothing any more"]
pub struct Mirror<'m, H: Host, T> {
    mm: &'m Mm<H>,
    watched: Watched<'m, H, T>,
}

impl<H: Host, T> fmt::Debug for Mirror<'_, H, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror").field("range", &self.range()).finish_non_exhaustive()
    }
}

impl<H: Host> Mm<H> {
    /// A mirror of the pages of `range`, with a table that says nothing yet. The pages are to be managed until they are
    /// unmapped, as this space is told of then.
    pub fn mirror<T: MirrorTable>(&self, range: VaRange, table: T) -> Mirror<'_, H, T> {
        let remember = self.host.hears();
        Mirror { mm: self, watched: Watched::new(self.notifiers(), &self.host, range, table, remember) }
    }
}

impl<H: Host, T> Mirror<'_, H, T> {
    /// The pages that it is about.
    pub const fn range(&self) -> VaRange {
        self.watched.range()
    }

    /// Makes the pages of `range` what `request` asks, and has `install` put them into the table, batch by batch: as
    /// many pages at a time as `room` has segments for, at most 32 MiB of small pages and 1 GiB of huge ones, and where
    /// some have to be brought those of one chunk. Pages that change meanwhile are
    /// looked at again, as long as `patience` says; what is installed is true at that moment, and is invalidated
    /// before it is not.
    ///
    /// As with [`Mm::range_fault`] the caller holds no lock. `install` runs under the mirror's lock: it must not touch
    /// managed memory or call the space. Nor may it allocate where the process forks: the thread that does so has the
    /// allocator's locks until the mirror has been told.
    ///
    /// # Errors
    /// See [`RangeFaultError`]. Batches before the one that failed are installed.
    ///
    /// # Panics
    /// If there is no room at all.
    pub fn populate(
        &self,
        range: VaRange,
        request: &Request<'_>,
        room: &mut [Segment],
        scratch: &mut Scratch,
        patience: &mut dyn Patience,
        mut install: impl FnMut(&mut T, Pages<'_>),
    ) -> Result<(), RangeFaultError> {
        assert!(!room.is_empty(), "pages are told of in segments");
        if !self.range().encloses(range) || !self.mm.table().covers(range) {
            return Err(RangeFaultError::Outside(range));
        }
        self.mm.permit(range, &self.beside(), request)?;
        let mut seen = Segments::new(room);
        let mut rest = Some(range);
        while let Some(left) = rest {
            let request = request.skip(left.first().since(range.first()).get());
            self.populate_batch(left, &request, &mut seen, scratch, patience, &mut install)?;
            rest = behind(range, seen.end());
        }
        Ok(())
    }

    /// What is known of the pages now, besides what is found.
    fn beside(&self) -> Beside<'_> {
        Beside { gone: self.watched.gone(), known: Some(self.watched.known()), huge: false }
    }

    /// Pages at the front of `left`, those that `seen` tells of in the end.
    fn populate_batch(
        &self,
        left: VaRange,
        request: &Request<'_>,
        seen: &mut Segments<'_>,
        scratch: &mut Scratch,
        patience: &mut dyn Patience,
        install: &mut impl FnMut(&mut T, Pages<'_>),
    ) -> Result<(), RangeFaultError> {
        patience.begin();
        loop {
            if self.mm.is_closed() {
                return Err(RangeFaultError::Closed);
            }
            let collection = self.watched.collect();
            let huge = self.mm.expects_huge();
            let beside = Beside { gone: *collection.gone(), known: Some(self.watched.known()), huge };
            self.mm.fault_part(left, &beside, request, seen, scratch, patience)?;
            if let Some(mut table) = collection.lock() {
                table.remember(seen.as_slice());
                install(&mut table, seen.pages());
                return Ok(());
            }
            if !patience.again(Retry::Changed) {
                return Err(RangeFaultError::TimedOut(Retry::Changed));
            }
            let looked_at = left.take(seen.end().since(left.first()));
            self.mm.permit(looked_at, &self.beside(), request)?;
        }
    }

    /// What the pages of `range` are, without a word to the table; see [`Mm::snapshot`].
    ///
    /// # Errors
    /// [`RangeFaultError::Outside`].
    ///
    /// # Panics
    /// If there are more or fewer views than pages.
    pub fn snapshot(
        &self,
        range: VaRange,
        request: &Request<'_>,
        views: &mut [PageView],
    ) -> Result<(), RangeFaultError> {
        assert_eq!(range.pages().get(), views.len(), "one view for each page");
        self.segments(range, request, |segment| segment.copy_to(range.first(), views))
    }

    /// The same, told in segments, with no lock held; see [`Mm::segments`].
    ///
    /// # Errors
    /// [`RangeFaultError::Outside`].
    pub fn segments(
        &self,
        range: VaRange,
        request: &Request<'_>,
        mut found: impl FnMut(Segment),
    ) -> Result<(), RangeFaultError> {
        if !self.range().encloses(range) {
            return Err(RangeFaultError::Outside(range));
        }
        self.mm.check_covered(range)?;
        // What is learned is remembered, unless pages change meanwhile.
        let mut collection = self.watched.try_collect();
        self.mm.each_look(range, &self.beside(), request, |seen| {
            if seen.as_slice().iter().any(|segment| self.watched.known().is_news(segment)) {
                if let Some(mut table) = collection.take().and_then(Collection::lock) {
                    table.remember(seen.as_slice());
                }
                collection = self.watched.try_collect();
            }
            seen.as_slice().iter().copied().for_each(&mut found);
        });
        Ok(())
    }

    /// Waits until no change of the mirror's pages is under way, and begins to collect: for drivers with a loop of their
    /// own.
    pub fn collect(&self) -> Collection<'_, T> {
        self.watched.collect()
    }

    /// Looks something up in the table, whose entries are true as long as this lasts.
    pub fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        self.watched.look(look)
    }

    /// Ends the mirror; the table is told nothing any more.
    pub fn into_table(self) -> T {
        self.watched.into_table()
    }
}
