//! Waiting for a page in flight.
//!
//! What    [`Mm::wait_in_flight`], for threads that resolve their own faults and for those that need a word to
//!         settle; `wake`, for whoever had a claim that others waited for.
//! Races   the counter is read before the waited flag is left: a wake that comes before the sleep changes it, and
//!         there is no sleep. Counters are shared by hash: who wakes up too early looks again.
//! Locks   none. Nobody waits with the layout lock held for writing.
//! Fails   nothing here fails.

use uhmm_addr::{VaRange, Vpn};

use super::Mm;
use crate::host::Host;
use crate::sync::{AtomicU32, Ordering};

pub(super) const WAITERS: usize = 16;

impl<H: Host> Mm<H> {
    fn waiter(&self, page: Vpn) -> &AtomicU32 {
        &self.waiters[page.get() % WAITERS]
    }

    /// Sleeps until whoever moves `page` is done with it. For engines in which the faulting thread itself
    /// waits; may return early.
    pub fn wait_in_flight(&self, page: Vpn) {
        let waiter = self.waiter(page);
        let seen = waiter.load(Ordering::Acquire);
        if self.table.entry(page).wait().is_ok() {
            self.host.park(waiter, seen);
        }
    }

    /// Wakes whoever waits for `range`, in the kernel or parked here.
    pub(crate) fn wake(&self, range: VaRange) {
        self.host.wake(range);
        for page in range.iter().take(WAITERS) {
            let waiter = self.waiter(page);
            waiter.fetch_add(1, Ordering::Release);
            self.host.unpark(waiter);
        }
    }
}
