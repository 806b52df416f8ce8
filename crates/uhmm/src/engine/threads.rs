//! Handler threads: faults and events as messages.
//!
//! What    [`Crew`] is the state that the handlers of one address space share; [`serve`] is the life of one.
//! Events  come before faults: a batch is read under the layout lock, its events are applied, and only then
//!         its faults are looked at. A fault that meets an event which is still unread is kept, the events
//!         are read, and it is resolved again: it is never lost, and nobody spins on the ioctl.
//! Where   the cost of a fault is the wake-up of the handler and of the faulter, and the scheduler draws a thread
//!         that wakes up away from a processor on which its waker is just running, to one that must be woken first.
//!         The *first* handler therefore stays off the faulter's processor, looks for the next fault for a moment
//!         before it sleeps, and has the faulter's processor kept out of its halt
//!         (`haltpoll`). A faulter that is bound to one processor is drawn nowhere: the first handler binds itself
//!         there as well, and the two take turns. When several threads fault at once, *pinned* handlers, one a
//!         processor, join in until it is quiet again.
//! Rule    R7: no allocation, no standard locks, no thread-local storage (the agent's threads have none), no
//!         managed memory.
//! Fails   a fault that cannot be served for lack of memory waits; [`Hooks::starved`] is told how long.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::thread::nanosleep;
use uhmm_addr::VaRange;
use uhmm_core::fault::{Fault, Resolution, Scratch};
use uhmm_core::sync::WriteGuard;
use uhmm_sys::awake::Awake;
use uhmm_sys::clock::now;
use uhmm_sys::futex;
use uhmm_sys::host::LinuxHost;
use uhmm_sys::limits::MoreFiles;
use uhmm_sys::placement::{self, Binding, Cpus, ThreadCpu};
use uhmm_sys::uffd::{Event, EventBuffer, ReadOutcome, Uffd};

use super::haltpoll::{self, HaltPoll};
use crate::managed::Managed;

/// What the owner of the handlers has to say about some things.
pub trait Hooks: Sync {
    /// The program forked: `child` watches the child's memory, whose contents are still the parent's words
    /// (see [`Mm::word_for_child`](uhmm_core::mm::Mm::word_for_child)).
    fn forked(&self, managed: &Managed, layout: &WriteGuard<'_, LinuxHost>, child: Uffd);

    /// A fault has been waiting for room so long. May make room by other means, or not return.
    fn starved(&self, managed: &Managed, waited: Duration);

    /// A fault was resolved in this time.
    fn resolved(&self, took: Duration);
}

/// What a handler is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Serves alone most of the time.
    First,
    /// Helps on this processor while several threads fault.
    Pinned(u32),
}

/// What the handlers of one address space share.
pub struct Crew {
    /// Where the program's threads run.
    pub threads: &'static ThreadCpu,
    /// 1 while the pinned handlers serve as well.
    crowd: AtomicU32,
    halt: HaltPoll,
    /// Whether to look for the next fault for a moment before sleeping.
    awake: Awake,
}

/// Faults that one handler has in its hands.
const HANDS: usize = 2 * uhmm_sys::uffd::event::CAPACITY;
/// Batches with several faulters before the pinned handlers are called.
const CROWD: u32 = 4;
/// Faults of one thread for each time that it is asked where it may run.
const ASK: u32 = 64;
/// A wake-up that was left to another thread, and after which nothing happened for so long, is done again.
const LATE: Duration = Duration::from_micros(30);
/// A fault that took longer was answered by a device, for which the handler waited.
const DEVICE: Duration = Duration::from_micros(15);
/// Between two attempts to read where nobody says when there is something.
const BLIND: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000 };
const IDLE: Duration = Duration::from_millis(100);
const QUIET: Duration = Duration::from_millis(10);

#[derive(Clone, Copy)]
struct Held {
    fault: Fault,
    thread: u32,
    since: Duration,
}

