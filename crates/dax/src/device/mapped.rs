//! A part of a device in somebody's address space, and its faults.
//!
//! What     [`Mapped`], a window over the device; [`Mapped::resolve`], which answers one fault: it maps exactly one
//!          compound page, with one request, whatever the medium's own pages are.
//! Why      device-dax promises that what is mapped is of the device's alignment, always (`dev_dax_huge_fault`). The
//!          kernel tells of the first touch by a minor fault, and `UFFDIO_CONTINUE` maps what was asked for.
//! Protocol a fault takes a reference to the page, maps it, and lets the reference go. Whoever takes a page away
//!          sets its bit in `lost` first, then replaces the mapping, then wakes. So a fault that comes later finds
//!          the bit, and one that came earlier has mapped what is then replaced:
//!
//! ```text
//!   fault                         taking away
//!   lost? no                      lost := yes
//!   CONTINUE ─────────────────►   replace: what was mapped is gone; a CONTINUE from now on finds no
//!   touch again: SIGBUS           registered mapping, and says so
//! ```
//!
//! Locks    `changing`, innermost, held while mappings are replaced: what is opened was good when that was looked up, and
//!          who takes pages away comes after. A device that was killed is opened by nobody but [`Mapped::revive`].
//! Faults   take no lock and allocate nothing (debug builds note the reference in the pagemap's ledger).
//! Owns     the window; unmapping it unregisters it.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uhmm_addr::{PAGE_SIZE, VaRange, VirtAddr};
use uhmm_core::host::Stop;
use uhmm_core::pagemap::PageError;
use uhmm_sys::dax::{Protection, Window};
use uhmm_sys::uffd::{Mode, Uffd};

use super::Core;

/// What became of a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// The page is there: try again.
    Present,
    /// Somebody is just changing what is there: try again.
    Busy,
    /// The page is lost, and so many bytes with it (log2).
    Lost(u8),
    /// There is no page, and will be none.
    Gone,
}

/// A part of a device in somebody's address space.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) core: Arc<Core>,
    pub(super) window: Window,
    /// The first page of the device that is mapped.
    page: u64,
    /// One bit for each compound page: accesses end in SIGBUS.
    lost: Box<[AtomicU64]>,
    /// The device was killed. Set with `changing` held.
    killed: AtomicBool,
    changing: Mutex<()>,
    /// Faults that mapped a page.
    faults: AtomicU64,
}

