//! Second phase: take the pages out of the program's address space, contents and all.

use alloc::vec::Vec;
use core::ptr::NonNull;

use uhmm_addr::{PageCount, VaRange, Vpn};

use super::collect::Collected;
use crate::frame::{Empty, Framed, Run, RunState, Slot};
use crate::host::{Host, Install, Sort, Stop, Unusual};
use crate::mm::Mm;
use crate::pagetable::PageWord;
use crate::stats::{Counter, Skip, Skipped};

/// After so many pages in a row that are busy, the rest of a batch is taken to be busy as well: after a
/// fork every page is, and asking for each costs a call.
const BUSY_IN_A_ROW: usize = 8;

/// Slots that hold pages taken out. Their words say staged and writing: a touch copies the page back and
/// leaves the slot to its owner.
#[must_use]
#[derive(Debug)]
pub struct Isolated<'m, H: Host> {
    pub(super) mm: &'m Mm<H>,
    pub(super) runs: Vec<Run<'m, Framed, H>>,
}

const fn reason(stop: Stop) -> Skip {
    match stop {
        Stop::Complete | Stop::Pending | Stop::Unmapped | Stop::Exiting => Skip::Changed,
        Stop::Busy => Skip::Busy,
        Stop::Hole => Skip::Hole,
        Stop::Refused => Skip::Refused,
        Stop::Present | Stop::NoMemory => Skip::NoFrame,
        Stop::Errno(_) => Skip::Failed,
    }
}

impl<'m, H: Host> Collected<'m, H> {
    /// Takes the pages out. Those that cannot be are given back and counted; `None` if that is all.
    pub fn isolate(mut self, skipped: &mut Skipped) -> Option<Isolated<'m, H>> {
        let mm = self.mm;
        let _told = mm.tell_by(self.range, self.event, self.by);
        let mut isolated = Isolated { mm, runs: core::mem::take(&mut self.runs) };
        let mut rest = self.run.take().map(|run| (self.range, run));
        let mut busy = 0;
        let mut at_once = self.range.pages();
        while let Some((range, run)) = rest.take() {
            let part = range.take(at_once);
            // SAFETY: the words of the range are claimed, the slots are the run's.
            let progress = unsafe { mm.host.isolate(part, run.address()) };
            let (moved, left) = run.split(progress.done);
            if let Some(run) = moved {
                busy = 0;
                isolated.add(range, run.filled());
            }
            let (Some(range), Some(run)) = (range.skip(progress.done), left) else { break };
            match progress.stop {
                Stop::Complete => {
                    rest = Some((range, run));
                    continue;
                }
                // The kernel refuses as a whole what several mappings hold: find where the first one ends.
                Stop::Refused if part.pages() > PageCount::ONE && mm.host.can_move() => {
                    at_once = PageCount::new(part.pages().minus(progress.done).get().div_ceil(2));
                    rest = Some((range, run));
                    continue;
                }
                Stop::Refused => {
                    let protected = mm.host.write_protect(range, true);
                    drop(self.layout.take());
                    mm.copy_out(range, run, (protected.done, self.zeros), &mut isolated, skipped);
                    break;
                }
                // A call that got part of the way does not say why it stopped; the next one does.
                Stop::Pending if !progress.done.is_zero() => {
                    rest = Some((range, run));
                    continue;
                }
                Stop::Busy if busy < BUSY_IN_A_ROW => busy += 1,
                Stop::Hole => {}
                stop => {
                    mm.stay(range, run, reason(stop), skipped);
                    break;
                }
            }
            let (one, left) = run.split(PageCount::ONE);
            if let Some(one) = one {
                mm.stay(range.take(PageCount::ONE), one, reason(progress.stop), skipped);
            }
            rest = range.skip(PageCount::ONE).zip(left);
        }
        // Before anything is given back to the allocator.
        drop(self.layout.take());
        (!isolated.runs.is_empty()).then_some(isolated)
    }
}

impl<'m, H: Host> Isolated<'m, H> {
    /// The frames of `range` are in `run` now.
    fn add(&mut self, range: VaRange, run: Run<'m, Framed, H>) {
        let mut discarded = PageCount::ZERO;
        for (page, slot) in range.iter().zip(run.slots()) {
            let entry = self.mm.table.entry(page);
            let left = entry.leave(PageWord::staged(slot).with_writing(true).reused_like(entry.load()));
            if left.discarded {
                discarded = discarded.plus(PageCount::ONE);
            }
            self.mm.after_leave(page, left.wake);
        }
        self.mm.stats.add(Counter::MovedOut, run.pages().minus(discarded).get());
        self.runs.push(run);
    }

    /// Every slot, in order.
    pub(super) fn slots(&self) -> impl Iterator<Item = Slot> {
        self.runs.iter().flat_map(Run::slots)
    }

