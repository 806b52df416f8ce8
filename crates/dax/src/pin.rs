//! References to pages of which somebody may be letting go just now.
//!
//! What    [`pin`]: the pagemap's own, but for the moment in which a page's last reference ends: its driver is told then,
//!         and nobody gets it (`PageError::Claimed`).
//! Waits   for that moment, which the thread that causes it ends without any lock of ours. Blocks of files are claimed for
//!         longer, but only with the state locked, as it is when files ask here; pages of a device are claimed by nobody.

use uhmm_addr::PfnRange;
use uhmm_core::pagemap::{PageError, PageRange, Pagemap};

#[track_caller]
pub(crate) fn pin(map: &Pagemap, pages: PfnRange) -> Result<PageRange, PageError> {
    loop {
        match map.pin(pages) {
            Err(PageError::Claimed(_)) => std::thread::yield_now(),
            pinned => return pinned,
        }
    }
}
