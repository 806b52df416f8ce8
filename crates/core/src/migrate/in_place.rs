//! Pages of coherent devices, which the CPU maps where they are.
//!
//! What    [`Mm::map_in_place`] moves the frame of a device page from the device's memory into the program's page table;
//!         [`Mm::take_off`] moves it back. In between, the word says `Coherent`, the page is present, and a touch of it
//!         is a load or a store to the device's own memory.
//! Why     what is mapped nowhere lies in the device's memory, so that everything that works with a private device's
//!         pages (transfers, the way home, the way to another device) works with these: a mapped page is taken off
//!         first.
//! Owns    the word owns the device page in both states. A frame is mapped only if nobody else holds the page: whoever
//!         holds one reads it from the device's memory.
//! Frames  a device page that is in use and not mapped has a frame in the device's memory ([`Mm::allocate_backed`]). What
//!         the program gives up takes its frame along: the page is free, and gets a fresh frame when it is used next.
//! Fork    the kernel shares frames with the child. From the fork on they are ordinary memory of both
//!         ([`Mm::let_go`]), and the device's pages are free.
//! Locks   the layout lock for reading, from the claims to the end of them: nobody sees a page half moved.
//! Fails   a page that cannot be mapped (a mapping that may not be written, a page that is pinned for RAM) stays in the
//!         device's memory; a touch brings it home. One that cannot be taken off stays mapped.

use alloc::sync::Arc;

use uhmm_addr::{PageCount, Pfn, PfnRange, VaRange, Vpn};

use crate::fault::Scratch;
use crate::host::{Host, Progress, Stop};
use crate::mm::Mm;
use crate::notifier::{Event, Owner};
use crate::pagemap::Pagemap;
use crate::pagetable::{PageWord, State};
use crate::stats::Skip;

/// How often events are waited for before a page is left as it is.
const PATIENCE: usize = 100;
/// Stretches of a device's memory that are looked at together.
const FOUND: usize = 16;

/// Which way frames go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From the device's memory to the program.
    Map,
    /// From the program to the device's memory.
    TakeOff,
}

impl<H: Host> Mm<H> {
    /// Whether the page with this word is on a coherent device, and can be mapped in place. A page that was pinned while
    /// it was away comes home; one that is lost is not mapped.
    pub(crate) fn is_mappable(&self, word: PageWord) -> bool {
        word.state() == State::Device
            && !word.is_pinned()
            && word.pfn().is_some_and(|pfn| {
                let map = self.pagemaps.of(pfn);
                map.memory().is_some() && !map.is_poisoned(pfn)
            })
    }

    /// Takes from the program what it has mapped of these device pages, which are lost ([`Pagemap::memory_failure`]): the
    /// next touch asks the device for them, and fails. What cannot be taken off now (it is pinned, or its mapping may not
    /// be written) stays mapped. Not for threads that serve faults.
    pub fn unmap_lost(&self, pages: PfnRange) {
        let lost = |word: PageWord| !word.is_pinned() && word.pfn().is_some_and(|pfn| pages.contains(pfn));
        for part in self.table.used(self.table.range()) {
            self.take_off_all(part, None, lost);
        }
    }

    /// Maps the page in place, and those that follow it on the device as they do here, `most` in all.
    pub(crate) fn map_in_place(&self, page: Vpn, most: PageCount, by: Option<Owner>) -> Progress {
        self.exchange_frames(page, most, by, Way::Map, |word| self.is_mappable(word))
    }

    /// Takes the page from the program, and those that follow it on the device as they do here, `most` in all: they are
    /// in the device's memory then, and absent. Pinned ones stay.
    pub(crate) fn take_off(&self, page: Vpn, most: PageCount, by: Option<Owner>) -> Progress {
        self.take_off_if(page, most, by, |word| !word.is_pinned())
    }

    /// As [`Mm::take_off`], of one page whose pin is the caller's.
    pub(crate) fn take_off_pinned(&self, page: Vpn) -> Progress {
        self.take_off_if(page, PageCount::ONE, None, |_| true)
    }

    fn take_off_if(
        &self,
        page: Vpn,
        most: PageCount,
        by: Option<Owner>,
        willing: impl Fn(PageWord) -> bool,
    ) -> Progress {
        let progress = self.exchange_frames(page, most, by, Way::TakeOff, &willing);
        match progress.stop {
            // Many pages are refused together also where each could move.
            Stop::Refused if progress.done.is_zero() && most == PageCount::ONE => {
                self.copy_off(page, by, willing)
            }
            _ => progress,
        }
    }

