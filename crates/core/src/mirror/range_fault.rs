//! What the pages of a range are, brought there as asked (the kernel's `hmm_range_fault`).
//!
//! What    [`Mm::snapshot`] looks; [`Mm::range_fault`] looks, has pages brought as a touch of them would, and looks
//!         again, until all are as asked.
//! Locks   those of a look ([`look`](super::look)); none while pages are brought.
//! Races   as those of a look. Whoever keeps what he saw has a [`Mirror`](super::Mirror) for it.
//! Fails   page by page, with the first page that cannot be as asked. What is forbidden is known before anything is
//!         touched.

use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, Vpn};

use super::look::{Beside, FOUND, NO_RIGHTS, behind};
use super::request::{Patience, RangeFaultError, Request, Retry, Want};
use super::view::{PageView, Segment, Segments, Unusable};
use crate::fault::{Access, Fault, Resolution, Scratch};
use crate::host::Host;
use crate::mm::Mm;
use crate::pagetable::State;
use crate::sync::Ordering;

/// Segments that a snapshot has room for between two looks.
const ROOM: usize = 64;

impl<H: Host> Mm<H> {
    /// What the pages of `range` are, into `views`, one for each page. Brings nothing, waits for no page, and may call
    /// a page absent that is about to change. `request` says whose private pages are reported; nothing else of it is
    /// looked at.
    ///
    /// # Errors
    /// [`RangeFaultError::Outside`].
    ///
    /// # Panics
    /// If there are more or fewer views than pages.
    pub fn snapshot(
        &self,
        range: VaRange,
        request: &Request<'_>,
        views: &mut [PageView],
    ) -> Result<(), RangeFaultError> {
        assert_eq!(range.pages().get(), views.len(), "one view for each page");
        self.segments(range, request, |segment| segment.copy_to(range.first(), views))
    }

    /// The same, told in segments: of pages that are alike, no more than one has to be looked at. `found` is called with
    /// no lock held.
    ///
    /// # Errors
    /// [`RangeFaultError::Outside`].
    pub fn segments(
        &self,
        range: VaRange,
        request: &Request<'_>,
        mut found: impl FnMut(Segment),
    ) -> Result<(), RangeFaultError> {
        self.check_covered(range)?;
        self.each_look(range, &Beside::NOTHING, request, |seen| {
            seen.as_slice().iter().copied().for_each(&mut found);
        });
        Ok(())
    }

