//! Threads of our own inside somebody else's program.
//!
//! What     [`RawThread`], made by the `clone` system call without the C library's knowledge, and
//!          [`close_all_files_except`] for those that have a descriptor table of their own.
//! Why      a fault handler must run when the program has closed our descriptors, holds the allocator's lock or
//!          is half way through `fork`; and a thread made by `pthread_create` touches memory that we evict.
//! Owns     a thread its stack, which is also its thread block; joining gives the stack back.
//! Fails    starting fails with the kernel's error; there is no way to stop a thread but its own return.
//!
//! What such a thread may do: use its stack, atomics, plain memory, [`crate::futex`], rustix and whatever else
//! makes system calls itself. `memcpy` and its like are fine.
//!
//! What it must not do:
//! - use `thread_local!` or anything made of it: `std::thread::current`, `std::sync::Mutex` (it notes panics),
//!   `println!`, panicking;
//! - call functions of the C library that set `errno`, take locks, allocate, or use a locale: `malloc`, `free`
//!   (no `Box`, `Vec` or `String`, unless of an allocator of ours), stdio, `dlsym`;
//! - access memory whose faults it resolves itself;
//! - raise a signal on purpose: all are blocked, so that a bad access kills the process without a handler.
//!
//! The C library does not know of it: `setuid` and its like, which the library repeats in every thread, do not
//! reach it, and `fork` in another thread makes a child without it.

use core::arch::asm;
use core::ffi::CStr;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::Acquire;
use std::io;

use linux_raw_sys::general as sys;
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;
use rustix::mm::{MprotectFlags, mprotect};
use uhmm_addr::PAGE_SIZE;

use crate::futex;
use crate::mapping::Mapping;
use crate::placement;
use crate::signals::Blocked;

pub(crate) mod raw;

/// Zero bytes below the thread pointer: where code that does use thread-local storage by mistake reads zeros
/// instead of somebody's memory.
const BELOW: usize = 64 << 10;
/// Zero bytes from the thread pointer on: the head of the thread block, which compilers and the C library read
/// at fixed places, and at its end our [`Start`].
const ABOVE: usize = 8 << 10;
/// The least that is left for frames.
const FRAMES: usize = 32 << 10;

/// The smallest stack that [`RawThread::spawn`] takes: thread block, guard page and 32 KiB for frames.
pub const MIN_STACK: usize = BELOW + ABOVE + PAGE_SIZE + FRAMES;

/// Which descriptors a thread sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Files {
    /// A copy of the caller's table as it is now: later changes on either side do not reach the other.
    Own,
    /// The program's table.
    Shared,
}

/// What the thread finds at the top of its stack.
#[repr(C)]
struct Start {
    entry: extern "C" fn(*mut u8),
    arg: *mut u8,
    name: [u8; 16],
    /// The thread's number while it lives; the kernel stores 0 and wakes the word when it is gone.
    tid: AtomicU32,
}

/// A thread. Dropping it without [`RawThread::join`] leaves it running and its stack mapped for good.
#[derive(Debug)]
pub struct RawThread {
    stack: ManuallyDrop<Mapping>,
    /// In the stack.
    start: NonNull<Start>,
    tid: u32,
}

// SAFETY: the handle only reads the atomic word in the stack that it owns.
unsafe impl Send for RawThread {}
// SAFETY: as above; joining takes the handle by value.
unsafe impl Sync for RawThread {}

