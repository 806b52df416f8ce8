//! Pages that are used first and asked about afterwards (amdgpu's `get_user_pages` and `get_user_pages_done`).
//!
//! What    [`Mirror::user_pages`] has pages brought and tells what they are; [`UserPages::done`] says, when the caller
//!         has prepared his work with them, whether that is still true, and keeps it true until the work is handed on.
//! Why     a driver that maps a user's buffer for one job builds its command first, which takes long, and needs no
//!         table for it. He may only submit it if nothing changed.
//! Owns    the views are the caller's; the sequence is the mirror's.
//! Locks   none in between; the mirror's from [`UserPages::done`] until its guard is dropped.
//! Races   as those of a [`Collection`], which this is.
//! Fails   as [`Mirror::populate`]; a range that is larger than what may be resident never comes to rest, and patience
//!         ends. `done` fails where pages changed: the work is thrown away, and pages are asked for again.

use core::fmt;

use uhmm_addr::VaRange;

use super::request::{Patience, RangeFaultError, Request, Retry};
use super::view::{PageView, Pages};
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
    /// Makes the pages of `range` what `request` asks, all of them at one time, and tells in `views`, one for each page,
    /// what they are.
    ///
    /// As with [`Mirror::populate`] the caller holds no lock.
    ///
    /// # Errors
    /// See [`RangeFaultError`].
    ///
    /// # Panics
    /// If there are more or fewer views than pages.
    pub fn user_pages<'a>(
        &'a self,
        range: VaRange,
        request: &Request<'_>,
        views: &'a mut [PageView],
        scratch: &mut Scratch,
        patience: &mut dyn Patience,
    ) -> Result<UserPages<'a, T>, RangeFaultError> {
        assert_eq!(range.pages().get(), views.len(), "one view for each page");
        if !self.range().encloses(range) || !self.mm.table().covers(range) {
            return Err(RangeFaultError::Outside(range));
        }
        // To bring the pages takes as long as it takes; having them all at one time does not.
        let mut bringing = true;
        loop {
            let collection = self.watched.collect();
            let gone = *collection.gone();
            self.mm.permit(range, &gone, request)?;
            let mut rest = &mut *views;
            for chunk in range.chunks() {
                let (part, behind) = rest.split_at_mut(chunk.pages().get());
                rest = behind;
                if bringing {
                    patience.begin();
                }
                let request = request.skip(chunk.first().since(range.first()).get());
                self.mm.fault_chunk(chunk, &gone, &request, part, scratch, patience)?;
            }
            if !collection.is_stale() {
                return Ok(UserPages { pages: Pages::new(range, views), collection });
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