impl Crew {
    /// A crew of handlers that are yet to start.
    pub const fn new(threads: &'static ThreadCpu) -> Self {
        Self { threads, crowd: AtomicU32::new(0), halt: HaltPoll::new(), awake: Awake::new() }
    }

    /// Lets pinned handlers that sleep notice that the space is closing.
    pub fn wake_all(&self) {
        self.crowd.store(1, Ordering::Release);
        futex::wake(&self.crowd, u32::MAX);
        self.halt.wake();
    }

    fn call(&self) {
        if self.crowd.swap(1, Ordering::AcqRel) == 0 {
            futex::wake(&self.crowd, u32::MAX);
        }
    }
}

/// Keeps the processor of who waits for a fault awake, until `managed` is closed. For a thread that does nothing
/// else: it loses its priority for good. See the module `haltpoll`.
pub fn keep_awake(managed: &Managed, crew: &Crew) {
    haltpoll::keep_awake(managed, &crew.halt);
}

/// Serves `managed` until it is closed.
pub fn serve(managed: &Managed, crew: &Crew, hooks: &dyn Hooks, role: Role, scratch: &mut Scratch) {
    let mut handler = Handler {
        managed,
        crew,
        hooks,
        held: [const { None }; HANDS],
        events: EventBuffer::new(),
        crowded: 0,
        last_thread: 0,
        last_took: Duration::ZERO,
        tie: Tie::new(),
    };
    if let Role::Pinned(cpu) = role {
        let _ = placement::set_affinity(cpu);
    }
    while !managed.mm().is_closed() {
        // Not with faults in hand: nobody else knows of them.
        if let Role::Pinned(_) = role
            && handler.is_idle()
            && crew.crowd.load(Ordering::Acquire) == 0
        {
            let _ = futex::wait(&crew.crowd, 0, Some(IDLE));
            continue;
        }
        let idle = if role == Role::First { IDLE } else { QUIET };
        if handler.is_idle() && !handler.wait(idle) {
            if role != Role::First {
                crew.crowd.store(0, Ordering::Release);
            }
            continue;
        }
        handler.read();
        handler.resolve_all(scratch);
        managed.kick_if_low();
        if role == Role::First {
            handler.note();
        }
    }
}

struct Handler<'a> {
    managed: &'a Managed,
    crew: &'a Crew,
    hooks: &'a dyn Hooks,
    held: [Option<Held>; HANDS],
    events: EventBuffer,
    crowded: u32,
    last_thread: u32,
    /// How long its fault took.
    last_took: Duration,
    tie: Tie,
}

/// Whether the handler is bound to the processor of a thread that is.
struct Tie {
    binding: Binding,
    to: Option<u32>,
    thread: u32,
    /// Faults of that thread in a row.
    streak: u32,
}

impl Tie {
    fn new() -> Self {
        Self { binding: Binding::of_current(), to: None, thread: 0, streak: 0 }
    }

    /// The handler has answered `thread`. Whether the two share a processor now.
    fn follow(&mut self, thread: u32) -> bool {
        self.streak = if self.thread == thread { self.streak.wrapping_add(1) } else { 0 };
        self.thread = thread;
        self.to = match self.streak {
            0 => None,
            // Asked for now and then: it costs a system call.
            streak if streak % ASK == 1 => placement::bound_to(thread),
            _ => self.to,
        };
        self.binding.bind(self.to.map(|cpu| Cpus::none().with(cpu)))
    }
}

