//! A device that does what a test tells it.
//!
//! What     [`FakeDevice`]: pages in ordinary memory, that can fail the n-th transfer, be full after so many writes,
//!          call back in the middle of a transfer, and that counts what it did.
//! Why      "what if exactly this copy fails" can be asked of every copy in turn.
//! Owns     its bytes.
//! Fails    when told to, and for pages that it does not have, with `Io(ENXIO)`. A transfer that is told to
//!          fail copies nothing.

use std::any::Any;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use uhmm_addr::{PAGE_SIZE, PageCount};
use uhmm_core::device::{
    Device, DeviceMemory, DevicePage, MemoryType, PeerTransfer, Transfer, TransferError,
};

use crate::sim_host::memory::Memory;

const ENXIO: i32 = 6;
const EIO: i32 = 5;

/// What a transfer is about to do, for the hook of [`FakeDevice::on_transfer`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FakeAccess {
    /// Device to RAM.
    Read,
    /// RAM to device.
    Write,
}

type Hook = Box<dyn Fn(FakeAccess, DevicePage, PageCount) + Send + Sync>;

/// A device for tests, in ordinary memory.
pub struct FakeDevice {
    memory_type: MemoryType,
    linked: bool,
    bytes: Arc<Memory>,
    one_at_a_time: Mutex<()>,
    pages: PageCount,
    plan: Mutex<Plan>,
    hook: Option<Hook>,
    reads: AtomicU64,
    writes: AtomicU64,
    discards: AtomicU64,
    hops: AtomicU64,
}

#[derive(Default)]
struct Plan {
    /// Transfers up to and with the one that fails, and how.
    fail: Option<(u64, TransferError)>,
    /// Pages that may still be written.
    room: Option<usize>,
    /// Pages that cannot be read.
    lost: Vec<DevicePage>,
}

impl FakeDevice {
    /// A device of `pages` pages, all zeros, that fails nothing.
    pub fn new(pages: PageCount) -> Self {
        Self {
            memory_type: MemoryType::Private,
            linked: false,
            bytes: Arc::new(Memory::new(pages)),
            one_at_a_time: Mutex::new(()),
            pages,
            plan: Mutex::default(),
            hook: None,
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            discards: AtomicU64::new(0),
            hops: AtomicU64::new(0),
        }
    }

    /// The same device, with a link over which it reaches every other one that has one.
    #[must_use]
    pub fn with_link(self, linked: bool) -> Self {
        Self { linked, ..self }
    }

    /// The same device, seen by the CPU in this way. Where the pages of a coherent one have frames is up to the simulated
    /// host that knows its memory.
    #[must_use]
    pub fn with_memory_type(self, memory_type: MemoryType) -> Self {
        Self { memory_type, ..self }
    }

    /// What its pages lie in.
    pub(crate) fn bytes(&self) -> Arc<Memory> {
        self.bytes.clone()
    }

    /// The same device, which calls `hook` before each transfer copies, with no lock held: to wait there, to
    /// look, or to change something.
    #[must_use]
    pub fn on_transfer(
        self,
        hook: impl Fn(FakeAccess, DevicePage, PageCount) + Send + Sync + 'static,
    ) -> Self {
        Self { hook: Some(Box::new(hook)), ..self }
    }

    /// From now on, the `n`-th transfer, read or write (1 is the next one), fails with `error`, once.
    pub fn fail_nth(&self, n: u64, error: TransferError) {
        lock(&self.plan).fail = (n > 0).then_some((n, error));
    }

    /// Whether a failure asked for with [`FakeDevice::fail_nth`] is still to come.
    pub fn failure_pending(&self) -> bool {
        lock(&self.plan).fail.is_some()
    }

    /// From now on, `pages` more pages can be written; a write that needs more fails with
    /// [`TransferError::Full`]. A discard makes as much room as it names.
    pub fn full_after(&self, pages: PageCount) {
        lock(&self.plan).room = Some(pages.get());
    }

