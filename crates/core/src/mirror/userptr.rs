//! Pages that are used first and asked about afterwards (amdgpu's `get_user_pages` and `get_user_pages_done`).
//!
//! What    [`Mirror::user_pages`] has pages brought and tells what they are; [`UserPages::done`] says, when the caller
//!         has prepared his work with them, whether that is still true, and keeps it true until the work is handed on.
//! Why     a driver that maps a user's buffer for one job builds its command first, which takes long, and needs no
//!         table for it. He may only submit it if nothing changed.
//! Owns    the segments are the caller's; the sequence is the mirror's.
//! Locks   none in between; the mirror's from [`UserPages::done`] until its guard is dropped.
//! Races   as those of a [`Collection`], which this is.
//! Fails   as [`Mirror::populate`]; a range that is larger than what may be resident never comes to rest, and patience
//!         ends. `done` fails where pages changed: the work is thrown away, and pages are asked for again.

use core::fmt;

use alloc::vec::Vec;

use uhmm_addr::VaRange;

use super::look::{Beside, behind};
use super::request::{Patience, RangeFaultError, Request, Retry};
use super::view::{Pages, Segment, Segments};
use super::{Checked, Collection, Mirror};
use crate::fault::Scratch;
use crate::host::Host;

/// Pages changed while they were used: what was done with them is to be thrown away, and they are to be asked for again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("pages changed while they were used")]
pub struct Changed;

/// What pages were when they were asked for.
#[must_use = "what is known of the pages is worth nothing unless it is still true at the end"]
pub struct UserPages<'a, T> {
    pages: Pages<'a>,
    collection: Collection<'a, T>,
}

impl<T> fmt::Debug for UserPages<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserPages").field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl<'a, T> UserPages<'a, T> {
    /// The pages, as they were.
    pub const fn pages(&self) -> Pages<'a> {
        self.pages
    }

    /// Whether they are known to have changed, so that it is useless to go on. `false` says nothing.
    pub fn is_stale(&self) -> bool {
        self.collection.is_stale()
    }

    /// Keeps the pages as they are until the guard is dropped, if they are still as they were. Whoever would change
    /// them waits meanwhile: the work is handed to the device, and no more.
    ///
    /// # Errors
    /// They are not.
    pub fn done(self) -> Result<Checked<'a, T>, Changed> {
        self.collection.lock().ok_or(Changed)
    }
}

impl<H: Host, T> Mirror<'_, H, T> {
    /// Makes the pages of `range` what `request` asks, all of them at one time, and tells in `segments`, which are made
    /// anew, what they are. `room` is for those that are looked at together.
    ///
    /// As with [`Mirror::populate`] the caller holds no lock.
    ///
    /// # Errors
    /// See [`RangeFaultError`]. The segments are then worth nothing.
    ///
    /// # Panics
    /// If there is no room at all.
    pub fn user_pages<'a>(
        &'a self,
        range: VaRange,
        request: &Request<'_>,
        room: &mut [Segment],
        segments: &'a mut Vec<Segment>,
        scratch: &mut Scratch,
        patience: &mut dyn Patience,
    ) -> Result<UserPages<'a, T>, RangeFaultError> {
        assert!(!room.is_empty(), "pages are told of in segments");
        if !self.range().encloses(range) || !self.mm.table().covers(range) {
            return Err(RangeFaultError::Outside(range));
        }
        // To bring the pages takes as long as it takes; having them all at one time does not.
        let mut bringing = true;
        let mut seen = Segments::new(room);
        loop {
            let collection = self.watched.collect();
            let known = Some(self.watched.known());
            let beside = Beside { gone: *collection.gone(), known, huge: false };
            self.mm.permit(range, &beside, request)?;
            segments.clear();
            let mut rest = Some(range);
            while let Some(left) = rest {
                if bringing {
                    patience.begin();
                }
                let request = request.skip(left.first().since(range.first()).get());
                self.mm.fault_part(left, &beside, &request, &mut seen, scratch, patience)?;
                segments.extend_from_slice(seen.as_slice());
                rest = behind(range, seen.end());
            }
            if !collection.is_stale() {
                return Ok(UserPages { pages: Pages::new(segments), collection });
            }
            if self.mm.is_closed() {
                return Err(RangeFaultError::Closed);
            }
            if core::mem::take(&mut bringing) {
                patience.begin();
            }
            if !patience.again(Retry::Changed) {
                return Err(RangeFaultError::TimedOut(Retry::Changed));
            }
        }
    }
}
