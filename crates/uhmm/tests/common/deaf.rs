//! A device that reads nothing when it is told so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uhmm::{Device, DevicePage, MemDevice, MemoryType, PageCount, Transfer, TransferError};

/// Its pages can be written at any time.
pub(crate) struct Deaf {
    memory: Arc<MemDevice>,
    deaf: AtomicBool,
}

impl Deaf {
    /// It reads, until [`Deaf::set`].
    pub(crate) fn new(memory: Arc<MemDevice>) -> Arc<Self> {
        Arc::new(Self { memory, deaf: AtomicBool::new(false) })
    }

    /// Whether every read fails from now on.
    pub(crate) fn set(&self, deaf: bool) {
        self.deaf.store(deaf, Ordering::Release);
    }
}

impl Device for Deaf {
    fn name(&self) -> &str {
        "deaf"
    }

    fn memory_type(&self) -> MemoryType {
        self.memory.memory_type()
    }

    fn capacity(&self) -> PageCount {
        self.memory.capacity()
    }

    fn read(&self, batch: &mut [Transfer]) {
        if self.deaf.load(Ordering::Acquire) {
            batch.iter_mut().for_each(|transfer| transfer.fail(TransferError::Io(5)));
        } else {
            self.memory.read(batch);
        }
    }

    fn write(&self, batch: &mut [Transfer]) {
        self.memory.write(batch);
    }

    fn discard(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        self.memory.discard(page, pages)
    }
}
