//! dax-kmem: a namespace in the mode `system-ram`, as a device whose pages a space uses as slower RAM.
//!
//! What     [`SystemRam`], which implements core's [`Device`]: to be given to `Space::add_memory`, which makes a node of it.
//! Why      memory that can only be mapped is of use to a program that was written for that; as a node, whatever is cold
//!          in any program's heap may lie there.
//! Reach    [`Reach::Copied`]: the pages stay where they are, in the store's file, and a page that is touched comes home by
//!          a copy. Works on every store. [`Reach::InPlace`]: loads and stores reach the node's pages themselves, without a
//!          fault after the first. The kernel moves frames of private memory alone between mappings (`UFFDIO_MOVE`),
//!          never a file's. So the store's file gives its frames up (they are RAM like any other; the namespace's part of
//!          it is punched), and as many are taken as private memory, which a space maps in place as a coherent
//!          device's. When the node goes, the file has its frames back. Only a store in memory can do that: what a disk,
//!          persistent memory, or a pool of huge pages has is not to be had as private memory.
//! Contents a node's are nobody's after its end: the namespace reads as zeros then (rule R9). A process that is killed
//!          leaves what was there, which no later node shows to anybody.
//! Owns     the claim to the namespace, so that nobody resizes, reconfigures or destroys it: whoever tries is told which
//!          process has it. A thread that follows the labels, for pages that others say are bad.
//! Locks    `following`, while the labels are followed and those told who want to know what is lost; inside it `marks`, what
//!          is known, under which nobody is called. Transfers take neither: what is bad is a bit for each page.
//! Fails    with a [`DeviceError`]; transfers of bad pages with `EIO`.
//! Source   `drivers/dax/kmem.c`; `mm/memory-failure.c` for what becomes of bad pages.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use uhmm_addr::{ByteSize, PAGE_SIZE, PageCount, VirtAddr};
use uhmm_core::device::{Device, DeviceMemory, DevicePage, Failures, MemoryType, Transfer, TransferError};
use uhmm_devices::MemDevice;
use uhmm_sys::dax::{Protection, Window};
use uhmm_sys::uffd::Uffd;

use crate::device::DeviceError;
use crate::device::attendant::{Attendant, Attended};
use crate::device::mapped::Outcome;
use crate::device::source::Source;
use crate::store::{BadPages, ChangeError, Extent, Kind, Mode, NamespaceId, Store};

const BAD: TransferError = TransferError::Io(Errno::IO.raw_os_error());

/// How a program reaches the pages of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Reach {
    /// A page that is touched comes home by a copy.
    #[default]
    Copied,
    /// Loads and stores go to the node's pages. On stores in memory, with a kernel that moves frames (Linux 6.8).
    InPlace,
}

/// A namespace whose pages are RAM for a space.
#[derive(Debug)]
pub struct SystemRam {
    // Ends first: it keeps the ram.
    _attendant: Attendant,
    ram: Arc<Ram>,
}

#[derive(Debug)]
enum Memory {
    /// The file's own pages.
    File(Window),
    /// Private memory, in the place of the file's.
    Private(MemDevice),
}

struct Ram {
    source: Source,
    pages: PageCount,
    /// Taken when the namespace is cleared at the end.
    memory: Option<Memory>,
    any_bad: AtomicBool,
    bad: Box<[AtomicU64]>,
    marks: Mutex<Marks>,
    /// One follower at a time, until he has told: whoever comes next finds that everybody knows.
    following: Mutex<()>,
}

impl std::fmt::Debug for Ram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ram")
            .field("source", &self.source)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Marks {
    bad: BadPages,
    listeners: Vec<Arc<dyn Failures>>,
}

