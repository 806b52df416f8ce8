//! Off a device, whoever's pages they are: before the device goes away, or to use some of its memory otherwise.
//!
//! What    [`Space::evacuate`] and [`Space::evacuate_pages`]: the kernel's `migrate_device_range`.
//! Why     a driver that unloads knows its device's pages, not the addresses at which they are used.
//! Fails   with a [`MigrateError`] before anything is moved. Afterwards page by page: what could not be moved is
//!         still on the device, can be used as before, and is counted by reason.

use std::ops::Range;

use uhmm_addr::{PageCount, PfnRange};
use uhmm_core::migrate::Migrated;
use uhmm_core::stats::Skipped;
use uhmm_sys::signals::Blocked;

use super::{MigrateError, Space};
use crate::managed::Managed;

/// What an evacuation did.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Evacuated {
    /// Device pages that were given up; clean copies of pages in RAM are among them.
    pub moved: PageCount,
    /// Pages that were found and could not be moved, by reason.
    pub skipped: Skipped,
    /// Pages of the device that are in use when all is done: those that were skipped, those outside the range, and
    /// those that other processes use.
    pub left: PageCount,
}

impl Space {
    /// Moves every page of device number `device` home, or to device number `to`. Nothing is moved to the device
    /// meanwhile; afterwards it can be used again.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use uhmm::{ByteSize, MemDevice, Space};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # if uhmm::Space::builder().build().is_err() { return Ok(()) } // no userfaultfd for this user
    /// let space = Space::builder().device(Arc::new(MemDevice::private(ByteSize::mib(1))?)).build()?;
    /// let mut numbers = space.map::<u64>(512)?;
    /// numbers[0] = 7;
    /// let _ = space.migrate(numbers.range())?;
    /// let done = space.evacuate(0, None)?;
    /// assert_eq!((done.moved.get(), done.left.get()), (1, 0));
    /// assert_eq!(numbers[0], 7);
    /// # Ok(())
    /// # }
    /// ```
    pub fn evacuate(&self, device: usize, to: Option<usize>) -> Result<Evacuated, MigrateError> {
        let map = self.pagemap(device)?;
        map.stop_allocation(true);
        let done = self.evacuate_range(device, map.range(), to);
        map.stop_allocation(false);
        done
    }

    /// As [`Space::evacuate`], of the pages of the device with these numbers. They may be taken for something else
    /// as soon as they are free.
    pub fn evacuate_pages(
        &self,
        device: usize,
        pages: Range<usize>,
        to: Option<usize>,
    ) -> Result<Evacuated, MigrateError> {
        let all = self.pagemap(device)?.range();
        let first = all.start.forward(PageCount::new(pages.start).at_most(all.pages));
        let last = PageCount::new(pages.end).at_most(all.pages);
        let pages = PfnRange::new(first, last.minus(PageCount::new(pages.start).at_most(last)));
        self.evacuate_range(device, pages, to)
    }

    fn evacuate_range(
        &self,
        device: usize,
        pages: PfnRange,
        to: Option<usize>,
    ) -> Result<Evacuated, MigrateError> {
        let map = self.pagemap(device)?;
        let to = match to {
            Some(to) if to == device => return Err(MigrateError::Itself(device)),
            Some(to) => Some(self.pagemap(to)?),
            None => None,
        };
        let (mut scratch, _buffer) = Managed::scratch().map_err(|_| MigrateError::NoMemory)?;
        let _blocked = Blocked::all();
        let managed = &self.inner.managed;
        let mut done = Evacuated::default();
        loop {
            let mut pass = Migrated::default();
            // Wherever its pages are: not only where more may be taken out.
            let everywhere = managed.mm().table().range();
            pass.merge(&managed.mm().evict_pfns(everywhere, pages, to, &mut scratch));
            done.moved = done.moved.plus(pass.moved);
            done.skipped = pass.skipped;
            done.left = map.live();
            // A page on its way to the device while this one looked is found by the next look.
            if pass.moved.is_zero() || done.left.is_zero() {
                return Ok(done);
            }
        }
    }
}
