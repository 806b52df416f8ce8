//! Both sides of a fork.
//!
//! ```text
//! forking thread    handler             keeper                  child
//! prepare: cookie
//! fork() ─────────► reads EVENT_FORK
//!                   copies the table ─► serves the child's      runs in the C library, touches memory
//! fork() returns                        faults                  our hook: Hello(cookie)
//!                                       Welcome ──────────────► has table and descriptor: takes over
//! ```
//!
//! The words of the child are made under the layout lock, from before the event is read, so that no page can
//! come or go; `fork` returns to the program when that is done. Device pages are shared by reference; staged
//! pages are copied to the child, for the arena is not inherited. The keeper, a third process, serves the child
//! until it serves itself, so that the parent may die at any moment.
//!
//! A child that is made without the C library's `fork` runs no hook of ours; the keeper notices that nobody
//! asks for it and brings all its pages home. `vfork` and `posix_spawn` copy no memory and raise no event.
//!
//! *Without the event* (it takes the right to trace processes) a child's absent pages would read as zeros.
//! Everything is then brought home before the fork, whatever the budget, and nothing leaves until it is over;
//! the child starts afresh. A program that forks past the C library's `fork` must not be run so.
//!
//! Fails  a child for which the keeper has nothing (the parent was killed inside `fork`) ends at once: it
//!        would read zeros where its memory was. A child that inherits no memory of ours goes on without us.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use uhmm::managed::{Managed, TABLE_BYTES, USER_PAGES};
use uhmm::tree::client;
use uhmm::tree::table::Table;
use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, Vpn};
use uhmm_core::host::{Install, Stop};
use uhmm_core::pagetable::{PageTable, PageWord};
use uhmm_core::sync::WriteGuard;
use uhmm_sys::host::LinuxHost;
use uhmm_sys::limits::MoreFiles;
use uhmm_sys::memfd::Memfd;
use uhmm_sys::uffd::Uffd;

use crate::process::{self, Agent, THREADS};
use crate::start;

/// The number of the fork under way; [`NONE`], or [`ADOPTING`] while mappings are registered, which must not
/// happen while a fork copies them.
static COOKIE: AtomicU64 = AtomicU64::new(NONE);
const NONE: u64 = 0;
const ADOPTING: u64 = 1;
/// Whether any mapping is registered: a fork raises an event only then.
static ADOPTED: AtomicBool = AtomicBool::new(false);
/// Forks of this process, and of its ancestors before they had this process.
static FORKS: AtomicU64 = AtomicU64::new(0);

fn new_cookie() -> u64 {
    let pid = rustix::process::getpid().as_raw_nonzero().get() as u64;
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let number = FORKS.fetch_add(1, Ordering::Relaxed);
    // Unique in the tree: two processes differ in number, two forks of one in time or count.
    (pid << 40 ^ (time.tv_sec as u64) << 30 ^ time.tv_nsec as u64 ^ number << 20) | 2
}

fn enter(cookie: u64) {
    while COOKIE.compare_exchange(NONE, cookie, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        rustix::thread::sched_yield();
    }
}

/// Keeps forks out while mappings are registered.
pub struct Adopting(());

impl Adopting {
    /// Waits for a fork under way. From now on forks raise events; the caller registers something that is
    /// inherited before anything else.
    pub fn begin() -> Self {
        enter(ADOPTING);
        ADOPTED.store(true, Ordering::Release);
        Self(())
    }
}

impl Drop for Adopting {
    fn drop(&mut self) {
        COOKIE.store(NONE, Ordering::Release);
    }
}

/// What the evictor does: with [`IDLE`] and [`RUNNING`] its work; where a fork raises no event, the forking thread
/// sets [`WANTED`], the evictor brings every page home and says [`HOME`], and nothing leaves until it is idle
/// again. The forking thread cannot do that itself: the agent's files are not in its table.
static EVICTION: AtomicU32 = AtomicU32::new(IDLE);
const IDLE: u32 = 0;
const RUNNING: u32 = 1;
const WANTED: u32 = 2;
const HOME: u32 = 3;

/// A cycle of the evictor, during which no fork stops it.
pub struct Evicting(());

impl Evicting {
    /// Waits until no fork needs the pages at home; brings them there for one that does.
    pub fn begin(agent: &Agent) -> Self {
        loop {
            match EVICTION.compare_exchange(IDLE, RUNNING, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Self(()),
                Err(WANTED) => {
                    bring_home(agent);
                    EVICTION.store(HOME, Ordering::Release);
                }
                Err(_) => rustix::thread::sched_yield(),
            }
        }
    }
}

impl Drop for Evicting {
    fn drop(&mut self) {
        EVICTION.store(IDLE, Ordering::Release);
    }
}

/// Brings every page home, where it stays until eviction goes on.
fn bring_home(agent: &Agent) {
    let mm = agent.managed.mm();
    let Ok((mut scratch, _buffer)) = Managed::scratch() else { process::die() };
    mm.set_allowance(USER_PAGES);
    for extent in agent.table.data_extents() {
        let first = extent.start as usize / size_of::<u64>();
        let end = (extent.end as usize / size_of::<u64>()).min(USER_PAGES.get());
        let Some(range) = VaRange::of_pages(Vpn::new(first), PageCount::new(end.saturating_sub(first)))
        else {
            continue;
        };
        while agent.managed.is_away(range) {
            // The handlers read events and settle what is in flight meanwhile.
            if mm.prefetch(range, &mut scratch).is_zero() {
                rustix::thread::sched_yield();
            }
        }
    }
}

