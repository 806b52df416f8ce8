//! Managed memory that a device reaches by addresses of its own.
//!
//! What    [`Space::dma_mirror`] makes a [`Mirror`] whose table is the mappings of an [`Iommu`];
//!         `Mirror::dma_map` maps pages for the device, `Mirror::dma_unmap` takes them back, as does whatever
//!         changes them.
//! Owns    the mappings end with the mirror.
//! Locks   as a mirror's, inside which the IOMMU is asked.
//! Fails   with a [`MirrorError`] at the start; later with a [`DmaError`].
//!
//! ```
//! # use std::sync::Arc;
//! # use uhmm::{ByteSize, MemDevice, Space};
//! use uhmm::dma::Identity;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # if uhmm::Space::builder().build().is_err() { return Ok(()) } // no userfaultfd for this user
//! let vram = Arc::new(MemDevice::private(ByteSize::mib(4))?);
//! let space = Space::builder().device(vram).build()?;
//! let numbers = space.map::<u64>(4096)?;
//! let mirror = space.dma_mirror(numbers.range(), Identity)?;
//! mirror.dma_map(numbers.range(), true)?;
//! let start = numbers.range().start();
//! mirror.look(|table| {
//!     // As long as this lasts the pages stay, and the device is given their addresses.
//!     let found = table.address(start, true).expect("nothing has changed yet");
//!     assert_eq!(found.get(), start.get() as u64);
//! });
//! let _ = space.migrate(numbers.range())?;              // taken back before the pages go
//! assert!(mirror.look(|table| table.address(start, false)).is_none());
//! # Ok(())
//! # }
//! ```

use uhmm_addr::{PageCount, VaRange};
use uhmm_sys::signals::Blocked;

pub use uhmm_addr::DmaAddr;
pub use uhmm_core::dma::{DmaError, DmaTable, Identity, Iommu, IommuError};
pub use uhmm_sys::vfio::Type1;

use super::Space;
use super::mirror::{Mirror, MirrorError};

impl Space {
    /// A mirror of `range` whose table is the mappings of `iommu`: none yet.
    ///
    /// # Errors
    /// [`MirrorError::Unmanaged`], or no memory.
    pub fn dma_mirror<I: Iommu>(
        &self,
        range: VaRange,
        iommu: I,
    ) -> Result<Mirror<'_, DmaTable<I>>, MirrorError> {
        if !self.manages(range) {
            return Err(MirrorError::Unmanaged(range));
        }
        Mirror::new(self, self.inner.managed.mm().dma_mirror(range, iommu))
    }
}

impl<I: Iommu> Mirror<'_, DmaTable<I>> {
    /// Brings the pages of `range` home, for writing if `write`, and maps them for the device. Whatever changes one of
    /// them takes its mapping back first, so that the device is given addresses inside [`Mirror::look`] only.
    ///
    /// # Errors
    /// See [`DmaError`]. Pages before the one that failed are mapped.
    pub fn dma_map(&self, range: VaRange, write: bool) -> Result<(), DmaError> {
        self.work(|mirror, room, scratch, patience| mirror.dma_map(range, write, room, scratch, patience))
    }

    /// Takes back what is mapped of `range`, and with it the rest of what was mapped together with that. Returns how
    /// many pages that were.
    pub fn dma_unmap(&self, range: VaRange) -> PageCount {
        let _blocked = Blocked::all();
        self.core().dma_unmap(range)
    }
}
