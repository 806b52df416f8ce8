//! Address space of our own.
//!
//! What     [`Mapping`], a range of pages that this crate mapped and unmaps, and [`is_ours`], which tells such
//!          ranges from the program's.
//! Why      inside somebody else's program our memory must never be managed, migrated or counted as theirs.
//! Owns     a `Mapping` its pages; the register of ranges is a fixed array without locks, so that a fault
//!          handler can ask it.
//! Fails    mapping fails with the kernel's error, or with `ENOSPC` when [`CAPACITY`] mappings exist.

use core::ptr::{self, NonNull};
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::SeqCst;
use std::io;

use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use rustix::mm::{self, Advice, MapFlags, ProtFlags};
use uhmm_addr::{CHUNK_PAGES, PAGE_SIZE, VaRange, VirtAddr};

use crate::thread::raw;

/// How many mappings may exist at a time in a process.
pub const CAPACITY: usize = 256;

/// The type of file systems of huge pages.
const HUGETLBFS: u32 = 0x9584_58f6;

/// The sizes of huge pages that must be reserved beforehand (hugetlb).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Huge {
    /// 2 MiB.
    M2,
    /// 1 GiB.
    G1,
}

impl Huge {
    /// Bytes in one page.
    pub const fn bytes(self) -> usize {
        match self {
            Self::M2 => 2 << 20,
            Self::G1 => 1 << 30,
        }
    }

    const fn map_flags(self) -> MapFlags {
        match self {
            Self::M2 => MapFlags::HUGETLB.union(MapFlags::HUGE_2MB),
            Self::G1 => MapFlags::HUGETLB.union(MapFlags::HUGE_1GB),
        }
    }
}

/// An entry of the register: the first and the end address. `start` is 0 when free and 1 while it changes.
struct Entry {
    start: AtomicUsize,
    end: AtomicUsize,
}

const FREE: usize = 0;
const CHANGING: usize = 1;

static REGISTER: [Entry; CAPACITY] =
    [const { Entry { start: AtomicUsize::new(FREE), end: AtomicUsize::new(0) } }; CAPACITY];

fn enter(range: VaRange) -> Result<u16, Errno> {
    for (slot, entry) in (0_u16..).zip(&REGISTER) {
        if entry.start.compare_exchange(FREE, CHANGING, SeqCst, SeqCst).is_ok() {
            entry.end.store(range.end().get(), SeqCst);
            entry.start.store(range.start().get(), SeqCst);
            return Ok(slot);
        }
    }
    Err(Errno::NOSPC)
}

fn strike(slot: u16) {
    let entry = &REGISTER[usize::from(slot)];
    entry.start.store(CHANGING, SeqCst);
    entry.end.store(0, SeqCst);
    entry.start.store(FREE, SeqCst);
}

/// Whether `range` overlaps a mapping of ours. Takes no lock and makes no call.
pub fn is_ours(range: VaRange) -> bool {
    REGISTER.iter().any(|entry| {
        loop {
            let start = entry.start.load(SeqCst);
            if start <= CHANGING {
                return false;
            }
            let end = entry.end.load(SeqCst);
            // Equal starts before and after: the end belongs to a range that was entered with this start.
            if entry.start.load(SeqCst) == start {
                return start < range.end().get() && range.start().get() < end;
            }
        }
    })
}

/// Pages that this crate mapped. Dropping unmaps them.
///
/// The memory is reached through raw pointers only. Whoever makes references out of them must know that
/// nobody [discards](Mapping::discard), shares or unmaps the pages meanwhile.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    range: VaRange,
    slot: u16,
}