    /// Leaves the pages in their slots, from where a touch takes them back, until [`Mm::write_back`] sends
    /// them on. Hands out every slot, oldest first.
    pub fn stage(mut self, mut queue: impl FnMut(Slot)) {
        for run in core::mem::take(&mut self.runs) {
            for slot in run.slots() {
                if self.mm.unclaim_slot(slot) { queue(slot) } else { self.mm.free_slot(slot) }
            }
            run.dissolve();
        }
    }
}

impl<H: Host> Drop for Isolated<'_, H> {
    fn drop(&mut self) {
        for run in core::mem::take(&mut self.runs) {
            for slot in run.slots() {
                if !self.mm.put_back(slot) {
                    self.mm.free_slot(slot);
                }
            }
            run.dissolve();
        }
    }
}

impl<H: Host> Mm<H> {
    /// Claimed pages that never left stay where they are.
    fn stay(&self, range: VaRange, run: Run<'_, Empty, H>, why: Skip, skipped: &mut Skipped) {
        skipped.add(why, range.pages().get());
        for (page, slot) in range.iter().zip(run.slots()) {
            self.leave_at_home(page, slot);
        }
    }

    /// The word of an owned slot whose word said staged and writing: what it says now, once it has come to
    /// rest. A faulter that copies out of the slot is waited for.
    pub(super) fn settled_word(&self, slot: Slot) -> (Vpn, PageWord) {
        loop {
            let (arena, index) = self.arena_of(slot);
            let page = arena.page_of(index);
            let word = self.table.get(page).map_or(PageWord::EMPTY, crate::pagetable::Entry::load);
            if word.kind().is_none() || word.slot() != Some(slot) {
                return (page, word);
            }
            self.wait_in_flight(page);
        }
    }

    /// Gives up the owner's hold on a staged slot. `false` if the page went home meanwhile: the slot is then
    /// the caller's.
    pub(super) fn unclaim_slot(&self, slot: Slot) -> bool {
        let _layout = self.layout.read(&self.host);
        loop {
            let (page, word) = self.settled_word(slot);
            if word.slot() != Some(slot) {
                return false;
            }
            if self.table.entry(page).exchange(word, word.with_writing(false)).is_ok() {
                return true;
            }
        }
    }

    /// Moves an isolated page back to where it came from, or failing that leaves it staged, where it is
    /// safe. `false` if it was home already: the slot is then the caller's.
    pub(super) fn put_back(&self, slot: Slot) -> bool {
        let staged = self.unclaim_slot(slot);
        if staged {
            let page = self.arena_of(slot).0.page_of(self.arena_of(slot).1);
            let word = self.table.entry(page).load();
            if word.slot() == Some(slot) {
                self.bring_back(page, word);
            }
        }
        staged
    }

    // --- the second way: copy out behind a write protection ------------------------------------------------

