//! The faulting thread resolves its own fault, in a SIGBUS handler.
//!
//! What    [`enlist`] makes the process-wide handler look after a [`Managed`]; dropping its [`Membership`] ends that.
//! Why     4 us a fault against 7 for the best hand-over between threads: nothing has to wake up.
//! Chains  a fault outside of every enlisted space goes to the handler that was there before.
//! Rule    R7: the handler allocates nothing, takes no lock that a thread may hold while it touches managed
//!         memory, and runs with all signals blocked. Working memory comes from a pool made beforehand; if
//!         more threads fault at once than it has, they take turns. A stack comes with it: the program's
//!         own for signals may be small.
//! Fork    raises no event here, and a child's absent pages would read as zeros: before a fork through the C
//!         library every page is brought home and kept there until it is over. The child has the memory,
//!         all of it in RAM, and not the space.
//! Fails   a poisoned page raises SIGBUS for good: the program's own handler, or the default action, sees it.

use std::cell::UnsafeCell;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::time::Duration;

use uhmm_addr::{PageCount, VirtAddr};
use uhmm_core::fault::{Access, Fault, Resolution, Scratch};
use uhmm_sys::mapping::Mapping;
use uhmm_sys::signals::{FaultInfo, Handled, InstallError, SigbusChain};
use uhmm_sys::stack::Stack;

use crate::managed::Managed;

/// Spaces that may use the engine at a time.
pub const SPACES: usize = 64;
/// Threads that may be in the handler at a time before they take turns.
const SCRATCHES: usize = 8;

struct Member {
    managed: AtomicPtr<Enlisted>,
    /// Handlers that look at the entry right now.
    readers: AtomicUsize,
}

static MEMBERS: [Member; SPACES] =
    [const { Member { managed: AtomicPtr::new(std::ptr::null_mut()), readers: AtomicUsize::new(0) } };
        SPACES];

/// A space that the handler looks after.
#[derive(Debug)]
pub struct Enlisted {
    managed: std::sync::Arc<Managed>,
    /// Whether a fork keeps the pages where they are.
    frozen: AtomicBool,
    pool: [Place; SCRATCHES],
    _buffers: Vec<Mapping>,
}

#[derive(Debug)]
struct Place {
    taken: AtomicBool,
    scratch: UnsafeCell<Scratch>,
    stack: Stack,
}

// SAFETY: scratch and stack are used by whoever took the place, one thread at a time.
unsafe impl Sync for Place {}

