//! Off a device by its pages' numbers, wherever in the address space they belong (the kernel's
//! `migrate_device_range`): for a device that is given up, or memory of it that is needed otherwise.
//!
//! What    [`Mm::evict_pfns`] walks words, since a device page does not know who uses it, and sends each page whose
//!         device page lies in the range home or to another device. Pages in RAM whose copy lies there are
//!         parted from it.
//! Faults  a page that somebody just brings home or takes out is waited for, and looked at again: the handler of a
//!         fault is never in its own way, as in the kernel, where it says which page it holds (`fault_page`).
//! Others  other processes that share the device, and pages whose move to the device is not committed yet, are not
//!         seen: the caller stops the allocation ([`Pagemap::stop_allocation`]), and looks at what is
//!         [`live`](Pagemap::live) when all is done.
//! Locks   none while waiting.
//! Fails   page by page, with a reason; what cannot be moved stays where it is, with its contents.

use alloc::sync::Arc;
use alloc::vec::Vec;

use uhmm_addr::{PageCount, Pfn, PfnRange, VaRange, Vpn};

use super::Migrated;
use super::between::unmapped;
use crate::fault::{Resolution, Scratch};
use crate::host::{Host, Stop};
use crate::mm::Mm;
use crate::pagemap::Pagemap;
use crate::pagetable::{PageWord, State};
use crate::stats::Skip;

/// How often a page in flight is waited for, a millisecond at most each time.
const PATIENCE: usize = 1000;

/// What a word has to do with device pages that are to be given up.
enum Use {
    /// Nothing.
    None,
    /// The page is there.
    There(Pfn),
    /// The page is in RAM, its copy there.
    Copy,
    /// The page is in a slot, its copy there.
    StagedCopy,
    /// Somebody moves it.
    InFlight,
}

/// What one attempt at a page came to.
enum Step {
    /// So many pages from this one on need no further look.
    Done(PageCount),
    /// It may be possible yet; if not, for this reason.
    Again(Skip),
}

impl<H: Host> Mm<H> {
    /// Gives up the device pages `pages`, as far as addresses `within` use them: what is on them goes to `to`, or
    /// home. `moved` counts the pages that went, clean copies of pages in RAM included, which are only forgotten.
    pub fn evict_pfns(
        &self,
        within: VaRange,
        pages: PfnRange,
        to: Option<&Arc<Pagemap>>,
        scratch: &mut Scratch,
    ) -> Migrated {
        let mut result = Migrated::default();
        self.settle_pins(within);
        for part in self.table.used(within) {
            if let Some(to) = to {
                self.send_on(part, pages, to, scratch, &mut result);
            }
            let mut rest = Some(part);
            while let Some(part) = rest {
                rest = part.skip(self.evict_first(part, pages, to.is_some(), scratch, &mut result));
            }
        }
        self.stats.skip(&result.skipped);
        result
    }

    /// Moves the pages of `part` that are on `pages` to another device. Those that stay are counted.
    fn send_on(
        &self,
        part: VaRange,
        pages: PfnRange,
        to: &Arc<Pagemap>,
        scratch: &mut Scratch,
        result: &mut Migrated,
    ) {
        let mut held = Vec::with_capacity(part.pages().get());
        let leaves = |word: PageWord| matches!(self.use_of(word, pages), Use::There(_)) && !word.is_pinned();
        self.take_off_all(part, None, leaves);
        let layout = self.layout.read(&self.host);
        for page in part.iter() {
            let there = |word| match self.use_of(word, pages) {
                Use::There(pfn) => unmapped(word, pfn),
                _ => Err(Skip::Elsewhere),
            };
            held.extend(self.hold(page, there).map(|pfn| (page, pfn)));
        }
        drop(layout);
        self.move_held(&held, to, None, scratch, result);
        // There, and those that could not leave a coherent device.
        self.map_all_in_place(part, None);
    }

    /// Deals with the first page of `part`, and with those that come with it. Returns how many need no further look.
    fn evict_first(
        &self,
        part: VaRange,
        pages: PfnRange,
        sent_on: bool,
        scratch: &mut Scratch,
        result: &mut Migrated,
    ) -> PageCount {
        let mut why = Skip::Elsewhere;
        for _ in 0..PATIENCE {
            match self.try_evict(part, pages, sent_on, scratch, result) {
                Step::Done(pages) => return pages,
                Step::Again(reason) => why = reason,
            }
        }
        result.skipped.add(why, 1);
        PageCount::ONE
    }

