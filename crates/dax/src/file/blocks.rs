//! The blocks of a namespace: their bytes, their numbers and who refers to them.
//!
//! What     [`Blocks`]. A block is a compound page of the namespace's alignment. One window over all of them is how
//!          bytes are copied; a pagemap of the type `FsDax` counts references.
//! Why      apart from files, because a block does not know whose it is: its head's word does (`page->mapping`).
//! Owns     the claim to the namespace and to its files, the pfns, the pagemap and the window.
//! Fails    with the system's error.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_addr::{Geometry, PAGE_SIZE, PageCount, Pfn, PfnRange};
use uhmm_core::device::MemoryType;
use uhmm_core::pagemap::{Pagemap, PagemapOps};
use uhmm_core::sync::Ordering;
use uhmm_sys::dax::{Protection, Window, flush};
use uhmm_sys::filelock::FileLock;

use crate::device::DeviceError;
use crate::device::source::Source;
use crate::machine::{Region, machine};
use crate::store::{Area, Kind};

/// The blocks of a namespace.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) source: Source,
    region: Region,
    pub(super) pagemap: Arc<Pagemap>,
    window: Window,
    /// Keeps everybody else from the files.
    alone: Option<FileLock>,
}

impl Blocks {
    pub(super) fn new(
        source: Source,
        ops: Arc<dyn PagemapOps>,
        alone: FileLock,
    ) -> Result<Self, DeviceError> {
        let device = source.name.clone();
        let io = |error| DeviceError::Io { device: device.clone(), error };
        let (len, align) = (source.size().bytes() as usize, source.align.max(Geometry::M2).bytes());
        let window = Window::reserve(len, align, 0, Protection::ReadWrite).map_err(io)?;
        for section in source.locate(0, source.pages()) {
            let (at, bytes) = (section.page as usize * PAGE_SIZE, section.len as usize * PAGE_SIZE);
            window.map(at, bytes, source.file.as_fd(), section.at, source.kind.syncs()).map_err(io)?;
        }
        let lengths: Vec<u64> = source.sections.iter().map(|section| section.len).collect();
        let region = Region::request(&lengths, source.align, &source.name);
        let region = region.map_err(|_| DeviceError::NoPfns(source.size()))?;
        let builder = Pagemap::builder(device.as_str(), MemoryType::FsDax).ops(ops).geometry(source.align);
        let builder = region.ranges.iter().fold(builder, |builder, range| builder.range(*range));
        let pagemap = machine().register(builder);
        let pagemap = pagemap.map_err(|error| DeviceError::Register { device: device.clone(), error })?;
        Ok(Self { source, region, pagemap, window, alone: Some(alone) })
    }

    /// Bytes of a block.
    pub(super) fn bytes(&self) -> u64 {
        self.source.align.bytes() as u64
    }

    /// 4K pages of a block.
    pub(super) fn pages(&self) -> u64 {
        self.source.align.pages().get() as u64
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.source.pages() / self.pages()
    }

    /// The number of a block's head.
    pub(super) fn pfn(&self, block: u64) -> Option<Pfn> {
        self.pfns(block, 1).first().map(|range| range.start)
    }

    /// The numbers of blocks; one range for each section of the namespace.
    pub(super) fn pfns(&self, block: u64, len: u64) -> Vec<PfnRange> {
        let (page, end) = (block * self.pages(), (block + len) * self.pages());
        let both = self.source.sections.iter().zip(&self.region.ranges);
        let parts = both.filter_map(|(section, range)| {
            let (from, to) = (section.page.max(page), (section.page + section.len).min(end));
            let pages = |count: u64| PageCount::new(count as usize);
            (from < to)
                .then(|| PfnRange::new(range.start.forward(pages(from - section.page)), pages(to - from)))
        });
        parts.collect()
    }

    /// The block of a page.
    pub(super) fn block_of(&self, pfn: Pfn) -> Option<u64> {
        let mut both = self.source.sections.iter().zip(&self.region.ranges);
        let (section, range) = both.find(|(_, range)| range.contains(pfn))?;
        Some((section.page + pfn.since(range.start).get() as u64) / self.pages())
    }

    /// Notes whose a block is: what `whose` makes of the word that is there.
    pub(super) fn identify(&self, block: u64, whose: u64) {
        if let Some(word) = self.pfn(block).and_then(|pfn| self.pagemap.page_data(pfn)) {
            word.store(whose, Ordering::SeqCst);
        }
    }

