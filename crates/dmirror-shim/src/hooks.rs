//! The functions of the C library that are replaced, and the constructor.
//!
//! What a program does to its mappings waits while the machine replaces one ([`uhmm::Space::detach`]); that a mapping
//! went, its event says before the call returns.

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::mem;
use std::sync::Arc;

use uhmm::{Space, VaRange, VirtAddr};
use uhmm_dmirror::Node;
use uhmm_sys::symbol::Next;

use crate::command::{self, Errno};
use crate::files::{File, State};
use crate::gup;

const DEVICES: [&CStr; 4] =
    [c"/dev/hmm_dmirror0", c"/dev/hmm_dmirror1", c"/dev/hmm_dmirror2", c"/dev/hmm_dmirror3"];
const GUP: &CStr = c"/sys/kernel/debug/gup_test";

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

unsafe extern "C" {
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> c_int;
}

extern "C" fn constructor() {
    // SAFETY: the allocator's own handlers for fork, installed once.
    unsafe { dlmalloc::enable_alloc_after_fork() };
    // SAFETY: the function may run in the child of a fork: it stores a pointer.
    let _ = unsafe { pthread_atfork(None, None, Some(child)) };
}

extern "C" fn child() {
    State::forget();
}

/// What a function of ours answers: a result, or -1 and an error number.
fn answer(done: Result<c_int, Errno>) -> c_int {
    done.unwrap_or_else(|Errno(number)| {
        // SAFETY: the calling thread's own.
        unsafe { *libc::__errno_location() = number };
        -1
    })
}

// --- open ----------------------------------------------------------------------------------------------------

/// Opens one of our files, if `path` names one.
///
/// # Safety
/// `path` must be a string, or null.
unsafe fn open_ours(path: *const c_char, flags: c_int) -> Option<c_int> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    let path = unsafe { CStr::from_ptr(path) };
    let node = DEVICES.iter().position(|device| *device == path).map(|n| Node::ALL[n]);
    (node.is_some() || path == GUP).then(|| answer(open_file(node, flags)))
}

fn open_file(node: Option<Node>, flags: c_int) -> Result<c_int, Errno> {
    let state = State::need().ok_or(Errno(libc::ENODEV))?;
    let file = match node {
        Some(node) => File::Device(Arc::new(state.machine.open(node)?)),
        None => File::Gup,
    };
    let close_on_exec = if flags & libc::O_CLOEXEC != 0 { libc::MFD_CLOEXEC } else { 0 };
    // SAFETY: a name, and flags.
    let fd = unsafe { libc::memfd_create(c"hmm_dmirror".as_ptr(), close_on_exec) };
    if fd < 0 {
        // SAFETY: the calling thread's own.
        return Err(Errno(unsafe { *libc::__errno_location() }));
    }
    state.files().insert(fd, file);
    Ok(fd)
}

macro_rules! opens {
    ($($function:ident $real:ident $name:literal, $at_function:ident $at_real:ident $at_name:literal);* $(;)?) => { $(
        static $real: Next = Next::new($name);
        static $at_real: Next = Next::new($at_name);

        /// As the C library's; the mode is there, and looked at, where the flags say so.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $function(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
            // SAFETY: the caller's path.
            if let Some(fd) = unsafe { open_ours(path, flags) } {
                return fd;
            }
            type Open = unsafe extern "C" fn(*const c_char, c_int, ...) -> c_int;
            // SAFETY: this is the C library's function of that name.
            let real: Open = unsafe { mem::transmute($real.get()) };
            // SAFETY: the caller's arguments, as they are.
            unsafe { real(path, flags, mode) }
        }

        /// As the C library's; the mode is there, and looked at, where the flags say so.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $at_function(
            directory: c_int,
            path: *const c_char,
            flags: c_int,
            mode: c_uint,
        ) -> c_int {
            // SAFETY: the caller's path; ours are absolute.
            if let Some(fd) = unsafe { open_ours(path, flags) } {
                return fd;
            }
            type OpenAt = unsafe extern "C" fn(c_int, *const c_char, c_int, ...) -> c_int;
            // SAFETY: this is the C library's function of that name.
            let real: OpenAt = unsafe { mem::transmute($at_real.get()) };
            // SAFETY: the caller's arguments, as they are.
            unsafe { real(directory, path, flags, mode) }
        }
    )* };
}

opens! {
    open OPEN c"open", openat OPENAT c"openat";
    open64 OPEN64 c"open64", openat64 OPENAT64 c"openat64";
}

// --- what is done with a file ----------------------------------------------------------------------------------

static CLOSE: Next = Next::new(c"close");
static IOCTL: Next = Next::new(c"ioctl");

/// As the C library's.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    let ours = State::get().and_then(|state| state.files().remove(&fd));
    // The last one brings the device's pages home.
    drop(ours);
    type Close = unsafe extern "C" fn(c_int) -> c_int;
    // SAFETY: this is the C library's function of that name.
    let real: Close = unsafe { mem::transmute(CLOSE.get()) };
    // SAFETY: the caller's argument, as it is.
    unsafe { real(fd) }
}

/// As the C library's. Programs give requests as `int`, which arrive with their sign extended.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if let Some((state, file)) = State::file(fd) {
        let at = VirtAddr::of(argument);
        let done = match &file {
            File::Device(handle) => command::serve(handle, request as u32, at),
            File::Gup => gup::serve(&state.machine, request as u32, at),
        };
        return answer(done.map(|()| 0));
    }
    type Ioctl = unsafe extern "C" fn(c_int, c_ulong, ...) -> c_int;
    // SAFETY: this is the C library's function of that name.
    let real: Ioctl = unsafe { mem::transmute(IOCTL.get()) };
    // SAFETY: the caller's arguments, as they are.
    unsafe { real(fd, request, argument) }
}

