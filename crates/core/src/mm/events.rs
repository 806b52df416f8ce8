//! Events: what the program's own munmap, mremap, madvise and fork mean for the page words.
//!
//! What    a method for each event, and the fallback's own discards, which raise the same event as the program's
//!         and must be told apart from it.
//! Why     a word that nobody takes back speaks for whatever is mapped at its address next.
//! Owns    what a word gave up is freed. The words of a child hold references of their own.
//! Locks   the layout lock for writing, while events are applied. A claim cannot be waited for under it: it is
//!         flagged, and gives up. `fallback` is taken without the layout lock, which a discard of ours then takes
//!         once, to see its event applied.
//! Fails   a discard of ours can be refused, as any call of the host. Nothing else fails.

use uhmm_addr::{PageCount, VaRange, VirtAddr, Vpn};

use super::Mm;
use super::discard::Whose;
use crate::host::Host;
use crate::notifier::Event;
use crate::pagetable::{Discard, Kind, PageWord, State};
use crate::sync::WriteGuard;

impl<H: Host> Mm<H> {
    /// The program gives up the contents of `range`, and the kernel takes the pages away a moment later
    /// (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`): the pages come back as zeros and may not be moved out
    /// until they were filled again.
    pub fn removed(&self, layout: &WriteGuard<'_, H>, range: VaRange) {
        match self.own_discard.whose(range) {
            Whose::Ours => {}
            Whose::OursAfter(before) => self.give_up_contents(layout, before),
            Whose::Programs => self.give_up_contents(layout, range),
        }
    }

    fn give_up_contents(&self, layout: &WriteGuard<'_, H>, range: VaRange) {
        let _told = self.tell(range, Event::Clear);
        self.forget(layout, range, true);
        // Pages without a word may be there as well, and are not to leave before the kernel has taken them.
        let mut found = [VaRange::page(Vpn::new(0)); 16];
        let mut rest = Some(range);
        while let Some(part) = rest {
            let (count, end) = self.host.present(part, &mut found);
            for page in found[..count].iter().flat_map(|range| range.iter()) {
                if let Some(entry) = self.table.get(page) {
                    entry.annotate(PageWord::with_discarded);
                }
            }
            rest = VaRange::of_pages(end, part.end_page().since(end));
        }
        self.count_change(range);
    }

    /// The mapping of `range` is gone.
    pub fn unmapped(&self, layout: &WriteGuard<'_, H>, range: VaRange) {
        let _told = self.tell(range, Event::Unmap);
        self.note_change(layout, range);
        self.forget(layout, range, false);
        self.count_change(range);
    }

    fn forget(&self, _layout: &WriteGuard<'_, H>, range: VaRange, hold: bool) {
        for part in self.table.used(range) {
            for page in part.iter() {
                if let Discard::Took(old) = self.table.entry(page).discard(hold) {
                    self.free(old);
                }
            }
        }
    }

    /// The program knows that the kernel has taken away what [`Mm::removed`] announced for `range`: pages
    /// that are there now are new and may be moved out.
    pub fn removal_done(&self, range: VaRange) {
        for part in self.table.used(range) {
            for page in part.iter() {
                self.table.entry(page).annotate(PageWord::without_discarded);
            }
        }
    }

    /// The mapping at `from` was moved to `to` (`mremap`): words, and slots' notes, go along.
    ///
    /// A page in flight cannot be waited for under this lock. Its claim is told to give up, and the new
    /// address gets a word of its own: the contents of a page on its way in are still on the device; one on
    /// its way out is at the new address, unless the fallback has taken it away, and then its slot is
    /// complete.
    pub fn remapped(&self, layout: &WriteGuard<'_, H>, from: VaRange, to: VirtAddr) {
        let _told = self.tell(from, Event::Unmap);
        self.count_change(from);
        self.settle_moved_pins(from);
        self.note_change(layout, from);
        for part in self.table.used(from) {
            for page in part.iter() {
                let target = to.page().forward(page.since(from.first()));
                let entry = self.table.entry(page);
                let old = entry.load();
                if old == PageWord::EMPTY {
                    continue;
                }
                let word = match entry.discard(false) {
                    Discard::Took(word) => word,
                    Discard::Flagged => match (old.pfn(), old.slot()) {
                        (Some(pfn), _) => {
                            self.pagemaps.of(pfn).get(pfn);
                            if old.is_tracked() { PageWord::tracked(pfn) } else { PageWord::device(pfn) }
                        }
                        (None, Some(_)) if self.is_present(target) => PageWord::RESIDENT,
                        // Whoever has the claim has the slot, and finds this word by its note. The contents
                        // cannot be put in place here: the event of the unmapping that belongs to this one is
                        // yet to be read, by this thread.
                        (None, Some(slot)) => PageWord::staged(slot).with_writing(true),
                        (None, None) => PageWord::EMPTY,
                    },
                };
                let word = match (word.state(), word.slot()) {
                    // Whoever had it was told of the old address only.
                    (State::Exclusive, Some(slot)) => {
                        PageWord::staged(slot).with_pinned(word.is_pinned()).reused_like(word)
                    }
                    _ => word,
                };
                if let (State::Staged, Some(slot)) = (word.state(), word.slot()) {
                    let (arena, slot) = self.arena_of(slot);
                    arena.renote(slot, target);
                }
                match self.table.get(target) {
                    Some(target) => {
                        if let Discard::Took(stale) = target.discard(false) {
                            self.free(stale);
                        }
                        target.store(word.without_installed());
                    }
                    None => self.free(word),
                }
            }
        }
        self.count_change(from);
        self.count_change(VaRange::page(to.page()).grow(from.pages()));
    }