    /// Whose a block is.
    pub(super) fn identity(&self, block: u64) -> u64 {
        let word = self.pfn(block).and_then(|pfn| self.pagemap.page_data(pfn));
        word.map_or(0, |word| word.load(Ordering::SeqCst))
    }

    /// Whether a block is lost.
    pub(super) fn is_lost(&self, block: u64) -> bool {
        self.pfn(block).is_some_and(|pfn| self.pagemap.is_poisoned(pfn))
    }

    fn pointer(&self, at: u64, len: usize) -> io::Result<*mut u8> {
        let fits = at.checked_add(len as u64).is_some_and(|end| end <= self.source.size().bytes());
        if !fits {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(self.window.as_ptr().as_ptr().wrapping_add(at as usize))
    }

    /// Reads bytes from byte `at` of the namespace on.
    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let from = self.pointer(at, into.len())?;
        // SAFETY: inside the window (checked), of which no references exist. Mappings may write the bytes meanwhile; then
        // some of either are read, as from any file.
        unsafe { from.copy_to(into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Writes bytes from byte `at` of the namespace on. They are safe after [`Blocks::flush`].
    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let to = self.pointer(at, bytes.len())?;
        // SAFETY: inside the window (checked), of which no references exist. `bytes` may be another mapping of the same
        // pages, so that they may overlap.
        unsafe { bytes.as_ptr().copy_to(to, bytes.len()) };
        Ok(())
    }

    /// Makes bytes zero, and safe.
    pub(super) fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        let to = self.pointer(at, len as usize)?;
        // SAFETY: as in `write`.
        unsafe { to.write_bytes(0, len as usize) };
        self.flush(at, len)
    }

    /// Copies a block, and makes the copy safe.
    pub(super) fn copy(&self, from: u64, to: u64) -> io::Result<()> {
        let len = self.bytes() as usize;
        let source = self.pointer(from * self.bytes(), len)?;
        let target = self.pointer(to * self.bytes(), len)?;
        // SAFETY: as in `write`; the blocks are two.
        unsafe { source.copy_to_nonoverlapping(target, len) };
        self.flush(to * self.bytes(), len as u64)
    }

    /// Returns when what was written to these bytes is safe.
    pub(super) fn flush(&self, at: u64, len: u64) -> io::Result<()> {
        match self.source.kind {
            _ if len == 0 => Ok(()),
            Kind::PageCache => self.window.write_back(at as usize, len as usize),
            Kind::Dax => {
                let start = self.pointer(at, len as usize)?;
                // SAFETY: `pointer` says that the bytes are inside the window.
                unsafe { flush::lines(start, len as usize) };
                Ok(())
            }
            Kind::Memory | Kind::Huge(_) => Ok(()),
        }
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        let mut no_wait = |_: PageCount| false;
        if machine().unregister(&self.pagemap, &mut no_wait).is_err() {
            // Somebody has pages of it, whose place must not become another's.
            std::mem::forget((self.source.store.take(), self.alone.take()));
        }
    }
}

/// The bytes of the first blocks.
#[derive(Debug)]
pub(super) struct Front {
    blocks: Arc<Blocks>,
    /// What was written and is not safe yet.
    dirty: std::sync::Mutex<Vec<(u64, u64)>>,
}

impl Front {
    pub(super) fn new(blocks: Arc<Blocks>) -> Self {
        Self { blocks, dirty: std::sync::Mutex::default() }
    }

    fn dirty(&self) -> std::sync::MutexGuard<'_, Vec<(u64, u64)>> {
        self.dirty.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Area for Front {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.blocks.read(at, into)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.blocks.write(at, bytes)?;
        self.dirty().push((at, bytes.len() as u64));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut dirty = self.dirty();
        let (from, to) =
            (dirty.iter().map(|(at, _)| *at).min(), dirty.iter().map(|(at, len)| at + len).max());
        match (self.blocks.source.kind, from.zip(to)) {
            (_, None) => {}
            // One call, of which the kernel leaves out what is clean.
            (Kind::PageCache, Some((from, to))) => self.blocks.flush(from, to - from)?,
            _ => dirty.iter().try_for_each(|(at, len)| self.blocks.flush(*at, *len))?,
        }
        dirty.clear();
        Ok(())
    }
}