    /// From now on page `page` cannot be read.
    pub fn lose(&self, page: DevicePage) {
        lock(&self.plan).lost.push(page);
    }

    /// Writes never fill it any more.
    pub fn never_full(&self) {
        lock(&self.plan).room = None;
    }

    /// Transfers from the device that were asked for, failed ones included.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Transfers to the device that were asked for, failed ones included.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// Calls of discard.
    pub fn discards(&self) -> u64 {
        self.discards.load(Ordering::Relaxed)
    }

    /// Transfers from other devices that were asked for, failed ones included.
    pub fn hops(&self) -> u64 {
        self.hops.load(Ordering::Relaxed)
    }

    /// What the device holds in `page`; `None` if it has no such page.
    pub fn page(&self, page: DevicePage) -> Option<Vec<u8>> {
        let first = self.span(page, PageCount::ONE)?.start;
        let _alone = lock(&self.one_at_a_time);
        Some(self.bytes.read(first).into_vec())
    }

    fn span(&self, page: DevicePage, pages: PageCount) -> Option<Range<usize>> {
        let start = usize::try_from(page.0).ok()?;
        let end = start.checked_add(pages.get())?;
        (end <= self.pages.get()).then_some(start..end)
    }

    /// What the plan says to the next transfer.
    fn permit(&self, access: FakeAccess, pages: PageCount) -> Result<(), TransferError> {
        let mut plan = lock(&self.plan);
        if let Some((n, error)) = plan.fail.take() {
            if n == 1 {
                return Err(error);
            }
            plan.fail = Some((n - 1, error));
        }
        if let (FakeAccess::Write, Some(room)) = (access, plan.room) {
            plan.room = Some(room.checked_sub(pages.get()).ok_or(TransferError::Full)?);
        }
        Ok(())
    }

    fn one(&self, access: FakeAccess, transfer: &Transfer) -> Result<(), TransferError> {
        let span = self.span(transfer.page(), transfer.pages()).ok_or(TransferError::Io(ENXIO))?;
        if let Some(hook) = &self.hook {
            hook(access, transfer.page(), transfer.pages());
        }
        self.permit(access, transfer.pages())?;
        let ram = transfer.ram().as_ptr();
        let _alone = lock(&self.one_at_a_time);
        // SAFETY: the span is inside the memory, and as long as the transfer, whose maker promised that its RAM may be
        // accessed; RAM that somebody else lends is not part of this device's memory.
        unsafe {
            let device = self.bytes.base().as_ptr().add(span.start * PAGE_SIZE);
            match access {
                FakeAccess::Read => device.copy_to_nonoverlapping(ram, transfer.bytes()),
                FakeAccess::Write => device.copy_from_nonoverlapping(ram, transfer.bytes()),
            }
        }
        Ok(())
    }
}

impl FakeDevice {
    fn one_hop(&self, source: &Self, piece: &PeerTransfer) -> Result<(), TransferError> {
        let from = source.span(piece.from(), piece.pages()).ok_or(TransferError::Io(ENXIO))?;
        let to = self.span(piece.to(), piece.pages()).ok_or(TransferError::Io(ENXIO))?;
        if let Some(hook) = &self.hook {
            hook(FakeAccess::Write, piece.to(), piece.pages());
        }
        self.permit(FakeAccess::Write, piece.pages())?;
        for (from, to) in from.zip(to) {
            let bytes = source.bytes.read(from);
            self.bytes.write(to, &bytes);
        }
        Ok(())
    }
}

impl Device for FakeDevice {
    fn name(&self) -> &str {
        "fake:"
    }

    fn memory_type(&self) -> MemoryType {
        self.memory_type
    }

    fn memory(&self) -> Option<DeviceMemory> {
        if self.memory_type == MemoryType::Private {
            return None;
        }
        // The allocation is longer where the device has no page.
        let range = self.bytes.range().take(self.pages);
        // SAFETY: an allocation of the device's own, whose pages the simulated host exchanges by copying.
        Some(unsafe { DeviceMemory::new(range) })
    }

