//! The window: pages at addresses that are the same everywhere, and touches that may fail.
//!
//! What    [`Memory`], which maps, protects and touches pages of the window by number; [`sum`], what is told of a page.
//! Owns    the window's addresses. Nothing else of the process is anywhere near.
//! Faults  a touch is one of two instructions; a signal that it raises is answered by going on behind it, with the
//!         signal as the result. Any other fault ends the process as usual.
//! Fails   with an error number.

use std::arch::global_asm;
use std::ffi::{c_int, c_void};
use std::{mem, ptr};

use crate::operation::{Kind, Pages, Protection, WINDOW};
use crate::random::mix;

pub(crate) const PAGE: usize = 4096;
/// Pages of a file.
const LONG: u64 = 2 * WINDOW;
/// Words of a page.
const WORDS: usize = PAGE / 8;
/// Far from wherever the kernel puts programs, libraries and mappings by itself.
const START: usize = 0x1000_0000_0000;

global_asm!(
    ".global uhmm_scenario_load",
    "uhmm_scenario_load:",
    "mov rax, [rdi]",
    "xor edx, edx",
    ".global uhmm_scenario_load_failed",
    "uhmm_scenario_load_failed:",
    "ret",
    ".global uhmm_scenario_store",
    "uhmm_scenario_store:",
    "mov [rdi], rsi",
    "xor edx, edx",
    ".global uhmm_scenario_store_failed",
    "uhmm_scenario_store_failed:",
    "mov eax, edx",
    "ret",
);

#[repr(C)]
struct Loaded {
    value: u64,
    signal: u64,
}

unsafe extern "C" {
    fn uhmm_scenario_load(at: usize) -> Loaded;
    fn uhmm_scenario_load_failed();
    fn uhmm_scenario_store(at: usize, value: u64) -> c_int;
    fn uhmm_scenario_store_failed();
}

/// Goes on behind a touch that failed.
extern "C" fn on_fault(signal: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler that was installed with `SA_SIGINFO` its context, which is the handler's alone.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as usize;
    let next = if at == uhmm_scenario_load as *const () as usize {
        uhmm_scenario_load_failed as *const () as usize
    } else if at == uhmm_scenario_store as *const () as usize {
        uhmm_scenario_store_failed as *const () as usize
    } else {
        // SAFETY: the default action; the instruction faults again and ends the process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    };
    registers[libc::REG_RIP as usize] = next as i64;
    registers[libc::REG_RDX as usize] = i64::from(signal);
}

/// An error number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Errno(pub(crate) c_int);

impl Errno {
    /// That of the call that just failed.
    pub(crate) fn last() -> Self {
        // SAFETY: the calling thread's own.
        Self(unsafe { *libc::__errno_location() })
    }
}

/// 0, or the error number of a call that answers -1.
pub(crate) fn checked(result: c_int) -> Result<(), Errno> {
    if result == -1 { Err(Errno::last()) } else { Ok(()) }
}

/// What a touch found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Touched {
    Done,
    Signal(c_int),
}

/// What is told of a page: a number that depends on every word and its place; 0 for a page of zeros.
pub(crate) fn sum(page: impl Iterator<Item = u64>) -> u64 {
    let words = page.enumerate().filter(|(_, word)| *word != 0);
    words.fold(0, |sum, (n, word)| sum ^ mix(word ^ mix(n as u64))) & 0xff_ffff
}

/// The words of a page in a buffer.
pub(crate) fn words(page: &[u8]) -> impl Iterator<Item = u64> {
    page.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word))
}

/// The window.
pub(crate) struct Memory(());

