//! A file in this process's memory.
//!
//! What     [`View`], a window over a part of a file, and [`FileMapping`], as it is given out.
//! Rule     a page of a file that is mapped has a block, and one that is mapped for writing has a block of its own:
//!          whoever changes where blocks are gives views new ones before the old ones are free. So no touch has
//!          anything to wait for, and system calls find every page.
//! Owns     its addresses. Behind the file's last block a touch raises SIGBUS, as where a page is lost.
//! Locks    `blocks`, innermost; held while mappings are replaced.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uhmm_addr::{PAGE_SIZE, VaRange, VirtAddr};
use uhmm_sys::dax::{Protection, Window, flush};
use uhmm_sys::signals::{FaultInfo, Handled, InstallError, SigbusChain};

use super::blocks::Blocks;
use super::{FileError, Inner};
use crate::device::reach::{Entered, Table};
use crate::store::Kind;

static VIEWS: Table<View> = Table::new();

/// What a page that is not mapped has instead of a block.
const NONE: u64 = u64::MAX;

/// A window over a part of a file.
#[derive(Debug)]
pub(super) struct View {
    pub(super) inode: u64,
    blocks: Arc<Blocks>,
    window: Window,
    /// The first block of the file that it shows.
    pub(super) first: u64,
    /// How many.
    pub(super) len: u64,
    pub(super) protection: Protection,
    shown: Mutex<Box<[u64]>>,
}

impl View {
    pub(super) fn new(
        blocks: &Arc<Blocks>,
        inode: u64,
        first: u64,
        len: u64,
        protection: Protection,
    ) -> io::Result<Self> {
        let block = blocks.bytes() as usize;
        let align = block.max(uhmm_addr::Geometry::M2.bytes());
        let bytes = len as usize * block;
        let window = Window::reserve(bytes, align, (first as usize * block) % align, protection)?;
        let shown = Mutex::new(vec![NONE; len as usize].into());
        Ok(Self { inode, blocks: blocks.clone(), window, first, len, protection, shown })
    }

    fn shown(&self) -> MutexGuard<'_, Box<[u64]>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of blocks `from..to` of the file that it shows.
    pub(super) fn overlap(&self, from: u64, to: u64) -> Option<(u64, u64)> {
        let (from, to) = (from.max(self.first), to.min(self.first + self.len));
        (from < to).then_some((from, to))
    }

    /// Shows `len` blocks from `block` on at block `at` of the file. What is outside is left out; what is lost raises
    /// SIGBUS.
    pub(super) fn show(&self, at: u64, block: u64, len: u64) -> io::Result<()> {
        let Some((from, to)) = self.overlap(at, at + len) else { return Ok(()) };
        let mut shown = self.shown();
        for file_block in from..to {
            shown[(file_block - self.first) as usize] = block + (file_block - at);
        }
        let mut at_block = from;
        while at_block < to {
            let own = |n: u64| block + (n - at);
            let lost = self.blocks.is_lost(own(at_block));
            let end = (at_block..to).find(|n| self.blocks.is_lost(own(*n)) != lost).unwrap_or(to);
            if lost {
                self.close(at_block, end)?
            } else {
                self.connect(at_block, own(at_block), end - at_block)?
            }
            at_block = end;
        }
        Ok(())
    }

    /// Shows nothing at blocks `from..to` of the file any more.
    pub(super) fn hide(&self, from: u64, to: u64) -> io::Result<()> {
        let Some((from, to)) = self.overlap(from, to) else { return Ok(()) };
        let mut shown = self.shown();
        shown[(from - self.first) as usize..(to - self.first) as usize].fill(NONE);
        self.close(from, to)
    }

    /// A block was lost, or mended: whether it is shown here.
    pub(super) fn reconsider(&self, block: u64) -> io::Result<bool> {
        let shown = self.shown();
        let Some(n) = shown.iter().position(|own| *own == block) else { return Ok(false) };
        let at = self.first + n as u64;
        if self.blocks.is_lost(block) {
            self.close(at, at + 1)?
        } else {
            self.connect(at, block, 1)?
        }
        Ok(true)
    }

    fn bytes(&self, blocks: u64) -> usize {
        (blocks * self.blocks.bytes()) as usize
    }

    fn close(&self, from: u64, to: u64) -> io::Result<()> {
        self.window.close(self.bytes(from - self.first), self.bytes(to - from))
    }

    fn connect(&self, at: u64, block: u64, len: u64) -> io::Result<()> {
        let (pages, source) = (self.blocks.pages(), &self.blocks.source);
        for section in source.locate(block * pages, len * pages) {
            let skip = (section.page - block * pages) as usize * PAGE_SIZE;
            let (at, bytes) = (self.bytes(at - self.first) + skip, section.len as usize * PAGE_SIZE);
            self.window.map(at, bytes, source.file.as_fd(), section.at, source.kind.syncs())?;
        }
        Ok(())
    }
}

fn on_sigbus(addr: VirtAddr, fault: &FaultInfo) -> Handled {
    let lost = |view: &View| {
        let n = view.window.offset_of(addr)? / view.blocks.bytes() as usize;
        // Not waited for: the thread that has it may be in the middle of the change that raised this signal.
        let block = *view.shown.try_lock().ok()?.get(n)?;
        (block != NONE && view.blocks.is_lost(block)).then(|| view.blocks.bytes().trailing_zeros() as u8)
    };
    if !fault.synchronous {
        return Handled::NotOurs;
    }
    VIEWS.find(addr, lost).flatten().map_or(Handled::NotOurs, Handled::Poisoned)
}

/// Has SIGBUS say how much is lost.
pub(super) fn install() -> Result<(), InstallError> {
    // SAFETY: the handler reads, tries a lock and never waits for one, allocates nothing and does not unwind; it never asks
    // for another try.
    unsafe { SigbusChain::install(on_sigbus) }
}

/// A part of a file in this process's memory.
///
/// Stores are seen by every other mapping and reader of the file. The memory is reached through raw pointers alone; an
/// access behind the file's end, or to a page that is lost, ends in SIGBUS.
#[derive(Debug)]
pub struct FileMapping {
    entered: Entered<View>,
    // Keeps the blocks and the thread that follows the labels.
    _file_system: Arc<Inner>,
}

impl FileMapping {
    pub(super) fn new(file_system: &Arc<Inner>, view: Arc<View>) -> io::Result<Self> {
        let range = view.window.range();
        Ok(Self { entered: VIEWS.enter(view, range)?, _file_system: file_system.clone() })
    }

    fn view(&self) -> &View {
        self.entered.part()
    }

    /// Its addresses.
    pub fn range(&self) -> VaRange {
        self.view().window.range()
    }

    /// The first byte.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.view().window.as_ptr()
    }

    /// Bytes in it, at least a block.
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.range().bytes()
    }

    /// Returns when what was stored to `len` bytes from byte `at` on is safe.
    pub fn flush(&self, at: usize, len: usize) -> Result<(), FileError> {
        if at.checked_add(len).is_none_or(|end| end > self.len()) {
            let size = self.len() as u64;
            return Err(FileError::Outside { offset: at as u64, len: len as u64, size });
        }
        match self.view().blocks.source.kind {
            _ if len == 0 => {}
            Kind::PageCache => self.view().window.write_back(at, len)?,
            // SAFETY: inside the mapping (checked).
            Kind::Dax => unsafe { flush::lines(self.as_ptr().as_ptr().wrapping_add(at), len) },
            Kind::Memory | Kind::Huge(_) => {}
        }
        Ok(())
    }
}