/// Before the fork, in the forking thread. Forks through the C library are serialised here.
pub extern "C" fn prepare() {
    let Some(agent) = Agent::get() else { return };
    if !agent.reports_forks() {
        // Before the cookie, for which a cycle may be waiting.
        while EVICTION.compare_exchange(IDLE, WANTED, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            rustix::thread::sched_yield();
        }
        agent.managed.kick();
    }
    enter(new_cookie());
    while EVICTION.load(Ordering::Acquire) == WANTED {
        rustix::thread::sched_yield();
    }
}

/// After the fork, in the parent.
pub extern "C" fn parent() {
    if let Some(agent) = Agent::get() {
        if !agent.reports_forks() {
            EVICTION.store(IDLE, Ordering::Release);
        }
        // Reading the event lets the fork go on. The handler that read it holds the layout lock until it has
        // handed the child over, for which it needs the cookie, and this process alive.
        agent.managed.mm().wait_for_events();
        COOKIE.store(NONE, Ordering::Release);
    }
}

/// After the fork, in the child.
pub extern "C" fn child() {
    let Some(parents) = Agent::take_parents() else { return };
    let cookie = COOKIE.swap(NONE, Ordering::AcqRel);
    // Without anything registered the child is as fresh as if it had been executed; and so it is where the
    // kernel did not pass the registrations on.
    let inherits = ADOPTED.load(Ordering::Acquire) && parents.reports_forks();
    ADOPTED.store(inherits, Ordering::Release);
    EVICTION.store(IDLE, Ordering::Release);
    let cookie = if inherits { cookie } else { 0 };
    // SAFETY: the child of a fork has one thread, this one, and it is not in the heap.
    unsafe { crate::HEAP.renew() };
    // SAFETY: as above; no handler of the parent exists here.
    unsafe { THREADS.forget_all() };
    // SAFETY: as above. The agent's memory is never used again.
    unsafe { std::ptr::read(&raw const parents.managed).abandon() };
    if let Err(error) = start::start(cookie) {
        start::complain(&error);
        if cookie == 0 || error.is_looked_after() {
            // Nothing is lost: it runs as it would without us.
            return;
        }
        process::die();
    }
    // SAFETY: the thread's key was set when it started, and its destructor forgets the thread.
    unsafe { THREADS.register_current() };
    if let Some(agent) = Agent::get() {
        agent.pin_thread_block();
    }
}

/// In a handler that has read the event of a fork: hands the child over to the keeper.
pub fn announce(agent: &Agent, managed: &Managed, layout: &WriteGuard<'_, LinuxHost>, child: &Uffd) {
    let cookie = match COOKIE.load(Ordering::Acquire) {
        NONE | ADOPTING => new_cookie(),
        cookie => cookie,
    };
    if let Some(table) = copy_table(agent, managed, layout, child) {
        // Where this fails the child asks for it in vain and ends: nobody reads zeros for its contents.
        let _ = client::announce(&agent.keeper.lock(), cookie, child, table.fd());
    }
}

/// The child's page table, with a reference for each device page in it.
fn copy_table(
    agent: &Agent,
    managed: &Managed,
    layout: &WriteGuard<'_, LinuxHost>,
    child: &Uffd,
) -> Option<Memfd> {
    let mm = managed.mm();
    let create = || Memfd::create("uhmm-table", TABLE_BYTES as u64, None);
    // A program that forks may have left itself no room for another file.
    let memfd = create().or_else(|_| {
        let _more = MoreFiles::allow();
        create()
    });
    let memfd = memfd.ok()?;
    let mapping = memfd.map().ok();
    // A program that limits its address space leaves no room to map a table: word by word then.
    let file = match mapping {
        Some(_) => None,
        None => Some(Table::adopt(memfd.fd().try_clone_to_owned().ok()?).ok()?),
    };
    let table = mapping.as_ref().map(|mapping| {
        let words = mapping.as_ptr().cast::<u64>();
        // SAFETY: the mapping has room for the bits behind the words, and is used as a table only.
        unsafe { PageTable::over(words, words.add(USER_PAGES.get()), Vpn::new(0), USER_PAGES) }
    });
    for extent in agent.table.data_extents() {
        let first = extent.start as usize / size_of::<u64>();
        let end = (extent.end as usize / size_of::<u64>()).min(USER_PAGES.get());
        for chunk in (first..end).step_by(CHUNK_PAGES) {
            for page in (chunk..(chunk + CHUNK_PAGES).min(end)).map(Vpn::new) {
                let word = mm.word_for_child(layout, page, |page, slot| copy_to(child, page, slot));
                match (&table, &file) {
                    _ if word == PageWord::EMPTY => {}
                    (Some(table), _) => table.entry(page).store(word),
                    (None, file) => file.as_ref()?.store(page, word).ok()?,
                }
            }
        }
    }
    drop(mapping);
    Some(memfd)
}

/// Copies a staged page to the child.
fn copy_to(child: &Uffd, page: Vpn, slot: uhmm_addr::VirtAddr) {
    let Some(source) = NonNull::new(slot.get() as *mut u8) else { return };
    let range = VaRange::page(page);
    loop {
        // SAFETY: slots are memory of ours; an empty one makes the call fail.
        let progress = unsafe { child.copy(range, source, Install::Writable, true) };
        if progress.stop != Stop::Pending {
            return;
        }
        std::hint::spin_loop();
    }
}
