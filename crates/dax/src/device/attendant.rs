//! The thread of a device.
//!
//! What     [`Attendant`], which reads the device's faults where no thread answers its own, and reads the labels anew
//!          when somebody changed them, so that pages that another process says are bad are taken away here as well.
//! Why      a system call that meets an absent page waits; only another thread can bring it.
//! Owns     a thread, which ends with this value, and keeps what it needs of the device until then. It touches no memory
//!          of any device.
//! Fails    starting. What fails later (the labels cannot be read) is left as it is until the next change.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use uhmm_addr::{VaRange, VirtAddr};
use uhmm_sys::signals::Blocked;
use uhmm_sys::uffd::{Event, EventBuffer, ReadOutcome, Uffd};
use uhmm_sys::watch::{Bell, Watch};

use super::mapped::Outcome;
use super::source::Source;
use super::{Core, Faults};

/// What has such a thread.
pub(crate) trait Attended: Send + Sync {
    /// Its name, and the store whose labels are to be followed.
    fn source(&self) -> &Source;
    /// Makes everything agree with the labels.
    fn follow_labels(&self);
    /// Where its faults are told, if this thread is to answer them.
    fn faults(&self) -> Option<&Arc<Uffd>>;
    /// Answers a fault.
    fn resolve(&self, addr: VirtAddr) -> Outcome;
}

impl Attended for Core {
    fn source(&self) -> &Source {
        &self.source
    }

    fn follow_labels(&self) {
        // The next change brings another try.
        let _ = Core::follow_labels(self);
    }

    fn faults(&self) -> Option<&Arc<Uffd>> {
        self.uffd.as_ref().filter(|_| self.faults == Faults::Threads)
    }

    fn resolve(&self, addr: VirtAddr) -> Outcome {
        self.part_at(addr).map_or(Outcome::Gone, |part| part.resolve(addr))
    }
}

/// The thread of a device.
#[derive(Debug)]
pub(crate) struct Attendant {
    bell: Arc<Bell>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Attendant {
    pub(crate) fn start(core: Arc<dyn Attended>) -> io::Result<Self> {
        let bell = Arc::new(Bell::new()?);
        let stop = Arc::new(AtomicBool::new(false));
        let mut watch = None;
        let source = core.source();
        if let Some((store, _)) = &source.store {
            store.tell(&bell);
            if store.medium().path().is_some() {
                watch = Some(Watch::new(source.file.as_fd())?);
            }
            // For what changed before anybody watched.
            bell.ring();
        }
        let name = source.name.clone();
        let rounds = Rounds { core, bell: bell.clone(), stop: stop.clone(), watch };
        let thread = thread::Builder::new().name(name);
        let thread = thread.spawn(move || rounds.go())?;
        Ok(Self { bell, stop, thread: Some(thread) })
    }
}

impl Drop for Attendant {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            // It has nothing that could panic; and if it has, there is nothing left to do.
            let _ = thread.join();
        }
    }
}

struct Rounds {
    core: Arc<dyn Attended>,
    bell: Arc<Bell>,
    stop: Arc<AtomicBool>,
    watch: Option<Watch>,
}

impl Rounds {
    fn go(&self) {
        let _blocked = Blocked::all();
        let mut events = EventBuffer::new();
        loop {
            let ready = self.wait();
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            let changed = self.watch.as_ref().is_some_and(Watch::changed);
            if self.bell.rang() || changed {
                self.core.follow_labels();
            }
            if ready {
                self.faults(&mut events);
            }
        }
    }

    /// Whether there are faults.
    fn wait(&self) -> bool {
        let mut fds = vec![PollFd::new(&*self.bell, PollFlags::IN)];
        fds.extend(self.watch.as_ref().map(|watch| PollFd::new(watch, PollFlags::IN)));
        fds.extend(self.core.faults().map(|uffd| PollFd::from_borrowed_fd(uffd.as_fd(), PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) => self.core.faults().is_some() && fds.last().is_some_and(|fd| !fd.revents().is_empty()),
            Err(errno) => {
                debug_assert!(errno == Errno::INTR, "{errno}");
                false
            }
        }
    }

    fn faults(&self, events: &mut EventBuffer) {
        let Some(uffd) = self.core.faults() else { return };
        while let ReadOutcome::Events(_) = uffd.read(events) {
            for event in &mut *events {
                let Event::Fault { addr, .. } = event else { continue };
                let outcome = self.core.resolve(addr);
                if outcome != Outcome::Present {
                    // What waits there looks once more, and finds SIGBUS or a page that was put back.
                    uffd.wake(VaRange::page(addr.page()));
                }
                if outcome == Outcome::Busy {
                    thread::yield_now();
                }
            }
        }
    }
}
