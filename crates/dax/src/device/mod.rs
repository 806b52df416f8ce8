//! device-dax: a namespace, or a node of the kernel's, that is mapped in compound pages of one size.
//!
//! What     [`Device`], with [`Device::map`], [`Device::pin`], [`Device::read_at`] and [`Device::write_at`];
//!          [`DaxMapping`], a part of it in this process's memory; what happens when pages break
//!          ([`Device::inject_error`]) and when the device goes ([`Device::kill`]).
//! Why      a program that manages its memory itself wants pages of a size that it can rely on, stores that are safe
//!          when they were flushed, and an error where a page is lost, instead of other bytes.
//! Owns     the claim to its namespace, its pfns, its pagemap (type `Generic`) and its thread. Mappings keep all that.
//! Locks    `parts`, the list of what is mapped; `marks`, while labels and pagemap are made to agree. `marks` before
//!          `parts`, and a part's own lock inside both. A fault takes neither, in the thread that touches; the device's own thread takes `parts`.
//! Fails    with one error for each thing that is asked.
//! Source   `drivers/dax/device.c` (`check_vma`, `dev_dax_huge_fault`, `dax_set_mapping`), `drivers/dax/bus.c`
//!          (`kill_dev_dax`), `mm/memory-failure.c`.

mod access;
pub(crate) mod attendant;
mod error;
pub(crate) mod mapped;
mod mapping;
pub(crate) mod reach;
pub(crate) mod source;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use uhmm_addr::{ByteSize, Geometry, PAGE_SIZE, PageCount, Pfn, PfnRange, VirtAddr};
use uhmm_core::device::MemoryType;
use uhmm_core::pagemap::{Failure, PageRange, Pagemap, PagemapOps, Told, UnregisterError};
use uhmm_core::sync::Ordering;
use uhmm_sys::dax::Window;
use uhmm_sys::uffd::{Features, Uffd};

pub use error::{AccessError, DeviceError, KillError, MapError, PinError};
pub use mapping::{DaxMapping, MapOptions};
pub use reach::CAPACITY as MAPPINGS_MAX;
pub use uhmm_sys::dax::Protection;

use crate::machine::{Region, machine};
use crate::pin::pin;
use crate::store::{BadPages, ChangeError, Extent, Kind, Mode, NamespaceId, Store};
use attendant::Attendant;
use mapped::Mapped;
use source::Source;

/// Who answers the first touch of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Faults {
    /// A thread of the device: every access works, system calls' as well.
    #[default]
    Threads,
    /// The thread that touches, in a handler of SIGBUS: several times as fast, but a system call that is given an
    /// address nobody has touched fails with `EFAULT`.
    Signal,
    /// The kernel, which tells nobody, in pages of the medium. Files whose pages are copies have no other way.
    Kernel,
}

/// What all that concerns a device needs of it.
#[derive(Debug)]
pub(crate) struct Core {
    source: Source,
    faults: Faults,
    uffd: Option<Arc<Uffd>>,
    region: Region,
    pagemap: Arc<Pagemap>,
    parts: Mutex<Parts>,
    /// The pages that are known to be bad.
    marks: Mutex<BadPages>,
    access: OnceLock<Window>,
}

/// What devices and mappings keep. The thread ends first, so that nothing of the device is left when the last of them is
/// dropped.
#[derive(Debug)]
pub(crate) struct Owner {
    _attendant: Attendant,
    core: Arc<Core>,
}

/// What is mapped.
#[derive(Debug, Default)]
struct Parts {
    list: Vec<Weak<Mapped>>,
    /// Nothing more is.
    closed: bool,
}

/// A device.
///
/// When it and its mappings are dropped, its pages are nobody's, unless some are still pinned: then device and
/// namespace stay taken until the process ends.
#[derive(Debug)]
pub struct Device {
    owner: Arc<Owner>,
}

/// What became of pages that broke.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Lost {
    /// Pages that nobody can read any more, compound pages whole.
    pub pages: PageCount,
    /// Mappings from which they were taken away, in this process.
    pub mappings: usize,
}

/// Pages that stay as long as this lives: the device is not killed before.
#[derive(Debug)]
pub struct Pinned {
    _ranges: Vec<PageRange>,
}

/// The pagemap's driver.
#[derive(Debug, Default)]
struct Driver {
    core: OnceLock<Weak<Core>>,
}

impl Driver {
    fn core(&self) -> Option<Arc<Core>> {
        self.core.get()?.upgrade()
    }
}

impl PagemapOps for Driver {
    fn memory_failure(&self, _: &Pagemap, failure: &Failure) -> Told {
        Told::Mappers(self.core().map_or(0, |core| core.lose(failure.pages)))
    }

    fn freeze(&self, _: &Pagemap) {
        if let Some(core) = self.core() {
            core.lock_parts().closed = true;
        }
    }

    fn invalidate(&self, _: &Pagemap) {
        if let Some(core) = self.core() {
            // What cannot be taken away, for want of memory, is refused to every fault all the same.
            core.parts().iter().for_each(|part| _ = part.kill());
        }
    }