    /// The second way off, where frames cannot move (the mapping may not be written): the page is copied into the
    /// device's memory behind a write protection, and then discarded, as pages that leave RAM are.
    fn copy_off(&self, page: Vpn, by: Option<Owner>, willing: impl Fn(PageWord) -> bool) -> Progress {
        let range = VaRange::page(page);
        let _one_at_a_time = self.copying.write(&self.host);
        let layout = self.layout.read(&self.host);
        let claimed = self.claim_mapped(page, Way::TakeOff, willing);
        let place = claimed.and_then(|pfn| {
            let map = self.pagemaps.of(pfn);
            map.place(PfnRange::new(pfn, PageCount::ONE)).map(|place| (pfn, map, place))
        });
        let Some((pfn, map, place)) = place else { return Progress::stopped(PageCount::ZERO, Stop::Refused) };
        let _told = self.tell_migration(range, by);
        // To read an absent page would be a fault of ours, for which our own claim would have to end.
        let mut progress = Progress::stopped(PageCount::ZERO, Stop::Refused);
        if self.is_present(page) {
            progress = self.host.write_protect(range, true);
        }
        if progress.is_complete() {
            // SAFETY: the page of the device's memory is the word's, which is claimed, and absent: the frame is mapped.
            progress = unsafe { self.host.copy_out(range, place.start()) };
        }
        drop(layout);
        let copied = progress.is_complete();
        if copied {
            // SAFETY: the page is copied, and writes were shut out from before the copy until now.
            progress = unsafe { self.discard_own(range) };
        }
        let off = progress.is_complete();
        let entry = self.table.entry(page);
        let layout = self.layout.read(&self.host);
        // A mapping that moved meanwhile counts on the copy.
        if copied && !off && !entry.load().is_discarded() {
            // SAFETY: the copy's place is ours, and nobody needs it: the page itself stays where it is.
            unsafe { self.host.release(&[place]) };
        }
        if !off {
            // Where this cannot be now, the first store asks for it again.
            let _ = self.host.write_protect(range, false);
        }
        let word = if off { PageWord::device(pfn) } else { PageWord::coherent(pfn) };
        let left = entry.leave(word.with_past_of(entry.load()));
        drop(layout);
        if left.discarded {
            map.put(pfn);
        }
        self.after_leave(page, left.wake);
        if off {
            Progress::complete(PageCount::ONE)
        } else {
            Progress::stopped(PageCount::ZERO, progress.stop)
        }
    }

    fn exchange_frames(
        &self,
        page: Vpn,
        most: PageCount,
        by: Option<Owner>,
        way: Way,
        willing: impl Fn(PageWord) -> bool,
    ) -> Progress {
        let _layout = self.layout.read(&self.host);
        let refused = Progress::stopped(PageCount::ZERO, Stop::Refused);
        let Some(first) = self.claim_mapped(page, way, &willing) else { return refused };
        let follows = |n: usize| {
            let pfn = self.claim_mapped(page.forward(PageCount::new(n)), way, |word| {
                word.pfn() == Some(first.forward(PageCount::new(n))) && willing(word)
            });
            pfn.is_some()
        };
        let map = self.pagemaps.of(first);
        let room =
            map.range().end().since(first).at_most(most).at_most(self.table.range().end_page().since(page));
        let pages = PageCount::new(1 + (1..room.get()).take_while(|n| follows(*n)).count());
        let range = VaRange::page(page).grow(pages);
        let _told = self.tell_migration(range, by);
        let progress = match map.place(PfnRange::new(first, pages)) {
            // SAFETY: the words name these device pages and are claimed, and nobody else holds the pages: the frames are
            // ours, and where they are is written down below.
            Some(place) if way == Way::Map => unsafe { self.host.install(place.start(), range) },
            // SAFETY: the words are claimed, and where the frames went is written down below. The pages of the device's
            // memory belong to the words, and are absent as long as these say that they are mapped.
            Some(place) => unsafe { self.host.isolate(range, place.start()) },
            None => refused,
        };
        for (n, page) in range.iter().enumerate() {
            let pfn = first.forward(PageCount::new(n));
            let moved = n < progress.done.get();
            let mapped = moved == (way == Way::Map);
            let gone = way == Way::TakeOff && n == progress.done.get() && progress.stop == Stop::Hole;
            let entry = self.table.entry(page);
            let word = match mapped {
                // Given up by the program, and nobody told.
                _ if gone => PageWord::EMPTY,
                true => PageWord::coherent(pfn).with_past_of(entry.load()),
                false => PageWord::device(pfn).with_past_of(entry.load()),
            };
            let left = entry.leave(word);
            debug_assert!(!left.discarded, "the layout lock keeps discards out");
            if gone {
                map.put(pfn);
            }
            self.after_leave(page, left.wake);
        }
        progress
    }

    /// Claims a page whose frame may go this way. Returns its device page.
    fn claim_mapped(&self, page: Vpn, way: Way, willing: impl Fn(PageWord) -> bool) -> Option<Pfn> {
        let entry = self.table.get(page)?;
        let word = entry.load();
        let pfn = word.pfn()?;
        let state = if way == Way::Map { State::Device } else { State::Coherent };
        if word.state() != state
            || !willing(word)
            || entry.exchange(word, PageWord::moving_in(pfn).claimed_from(word)).is_err()
        {
            return None;
        }
        // With the word claimed nobody comes by a reference that had none.
        if way == Way::Map && self.pagemaps.of(pfn).count(pfn) != 1 {
            let left = entry.leave(word);
            self.after_leave(page, left.wake);
            return None;
        }
        Some(pfn)
    }

