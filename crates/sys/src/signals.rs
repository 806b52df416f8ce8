//! Signals: keeping them away, and SIGBUS.
//!
//! What     [`Blocked`], a guard during which the calling thread gets no signal; [`SigbusChain`], a handler of
//!          SIGBUS for the whole process that comes before the program's own; [`BareHandler`], one instead of
//!          everything, to measure what a signal costs by itself.
//! Why      a page whose contents are lost is poisoned, and touching it raises SIGBUS: the place to say which
//!          page and why, or to mend it. The program's own handler must not notice that we were there.
//! Owns     one process-wide handler and the disposition that was there before it.
//! Fails    installing fails when as many handlers of ours are there as there can be.
//!
//! Everything the handler runs is safe in a signal handler: no locks, no allocation, no thread-local storage,
//! and no call that would change `errno`.

use core::arch::naked_asm;
use core::ffi::c_void;
use core::marker::PhantomData;
use core::ptr;
use core::sync::atomic::Ordering::SeqCst;
use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize};
use std::io;

use linux_raw_sys::general as sys;
use rustix::io::Errno;
use uhmm_addr::VirtAddr;

use crate::futex::Lock;
use crate::thread::raw;

const SIGBUS: i32 = sys::SIGBUS as i32;
/// Bytes in the kernel's set of signals.
const SET: usize = 8;

/// Keeps every signal away from the calling thread until dropped. Accesses that fault kill meanwhile.
#[derive(Debug)]
#[must_use = "signals come again as soon as the guard is dropped"]
pub struct Blocked {
    before: u64,
    /// The mask belongs to the thread.
    not_send: PhantomData<*const ()>,
}

impl Blocked {
    /// Blocks all signals.
    pub fn all() -> Self {
        Self { before: set_mask(u64::MAX), not_send: PhantomData }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        set_mask(self.before);
    }
}

/// Sets the calling thread's mask; gives the one before.
fn set_mask(mask: u64) -> u64 {
    let mut before = 0_u64;
    let args = [sys::SIG_SETMASK as usize, &raw const mask as usize, &raw mut before as usize, SET, 0];
    // SAFETY: both pointers are to sets of the size given, of this frame. A thread's mask may be anything. It
    // cannot fail with these arguments.
    let _ = unsafe { raw::syscall(sys::__NR_rt_sigprocmask, args) };
    before
}

unsafe extern "C" {
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> i32;
}

/// Has `before` called before, and `after` after each fork through the C library, in parent and child.
///
/// # Safety
/// Both must be right to call in any thread that forks, for the rest of the process's life.
pub unsafe fn at_fork(before: extern "C" fn(), after: extern "C" fn()) {
    // SAFETY: the caller's promise. It fails only without memory for a list entry, at start-up.
    let _ = unsafe { pthread_atfork(Some(before), Some(after), Some(after)) };
}

/// What a SIGBUS tells besides its address.
#[derive(Clone, Copy, Debug)]
pub struct FaultInfo {
    /// The kernel's `si_code`: 2 for no memory behind the page, 4 for a poisoned page.
    pub code: i32,
    /// The instruction that was stopped.
    pub instruction: VirtAddr,
    /// Whether it was going to write.
    pub write: bool,
    /// Whether an access raised it. Otherwise somebody sent it or the kernel tells of a page that broke, and
    /// the address may mean nothing.
    pub synchronous: bool,
}

/// What the handler makes of a SIGBUS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Handled {
    /// It was ours; the access is tried again.
    Ours,
    /// Not ours: the program gets it.
    NotOurs,
    /// Of a page that is lost for good: the program gets it as the kernel reports such pages, with
    /// `BUS_MCEERR_AR` and log2 of the bytes that went with it (`si_addr_lsb`).
    Poisoned(u8),
}

/// A function that looks at a SIGBUS first. It must be safe in a signal handler and must not unwind.
pub type Handler = fn(VirtAddr, &FaultInfo) -> Handled;

/// Why a handler was not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// As many as there can be are.
    #[error("{CAPACITY} other SIGBUS handlers of uhmm are installed already")]
    Full,
    /// The kernel refused.
    #[error("the SIGBUS handler cannot be installed")]
    Os(#[from] io::Error),
}

