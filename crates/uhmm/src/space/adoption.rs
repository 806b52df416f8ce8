//! Adoption: memory of the caller's under management, for a while.
//!
//! What    [`Space::adopt`] begins one; the end of an [`Adoption`] brings every page home and ends the watch.
//! Why     a page that is away when the watch ends would read as zeros.
//! Owns    an adoption keeps the space alive. The memory stays its owner's.
//! Locks   the layout lock for writing, from the last look at the words to the end of the watch. Signals are
//!         blocked before: a signal handler that touched a page would wait for the locks that we take.
//! Fails   the beginning, with a [`MapError`]. The end does not: what cannot be had now is tried until it can.

use std::sync::Arc;

use uhmm_addr::{VaRange, VirtAddr};
use uhmm_sys::signals::Blocked;

use super::{Inner, MapError, Space};
use crate::managed::Managed;

/// Memory of the caller's under management; ends, with every page home, when dropped.
#[derive(Debug)]
pub struct Adoption {
    inner: Arc<Inner>,
    range: VaRange,
}

impl Adoption {
    /// The adopted range.
    pub const fn range(&self) -> VaRange {
        self.range
    }
}

impl Drop for Adoption {
    fn drop(&mut self) {
        self.inner.release(self.range);
    }
}

impl Space {
    /// Puts memory that exists under management: private, anonymous, whole pages.
    ///
    /// # Safety
    /// The memory must stay mapped until the adoption is dropped, must not be uhmm's own, and with
    /// [`Engine::Signal`](crate::Engine::Signal) no system call may be given addresses in it that are not
    /// resident.
    pub unsafe fn adopt(&self, start: *mut u8, len: usize) -> Result<Adoption, MapError> {
        let range = VaRange::new(VirtAddr::of(start), len)?;
        let _blocked = Blocked::all();
        // SAFETY: the caller's promise.
        unsafe { self.inner.managed.adopt(range) }?;
        Ok(Adoption { inner: self.inner.clone(), range })
    }
}

impl Inner {
    /// Brings the pages of `range` home and ends the watch over them.
    pub(super) fn release(&self, range: VaRange) {
        let mm = self.managed.mm();
        // A signal handler that touched a page would wait for the locks that we take.
        let _blocked = Blocked::all();
        // No page of it is chosen for eviction from now on; those that were chosen before come home as well.
        self.managed.retire(range);
        let (mut scratch, _buffer) = loop {
            match Managed::scratch() {
                Ok(scratch) => break scratch,
                // Without memory for this the contents could not be kept; somebody else's may go meanwhile.
                Err(_) => std::thread::yield_now(),
            }
        };
        loop {
            self.managed.bring_range_home(range, &mut scratch);
            let layout = mm.lock_layout();
            if self.managed.is_away(range) {
                continue;
            }
            self.managed.forget(range);
            mm.unmapped(&layout, range);
            let _ = mm.host().program().unregister(range);
            return;
        }
    }
}
