//! Which CPU a thread runs on.
//!
//! What     [`current_cpu`]; [`ThreadCpu`], a table that tells the CPU of any thread that entered itself;
//!          setting and asking where the calling thread may run.
//! Why      a fault is answered six times faster by a handler on the faulting thread's own CPU.
//! Owns     the table its entries, which point into memory of the threads: the `rseq` area that glibc (2.35 and
//!          later) gives every thread, whose CPU number the kernel keeps up to date. Reading it is one load.
//! Fails    with `None` or by the slow way where there is no such area; a CPU number is a hint and may be old.

use core::ffi::{c_char, c_void};
use core::ptr::{self, NonNull};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicIsize, AtomicPtr, AtomicU32};
use std::io;
use uhmm_addr::{PageCount, VaRange, VirtAddr};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

use linux_raw_sys::general as sys;

use crate::thread::{pointer, raw};

/// Where the CPU number lies in the area: behind `cpu_id_start`.
const CPU_ID: isize = 4;
/// What the number is while the kernel does not keep it.
const UNREGISTERED: u32 = u32::MAX;

/// Bytes of the area, at the least.
const AREA: usize = 32;
/// No glibc of today has a shorter record of a thread.
const LEAST_RECORD: usize = 2048;

const UNRESOLVED: isize = isize::MIN;
const MISSING: isize = isize::MAX;

/// Distance of the thread's area from its thread pointer.
static OFFSET: AtomicIsize = AtomicIsize::new(UNRESOLVED);

