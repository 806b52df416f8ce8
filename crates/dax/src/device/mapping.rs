//! A device in this process's memory.
//!
//! What     [`DaxMapping`], as [`Device::map`] gives it out, and [`MapOptions`].
//! Why      apart from the device, because who has a mapping needs nothing else of it.
//! Owns     its addresses, and keeps the device.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use uhmm_addr::{PAGE_SIZE, VaRange};
use uhmm_sys::dax::{Protection, flush};

use super::mapped::Mapped;
use super::reach::{Entered, PARTS};
use super::{Device, MapError, Owner};
use crate::store::Kind;

/// How a device is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapOptions {
    /// What may be done with it.
    pub protection: Protection,
    /// A mapping of one's own, which no device gives.
    pub private: bool,
    /// A store must be safe as soon as it was flushed from the processor's cache (`MAP_SYNC`). Where that can be had,
    /// mappings are made so without being asked; this has the others refused.
    pub sync: bool,
}

impl Default for MapOptions {
    fn default() -> Self {
        Self { protection: Protection::ReadWrite, private: false, sync: false }
    }
}

/// A part of a device in this process's memory.
///
/// Its pages are there when they are touched. They are shared with every other mapping of the device, so the memory is
/// reached through raw pointers alone; and any access may end in SIGBUS, when a page is lost or the device was killed.
#[derive(Debug)]
pub struct DaxMapping {
    entered: Entered<Mapped>,
    _owner: Arc<Owner>,
}

impl Device {
    /// Maps `len` bytes from `offset` on, both multiples of the alignment, for reading and writing.
    pub fn map(&self, offset: u64, len: u64) -> Result<DaxMapping, MapError> {
        self.map_with(offset, len, MapOptions::default())
    }

    /// The same, as `options` say. The address has the remainder by the alignment that `offset` has.
    pub fn map_with(&self, offset: u64, len: u64, options: MapOptions) -> Result<DaxMapping, MapError> {
        let device = || self.name().to_owned();
        if options.private {
            return Err(MapError::Private { device: device() });
        }
        let align = self.align();
        let odd = |value: u64| !value.is_multiple_of(align.bytes() as u64);
        for (what, value, wrong) in [("offset", offset, odd(offset)), ("length", len, odd(len) || len == 0)] {
            if wrong {
                return Err(MapError::Misaligned { device: device(), what, value, align });
            }
        }
        let size = self.size();
        if offset.checked_add(len).is_none_or(|end| end > size.bytes()) {
            return Err(MapError::Outside { device: device(), offset, len, size });
        }
        let kind = self.core().source.kind;
        if options.sync && kind == Kind::PageCache {
            return Err(MapError::NoSync { device: device() });
        }
        let io = |error| MapError::Io { device: device(), error };
        let (page, pages) = (offset / PAGE_SIZE as u64, len / PAGE_SIZE as u64);
        let part = Mapped::new(self.core(), page, pages, options.protection).map_err(io)?;
        let part = Arc::new(part);
        let entered = PARTS.enter(part.clone(), part.window.range()).map_err(io)?;
        let mut parts = self.core().lock_parts();
        if parts.closed {
            return Err(MapError::Dead { device: device() });
        }
        parts.list.push(Arc::downgrade(&part));
        drop(parts);
        // Pages that were lost while nobody knew of this part.
        part.open(page, pages).map_err(io)?;
        Ok(DaxMapping { entered, _owner: self.owner.clone() })
    }
}

impl DaxMapping {
    fn part(&self) -> &Mapped {
        self.entered.part()
    }

    /// Its addresses.
    pub fn range(&self) -> VaRange {
        self.part().window.range()
    }

    /// The first byte.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.part().window.as_ptr()
    }

    /// Bytes in it, at least a compound page.
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.range().bytes()
    }

    /// Compound pages that faults have mapped; 0 where the kernel answers them.
    pub fn faults(&self) -> u64 {
        self.part().faults()
    }

    /// Has everything present now. Fails for pages that are lost.
    pub fn populate(&self) -> io::Result<()> {
        self.part().window.populate(0, self.len())
    }

    /// Unmaps its pages: the next touch is a first one.
    pub fn forget(&self) -> io::Result<()> {
        self.part().window.forget(0, self.len())
    }

    /// Returns when what was stored to `len` bytes from byte `at` on is safe: written back from the processor's caches
    /// where the memory is the medium, by the kernel where its pages are copies. Memory is as safe as it gets.
    pub fn flush(&self, at: usize, len: usize) -> io::Result<()> {
        if at.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match self.part().core.source.kind {
            _ if len == 0 => Ok(()),
            Kind::PageCache => self.part().window.write_back(at, len),
            Kind::Dax => {
                // SAFETY: inside the mapping (checked).
                unsafe { flush::lines(self.as_ptr().as_ptr().wrapping_add(at), len) };
                Ok(())
            }
            Kind::Memory | Kind::Huge(_) => {
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                Ok(())
            }
        }
    }
}