impl SystemRam {
    /// The namespace `id` of `store`, which is in the mode system-ram.
    ///
    /// # Errors
    /// [`DeviceError::Mode`] for another mode, with the command that changes it; [`DeviceError::NotInPlace`].
    pub fn open(store: &Arc<Store>, id: NamespaceId, reach: Reach) -> Result<Self, DeviceError> {
        let source = Source::namespace(store, id, Mode::SystemRam)?;
        let pages = PageCount::new(source.pages() as usize);
        let memory = match reach {
            Reach::Copied => Memory::File(window(&source)?),
            Reach::InPlace => Memory::Private(taken_out(store, &source, pages)?),
        };
        let ram = Arc::new(Ram {
            pages,
            memory: Some(memory),
            any_bad: AtomicBool::new(false),
            bad: (0..pages.get().div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            marks: Mutex::default(),
            following: Mutex::default(),
            source,
        });
        ram.follow()?;
        let device = ram.source.name.clone();
        let attendant = Attendant::start(ram.clone()).map_err(|error| DeviceError::Io { device, error })?;
        Ok(Self { _attendant: attendant, ram })
    }

    /// Its size.
    pub fn size(&self) -> ByteSize {
        self.ram.source.size()
    }

    /// `len` bytes from `offset` on, whole pages, are bad from now on, here and in the labels. A space that has the pages
    /// gives them to nobody any more, and a touch of one that is in use raises SIGBUS.
    ///
    /// # Errors
    /// If the labels cannot be changed.
    pub fn inject_error(&self, offset: u64, len: u64) -> Result<(), ChangeError> {
        if let Some((store, claim)) = &self.ram.source.store {
            store.mark(claim.namespace().id, offset, len, true)?;
        }
        // The thread that follows may have seen it first; then this waits until it has told.
        self.ram.follow()
    }

    /// The pages that are bad, counted from the namespace's first. They stay so until the node is removed and
    /// `uhmm dax clear-error` has mended them.
    pub fn bad_pages(&self) -> BadPages {
        self.ram.lock_marks().bad.clone()
    }
}

/// The file's pages in this process's memory.
fn window(source: &Source) -> Result<Window, DeviceError> {
    let io = |error| DeviceError::Io { device: source.name.clone(), error };
    let len = source.size().bytes() as usize;
    let window = Window::reserve(len, source.align.bytes(), 0, Protection::ReadWrite).map_err(io)?;
    for section in &source.sections {
        let (at, bytes) = (section.page as usize * PAGE_SIZE, section.len as usize * PAGE_SIZE);
        window.map(at, bytes, source.file.as_fd(), section.at, false).map_err(io)?;
    }
    Ok(window)
}

/// As much private memory as the namespace has, whose own frames go back to the system.
fn taken_out(store: &Store, source: &Source, pages: PageCount) -> Result<MemDevice, DeviceError> {
    let device = source.name.clone();
    if source.kind != Kind::Memory {
        return Err(DeviceError::NotInPlace { device, kind: source.kind });
    }
    let memory = MemDevice::coherent(pages.size(), None);
    let memory = memory.map_err(|error| DeviceError::Memory { device: device.clone(), error })?;
    for extent in extents(source) {
        store.medium().punch(extent).map_err(|error| DeviceError::Io { device: device.clone(), error })?;
    }
    Ok(memory)
}

/// What the namespace has of the store's data.
fn extents(source: &Source) -> impl Iterator<Item = Extent> {
    let namespace = source.store.iter().map(|(_, claim)| claim.namespace());
    namespace.flat_map(|namespace| namespace.pieces().map(|piece| piece.extent))
}

impl Ram {
    fn lock_marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the labels, and tells of every page that is bad since. A page that was mended stays bad here: it may have
    /// lost what was on it.
    fn follow(&self) -> Result<(), ChangeError> {
        let Some((store, claim)) = &self.source.store else { return Ok(()) };
        let _alone = self.following.lock().unwrap_or_else(PoisonError::into_inner);
        let (new, listeners) = {
            let mut marks = self.lock_marks();
            let now = store.table()?.bad_of(claim.namespace());
            let mut new = now.clone();
            marks.bad.runs().iter().for_each(|known| _ = new.clear(*known));
            now.runs().iter().for_each(|run| marks.bad.add(*run));
            for page in new.runs().iter().flat_map(|run| run.start..run.end()) {
                self.bad[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
                self.any_bad.store(true, Ordering::Release);
            }
            (new, marks.listeners.clone())
        };
        for listener in listeners {
            tell(&*listener, &new);
        }
        Ok(())
    }

    fn is_bad(&self, page: u64) -> bool {
        let word = self.bad.get((page / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    /// Whether `pages` from `page` on are the namespace's, and good.
    fn admit(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        let end = page.0.checked_add(pages.get() as u64).filter(|end| *end <= self.pages.get() as u64);
        let end = end.ok_or(TransferError::Io(Errno::INVAL.raw_os_error()))?;
        if self.any_bad.load(Ordering::Acquire) && (page.0..end).any(|page| self.is_bad(page)) {
            return Err(BAD);
        }
        Ok(())
    }

    /// Carries out the transfers that can be.
    fn transfer(&self, batch: &mut [Transfer], copy: impl Fn(&Memory, &mut [Transfer])) {
        for transfer in batch {
            match (self.admit(transfer.page(), transfer.pages()), &self.memory) {
                (Ok(()), Some(memory)) => copy(memory, std::slice::from_mut(transfer)),
                (Err(error), _) => transfer.fail(error),
                (_, None) => transfer.fail(TransferError::Gone),
            }
        }
    }
}

fn tell(listener: &dyn Failures, bad: &BadPages) {
    for run in bad.runs() {
        listener.lost(DevicePage(run.start), run.pages());
    }
}

/// The byte of the window at which a page begins that [`Ram::admit`] has let pass.
fn at(window: &Window, page: DevicePage) -> *mut u8 {
    window.as_ptr().as_ptr().wrapping_add(page.offset() as usize)
}

impl Device for SystemRam {
    fn name(&self) -> &str {
        &self.ram.source.name
    }

    fn memory_type(&self) -> MemoryType {
        match self.ram.memory {
            Some(Memory::Private(_)) => MemoryType::Coherent,
            _ => MemoryType::Private,
        }
    }

    fn memory(&self) -> Option<DeviceMemory> {
        match &self.ram.memory {
            Some(Memory::Private(memory)) => memory.memory(),
            _ => None,
        }
    }

    fn capacity(&self) -> PageCount {
        self.ram.pages
    }

    fn write(&self, batch: &mut [Transfer]) {
        self.ram.transfer(batch, |memory, batch| match memory {
            Memory::Private(memory) => memory.write(batch),
            Memory::File(window) => {
                for transfer in batch {
                    let to = at(window, transfer.page());
                    // SAFETY: inside the window (admitted), of which no references exist; the transfer's maker promised
                    // that its RAM can be read for that length, and it is none of ours.
                    unsafe { to.copy_from_nonoverlapping(transfer.ram().as_ptr(), transfer.bytes()) };
                }
            }
        });
    }

    fn read(&self, batch: &mut [Transfer]) {
        self.ram.transfer(batch, |memory, batch| match memory {
            Memory::Private(memory) => memory.read(batch),
            Memory::File(window) => {
                for transfer in batch {
                    let from = at(window, transfer.page());
                    // SAFETY: as in `write`, the other way round: the RAM can be written, and nobody else accesses it.
                    unsafe { from.copy_to_nonoverlapping(transfer.ram().as_ptr(), transfer.bytes()) };
                }
            }
        });
    }

    /// Refused: the memory is lent to the space as a whole.
    fn discard(&self, _page: DevicePage, _pages: PageCount) -> Result<(), TransferError> {
        Err(TransferError::Declined)
    }

    fn zero(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        self.ram.admit(page, pages)?;
        match &self.ram.memory {
            Some(Memory::Private(memory)) => memory.zero(page, pages),
            Some(Memory::File(window)) => {
                // SAFETY: inside the window (admitted), and the caller owns the pages.
                unsafe { at(window, page).write_bytes(0, pages.bytes()) };
                Ok(())
            }
            None => Err(TransferError::Gone),
        }
    }

    fn report_failures(&self, to: Arc<dyn Failures>) {
        let known = {
            let mut marks = self.ram.lock_marks();
            marks.listeners.push(to.clone());
            marks.bad.clone()
        };
        // What becomes bad from here on is told as well: a page may be told twice.
        tell(&*to, &known);
    }
}

impl Attended for Ram {
    fn source(&self) -> &Source {
        &self.source
    }

    fn follow_labels(&self) {
        // The next change brings another try.
        let _ = self.follow();
    }

    fn faults(&self) -> Option<&Arc<Uffd>> {
        None
    }

    fn resolve(&self, _addr: VirtAddr) -> Outcome {
        Outcome::Gone
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // Private memory goes back to the system first: then there is room for the file's.
        drop(self.memory.take());
        let Some((store, _)) = &self.source.store else { return };
        for extent in extents(&self.source) {
            // Where that fails (no memory for the file any more) the namespace has holes, which read as zeros.
            let _ = store.medium().zero(extent);
        }
    }
}
