//! Pinned memory of a space.
//!
//! What    [`Space::pin`], whose [`Pinned`] keeps pages in RAM and where they are until it is dropped;
//!         [`Space::pins`], who holds what.
//! Owns    a [`Pinned`] keeps the space alive.
//! Fails   with a [`PinError`]; then nothing is pinned.

use std::time::{Duration, Instant};

use uhmm_addr::VaRange;
use uhmm_core::pin::{Holder, Pin, PinError, PinFor, PinTerm};
use uhmm_sys::signals::Blocked;

use super::Space;
use crate::managed::Managed;

/// How long a pin waits for room, or for an event to be read.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two attempts.
const NAP: Duration = Duration::from_millis(1);

/// Pages that stay where they are until this is dropped.
#[must_use = "dropped at once, the pages may move at once"]
#[derive(Debug)]
pub struct Pinned {
    space: Space,
    range: VaRange,
    pin: Option<Pin>,
}

impl Pinned {
    /// The pages.
    pub const fn range(&self) -> VaRange {
        self.range
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some(pin) = self.pin.take() {
            self.space.inner.managed.mm().unpin(pin);
        }
    }
}

impl Space {
    /// Pins `range` (the kernel's `pin_user_pages` with `FOLL_LONGTERM`): its pages come home, are the process's own,
    /// and are not moved until the result is dropped. Whoever migrates or evicts them meanwhile counts them as
    /// [`Skip::Pinned`](uhmm_core::stats::Skip::Pinned).
    ///
    /// Waits up to a second for room where the space has a limit. Whole chunks (2 MiB) that were pinned for writing once
    /// are pinned again without a look at their pages, as long as nothing happened to them.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use uhmm::{ByteSize, MemDevice, PinFor, Space};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # if uhmm::Space::builder().build().is_err() { return Ok(()) } // no userfaultfd for this user
    /// let space = Space::builder().device(Arc::new(MemDevice::private(ByteSize::mib(4))?)).build()?;
    /// let numbers = space.map::<u64>(4096)?;
    /// let pinned = space.pin(numbers.range(), PinFor::Write)?;
    /// assert_eq!(space.migrate(numbers.range())?.moved.get(), 0);
    /// drop(pinned);
    /// assert_eq!(space.migrate(numbers.range())?.moved.get(), 8);
    /// # Ok(())
    /// # }
    /// ```
    #[track_caller]
    pub fn pin(&self, range: VaRange, purpose: PinFor) -> Result<Pinned, PinError> {
        self.pin_for(range, purpose, PinTerm::Long)
    }

    /// As [`Space::pin`], for a transfer: pages that a coherent device has mapped in place stay where they are
    /// (`pin_user_pages` without `FOLL_LONGTERM`). As long as the result lives they cannot be pinned for longer, which
    /// would move them to RAM: [`PinError::Busy`].
    #[track_caller]
    pub fn pin_in_place(&self, range: VaRange, purpose: PinFor) -> Result<Pinned, PinError> {
        self.pin_for(range, purpose, PinTerm::Short)
    }

    #[track_caller]
    fn pin_for(&self, range: VaRange, purpose: PinFor, term: PinTerm) -> Result<Pinned, PinError> {
        let managed = &self.inner.managed;
        if !managed.range_from(range.first()).is_some_and(|(known, _)| known.encloses(range)) {
            return Err(PinError::Unmanaged(range.start()));
        }
        if let Some(pin) = managed.mm().pin_again(range, purpose, term) {
            return Ok(Pinned { space: self.clone(), range, pin: Some(pin) });
        }
        let (mut scratch, _buffer) = Managed::scratch().map_err(|_| PinError::Starved(range.start()))?;
        // A signal handler that touched a page under our claim would wait for ourselves.
        let blocked = Blocked::all();
        let start = Instant::now();
        let pin = loop {
            match managed.mm().pin_for(range, purpose, term, &mut scratch) {
                Ok(pin) => break pin,
                Err(PinError::Starved(_)) if start.elapsed() < PATIENCE => managed.wait_for_room(NAP),
                Err(PinError::Pending(_)) if start.elapsed() < PATIENCE => std::thread::sleep(NAP),
                Err(error) => return Err(error),
            }
        };
        drop(blocked);
        Ok(Pinned { space: self.clone(), range, pin: Some(pin) })
    }

    /// Who holds pins now, and where they were taken.
    pub fn pins(&self) -> Vec<Holder> {
        self.inner.managed.mm().pins()
    }
}