    /// The program has changed the protection of `range`, which no event tells.
    pub fn protected(&self, range: VaRange) {
        self.count_change(range);
    }

    // --- the fallback's own discards --------------------------------------------------------------------

    /// Waits until no discard of our own is under way. Whoever unmaps memory of ours calls this between
    /// [`Mm::unmapped`] and the unmapping, without the layout lock, so that no discard falls on what is mapped
    /// there next.
    pub fn pass_discards(&self) {
        drop(self.fallback.write(&self.host));
    }

    /// Waits until what the program did to its mappings, in calls that have returned, is known here: such a call
    /// goes on as soon as its event is read, which may be before it is applied.
    pub fn catch_up(&self) {
        drop(self.layout.read(&self.host));
    }

    /// Takes the pages of `range` away and tells their REMOVE event apart from the program's.
    ///
    /// # Safety
    /// As [`Host::discard`].
    pub(crate) unsafe fn discard_own(&self, range: VaRange) -> crate::host::Progress {
        let _one = self.fallback.write(&self.host);
        // Looked at once more under the gate, through which an unmapping of ours passes after it has set the
        // flags: what is mapped there now may be somebody else's.
        if range.iter().any(|page| self.table.entry(page).load().is_discarded()) {
            return crate::host::Progress::stopped(PageCount::ZERO, crate::host::Stop::Pending);
        }
        self.own_discard.begin(range);
        // SAFETY: the caller's promise.
        let progress = unsafe { self.host.discard(range) };
        // The discard goes on as soon as its event is *read*, which is under the layout lock held for writing:
        // whoever gets the lock finds it applied. Until then it must be known as ours.
        drop(self.layout.read(&self.host));
        self.own_discard.end();
        progress
    }

    /// The program forks: pages of `range` are shared with the child from now on, and replaced when written. Those that
    /// are mapped in place are ordinary memory of both from now on.
    pub fn forked(&self, _layout: &WriteGuard<'_, H>, range: VaRange) {
        let _told = self.tell(range, Event::ProtectPage);
        self.let_go(range);
        self.count_change(range);
    }

    /// The words of a page in the child of a fork, made from the parent's under the layout lock: `copy` is
    /// called for a page whose contents lie in the arena and must be copied to the child now.
    pub fn word_for_child(
        &self,
        _layout: &WriteGuard<'_, H>,
        page: Vpn,
        mut copy: impl FnMut(Vpn, VirtAddr),
    ) -> PageWord {
        let word = self.table.entry(page).load();
        let pinned = word.is_pinned();
        let child = match (word.state(), word.kind()) {
            // Of what is lent, the device was told to forget it (`Mm::forked`) under the same hold of the lock.
            (State::Staged | State::Exclusive, _) | (State::Moving, Some(Kind::Back | Kind::Out)) => {
                let slot = self.slot_address(word.slot().expect("these words name their slot"));
                // A page that is being copied out may not be there yet: the child has it where it was, then. To
                // read an empty slot would be a fault for whoever holds the layout lock.
                let filled = word.kind() != Some(Kind::Out) || self.is_present(slot.page());
                if filled && !word.is_discarded() {
                    copy(page, slot);
                }
                PageWord::RESIDENT
            }
            (State::Moving, _) if word.is_tracked() => word.pfn().map_or(PageWord::EMPTY, PageWord::tracked),
            (State::Moving, _) => word.pfn().map_or(PageWord::EMPTY, PageWord::device),
            (State::Empty, _) if word.is_discarded() => PageWord::EMPTY.with_discarded(),
            (State::Empty, _) => PageWord::EMPTY,
            // The kernel has shared its frame.
            (State::Coherent, _) => PageWord::RESIDENT,
            (State::Resident, _) => word.pfn().map_or(PageWord::RESIDENT, PageWord::tracked),
            (State::Poisoned, _) => PageWord::POISONED,
            _ => word.pfn().map_or(PageWord::EMPTY, PageWord::device),
        };
        if let Some(pfn) = child.pfn() {
            self.pagemaps.of(pfn).get(pfn);
        }
        child.with_pinned(pinned)
    }
}