    fn try_evict(
        &self,
        part: VaRange,
        pages: PfnRange,
        sent_on: bool,
        scratch: &mut Scratch,
        result: &mut Migrated,
    ) -> Step {
        let page = part.first();
        let word = self.table.entry(page).load();
        match self.use_of(word, pages) {
            Use::None => Step::Done(PageCount::ONE),
            Use::There(_) if word.state() == State::Coherent => {
                self.evict_mapped(part, pages, sent_on, result)
            }
            // What could not be sent on is counted already.
            Use::There(_) if sent_on => Step::Done(PageCount::ONE),
            Use::There(_) => {
                let there =
                    |page: &Vpn| matches!(self.use_of(self.table.entry(*page).load(), pages), Use::There(_));
                let most = PageCount::new(1 + part.iter().skip(1).take_while(there).count());
                self.bring_home(page, word, most, scratch, result)
            }
            // In the child of a fork, what the word calls a copy may be all that there is.
            Use::Copy if !self.is_present(page) => {
                self.bring_home(page, word, PageCount::ONE, scratch, result)
            }
            Use::Copy if self.drop_copy(page, word) => forgotten(result),
            Use::Copy => self.pause(Skip::Changed),
            Use::StagedCopy => match self.take_back_now(page, word) {
                Some(Resolution::Resolved(home)) if !home.is_zero() => forgotten(result),
                _ => self.pause(Skip::Changed),
            },
            Use::InFlight => {
                self.wait_in_flight(page);
                Step::Again(Skip::Elsewhere)
            }
        }
    }

    /// A page that is mapped in place is taken from the program, and looked at again.
    fn evict_mapped(&self, part: VaRange, pages: PfnRange, sent_on: bool, result: &mut Migrated) -> Step {
        let entry = self.table.entry(part.first());
        let word = entry.load();
        let there = |page: Vpn| matches!(self.use_of(self.table.entry(page).load(), pages), Use::There(_));
        let why = if word.is_pinned() {
            Skip::Pinned
        } else if sent_on {
            // It was tried.
            Skip::Busy
        } else {
            let most = PageCount::new(1 + part.iter().skip(1).take_while(|page| there(*page)).count());
            let progress = self.take_off(part.first(), most, None);
            match progress.stop {
                _ if !progress.done.is_zero() || entry.load() != word => return Step::Again(Skip::Raced),
                Stop::Pending => return self.pause(Skip::Changed),
                Stop::Busy => Skip::Busy,
                _ if self.take_off(part.first(), PageCount::ONE, None).done.is_zero() => Skip::Refused,
                _ => return Step::Again(Skip::Raced),
            }
        };
        result.skipped.add(why, 1);
        Step::Done(PageCount::ONE)
    }

    fn bring_home(
        &self,
        page: Vpn,
        word: PageWord,
        most: PageCount,
        scratch: &mut Scratch,
        result: &mut Migrated,
    ) -> Step {
        let why = match self.fetch_now(page, word, most, scratch) {
            Some(Resolution::Resolved(home)) if !home.is_zero() => {
                result.moved = result.moved.plus(home);
                return Step::Done(home);
            }
            // It could not be read, or its address is not ours to fill any more.
            Some(Resolution::Resolved(_)) if self.table.entry(page).load() == word => Skip::Failed,
            Some(Resolution::Starved) => Skip::NoFrame,
            Some(Resolution::Pending) => return self.pause(Skip::Changed),
            _ => return Step::Again(Skip::Raced),
        };
        result.skipped.add(why, 1);
        Step::Done(PageCount::ONE)
    }

    /// Lets whoever reads the events get on with it.
    fn pause(&self, why: Skip) -> Step {
        self.wait_for_events();
        crate::sync::relax();
        Step::Again(why)
    }

    fn use_of(&self, word: PageWord, pages: PfnRange) -> Use {
        let pfn = word.pfn().filter(|pfn| pages.contains(*pfn));
        let copy = || {
            let (arena, slot) = self.arena_of(word.slot()?);
            arena.copy_of(slot).filter(|copy| pages.contains(*copy))
        };
        match (word.state(), pfn) {
            (State::Resident, Some(_)) => Use::Copy,
            (State::Moving, Some(_)) => Use::InFlight,
            (_, Some(pfn)) => Use::There(pfn),
            (State::Staged, None) if copy().is_some() => {
                // Its owner is about to use the copy, or has put the page back.
                if word.is_writing() { Use::InFlight } else { Use::StagedCopy }
            }
            (State::Moving, None) if copy().is_some() => Use::InFlight,
            _ => Use::None,
        }
    }
}

fn forgotten(result: &mut Migrated) -> Step {
    result.moved = result.moved.plus(PageCount::ONE);
    Step::Done(PageCount::ONE)
}