// SAFETY: a `Mapping` is a claim to address space, which belongs to the process and not to a thread.
unsafe impl Send for Mapping {}
// SAFETY: no method reads or writes the memory through a reference; what they ask of the kernel is safe to
// ask from several threads at once.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private zero pages, readable and writable, not accounted before use.
    pub fn reserve(len: usize, name: &str) -> io::Result<Self> {
        Self::reserve_aligned(len, PAGE_SIZE, name)
    }

    /// As [`Mapping::reserve`], at a multiple of `align`, a power of two of at least a page.
    pub fn reserve_aligned(len: usize, align: usize, name: &str) -> io::Result<Self> {
        let mapping = Self::place(len, align, 0, |at, len| {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
            // SAFETY: `place` hands over pages that it mapped itself and that nobody uses yet.
            unsafe { mm::mmap_anonymous(at, len, ProtFlags::READ | ProtFlags::WRITE, flags) }
        })?;
        mapping.name(name);
        Ok(mapping)
    }

    /// The bytes of the file `fd` from `offset` on, shared, readable and writable. Aligned to the file's huge
    /// pages if it has such, of which `len` must be a multiple; else to 2 MiB if `len` is at least that.
    pub fn shared(fd: BorrowedFd<'_>, offset: u64, len: usize, name: &str) -> io::Result<Self> {
        let chunk = CHUNK_PAGES * PAGE_SIZE;
        let kind = rustix::fs::fstatfs(fd)?;
        let align = if kind.f_type as u64 == u64::from(HUGETLBFS) {
            let huge = kind.f_bsize as usize;
            // The kernel would round the length up, over whatever lies behind.
            if !len.is_multiple_of(huge) {
                return Err(Errno::INVAL.into());
            }
            huge
        } else if len >= chunk {
            chunk
        } else {
            PAGE_SIZE
        };
        let mapping = Self::place(len, align, 0, |at, len| {
            // No NORESERVE: huge pages that the pool lacks shall fail here and not at the first touch.
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: `place` hands over pages that it mapped itself and that nobody uses yet, and `len` is
            // not rounded up.
            unsafe { mm::mmap(at, len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, offset) }
        })?;
        mapping.name(name);
        Ok(mapping)
    }

    /// Private zero pages out of the pool of reserved huge pages; fails where that has too few.
    /// `len` is a multiple of their size.
    pub fn hugetlb(len: usize, size: Huge) -> io::Result<Self> {
        // The kernel would round the length up, over whatever lies behind.
        if !len.is_multiple_of(size.bytes()) {
            return Err(Errno::INVAL.into());
        }
        Self::place(len, size.bytes(), 0, |at, len| {
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | size.map_flags();
            // SAFETY: `place` hands over pages that it mapped itself and that nobody uses yet, and `len` is
            // not rounded up.
            unsafe { mm::mmap_anonymous(at, len, ProtFlags::READ | ProtFlags::WRITE, flags) }
        })
    }

    /// Private zero pages that are to take the place of a mapping of the program's ([`Mapping::replace`]): without a
    /// name, and accounted (counted as promised memory) as that one is.
    pub fn replacement(len: usize, write: bool, accounted: bool) -> io::Result<Self> {
        let mapping = Self::place(len, PAGE_SIZE, 0, |at, len| {
            let reserve = if accounted { MapFlags::empty() } else { MapFlags::NORESERVE };
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | reserve;
            // SAFETY: `place` hands over pages that it mapped itself and that nobody uses yet.
            unsafe { mm::mmap_anonymous(at, len, ProtFlags::READ | ProtFlags::WRITE, flags) }
        })?;
        if !write {
            // Afterwards, as the program does: what is mapped to be read alone is never accounted.
            // SAFETY: the pages are this mapping's own, and nobody uses them yet.
            unsafe { mm::mprotect(mapping.start.as_ptr().cast(), len, mm::MprotectFlags::READ) }?;
        }
        Ok(mapping)
    }

    /// Takes the place of whatever is mapped at `at`, in one step (`mremap`): a thread that touches a page meanwhile
    /// waits, and finds this mapping's. It is the program's from then on.
    ///
    /// # Errors
    /// The kernel's error, and this mapping as it was. What was at `at` may be gone all the same.
    ///
    /// # Safety
    /// The memory at `at` must be the caller's to give up. If a userfaultfd watches this mapping that reports
    /// `EVENT_REMAP`, the call waits until somebody has read the event.
    pub unsafe fn replace(self, at: VirtAddr) -> Result<(), (Self, Errno)> {
        let to = ptr::with_exposed_provenance_mut(at.get());
        let (from, len) = (self.start.as_ptr().cast(), self.len());
        // Out of the register before it moves: the call may last, and somebody else may live there by then.
        let entry = &REGISTER[usize::from(self.slot)];
        entry.start.store(CHANGING, SeqCst);
        // SAFETY: the pages are this mapping's own, and the destination is given up by the caller's promise.
        match unsafe { mm::mremap_fixed(from, len, len, mm::MremapFlags::MAYMOVE, to) } {
            Ok(_) => {
                strike(core::mem::ManuallyDrop::new(self).slot);
                Ok(())
            }
            Err(errno) => {
                entry.start.store(self.range.start().get(), SeqCst);
                Err((self, errno))
            }
        }
    }

    /// The file `fd`, which is empty, over addresses whose remainder by `align`, a power of two, is `phase`:
    /// any access raises SIGBUS, until something else is mapped there.
    pub(crate) fn void(fd: BorrowedFd<'_>, len: usize, align: usize, phase: usize) -> io::Result<Self> {
        Self::place(len, align, phase, |at, len| {
            let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
            // SAFETY: `place` hands over pages that it mapped itself and that nobody uses yet.
            unsafe { mm::mmap(at, len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, 0) }
        })
    }

    /// Finds room, enters it into the register, and only then lets `fill` put memory there. Before that it
    /// cannot be accessed at all, so that nobody takes it for memory of the program.
    fn place(
        len: usize,
        align: usize,
        phase: usize,
        fill: impl FnOnce(*mut core::ffi::c_void, usize) -> Result<*mut core::ffi::c_void, Errno>,
    ) -> io::Result<Self> {
        let whole = len.is_multiple_of(PAGE_SIZE) && phase.is_multiple_of(PAGE_SIZE) && phase < align;
        if !align.is_power_of_two() || align < PAGE_SIZE || len == 0 || !whole {
            return Err(Errno::INVAL.into());
        }
        let room = len.checked_add(align - PAGE_SIZE).ok_or(Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: without MAP_FIXED the kernel picks addresses where nothing is mapped.
        let base = unsafe { mm::mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), flags) }?;
        let base = base.cast::<u8>();
        // To where addresses have that remainder.
        let before = (phase + align - base as usize % align) % align;
        let start = base.wrapping_add(before);
        let behind = room - before - len;
        // SAFETY: both parts lie in the `room` bytes just mapped and are handed to nobody. An error would
        // leave inaccessible address space behind, which is harmless.
        unsafe {
            if before > 0 {
                let _ = mm::munmap(base.cast(), before);
            }
            if behind > 0 {
                let _ = mm::munmap(start.wrapping_add(len).cast(), behind);
            }
        }
        let give_up = |error: Errno| {
            // SAFETY: the `len` bytes at `start` are what is left of the mapping above, still nobody's.
            let _ = unsafe { mm::munmap(start.cast(), len) };
            io::Error::from(error)
        };
        let Ok(range) = VaRange::new(VirtAddr::of(start), len) else {
            return Err(give_up(Errno::INVAL));
        };
        let slot = enter(range).map_err(give_up)?;
        match fill(start.cast(), len).map(|at| NonNull::new(at.cast::<u8>())) {
            Ok(Some(start)) => Ok(Self { start, range, slot }),
            other => {
                // A failed MAP_FIXED may have freed the addresses, and somebody may live there by now: leave
                // them alone. At worst some address space stays inaccessible.
                strike(slot);
                Err(other.err().unwrap_or(Errno::INVAL).into())
            }
        }
    }

    /// The pages.
    pub fn range(&self) -> VaRange {
        self.range
    }

    /// The first byte.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.start
    }

    /// Bytes in it, a multiple of the page size and never none.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.range.bytes()
    }

    /// Makes every page present and writable now.
    pub fn populate(&self) -> io::Result<()> {
        self.advise(self.range, Advice::LinuxPopulateWrite)
    }

    /// Takes the pages of `range` away; they read as zero next (a shared mapping keeps its contents). `range`
    /// must lie inside.
    pub fn discard(&self, range: VaRange) -> io::Result<()> {
        self.advise(range, Advice::LinuxDontNeed)
    }

    /// Asks for transparent huge pages.
    pub fn advise_huge(&self) -> io::Result<()> {
        self.advise(self.range, Advice::LinuxHugepage)
    }

    /// Asks for no transparent huge pages.
    pub fn advise_no_huge(&self) -> io::Result<()> {
        self.advise(self.range, Advice::LinuxNoHugepage)
    }

    /// Leaves the pages out of a forked child: the addresses are unmapped there.
    pub fn dont_fork(&self) -> io::Result<()> {
        self.advise(self.range, Advice::LinuxDontFork)
    }

    /// Leaves the pages out of core dumps.
    pub fn dont_dump(&self) -> io::Result<()> {
        self.advise(self.range, Advice::LinuxDontDump)
    }

    fn advise(&self, range: VaRange, advice: Advice) -> io::Result<()> {
        if !self.range.encloses(range) {
            return Err(Errno::INVAL.into());
        }
        let at = self.start.as_ptr().wrapping_add(range.start().get() - self.range.start().get());
        // SAFETY: the range lies in this mapping, which owns its pages. Contents can change under raw
        // pointers only, whose users promise to expect that (see the type).
        unsafe { mm::madvise(at.cast(), range.bytes(), advice) }?;
        Ok(())
    }

    /// Unmaps the pages in the child of a fork, where whoever owns this value does not run.
    ///
    /// # Safety
    /// Nobody in this process may use the pages or drop the mapping any more.
    pub unsafe fn unmap_in_child(&self) {
        // SAFETY: the caller's promise makes this the mapping's last use.
        drop(unsafe { core::ptr::read(self) });
    }

    /// Never unmaps the pages; they stay ours.
    pub fn leak(self) -> VaRange {
        core::mem::ManuallyDrop::new(self).range
    }

    /// Shows `name` in `/proc/<pid>/maps` for pages without a file, where the kernel can. At most 79 bytes.
    fn name(&self, name: &str) {
        // PR_SET_VMA and PR_SET_VMA_ANON_NAME, Linux 5.17.
        const SET_VMA: usize = 0x5356_4d41;
        const ANON_NAME: usize = 0;
        let mut text = [0_u8; 80];
        for (to, from) in text[..79].iter_mut().zip(name.bytes()) {
            *to = from;
        }
        let at = self.range.start().get();
        let args = [SET_VMA, ANON_NAME, at, self.len(), text.as_ptr() as usize];
        // SAFETY: the kernel reads `text`, which ends in a zero byte, and changes the name of pages that are
        // ours. Failing is fine: the name is for people.
        let _ = unsafe { raw::syscall(linux_raw_sys::general::__NR_prctl, args) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Unmapped before struck out: the addresses may belong to the program as soon as they are free, but
        // ours must at no time be taken for the program's.
        // SAFETY: the pages are this mapping's own, and whoever keeps a pointer to them promised not to use
        // it any longer than the mapping lives.
        let unmapped = unsafe { mm::munmap(self.start.as_ptr().cast(), self.len()) };
        // What could not be unmapped (no memory to split a mapping) stays ours.
        if unmapped.is_ok() {
            strike(self.slot);
        }
    }
}

#[cfg(test)]
mod tests;