impl RawThread {
    /// Starts a thread that runs `entry(arg)` on `stack` and then exits. Every signal is blocked in it. Its
    /// lowest page becomes a guard page. `name` has at most 15 bytes.
    ///
    /// # Safety
    /// `entry` must keep to the rules of this module, must not unwind, and `arg` must be what it expects, for
    /// as long as it runs. Nobody may use the memory of `stack`. The caller is an ordinary thread, or a raw
    /// one started after an ordinary thread started one.
    pub unsafe fn spawn(
        name: &CStr,
        stack: Mapping,
        files: Files,
        entry: extern "C" fn(*mut u8),
        arg: *mut u8,
    ) -> io::Result<Self> {
        if stack.len() < MIN_STACK || name.count_bytes() > 15 {
            return Err(Errno::INVAL.into());
        }
        placement::prepare();
        let base = stack.as_ptr();
        // SAFETY: the lowest page of a mapping that nobody uses, and of which frames get more than a page.
        unsafe { mprotect(base.as_ptr().cast(), PAGE_SIZE, MprotectFlags::empty()) }?;
        // SAFETY: both offsets lie in the mapping, which is at least MIN_STACK long.
        let (block, tp) = unsafe { (base.add(stack.len() - ABOVE - BELOW), base.add(stack.len() - ABOVE)) };
        // SAFETY: BELOW + ABOVE bytes from `block` on are the end of the mapping, writable and nobody else's.
        // The thread pointer is aligned to pages, so that words at multiples of 8 from it are aligned. The
        // `Start` lies at the end of the block, behind everything at fixed places (which end below 2 KiB).
        let start = unsafe {
            block.write_bytes(0, BELOW + ABOVE);
            // The ABI wants the thread pointer to point to itself; glibc's layout repeats it at 0x10.
            tp.cast::<usize>().write(tp.as_ptr() as usize);
            tp.add(0x10).cast::<usize>().write(tp.as_ptr() as usize);
            // Stack protector and pointer guard: any value will do, so use the caller's.
            tp.add(0x28).cast::<usize>().write(word_at_fs::<0x28>());
            tp.add(0x30).cast::<usize>().write(word_at_fs::<0x30>());
            placement::mark_unregistered(tp, BELOW, ABOVE);
            let start = tp.add(ABOVE - 256).cast::<Start>();
            let mut text = [0; 16];
            text[..name.count_bytes()].copy_from_slice(name.to_bytes());
            start.write(Start { entry, arg, name: text, tid: AtomicU32::new(u32::MAX) });
            start
        };
        let mut flags = sys::CLONE_VM
            | sys::CLONE_FS
            | sys::CLONE_SIGHAND
            | sys::CLONE_THREAD
            | sys::CLONE_SYSVSEM
            | sys::CLONE_SETTLS
            | sys::CLONE_PARENT_SETTID
            | sys::CLONE_CHILD_CLEARTID;
        if files == Files::Shared {
            flags |= sys::CLONE_FILES;
        }
        // The child starts with the caller's mask.
        let blocked = Blocked::all();
        // SAFETY: the stack below `block` and the thread block are the new thread's alone; `start` was filled
        // in; the word for its number stays mapped until the thread is gone (join) or for ever (drop).
        let result = unsafe { clone(flags, block, start, tp) };
        drop(blocked);
        let tid = result? as u32;
        Ok(Self { stack: ManuallyDrop::new(stack), start, tid })
    }

    /// The thread's number.
    pub fn tid(&self) -> u32 {
        self.tid
    }

    /// Whether the thread is gone.
    pub fn is_finished(&self) -> bool {
        self.word().load(Acquire) == 0
    }

    /// Waits until the thread is gone, and unmaps its stack.
    ///
    /// In the child of a fork the thread does not exist and this never returns: drop it there.
    pub fn join(mut self) {
        loop {
            let tid = self.word().load(Acquire);
            if tid == 0 {
                break;
            }
            // The kernel wakes it as a word that may be shared.
            let _ = futex::wait_shared(self.word(), tid, None);
        }
        // SAFETY: dropped once, because `self` is gone after this. The kernel clears the word as its last
        // access to the thread's memory, so that nobody uses the stack any more.
        unsafe { ManuallyDrop::drop(&mut self.stack) };
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: `start` points into the stack, which is mapped until `join` drops it, and the field is an
        // atomic that was initialised before the thread started.
        unsafe { &(*self.start.as_ptr()).tid }
    }
}

/// The thread pointer of the calling thread. Both glibc's threads and raw ones keep it at its own place.
pub(crate) fn pointer() -> NonNull<u8> {
    // SAFETY: the x86-64 ABI keeps the thread pointer at fs:0 in every thread.
    let tp = unsafe { word_at_fs::<0>() };
    // It is an address that this process got from the kernel or the C library, never null.
    NonNull::new(core::ptr::with_exposed_provenance_mut(tp)).unwrap_or(NonNull::dangling())
}

