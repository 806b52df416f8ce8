//! What faults, handlers and the evictor tell each other about room and processors.

use std::sync::atomic::Ordering;
use std::time::Duration;

use uhmm_addr::PageCount;
use uhmm_sys::futex;

use super::Managed;

impl Managed {
    /// Says that faults that found no room may try again.
    pub fn announce_room(&self) {
        self.room.fetch_add(1, Ordering::Release);
        futex::wake(&self.room, u32::MAX);
    }

    /// Asks the evictor to look, and sleeps until it says that there is room, at most so long.
    pub fn wait_for_room(&self, most: Duration) {
        let seen = self.room.load(Ordering::Acquire);
        self.kick();
        let _ = futex::wait(&self.room, seen, Some(most));
    }

    /// Has the evictor asked to look when faults may take fewer than `pages` more.
    pub fn set_low_water(&self, pages: PageCount) {
        self.low.store(pages.get(), Ordering::Relaxed);
    }

    /// A handler on the processor `cpu` waits for a device again and again; or none does any more.
    pub fn note_busy(&self, cpu: Option<u32>) {
        let busy = cpu.map_or(0, |cpu| cpu + 1);
        if self.busy.load(Ordering::Relaxed) != busy {
            self.busy.store(busy, Ordering::Relaxed);
        }
    }

    /// The processor on which who works in the background would delay the answer to every fault.
    pub fn busy_cpu(&self) -> Option<u32> {
        self.busy.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Asks the evictor to look, if faults have taken most of what they may.
    pub fn kick_if_low(&self) {
        if self.mm.allowance().get() < self.low.load(Ordering::Relaxed) {
            self.kick();
        }
    }

    /// Asks the evictor to look.
    pub fn kick(&self) {
        self.kick.fetch_add(1, Ordering::Release);
        futex::wake(&self.kick, 1);
    }

    /// Sleeps until somebody asks the evictor to look, at most so long. `seen` is the number of requests
    /// that the evictor knows of.
    pub fn wait_for_kick(&self, seen: u32, most: Duration) {
        let _ = futex::wait(&self.kick, seen, Some(most));
    }

    /// The number of requests so far.
    pub fn kicks(&self) -> u32 {
        self.kick.load(Ordering::Acquire)
    }
}
