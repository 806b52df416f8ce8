//! What the pages of a range are, brought there as asked (the kernel's `hmm_range_fault`).
//!
//! What    [`Mm::snapshot`] looks; [`Mm::range_fault`] looks, has pages brought as a touch of them would, and looks
//!         again, until all are as asked.
//! How     a page's word says whether it is away, the host's page map whether it is there and how, the mapping
//!         whether it may be written. A page counts as there only where all three say so.
//! Locks   the layout lock for reading, around the look at a few chunks; none while pages are brought. What
//!         allocates (the list of mappings may) is asked before.
//! Races   a look is old when it ends. It is *consistent*: no change of the program's own had begun, unread, when it
//!         ended ([`Host::is_changing`]); a page that moves says so in its word. Whoever keeps what he saw has a
//!         [`Mirror`](super::Mirror) for it.
//! Fails   page by page, with the first page that cannot be as asked. What is forbidden is known before anything is
//!         touched.

use uhmm_addr::{CHUNK_PAGES, Geometry, PageCount, VaRange, Vpn};

use super::gone::Gone;
use super::request::{Patience, RangeFaultError, Request, Retry, Want};
use super::view::{PageView, Unusable};
use crate::fault::{Access, Fault, Resolution, Scratch};
use crate::host::{Host, Mapped, Rights};
use crate::mm::Mm;
use crate::pagetable::{PageWord, State};

/// Mappings, or stretches of pages, that are asked for at a time.
const FOUND: usize = 16;
/// Pages that a snapshot looks at under one hold of the lock: long enough that the calls to the host do not count, short
/// enough that nobody who reads events waits for it.
const SPAN: usize = 16 * CHUNK_PAGES;

const NO_RIGHTS: Rights =
    Rights { range: VaRange::page(Vpn::new(0)), read: false, write: false, shared: false, file: false };
const NOT_MAPPED: Mapped =
    Mapped { range: VaRange::page(Vpn::new(0)), write: false, huge: false, zero: false, file: false };

/// What is left of `range` from `end` on.
fn behind(range: VaRange, end: Vpn) -> Option<VaRange> {
    VaRange::of_pages(end, range.end_page().since(end))
}

/// The views of `part` among those of pages from `first` on.
fn part_of(views: &mut [PageView], first: Vpn, part: VaRange) -> &mut [PageView] {
    let at = part.first().since(first).get();
    &mut views[at..at + part.pages().get()]
}

/// Says `view` of the pages from `from` to before `to`, if there are any; the views begin at `first`.
fn fill_between(views: &mut [PageView], first: Vpn, from: Vpn, to: Vpn, view: PageView) {
    if let Some(gap) = VaRange::of_pages(from, to.since(from)) {
        part_of(views, first, gap).fill(view);
    }
}

