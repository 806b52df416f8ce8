//! Moving the pages of a range to a device.
//!
//! What    [`Migration`], what to move and where to: the kernel's `migrate_vma`. [`Space::migrate`] and
//!         [`Space::migrate_to`] are the plain ones.
//! Locks   none beyond those of core.
//! Fails   with a [`MigrateError`] before anything is moved. Afterwards page by page, with a reason for each.

use uhmm_addr::VaRange;
use uhmm_core::migrate::{Migrated, Select, Sources};
use uhmm_core::mm::Epoch;
use uhmm_core::notifier::Owner;
use uhmm_core::stats::Skip;
use uhmm_sys::signals::Blocked;

use super::{MigrateError, Space};
use crate::managed::Managed;

/// A migration to be: which pages go where.
///
/// As in the kernel, pages in RAM and holes are taken unless something else is said, and pages that are on devices
/// are not: those of one owner can be asked for, those of others are passed over. A hole gets a page on the device
/// without a copy.
///
/// ```
/// use uhmm::{ByteSize, MemDevice, Skip, Space};
/// # use std::sync::Arc;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # if uhmm::Space::builder().build().is_err() { return Ok(()) } // no userfaultfd for this user
///
/// let near = Arc::new(MemDevice::private(ByteSize::mib(1))?);
/// let far = Arc::new(MemDevice::private(ByteSize::mib(1))?);
/// let space = Space::builder().device(near).device(far).build()?;
/// let mut numbers = space.map::<u64>(1024)?;                 // two pages
/// numbers[0] = 7;
/// let done = space.migration(numbers.range()).run()?;        // to device 0
/// assert_eq!(done.moved.get(), 2);
/// let done = space.migration(numbers.range()).to(1).run()?;
/// assert_eq!(done.skipped.get(Skip::Foreign), 2);            // another driver's
/// let near = space.owner(0).unwrap();
/// let done = space.migration(numbers.range()).private(near).to(1).run()?;
/// assert_eq!((done.moved.get(), done.direct.get()), (2, 2)); // from device to device
/// assert_eq!(numbers[0], 7);
/// # Ok(())
/// # }
/// ```
#[must_use = "nothing moves before `run`"]
#[derive(Clone, Copy, Debug)]
pub struct Migration<'a> {
    space: &'a Space,
    range: VaRange,
    to: usize,
    sources: Sources,
}

impl Migration<'_> {
    /// To device number `device` instead of the first one.
    pub const fn to(self, device: usize) -> Self {
        Self { to: device, ..self }
    }

    /// Whether to take pages that are in RAM (`MIGRATE_VMA_SELECT_SYSTEM`).
    pub fn ram(mut self, take: bool) -> Self {
        self.sources.ram = take.then_some(Select::All);
        self
    }

    /// Whether to take pages that hold nothing yet.
    pub const fn holes(mut self, take: bool) -> Self {
        self.sources.holes = take;
        self
    }

    /// Takes pages that are on private devices of `owner` as well (`MIGRATE_VMA_SELECT_DEVICE_PRIVATE`).
    pub const fn private(mut self, owner: Owner) -> Self {
        self.sources.private = Some(owner);
        self
    }

    /// Takes pages that are on coherent devices of `owner` as well (`MIGRATE_VMA_SELECT_DEVICE_COHERENT`).
    pub const fn coherent(mut self, owner: Owner) -> Self {
        self.sources.coherent = Some(owner);
        self
    }

    /// Calls it the doing of `owner`, whose driver brings its own tables up to date: changes are told with this
    /// owner, so that its subscribers can pass over them. Without this, everybody is told as usual.
    pub const fn by(mut self, owner: Owner) -> Self {
        self.sources.by = Some(owner);
        self
    }

    /// Moves the pages. Each is counted once, as moved or by the reason why it was not.
    pub fn run(self) -> Result<Migrated, MigrateError> {
        let Self { space, range, to, sources } = self;
        let map = space.pagemap(to)?;
        let (mut scratch, _buffer) = Managed::scratch().map_err(|_| MigrateError::NoMemory)?;
        space.move_twice(range, |since| {
            space.inner.managed.mm().migrate_from(range, since, map, &sources, &mut scratch)
        })
    }
}

impl Space {
    /// A migration of pages of `range`, to be told more.
    pub const fn migration(&self, range: VaRange) -> Migration<'_> {
        Migration { space: self, range, to: 0, sources: Sources::RAM }
    }

    /// Moves the resident pages of `range` to the first device. Holes stay holes: they cost nothing where they are.
    pub fn migrate(&self, range: VaRange) -> Result<Migrated, MigrateError> {
        self.migrate_to(range, 0)
    }

    /// Moves the resident pages of `range` to device number `device`.
    pub fn migrate_to(&self, range: VaRange, device: usize) -> Result<Migrated, MigrateError> {
        let map = self.pagemap(device)?;
        self.move_twice(range, |since| self.inner.managed.mm().migrate(range, since, map, Select::All))
    }

    /// Brings the pages of `range` home that device number `device` has (a driver's migration to system memory), also
    /// those that a coherent device has mapped in place, which no touch brings home.
    pub fn recall(&self, range: VaRange, device: usize) -> Result<Migrated, MigrateError> {
        let map = self.pagemap(device)?;
        let (mut scratch, _buffer) = Managed::scratch().map_err(|_| MigrateError::NoMemory)?;
        let _blocked = Blocked::all();
        let managed = &self.inner.managed;
        if !managed.range_from(range.first()).is_some_and(|(known, _)| known.encloses(range)) {
            return Err(MigrateError::Unmanaged(range));
        }
        Ok(managed.mm().evict_pfns(range, map.range(), None, &mut scratch))
    }

    /// Moves pages, and once more after those that a child shares have become this process's own.
    fn move_twice(
        &self,
        range: VaRange,
        mut step: impl FnMut(Epoch) -> Migrated,
    ) -> Result<Migrated, MigrateError> {
        let managed = &self.inner.managed;
        // A signal handler that touched a page under our claim would wait for ourselves.
        let _blocked = Blocked::all();
        let _lent = managed.lend_thread();
        let since = match managed.range_from(range.first()) {
            Some((known, since)) if known.encloses(range) => since,
            _ => return Err(MigrateError::Unmanaged(range)),
        };
        let mut done = step(since);
        if done.skipped.get(Skip::Busy) == 0 {
            return Ok(done);
        }
        // Shared with a child since a fork, or pinned; pages that are shared can be had for a copy.
        managed.unshare(range);
        let mut second = step(since);
        // What went the first time is there now, and is counted already.
        second.skipped.take_off(Skip::Elsewhere, done.moved.get());
        done.skipped = second.skipped;
        second.skipped = Default::default();
        done.merge(&second);
        Ok(done)
    }
}
