//! The functions of the C library that are replaced, and the constructor.
//!
//! Only what cannot be learnt otherwise: where new threads keep their block (`pthread_create`), and when a
//! discard is complete (`madvise`; the event comes before the kernel takes the pages). Everything else about
//! the program's mappings comes from scans and events, because the C library's own calls are not to be seen
//! here.

use std::ffi::{CStr, c_int, c_void};
use std::mem;
use std::sync::atomic::{AtomicU32, Ordering};

use uhmm::tree::protocol::ENV_SOCKET;
use uhmm_addr::{VaRange, VirtAddr};
use uhmm_sys::symbol::Next;

use crate::process::{Agent, THREADS};
use crate::{fork, start};

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

static PTHREAD_CREATE: Next = Next::new(c"pthread_create");
static MADVISE: Next = Next::new(c"madvise");
/// 1 + the key whose destructor forgets a thread; 0 for none.
static THREAD_KEY: AtomicU32 = AtomicU32::new(0);

extern "C" fn constructor() {
    PTHREAD_CREATE.get();
    MADVISE.get();
    // Without the heap, which there may be no room for.
    let mut bytes = [0; ENV_SOCKET.len() + 1];
    bytes[..ENV_SOCKET.len()].copy_from_slice(ENV_SOCKET.as_bytes());
    let name = CStr::from_bytes_until_nul(&bytes).unwrap_or_default();
    // SAFETY: constructors run before the program can change its environment from another thread.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    if value.is_null() {
        return;
    }
    // SAFETY: the environment's strings end in zero.
    if !start::remember_socket(unsafe { CStr::from_ptr(value) }) {
        return;
    }
    if let Err(error) = start::start(0) {
        // Nothing is managed yet, so that nothing is lost: the program runs as it would without us.
        start::complain(&error);
        return;
    }
    let mut key = 0;
    // SAFETY: the destructor may run in any thread that has set the key.
    if unsafe { libc::pthread_key_create(&raw mut key, Some(forget_thread)) } == 0 {
        THREAD_KEY.store(key + 1, Ordering::Release);
    }
    enter_thread();
    // SAFETY: the three functions may run where the C library runs them.
    let _ = unsafe { pthread_atfork(Some(fork::prepare), Some(fork::parent), Some(fork::child)) };
}

unsafe extern "C" {
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> c_int;
}

/// Enters the calling thread into the table of where threads run, and keeps its block in RAM.
fn enter_thread() {
    let Some(agent) = Agent::get() else { return };
    agent.pin_thread_block();
    let key = THREAD_KEY.load(Ordering::Acquire);
    // SAFETY: the key exists; any value but null makes its destructor run when the thread ends.
    if key != 0 && unsafe { libc::pthread_setspecific(key - 1, (&raw const THREADS).cast()) } == 0 {
        // SAFETY: the destructor forgets the thread before it exits, and its block is pinned.
        unsafe { THREADS.register_current() };
    }
}

extern "C" fn forget_thread(_value: *mut c_void) {
    THREADS.forget(rustix::thread::gettid().as_raw_nonzero().get() as u32);
}

type Entry = extern "C-unwind" fn(*mut c_void) -> *mut c_void;

struct Thread {
    entry: Entry,
    arg: *mut c_void,
}

extern "C-unwind" fn thread_main(thread: *mut c_void) -> *mut c_void {
    // SAFETY: `pthread_create` below made the box for this thread.
    let Thread { entry, arg } = *unsafe { Box::from_raw(thread.cast::<Thread>()) };
    enter_thread();
    entry(arg)
}

/// As the C library's.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attributes: *const libc::pthread_attr_t,
    entry: Entry,
    arg: *mut c_void,
) -> c_int {
    type Create =
        unsafe extern "C" fn(*mut libc::pthread_t, *const libc::pthread_attr_t, Entry, *mut c_void) -> c_int;
    // SAFETY: this is the C library's function of that name.
    let create: Create = unsafe { mem::transmute(PTHREAD_CREATE.get()) };
    if Agent::get().is_none() {
        // SAFETY: the caller's arguments, as they are.
        return unsafe { create(thread, attributes, entry, arg) };
    }
    let own = Box::into_raw(Box::new(Thread { entry, arg }));
    // SAFETY: as above; the new thread takes the box.
    let result = unsafe { create(thread, attributes, thread_main, own.cast()) };
    if result != 0 {
        // SAFETY: no thread was made that could have taken it.
        drop(unsafe { Box::from_raw(own) });
    }
    result
}

/// As the C library's.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int {
    type Madvise = unsafe extern "C" fn(*mut c_void, usize, c_int) -> c_int;
    // SAFETY: this is the C library's function of that name.
    let real: Madvise = unsafe { mem::transmute(MADVISE.get()) };
    // SAFETY: the caller's arguments, as they are.
    let result = unsafe { real(at, len, advice) };
    let discards = matches!(advice, libc::MADV_DONTNEED | libc::MADV_FREE | libc::MADV_REMOVE);
    if result == 0
        && discards
        && let (Some(agent), Some(range)) = (Agent::get(), VaRange::covering(VirtAddr::of(at), len))
    {
        agent.managed.mm().removal_done(range);
    }
    result
}