    /// Copies the claimed, write-protected pages of `range` (the first `protected`) into the slots of `run`
    /// and discards them; pages that are the page of zeros only if `zeros` says so. The layout lock is not held:
    /// the discard raises an event that somebody must read.
    fn copy_out<'m>(
        &'m self,
        range: VaRange,
        run: Run<'m, Empty, H>,
        (protected, zeros): (PageCount, bool),
        isolated: &mut Isolated<'m, H>,
        skipped: &mut Skipped,
    ) {
        let _one_at_a_time = self.copying.write(&self.host);
        let (run, unprotected) = run.split(protected);
        if let (Some(range), Some(run)) = (range.skip(protected), unprotected) {
            self.stay(range, run, Skip::Refused, skipped);
        }
        let mut found = [range; 16];
        let mut rest = VaRange::of_pages(range.first(), protected).zip(run);
        while let Some((range, run)) = rest.take() {
            let (count, end) =
                if zeros { self.there(range, &mut found) } else { self.host.present(range, &mut found) };
            let looked_at = end.since(range.first()).at_most(range.pages());
            let (run, left) = run.split(looked_at);
            rest = range.skip(looked_at).zip(left);
            let mut part = run.map(|run| (range.take(looked_at), run));
            for present in found[..count].chunk_by(|one, next| one.end_page() == next.first()) {
                let Some((range, run)) = part.take() else { break };
                let hole = present[0].first().since(range.first());
                let pages = present[present.len() - 1].end_page().since(present[0].first());
                let (holes, run) = run.split(hole);
                if let Some(holes) = holes {
                    self.stay_absent(range.take(hole), holes, skipped);
                }
                let Some((range, run)) = range.skip(hole).zip(run) else { break };
                let (here, behind) = run.split(pages);
                if let Some(here) = here {
                    self.copy_out_present(range.take(pages), here, isolated, skipped);
                }
                part = range.skip(pages).zip(behind);
            }
            if let Some((range, run)) = part {
                self.stay_absent(range, run, skipped);
            }
        }
    }

    /// What is present, the page of zeros included.
    fn there(&self, range: VaRange, found: &mut [VaRange; 16]) -> (usize, Vpn) {
        let mut unusual = [Unusual::absent(range); 16];
        // Each of them may have present pages before it, and one stretch lies behind the last.
        let (count, end) = self.host.unusual(range, Sort::Anonymous, &mut unusual[..15]);
        let absent = unusual[..count].iter().filter(|unusual| !unusual.present);
        let gaps = absent.map(|absent| (absent.range.first(), absent.range.end_page()));
        let (mut filled, mut from) = (0, range.first());
        for (gap, behind) in gaps.chain([(end, end)]) {
            if let Some(present) = VaRange::of_pages(from, gap.since(from)) {
                found[filled] = present;
                filled += 1;
            }
            from = behind;
        }
        (filled, end)
    }

    /// Holes, and pages that are the zero page. They are not copied: to read a hole would be a fault, of the
    /// very thread that has the claim.
    fn stay_absent(&self, range: VaRange, run: Run<'_, Empty, H>, skipped: &mut Skipped) {
        let _ = self.host.write_protect(range, false);
        self.stay(range, run, Skip::Hole, skipped);
    }

    fn copy_out_present<'m>(
        &'m self,
        range: VaRange,
        run: Run<'m, Empty, H>,
        isolated: &mut Isolated<'m, H>,
        skipped: &mut Skipped,
    ) {
        // SAFETY: the slots are the run's and empty.
        let progress = unsafe { self.host.copy_out(range, run.address()) };
        let (copied, left) = run.split(progress.done);
        if let Some(run) = copied {
            let copied = range.take(progress.done);
            let mut rest = Some((copied, run.filled()));
            while let Some((range, run)) = rest.take() {
                let discarded = |page: Vpn| self.table.entry(page).load().is_discarded();
                let same = discarded(range.first());
                // The first one may be given up between two looks, and counts as it was at the first.
                let others = range.iter().skip(1).take_while(|page| discarded(*page) == same).count();
                let pages = PageCount::new(1 + others);
                let (part, left) = run.split(pages);
                let Some(part) = part else { break };
                if same {
                    // Given up by the program after the claim: nothing to keep, and nothing of ours to take.
                    for (page, slot) in range.iter().zip(part.slots()) {
                        self.leave_at_home(page, slot);
                    }
                    drop(part);
                } else {
                    // SAFETY: the pages are copied, and writes were shut out from before the copy until now.
                    let gone = unsafe { self.discard_own(range.take(pages)) };
                    if gone.is_complete() {
                        isolated.add(range.take(pages), part);
                    } else {
                        self.keep(range.take(pages), part, reason(gone.stop), skipped);
                    }
                }
                rest = range.skip(pages).zip(left);
            }
        }
        if let (Some(range), Some(run)) = (range.skip(progress.done), left) {
            self.lift_for_good(range, &run);
            self.stay(range, run, reason(progress.stop), skipped);
        }
    }

    /// Pages whose discard failed: they stay, writable again. Some may be gone all the same, since a discard
    /// that spans mappings fails at one of them after it has emptied others; they come back from their copies.
    fn keep(&self, range: VaRange, run: Run<'_, Framed, H>, why: Skip, skipped: &mut Skipped) {
        skipped.add(why, range.pages().get());
        self.lift_for_good(range, &run);
        for (page, slot) in range.iter().zip(run.slots()) {
            while !self.restored(page, slot) {
                crate::sync::relax();
            }
        }
    }

    /// Makes sure that a claimed page is there, whose contents are in `slot` as well, and ends the claim.
    /// `false` if events must be read first, or memory is short.
    fn restored(&self, page: Vpn, slot: Slot) -> bool {
        let _layout = self.layout.read(&self.host);
        let source = NonNull::new(self.arena.address(slot).get() as *mut u8).expect("slots have addresses");
        if !self.table.entry(page).load().is_discarded() {
            // SAFETY: the slot is the caller's and holds a frame.
            let progress = unsafe { self.host.install_copy(source, VaRange::page(page), Install::Writable) };
            if matches!(progress.stop, Stop::Pending | Stop::NoMemory | Stop::Busy | Stop::Errno(_)) {
                return false;
            }
        }
        self.leave_at_home(page, slot);
        true
    }

    /// Lifts the write protection of claimed pages, whose copies may be out of date from then on.
    fn lift_for_good<S: RunState>(&self, range: VaRange, run: &Run<'_, S, H>) {
        for copy in run.slots().filter_map(|slot| self.arena.take_copy(slot)) {
            self.pagemaps.of(copy).put(copy);
        }
        let _ = self.host.write_protect(range, false);
    }
}
