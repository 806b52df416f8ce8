//! Pages whose mapping is replaced by an empty one that is watched: what was in them is put in place again.
//!
//! What    [`Mm::begin_replacement`] claims the words of pages that are no device's; whoever has the claims replaces the
//!         mapping, and [`Replacement::fill`] puts the contents where they were.
//! Why     some memory cannot be watched as it is mapped (a file's private mapping). A thread that touches a page of the
//!         new mapping faults and waits for the claim, as for any page in flight, and never finds it empty.
//! Owns    the claims. Contents are the caller's, until the last page is filled.
//! Locks   the layout lock for reading, over each installing and the end of its claims; none in between, since the events
//!         of the replacing itself are read meanwhile.
//! Races   *the program unmaps or discards pages meanwhile*: the claim is flagged, and ends with nothing installed.
//!         *It moves them*: the new address has no word, and is filled with zeros; whoever replaces a mapping keeps the
//!         program from moving it. *It forks*: a child's pages are absent where ours are. The words say that they are
//!         being filled; who serves the child fills them with what is in the caller's hands.
//! Fails   a page that cannot be filled now is tried again by the caller: there is no other place for its contents.

use core::ptr::NonNull;

use uhmm_addr::{PageCount, VaRange, Vpn};

use crate::host::{Host, Install, Progress, Stop};
use crate::mm::Mm;
use crate::notifier::{Event, Invalidation};
use crate::pagetable::{Kind, PageWord, State};

/// Claims on pages whose mapping is being replaced.
///
/// Dropped before the mapping was replaced, it leaves everything as it was. Afterwards, pages that are not filled yet
/// read as zeros.
#[must_use = "the claims end when this is dropped"]
#[derive(Debug)]
pub struct Replacement<'m, H: Host> {
    mm: &'m Mm<H>,
    range: VaRange,
    settled: PageCount,
    // Told until the last claim has ended.
    _told: Option<Invalidation<'m, H>>,
}

impl<H: Host> Mm<H> {
    /// Claims the pages of `range`, about which nothing is known, and tells whoever subscribed that they change. `None`
    /// if one of them is pinned, or has contents elsewhere.
    pub fn begin_replacement(&self, range: VaRange) -> Option<Replacement<'_, H>> {
        for page in range.iter() {
            loop {
                match self.table.entry(page).exchange(PageWord::EMPTY, PageWord::filling()) {
                    Ok(()) => break,
                    // A neighbour's fault may have reached for it.
                    Err(seen) if seen.state() == State::Moving => self.wait_in_flight(page),
                    Err(_) => {
                        self.end_claims(range.first(), page.since(range.first()));
                        return None;
                    }
                }
            }
        }
        let _told = self.tell(range, Event::Migrate);
        Some(Replacement { mm: self, range, settled: PageCount::ZERO, _told })
    }

    fn end_claims(&self, first: Vpn, pages: PageCount) {
        for page in VaRange::of_pages(first, pages).iter().flat_map(|range| range.iter()) {
            // Nothing is owned by such a word.
            let left = self.table.entry(page).leave(PageWord::EMPTY);
            self.after_leave(page, left.wake);
        }
    }

    /// Whether the contents of `page` are in the hands of whoever replaces its mapping.
    pub fn is_being_replaced(&self, page: Vpn) -> bool {
        self.table.entry(page).load().kind() == Some(Kind::Fill)
    }
}

impl<H: Host> Replacement<'_, H> {
    /// Puts contents in place, page by page. `true` when all of them are where they belong, or are not wanted any more;
    /// otherwise it is to be called again when events were read, or there is memory.
    ///
    /// # Safety
    /// `contents` must be readable for the length of the range, the same each time, and not be managed memory.
    pub unsafe fn fill(&mut self, contents: NonNull<u8>) -> bool {
        let mm = self.mm;
        while let Some(rest) = self.range.skip(self.settled) {
            let _layout = mm.layout.read(&mm.host);
            let wanted = mm.wanted(rest.first(), PageCount::ZERO, rest.pages());
            let progress = if wanted.is_zero() {
                // Given up meanwhile: nothing is installed.
                Progress::stopped(PageCount::ZERO, Stop::Unmapped)
            } else {
                // SAFETY: the caller's promise; `settled` pages lie before this part.
                let contents = unsafe { contents.add(self.settled.bytes()) };
                // SAFETY: as above.
                unsafe { mm.host.install_copy(contents, rest.take(wanted), Install::Writable) }
            };
            let ended = match progress.stop {
                // Somebody else's page is there, or no mapping of ours. Nothing was installed that would wake.
                Stop::Present | Stop::Unmapped | Stop::Exiting if progress.done.is_zero() => {
                    mm.host.wake(VaRange::page(rest.first()));
                    PageCount::ONE
                }
                _ => progress.done,
            };
            mm.end_claims(rest.first(), ended);
            self.settled = self.settled.plus(ended);
            if ended.is_zero() {
                return false;
            }
        }
        true
    }

    /// Gives the contents up, which nobody can give back: a touch of a page that is not filled raises SIGBUS.
    pub fn lose(mut self) {
        let (mm, rest) = (self.mm, self.range.skip(self.settled));
        for page in rest.iter().flat_map(|rest| rest.iter()) {
            mm.stats.lose(page);
            let left = mm.table.entry(page).leave(PageWord::POISONED);
            if left.discarded {
                mm.stats.find_again(page);
            }
        }
        self.settled = self.range.pages();
        mm.wake(self.range);
    }
}

impl<H: Host> Drop for Replacement<'_, H> {
    fn drop(&mut self) {
        if let Some(rest) = self.range.skip(self.settled) {
            self.mm.end_claims(rest.first(), rest.pages());
        }
    }
}