    fn capacity(&self) -> PageCount {
        self.pages
    }

    fn write(&self, batch: &mut [Transfer]) {
        for transfer in batch {
            self.writes.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = self.one(FakeAccess::Write, transfer) {
                transfer.fail(error);
            }
        }
    }

    fn read(&self, batch: &mut [Transfer]) {
        for transfer in batch {
            self.reads.fetch_add(1, Ordering::Relaxed);
            let pages = transfer.page().0..transfer.page().0.saturating_add(transfer.pages().get() as u64);
            if lock(&self.plan).lost.iter().any(|lost| pages.contains(&lost.0)) {
                transfer.fail(TransferError::Io(EIO));
            } else if let Err(error) = self.one(FakeAccess::Read, transfer) {
                transfer.fail(error);
            }
        }
    }

    fn copy_from(&self, source: &dyn Device, batch: &mut [PeerTransfer]) -> bool {
        let source = source.as_any().and_then(<dyn Any>::downcast_ref::<Self>);
        let Some(source) = source.filter(|source| self.linked && source.linked) else { return false };
        for piece in batch {
            self.hops.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = self.one_hop(source, piece) {
                piece.fail(error);
            }
        }
        true
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn discard(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        self.discards.fetch_add(1, Ordering::Relaxed);
        let span = self.span(page, pages).ok_or(TransferError::Io(ENXIO))?;
        span.for_each(|page| self.bytes.write(page, &[0; PAGE_SIZE]));
        let mut plan = lock(&self.plan);
        plan.room = plan.room.map(|room| room.saturating_add(pages.get()));
        Ok(())
    }
}

/// A test that panicked elsewhere has left nothing half done in there.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device_suite::{self, Ram};

    fn device() -> FakeDevice {
        FakeDevice::new(PageCount::new(4096))
    }

    crate::device_suite!(fake, || Some(Box::new(device())));

    #[test]
    fn the_nth_transfer_fails_and_only_that() {
        for n in 1..=4 {
            let (device, ram) = (device(), Ram::new(4));
            device.fail_nth(n, TransferError::Gone);
            let mut batch: Vec<_> = (0..4).map(|i| ram.transfer(i, 1, DevicePage(i as u64))).collect();
            device.write(&mut batch);
            let failed: Vec<_> = (1..).zip(&batch).filter(|(_, t)| t.outcome().is_err()).collect();
            assert_eq!(failed.len(), 1);
            assert_eq!((failed[0].0, failed[0].1.outcome()), (n, Err(TransferError::Gone)));
            assert!(!device.failure_pending());
        }
    }

    #[test]
    fn a_full_device_has_room_again_after_a_discard() {
        let (device, ram) = (device(), Ram::new(4));
        device.full_after(PageCount::new(3));
        let write = |pages| {
            let mut batch = [ram.transfer(0, pages, DevicePage(0))];
            device.write(&mut batch);
            batch[0].outcome()
        };
        assert_eq!(write(2), Ok(()));
        assert_eq!(write(2), Err(TransferError::Full));
        assert_eq!(write(1), Ok(()));
        device.discard(DevicePage(0), PageCount::new(2)).unwrap();
        assert_eq!(write(2), Ok(()));
        device.never_full();
        assert_eq!(write(4), Ok(()));
        assert_eq!((device.reads(), device.writes(), device.discards()), (0, 5, 1));
    }

    #[test]
    fn the_hook_runs_in_every_transfer() {
        static SEEN: AtomicU64 = AtomicU64::new(0);
        let device = device().on_transfer(|access, page, pages| {
            assert_eq!((access, pages), (FakeAccess::Write, PageCount::ONE));
            SEEN.fetch_add(page.0, Ordering::Relaxed);
        });
        device_suite::write(&device, &Ram::new(2), &[(0, 1, 3), (1, 1, 4)]);
        assert_eq!(SEEN.load(Ordering::Relaxed), 7);
    }
}
