//! The state of this process, and what its handler threads are told to do.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use uhmm::engine::threads::{Crew, Hooks};
use uhmm::managed::Managed;
use uhmm::tree::client;
use uhmm::tree::protocol::Farewell;
use uhmm::tree::shared::ProcessBlock;
use uhmm_addr::PageCount;
use uhmm_core::pagemap::Pagemap;
use uhmm_core::sync::WriteGuard;
use uhmm_sys::futex::Lock;
use uhmm_sys::host::LinuxHost;
use uhmm_sys::memfd::Memfd;
use uhmm_sys::placement::ThreadCpu;
use uhmm_sys::socket::Connection;
use uhmm_sys::uffd::{Features, Uffd};

use crate::fork;

/// A program whose growth finds neither memory nor device gets so long before it gets what a program without
/// memory gets.
const FULL_PATIENCE: Duration = Duration::from_secs(3);

/// Faults that the first handler answers by itself before others are worth being started.
const ALONE: u32 = 16;

/// Where the program's threads run.
pub static THREADS: ThreadCpu = ThreadCpu::new();

static AGENT: AtomicPtr<Agent> = AtomicPtr::new(ptr::null_mut());

/// A process under management.
pub struct Agent {
    pub managed: Arc<Managed>,
    pub pagemap: Arc<Pagemap>,
    pub crew: Crew,
    pub budget: PageCount,
    pub block: &'static ProcessBlock,
    pub keeper: Lock<Connection>,
    pub table: Memfd,
    /// The device had no room when last asked.
    pub full: AtomicBool,
    /// Answered so far, as far as [`ALONE`].
    pub faults: AtomicU32,
}

impl Agent {
    /// This process's agent, if it has one.
    pub fn get() -> Option<&'static Self> {
        // SAFETY: only ever set to leaked agents (`publish`).
        unsafe { AGENT.load(Ordering::Acquire).as_ref() }
    }

    /// Makes the agent known; it lives as long as the process.
    pub fn publish(self) -> &'static Self {
        let agent = Box::leak(Box::new(self));
        AGENT.store(agent, Ordering::Release);
        agent
    }

    /// Forgets the parent's agent, in the child of a fork.
    pub fn take_parents() -> Option<&'static Self> {
        // SAFETY: as in `get`; the memory is the child's copy.
        unsafe { AGENT.swap(ptr::null_mut(), Ordering::AcqRel).as_ref() }
    }

    /// Whether a fork of this process raises an event.
    pub fn reports_forks(&self) -> bool {
        self.managed.mm().host().program().features().contains(Features::EVENT_FORK)
    }

    /// Whether there have been faults enough for threads that make them cheaper.
    pub fn wants_help(&self) -> bool {
        self.faults.load(Ordering::Relaxed) >= ALONE
    }

    /// Keeps the calling thread's block in RAM: handlers read there where the thread runs, and the kernel
    /// writes there when it exits, at a time when nobody could resolve a fault any more.
    pub fn pin_thread_block(&self) {
        let block = uhmm_sys::placement::thread_block();
        self.managed.mm().set_pinned(block, true);
        for page in block.iter() {
            // SAFETY: the block is the calling thread's own, mapped as long as it lives.
            let _ = unsafe { ptr::read_volatile(page.base().get() as *const u8) };
        }
    }

    /// Ends the process as the kernel ends one for which there is no memory.
    fn out_of_memory(&self) -> ! {
        self.block.out_of_memory.store(1, Ordering::Relaxed);
        let _ = client::farewell(&self.keeper.lock(), Farewell::DeviceFull);
        die()
    }
}

/// Kills this process.
pub fn die() -> ! {
    loop {
        let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    }
}

impl Hooks for Agent {
    fn forked(&self, managed: &Managed, layout: &WriteGuard<'_, LinuxHost>, child: Uffd) {
        fork::announce(self, managed, layout, &child);
    }

    fn starved(&self, managed: &Managed, waited: Duration) {
        if self.full.load(Ordering::Relaxed) && waited > FULL_PATIENCE {
            self.out_of_memory();
        }
        let nap = Duration::from_millis(1);
        managed.wait_for_room(nap);
    }

    fn resolved(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.block.latency.record(ns);
        self.block.waiting_ns.fetch_add(ns, Ordering::Relaxed);
        if !self.wants_help() {
            self.faults.fetch_add(1, Ordering::Relaxed);
        }
    }
}
