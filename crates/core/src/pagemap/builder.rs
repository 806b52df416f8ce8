//! How a pagemap comes to be registered: what it is asked for, and what is wrong with that.
//!
//! What    [`PagemapBuilder`], and the checks of the kernel's `memremap_pages` and `pagemap_range`.
//! Why     a pagemap that overlaps another, or whose ranges are no whole compound pages, is found out here and not at
//!         its first fault.
//! Fails   with a [`RegisterError`] that carries the values; then nothing is registered.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::AtomicBool;

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, Pfn, PfnRange};

use super::descriptors::Descriptors;
use super::ledger::Ledger;
use super::ops::PagemapOps;
use super::poison::Bad;
use super::ranges::Ranges;
use super::resource::Conflict;
use super::shape::Shape;
use super::{DescriptorMemory, Pagemap, place_of};
use crate::device::{Device, DevicePage, MemoryType, Transfer, TransferError};
use crate::notifier::Owner;
use crate::sync::{AtomicU32, AtomicUsize, Park};

/// Units that can be counted: more would not fit the shards.
const MOST_UNITS: usize = 1 << 34;

/// Why a pagemap was not registered.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RegisterError {
    /// It has no range (`EINVAL`).
    #[error("a pagemap needs a range of pfns")]
    NoRange,
    /// A range is empty, or is no whole compound pages (`EINVAL`).
    #[error("{0:?} must start at and be a multiple of {1} pages, and not be empty")]
    Misaligned(PfnRange, Geometry),
    /// Pagemaps share no 2 MiB of pfns (`memremap_compat_align`), so that a look at a few bits of a pfn finds its
    /// pagemap.
    #[error("{0:?} must start at a multiple of 2 MiB of pfns")]
    Subsection(PfnRange),
    /// It runs past the last pfn (`EINVAL`).
    #[error("{0:?} runs past the last pfn, {last:#x}", last = (1_u64 << Pfn::BITS) - 1)]
    NotAddressable(PfnRange),
    /// Some of it is somebody's (`EBUSY`, `ENOMEM`), or ordinary memory (`ENXIO`).
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// Pages of this type are brought home, or copied, by a device: give one.
    #[error("{0} pages need a device, which reads them when they are touched")]
    NoDevice(MemoryType),
    /// The device says that its pages are something else.
    #[error("the pagemap is {0}, its device {1}")]
    OtherType(MemoryType, MemoryType),
    /// The ranges do not hold as many pages as the device.
    #[error("the ranges hold {0}, the device {1}")]
    Capacity(PageCount, PageCount),
    /// More compound pages than can be counted.
    #[error(
        "{0} compound pages are more than the {MOST_UNITS} that can be counted: choose a larger geometry"
    )]
    TooMany(usize),
    /// The area for descriptors on the device is too small, no whole compound pages, or leaves nothing of the first
    /// range (`EINVAL`).
    #[error(
        "{given} are reserved for descriptors, of {range:?}; {needed} are needed, in whole compound pages of {geometry}"
    )]
    Reserved {
        /// What was reserved.
        given: PageCount,
        /// What the descriptors need.
        needed: PageCount,
        /// The first range, in which it must fit.
        range: PfnRange,
        /// The pagemap's geometry.
        geometry: Geometry,
    },
    /// Descriptors cannot lie in memory that the CPU cannot touch.
    #[error("descriptors cannot lie on a private device, which the CPU cannot touch")]
    ReservedPrivate,
}

/// What a pagemap is to be. See [`Registry::register`](super::Registry::register).
#[must_use]
pub struct PagemapBuilder {
    pub(super) name: Box<str>,
    memory_type: MemoryType,
    geometry: Geometry,
    pub(super) ranges: Vec<PfnRange>,
    owner: Option<Owner>,
    device: Option<Arc<dyn Device>>,
    ops: Option<Arc<dyn PagemapOps>>,
    reserved: Option<(DescriptorMemory, PageCount)>,
}

impl PagemapBuilder {
    pub(super) const fn new(name: Box<str>, memory_type: MemoryType) -> Self {
        let geometry = Geometry::K4;
        Self {
            name,
            memory_type,
            geometry,
            ranges: Vec::new(),
            owner: None,
            device: None,
            ops: None,
            reserved: None,
        }
    }

    /// One more range, whose pages follow those of the ranges before it on the device.
    pub fn range(mut self, range: PfnRange) -> Self {
        self.ranges.push(range);
        self
    }

    /// The size of its compound pages; 4K by default (the kernel's `vmemmap_shift`).
    pub const fn geometry(mut self, geometry: Geometry) -> Self {
        self.geometry = geometry;
        self
    }

    /// Whose pages these are; by default the pagemap's own.
    pub const fn owner(mut self, owner: Owner) -> Self {
        self.owner = Some(owner);
        self
    }

    /// What holds the pages and copies them: needed for private and coherent pages.
    pub fn device(mut self, device: Arc<dyn Device>) -> Self {
        self.device = Some(device);
        self
    }

    /// The driver's calls.
    pub fn ops(mut self, ops: Arc<dyn PagemapOps>) -> Self {
        self.ops = Some(ops);
        self
    }

    /// Descriptors that lie on the device itself, in the first `reserved` pages of the first range (the kernel's
    /// `vmem_altmap`), which are mapped at `memory`. These pages cannot be used for anything else.
    ///
    /// # Safety
    /// `memory` must hold `reserved` pages, be aligned to 8, all zero when the pagemap is registered, and that anew each
    /// time: what an earlier pagemap has left there is no first state. It must be accessed by nobody else, and valid as
    /// long as the pagemap, and any handle of its pages, lives.
    pub const unsafe fn descriptors_on_device(
        mut self,
        memory: DescriptorMemory,
        reserved: PageCount,
    ) -> Self {
        self.reserved = Some((memory, reserved));
        self
    }