/// What a look at the pages of a mapping came to.
struct Seen {
    /// No change was under way.
    settled: bool,
    /// Some are part of a huge mapping.
    huge: bool,
}

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
        self.snapshot_beside(range, &Gone::NOTHING, request, views)
    }

    pub(super) fn snapshot_beside(
        &self,
        range: VaRange,
        gone: &Gone,
        request: &Request<'_>,
        views: &mut [PageView],
    ) -> Result<(), RangeFaultError> {
        self.check_size(range, views)?;
        let mut rest = Some(range);
        while let Some(left) = rest {
            let part = left.take(PageCount::new(SPAN - left.first().in_chunk()));
            let views = part_of(views, range.first(), part);
            if !self.look(part, gone, request, views) {
                // What was seen may be over: a snapshot does not wait for the event.
                views.iter_mut().filter(|view| view.is_valid()).for_each(|view| *view = PageView::Absent);
            }
            rest = left.skip(part.pages());
        }
        Ok(())
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
        self.check_size(range, views)?;
        self.permit(range, &Gone::NOTHING, request)?;
        for part in range.chunks() {
            let request = request.skip(part.first().since(range.first()).get());
            patience.begin();
            let views = part_of(views, range.first(), part);
            self.fault_chunk(part, &Gone::NOTHING, &request, views, scratch, patience)?;
        }
        Ok(())
    }

    /// The same for pages of one chunk, whose mappings were asked for permission, and patience has begun.
    pub(super) fn fault_chunk(
        &self,
        part: VaRange,
        gone: &Gone,
        request: &Request<'_>,
        views: &mut [PageView],
        scratch: &mut Scratch,
        patience: &mut dyn Patience,
    ) -> Result<(), RangeFaultError> {
        if !request.asks() {
            return self.snapshot_beside(part, gone, request, views);
        }
        let mut attempt = 0;
        while let Some(why) = self.attempt(part, gone, request, views, attempt, scratch)? {
            if self.is_closed() {
                return Err(RangeFaultError::Closed);
            }
            // Pages were brought, which is what was asked; from then on somebody is in the way.
            if attempt > 0 && !patience.again(why) {
                return Err(RangeFaultError::TimedOut(why));
            }
            attempt += 1;
            self.permit(part, gone, request)?;
        }
        Ok(())
    }

    fn check_size(&self, range: VaRange, views: &[PageView]) -> Result<(), RangeFaultError> {
        assert_eq!(range.pages().get(), views.len(), "one view for each page");
        if self.table.covers(range) { Ok(()) } else { Err(RangeFaultError::Outside(range)) }
    }

    /// Whether the mappings of `range` permit what is asked. Touches nothing.
    pub(super) fn permit(
        &self,
        range: VaRange,
        gone: &Gone,
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
        for part in gone.iter().filter_map(|gone| gone.intersect(range)) {
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

    // --- looking -------------------------------------------------------------------------------------------

    /// What the pages of `part` are. `false` if it may be over: a change is under way.
    pub(super) fn look(
        &self,
        part: VaRange,
        gone: &Gone,
        request: &Request<'_>,
        views: &mut [PageView],
    ) -> bool {
        let (mut settled, mut huge) = (true, false);
        let mut found = [NO_RIGHTS; FOUND];
        let mut rest = Some(part);
        while let Some(range) = rest {
            let (count, end) = self.host.mappings(range, &mut found);
            let mut gap = range.first();
            for rights in found[..count].iter().filter(|rights| rights.read) {
                fill_between(
                    views,
                    part.first(),
                    gap,
                    rights.range.first(),
                    PageView::Error(Unusable::Unmapped),
                );
                let seen = self.look_at(*rights, request, part_of(views, part.first(), rights.range));
                (settled, huge) = (settled & seen.settled, huge | seen.huge);
                gap = rights.range.end_page();
            }
            fill_between(views, part.first(), gap, end, PageView::Error(Unusable::Unmapped));
            rest = behind(part, end);
        }
        for range in gone.iter().filter_map(|gone| gone.intersect(part)) {
            part_of(views, part.first(), range).fill(PageView::Error(Unusable::Unmapped));
        }
        if huge {
            for chunk in part.chunks() {
                keep_huge_whole(part_of(views, part.first(), chunk));
            }
        }
        settled
    }

    /// The same for the pages of one mapping.
    fn look_at(&self, rights: Rights, request: &Request<'_>, views: &mut [PageView]) -> Seen {
        let _layout = self.layout.read(&self.host);
        let first = rights.range.first();
        // Where the first store would replace them.
        let files = rights.file && !rights.shared;
        let mut huge = false;
        let mut found = [NOT_MAPPED; FOUND];
        let mut rest = Some(rights.range);
        while let Some(part) = rest {
            let (count, end) = self.host.mapped(part, files, &mut found);
            let mut gap = part.first();
            for mapped in &found[..count] {
                fill_between(views, first, gap, mapped.range.first(), PageView::Absent);
                let write = rights.write && mapped.write && !mapped.file;
                let view = match mapped.huge {
                    true => PageView::Ram { write, order: Geometry::M2 },
                    false if mapped.zero => PageView::Zeros,
                    false => PageView::Ram { write, order: Geometry::K4 },
                };
                part_of(views, first, mapped.range).fill(view);
                huge |= mapped.huge;
                gap = mapped.range.end_page();
            }
            fill_between(views, first, gap, end, PageView::Absent);
            rest = behind(part, end);
        }
        // Words after the page map: a page that leaves in between says so.
        for part in self.table.used(rights.range) {
            for (word, view) in self.table.words(part).zip(part_of(views, rights.range.first(), part)) {
                if word == PageWord::EMPTY {
                    continue;
                }
                *view = match word.state() {
                    // Given up, and there: the kernel is yet to take it away.
                    State::Empty | State::Resident if word.is_discarded() => PageView::Absent,
                    State::Empty | State::Resident => continue,
                    State::Poisoned => PageView::Error(Unusable::Poisoned),
                    // What could be mapped in place is brought there by being asked for; in a mapping that may not be
                    // written it cannot.
                    State::Device if rights.write && self.is_mappable(word) => PageView::Absent,
                    State::Device => match word.pfn() {
                        Some(pfn) if request.is_own(self.pagemaps.of(pfn)) => {
                            PageView::Device { pfn, write: rights.write }
                        }
                        _ => PageView::Absent,
                    },
                    State::Exclusive => match word.slot() {
                        Some(slot) if rights.write && request.is_held(self.holder_of(slot)) => {
                            PageView::Exclusive { at: self.slot_address(slot) }
                        }
                        _ => PageView::Absent,
                    },
                    State::Coherent => match (word.pfn(), *view) {
                        (Some(pfn), PageView::Ram { write, .. }) => {
                            PageView::Coherent { owner: self.pagemaps.of(pfn).owner(), pfn, write }
                        }
                        _ => PageView::Absent,
                    },
                    State::Staged | State::Moving => PageView::Absent,
                };
            }
        }
        Seen { settled: !self.host.is_changing(), huge }
    }

    // --- bringing ------------------------------------------------------------------------------------------

    /// Looks, and does something about the pages that are not as asked. `None` if all are; otherwise it is to be
    /// tried again.
    fn attempt(
        &self,
        part: VaRange,
        gone: &Gone,
        request: &Request<'_>,
        views: &mut [PageView],
        attempt: u32,
        scratch: &mut Scratch,
    ) -> Result<Option<Retry>, RangeFaultError> {
        if !self.look(part, gone, request, views) {
            return Ok(Some(Retry::Pending));
        }
        let mut outcome = None;
        let mut n = 0;
        while n < views.len() {
            let want = request.want(n);
            if is_met(views[n], want) {
                n += 1;
                continue;
            }
            let page = part.first().forward(PageCount::new(n));
            match views[n].error() {
                Some(Unusable::Poisoned) => return Err(RangeFaultError::Poisoned(page.base())),
                Some(Unusable::Unmapped) => return Err(RangeFaultError::Fault(page.base())),
                None => {}
            }
            // Neighbours that lack the same.
            let alike = |m: &usize| views[*m] == views[n] && request.want(*m) == want;
            let run = 1 + (n + 1..views.len()).take_while(alike).count();
            let range = VaRange::page(page).grow(PageCount::new(run));
            let why = self.bring(range, views[n], want, attempt, scratch)?;
            if matches!(why, Retry::Pending | Retry::Starved) {
                return Ok(Some(why));
            }
            outcome = Some(why);
            n += run;
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

fn is_met(view: PageView, want: Want) -> bool {
    match want {
        Want::Nothing => true,
        Want::Read => view.is_valid(),
        Want::Write => view.may_write(),
    }
}

/// A huge mapping is reported as one only where a driver may take it over as one: all of the chunk was asked about,
/// and all of it is there.
fn keep_huge_whole(views: &mut [PageView]) {
    let first = views[0];
    if first.order() == Geometry::M2 && views.len() == CHUNK_PAGES && views.iter().all(|view| *view == first)
    {
        return;
    }
    for view in views {
        if let PageView::Ram { order, .. } = view {
            *order = Geometry::K4;
        }
    }
}