macro_rules! maps {
    ($($function:ident $real:ident $name:literal),* $(,)?) => { $(
        static $real: Next = Next::new($name);

        /// As the C library's.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $function(
            at: *mut c_void,
            len: usize,
            protection: c_int,
            flags: c_int,
            fd: c_int,
            offset: c_long,
        ) -> *mut c_void {
            type Map = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, c_int, c_long) -> *mut c_void;
            // SAFETY: this is the C library's function of that name.
            let real: Map = unsafe { mem::transmute($real.get()) };
            let device = flags & libc::MAP_ANONYMOUS == 0 && State::file(fd).is_some();
            if device {
                // As long as it is mapped: the kernel's device has pages wherever it is mapped.
                // SAFETY: the descriptor is a memfd of ours.
                let _ = unsafe { libc::ftruncate(fd, offset.saturating_add_unsigned(len as u64)) };
            }
            // SAFETY: the caller's arguments, as they are.
            let map = || unsafe { real(at, len, protection, flags, fd, offset) };
            let mapped = if flags & libc::MAP_FIXED == 0 { map() } else { remapping(map) };
            if device && mapped != libc::MAP_FAILED {
                // The kernel's device puts its pages there at once, to be read.
                // SAFETY: the new mapping, whose contents do not change.
                let _ = unsafe { libc::madvise(mapped, len, libc::MADV_POPULATE_READ) };
            }
            mapped
        }
    )* };
}

maps!(mmap MMAP c"mmap", mmap64 MMAP64 c"mmap64");

// --- what nobody else tells of ---------------------------------------------------------------------------------

static MPROTECT: Next = Next::new(c"mprotect");
static MADVISE: Next = Next::new(c"madvise");
static MUNMAP: Next = Next::new(c"munmap");
static MREMAP: Next = Next::new(c"mremap");

/// Has `change` change mappings, when the machine, if there is one, is not about to.
fn remapping<R>(change: impl FnOnce() -> R) -> R {
    match State::get() {
        Some(state) => state.machine.space().remapping(change),
        None => change(),
    }
}

/// As the C library's.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(at: *mut c_void, len: usize) -> c_int {
    type Unmap = unsafe extern "C" fn(*mut c_void, usize) -> c_int;
    // SAFETY: this is the C library's function of that name.
    let real: Unmap = unsafe { mem::transmute(MUNMAP.get()) };
    // SAFETY: the caller's arguments, as they are.
    remapping(|| unsafe { real(at, len) })
}

/// As the C library's; the new address is there, and looked at, where the flags say so.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    at: *mut c_void,
    len: usize,
    new_len: usize,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    type Remap = unsafe extern "C" fn(*mut c_void, usize, usize, c_int, ...) -> *mut c_void;
    // SAFETY: this is the C library's function of that name.
    let real: Remap = unsafe { mem::transmute(MREMAP.get()) };
    // SAFETY: the caller's arguments, as they are.
    remapping(|| unsafe { real(at, len, new_len, flags, to) })
}

/// As the C library's; a device hears of it first.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mprotect(at: *mut c_void, len: usize, protection: c_int) -> c_int {
    type Protect = unsafe extern "C" fn(*mut c_void, usize, c_int) -> c_int;
    // SAFETY: this is the C library's function of that name.
    let real: Protect = unsafe { mem::transmute(MPROTECT.get()) };
    // SAFETY: the caller's arguments, as they are.
    let protect = || unsafe { real(at, len, protection) };
    match (State::get(), VaRange::covering(VirtAddr::of(at), len)) {
        (Some(state), Some(range)) => {
            let space = state.machine.space();
            space.protecting_each(&changed(space, range, protection), protect)
        }
        _ => protect(),
    }
}

/// Ranges that are told of one by one.
const SEVERAL: usize = 8;

/// What of `range` a protection changes, as the kernel sees it: nothing of what may be read and written already and
/// is to be. (If another thread takes that away meanwhile, a right is given back untold, which makes no table lie.)
fn changed(space: &Space, range: VaRange, protection: c_int) -> Vec<VaRange> {
    let everything = libc::PROT_READ | libc::PROT_WRITE;
    if protection & everything != everything {
        return vec![range];
    }
    let Ok(mappings) = space.mappings(range) else { return vec![range] };
    let changed = mappings.iter().filter(|mapping| !(mapping.read && mapping.write));
    let changed: Vec<_> = changed.map(|mapping| mapping.range).collect();
    if changed.len() > SEVERAL { vec![range] } else { changed }
}

/// As the C library's; pages that were given up can be moved when it is over.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int {
    type Advise = unsafe extern "C" fn(*mut c_void, usize, c_int) -> c_int;
    // SAFETY: this is the C library's function of that name.
    let real: Advise = unsafe { mem::transmute(MADVISE.get()) };
    let discards = matches!(advice, libc::MADV_DONTNEED | libc::MADV_FREE | libc::MADV_REMOVE);
    // SAFETY: the caller's arguments, as they are.
    let result = remapping(|| unsafe { real(at, len, advice) });
    // Also where it failed: it does what can be done before it says that there is a hole.
    if discards && let (Some(state), Some(range)) = (State::get(), VaRange::covering(VirtAddr::of(at), len)) {
        state.machine.space().discarded(range);
    }
    result
}
