//! First phase: claim the words of consecutive pages that may leave.

use alloc::vec::Vec;

use uhmm_addr::{PageCount, VaRange, Vpn};

use crate::frame::{Empty, Framed, Run};
use crate::host::Host;
use crate::mm::{Epoch, Mm};
use crate::notifier::{Event, Owner};
use crate::pagetable::reuse::{GROUP, laps};
use crate::pagetable::{Kind, PageWord, State};
use crate::stats::{Skip, Skipped};
use crate::sync::ReadGuard;

use super::BATCH;

/// Which pages to move.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Select {
    /// Every page in RAM.
    All,
    /// Pages in RAM that a clock on its `lap`th lap is to try. The sooner pages are expected back once they are away,
    /// the more laps it passes over them ([`reuse`](crate::pagetable::reuse)).
    Cold {
        /// Laps of the clock so far.
        lap: u32,
    },
}

/// Consecutive pages whose words are claimed, with empty slots to put them in.
#[must_use]
#[derive(Debug)]
pub struct Collected<'m, H: Host> {
    pub(super) mm: &'m Mm<H>,
    pub(super) range: VaRange,
    pub(super) run: Option<Run<'m, Empty, H>>,
    pub(super) layout: Option<ReadGuard<'m, H>>,
    /// What is told before the pages go, and whose doing it is.
    pub(super) event: Event,
    pub(super) by: Option<Owner>,
    /// Whether a page of zeros is copied where it cannot be moved: it is worth no copy to who only makes room.
    pub(super) zeros: bool,
    /// Room for every run that the next phase may find, made before the layout lock was taken: a thread that
    /// forks holds the allocator's locks until its event is read, which takes the layout lock.
    pub(super) runs: Vec<Run<'m, Framed, H>>,
}

impl<H: Host> Mm<H> {
    /// Whether `page` is to be tried.
    pub(super) fn takes(&self, select: Select, page: Vpn) -> bool {
        let Select::Cold { lap } = select else { return true };
        let group = VaRange::page(page.back(PageCount::new(page.get() % GROUP))).grow(PageCount::new(GROUP));
        let now = self.age();
        let laps = laps(self.table.words(group).map(|word| word.distance(now)).sum());
        // The group's number spreads the tries of equally hot ones over the laps.
        ((page.get() / GROUP) as u32).wrapping_add(lap).is_multiple_of(laps)
    }

    /// Claims the first pages of `range` that may leave, as many as lie side by side, up to a batch.
    /// `since` is a moment before which `range` is known to have been registered ([`Mm::epoch`]); pages whose
    /// mapping changed after it are passed over. Returns them, and how many pages of `range` were looked at: the
    /// caller goes on behind those.
    pub fn collect(
        &self,
        range: VaRange,
        since: Epoch,
        select: Select,
        skipped: &mut Skipped,
    ) -> (Option<Collected<'_, H>>, PageCount) {
        self.settle_pins(range);
        if self.arena.free_slots(&self.host).is_zero() {
            // Every slot has a frame that nobody needs: copies were installed, which take frames of their own.
            self.release_frames(BATCH);
        }
        let runs = Vec::with_capacity(range.pages().at_most(BATCH).get().div_ceil(2));
        let layout = self.layout.read(&self.host);
        if self.changed_since(since, range) {
            skipped.add(Skip::Changed, range.pages().get());
            return (None, range.pages());
        }
        let mut passed = 0;
        for page in range.iter() {
            let Some(reason) = self.refuses(page, select) else { break };
            skipped.add(reason, 1);
            passed += 1;
        }
        let passed = PageCount::new(passed);
        let Some(rest) = range.skip(passed) else { return (None, passed) };
        let Some(run) = self.arena.take_empty(&self.host, rest.pages().at_most(BATCH)) else {
            skipped.add(Skip::NoFrame, rest.pages().get());
            return (None, range.pages());
        };
        let mut claimed = 0;
        for (page, slot) in rest.iter().zip(run.slots()) {
            let entry = self.table.entry(page);
            let word = entry.load();
            // The first one was found willing above; if it changed its mind, the caller comes back to it.
            if !word.may_leave() || !self.takes(select, page) {
                break;
            }
            self.arena.note(slot, page, word.pfn());
            if entry.exchange(word, PageWord::moving_out(slot).reused_like(word)).is_err() {
                break;
            }
            claimed += 1;
        }
        let claimed = PageCount::new(claimed);
        let Some(claimed_range) = VaRange::of_pages(rest.first(), claimed) else {
            return (None, passed);
        };
        let (run, _unused) = run.split(claimed);
        let collected = Collected {
            mm: self,
            range: claimed_range,
            run,
            layout: Some(layout),
            event: Event::Migrate,
            by: None,
            zeros: false,
            runs,
        };
        (Some(collected), passed.plus(claimed))
    }

    fn refuses(&self, page: Vpn, select: Select) -> Option<Skip> {
        let entry = self.table.entry(page);
        let mut word = entry.load();
        // These claims end under the hold of the layout lock under which they began, beside ours: a thread may
        // have been woken by the kernel a moment before its page's word says that it is there.
        while matches!(word.kind(), Some(Kind::Fill | Kind::Back)) {
            self.wait_in_flight(page);
            word = entry.load();
        }
        if word.may_leave() {
            return (!self.takes(select, page)).then_some(Skip::Hot);
        }
        Some(match word.state() {
            _ if word.is_pinned() => Skip::Pinned,
            _ if word.is_discarded() => Skip::Discarded,
            State::Poisoned => Skip::Failed,
            State::Exclusive => Skip::Exclusive,
            _ => Skip::Elsewhere,
        })
    }

    /// The word of a page whose move out was given up: in RAM, perhaps with its copy on a device.
    pub(super) fn word_at_home(&self, slot: crate::frame::Slot) -> PageWord {
        let (arena, slot) = self.arena_of(slot);
        arena.take_copy(slot).map_or(PageWord::EMPTY, PageWord::tracked)
    }

    /// Gives the claim on `page`, which never left, up.
    pub(super) fn leave_at_home(&self, page: Vpn, slot: crate::frame::Slot) {
        let word = self.word_at_home(slot);
        let left = self.table.entry(page).leave(word);
        if left.discarded {
            self.free(word);
        }
        self.after_leave(page, left.wake);
    }
}

impl<H: Host> Collected<'_, H> {
    /// The same, as the doing of `owner`, whose driver brings its own mirrors up to date and passes over what it
    /// is told of this migration.
    pub fn by(mut self, owner: Option<Owner>) -> Self {
        self.by = owner;
        self
    }

    /// The same, and pages of zeros are copied where they cannot be moved, as `copy` says.
    pub fn zeros(mut self, copy: bool) -> Self {
        self.zeros = copy;
        self
    }

    /// The same, told as what it is for: to be lent ([`Isolated::lend`](super::Isolated::lend)).
    pub(super) fn for_loan(mut self) -> Self {
        self.event = Event::Exclusive;
        self
    }
}

impl<H: Host> Drop for Collected<'_, H> {
    fn drop(&mut self) {
        if let Some(run) = self.run.take() {
            for (page, slot) in self.range.iter().zip(run.slots()) {
                self.mm.leave_at_home(page, slot);
            }
        }
    }
}
