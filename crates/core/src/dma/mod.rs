//! Mirrored pages that a device reaches by addresses of its own (the kernel's `dma_map_page`; `hmm_range_dma_map` until
//! 5.3).
//!
//! What    [`Iommu`], the port to whoever translates a device's addresses; [`Identity`], for devices that use those of
//!         the process; [`DmaTable`], a mirror's table that holds what is mapped; [`peer`], pages of other devices.
//! Why     a page that an IOMMU maps must not move, and one that moved must not be mapped: the device would write into
//!         somebody else's page. As the table of a [`Mirror`], mappings are made only of pages that are there, and
//!         are taken back before these change.
//! Owns    the mappings; whatever is mapped when the table is dropped is unmapped then.
//! Locks   the mirror's, while the port is called: it must not touch memory of the space that may be absent, nor call
//!         the space.
//! Races   as a mirror's. A device that has no page faults of its own is stopped, or has finished, before the port
//!         returns from unmapping: that is the port's promise.
//! Fails   with a [`DmaError`]; what was mapped before stays mapped.

pub mod peer;
mod table;

use uhmm_addr::{DmaAddr, PageCount, VaRange, VirtAddr};

pub use table::DmaTable;

use crate::fault::Scratch;
use crate::host::Host;
use crate::mirror::{Mirror, PageView, Patience, RangeFaultError, Want};
use crate::mm::Mm;

/// Why a run of pages could not be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IommuError {
    /// It holds as many mappings as it can: unmap some.
    #[error("the IOMMU holds as many mappings as it can")]
    Full,
    /// More memory would be locked than this user may lock (`RLIMIT_MEMLOCK`), or there is none for the tables.
    #[error("no more memory may be locked for the IOMMU")]
    NoMemory,
    /// The addresses lie outside of what it translates, or are mapped already.
    #[error("the IOMMU does not translate addresses for these pages")]
    OutOfWindow,
    /// Anything else that the system answered.
    #[error("the IOMMU refuses (error {0})")]
    Refused(i32),
}

/// Whoever translates a device's addresses.
///
/// Mappings are runs of pages: what was mapped at once is unmapped at once, as VFIO has it, and never in part.
pub trait Iommu: Send + 'static {
    /// Lets the device reach `pages`, which are there, follow each other, and are mapped nowhere here; for writing as
    /// well if `write`. The answer is where the device finds the first, on a page boundary; the others follow.
    ///
    /// # Errors
    /// Then nothing of it is mapped.
    fn map(&mut self, pages: VaRange, write: bool) -> Result<DmaAddr, IommuError>;

    /// Takes back what was mapped as `pages`. When this returns the device does not reach them any more, and nothing
    /// that was done for it keeps them where they are.
    ///
    /// Runs in whatever thread changes the pages, a fault handler included: it must not allocate.
    fn unmap(&mut self, pages: VaRange);
}

/// The device uses the addresses of the process: it shares its page table (SVA), or is a program.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity;

impl Iommu for Identity {
    fn map(&mut self, pages: VaRange, _write: bool) -> Result<DmaAddr, IommuError> {
        Ok(DmaAddr::new(pages.start().get() as u64))
    }

    fn unmap(&mut self, _pages: VaRange) {}
}

/// Why pages are not all mapped for the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DmaError {
    /// They cannot be had.
    #[error(transparent)]
    Pages(#[from] RangeFaultError),
    /// The run that begins here could not be mapped.
    #[error("{0} cannot be mapped for the device: {1}")]
    Iommu(VirtAddr, #[source] IommuError),
    /// It is on a device, and another one does not reach it there.
    #[error("{0} is on a device, where no other reaches it")]
    OnDevice(VirtAddr),
}

impl<H: Host> Mm<H> {
    /// A mirror of the pages of `range` whose table is the mappings of `iommu`: none yet.
    pub fn dma_mirror<I: Iommu>(&self, range: VaRange, iommu: I) -> Mirror<'_, H, DmaTable<I>> {
        self.mirror(range, DmaTable::new(range, iommu))
    }
}

impl<H: Host, I: Iommu> Mirror<'_, H, DmaTable<I>> {
    /// Brings the pages of `range` home, for writing if `write`, and maps them for the device. What is mapped as it
    /// should be stays as it is. A page that changes afterwards is not mapped any more.
    ///
    /// As with [`Mirror::populate`] the caller holds no lock.
    ///
    /// # Errors
    /// See [`DmaError`]. Pages before the one that failed are mapped.
    pub fn dma_map(
        &self,
        range: VaRange,
        write: bool,
        room: &mut [PageView],
        scratch: &mut Scratch,
        patience: &mut dyn Patience,
    ) -> Result<(), DmaError> {
        let want = if write { Want::Write } else { Want::Read };
        let mut mapped = Ok(());
        self.populate(range, &want.into(), room, scratch, patience, |table, pages| {
            if mapped.is_ok() {
                mapped = table.map(pages, write);
            }
        })?;
        mapped
    }

    /// Takes back what is mapped of `range`; runs that reach out of it as a whole. Returns how many pages that were.
    pub fn dma_unmap(&self, range: VaRange) -> PageCount {
        loop {
            if let Some(mut table) = self.collect().lock() {
                return table.unmap(range);
            }
        }
    }
}