unsafe extern "C" {
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// Looks up where the C library keeps the area. Once, and in an ordinary thread, because the dynamic linker
/// takes locks and uses thread-local storage; [`ThreadCpu::register_current`] and starting a raw thread do so.
/// Without it [`current_cpu`] asks the kernel.
pub fn prepare() {
    if OFFSET.load(Relaxed) != UNRESOLVED {
        return;
    }
    // SAFETY: a null library means "all that are loaded", and both names are strings that end in zero.
    let [offset, size] =
        [c"__rseq_offset", c"__rseq_size"].map(|name| unsafe { dlsym(ptr::null_mut(), name.as_ptr()) });
    let found = if offset.is_null() || size.is_null() {
        MISSING
    } else {
        // SAFETY: glibc documents them as constants of type ptrdiff_t and unsigned int, initialised before
        // any code of ours runs. No other library defines names of this reserved form.
        let (offset, size) = unsafe { (offset.cast::<isize>().read(), size.cast::<u32>().read()) };
        // Size 0: the area exists but was not registered (switched off, or refused by the kernel).
        if size == 0 { MISSING } else { offset }
    };
    // The first question finds the kernel's vDSO, which may allocate; later ones do not.
    let _ = sched_getcpu();
    OFFSET.store(found, Release);
}

/// The pages of the calling thread's block: what lies at its thread pointer, where the C library keeps the
/// thread's record and the kernel's area, and writes when the thread exits.
///
/// No page beyond what is surely the thread's: glibc's record ends the mapping of a thread's stack.
pub fn thread_block() -> VaRange {
    prepare();
    let tp = pointer().as_ptr() as usize;
    let end = match OFFSET.load(Acquire) {
        // The area is the end of the record.
        offset @ 1..MISSING => offset as usize + AREA,
        _ => LEAST_RECORD,
    };
    // Newer versions keep the area up to 256 bytes below the thread pointer.
    let (first, last) = (VirtAddr::new(tp - 256).page(), VirtAddr::new(tp + end - 1).page());
    VaRange::page(first).grow(last.since(first).plus(PageCount::ONE))
}

/// Where the CPU number of the thread with the thread pointer `tp` lies.
fn cpu_id_at(tp: NonNull<u8>) -> Option<NonNull<AtomicU32>> {
    match OFFSET.load(Acquire) {
        UNRESOLVED | MISSING => None,
        offset => NonNull::new(tp.as_ptr().wrapping_offset(offset + CPU_ID).cast()),
    }
}

/// Marks the area in a thread block of our own making as one that the kernel does not keep. `low` bytes below
/// `tp` and `high` above it are the block.
///
/// # Safety
/// The block must be writable and nobody else's.
pub(crate) unsafe fn mark_unregistered(tp: NonNull<u8>, low: usize, high: usize) {
    let Some(at) = cpu_id_at(tp) else { return };
    let (block, end) = (tp.as_ptr() as usize - low, tp.as_ptr() as usize + high);
    let word = at.as_ptr() as usize;
    if word >= block && word + 4 <= end && word.is_multiple_of(4) {
        // SAFETY: the word lies in the caller's block and is aligned.
        unsafe { at.as_ref() }.store(UNREGISTERED, Relaxed);
    } else {
        // Raw threads could not tell that they have none: nobody uses the area.
        OFFSET.store(MISSING, Release);
    }
}

/// The CPU that the calling thread runs on, or ran on just now.
pub fn current_cpu() -> u32 {
    let kept = cpu_id_at(pointer()).map(|at| {
        // SAFETY: the area of the calling thread is part of its thread block: glibc's own, or one of ours, in
        // which `mark_unregistered` made sure that it lies inside.
        unsafe { at.as_ref() }.load(Relaxed)
    });
    match kept {
        // Negative numbers mean that nobody keeps it.
        Some(cpu) if cpu < UNREGISTERED - 1 => cpu,
        _ => sched_getcpu() as u32,
    }
}

const NOBODY: u32 = 0;
/// Not the number of any thread: those stay below 2^22.
const GONE: u32 = u32::MAX;
const ENTERING: u32 = u32::MAX - 1;

const SLOTS: usize = 4096;
/// How many places a thread may take, from the one its number hashes to on.
const PROBES: usize = 32;

struct Slot {
    tid: AtomicU32,
    /// Threads that are reading through `word` now.
    readers: AtomicU32,
    word: AtomicPtr<AtomicU32>,
}

impl Slot {
    const fn empty() -> Self {
        Self {
            tid: AtomicU32::new(NOBODY),
            readers: AtomicU32::new(0),
            word: AtomicPtr::new(ptr::null_mut()),
        }
    }
}

/// Threads and where their CPU numbers are kept. No locks, no allocation: meant to be a `static`.
pub struct ThreadCpu {
    slots: [Slot; SLOTS],
}

impl Default for ThreadCpu {
    fn default() -> Self {
        Self::new()
    }
}

impl ThreadCpu {
    /// An empty table.
    pub const fn new() -> Self {
        Self { slots: [const { Slot::empty() }; SLOTS] }
    }

    fn places(&self, tid: u32) -> impl Iterator<Item = &Slot> {
        // Thread numbers are mostly consecutive and spread by themselves.
        let home = tid as usize;
        (0..PROBES).map(move |step| &self.slots[(home + step) % SLOTS])
    }

    /// Enters the calling thread; false where it has no area or the table is full, and lookups use the slow
    /// way then.
    ///
    /// # Safety
    /// The thread must call [`ThreadCpu::forget`] before it exits. Its thread block (for glibc the top of its
    /// stack) must stay readable without a fault that only the reader could resolve.
    pub unsafe fn register_current(&self) -> bool {
        prepare();
        let Some(word) = cpu_id_at(pointer()) else { return false };
        // SAFETY: the area of the calling thread is part of its thread block.
        if unsafe { word.as_ref() }.load(Relaxed) >= UNREGISTERED - 1 {
            return false;
        }
        let tid = rustix::thread::gettid().as_raw_pid() as u32;
        // An entry left by a dead thread of the same number would be found first.
        self.forget(tid);
        for slot in self.places(tid) {
            let seen = slot.tid.load(Relaxed);
            if matches!(seen, NOBODY | GONE)
                && slot.tid.compare_exchange(seen, ENTERING, SeqCst, Relaxed).is_ok()
            {
                slot.word.store(word.as_ptr(), SeqCst);
                slot.tid.store(tid, SeqCst);
                return true;
            }
        }
        false
    }

    /// Takes the thread `tid` out. When this returns nobody reads its memory any more.
    pub fn forget(&self, tid: u32) {
        if matches!(tid, NOBODY | GONE | ENTERING) {
            return;
        }
        for slot in self.places(tid) {
            if slot.tid.compare_exchange(tid, ENTERING, SeqCst, Relaxed).is_ok() {
                // Whoever counted itself in before the exchange may have seen the entry; later ones cannot.
                while slot.readers.load(SeqCst) != 0 {
                    rustix::thread::sched_yield();
                }
                slot.tid.store(GONE, SeqCst);
            }
        }
    }

    /// Takes every thread out: for the child of a fork, in which only the forking thread exists and readers
    /// that were counted never leave.
    ///
    /// # Safety
    /// No other thread may use the table meanwhile.
    pub unsafe fn forget_all(&self) {
        for slot in &self.slots {
            slot.tid.store(NOBODY, SeqCst);
            slot.readers.store(0, SeqCst);
        }
    }

    /// The CPU of the thread `tid`, if it is entered.
    pub fn cpu_of(&self, tid: u32) -> Option<u32> {
        if matches!(tid, NOBODY | GONE | ENTERING) {
            return None;
        }
        for slot in self.places(tid) {
            match slot.tid.load(SeqCst) {
                NOBODY => return None,
                seen if seen == tid => {
                    slot.readers.fetch_add(1, SeqCst);
                    let cpu = (slot.tid.load(SeqCst) == tid).then(|| {
                        let word = slot.word.load(SeqCst);
                        // SAFETY: the entry was seen after this reader was counted in, so that `forget` waits
                        // for it to leave before the thread, which keeps the word valid until then, exits.
                        // The kernel writes the word whole; an atomic load is the volatile read of it.
                        unsafe { (*word).load(Relaxed) }
                    });
                    slot.readers.fetch_sub(1, SeqCst);
                    return cpu.filter(|cpu| *cpu < UNREGISTERED - 1);
                }
                _ => {}
            }
        }
        None
    }
}

/// The CPU of the thread `tid` of this process, by asking the kernel for its statistics: some microseconds.
pub fn cpu_of_slow(tid: u32) -> Option<u32> {
    let mut path = Text::<64>::default();
    path.push(b"/proc/self/task/");
    path.push_number(tid);
    path.push(b"/stat");
    let mut text = [0_u8; 1024];
    let file = rustix::fs::open(path.bytes(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let len = rustix::io::read(&file, &mut text).ok()?;
    parse_stat(&text[..len])
}

/// Field 39, counted from 1. The second is the name in parentheses and may contain anything.
fn parse_stat(text: &[u8]) -> Option<u32> {
    let behind = text.iter().rposition(|b| *b == b')')? + 1;
    let field = text[behind..].split(|b| *b == b' ').filter(|f| !f.is_empty()).nth(39 - 3)?;
    core::str::from_utf8(field).ok()?.parse().ok()
}

/// A short text on the stack.
struct Text<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Default for Text<N> {
    fn default() -> Self {
        Self { bytes: [0; N], len: 0 }
    }
}

impl<const N: usize> Text<N> {
    fn push(&mut self, text: &[u8]) {
        for (to, from) in self.bytes[self.len..].iter_mut().zip(text) {
            *to = *from;
            self.len += 1;
        }
    }

    fn push_number(&mut self, number: u32) {
        let mut digits = [0_u8; 10];
        let mut rest = number;
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        self.push(&digits[at..]);
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// A set of CPUs, the first 1024 of the machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Cpus(CpuSet);

impl Cpus {
    /// No CPU.
    pub fn none() -> Self {
        Self(CpuSet::new())
    }

    /// This set and `cpu`; numbers past the end are left out.
    #[must_use]
    pub fn with(mut self, cpu: u32) -> Self {
        if (cpu as usize) < CpuSet::MAX_CPU {
            self.0.set(cpu as usize);
        }
        self
    }

    /// This set less `cpu`.
    #[must_use]
    pub fn without(mut self, cpu: u32) -> Self {
        if (cpu as usize) < CpuSet::MAX_CPU {
            self.0.unset(cpu as usize);
        }
        self
    }

    /// Whether `cpu` is in it.
    pub fn contains(&self, cpu: u32) -> bool {
        (cpu as usize) < CpuSet::MAX_CPU && self.0.is_set(cpu as usize)
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.0.count()
    }

    /// Each of them, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..CpuSet::MAX_CPU as u32).filter(|cpu| self.contains(*cpu))
    }
}

impl core::fmt::Debug for Cpus {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Where a thread may run for the time being, and where otherwise. Used by that thread alone.
#[derive(Debug)]
pub struct Binding {
    free: Option<Cpus>,
    now: Option<Cpus>,
}

impl Binding {
    /// The calling thread's, which is bound to nothing yet.
    pub fn of_current() -> Self {
        Self { free: allowed_cpus().ok(), now: None }
    }

    /// Where the thread may run when it is bound to nothing; `None` if the kernel did not say.
    pub const fn free(&self) -> Option<&Cpus> {
        self.free.as_ref()
    }

    /// Lets the thread run on `cpus` only; on all that it had before if that is `None`. Whether it is bound now: where
    /// the kernel refuses, the thread stays as it was.
    pub fn bind(&mut self, cpus: Option<Cpus>) -> bool {
        if cpus != self.now
            && let Some(target) = cpus.as_ref().or(self.free.as_ref())
            && self.free.is_some()
            && set_affinity_to(target).is_ok()
        {
            self.now = cpus;
        }
        self.now.is_some()
    }
}

/// Where the calling thread may run.
pub fn allowed_cpus() -> io::Result<Cpus> {
    Ok(Cpus(sched_getaffinity(None)?))
}

/// The one CPU on which the thread `tid` of this process may run, if there is only one.
pub fn bound_to(tid: u32) -> Option<u32> {
    let thread = rustix::thread::Pid::from_raw(tid.cast_signed())?;
    let cpus = Cpus(sched_getaffinity(Some(thread)).ok()?);
    if cpus.count() == 1 { cpus.iter().next() } else { None }
}

/// Lets the calling thread run on `cpu` only, and moves it there.
pub fn set_affinity(cpu: u32) -> io::Result<()> {
    if cpu as usize >= CpuSet::MAX_CPU {
        return Err(Errno::INVAL.into());
    }
    set_affinity_to(&Cpus::none().with(cpu))
}

/// Lets the calling thread run on `cpus` only.
pub fn set_affinity_to(cpus: &Cpus) -> io::Result<()> {
    Ok(sched_setaffinity(None, &cpus.0)?)
}

/// Lets the calling thread run on every CPU that the process's cpuset has. This forgets a narrower choice made
/// for the process (`taskset`); to keep that, note [`allowed_cpus`] first and go back to it.
pub fn set_affinity_all() -> io::Result<()> {
    let mut all = CpuSet::new();
    for cpu in 0..CpuSet::MAX_CPU {
        all.set(cpu);
    }
    Ok(sched_setaffinity(None, &all)?)
}

/// Has the calling thread run only where no other thread wants to (`SCHED_IDLE`), for good.
pub fn yield_to_all() -> io::Result<()> {
    const SCHED_IDLE: usize = 5;
    let priority = 0i32;
    let args = [0, SCHED_IDLE, ptr::from_ref(&priority) as usize, 0, 0];
    // SAFETY: the kernel reads the priority, which lives until the call returns.
    unsafe { raw::syscall(sys::__NR_sched_setscheduler, args) }?;
    Ok(())
}

#[cfg(test)]
mod tests;