    /// Maps every page of `range` that is on a coherent device in place, as far as that can be.
    pub(super) fn map_all_in_place(&self, range: VaRange, by: Option<Owner>) {
        self.each(range, |word| self.is_mappable(word), |page, most| self.map_in_place(page, most, by));
    }

    /// Takes the pages of `range` that are mapped in place, and whose words `leave` accepts, from the program, as far as
    /// that can be.
    pub(super) fn take_off_all(&self, range: VaRange, by: Option<Owner>, leave: impl Fn(PageWord) -> bool) {
        let mapped = &|word: PageWord| word.state() == State::Coherent && leave(word);
        self.each(range, mapped, |page, most| self.take_off_if(page, most, by, mapped));
    }

    fn each(
        &self,
        range: VaRange,
        wanted: impl Fn(PageWord) -> bool,
        step: impl Fn(Vpn, PageCount) -> Progress,
    ) {
        let mut patience = PATIENCE;
        let mut most = range.pages();
        let mut rest = Some(range);
        while let Some(part) = rest {
            let page = part.first();
            let mut looked_at = PageCount::ONE;
            if wanted(self.table.entry(page).load()) {
                let progress = step(page, most);
                match progress.stop {
                    _ if !progress.done.is_zero() => looked_at = progress.done,
                    Stop::Pending if patience > 0 => {
                        patience -= 1;
                        self.wait_for_events();
                        crate::sync::relax();
                        continue;
                    }
                    // The kernel refuses as a whole what several mappings hold.
                    Stop::Refused if most > PageCount::ONE => {
                        most = PageCount::new(most.get() / 2);
                        continue;
                    }
                    _ => {}
                }
            }
            rest = part.skip(looked_at);
            most = range.pages();
        }
    }

    /// Pages of `to`, as [`Pagemap::allocate`] gives them; of a coherent device, each with a frame.
    pub(super) fn allocate_backed(&self, to: &Arc<Pagemap>, most: PageCount) -> Result<PfnRange, Skip> {
        let pages = to.allocate(most).ok_or(Skip::Full)?;
        let backed = to.place(pages).map_or(Ok(()), |place| self.back(place));
        backed.map(|()| pages).inspect_err(|_| to.put_range(pages))
    }

    /// Has a frame in every page of `place`, a part of a device's memory that is the caller's.
    fn back(&self, place: VaRange) -> Result<(), Skip> {
        let mut found = [place; FOUND];
        let mut patience = PATIENCE;
        let mut rest = Some(place);
        'look: while let Some(part) = rest {
            let (count, end) = self.host.holes(part, &mut found);
            for hole in &found[..count] {
                match self.host.install_zero(*hole).stop {
                    Stop::Complete => {}
                    Stop::Pending if patience > 0 => {
                        patience -= 1;
                        self.wait_for_events();
                        crate::sync::relax();
                        continue 'look;
                    }
                    Stop::Pending => return Err(Skip::Changed),
                    Stop::NoMemory => return Err(Skip::NoFrame),
                    _ => return Err(Skip::Failed),
                }
            }
            rest = VaRange::of_pages(end, part.end_page().since(end));
        }
        Ok(())
    }

    /// Brings the pages of `range` home that coherent devices have. Those that cannot leave their device (somebody has
    /// pinned them, or the mapping may not be written) become ordinary memory where they are: for the end of a watch, or
    /// of a process's only copy.
    pub fn leave_coherent(&self, range: VaRange, scratch: &mut Scratch) {
        for map in self.pagemaps.iter().filter(|map| map.memory().is_some()) {
            let _ = self.evict_pfns(range, map.range(), None, scratch);
        }
        let mut pages = self.table.used(range).flat_map(VaRange::iter);
        if pages.any(|page| self.table.entry(page).load().state() == State::Coherent) {
            let _told = self.tell(range, Event::Migrate);
            self.let_go(range);
        }
    }

    /// Lets the pages of `range` that are mapped in place be the program's ordinary memory, frames and all: nothing
    /// changes for the program, and the device's pages are free. Subscribers are told by who calls.
    pub(crate) fn let_go(&self, range: VaRange) {
        if self.pagemaps.iter().all(|map| map.memory().is_none()) {
            return;
        }
        for page in self.table.used(range).flat_map(VaRange::iter) {
            let entry = self.table.entry(page);
            let mut word = entry.load();
            while let (State::Coherent, Some(pfn)) = (word.state(), word.pfn()) {
                let next = PageWord::EMPTY.with_pinned(word.is_pinned());
                match entry.exchange(word, next) {
                    Ok(()) => {
                        self.pagemaps.of(pfn).put(pfn);
                        break;
                    }
                    Err(now) => word = now,
                }
            }
        }
    }
}
