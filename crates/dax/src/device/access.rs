//! Reading and writing a device without mapping it.
//!
//! What     [`Device::read_at`] and [`Device::write_at`], which know what is bad: a read of it fails, and writing whole
//!          pages mends them (`pmem_recovery_write`).
//! Why      an access that meets a bad page must be an error, not a signal, for whoever can bear one.
//! Order    bytes are written and safe before the labels say that their page is good.
//! Owns     a window over the whole device, made when it is first needed, whose faults are the kernel's.

use std::os::fd::AsFd;

use uhmm_addr::PAGE_SIZE;
use uhmm_sys::dax::{Protection, Window, flush};

use super::{AccessError, Core, Device};
use crate::store::{Extent, Kind};

const PAGE: u64 = PAGE_SIZE as u64;

impl Device {
    /// Reads `into` from `offset` on.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), AccessError> {
        let Some(pages) = self.core().touched(offset, into.len() as u64)? else { return Ok(()) };
        if let Some(bad) = self.bad_pages().among(pages).next() {
            return Err(AccessError::Poisoned { offset: bad.start * PAGE });
        }
        let from = self.core().window()?.as_ptr().as_ptr().wrapping_add(offset as usize);
        // SAFETY: inside the window (checked), of which no references exist. Others may write the bytes meanwhile; what
        // is read then is some of either, as from any file.
        unsafe { from.copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Writes `bytes` from `offset` on, and returns when they are safe. Pages that were bad are good again if they are
    /// written whole.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), AccessError> {
        let Some(pages) = self.core().touched(offset, bytes.len() as u64)? else { return Ok(()) };
        let bad: Vec<Extent> = self.bad_pages().among(pages).collect();
        let whole = Extent::between(offset.div_ceil(PAGE), (offset + bytes.len() as u64) / PAGE);
        for run in &bad {
            if whole.and_then(|whole| whole.intersect(*run)) != Some(*run) {
                return Err(AccessError::Poisoned { offset: run.start * PAGE });
            }
        }
        let window = self.core().window()?;
        let to = window.as_ptr().as_ptr().wrapping_add(offset as usize);
        // SAFETY: inside the window (checked), of which no references exist.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(to, bytes.len()) };
        match self.core().source.kind {
            Kind::PageCache => window.write_back(offset as usize, bytes.len())?,
            // SAFETY: as above.
            Kind::Dax => unsafe { flush::lines(to, bytes.len()) },
            Kind::Memory | Kind::Huge(_) => {}
        }
        if let Some((store, claim)) = &self.core().source.store {
            for run in bad {
                store.mark(claim.namespace().id, run.offset(), run.bytes(), false)?;
            }
            self.core().follow_labels()?;
        }
        Ok(())
    }
}

impl Core {
    /// The pages of which there are bytes in `offset..offset + len`; `None` if that is no byte.
    fn touched(&self, offset: u64, len: u64) -> Result<Option<Extent>, AccessError> {
        let size = self.source.size();
        let end = offset.checked_add(len).filter(|end| *end <= size.bytes());
        let end = end.ok_or(AccessError::Outside { offset, len, size })?;
        if self.lock_parts().closed {
            return Err(AccessError::Dead);
        }
        Ok(if len == 0 { None } else { Extent::between(offset / PAGE, end.div_ceil(PAGE)) })
    }

    /// The same, as first page and count, for whole pages.
    pub(super) fn pages_of(&self, offset: u64, len: u64) -> Result<(u64, u64), AccessError> {
        let outside = AccessError::Outside { offset, len, size: self.source.size() };
        let pages = self.touched(offset, len)?.ok_or(outside)?;
        Ok((pages.start, pages.len))
    }

    fn window(&self) -> Result<&Window, AccessError> {
        if let Some(window) = self.access.get() {
            return Ok(window);
        }
        let len = self.source.size().bytes() as usize;
        let window = Window::reserve(len, self.source.align.bytes(), 0, Protection::ReadWrite)?;
        for section in self.source.locate(0, self.source.pages()) {
            let (at, bytes) = (section.page as usize * PAGE_SIZE, section.len as usize * PAGE_SIZE);
            window.map(at, bytes, self.source.file.as_fd(), section.at, self.source.kind.syncs())?;
        }
        Ok(self.access.get_or_init(|| window))
    }
}
