//! Pages that the mirror's device alone may touch, until somebody else does (the kernel's device-exclusive entries).
//!
//! What    [`Mirror::exclusive`] takes pages away from the program, loads as well as stores, and has the table told by
//!         which address the device reaches their frames. A touch, by any thread or the kernel, tells the table to
//!         forget the page ([`Event::Exclusive`](crate::notifier::Event::Exclusive)) and brings it home with what the
//!         device wrote.
//! Why     atomic operations of a device whose link knows none: for their length, nobody else may reach the page.
//! How     pages are brought home for writing, so that they are the process's own, and lent
//!         ([`migrate`](crate::migrate)). A page counts as the mirror's only if its word says exclusive and its slot
//!         names this mirror, seen after the ticket that the table's lock is then taken with.
//! Rule    the device touches a frame only with the table's lock held, in [`Mirror::look`] or in `install`, and only
//!         what the table says then: whoever takes a frame away has been through that lock first.
//! Races   *a touch before `install`*: the ticket is stale, and it is tried again. *two mirrors*: the second request is
//!         a touch like any other. *fork*: the table is told; the child gets the bytes, the frame stays the device's
//!         to ask for again.
//! Fails   as [`Mirror::populate`] where pages cannot be brought; page by page where they cannot be taken: some are
//!         pinned, or there is no slot. Partial success is normal.

#[cfg(all(test, loom))]
mod loom;

use uhmm_addr::{PageCount, VaRange};

use super::look::Beside;
use super::request::{Patience, RangeFaultError, Request, Retry, Want};
use super::view::{Pages, Segment, Segments};
use super::{Mirror, MirrorTable};
use crate::fault::Scratch;
use crate::host::Host;
use crate::mm::Epoch;
use crate::notifier::Owner;
use crate::stats::{Skip, Skipped};

/// What a request for exclusive pages goes by.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// A moment before which the pages are known to have been registered ([`Mm::epoch`](crate::mm::Mm::epoch)).
    pub since: Epoch,
    /// Whose doing it is: that owner's subscribers may pass over what they are told of it. Mirrors do not.
    pub by: Option<Owner>,
}

/// What became of a request.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Exclusive {
    /// Pages that were the device's alone when the table was told.
    pub pages: PageCount,
    /// The others, by reason.
    pub skipped: Skipped,
}

/// Whether asking once more is of no use for a page that was passed over for this reason.
const fn is_final(why: Skip) -> bool {
    matches!(why, Skip::Busy | Skip::Refused | Skip::Pinned | Skip::NoFrame | Skip::Failed)
}

impl<H: Host, T: MirrorTable> Mirror<'_, H, T> {
    /// Makes the pages of `range` the device's alone, and has `install` put them into the table, batch by batch, as many
    /// pages of a chunk at a time as there is `room` for, and otherwise as with [`Mirror::populate`], with the same duties.
    /// [`PageView::Exclusive`](super::PageView::Exclusive) names the frame's address; pages that
    /// could not be had are told as they are.
    ///
    /// # Errors
    /// See [`RangeFaultError`]; the mappings must permit writing. Batches before the one that failed are installed.
    ///
    /// # Panics
    /// If there is no room at all.
    pub fn exclusive(
        &self,
        range: VaRange,
        terms: &Terms,
        room: &mut [Segment],
        scratch: &mut Scratch,
        patience: &mut dyn Patience,
        mut install: impl FnMut(&mut T, Pages<'_>),
    ) -> Result<Exclusive, RangeFaultError> {
        assert!(!room.is_empty(), "pages are told of in segments");
        if !self.range().encloses(range) || !self.mm.table().covers(range) {
            return Err(RangeFaultError::Outside(range));
        }
        // All of it first: what is forbidden touches nothing.
        self.mm.permit(range, &self.beside(), &Request::all(Want::Write))?;
        let most = PageCount::new(room.len());
        let mut seen = Segments::new(room);
        let mut result = Exclusive::default();
        for chunk in range.chunks() {
            let mut rest = Some(chunk);
            while let Some(left) = rest {
                let batch = left.take(most);
                let done = self.exclusive_batch(batch, terms, &mut seen, scratch, patience, &mut install)?;
                result.pages = result.pages.plus(done.pages);
                result.skipped.merge(&done.skipped);
                rest = left.skip(batch.pages());
            }
        }
        Ok(result)
    }

    fn exclusive_batch(
        &self,
        batch: VaRange,
        terms: &Terms,
        seen: &mut Segments<'_>,
        scratch: &mut Scratch,
        patience: &mut dyn Patience,
        install: &mut impl FnMut(&mut T, Pages<'_>),
    ) -> Result<Exclusive, RangeFaultError> {
        let request = Request::all(Want::Write).holding(self.watched.holder());
        patience.begin();
        loop {
            if self.mm.is_closed() {
                return Err(RangeFaultError::Closed);
            }
            let beside = self.beside();
            self.mm.permit(batch, &beside, &request)?;
            self.mm.fault_part(batch, &beside, &request, seen, scratch, patience)?;
            let mut skipped = Skipped::default();
            self.take(seen, terms, patience, &mut skipped);
            let collection = self.watched.collect();
            let beside = Beside { gone: *collection.gone(), ..beside };
            if !self.mm.look(batch, &beside, &request, seen) {
                if patience.again(Retry::Pending) {
                    continue;
                }
                return Err(RangeFaultError::TimedOut(Retry::Pending));
            }
            let exclusive = seen.as_slice().iter().filter(|segment| segment.view().is_exclusive());
            let pages = PageCount::new(exclusive.map(|segment| segment.range().pages().get()).sum());
            let missing = batch.pages().minus(pages).get() as u64;
            let hopeless: u64 =
                skipped.iter().filter(|(why, _)| is_final(*why)).map(|(_, count)| count).sum();
            if missing > hopeless && patience.again(Retry::Changed) {
                continue;
            }
            if let Some(mut table) = collection.lock() {
                // Taken, and touched before the look.
                skipped.add(Skip::Raced, missing.saturating_sub(skipped.total()) as usize);
                self.mm.stats().skip(&skipped);
                install(&mut table, seen.pages());
                return Ok(Exclusive { pages, skipped });
            }
            if !patience.again(Retry::Changed) {
                return Err(RangeFaultError::TimedOut(Retry::Changed));
            }
        }
    }

    /// Has the pages lent that are not yet.
    fn take(&self, seen: &Segments<'_>, terms: &Terms, patience: &mut dyn Patience, skipped: &mut Skipped) {
        for alike in
            seen.as_slice().chunk_by(|one, next| one.view().is_exclusive() == next.view().is_exclusive())
        {
            if alike[0].view().is_exclusive() {
                continue;
            }
            let part = Pages::new(alike).range();
            // A frame that is shared since a fork cannot be moved. What could not be done is found by the move.
            let _ = self.mm.host().touch(part, true);
            let holder = self.watched.holder();
            patience.moving(&mut || self.mm.lend(part, terms.since, terms.by, holder, skipped));
        }
    }
}
