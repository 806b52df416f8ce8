//! Off a device, whoever's pages they are: before the device goes away, or to use some of its memory otherwise.
//!
//! What    [`Space::evacuate`] and [`Space::evacuate_pages`]: the kernel's `migrate_device_range`. [`Space::drain`] does
//!         not give up before a deadline, and then names who is in the way.
//! Why     a driver that unloads knows its device's pages, not the addresses at which they are used. The kernel waits for
//!         the last page without end and without a word (`memunmap_pages`).
//! Locks   one for each device, around the number of those who want nothing moved to it.
//! Fails   with a [`MigrateError`] before anything is moved. Afterwards page by page: what could not be moved is
//!         still on the device, can be used as before, and is counted by reason.

use std::ops::Range;
use std::time::{Duration, Instant};

use uhmm_addr::{PageCount, PfnRange};
use uhmm_core::migrate::Migrated;
use uhmm_core::pagemap::Pagemap;
use uhmm_core::pin::Holder;
use uhmm_core::stats::Skipped;
use uhmm_sys::futex::Lock;
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

/// How many want nothing moved to a device.
pub(super) type Stops = Lock<u32>;

/// A device to which nothing is moved until this is dropped.
#[derive(Debug)]
struct Stopped<'a> {
    map: &'a Pagemap,
    stops: &'a Stops,
}

impl<'a> Stopped<'a> {
    fn new(map: &'a Pagemap, stops: &'a Stops) -> Self {
        let mut wanted = stops.lock();
        *wanted += 1;
        map.stop_allocation(true);
        Self { map, stops }
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let mut wanted = self.stops.lock();
        *wanted -= 1;
        if *wanted == 0 {
            self.map.stop_allocation(false);
        }
    }
}

/// A device of which no page is in use, and to which nothing is moved, until this is dropped.
#[must_use = "the device may be used again as soon as this is dropped"]
#[derive(Debug)]
pub struct Drained<'a> {
    _stopped: Stopped<'a>,
}

/// Why a device could not be emptied. It can be used as before.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// Nothing was tried.
    #[error(transparent)]
    Migrate(#[from] MigrateError),
    /// The time is over.
    #[error(transparent)]
    InUse(#[from] Box<InUse>),
}

/// What is left on a device that was to be empty.
#[derive(Debug, thiserror::Error)]
#[error("{left} of the device are still in use; {skipped:?}{}", places(.holders))]
pub struct InUse {
    /// Pages in use.
    pub left: PageCount,
    /// Why the last look could not move those that it found. What other processes use it does not find.
    pub skipped: Skipped,
    /// Who has pinned some of them where they are: to be asked to let go.
    pub holders: Vec<Holder>,
}

fn places(holders: &[Holder]) -> String {
    holders.iter().map(|holder| format!("; {} pinned at {}", holder.range, holder.place)).collect()
}

/// Between two looks at a device that does not become empty.
const NAP: Duration = Duration::from_millis(1);

impl Space {
    /// Empties device number `device` for good: refuses it new pages, and brings those that it has home until none is
    /// left, for as long as `patience` says. Until the result is dropped it stays empty, to be reset or taken away.
    ///
    /// # Errors
    /// [`DrainError::InUse`], with the pins that keep pages on the device.
    pub fn drain(&self, device: usize, patience: Duration) -> Result<Drained<'_>, DrainError> {
        self.drain_onto(device, None, patience)
    }

    /// The same, where what can goes to device number `onto`, and only the rest home.
    pub(super) fn drain_onto(
        &self,
        device: usize,
        onto: Option<usize>,
        patience: Duration,
    ) -> Result<Drained<'_>, DrainError> {
        let stopped = self.stop(device)?;
        let start = Instant::now();
        loop {
            let mut done = self.evacuate_range(device, stopped.map.range(), onto)?;
            if onto.is_some() && !done.left.is_zero() {
                done = self.evacuate_range(device, stopped.map.range(), None)?;
            }
            if done.left.is_zero() {
                return Ok(Drained { _stopped: stopped });
            }
            if start.elapsed() >= patience {
                let holders = self.holders_on(stopped.map);
                return Err(Box::new(InUse { left: done.left, skipped: done.skipped, holders }).into());
            }
            std::thread::sleep(NAP);
        }
    }

    /// The pins of pages that are on the device.
    fn holders_on(&self, map: &Pagemap) -> Vec<Holder> {
        let table = self.inner.managed.mm().table();
        let holds = |holder: &Holder| {
            holder.range.iter().any(|page| {
                let pfn = table.get(page).and_then(|entry| entry.load().pfn());
                pfn.is_some_and(|pfn| map.range().contains(pfn))
            })
        };
        let mut holders = self.pins();
        holders.retain(holds);
        holders
    }

    fn stop(&self, device: usize) -> Result<Stopped<'_>, MigrateError> {
        let map = self.pagemap(device)?;
        Ok(Stopped::new(map, &self.inner.stops[device]))
    }

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
        let stopped = self.stop(device)?;
        self.evacuate_range(device, stopped.map.range(), to)
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