/// The word at `OFFSET` from the thread pointer.
///
/// # Safety
/// The thread block must have such a word.
unsafe fn word_at_fs<const OFFSET: usize>() -> usize {
    let value: usize;
    // SAFETY: one load, of a word that the caller knows to exist.
    unsafe {
        asm!("mov {}, fs:[{}]", out(reg) value, const OFFSET, options(nostack, readonly, preserves_flags));
    }
    value
}

/// Starts a thread with the stack that ends at `top` and the thread pointer `tp`; it runs [`begin`].
///
/// # Safety
/// `start` must be filled in and stay so; the memory below `top` and around `tp` must be the new thread's.
unsafe fn clone(
    flags: u32,
    top: NonNull<u8>,
    start: NonNull<Start>,
    tp: NonNull<u8>,
) -> Result<usize, Errno> {
    // SAFETY: the field lies in `start`; no reference is made.
    let word = unsafe { &raw mut (*start.as_ptr()).tid };
    let result: isize;
    // SAFETY: in the caller this is a system call that clobbers rax, rcx and r11, all named, and returns. In
    // the new thread the registers are copies, the stack is its own and empty, aligned to pages as a call
    // needs it, and control goes to `begin`, which does not return; rbp is zero to end backtraces.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call {begin}",
            "ud2",
            "2:",
            begin = sym begin,
            inlateout("rax") sys::__NR_clone as usize => result,
            in("rdi") flags as usize,
            in("rsi") top.as_ptr(),
            in("rdx") word,
            in("r10") word,
            in("r8") tp.as_ptr(),
            in("r12") start.as_ptr(),
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    if result < 0 { Err(Errno::from_raw_os_error(-result as i32)) } else { Ok(result as usize) }
}

/// The first function of a thread.
///
/// # Safety
/// Called by [`clone`] alone, with a `Start` that is filled in.
unsafe extern "C" fn begin(start: *const Start) -> ! {
    // SAFETY: the `Start` was written before the thread existed, and nobody writes these fields again.
    let (entry, arg, name) = unsafe { ((*start).entry, (*start).arg, (*start).name) };
    if let Ok(name) = CStr::from_bytes_until_nul(&name) {
        // Only for people.
        let _ = rustix::thread::set_name(name);
    }
    entry(arg);
    // SAFETY: `exit` ends this thread and nothing else. The kernel then clears the thread's word.
    unsafe {
        asm!("syscall", "ud2", in("rax") sys::__NR_exit as usize, in("rdi") 0, options(noreturn, nostack));
    }
}

/// Closes every descriptor but those in `keep`. For a thread of [`Files::Own`], first thing: its copies of the
/// program's descriptors would keep pipes and sockets open that the program has closed. At most 32 in `keep`.
///
/// # Safety
/// The calling thread's descriptor table must be its own, or nobody may use the descriptors that close.
pub unsafe fn close_all_files_except(keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut sorted = [0_u32; 32];
    let kept = sorted.get_mut(..keep.len()).ok_or(Errno::INVAL)?;
    for (to, from) in kept.iter_mut().zip(keep) {
        *to = from.as_raw_fd() as u32;
    }
    kept.sort_unstable();
    let mut first = 0_u32;
    for fd in kept.iter() {
        if first < *fd {
            // SAFETY: passed on to the caller.
            unsafe { close_range(first, *fd - 1) }?;
        }
        first = *fd + 1;
    }
    // SAFETY: passed on to the caller.
    unsafe { close_range(first, u32::MAX) }
}

/// # Safety
/// Nobody may use the descriptors `first..=last` of the calling thread's table.
unsafe fn close_range(first: u32, last: u32) -> io::Result<()> {
    let args = [first as usize, last as usize, 0, 0, 0];
    // SAFETY: touches no memory; what it closes is the caller's to close.
    unsafe { raw::syscall(sys::__NR_close_range, args) }?;
    Ok(())
}

// The thread's number must be where the kernel can wake it: a word of its own, below the end of the block.
const _: () = assert!(size_of::<Start>() <= 256 && 256 + 2048 <= ABOVE);

#[cfg(test)]
mod tests;
