//! The evictor of a space with a limit.
//!
//! What    one thread, which runs a [`Governor`]; `SpaceGauge` tells it how much is in RAM.
//! Why     an exact count is a walk over every managed range. Between two of them the counters say what came and
//!         what went.
//! Policy  where nothing can be evicted the space grows beyond its limit, a little at a time: a library user's
//!         memory is not worth a process.
//! Owns    the thread is the space's, which joins it at its end. It is one of ours: it may touch managed memory
//!         under claims of its own.
//! Locks   none of its own.
//! Fails   only in the starting of the thread.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use uhmm_addr::{ByteSize, PageCount, Vpn};
use uhmm_core::stats::Counter;
use uhmm_sys::signals::Blocked;

use super::Inner;
use crate::managed::Managed;
use crate::reclaim::{Gauge, Governor, Outcome, Reclaimer};

impl Inner {
    pub(super) fn start_evictor(&mut self, limit: ByteSize) -> io::Result<()> {
        let managed = self.managed.clone();
        // A builder with a limit has refused to be without.
        let Some(device) = managed.mm().pagemaps().get(0) else { return Ok(()) };
        let reclaimer = Reclaimer::new(managed.clone(), device.clone()).before(self.nodes.clone());
        let gauge = SpaceGauge { managed: managed.clone(), counted: None };
        let mut governor = Governor::new(reclaimer, gauge, limit.pages());
        let thread = std::thread::Builder::new().name("uhmm-evict".into()).spawn(move || {
            let _blocked = Blocked::all();
            managed.note_ours();
            while !managed.mm().is_closed() {
                let seen = managed.kicks();
                let nap = match governor.cycle() {
                    Outcome::Room(nap) => nap,
                    // A library user's memory is not worth a process: the space grows beyond its limit.
                    Outcome::Stuck | Outcome::Full | Outcome::Failed => {
                        managed.mm().stop_growth(false);
                        managed.mm().grant(PageCount::new(64));
                        managed.announce_room();
                        // Not cut short by the next request: another look would take the grant back before
                        // anybody has used it.
                        std::thread::sleep(Duration::from_millis(1));
                        Duration::ZERO
                    }
                };
                managed.wait_for_kick(seen, nap);
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }
}

/// Counts what a space has in RAM: by the counters between two exact counts.
#[derive(Debug)]
struct SpaceGauge {
    managed: Arc<Managed>,
    counted: Option<(std::time::Instant, i64)>,
}

/// How long an estimate may drift before pages are counted again.
const RECOUNT: Duration = Duration::from_millis(100);

impl SpaceGauge {
    /// What the counters say came in, less what went out.
    fn balance(&self) -> i64 {
        let get = |counter| self.managed.mm().stats().get(counter) as i64;
        get(Counter::Filled) + get(Counter::MovedIn) + get(Counter::TakenBack) - get(Counter::MovedOut)
    }

    fn count(&self) -> PageCount {
        let mut pages = PageCount::ZERO;
        let mut at = Vpn::new(0);
        while let Some((range, _)) = self.managed.range_from(at) {
            // What a coherent device has is none of the budget's.
            let present = self.managed.present(range).minus(self.managed.mapped_in_place(range));
            pages = pages.plus(present);
            at = range.end_page();
        }
        pages
    }
}

impl Gauge for SpaceGauge {
    fn resident(&mut self) -> io::Result<PageCount> {
        let mm = self.managed.mm();
        let slots = mm.arena().range().pages().minus(mm.arena().free_slots(mm.host()));
        let offset = match self.counted {
            Some((when, offset)) if when.elapsed() < RECOUNT => offset,
            _ => {
                // Pages that came while others were counted may be missing from the count: the balance of
                // before then gives too much, which is evicted, instead of too little, which breaks the limit.
                let before = self.balance();
                let counted = self.count().get() as i64;
                let offset = counted - before.min(self.balance());
                self.counted = Some((std::time::Instant::now(), offset));
                offset
            }
        };
        let home = usize::try_from(self.balance() + offset).unwrap_or(0);
        Ok(PageCount::new(home).plus(slots))
    }

    fn adopt(&mut self) {}
}
