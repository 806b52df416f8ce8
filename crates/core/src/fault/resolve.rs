//! Carrying out what the decision table says: the loop; each action has a file of its own.
//!
//! Locks: the layout lock for reading around every call that takes a page out or puts one in, together
//! with the change of its word; never across a transfer of the device. A claim on the way *in* spans the
//! transfer; all other claims begin and end under one hold of the lock.

use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, VirtAddr, Vpn};

use super::decide::{Access, Action, decide};
use super::scratch::{MAX_WINDOW, Scratch};
use super::window::{Direction, Window};
use crate::device::TransferError;
use crate::host::{Host, Stop};
use crate::mm::Mm;
use crate::pagetable::{PageWord, State};
use crate::stats::Counter;

/// A fault, as an engine hands it in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The address that was touched.
    pub addr: VirtAddr,
    /// How.
    pub access: Access,
    /// Whether a thread of uhmm's own touched it (see [`decide`]).
    pub ours: bool,
}

/// What became of a fault, and what the engine does next.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolution {
    /// Done, and whoever waited was woken; the page came with this many in all.
    Resolved(PageCount),
    /// Another thread moves the page and wakes the faulter when it is done. A faulting thread that
    /// resolves its own fault calls [`Mm::wait_in_flight`] and touches the page again.
    InFlight,
    /// Events wait to be read: read and apply them, then resolve this fault again. It is not lost.
    Pending,
    /// No frame may be taken now: let the evictor free some, then resolve this fault again.
    Starved,
    /// The contents are lost for this reason; the thread gets SIGBUS.
    Poisoned(Option<TransferError>),
    /// The address is not under management: somebody else's fault.
    Unmanaged,
}

/// What one step of the loop found.
pub(super) enum Step {
    Done(Resolution),
    /// The word changed under us: look again.
    Again,
}

impl<H: Host> Mm<H> {
    /// Resolves `fault`.
    pub fn resolve(&self, fault: Fault, scratch: &mut Scratch) -> Resolution {
        let page = fault.addr.page();
        let Some(entry) = self.table.get(page) else { return Resolution::Unmanaged };
        loop {
            let word = entry.load();
            let step = match decide(fault.access, word, fault.ours) {
                Action::Fill if word.state() == State::Coherent && self.is_present(page) => {
                    self.host.wake(VaRange::page(page));
                    Step::Done(Resolution::Resolved(PageCount::ZERO))
                }
                Action::Fill => self.fill(page, word, fault.access, scratch),
                Action::Fetch if word.state() == State::Resident && self.is_present(page) => {
                    // The message of a second thread, which another one's transfer has answered.
                    self.host.wake(VaRange::page(page));
                    Step::Done(Resolution::Resolved(PageCount::ZERO))
                }
                Action::Fetch => {
                    let asked = self.windows.on_fault(page);
                    let tracked = fault.access == Access::Read && self.tracks(page);
                    match self.remap(page, word, PageCount::ONE) {
                        Some(step) => step,
                        None => self.fetch(page, word, asked, tracked, scratch),
                    }
                }
                Action::TakeBack => {
                    self.windows.passed(page);
                    self.take_back(page, word, fault.access)
                }
                Action::Lift => self.lift(page, word),
                Action::Wait => match entry.wait() {
                    Ok(()) => Step::Done(Resolution::InFlight),
                    Err(_) => Step::Again,
                },
                Action::Wake => {
                    self.host.wake(VaRange::page(page));
                    Step::Done(Resolution::Resolved(PageCount::ZERO))
                }
                Action::Poison => self.poison(page, None),
            };
            if let Step::Done(resolution) = step {
                if matches!(resolution, Resolution::Resolved(_)) {
                    self.stats.add(Counter::Faults, 1);
                }
                return resolution;
            }
        }
    }

    /// Brings home the pages of `range` that are on a device or lent to one, window by window, ahead of any fault; those
    /// of coherent devices are mapped where they are. Returns how many came; stops early when frames run out or events
    /// are pending.
    pub fn prefetch(&self, range: VaRange, scratch: &mut Scratch) -> PageCount {
        let mut home = PageCount::ZERO;
        let mut rest = Some(range);
        while let Some(part) = rest {
            let page = part.first();
            let word = self.table.entry(page).load();
            let mut step = PageCount::ONE;
            if matches!(word.state(), State::Device | State::Staged | State::Exclusive) {
                let room = PageCount::new(CHUNK_PAGES - page.in_chunk());
                let most = part.pages().at_most(room).at_most(MAX_WINDOW);
                let done = if let Some(step) = self.remap(page, word, most) {
                    step
                } else if word.state() == State::Device {
                    self.fetch_ahead(page, word, most, self.tracks(page), scratch)
                } else {
                    self.take_back(page, word, Access::Read)
                };
                match done {
                    Step::Done(Resolution::Resolved(pages)) => {
                        home = home.plus(pages);
                        step = pages.max(PageCount::ONE);
                    }
                    Step::Done(Resolution::InFlight | Resolution::Poisoned(_)) | Step::Again => {}
                    Step::Done(_) => return home,
                }
            }
            rest = part.skip(step);
        }
        home
    }

    /// Maps a page that is on a coherent device in place, and up to `most` with it. `None` where that cannot be: it is
    /// brought home then.
    fn remap(&self, page: Vpn, word: PageWord, most: PageCount) -> Option<Step> {
        if !self.is_mappable(word) {
            return None;
        }
        let progress = self.map_in_place(page, most, None);
        match progress.stop {
            _ if !progress.done.is_zero() => Some(Step::Done(Resolution::Resolved(progress.done))),
            Stop::Pending => Some(Step::Done(Resolution::Pending)),
            _ => None,
        }
    }

    /// Brings pages that nobody waits for home, up to `most` from `page` on.
    fn fetch_ahead(
        &self,
        page: Vpn,
        word: PageWord,
        most: PageCount,
        tracked: bool,
        scratch: &mut Scratch,
    ) -> Step {
        scratch.ahead = true;
        let asked = Window { pages: most, direction: Direction::Up };
        let done = self.fetch(page, word, asked, tracked, scratch);
        scratch.ahead = false;
        done
    }

    /// Brings pages home for good, with no page left on the device: up to `most` from `page` on, whose word is
    /// `word`. One that cannot be read stays where it is, and is not poisoned. `None` if the word had changed.
    pub(crate) fn fetch_now(
        &self,
        page: Vpn,
        word: PageWord,
        most: PageCount,
        scratch: &mut Scratch,
    ) -> Option<Resolution> {
        scratch.sparing = true;
        let done = self.fetch_ahead(page, word, most.at_most(MAX_WINDOW), false, scratch);
        scratch.sparing = false;
        match done {
            Step::Done(resolution) => Some(resolution),
            Step::Again => None,
        }
    }

    /// Gives a fault up that must not be answered with bytes: the page becomes poisoned.
    pub(super) fn poison(&self, page: Vpn, why: Option<TransferError>) -> Step {
        let progress = self.host.poison(VaRange::page(page));
        self.host.wake(VaRange::page(page));
        Step::Done(match progress.stop {
            Stop::Pending => Resolution::Pending,
            _ => Resolution::Poisoned(why),
        })
    }
}
