//! The limits that figures of devices are measured against: the bare primitives, with nothing of a device around them.
//!
//! What     [`Continue`], huge pages of a file mapped by `UFFDIO_CONTINUE` alone, without a fault or in a bare handler of
//!          SIGBUS; [`Copying`], memcpy from one buffer to huge pages and to a mapping of a device.
//! Why      a figure by itself says more about the machine than about the code.
//! Owns     its own memory and descriptors.
//! Fails    where the system refuses them: huge pages are to be reserved beforehand.

use std::io;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use uhmm_addr::{ByteSize, PageCount, VaRange, VirtAddr};
use uhmm_sys::hugetlb::Huge;
use uhmm_sys::mapping::Mapping;
use uhmm_sys::signals::BareHandler;
use uhmm_sys::uffd::{Features, Mode, Uffd};

use crate::DaxMapping;
use crate::store::{OpenError, Store};

/// Huge pages that are there, in a mapping that is told to map them.
#[derive(Debug)]
pub struct Continue {
    mapping: Mapping,
    uffd: Uffd,
    // Where the pages are.
    _store: Store,
}

impl Continue {
    /// `size` of memory in pages of 2 MiB.
    pub fn new(size: ByteSize) -> Result<Box<Self>, OpenError> {
        let store = Store::memory(size, Some(Huge::M2), 0)?;
        let failed = |error| OpenError::Io { action: "map", path: "huge pages".into(), error };
        let mapping = Mapping::shared(store.medium().fd(), 0, size.bytes() as usize, "").map_err(failed)?;
        let uffd = Uffd::open(Features::MINOR_HUGETLBFS.union(Features::SIGBUS))
            .map_err(|error| failed(io::Error::other(error)))?;
        // SAFETY: the memory is this value's own, and nobody touches it: its pages are mapped and unmapped, no more.
        let registered = unsafe { uffd.register(mapping.range(), Mode::MINOR) };
        registered.map_err(|error| failed(io::Error::other(error)))?;
        Ok(Box::new(Self { mapping, uffd, _store: store }))
    }

    /// Maps each page with one request; what that took in all. Then unmaps them.
    pub fn run(&self) -> io::Result<Duration> {
        let huge = PageCount::in_bytes(Huge::M2.bytes());
        let mut rest = Some(self.mapping.range());
        let start = Instant::now();
        while let Some(range) = rest {
            let page: VaRange = range.take(huge);
            let progress = self.uffd.continue_(page);
            if !progress.is_complete() {
                return Err(io::Error::other(format!("the bare request stopped: {:?}", progress.stop)));
            }
            rest = range.skip(huge);
        }
        let took = start.elapsed();
        self.mapping.discard(self.mapping.range())?;
        Ok(took)
    }

    /// Touches each page once, with the least that such a fault can be answered with: SIGBUS, the request, and back. What
    /// that took in all. No other thread of the process may have a fault of its own meanwhile.
    pub fn run_faults(self: &mut Box<Self>) -> io::Result<Duration> {
        CURRENT.store((&raw const **self).cast_mut(), Ordering::Release);
        // SAFETY: the handler makes one system call; it answers all faults of the memory that is touched here, and the
        // caller keeps others away.
        let handler = unsafe { BareHandler::install(on_bare_fault) }?;
        let start = Instant::now();
        for at in (0..self.mapping.len()).step_by(Huge::M2.bytes()) {
            // SAFETY: inside the mapping.
            std::hint::black_box(unsafe { self.mapping.as_ptr().add(at).read_volatile() });
        }
        let took = start.elapsed();
        drop(handler);
        self.mapping.discard(self.mapping.range())?;
        Ok(took)
    }
}

/// What the bare handler works on, while a run lasts.
static CURRENT: AtomicPtr<Continue> = AtomicPtr::new(std::ptr::null_mut());

fn on_bare_fault(addr: VirtAddr) {
    // SAFETY: `run_faults` stored it and keeps it as long as the handler is installed.
    let bare = unsafe { &*CURRENT.load(Ordering::Acquire) };
    let huge = PageCount::in_bytes(Huge::M2.bytes());
    let first = addr.page().get() & !(huge.get() - 1);
    if let Some(page) = VaRange::of_pages(uhmm_addr::Vpn::new(first), huge) {
        let progress = bare.uffd.continue_(page);
        assert!(progress.is_complete(), "the bare request failed: {:?}", progress.stop);
    }
}

/// A buffer that is copied from, and huge pages that are copied to.
#[derive(Debug)]
pub struct Copying {
    from: Mapping,
    to: Mapping,
}

impl Copying {
    /// `size` each, a multiple of 2 MiB. All pages are there.
    pub fn new(size: ByteSize) -> io::Result<Self> {
        let len = size.bytes() as usize;
        let from = Mapping::reserve_aligned(len, Huge::M2.bytes(), "uhmm-yardstick")?;
        from.advise_huge()?;
        from.populate()?;
        let to = Mapping::hugetlb(len, Huge::M2)?;
        to.populate()?;
        // SAFETY: the mapping has that length and is this value's own.
        unsafe { from.as_ptr().as_ptr().write_bytes(0x5a, len) };
        Ok(Self { from, to })
    }

    /// memcpy to the huge pages.
    pub fn plain(&mut self) -> Duration {
        let start = Instant::now();
        // SAFETY: both have that length; they are two, and this value's own.
        unsafe {
            std::hint::black_box(self.from.as_ptr()).copy_to_nonoverlapping(self.to.as_ptr(), self.from.len())
        };
        start.elapsed()
    }

    /// memcpy through a mapping that has that length at least, and a look whether the bytes came there.
    pub fn through(&mut self, mapping: &DaxMapping) -> io::Result<Duration> {
        let len = self.from.len();
        if mapping.len() < len {
            return Err(Errno::INVAL.into());
        }
        let start = Instant::now();
        // SAFETY: the mapping is that long (checked); memory of a device is nobody else's.
        unsafe { std::hint::black_box(self.from.as_ptr()).copy_to_nonoverlapping(mapping.as_ptr(), len) };
        let took = start.elapsed();
        // SAFETY: its last byte.
        let last = unsafe { mapping.as_ptr().add(len - 1).read_volatile() };
        if last == 0x5a { Ok(took) } else { Err(io::ErrorKind::InvalidData.into()) }
    }
}

/// Touches the first byte of every 2 MiB of a mapping.
pub fn touch(mapping: &DaxMapping) -> Duration {
    let start = Instant::now();
    for at in (0..mapping.len()).step_by(Huge::M2.bytes()) {
        // SAFETY: inside the mapping.
        std::hint::black_box(unsafe { mapping.as_ptr().add(at).read_volatile() });
    }
    start.elapsed()
}