    fn thaw(&self, _: &Pagemap) {
        if let Some(core) = self.core() {
            core.lock_parts().closed = false;
            // A part that cannot be put back raises SIGBUS, as it does now.
            core.parts().iter().for_each(|part| _ = part.revive());
        }
    }
}

impl Device {
    /// The namespace `id` of `store`, which is in the mode devdax.
    pub fn open(store: &Arc<Store>, id: NamespaceId, faults: Faults) -> Result<Self, DeviceError> {
        Self::over(Source::namespace(store, id, Mode::DevDax)?, faults)
    }

    /// A node of the kernel's `dax` bus, `/dev/dax0.0`. Its faults are the kernel's, at exactly its alignment.
    pub fn open_node(path: &Path) -> Result<Self, DeviceError> {
        Self::over(Source::node(path, Path::new("/sys"))?, Faults::Kernel)
    }

    fn over(source: Source, faults: Faults) -> Result<Self, DeviceError> {
        let device = source.name.clone();
        let faults = if matches!(source.kind, Kind::PageCache | Kind::Dax) { Faults::Kernel } else { faults };
        let uffd = minor_faults(source.kind, faults)?.map(Arc::new);
        reach::install()?;
        let lengths: Vec<u64> = source.sections.iter().map(|section| section.len).collect();
        let region = Region::request(&lengths, source.align, &source.name);
        let region = region.map_err(|_| DeviceError::NoPfns(source.size()))?;
        let driver = Arc::new(Driver::default());
        let builder = Pagemap::builder(device.as_str(), MemoryType::Generic).ops(driver.clone());
        let ranges = region.ranges.iter().copied();
        let builder = ranges.fold(builder.geometry(source.align), |builder, range| builder.range(range));
        let pagemap = machine().register(builder);
        let pagemap = pagemap.map_err(|error| DeviceError::Register { device: device.clone(), error })?;
        let core = Arc::new(Core {
            source,
            faults,
            uffd,
            region,
            pagemap,
            parts: Mutex::default(),
            marks: Mutex::default(),
            access: OnceLock::new(),
        });
        let _ = driver.core.set(Arc::downgrade(&core));
        core.follow_labels()?;
        let attendant = Attendant::start(core.clone()).map_err(|error| DeviceError::Io { device, error })?;
        Ok(Self { owner: Arc::new(Owner { _attendant: attendant, core }) })
    }

    fn core(&self) -> &Arc<Core> {
        &self.owner.core
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.core().source.name
    }

    /// Its size.
    pub fn size(&self) -> ByteSize {
        self.core().source.size()
    }

    /// The size of its compound pages.
    pub fn align(&self) -> Geometry {
        self.core().source.align
    }

    /// Who answers its faults.
    pub fn faults(&self) -> Faults {
        self.core().faults
    }

    /// Its pages' counts, and whether they are lost.
    pub fn pagemap(&self) -> &Arc<Pagemap> {
        &self.core().pagemap
    }

    /// The number of the page at `offset`, in bytes.
    pub fn pfn(&self, offset: u64) -> Option<Pfn> {
        self.core().pfn_of(offset / PAGE_SIZE as u64)
    }

    /// Keeps `len` bytes from `offset` on where they are, as a transfer behind the page table's back needs it. Whole
    /// compound pages are kept, with one reference each.
    #[track_caller]
    pub fn pin(&self, offset: u64, len: u64) -> Result<Pinned, PinError> {
        let (page, pages) = self.core().pages_of(offset, len)?;
        let ranges = self.core().pfns(page, pages).into_iter().map(|range| pin(&self.core().pagemap, range));
        Ok(Pinned { _ranges: ranges.collect::<Result<_, _>>()? })
    }

    /// `len` bytes from `offset` on, whole pages, are bad from now on, here and in the labels: the compound pages around them
    /// are taken from every mapping, and touching them raises SIGBUS (`BUS_MCEERR_AR`, with the size).
    pub fn inject_error(&self, offset: u64, len: u64) -> Result<Lost, ChangeError> {
        let Some((store, claim)) = &self.core().source.store else {
            return Err(std::io::Error::from(std::io::ErrorKind::Unsupported).into());
        };
        // The device's thread follows as well; what came of this change is to be known here.
        let mut marks = self.core().lock_marks();
        store.mark(claim.namespace().id, offset, len, true)?;
        self.core().follow(&mut marks)
    }

    /// The pages that are bad, counted from the device's first.
    pub fn bad_pages(&self) -> BadPages {
        self.core().lock_marks().clone()
    }