impl Memory {
    /// The window, with nothing in it. There is one for a process.
    pub(crate) fn new() -> Result<Self, Errno> {
        // SAFETY: all zeros is a valid value.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        for signal in [libc::SIGSEGV, libc::SIGBUS] {
            // SAFETY: the handler touches its context only.
            checked(unsafe { libc::sigaction(signal, &action, ptr::null_mut()) })?;
        }
        Ok(Self(()))
    }

    /// The address of page `page`.
    pub(crate) const fn address(page: u64) -> usize {
        START + page as usize * PAGE
    }

    fn pointer(pages: Pages) -> *mut c_void {
        ptr::without_provenance_mut(Self::address(pages.first))
    }

    const fn len(pages: Pages) -> usize {
        pages.count as usize * PAGE
    }

    /// Maps `pages` anew.
    pub(crate) fn map(&mut self, kind: Kind, pages: Pages) -> Result<(), Errno> {
        let readable = libc::PROT_READ | libc::PROT_WRITE;
        let (protection, flags, file) = match kind {
            Kind::Anonymous(protection) => (bits(protection), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None),
            Kind::Shared => (readable, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None),
            Kind::File => (readable, libc::MAP_SHARED, Some(file()?)),
        };
        let (at, len) = (Self::pointer(pages), Self::len(pages));
        let offset = if file.is_some() { (pages.first as usize * PAGE) as i64 } else { 0 };
        // SAFETY: a part of the window, to which nothing refers.
        let mapped =
            unsafe { libc::mmap(at, len, protection, flags | libc::MAP_FIXED, file.unwrap_or(-1), offset) };
        let done = if mapped == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) };
        if let Some(file) = file {
            // SAFETY: opened above.
            unsafe { libc::close(file) };
        }
        done
    }

    pub(crate) fn unmap(&mut self, pages: Pages) -> Result<(), Errno> {
        // SAFETY: a part of the window, to which nothing refers.
        checked(unsafe { libc::munmap(Self::pointer(pages), Self::len(pages)) })
    }

    pub(crate) fn protect(&mut self, protection: Protection, pages: Pages) -> Result<(), Errno> {
        // SAFETY: a part of the window, to which nothing refers.
        checked(unsafe { libc::mprotect(Self::pointer(pages), Self::len(pages), bits(protection)) })
    }

    pub(crate) fn discard(&mut self, pages: Pages) -> Result<(), Errno> {
        // SAFETY: a part of the window, to which nothing refers.
        checked(unsafe { libc::madvise(Self::pointer(pages), Self::len(pages), libc::MADV_DONTNEED) })
    }

    /// Reads all of page `page`: its sum, or the signal.
    pub(crate) fn read(&self, page: u64) -> Result<u64, Touched> {
        let mut all = [0; WORDS];
        for (n, word) in all.iter_mut().enumerate() {
            // SAFETY: a load in the window; where there is nothing, the handler goes on behind it.
            let loaded = unsafe { uhmm_scenario_load(Self::address(page) + n * 8) };
            if loaded.signal != 0 {
                return Err(Touched::Signal(loaded.signal as c_int));
            }
            *word = loaded.value;
        }
        Ok(sum(all.into_iter()))
    }

    /// Writes some words of page `page`, which follow from `tag`.
    pub(crate) fn write(&mut self, page: u64, tag: u64) -> Touched {
        for n in 0..3 {
            let value = mix(tag ^ mix(page * 3 + n));
            let at = Self::address(page) + (mix(value) as usize % WORDS) * 8;
            // SAFETY: a store in the window; where there is nothing, the handler goes on behind it.
            let signal = unsafe { uhmm_scenario_store(at, value) };
            if signal != 0 {
                return Touched::Signal(signal);
            }
        }
        Touched::Done
    }
}

/// A file that is longer than the window, with something in every page.
fn file() -> Result<c_int, Errno> {
    // SAFETY: a name, and no flags.
    let file = unsafe { libc::memfd_create(c"scenario".as_ptr(), 0) };
    checked(file)?;
    // SAFETY: the descriptor that was just opened.
    checked(unsafe { libc::ftruncate(file, LONG as i64 * PAGE as i64) })?;
    for page in 0..LONG {
        let word = mix(page).to_ne_bytes();
        // SAFETY: eight bytes, which are there.
        let written =
            unsafe { libc::pwrite(file, word.as_ptr().cast(), word.len(), page as i64 * PAGE as i64) };
        if written != word.len() as isize {
            return Err(Errno::last());
        }
    }
    Ok(file)
}

const fn bits(protection: Protection) -> c_int {
    match protection {
        Protection::None => libc::PROT_NONE,
        Protection::Read => libc::PROT_READ,
        Protection::Write => libc::PROT_READ | libc::PROT_WRITE,
    }
}
