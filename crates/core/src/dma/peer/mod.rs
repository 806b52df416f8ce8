//! Pages of one device that another one reaches without a stop in RAM (the kernel's `drivers/pci/p2pdma.c`).
//!
//! What    [`Topology`], which device sits behind which bridge, and what that means for a transfer between two of
//!         them; [`PeerMemory`], a device's pages as others see them; [`PeerClient`], a device that has some of them
//!         mapped.
//! Why     a transfer between devices under one switch never leaves it, if no bridge on the way sends it up to be
//!         checked; through the host it works with some hosts only, and is lost without a word with others.
//! Owns    a client holds a reference to every page that it has mapped, so that the provider's pagemap is not
//!         unregistered before; what is mapped when it is dropped is unmapped then.
//! Locks   none: a client belongs to one thread at a time.
//! Fails   with a [`PeerError`]; then nothing of it is mapped.

#[cfg(all(test, not(loom)))]
mod tests;
mod topology;

use alloc::sync::Arc;
use alloc::vec::Vec;

use uhmm_addr::{DmaAddr, PageCount, PfnRange, VaRange};

pub use topology::{Forwards, Path, PeerId, Route, Topology, Unreachable};

use super::{Iommu, IommuError};
use crate::device::MemoryType;
use crate::pagemap::{PageError, PageRange, Pagemap};

/// Why another device's pages cannot be reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PeerError {
    /// The two devices do not reach each other: go by way of RAM.
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    /// The pages cannot be had.
    #[error(transparent)]
    Page(#[from] PageError),
    /// They are not of a device on a bus, but this.
    #[error("{0} pages are no device's on a bus: they are mapped like RAM, or not at all")]
    NotPeer(MemoryType),
    /// The way leads through the host, where the client's IOMMU translates, and the pages are mapped nowhere that it
    /// could be told of.
    #[error("{0:?} are reached through the host, and are not mapped in this process")]
    NotMapped(PfnRange),
    /// The IOMMU refuses.
    #[error("{0:?} cannot be mapped for the device: {1}")]
    Iommu(PfnRange, #[source] IommuError),
}

/// Pages of a device as others reach them: a window on the bus (a BAR).
#[derive(Clone, Debug)]
pub struct PeerMemory {
    /// The device.
    pub device: PeerId,
    /// Its pages, which are [`MemoryType::PeerToPeer`].
    pub map: Arc<Pagemap>,
    /// Where the first of them lies on the bus.
    pub bus: DmaAddr,
    /// Where they are mapped in this process, which is how an IOMMU is told of them.
    pub mapped: Option<VaRange>,
}

/// Pages that are mapped for a client.
#[derive(Debug)]
struct Run {
    at: DmaAddr,
    pages: PageRange,
    // What the IOMMU was told; nothing where the bus is enough.
    mapped: Option<VaRange>,
}

/// A device that reaches pages of others.
#[derive(Debug)]
pub struct PeerClient<I: Iommu> {
    device: PeerId,
    iommu: I,
    runs: Vec<Run>,
}

impl<I: Iommu> PeerClient<I> {
    /// `device`, for which `iommu` translates what does not stay below the host; nothing is mapped.
    pub const fn new(device: PeerId, iommu: I) -> Self {
        Self { device, iommu, runs: Vec::new() }
    }

    /// Lets the client reach `pages` of `memory`, for writing as well if `write`. The answer is where it finds the
    /// first: a bus address where the transfer stays below the host (`PCI_P2PDMA_MAP_BUS_ADDR`), one of the IOMMU's
    /// otherwise (`PCI_P2PDMA_MAP_THRU_HOST_BRIDGE`).
    ///
    /// # Errors
    /// See [`PeerError`].
    pub fn map(
        &mut self,
        topology: &Topology,
        memory: &PeerMemory,
        pages: PfnRange,
        write: bool,
    ) -> Result<DmaAddr, PeerError> {
        let kind = memory.map.memory_type();
        if kind != MemoryType::PeerToPeer {
            return Err(PeerError::NotPeer(kind));
        }
        let path = topology.path(memory.device, self.device)?;
        let held = memory.map.pin(pages)?;
        let first = PageCount::new(memory.map.device_page(pages.start).0 as usize);
        let (at, mapped) = match path.route {
            Route::Bus => (memory.bus.forward(first), None),
            Route::HostBridge => {
                let place = memory.mapped.and_then(|all| all.skip(first)).map(|rest| rest.take(pages.pages));
                let place = place.filter(|place| place.pages() == pages.pages);
                let place = place.ok_or(PeerError::NotMapped(pages))?;
                let meets = |run: &Run| run.mapped.is_some_and(|there| there.intersect(place).is_some());
                if self.runs.iter().any(meets) {
                    return Err(PeerError::Iommu(pages, IommuError::OutOfWindow));
                }
                let at = self.iommu.map(place, write).map_err(|why| PeerError::Iommu(pages, why))?;
                (at, Some(place))
            }
        };
        self.runs.push(Run { at, pages: held, mapped });
        Ok(at)
    }

    /// Takes back what was mapped at `at`, as a whole. `false` if nothing was.
    pub fn unmap(&mut self, at: DmaAddr) -> bool {
        let found = self.runs.iter().position(|run| run.at == at);
        if let Some(found) = found {
            let run = self.runs.swap_remove(found);
            self.take_back(&run);
        }
        found.is_some()
    }

    /// Takes back every page of `map`: its device is going away (`pci_p2pdma_unmap_mappings`). Returns how many that
    /// were.
    pub fn unmap_all(&mut self, map: &Pagemap) -> PageCount {
        let (gone, kept) = core::mem::take(&mut self.runs)
            .into_iter()
            .partition(|run| core::ptr::eq(run.pages.pagemap(), map));
        self.runs = kept;
        let gone: Vec<Run> = gone;
        gone.iter().fold(PageCount::ZERO, |so_far, run| {
            self.take_back(run);
            so_far.plus(run.pages.pages().pages)
        })
    }

    /// Pages that are mapped.
    pub fn mapped(&self) -> PageCount {
        self.runs.iter().fold(PageCount::ZERO, |so_far, run| so_far.plus(run.pages.pages().pages))
    }

    fn take_back(&mut self, run: &Run) {
        if let Some(place) = run.mapped {
            self.iommu.unmap(place);
        }
    }
}

impl<I: Iommu> Drop for PeerClient<I> {
    fn drop(&mut self) {
        for run in core::mem::take(&mut self.runs) {
            self.take_back(&run);
        }
    }
}