/// The kernel's `struct sigaction`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
struct Action {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

const DEFAULT: usize = 0;
const IGNORE: usize = 1;

/// The disposition before ours.
struct Before {
    handler: AtomicUsize,
    flags: AtomicU64,
    mask: AtomicU64,
}

static BEFORE: Before =
    Before { handler: AtomicUsize::new(DEFAULT), flags: AtomicU64::new(0), mask: AtomicU64::new(0) };

/// How many [`Handler`]s there can be.
pub const CAPACITY: usize = 4;

/// The [`Handler`]s, as pointers, in the order in which they are asked.
static HANDLERS: [AtomicPtr<c_void>; CAPACITY] = [const { AtomicPtr::new(ptr::null_mut()) }; CAPACITY];

/// Whether ours was put in front. Held while it is being done; never by the handler.
static INSTALLED: Lock<bool> = Lock::new(false);

/// The handler of SIGBUS that comes before the program's: it asks each [`Handler`] until one says that it is its.
///
/// A program that installs its own later replaces it; a program that installed one before keeps it behind
/// ours. That one runs on the alternate stack where the thread has one, even if it did not ask for it; all
/// else is as if the kernel had called it: its mask, `SA_NODEFER` and `SA_RESETHAND` hold.
#[derive(Debug)]
pub struct SigbusChain(());

impl SigbusChain {
    /// Has `handler` asked, behind those that were installed before. A second time with the same handler changes
    /// nothing, and neither does another one change where ours stands, wherever the program has put it since:
    /// putting ours in front again of one that calls ours would make a circle.
    ///
    /// # Safety
    /// `handler` must be safe in a signal handler: no locks, allocation, thread-local storage or unwinding.
    /// It says [`Handled::Ours`] only when trying the access again is right.
    pub unsafe fn install(handler: Handler) -> Result<(), InstallError> {
        let ours = handler as *mut c_void;
        let mut slots = HANDLERS.iter();
        let slot = slots.find(|slot| match slot.compare_exchange(ptr::null_mut(), ours, SeqCst, SeqCst) {
            Ok(_) => true,
            Err(there) => there == ours,
        });
        let slot = slot.ok_or(InstallError::Full)?;
        let mut in_front = INSTALLED.lock();
        if *in_front {
            return Ok(());
        }
        let action = Action {
            handler: on_sigbus as *const () as usize,
            flags: u64::from(sys::SA_SIGINFO | sys::SA_ONSTACK | sys::SA_RESTORER),
            restorer: restore as *const () as usize,
            mask: u64::MAX,
        };
        // Noted first, because a signal may come as soon as ours is there; noted again if it changed meanwhile.
        let installed = sigaction(None).and_then(|before| {
            remember(before);
            sigaction(Some(&action)).map(|replaced| {
                if replaced != before {
                    remember(replaced);
                }
            })
        });
        *in_front = installed.is_ok();
        installed.map_err(|error| {
            slot.store(ptr::null_mut(), SeqCst);
            InstallError::Os(error.into())
        })
    }
}

/// What a [`BareHandler`] calls with the address that was touched.
static BARE: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// A handler of SIGBUS with nothing around it, in place of whatever is there, which comes back when this is
/// dropped. Other threads must have no faults of their own meanwhile.
#[derive(Debug)]
#[must_use = "dropped, it puts the handler back that was there before"]
pub struct BareHandler {
    before: Action,
}

impl BareHandler {
    /// Installs `resolve`, which gets the address that was touched.
    ///
    /// # Safety
    /// As [`SigbusChain::install`]; and every SIGBUS of the process must be one that `resolve` mends, for
    /// otherwise the access is tried for ever. There may be one such handler at a time.
    pub unsafe fn install(resolve: fn(VirtAddr)) -> io::Result<Self> {
        BARE.store(resolve as *mut c_void, SeqCst);
        let action = Action {
            handler: on_bare_sigbus as *const () as usize,
            flags: u64::from(sys::SA_SIGINFO | sys::SA_NODEFER | sys::SA_RESTORER),
            restorer: restore as *const () as usize,
            mask: 0,
        };
        Ok(Self { before: sigaction(Some(&action))? })
    }
}

impl Drop for BareHandler {
    fn drop(&mut self) {
        // Cannot fail for this signal.
        let _ = sigaction(Some(&self.before));
    }
}

extern "C" fn on_bare_sigbus(_signal: i32, info: *mut Info, _context: *mut Context) {
    // SAFETY: the word was stored before this was installed and holds such a function; the kernel calls with
    // a pointer to the signal's information, in the signal frame.
    unsafe {
        let resolve = core::mem::transmute::<*mut c_void, fn(VirtAddr)>(BARE.load(SeqCst));
        resolve(VirtAddr::new((*info).address));
    }
}

fn remember(action: Action) {
    BEFORE.flags.store(action.flags, SeqCst);
    BEFORE.mask.store(action.mask, SeqCst);
    BEFORE.handler.store(action.handler, SeqCst);
}

/// Sets SIGBUS's disposition, or only asks; gives the one before.
fn sigaction(new: Option<&Action>) -> Result<Action, Errno> {
    let mut old = Action { handler: DEFAULT, flags: 0, restorer: 0, mask: 0 };
    let new = new.map_or(ptr::null(), ptr::from_ref);
    let args = [SIGBUS as usize, new as usize, &raw mut old as usize, SET, 0];
    // SAFETY: both are null or structures of the kernel's layout. What is installed is `on_sigbus` with its
    // restorer, or the default.
    unsafe { raw::syscall(sys::__NR_rt_sigaction, args) }?;
    Ok(old)
}

/// Where the kernel returns to behind a handler. Debuggers and unwinders know a signal frame by these bytes.
#[unsafe(naked)]
extern "C" fn restore() {
    naked_asm!("mov rax, 15", "syscall")
}

/// The front of the kernel's `siginfo_t` for faults.
#[repr(C)]
struct Info {
    signo: i32,
    errno: i32,
    code: i32,
    pad: i32,
    address: usize,
    /// Of a page that broke: log2 of its bytes.
    least_bit: i16,
}

/// The kernel's `struct ucontext`, as far as it is read.
#[repr(C)]
struct Context {
    flags: u64,
    link: usize,
    stack: [usize; 3],
    /// r8 to r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, flags, segments, error, trap, mask, cr2.
    registers: [u64; 23],
    float: usize,
    reserved: [u64; 8],
    /// The mask that was interrupted.
    mask: u64,
}

const RIP: usize = 16;
const ERROR: usize = 19;
/// In a page fault's error code: it was a write.
const ERROR_WRITE: u64 = 2;
/// `BUS_MCEERR_AR`: the page that was accessed is broken.
const BROKEN_HERE: i32 = 4;
/// `BUS_MCEERR_AO`: a page broke that nobody has accessed yet.
const BROKEN_ELSEWHERE: i32 = 5;

extern "C" fn on_sigbus(signal: i32, info: *mut Info, context: *mut Context) {
    // SAFETY: the kernel calls this with pointers to both, in the signal frame, because of SA_SIGINFO.
    let (code, address, registers, mask) =
        unsafe { ((*info).code, (*info).address, (*context).registers, (*context).mask) };
    let fault = FaultInfo {
        code,
        instruction: VirtAddr::new(registers[RIP] as usize),
        write: registers[ERROR] & ERROR_WRITE != 0,
        // Codes of signals that were sent are zero or negative.
        synchronous: code > 0 && code != BROKEN_ELSEWHERE,
    };
    for slot in &HANDLERS {
        let handler = slot.load(SeqCst);
        if handler.is_null() {
            continue;
        }
        // SAFETY: the word only ever holds null or a `Handler`.
        let handler = unsafe { core::mem::transmute::<*mut c_void, Handler>(handler) };
        match handler(VirtAddr::new(address), &fault) {
            Handled::Ours => return,
            Handled::NotOurs => {}
            Handled::Poisoned(order) => {
                // SAFETY: as above; the signal frame is this handler's to change.
                unsafe {
                    (*info).code = BROKEN_HERE;
                    (*info).least_bit = i16::from(order);
                }
                break;
            }
        }
    }
    // SAFETY: the arguments are the kernel's, of this signal; its interrupted mask is `mask`.
    unsafe { pass_on(signal, info, context, mask, fault.synchronous) }
}

/// Does what the kernel would have done with the disposition before ours.
///
/// # Safety
/// Called inside the handler, with its own arguments.
unsafe fn pass_on(signal: i32, info: *mut Info, context: *mut Context, mask: u64, synchronous: bool) {
    let flags = BEFORE.flags.load(SeqCst);
    let mut handler = BEFORE.handler.load(SeqCst);
    if handler > IGNORE && flags & u64::from(sys::SA_RESETHAND) != 0 {
        // The handler is called once; whoever comes second finds the default.
        handler = BEFORE.handler.compare_exchange(handler, DEFAULT, SeqCst, SeqCst).unwrap_or_else(|now| now);
    }
    match handler {
        IGNORE if !synchronous => {}
        DEFAULT | IGNORE => die(synchronous),
        handler => {
            let mut during = mask | BEFORE.mask.load(SeqCst);
            if flags & u64::from(sys::SA_NODEFER) == 0 {
                during |= 1 << (SIGBUS - 1);
            }
            set_mask(during);
            // SAFETY: the program registered this address as a handler of this signal. On x86-64 the kernel
            // passes all three arguments to handlers of either kind.
            unsafe {
                let handler =
                    core::mem::transmute::<usize, extern "C" fn(i32, *mut Info, *mut Context)>(handler);
                handler(signal, info, context);
            }
        }
    }
}

/// Lets the signal kill the process, as it would have without a handler. Returns: the access is tried again
/// and faults again, or the signal, sent again, arrives when the handler is left.
fn die(synchronous: bool) {
    let action = Action {
        handler: DEFAULT,
        flags: u64::from(sys::SA_RESTORER),
        restorer: restore as *const () as usize,
        mask: 0,
    };
    // Cannot fail for this signal.
    let _ = sigaction(Some(&action));
    if !synchronous {
        let pid = rustix::process::getpid().as_raw_pid() as usize;
        let tid = rustix::thread::gettid().as_raw_pid() as usize;
        // SAFETY: sends this thread a signal, which is the point.
        let _ = unsafe { raw::syscall(sys::__NR_tgkill, [pid, tid, SIGBUS as usize, 0, 0]) };
    }
}

// The layout that the kernel uses on x86-64.
const _: () = {
    assert!(core::mem::offset_of!(Context, registers) == 40);
    assert!(core::mem::offset_of!(Context, mask) == 296);
    assert!(core::mem::offset_of!(Info, address) == 16 && core::mem::offset_of!(Info, least_bit) == 24);
};

#[cfg(test)]
mod tests;