    /// Takes the device away: no new mappings and pins; touching what is mapped raises SIGBUS; and when no page is pinned any
    /// more, its pages are nobody's. If that takes longer than `patience`, everything is as before.
    pub fn kill(&self, patience: Duration) -> Result<(), KillError> {
        let deadline = Instant::now() + patience;
        let mut wait = |_: PageCount| {
            thread::sleep(Duration::from_millis(1));
            Instant::now() < deadline
        };
        match machine().unregister(&self.core().pagemap, &mut wait) {
            // It is gone already.
            Err(UnregisterError::NotRegistered(_)) | Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Core {
    fn lock_parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is mapped now.
    fn parts(&self) -> Vec<Arc<Mapped>> {
        let mut parts = self.lock_parts();
        parts.list.retain(|part| part.strong_count() > 0);
        parts.list.iter().filter_map(Weak::upgrade).collect()
    }

    /// The part in which `addr` is.
    fn part_at(&self, addr: VirtAddr) -> Option<Arc<Mapped>> {
        let parts = self.lock_parts();
        let mut live = parts.list.iter().filter_map(Weak::upgrade);
        live.find(|part| part.window.offset_of(addr).is_some())
    }

    /// The number of a page, counted from the device's first.
    fn pfn_of(&self, page: u64) -> Option<Pfn> {
        let mut both = self.source.sections.iter().zip(&self.region.ranges);
        let (section, range) = both.find(|(section, _)| page < section.page + section.len)?;
        Some(range.start.forward(PageCount::new((page - section.page) as usize)))
    }

    /// The numbers of pages; one range for each section.
    fn pfns(&self, page: u64, len: u64) -> Vec<PfnRange> {
        let both = self.source.sections.iter().zip(&self.region.ranges);
        let parts = both.filter_map(|(section, range)| {
            let (from, to) = (section.page.max(page), (section.page + section.len).min(page + len));
            let pages = |count: u64| PageCount::new(count as usize);
            (from < to)
                .then(|| PfnRange::new(range.start.forward(pages(from - section.page)), pages(to - from)))
        });
        parts.collect()
    }

    /// The page with this number.
    fn page_of(&self, pfn: Pfn) -> Option<u64> {
        let both = self.source.sections.iter().zip(&self.region.ranges);
        let mut found = both.filter(|(_, range)| range.contains(pfn));
        found.next().map(|(section, range)| section.page + pfn.since(range.start).get() as u64)
    }

    /// Notes on a page's head what it is (`dax_set_mapping`), the first time.
    fn identify(&self, pfn: Pfn, page: u64) {
        if let Some(word) = self.pagemap.page_data(pfn) {
            let _ = word.compare_exchange(0, IDENTIFIED | page, Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// Takes pages away from every mapping. From how many.
    fn lose(&self, pages: PfnRange) -> usize {
        let Some(page) = self.page_of(pages.start) else { return 0 };
        let len = pages.pages.get() as u64;
        self.parts().iter().filter(|part| part.close(page, len).unwrap_or(true)).count()
    }

    /// Makes pagemap and mappings agree with the labels: pages that are bad are lost, others are not.
    fn follow_labels(&self) -> Result<Lost, ChangeError> {
        self.follow(&mut self.lock_marks())
    }

    fn lock_marks(&self) -> MutexGuard<'_, BadPages> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(&self, marks: &mut BadPages) -> Result<Lost, ChangeError> {
        let Some((store, claim)) = &self.source.store else { return Ok(Lost::default()) };
        let bad = store.table()?.bad_of(claim.namespace());
        let mut lost = Lost::default();
        for run in bad.runs() {
            for page in run.start..run.end() {
                if marks.touches(Extent { start: page, len: 1 }) {
                    continue;
                }
                let Some(pfn) = self.pfn_of(page) else { continue };
                if let Ok(poisoned) = self.pagemap.memory_failure(pfn) {
                    lost.mappings = lost.mappings.max(poisoned.told);
                    let more = if poisoned.known { PageCount::ZERO } else { poisoned.failure.pages.pages };
                    lost.pages = lost.pages.plus(more);
                }
            }
        }
        for run in marks.runs() {
            let mut good = BadPages::new();
            good.add(*run);
            bad.among(*run).for_each(|still| _ = good.clear(still));
            for run in good.runs() {
                for pfns in self.pfns(run.start, run.len) {
                    self.pagemap.clear_poison(pfns);
                }
                let whole = run.around(self.source.align);
                for part in self.parts() {
                    part.open(whole.start, whole.len)?;
                }
            }
        }
        *marks = bad;
        Ok(lost)
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        let mut no_wait = |_: PageCount| false;
        if let Err(UnregisterError::Busy { .. }) = machine().unregister(&self.pagemap, &mut no_wait) {
            // Somebody has pages of it, whose place must not become another's.
            std::mem::forget(self.source.store.take());
        }
    }
}

/// In a head's word: it was mapped, at the page in the other bits.
const IDENTIFIED: u64 = 1 << 63;

fn minor_faults(kind: Kind, faults: Faults) -> Result<Option<Uffd>, DeviceError> {
    let (minor, name) = match kind {
        Kind::Memory => (Features::MINOR_SHMEM, "shared memory"),
        Kind::Huge(_) => (Features::MINOR_HUGETLBFS, "huge pages"),
        Kind::PageCache | Kind::Dax => return Ok(None),
    };
    let wanted = match faults {
        Faults::Kernel => return Ok(None),
        Faults::Threads => minor,
        Faults::Signal => minor.union(Features::SIGBUS),
    };
    let uffd = Uffd::open(wanted)?;
    if uffd.features().contains(wanted) { Ok(Some(uffd)) } else { Err(DeviceError::NoMinorFaults(name)) }
}
