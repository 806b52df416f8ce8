//! Which addresses are whose: for the handler of SIGBUS.
//!
//! What     [`Table`] and [`Entered`], the register of mapped parts, and the devices' one, [`PARTS`]; and its handler,
//!          which answers faults where the thread that touches shall do so itself, and says of pages that are lost how
//!          many bytes went with them.
//! Why      a signal handler may take no lock and allocate nothing, and has only an address.
//! Owns     a table of [`CAPACITY`] entries, without locks. An entry keeps its part alive.
//! Order    `start` is 0 while an entry is free and 1 while it changes. A reader takes `end` and the part between two
//!          looks at `start`. Whoever frees an entry knows that no thread touches its addresses any more, and another
//!          one that has an entry at the same time has other addresses: so whoever finds his own address between
//!          `start` and `end` has found his own part.
//! Fails    entering, when the table is full.

use std::fmt;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicPtr, AtomicUsize};

use uhmm_addr::{VaRange, VirtAddr};
use uhmm_sys::signals::{FaultInfo, Handled, InstallError, SigbusChain};

use super::Faults;
use super::mapped::{Mapped, Outcome};

/// How many parts of devices may be mapped at a time in a process.
pub const CAPACITY: usize = 128;

const FREE: usize = 0;
const CHANGING: usize = 1;

struct Entry<T> {
    start: AtomicUsize,
    end: AtomicUsize,
    part: AtomicPtr<T>,
}

/// Parts of one kind.
pub(crate) struct Table<T>([Entry<T>; CAPACITY]);

/// The parts of devices.
pub(super) static PARTS: Table<Mapped> = Table::new();

/// A part whose faults are found. Dropped, they are not.
pub(crate) struct Entered<T: 'static> {
    table: &'static Table<T>,
    slot: usize,
    part: Arc<T>,
}

impl<T: fmt::Debug> fmt::Debug for Entered<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Entered").field(&self.part).finish()
    }
}

impl<T> Entered<T> {
    pub(crate) fn part(&self) -> &Arc<T> {
        &self.part
    }
}

impl<T> Drop for Entered<T> {
    fn drop(&mut self) {
        let entry = &self.table.0[self.slot];
        entry.start.store(CHANGING, SeqCst);
        entry.end.store(0, SeqCst);
        entry.part.store(ptr::null_mut(), SeqCst);
        entry.start.store(FREE, SeqCst);
    }
}

impl<T> Table<T> {
    pub(crate) const fn new() -> Self {
        Self(
            [const {
                Entry {
                    start: AtomicUsize::new(FREE),
                    end: AtomicUsize::new(0),
                    part: AtomicPtr::new(ptr::null_mut()),
                }
            }; CAPACITY],
        )
    }

    /// Has faults in `range`, the addresses of `part`, found.
    pub(crate) fn enter(&'static self, part: Arc<T>, range: VaRange) -> io::Result<Entered<T>> {
        let free = |entry: &Entry<T>| entry.start.compare_exchange(FREE, CHANGING, SeqCst, SeqCst).is_ok();
        let slot = self.0.iter().position(free);
        let slot = slot.ok_or_else(|| {
            let why = format!("{CAPACITY} parts are mapped already; unmap one");
            io::Error::new(io::ErrorKind::QuotaExceeded, why)
        })?;
        let entry = &self.0[slot];
        entry.part.store(Arc::as_ptr(&part).cast_mut(), SeqCst);
        entry.end.store(range.end().get(), SeqCst);
        entry.start.store(range.start().get(), SeqCst);
        Ok(Entered { table: self, slot, part })
    }

    /// Calls `with` for the part in which `addr` is, which the calling thread touches at this moment.
    pub(crate) fn find<R>(&self, addr: VirtAddr, with: impl FnOnce(&T) -> R) -> Option<R> {
        for entry in &self.0 {
            loop {
                let start = entry.start.load(SeqCst);
                if start <= CHANGING || addr.get() < start {
                    break;
                }
                let (end, part) = (entry.end.load(SeqCst), entry.part.load(SeqCst));
                if entry.start.load(SeqCst) != start {
                    continue;
                }
                if addr.get() >= end {
                    break;
                }
                // SAFETY: a thread touches `addr` now, so that its part is mapped and its entry is not freed; and no
                // other entry contains the address (see the header). The entry keeps the part.
                return unsafe { part.as_ref() }.map(with);
            }
        }
        None
    }
}

fn on_sigbus(addr: VirtAddr, fault: &FaultInfo) -> Handled {
    if !fault.synchronous {
        return Handled::NotOurs;
    }
    let answer = |part: &Mapped| {
        let outcome = match part.core.faults {
            Faults::Signal => part.resolve(addr),
            // The signal is the verdict: there is none for a page that is merely not mapped.
            _ => part.verdict(addr).unwrap_or(Outcome::Gone),
        };
        match outcome {
            Outcome::Present | Outcome::Busy => Handled::Ours,
            Outcome::Lost(order) => Handled::Poisoned(order),
            Outcome::Gone => Handled::NotOurs,
        }
    };
    PARTS.find(addr, answer).unwrap_or(Handled::NotOurs)
}

/// Puts the handler in front of the program's.
pub(super) fn install() -> Result<(), InstallError> {
    // SAFETY: the handler uses atomics and one system call; in debug builds it notes the reference that it takes in the
    // pagemap's ledger, whose lock no thread holds while it touches mapped memory. It never unwinds. It asks for another
    // try when the page is there, or is just being changed by another thread that will come to an end.
    unsafe { SigbusChain::install(on_sigbus) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_nobody_is_not_found() {
        assert_eq!(PARTS.find(VirtAddr::new(0x1234), |_| ()), None);
    }
}