/// Why a space cannot use the engine.
#[derive(Debug, thiserror::Error)]
pub enum EnlistError {
    /// The handler could not be installed.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// No memory for the handler to work with.
    #[error("no memory for the signal handler to work with")]
    Memory(#[from] io::Error),
    /// Too many spaces in this process.
    #[error("{SPACES} spaces use the signal engine already; that is the limit")]
    TooMany,
}

/// Membership in the handler's list; ends when dropped.
#[derive(Debug)]
pub struct Membership {
    index: usize,
    enlisted: Box<Enlisted>,
}

/// Makes the SIGBUS handler look after `managed`.
pub fn enlist(managed: std::sync::Arc<Managed>) -> Result<Membership, EnlistError> {
    let mut buffers = Vec::new();
    let mut places = Vec::new();
    for stack in Stack::several::<SCRATCHES>()? {
        let (scratch, buffer) = Managed::scratch()?;
        buffers.push(buffer);
        let (taken, scratch) = (AtomicBool::new(false), UnsafeCell::new(scratch));
        places.push(Place { taken, scratch, stack });
    }
    let pool = places.try_into().expect("as many places as the pool has");
    let enlisted = Box::new(Enlisted { managed, frozen: AtomicBool::new(false), pool, _buffers: buffers });
    // SAFETY: `on_sigbus` allocates nothing, uses no thread-local storage, takes only locks whose holders
    // have signals blocked or are in a handler themselves, and says `Ours` for faults of enlisted spaces.
    unsafe { SigbusChain::install(on_sigbus) }?;
    static FORKS: std::sync::Once = std::sync::Once::new();
    // SAFETY: the functions may run in any thread that forks; they use what is enlisted then.
    FORKS.call_once(|| unsafe { uhmm_sys::signals::at_fork(before_fork, after_fork) });
    let pointer = std::ptr::from_ref(&*enlisted).cast_mut();
    let free = |member: &Member| {
        member
            .managed
            .compare_exchange(std::ptr::null_mut(), pointer, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    };
    let index = MEMBERS.iter().position(free).ok_or(EnlistError::TooMany)?;
    Ok(Membership { index, enlisted })
}

/// Calls `f` with every enlisted space.
fn for_each_member(f: impl Fn(&Enlisted)) {
    for member in &MEMBERS {
        member.readers.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as in `on_sigbus`.
        if let Some(enlisted) = unsafe { member.managed.load(Ordering::SeqCst).as_ref() } {
            f(enlisted);
        }
        member.readers.fetch_sub(1, Ordering::SeqCst);
    }
}

extern "C" fn before_fork() {
    for_each_member(|enlisted| {
        let managed = &enlisted.managed;
        enlisted.with_scratch(|scratch| {
            loop {
                managed.bring_home(scratch);
                managed.mm().freeze();
                if !managed.is_any_away() {
                    enlisted.frozen.store(true, Ordering::Release);
                    return;
                }
                managed.mm().thaw();
            }
        });
    });
}

extern "C" fn after_fork() {
    for_each_member(|enlisted| {
        if enlisted.frozen.swap(false, Ordering::AcqRel) {
            enlisted.managed.mm().thaw();
        }
    });
}

impl Membership {
    /// The space.
    pub fn managed(&self) -> &Managed {
        &self.enlisted.managed
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let member = &MEMBERS[self.index];
        member.managed.store(std::ptr::null_mut(), Ordering::SeqCst);
        // A handler that found the pointer before is done with it in microseconds.
        while member.readers.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
    }
}

fn on_sigbus(addr: VirtAddr, info: &FaultInfo) -> Handled {
    if !info.synchronous {
        return Handled::NotOurs;
    }
    for member in &MEMBERS {
        if member.managed.load(Ordering::Relaxed).is_null() {
            continue;
        }
        member.readers.fetch_add(1, Ordering::SeqCst);
        let pointer = member.managed.load(Ordering::SeqCst);
        // SAFETY: the pointer was published by `enlist` and is valid until `Membership::drop`, which waits for
        // the readers counted here.
        let found = unsafe { pointer.as_ref() }.and_then(|enlisted| enlisted.handle(addr, info));
        member.readers.fetch_sub(1, Ordering::SeqCst);
        if let Some(handled) = found {
            return handled;
        }
    }
    Handled::NotOurs
}

impl Enlisted {
    /// Resolves the fault if the address is this space's.
    fn handle(&self, addr: VirtAddr, info: &FaultInfo) -> Option<Handled> {
        if !self.managed.covers(addr.page()) {
            return None;
        }
        let access = if info.write { Access::Write } else { Access::Read };
        let fault = Fault { addr, access, ours: false };
        let handled = self.with_scratch(|scratch| self.resolve(fault, scratch));
        self.managed.kick_if_low();
        Some(handled)
    }

    fn resolve(&self, mut fault: Fault, scratch: &mut Scratch) -> Handled {
        let mm = self.managed.mm();
        loop {
            match mm.resolve(fault, scratch) {
                // The page is there: what stopped the store was a write protection.
                Resolution::Resolved(PageCount::ZERO) if fault.access == Access::Write => {
                    fault.access = Access::WriteProtected;
                }
                Resolution::Resolved(_) => return Handled::Ours,
                Resolution::InFlight => mm.wait_in_flight(fault.addr.page()),
                Resolution::Starved => self.managed.wait_for_room(Duration::from_millis(1)),
                Resolution::Pending => std::hint::spin_loop(),
                Resolution::Poisoned(_) | Resolution::Unmanaged => return Handled::NotOurs,
            }
        }
    }

    fn with_scratch<R>(&self, f: impl FnOnce(&mut Scratch) -> R) -> R {
        let mut f = Some(f);
        loop {
            for place in &self.pool {
                if !place.taken.swap(true, Ordering::Acquire) {
                    let f = f.take().expect("called once");
                    // SAFETY: the place was free and is ours until the store below; the handler runs with all
                    // signals blocked.
                    let result = unsafe { place.stack.run(|| f(&mut *place.scratch.get())) };
                    place.taken.store(false, Ordering::Release);
                    return result;
                }
            }
            std::hint::spin_loop();
        }
    }
}