    /// How many pages must be reserved for the descriptors of `pages` pages, those that are reserved among them.
    pub const fn pages_to_reserve(
        pages: PageCount,
        geometry: Geometry,
        memory_type: MemoryType,
    ) -> PageCount {
        let shape = Shape { units: pages.get() >> geometry.order(), data: !memory_type.is_migratable() };
        let pages = shape.bytes().div_ceil(uhmm_addr::PAGE_SIZE);
        PageCount::new(pages.next_multiple_of(geometry.pages().get()))
    }

    fn check_ranges(&self) -> Result<PageCount, RegisterError> {
        let mut pages = PageCount::ZERO;
        for range in &self.ranges {
            let (start, len, unit) = (range.start.get(), range.pages.get(), self.geometry.pages().get());
            if len == 0 || !len.is_multiple_of(unit) || !start.is_multiple_of(unit as u64) {
                return Err(RegisterError::Misaligned(*range, self.geometry));
            }
            if !start.is_multiple_of(CHUNK_PAGES as u64) {
                return Err(RegisterError::Subsection(*range));
            }
            if start.checked_add(len as u64).is_none_or(|end| end > 1 << Pfn::BITS) {
                return Err(RegisterError::NotAddressable(*range));
            }
            pages = pages.plus(range.pages);
        }
        if self.ranges.is_empty() { Err(RegisterError::NoRange) } else { Ok(pages) }
    }

    fn check_device(&self, pages: PageCount) -> Result<(), RegisterError> {
        match &self.device {
            None if self.memory_type.is_migratable() => Err(RegisterError::NoDevice(self.memory_type)),
            Some(device) if device.memory_type() != self.memory_type => {
                Err(RegisterError::OtherType(self.memory_type, device.memory_type()))
            }
            Some(device) if device.capacity() != pages => {
                Err(RegisterError::Capacity(pages, device.capacity()))
            }
            _ => Ok(()),
        }
    }

    /// What is reserved, checked against what is needed.
    fn check_reserved(&self, shape: Shape) -> Result<(), RegisterError> {
        let Some((_, given)) = self.reserved else { return Ok(()) };
        if self.memory_type == MemoryType::Private {
            return Err(RegisterError::ReservedPrivate);
        }
        let range = self.ranges[0];
        let needed = PageCount::new(shape.bytes().div_ceil(uhmm_addr::PAGE_SIZE));
        let whole = given.get().is_multiple_of(self.geometry.pages().get());
        if given < needed || given >= range.pages || !whole {
            return Err(RegisterError::Reserved { given, needed, range, geometry: self.geometry });
        }
        Ok(())
    }

    /// The pagemap, if it can be one.
    pub(super) fn build(self, park: Arc<dyn Park>) -> Result<Pagemap, RegisterError> {
        let pages = self.check_ranges()?;
        self.check_device(pages)?;
        let reserved = self.reserved.map_or(PageCount::ZERO, |(_, reserved)| reserved);
        let units = pages.minus(reserved).get() >> self.geometry.order();
        let shape = Shape { units, data: !self.memory_type.is_migratable() };
        self.check_reserved(shape)?;
        if units > MOST_UNITS {
            return Err(RegisterError::TooMany(units));
        }
        let descriptors = match self.reserved {
            // SAFETY: it holds the shape's bytes; the rest is the promise of whoever gave the memory.
            Some((memory, _)) => unsafe { Descriptors::over(memory, shape) },
            None => Descriptors::owned(shape),
        };
        Ok(self.with(descriptors, reserved, park))
    }

    /// The pagemap, with these descriptors, of which the first range has `reserved` pages.
    pub(super) fn with(self, descriptors: Descriptors, reserved: PageCount, park: Arc<dyn Park>) -> Pagemap {
        let pages = self.ranges.iter().fold(PageCount::ZERO, |sum, range| sum.plus(range.pages));
        let idle = || Arc::new(Idle { name: self.name.clone(), memory_type: self.memory_type, pages });
        let device = self.device.unwrap_or_else(|| idle());
        Pagemap {
            memory_type: self.memory_type,
            memory: place_of(&*device),
            device,
            owner: self.owner.unwrap_or(Owner::of_own(self.ranges[0].start)),
            ranges: Ranges::new(self.ranges, self.geometry, reserved),
            name: self.name,
            ops: self.ops,
            descriptors,
            stopped: AtomicU32::new(0),
            registered: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            cursor: AtomicUsize::new(0),
            bad: Bad::default(),
            ledger: Ledger::new(),
            park,
        }
    }
}

/// Stands for the device of pages that nobody copies: they are mapped.
struct Idle {
    name: Box<str>,
    memory_type: MemoryType,
    pages: PageCount,
}

impl Device for Idle {
    fn name(&self) -> &str {
        &self.name
    }

    fn memory_type(&self) -> MemoryType {
        self.memory_type
    }

    fn capacity(&self) -> PageCount {
        self.pages
    }

    fn write(&self, batch: &mut [Transfer]) {
        batch.iter_mut().for_each(|transfer| transfer.fail(TransferError::Declined));
    }

    fn read(&self, batch: &mut [Transfer]) {
        batch.iter_mut().for_each(|transfer| transfer.fail(TransferError::Declined));
    }

    fn discard(&self, _page: DevicePage, _pages: PageCount) -> Result<(), TransferError> {
        Err(TransferError::Declined)
    }
}
