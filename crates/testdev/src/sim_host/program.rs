//! The program under management, and the thread that reads its events.

use std::cell::RefCell;
use std::sync::Arc;

use uhmm_addr::{PageCount, VaRange, Vpn};
use uhmm_core::fault::{Fault, Resolution, Scratch};
use uhmm_core::mm::Mm;

use super::memory::Memory;
use super::{Event, SimHost, Trap};

/// Attempts of a touch before the program is said to be stuck.
const ATTEMPTS: usize = 100;

/// The same of waits, of a millisecond at the most, for a page that another thread moves: how long that takes is for
/// the machine to say, which may be busy.
const WAITS: usize = 20_000;

/// Reads every event that waits and applies it, as an engine does.
pub fn deliver(mm: &Mm<SimHost>) {
    let layout = mm.lock_layout();
    while let Some(event) = mm.host().next_event() {
        match event {
            Event::Remove(range) => mm.removed(&layout, range),
            Event::Unmap(range) => mm.unmapped(&layout, range),
            Event::Remap(from, to) => mm.remapped(&layout, from, to),
        }
    }
}

/// Why a touch did not succeed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Killed {
    /// SIGBUS: the contents are lost.
    Bus,
    /// SIGSEGV.
    Segv,
    /// The fault came back again and again, or another thread never had done with the page.
    Stuck,
}

/// A thread of the program.
pub struct Program {
    mm: Arc<Mm<SimHost>>,
    scratch: RefCell<Scratch>,
    // What the scratch copies through; dropped after it.
    _buffer: Memory,
}

impl Program {
    /// A thread that touches the memory of `mm`.
    pub fn new(mm: Arc<Mm<SimHost>>) -> Self {
        let buffer = Memory::new(PageCount::in_bytes(Scratch::BUFFER_BYTES));
        // SAFETY: the buffer is page-aligned, long enough, zero, and kept beside the scratch.
        let scratch = unsafe { Scratch::new(buffer.base()) };
        Self { mm, scratch: RefCell::new(scratch), _buffer: buffer }
    }

    /// Reads the value of `page`.
    pub fn load(&self, page: Vpn) -> Result<u64, Killed> {
        self.touch(page, || self.mm.host().load(page))
    }

    /// Makes `page` say `value`.
    pub fn store(&self, page: Vpn, value: u64) -> Result<(), Killed> {
        self.touch(page, || self.mm.host().store(page, value))
    }

    fn touch<T>(&self, page: Vpn, attempt: impl Fn() -> Result<T, Trap>) -> Result<T, Killed> {
        let (mut attempts, mut waits) = (0, 0);
        while attempts < ATTEMPTS && waits < WAITS {
            let access = match attempt() {
                Ok(value) => return Ok(value),
                Err(Trap::Bus) => return Err(Killed::Bus),
                Err(Trap::Segv) => return Err(Killed::Segv),
                Err(Trap::Fault(access)) => access,
            };
            match self.resolve(Fault { addr: page.base(), access, ours: false }) {
                Resolution::Resolved(_) => {}
                Resolution::Pending => deliver(&self.mm),
                Resolution::InFlight => {
                    self.mm.wait_in_flight(page);
                    waits += 1;
                    continue;
                }
                Resolution::Starved => self.mm.grant(PageCount::new(64)),
                Resolution::Poisoned(_) => {}
                Resolution::Unmanaged => return Err(Killed::Segv),
            }
            attempts += 1;
        }
        Err(Killed::Stuck)
    }

    /// Hands a fault in, once.
    pub fn resolve(&self, fault: Fault) -> Resolution {
        self.mm.resolve(fault, &mut self.scratch.borrow_mut())
    }

    /// Brings `range` home ahead of any touch.
    pub fn prefetch(&self, range: VaRange) -> PageCount {
        self.mm.prefetch(range, &mut self.scratch.borrow_mut())
    }

    /// Lends the thread's working memory.
    pub fn with_scratch<R>(&self, work: impl FnOnce(&mut Scratch) -> R) -> R {
        work(&mut self.scratch.borrow_mut())
    }

    /// `madvise(MADV_DONTNEED)`.
    pub fn dontneed(&self, range: VaRange) {
        self.mm.host().announce_removal(range);
        deliver(&self.mm);
        self.mm.host().zap(range);
        self.mm.removal_done(range);
    }

    /// `munmap`.
    pub fn unmap(&self, range: VaRange) {
        self.mm.host().unmap(range);
        deliver(&self.mm);
    }

    /// `mremap`.
    pub fn remap(&self, from: VaRange, to: Vpn) {
        self.mm.host().remap(from, to);
        deliver(&self.mm);
    }
}