impl Handler<'_> {
    fn is_idle(&self) -> bool {
        self.held.iter().all(Option::is_none)
    }

    /// Sleeps until a message comes; `false` if none does.
    fn wait(&self, most: Duration) -> bool {
        let uffd = self.managed.mm().host().program();
        let most = Timespec { tv_sec: most.as_secs() as i64, tv_nsec: i64::from(most.subsec_nanos()) };
        let mut fds = [PollFd::new(uffd, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let host = self.managed.mm().host();
        let start = now();
        let ready = || {
            if now().saturating_sub(start) > LATE {
                host.settle();
            }
            poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
        };
        if self.crew.awake.begin() && self.crew.awake.wait(ready) {
            return true;
        }
        host.settle();
        match poll(&mut fds, Some(&most)) {
            Ok(ready) => ready > 0,
            // A process that allows itself no descriptor may not ask about one; reading it needs no leave.
            Err(Errno::INVAL) => {
                let _ = nanosleep(&BLIND);
                true
            }
            Err(_) => false,
        }
    }

    /// Reads a batch: applies the events, keeps the faults.
    fn read(&mut self) {
        let mm = self.managed.mm();
        let layout = mm.lock_layout();
        let mut outcome = mm.host().program().read(&mut self.events);
        // Until the batch is done with: whoever takes care of a child needs descriptors as well.
        let more_files = (outcome == ReadOutcome::Failed(Errno::MFILE)).then(MoreFiles::allow);
        if more_files.is_some() {
            outcome = mm.host().program().read(&mut self.events);
        }
        if !matches!(outcome, ReadOutcome::Events(_)) {
            return;
        }
        let since = now();
        let mut slots = self.held.iter_mut().filter(|held| held.is_none());
        let mut first = None;
        for event in &mut self.events {
            match event {
                Event::Fault { addr, access, thread } => {
                    let thread = thread.unwrap_or(0);
                    if *first.get_or_insert(thread) != thread {
                        self.crowded += 1;
                    }
                    let ours = self.managed.is_ours(thread);
                    match slots.next() {
                        Some(slot) => {
                            *slot = Some(Held { fault: Fault { addr, access, ours }, thread, since });
                        }
                        // Hands full of faults that wait, perhaps for the very events behind this one: it is
                        // reported again.
                        None => mm.host().program().wake(VaRange::page(addr.page())),
                    }
                }
                Event::Remove(range) => mm.removed(&layout, range),
                Event::Unmap(range) => mm.unmapped(&layout, range),
                Event::Remap { from, to, len } => {
                    if let Some(from) = VaRange::covering(from, len) {
                        mm.remapped(&layout, from, to);
                    }
                }
                Event::Fork(child) => {
                    mm.forked(&layout, mm.table().range());
                    self.hooks.forked(self.managed, &layout, child);
                }
            }
        }
        drop(layout);
        if self.crowded >= CROWD {
            self.crowded = 0;
            self.crew.call();
        }
    }

    fn resolve_all(&mut self, scratch: &mut Scratch) {
        let mm = self.managed.mm();
        let mut starved = None;
        for slot in &mut self.held {
            let Some(held) = *slot else { continue };
            match mm.resolve(held.fault, scratch) {
                // Events first: the fault stays in our hands.
                Resolution::Pending => {}
                Resolution::Starved => {
                    let since = starved.get_or_insert(held.since);
                    *since = (*since).min(held.since);
                }
                Resolution::Resolved(_) | Resolution::InFlight => {
                    self.last_took = now().saturating_sub(held.since);
                    self.hooks.resolved(self.last_took);
                    self.last_thread = held.thread;
                    *slot = None;
                }
                Resolution::Poisoned(_) | Resolution::Unmanaged => *slot = None,
            }
        }
        if let Some(since) = starved {
            self.hooks.starved(self.managed, now().saturating_sub(since));
        } else if !self.is_idle() {
            // The thread whose event was read must get to run before anything can be resolved.
            rustix::thread::sched_yield();
        }
    }

    /// Follows the last faulter if it is bound to a processor, and tells where it runs otherwise.
    fn note(&mut self) {
        let Some(thread) = NonZeroU32::new(self.last_thread) else { return };
        if self.tie.follow(thread.get()) {
            self.managed.note_busy(None);
        } else {
            let storm = self.crew.halt.note(self.crew.threads.cpu_of(thread.get()), now());
            let busy = storm && self.last_took > DEVICE;
            self.managed.note_busy(busy.then(placement::current_cpu));
        }
    }
}