    /// Calls `found` for what one look after the other finds in `range`.
    pub(super) fn each_look(
        &self,
        range: VaRange,
        beside: &Beside<'_>,
        request: &Request<'_>,
        mut found: impl FnMut(&Segments<'_>),
    ) {
        let mut room = [Segment::UNUSED; ROOM];
        let mut seen = Segments::new(&mut room);
        let mut rest = Some(range);
        while let Some(left) = rest {
            let beside = Beside { huge: self.expects_huge(), ..*beside };
            self.look_once(beside.span(left), &beside, request, &mut seen);
            found(&seen);
            rest = behind(range, seen.end());
        }
    }

    /// Whether the pages of the next look are expected to be huge.
    pub(super) fn expects_huge(&self) -> bool {
        self.looks_huge.load(Ordering::Relaxed)
    }

    /// A look of which nothing is asked: it does not wait until what is under way is over.
    fn look_once(&self, part: VaRange, beside: &Beside<'_>, request: &Request<'_>, seen: &mut Segments<'_>) {
        if !self.look(part, beside, request, seen) {
            seen.doubt();
        }
    }

    /// Makes the pages of `range` what `request` asks, and tells in `views`, one for each page, what they are.
    ///
    /// Like a touch of the pages it waits for devices, for room, and for others who move pages. The caller holds no
    /// lock, and his thread runs no signal handler that touches managed memory meanwhile.
    ///
    /// # Errors
    /// See [`RangeFaultError`]. The views are then worth nothing.
    ///
    /// # Panics
    /// If there are more or fewer views than pages.
    pub fn range_fault(
        &self,
        range: VaRange,
        request: &Request<'_>,
        views: &mut [PageView],
        scratch: &mut Scratch,
        patience: &mut dyn Patience,
    ) -> Result<(), RangeFaultError> {
        assert_eq!(range.pages().get(), views.len(), "one view for each page");
        self.check_covered(range)?;
        self.permit(range, &Beside::NOTHING, request)?;
        let mut room = [Segment::UNUSED; ROOM];
        let mut seen = Segments::new(&mut room);
        let mut rest = Some(range);
        while let Some(left) = rest {
            let request = request.skip(left.first().since(range.first()).get());
            patience.begin();
            self.fault_part(left, &Beside::NOTHING, &request, &mut seen, scratch, patience)?;
            seen.as_slice().iter().for_each(|segment| segment.copy_to(range.first(), views));
            rest = behind(range, seen.end());
        }
        Ok(())
    }

    /// The same for pages from the front of `part` on, as many as `seen` has segments for, and, where some must be brought,
    /// to the end of their chunk at most: more may be more than there is room for. Permission was asked, and patience has
    /// begun.
    pub(super) fn fault_part(
        &self,
        part: VaRange,
        beside: &Beside<'_>,
        request: &Request<'_>,
        seen: &mut Segments<'_>,
        scratch: &mut Scratch,
        patience: &mut dyn Patience,
    ) -> Result<(), RangeFaultError> {
        let mut part = beside.span(part);
        if !request.asks() {
            self.look_once(part, beside, request, seen);
            return Ok(());
        }
        let mut attempt = 0;
        while let Some(why) = self.attempt(&mut part, beside, request, seen, attempt, scratch)? {
            if self.is_closed() {
                return Err(RangeFaultError::Closed);
            }
            // Pages were brought, which is what was asked; from then on somebody is in the way.
            if attempt > 0 && !patience.again(why) {
                return Err(RangeFaultError::TimedOut(why));
            }
            attempt += 1;
            self.permit(part, beside, request)?;
        }
        Ok(())
    }

    pub(super) fn check_covered(&self, range: VaRange) -> Result<(), RangeFaultError> {
        if self.table.covers(range) { Ok(()) } else { Err(RangeFaultError::Outside(range)) }
    }

    /// Whether the mappings of `range` permit what is asked. Touches nothing.
    pub(super) fn permit(
        &self,
        range: VaRange,
        beside: &Beside<'_>,
        request: &Request<'_>,
    ) -> Result<(), RangeFaultError> {
        if !request.asks() {
            return Ok(());
        }
        // The first page of `part` of which more is wanted than `most`.
        let beyond = |part: VaRange, most: Want| {
            let at = part.first().since(range.first()).get();
            let look_at = if request.is_uniform() { 1 } else { part.pages().get() };
            let n = (at..at + look_at).find(|n| request.want(*n) > most)?;
            Some(range.first().forward(PageCount::new(n)).base())
        };
        for part in beside.gone.iter().filter_map(|gone| gone.intersect(range)) {
            if let Some(page) = beyond(part, Want::Nothing) {
                return Err(RangeFaultError::Fault(page));
            }
        }
        let mut found = [NO_RIGHTS; FOUND];
        let mut rest = Some(range);
        while let Some(part) = rest {
            let (count, end) = self.host.mappings(part, &mut found);
            let mut at = part.first();
            for rights in found[..count].iter().filter(|rights| rights.read) {
                let hole = VaRange::of_pages(at, rights.range.first().since(at));
                if let Some(page) = hole.and_then(|hole| beyond(hole, Want::Nothing)) {
                    return Err(RangeFaultError::Fault(page));
                }
                if !rights.write
                    && let Some(page) = beyond(rights.range, Want::Read)
                {
                    return Err(RangeFaultError::Permission(page));
                }
                at = rights.range.end_page();
            }
            let hole = VaRange::of_pages(at, end.since(at));
            if let Some(page) = hole.and_then(|hole| beyond(hole, Want::Nothing)) {
                return Err(RangeFaultError::Fault(page));
            }
            rest = behind(range, end);
        }
        Ok(())
    }

    // --- bringing ------------------------------------------------------------------------------------------

    /// Looks, and does something about the pages that are not as asked. `None` if all are that `part` is then;
    /// otherwise it is to be tried again with that.
    fn attempt(
        &self,
        part: &mut VaRange,
        beside: &Beside<'_>,
        request: &Request<'_>,
        seen: &mut Segments<'_>,
        attempt: u32,
        scratch: &mut Scratch,
    ) -> Result<Option<Retry>, RangeFaultError> {
        if !self.look(*part, beside, request, seen) {
            return Ok(Some(Retry::Pending));
        }
        *part = part.take(seen.end().since(part.first()));
        let first = part.first();
        let Some((page, ..)) = first_unmet(*part, seen, request) else { return Ok(None) };
        // Those before it are as asked, and it is somebody else's turn to bring the others.
        if page.chunk_base() > first {
            seen.truncate(page.chunk_base());
            *part = part.take(page.chunk_base().since(first));
            return Ok(None);
        }
        seen.truncate(first.forward(PageCount::new(CHUNK_PAGES - first.in_chunk())));
        *part = part.take(seen.end().since(first));
        let mut outcome = None;
        let mut rest = Some(*part);
        while let Some(left) = rest {
            let Some((page, view, want)) =
                first_unmet(left, seen, &request.skip(left.first().since(first).get()))
            else {
                break;
            };
            match view.error() {
                Some(Unusable::Poisoned) => return Err(RangeFaultError::Poisoned(page.base())),
                Some(Unusable::Unmapped) => return Err(RangeFaultError::Fault(page.base())),
                None => {}
            }
            // Neighbours that lack the same.
            let Some(behind_it) = behind(*part, page) else { break };
            let alike = |(other, this): &(Vpn, PageView)| {
                *this == view && request.want(other.since(first).get()) == want
            };
            let pages = seen.pages().iter().skip(page.since(first).get());
            let range = behind_it.take(PageCount::new(pages.take_while(alike).count()));
            let why = self.bring(range, view, want, attempt, scratch)?;
            if matches!(why, Retry::Pending | Retry::Starved) {
                return Ok(Some(why));
            }
            outcome = Some(why);
            rest = behind(*part, range.end_page());
        }
        Ok(outcome)
    }

    /// Has pages that are alike brought as a touch of each would.
    fn bring(
        &self,
        range: VaRange,
        view: PageView,
        want: Want,
        attempt: u32,
        scratch: &mut Scratch,
    ) -> Result<Retry, RangeFaultError> {
        let away = |page: Vpn| {
            let state = self.table.entry(page).load().state();
            matches!(state, State::Device | State::Staged | State::Exclusive)
        };
        // Many pages at a time first, and by themselves what that left: it does not say why.
        if attempt == 0 && range.iter().any(away) {
            self.prefetch(range, scratch);
            return Ok(Retry::Changed);
        }
        let access = match (view.is_valid(), want) {
            (true, _) => Access::WriteProtected,
            (false, Want::Write) => Access::Write,
            (false, _) => Access::Read,
        };
        let mut why = Retry::Changed;
        let mut rest = Some(range);
        while let Some(part) = rest {
            let page = part.first();
            let mut done = PageCount::ONE;
            match self.resolve(Fault { addr: page.base(), access, ours: false }, scratch) {
                Resolution::Resolved(pages) => done = pages.max(PageCount::ONE),
                Resolution::InFlight => {
                    self.wait_in_flight(page);
                    why = Retry::InFlight;
                }
                Resolution::Pending => return Ok(Retry::Pending),
                Resolution::Starved => return Ok(Retry::Starved),
                Resolution::Poisoned(_) => return Err(RangeFaultError::Poisoned(page.base())),
                Resolution::Unmanaged => return Err(RangeFaultError::Fault(page.base())),
            }
            rest = part.skip(done);
        }
        if attempt > 0 {
            // What no fault handler is asked about: swap, and the page of zeros. What the host cannot do is found
            // undone by the next look.
            let _ = self.host.touch(range, want == Want::Write);
        }
        Ok(why)
    }
}

const fn is_met(view: PageView, want: Want) -> bool {
    match want {
        Want::Nothing => true,
        Want::Read => view.is_valid(),
        Want::Write => view.may_write(),
    }
}

/// The first page of `range`, all of which was seen, that is not as is asked of pages from its first one on; what it is, and
/// what is asked of it.
fn first_unmet(range: VaRange, seen: &Segments<'_>, request: &Request<'_>) -> Option<(Vpn, PageView, Want)> {
    for segment in seen.as_slice().iter().filter_map(|segment| segment.part(range)) {
        let looked_at = if request.is_uniform() { 1 } else { segment.range().pages().get() };
        for (page, view) in segment.iter().take(looked_at) {
            let want = request.want(page.since(range.first()).get());
            if !is_met(view, want) {
                return Some((page, view, want));
            }
        }
    }
    None
}
