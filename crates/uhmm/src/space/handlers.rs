//! The handler threads of a space with the threads engine.
//!
//! What    the first handler, a pinned one for each processor where there are several, and the thread that keeps
//!         the faulter's processor out of its halt. `SpaceHooks` is what a space does beside the faults.
//! Owns    the threads are the space's, which joins them at its end.
//! Fork    a child has no engine of its own: the handler that reads the event gives it all of its pages, and
//!         [`Space::forks`] counts it.
//! Locks   none. No memory is under management while the threads start.
//! Fails   where the system has no thread or no memory for one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use uhmm_core::sync::WriteGuard;
use uhmm_sys::host::LinuxHost;
use uhmm_sys::placement::{self, ThreadCpu};
use uhmm_sys::signals::Blocked;
use uhmm_sys::uffd::Uffd;

use super::{Inner, Space};
use crate::engine::threads::{self, Crew, Hooks, Role};
use crate::managed::Managed;

static THREADS: ThreadCpu = ThreadCpu::new();

/// What a thread of a space does.
type Work = Box<dyn FnOnce(&Managed, &Crew) + Send>;

impl Inner {
    pub(super) fn start_handlers(&mut self) -> io::Result<()> {
        let crew = Arc::new(Crew::new(&THREADS));
        let cpus = placement::allowed_cpus()?;
        let pinned: Vec<Role> =
            if cpus.count() > 1 { cpus.iter().map(Role::Pinned).collect() } else { Vec::new() };
        // A thread that forks holds the allocator's locks until a handler has read its event, and a thread
        // allocates while it starts: no range is watched before every handler is there.
        let (ready, all_ready) = mpsc::channel();
        let mut start = |name: &str, work: Work| -> io::Result<()> {
            let (managed, crew, ready) = (self.managed.clone(), crew.clone(), ready.clone());
            let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
                // The program's signal handlers may touch managed memory; not on this thread.
                let _blocked = Blocked::all();
                drop(ready);
                work(&managed, &crew);
            })?;
            self.threads.push(thread);
            Ok(())
        };
        for role in std::iter::once(Role::First).chain(pinned) {
            let (mut scratch, buffer) = Managed::scratch()?;
            let name = if role == Role::First { "uhmm-handler" } else { "uhmm-pinned" };
            let work = move |managed: &Managed, crew: &Crew| {
                threads::serve(managed, crew, &SpaceHooks, role, &mut scratch);
                drop(buffer);
            };
            start(name, Box::new(work))?;
        }
        start("uhmm-awake", Box::new(threads::keep_awake))?;
        drop(ready);
        // Nothing is ever sent: the last thread that has started ends the wait.
        let _: Result<(), _> = all_ready.recv();
        self.crew = Some(crew);
        Ok(())
    }
}

/// A space's handlers have nobody to tell but the space's own counters.
struct SpaceHooks;

static FORKED: AtomicU64 = AtomicU64::new(0);

impl Hooks for SpaceHooks {
    fn forked(&self, managed: &Managed, layout: &WriteGuard<'_, LinuxHost>, child: Uffd) {
        // A child has no engine of its own: it gets its pages now.
        crate::child::populate(managed, layout, &child);
        FORKED.fetch_add(1, Ordering::Relaxed);
    }

    fn starved(&self, managed: &Managed, _waited: Duration) {
        managed.wait_for_room(Duration::from_millis(1));
    }

    fn resolved(&self, _took: Duration) {}
}

impl Space {
    /// Forks of the process so far whose children were given copies of all their managed pages. A child keeps
    /// its memory but not the space: what it holds stays in its RAM.
    pub fn forks() -> u64 {
        FORKED.load(Ordering::Relaxed)
    }
}