impl Mapped {
    pub(super) fn new(core: &Arc<Core>, page: u64, len: u64, protection: Protection) -> io::Result<Self> {
        let bytes = len as usize * PAGE_SIZE;
        let unit = core.source.align.bytes();
        // What is at a multiple of 2 MiB in the device is so in memory, whatever its alignment.
        let align = unit.max(uhmm_addr::Geometry::M2.bytes());
        let phase = (page as usize * PAGE_SIZE) % align;
        let window = Window::reserve(bytes, align, phase, protection)?;
        let units = bytes / unit;
        let lost = (0..units.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let mapped = Self {
            core: core.clone(),
            window,
            page,
            lost,
            killed: AtomicBool::new(false),
            changing: Mutex::default(),
            faults: AtomicU64::new(0),
        };
        mapped.open(page, len)?;
        Ok(mapped)
    }

    fn unit_bytes(&self) -> usize {
        self.core.source.align.bytes()
    }

    /// The pages that it maps, of `len` from `page` of the device on: offset and length in the window, in bytes.
    fn inside(&self, page: u64, len: u64) -> Option<(usize, usize)> {
        let end = self.page + self.window.range().pages().get() as u64;
        let (from, to) = (page.max(self.page), (page + len).min(end));
        (from < to).then(|| ((from - self.page) as usize * PAGE_SIZE, (to - from) as usize * PAGE_SIZE))
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps what is good of `len` pages from `page` of the device on, whole compound pages. The others raise SIGBUS, as
    /// all do when the device was killed.
    pub(super) fn open(&self, page: u64, len: u64) -> io::Result<()> {
        let changing = self.changing();
        if self.killed.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.open_with(&changing, page, len)
    }

    fn open_with(&self, changing: &MutexGuard<'_, ()>, page: u64, len: u64) -> io::Result<()> {
        let Some((at, bytes)) = self.inside(page, len) else { return Ok(()) };
        let unit = self.unit_bytes();
        let (first, end) = (at / unit, (at + bytes) / unit);
        let mut unit = first;
        while unit < end {
            let bad = self.is_bad(unit);
            let run = (unit..end).find(|unit| self.is_bad(*unit) != bad).unwrap_or(end);
            if bad {
                self.close_with(changing, self.page_of(unit), self.page_of(run) - self.page_of(unit))?;
            } else {
                self.connect_file(self.page_of(unit), self.page_of(run) - self.page_of(unit))?;
                for unit in unit..run {
                    self.lost[unit / 64].fetch_and(!(1 << (unit % 64)), Ordering::SeqCst);
                }
            }
            unit = run;
        }
        Ok(())
    }

    /// The first page of a compound page of the window, counted from the device's first.
    fn page_of(&self, unit: usize) -> u64 {
        self.page + (unit * self.unit_bytes() / PAGE_SIZE) as u64
    }

    fn is_bad(&self, unit: usize) -> bool {
        self.core.pfn_of(self.page_of(unit)).is_none_or(|pfn| self.core.pagemap.is_poisoned(pfn))
    }

    /// Maps the file over pages of the device, and has faults there told.
    fn connect_file(&self, page: u64, len: u64) -> io::Result<()> {
        let source = &self.core.source;
        for section in source.locate(page, len) {
            let (at, bytes) =
                ((section.page - self.page) as usize * PAGE_SIZE, section.len as usize * PAGE_SIZE);
            self.window.map(at, bytes, source.file.as_fd(), section.at, source.kind.syncs())?;
            if let Some(uffd) = &self.core.uffd {
                let part = self.window.part(at, bytes)?;
                // SAFETY: the memory is this window's own, and reached through raw pointers alone. Its pages come from
                // the device's file, whoever maps them, so that nobody finds other bytes than he would without.
                unsafe { uffd.register(part, Mode::MINOR) }.map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    /// Takes the compound pages of `len` pages from `page` of the device on away. Whether any of them is mapped here.
    pub(super) fn close(&self, page: u64, len: u64) -> io::Result<bool> {
        self.close_with(&self.changing(), page, len)
    }

    fn close_with(&self, _: &MutexGuard<'_, ()>, page: u64, len: u64) -> io::Result<bool> {
        let Some((at, bytes)) = self.inside(page, len) else { return Ok(false) };
        let unit = self.unit_bytes();
        let (first, end) = (at / unit, (at + bytes).div_ceil(unit));
        for unit in first..end {
            self.lost[unit / 64].fetch_or(1 << (unit % 64), Ordering::SeqCst);
        }
        self.replace(first * unit, (end - first) * unit)?;
        Ok(true)
    }

    /// Takes everything away, until [`Mapped::revive`].
    pub(super) fn kill(&self) -> io::Result<()> {
        let _changing = self.changing();
        self.killed.store(true, Ordering::SeqCst);
        self.replace(0, self.window.range().bytes())
    }

    /// Puts back what [`Mapped::kill`] took.
    pub(super) fn revive(&self) -> io::Result<()> {
        let changing = self.changing();
        self.open_with(&changing, self.page, self.window.range().pages().get() as u64)?;
        self.killed.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn replace(&self, at: usize, bytes: usize) -> io::Result<()> {
        self.window.close(at, bytes)?;
        if let Some(uffd) = &self.core.uffd {
            // Who waited there finds SIGBUS now.
            uffd.wake(self.window.part(at, bytes)?);
        }
        Ok(())
    }

    /// Why an access to `addr`, which is inside, cannot succeed, if that is certain.
    pub(super) fn verdict(&self, addr: VirtAddr) -> Option<Outcome> {
        if self.killed.load(Ordering::SeqCst) {
            return Some(Outcome::Gone);
        }
        let unit = self.window.offset_of(addr)? / self.unit_bytes();
        let lost = self.lost[unit / 64].load(Ordering::SeqCst) >> (unit % 64) & 1 == 1;
        lost.then_some(Outcome::Lost(self.unit_bytes().trailing_zeros() as u8))
    }

    /// Answers a fault at `addr`, which is inside.
    pub(super) fn resolve(&self, addr: VirtAddr) -> Outcome {
        if let Some(verdict) = self.verdict(addr) {
            return verdict;
        }
        let (Some(uffd), Some(offset)) = (&self.core.uffd, self.window.offset_of(addr)) else {
            return Outcome::Gone;
        };
        let at = offset / self.unit_bytes() * self.unit_bytes();
        let page = self.page + (at / PAGE_SIZE) as u64;
        let Some(pfn) = self.core.pfn_of(page) else { return Outcome::Gone };
        let held = match self.core.pagemap.page(pfn) {
            Ok(held) => held,
            Err(PageError::Claimed(_) | PageError::Dying(_) | PageError::Poisoned(_)) => {
                return Outcome::Busy;
            }
            Err(_) => return Outcome::Gone,
        };
        self.core.identify(pfn, page);
        let Ok(range) = self.window.part(at, self.unit_bytes()) else { return Outcome::Gone };
        // Counted first: whoever waits for the page may look as soon as it is there.
        self.faults.fetch_add(1, Ordering::Relaxed);
        let outcome = self.connect(uffd, range);
        drop(held);
        if outcome != Outcome::Present {
            self.faults.fetch_sub(1, Ordering::Relaxed);
        }
        outcome
    }

    /// Maps all of `range`, of which some may be mapped.
    fn connect(&self, uffd: &Uffd, range: VaRange) -> Outcome {
        let step = self.core.source.kind.page().pages();
        let mut rest = Some(range);
        while let Some(range) = rest {
            let progress = uffd.continue_(range);
            rest = match progress.stop {
                Stop::Complete => None,
                // One page of the medium at a time, for whatever mapped it.
                Stop::Present => range.skip(progress.done.plus(step)),
                Stop::Pending if !progress.done.is_zero() => range.skip(progress.done),
                Stop::Pending | Stop::Unmapped | Stop::NoMemory => return Outcome::Busy,
                _ => return Outcome::Gone,
            };
        }
        Outcome::Present
    }

    /// Faults that mapped a compound page.
    pub(super) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }
}
